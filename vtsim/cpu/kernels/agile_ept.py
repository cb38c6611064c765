"""EPT of a VM with agile paging, whose leaves map 4 KiB each: flags of the leaf of a guest frame.

SDM: "EPT Translation Mechanism".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.shadow_pool import FLUSH, PROTECTED, shadow_get, shadow_put
from vtsim.ept import shadow as d
from vtsim.ept.spec import ADDRESS, EPT_RWX, EPT_WRITE

P_EPT: int = d.POOL["EPT"]


@kernel
def set_ept_flags(m: Record, a: Arena, t: Tags, frame: int, cleared: int, given: int) -> int:
    """Clear and set flags of the EPT leaf of a guest frame; the leaf as it was, 0 where nothing is mapped."""
    table = shadow_get(m, a, t, m[s.SHADOW_POOL] + P_EPT)
    for level in range(4, 0, -1):
        at = m[s.SHADOW_DIRECT] + (table & ADDRESS) + ((frame >> (9 * (level - 1))) & 511) * 8
        table = shadow_get(m, a, t, at)
        if table & EPT_RWX == 0:
            return 0
    if table & cleared or (table | given) != table:
        shadow_put(m, a, t, at, (table & ~cleared) | given)
        if table & cleared:
            m[s.SHADOW_FLAGS] |= FLUSH | PROTECTED if table & cleared & EPT_WRITE else FLUSH
    return table
