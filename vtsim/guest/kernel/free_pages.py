"""Free pages: a zone's list and, with several CPUs, one of each CPU in front of it.

A page that a CPU frees is the next that it takes, as long as it is in the CPU's caches. A list that is empty is filled
with `batch` pages of the zone, one that has `high` pages gives back the `batch` that lie there longest. A CPU that
finds its own list and the zone empty moves what the lists of all CPUs have into the zone and looks again, a few times
if need be, because pages may be on their way. A list has a lock, which nobody else takes but who does that.

A kernel of one CPU has the zone's list alone, and neither locks. It takes the same pages in the same order: a list and
the zone behind it are one stack, within which a batch moves the boundary.
Pages of 2 MiB and 1 GiB do not stay in a CPU's list.

Sources: Linux 6.1, mm/page_alloc.c: rmqueue_pcplist, rmqueue_bulk, free_unref_page, free_pcppages_bulk and
drain_all_pages.
Not modelled: moving batches in a kernel of one CPU, some 200 instructions for a page from the zone; the buddy system
behind the lists; links in struct page; a CPU's list of 2 MiB pages, at most two of
them; that who gives back repeatedly gives back more (`free_factor`), and who does not get a list's lock at once goes to
the zone.
"""

from __future__ import annotations

from math import isqrt

from attrs import frozen

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import KernelOptions, path, smp
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.lengths import length

MOST_OF_A_MIB, WATERMARK_SCALE = (1 << 20) // at.PAGE, 10  # the second: of 10,000
LEAST_KIB, MOST_KIB = 128, 256 << 10  # that are kept free
TRIES = 16  # MAX_RECLAIM_RETRIES


@frozen
class Sizes:
    """Pages that move at once between a CPU's list and its zone, that are too many for a list, and that stay free."""

    batch: int
    high: int
    low_watermark: int

    @property
    def places(self) -> int:
        """Room for a list: a power of two."""
        return 1 << (self.high - 1).bit_length()


