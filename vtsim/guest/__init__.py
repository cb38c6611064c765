"""Guest kernels and applications, as programs."""

from vtsim.guest import file_mappings as file_mappings  # each registers its primitives
from vtsim.guest import kernel_operations as kernel_operations
from vtsim.guest import services as services
from vtsim.guest import structures as structures
from vtsim.guest import watched as watched
