"""Memory types by number, and how the type of a PAT entry and that of a range or of a second-level page combine.

SDM: "Memory Type Range Registers (MTRRs)"; "Selecting Memory Types for Pentium III and More Recent Processor Families".
"""

from __future__ import annotations

from typing import Final

from vtsim.ept.spec import MEMORY_TYPES

# fmt: off
UC, WC, WT, WP, WB, UC_MINUS = 0, 1, 4, 5, 6, 7
NAMES: Final = {**MEMORY_TYPES, UC_MINUS: "UC-"}
# range (or second-level page), then by PAT entry:      UC    UC-   WC    WT    WB    WP
COMBINED: Final[dict[int, tuple[int, ...]]] = {
    UC:                                                (UC,   UC,   WC,   UC,   UC,   UC),
    WC:                                                (UC,   WC,   WC,   UC,   WC,   UC),
    WT:                                                (UC,   UC,   WC,   WT,   WT,   WP),
    WP:                                                (UC,   WC,   WC,   UC,   WP,   WP),
    WB:                                                (UC,   UC,   WC,   WT,   WB,   WP),
}
PAT_ORDER: Final = (UC, UC_MINUS, WC, WT, WB, WP)
# fmt: on


def _row(types: tuple[int, ...]) -> int:
    """A row of the table for kernels: four bits for each PAT type, by its number."""
    return sum(kind << 4 * pat for pat, kind in zip(PAT_ORDER, types, strict=True))


# by number of the range's type; rows of types that are not legal are those of UC
EFFECTIVE: Final = tuple(_row(COMBINED.get(kind, COMBINED[UC])) for kind in range(8))
# what may be in a processor's cache, and what a write puts there
CACHED: Final = 1 << WT | 1 << WP | 1 << WB
WRITTEN_BACK: Final = 1 << WB
