"""Scenario in, Result out: reports, comparisons, validation."""
