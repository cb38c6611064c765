"""Guest kernels and applications, as programs."""

from vtsim.guest import structures as structures  # registers its primitives