def sizes(pages: int, cpus: int) -> Sizes:
    """The sizes in a guest with so many pages of memory, all of them in one zone.

    Sources: Linux 6.1, mm/page_alloc.c: zone_batchsize, zone_highsize, calculate_min_free_kbytes,
    __setup_per_zone_wmarks.
    Not modelled: pages that Linux never manages; zones beside each other; what khugepaged adds to the watermark.
    """
    quarter = max(min(pages >> 10, MOST_OF_A_MIB) // 4, 1)
    power = 1 << (quarter + quarter // 2).bit_length() - 1
    batch = max(power - 1, 1)
    kept = min(max(isqrt(pages * 4 * 16), LEAST_KIB), MOST_KIB) // 4
    low = kept + max(kept // 4, pages * WATERMARK_SCALE // 10_000)
    return Sizes(batch=batch, high=max(low // cpus, 4 * batch), low_watermark=low)


def take_frame(a: Assembler, kernel: KernelOptions, empty: str) -> None:
    """RDX <- physical address of a page from the zone at R13; to `empty` if there is none.

    Clobbers RAX; with several CPUs, all registers but RBX, RBP and R12 to R15.
    """
    if kernel.several:
        a.call("take_page")
        a.test(s.RDX, -1)
        a.jcc(ops.CC_Z, empty)
        return
    a.work(length("page_get"))
    a.ld(s.RAX, Mem(s.R13, at.Z_TOP))
    a.ld(s.RDX, Mem(s.R13, at.Z_BOTTOM))
    a.cmp(s.RAX, register=s.RDX)
    a.jcc(ops.CC_Z, empty)
    a.sub(s.RAX, 8)
    a.ld(s.RDX, Mem(s.RAX))
    a.st(Mem(s.R13, at.Z_TOP), s.RAX)


def give_frame(a: Assembler, kernel: KernelOptions) -> None:
    """Put the page at physical address RDX back into the zone at R13.

    Clobbers RAX; with several CPUs, RCX, RDI, R8 to R10, too.
    """
    if kernel.several:
        a.call("give_page")
        return
    a.work(length("page_put"))
    a.ld(s.RAX, Mem(s.R13, at.Z_TOP))
    a.st(Mem(s.RAX), s.RDX)
    a.add(s.RAX, 8)
    a.st(Mem(s.R13, at.Z_TOP), s.RAX)


def _find_list(a: Assembler, lists: Mem, spare: int) -> None:
    """RCX <- the list of the zone at R13 among a CPU's lists. Clobbers `spare`."""
    a.ld(s.RCX, lists)
    a.copy(spare, s.R13)
    a.and_(spare, at.PAGE - 1)
    a.add(s.RCX, register=spare)


def _lock(a: Assembler, spare: int) -> None:
    """The list at RCX is ours. Clobbers RAX and `spare`."""
    smp.lock(a, Mem(s.RCX, at.P_TICKET), Mem(s.RCX, at.P_SERVING), spare)


def _unlock(a: Assembler) -> None:
    """The list at RCX is free again. Clobbers RAX."""
    smp.unlock(a, Mem(s.RCX, at.P_SERVING))


@path("per-CPU page lists")
def page_lists(a: Assembler, kernel: KernelOptions) -> None:
    """Subroutines `take_page` (RDX <- a page or 0), `give_page` and `drain_all`, of the zone at R13.

    Called with interrupts off.
    """
    if not kernel.several:
        return
    a.activity = ops.PAGE_FAULT_PATH
    _take_page(a)
    _give_page(a)
    _bulk_get(a, kernel)
    _bulk_put(a, kernel)
    _drain_all(a, kernel)


def _take_page(a: Assembler) -> None:
    a.label("take_page")
    a.work(length("page_get", several=True))
    _lock_filled(a, "take", "take_slowly")
    a.label("take_first")
    a.sub(s.RAX, 1)
    a.st(Mem(s.RCX, at.P_COUNT), s.RAX)
    a.ld(s.RAX, Mem(s.RCX, at.P_HEAD))
    a.sub(s.RAX, 1)
    a.ld(s.RDX, Mem(s.RCX, at.P_MASK))
    a.and_(s.RAX, register=s.RDX)
    a.st(Mem(s.RCX, at.P_HEAD), s.RAX)
    a.ld(s.RDX, Mem(s.RCX, at.P_PLACES))
    a.ld(s.RDX, Mem(s.RDX, index=s.RAX, scale=8))
    _unlock(a)
    a.ret()
    a.label("take_slowly")
    a.push(value=TRIES)
    a.label("take_again")
    _unlock(a)
    a.call("drain_all")
    _lock_filled(a, "take_drained", "take_in_vain")
    a.pop(s.RDX)
    a.jmp("take_first")
    a.label("take_in_vain")
    a.pop(s.RDX)
    a.sub(s.RDX, 1)
    a.push(s.RDX)
    a.jcc(ops.CC_NZ, "take_again", comment="pages may be on their way from list to list")
    _unlock(a)
    a.pop(s.RDX)
    a.ret()


def _lock_filled(a: Assembler, name: str, empty: str) -> None:
    """Lock this CPU's list, and fill it if it is empty: RAX <- how many pages it has. To `empty` with the lock if none.

    Clobbers all registers that `bulk_get` does.
    """
    _find_list(a, at.cpu_word(at.PAGE_LISTS), s.RDX)
    _lock(a, s.RDX)
    a.ld(s.RAX, Mem(s.RCX, at.P_COUNT))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, f"{name}_filled")
    a.call("bulk_get")
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, empty)
    a.label(f"{name}_filled")


def _give_page(a: Assembler) -> None:
    a.label("give_page")
    a.work(length("page_put", several=True))
    _find_list(a, at.cpu_word(at.PAGE_LISTS), s.RDI)
    _lock(a, s.RDI)
    a.ld(s.RAX, Mem(s.RCX, at.P_HEAD))
    a.ld(s.RDI, Mem(s.RCX, at.P_PLACES))
    a.st(Mem(s.RDI, index=s.RAX, scale=8), s.RDX)
    a.add(s.RAX, 1)
    a.ld(s.RDI, Mem(s.RCX, at.P_MASK))
    a.and_(s.RAX, register=s.RDI)
    a.st(Mem(s.RCX, at.P_HEAD), s.RAX)
    a.ld(s.RAX, Mem(s.RCX, at.P_COUNT))
    a.add(s.RAX, 1)
    a.st(Mem(s.RCX, at.P_COUNT), s.RAX)
    a.ld(s.RDI, Mem(s.RCX, at.P_HIGH))
    a.cmp(s.RAX, register=s.RDI)
    a.jcc(ops.CC_B, "given")
    a.ld(s.R9, Mem(s.RCX, at.P_BATCH))
    a.call("bulk_put")
    a.label("given")
    _unlock(a)
    a.ret()


def _bulk_get(a: Assembler, kernel: KernelOptions) -> None:
    """`bulk_get`: fill the locked, empty list at RCX; RAX <- how many pages. Clobbers RDX, RDI, R8 to R10.

    The page that the zone gives first is the first that the list gives.
    """
    a.label("bulk_get")
    a.work(length("bulk_get"))
    smp.lock_zone(a, kernel, s.RDX)
    a.ld(s.RDI, Mem(s.R13, at.Z_TOP))
    a.ld(s.RAX, Mem(s.R13, at.Z_BOTTOM))
    a.copy(s.R9, s.RDI)
    a.sub(s.R9, register=s.RAX)
    a.shr(s.R9, 3)
    a.ld(s.R8, Mem(s.RCX, at.P_BATCH))
    a.cmp(s.R9, register=s.R8)
    a.jcc(ops.CC_BE, "bulk_get_so_many")
    a.copy(s.R9, s.R8)
    a.label("bulk_get_so_many")
    a.ld(s.RDX, Mem(s.RCX, at.P_MASK))
    a.and_(s.RDX, register=s.R9)
    a.st(Mem(s.RCX, at.P_HEAD), s.RDX)
    a.st(Mem(s.RCX, at.P_COUNT), s.R9)
    a.ld(s.R8, Mem(s.RCX, at.P_PLACES))
    a.copy(s.R10, s.R9)
    a.test(s.R10, -1)
    a.jcc(ops.CC_Z, "bulk_got")
    a.label("bulk_get_page")
    a.work(length("bulk_get_page"))
    a.sub(s.RDI, 8)
    a.ld(s.RAX, Mem(s.RDI))
    a.st(Mem(s.R8, -8, index=s.R10, scale=8), s.RAX)
    a.sub(s.R10, 1)
    a.jcc(ops.CC_NZ, "bulk_get_page")
    a.st(Mem(s.R13, at.Z_TOP), s.RDI)
    a.label("bulk_got")
    smp.unlock_zone(a, kernel)
    a.copy(s.RAX, s.R9)
    a.ret()


def _bulk_put(a: Assembler, kernel: KernelOptions) -> None:
    """`bulk_put`: the R9 pages that are longest in the locked list at RCX go back to the zone.

    Clobbers RAX, RDI, R8 to R10.
    """
    a.label("bulk_put")
    a.work(length("bulk_put"))
    a.ld(s.RDI, Mem(s.RCX, at.P_COUNT))
    a.ld(s.R8, Mem(s.RCX, at.P_HEAD))
    a.sub(s.R8, register=s.RDI)
    a.sub(s.RDI, register=s.R9)
    a.st(Mem(s.RCX, at.P_COUNT), s.RDI)
    smp.lock_zone(a, kernel, s.RDI)
    a.ld(s.R10, Mem(s.RCX, at.P_PLACES))
    a.ld(s.RDI, Mem(s.R13, at.Z_TOP))
    a.label("bulk_put_page")
    a.work(length("bulk_put_page"))
    a.ld(s.RAX, Mem(s.RCX, at.P_MASK))
    a.and_(s.R8, register=s.RAX)
    a.ld(s.RAX, Mem(s.R10, index=s.R8, scale=8))
    a.st(Mem(s.RDI), s.RAX)
    a.add(s.RDI, 8)
    a.add(s.R8, 1)
    a.sub(s.R9, 1)
    a.jcc(ops.CC_NZ, "bulk_put_page")
    a.st(Mem(s.R13, at.Z_TOP), s.RDI)
    smp.unlock_zone(a, kernel)
    a.ret()


def _drain_all(a: Assembler, kernel: KernelOptions) -> None:
    """`drain_all`: what the lists of all CPUs have goes back to the zone; RAX <- how many pages that were.

    Clobbers all registers but RBX, RBP and R12 to R15.
    """
    a.label("drain_all")
    a.work(length("drain_all"))
    a.mov(s.RSI, at.CPU_DATA)
    a.mov(s.R11, kernel.cpus)
    a.mov(s.RDX, 0)
    a.label("drain_list")
    _find_list(a, Mem(s.RSI, at.PAGE_LISTS), s.RAX)
    a.ld(s.RAX, Mem(s.RCX, at.P_COUNT))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "drain_next")
    _lock(a, s.RDI)
    a.ld(s.R9, Mem(s.RCX, at.P_COUNT))
    a.test(s.R9, -1)
    a.jcc(ops.CC_Z, "drained")
    a.add(s.RDX, register=s.R9)
    a.call("bulk_put")
    a.label("drained")
    _unlock(a)
    a.label("drain_next")
    a.add(s.RSI, smp.CPU_BYTES)
    a.sub(s.R11, 1)
    a.jcc(ops.CC_NZ, "drain_list")
    a.copy(s.RAX, s.RDX)
    a.ret()
