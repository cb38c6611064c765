"""What the processors of one core share; no profile by itself."""
