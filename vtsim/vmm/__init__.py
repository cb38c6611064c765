"""Hypervisors as programs: personalities, techniques, exit paths."""
