"""Recorded guests: the project's trace format, what a real hypervisor did with them, and importers."""
