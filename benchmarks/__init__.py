"""How fast the simulator simulates: rates with their spread, never asserted by a test."""
