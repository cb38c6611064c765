"""Views of a VM's memory: the hypercalls about them, and what a virtualization exception tells the guest's kernel.

A view is an EPTP with tables of its own. All map the same pages; they differ in which may be written. The calls are
those that Xen has for a guest that manages its own views (HVMOP_altp2m: switch_p2m, set_mem_access,
vcpu_enable_notify); the numbers are ours.

SDM: "EPTP Switching"; "Virtualization-Exception Information".
"""

from __future__ import annotations

from typing import Final

# fmt: off
MOST: Final = 512                                 # EPTPs that a list has room for
RESTRICTED, PERMISSIVE = 0, 1                     # the view that a VM starts in, and one whose pages can all be written
SWITCH, PROTECT, NOTIFY = range(0x6300_0000, 0x6300_0003)   # RAX; answered by RAX <- 0, or -1: refused
# SWITCH: to the view RDI
# PROTECT: what becomes of stores to the page at guest-physical RSI in the view RDI: RDX is one of
EXITS, RAISES, ALLOWED = range(3)                 # a VM exit, a virtualization exception, nothing
# NOTIFY: virtualization exceptions from now on, their information at guest-physical RDI; 0: none
REFUSED: Final = -1

# the information area: byte offsets
BUSY, LINEAR, PHYSICAL, INDEX = 4, 16, 24, 32
# fmt: on
