"""Memory slots of a VM, which say where guest-physical memory is: read by programs and by hooks of shadow paging."""

from __future__ import annotations

from typing import Final

from vtsim.base.words import byte_offsets

# fmt: off
SLOT_WORDS: Final = (
    ("FIRST",     1, "first guest-physical address"),
    ("END",       1, "address behind the last"),
    ("USER",      1, "user-space address less guest-physical address"),
    ("FLAGS",     1, "see the slot flags"),
)
SLOT: Final = byte_offsets(SLOT_WORDS)
SLOT_BYTES: Final = 32
SLOT_READ_ONLY, SLOT_PRIVATE = 1, 2                                 # flags of a slot
# fmt: on
