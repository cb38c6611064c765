"""Guest kernels and applications, as programs."""
