"""Recorded VMX cases: read them, run each on the model, and compare field by field."""
