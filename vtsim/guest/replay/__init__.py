"""Recorded guests as programs: a trace is lowered to rows that the engine executes like any others."""
