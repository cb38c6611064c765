"""Memory that is mapped from a file in the page cache, as lmbench's lat_pagefault and lat_mmap use it.

Source: lmbench 3 (L. McVoy and C. Staelin), src/lat_pagefault.c and src/lat_mmap.c; Linux, mm/memory.c, mm/filemap.c.
"""

from __future__ import annotations

from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.base.spec import Boolean, Text, counts, setting, shares, sizes
from vtsim.guest.spec import GIB, KIB, MIB, Phase, primitives, repeated

TOUCHES = ("permutation", "strided", "none")
LARGEST = 512 * MIB


@primitives.register("map_file")
@frozen(kw_only=True)
class MapFileSpec(Phase):
    """A file that the page cache has is mapped, its pages are touched, and it is unmapped, in a loop.

    All processes of a guest map the same file, from its beginning.
    """

    iterations: int = repeated(10)
    region: int = setting(sizes(ge=4 * KIB, le=LARGEST), "How much of the file is mapped", default=2 * MIB)
    touched: float = setting(shares(), "Of that, how much is touched, from the beginning on", default=1.0)
    order: str = setting(
        Text(choices=TOUCHES),
        "Order of the touches: each page once as shuffled, by stride, or no page",
        default="permutation",
    )
    stride: int = setting(sizes(ge=64, le=GIB), "Distance between touches in order strided", default=4 * KIB)
    write: float = setting(shares(), "Touches that store; the mapping is writable where any does", default=0.0)
    invalidate: bool = setting(Boolean(), "Call msync with MS_INVALIDATE before the touches", default=False)
    passes: int = setting(counts(ge=1, le=1024), "How often its pages are touched before it is unmapped", default=1)
    sync: bool = setting(Boolean(), "Call msync with MS_SYNC behind the touches of each pass", default=False)

    def __attrs_post_init__(self) -> None:
        if self.order == "strided" and self.stride > self.span_touched:
            raise ConfigError(
                f"a stride of {self.stride} bytes leaves the {self.span_touched} bytes that are touched",
                field="stride",
                help=f"stride can be at most {self.span_touched} B",
            )

    @property
    def pages(self) -> int:
        """How many pages are mapped."""
        return -(-self.region // (4 * KIB))

    @property
    def pages_touched(self) -> int:
        """How many pages may be touched."""
        return max(1, int(self.pages * self.touched))

    @property
    def span_touched(self) -> int:
        """How many bytes may be touched."""
        return self.pages_touched * 4 * KIB
