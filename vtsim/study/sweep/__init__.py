"""Sweeps: one scenario over a space of settings."""
