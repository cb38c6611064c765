"""Digests of what a guest saw that does not depend on time."""

from __future__ import annotations

from vtsim.base.jit import Record, kernel
from vtsim.cpu import slots as s


@kernel
def mix(digest: int, value: int) -> int:
    """Roll a value into a digest (wraps)."""
    digest = (digest ^ value) * 0x100000001B3
    return digest ^ ((digest >> 29) & 0x7FFFFFFFF)


@kernel
def saw(m: Record, value: int) -> None:
    """The program saw a value that does not depend on time: roll it into its ring's digest."""
    if m[s.PRIVILEGE] & 1:
        m[s.DIGEST_APPLICATION] = mix(m[s.DIGEST_APPLICATION], value)
    else:
        m[s.DIGEST_KERNEL] = mix(m[s.DIGEST_KERNEL], value)
