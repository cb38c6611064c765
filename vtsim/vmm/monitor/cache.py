"""The translation cache of a guest in the host's memory: code pages, map, hash table, the translator's structure.

Translations reach the structure of the vCPU, the translator's and the hash table in ring 3, through a window that only
the address space of the guest's kernel has.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from vtsim.base import memory as mem
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.translation import HASH_ENTRIES, TRANSLATOR
from vtsim.ept import spec as e
from vtsim.ept.tables import USER_PAGE, Table
from vtsim.vmm.host import Host
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.translate import BACK

PAGES: Final = 16  # of code
ROWS: Final = 4096


@frozen(kw_only=True)
class Cache:
    """First frames of the parts: vCPU structure, translator's structure, hash table, code pages, map; table frames."""

    shared: int
    structure: int
    table: int
    code: int
    map: int
    tables: tuple[int, ...]


def reserve_cache(host: Host, shared: int) -> Cache:
    """Take the frames of a cache from the host's own memory; `shared` is the frame of the vCPU's structure."""
    return Cache(
        shared=shared, structure=host.reserve(), table=host.area(2 * HASH_ENTRIES), code=host.reserve(PAGES + 1),
        map=host.area((PAGES + 1) * mem.PAGE_BYTES), tables=tuple(host.reserve() for _ in range(4)),
    )  # fmt: skip


def fill_cache(host: Host, cache: Cache, root: Table, vcpu: int, m: NDArray[np.int64]) -> None:
    """Map a cache into the window of ring 3, and write the translator's structure for the vCPU at `vcpu`."""
    engine, a = host.engine, host.engine.arena
    frames = [cache.shared, cache.structure, *range(cache.table, cache.table + 2 * HASH_ENTRIES // mem.PAGE_WORDS)]
    code = at.SHARED + len(frames) * mem.PAGE_BYTES
    left = iter(cache.tables)
    window = evolve(root, take=lambda: next(left))
    for n, frame in enumerate(frames):
        window.map(at.SHARED + n * mem.PAGE_BYTES, [frame], USER_PAGE | e.PTE_NO_EXECUTE)
    window.map(code, list(range(cache.code, cache.code + PAGES + 1)), USER_PAGE)
    for page in range(PAGES):
        engine.code_page(cache.code + page)
    miss = code + PAGES * mem.PAGE_BYTES
    here = at.SHARED + at.STACK_BYTES
    leave = Assembler("look-up without a translation", miss)
    for register, field in ((s.RCX, "LEAVING_RCX"), (s.R11, "LEAVING_R11")):
        leave.st(Mem(displacement=here + at.V[field]), register)
    leave.op(o.SYSCALL)
    back = Assembler("way back into translations", miss + BACK)
    for register, field in ((s.RCX, "BACK_RCX"), (s.R11, "BACK_R11")):
        back.ld(register, Mem(displacement=here + at.V[field]))
    back.jmp_mem(Mem(displacement=here + at.V["BACK_TO"]))
    first = int(a[mem.A_ROW_COUNT])
    for program in (leave, back):
        engine.place(program.assemble(), lambda page: cache.code + PAGES)
    first_row = int(a[mem.A_ROW_COUNT])
    a[int(a[mem.A_ROWS]) + first * o.ROW_WORDS : int(a[mem.A_ROWS]) + first_row * o.ROW_WORDS : o.ROW_WORDS] |= (
        1 << o.META_UNCOUNTED
    )
    a[mem.A_ROW_COUNT] = first_row + ROWS
    structure = at.SHARED + mem.PAGE_BYTES
    values = {
        "CACHE": code, "PAGES": PAGES, "NEXT": code, "FRAME": cache.code, "MAP": host.address(cache.map),
        "HASH": at.SHARED + 2 * mem.PAGE_BYTES, "FIRST_ROW": first_row, "ROWS": ROWS, "NEXT_ROW": first_row,
        "SAVED_RCX": here + at.V["LEAVING_RCX"], "SAVED_R11": here + at.V["LEAVING_R11"],
        "INTERRUPTS": here + at.V["INTERRUPTS"], "CR": here + at.V["CR0"],
        "MISS": miss, "JUMP_AT": structure + TRANSLATOR["JUMP"], "TARGET_AT": structure + TRANSLATOR["TARGET"],
    }  # fmt: skip
    for name, value in values.items():
        host.store(host.address(cache.structure) + TRANSLATOR[name], value)
    host.store(vcpu + at.V["TRANSLATOR"], structure)
    m[s.TRANSLATOR] = structure
