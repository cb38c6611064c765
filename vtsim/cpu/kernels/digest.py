"""Digests of what a guest saw that does not depend on time."""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu import slots as s


@kernel
def mix(digest: int, value: int) -> int:
    """Roll a value into a digest (wraps)."""
    digest = (digest ^ value) * 0x100000001B3
    return digest ^ ((digest >> 29) & 0x7FFFFFFFF)


@kernel
def shown(m: Record, a: Arena, value: int) -> None:
    """A monitor shows its guest a value: what the guest would have seen itself, in the ring that it believes in."""
    if m[s.MONITORED] and a[m[s.BELIEVED_AT]] == 0:
        m[s.DIGEST_APPLICATION] = mix(m[s.DIGEST_APPLICATION], value)
    else:
        m[s.DIGEST_KERNEL] = mix(m[s.DIGEST_KERNEL], value)


@kernel
def saw(m: Record, value: int) -> None:
    """The program saw a value that does not depend on time: roll it into its ring's digest."""
    if m[s.PRIVILEGE] & 1 and m[s.BELIEVED] == 0:
        m[s.DIGEST_APPLICATION] = mix(m[s.DIGEST_APPLICATION], value)
    else:
        m[s.DIGEST_KERNEL] = mix(m[s.DIGEST_KERNEL], value)
