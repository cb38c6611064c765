"""Hypervisors as programs: one module or package for each personality."""
