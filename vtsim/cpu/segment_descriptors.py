"""Descriptors of segments, as they stand in a GDT or LDT.

SDM: "Segment Descriptors"; "TSS Descriptor in 64-bit mode".
"""

from __future__ import annotations

from vtsim.base.memory import signed


def descriptor(rights: int, limit: int, base: int = 0) -> int:
    """The 8 bytes of a segment with a base of 32 bits, as a signed word; access rights as the VMCS has them."""
    low = limit & 0xFFFF | (base & 0xFFFFFF) << 16
    high = (rights & 0xFF) << 8 | (limit >> 16 | rights >> 12 << 4) << 16 | (base >> 24 & 0xFF) << 24
    return signed(low | high << 32)


def system_descriptor(rights: int, limit: int, base: int) -> tuple[int, int]:
    """The 16 bytes of a TSS or LDT at a linear address, as two signed words."""
    return descriptor(rights, limit, base), base >> 32 & 0xFFFF_FFFF
