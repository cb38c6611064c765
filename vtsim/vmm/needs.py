"""How much of an engine's arenas a hypervisor takes, beside what its guests need."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from vtsim.base import memory as mem
from vtsim.base.memory import gfn_ranges
from vtsim.base.registry import import_all
from vtsim.vmm.buddy import record_frames
from vtsim.vmm.memory import GIB
from vtsim.vmm.programs.locked_fault import descriptor_frames
from vtsim.vmm.settings import resolve_parameters
from vtsim.vmm.shadow import frame_limit, shadow_frames
from vtsim.vmm.sharing import mark_frames, sharing_frames
from vtsim.vmm.spec import VmmSpec
from vtsim.vmm.techniques import techniques

FOUR_GIB = 1 << 32
SOFTWARE_PAGES = 768  # of a software CPU: its caches, a word for each frame of the guest beside
CODE_PAGES, ROWS = 64, 60_000  # of its translations


@frozen(kw_only=True)
class Needs:
    """What a hypervisor adds to the geometry of an engine."""

    pool_pages: int
    code_pages: int
    rows: int
    owners: int
    host_frames: int


def needs(vmm: VmmSpec, memories: Sequence[int], host_memory: int = 0, more_vcpus: int = 0) -> Needs:
    """How large the arenas have to be for VMs with so many bytes of memory, beside what their guests need.

    `more_vcpus` are those beyond the first of every VM.
    """
    tables = sum(pool_frames(size, vmm) for size in memories)
    shadows = 0
    if vmm.on_shadow:
        import vtsim.vmm.personalities  # which need this package

        import_all(vtsim.vmm.personalities)
        permille = resolve_parameters(vmm)["shadow_permille"]
        shadows = sum(shadow_frames(size, permille, frame_limit(size, FOUR_GIB)) for size in memories)
    if vmm.paging == "direct-pv":
        shadows = 2 * frame_words(host_memory)
    translating = vmm.technique == "binary-translation"
    software = techniques[vmm.technique].in_software
    programs = 0
    if software:  # all stores of a guest are executed, so that each of its pages may have contents
        programs = sum(SOFTWARE_PAGES + bitmap_frames(64 * size) + (size >> mem.PAGE_SHIFT) for size in memories)
    bitmaps = sum(bitmap_frames(size) + 1 for size in memories) if vmm.dirty_log.on else 0
    if vmm.dirty_log.on and dict(vmm.parameters).get("lockless_faults") == 0:
        bitmaps += descriptor_frames(gfn_ranges(host_memory)[-1][1])
    if vmm.memory.buddy:
        bitmaps += record_frames(gfn_ranges(host_memory)[-1][1])
    if vmm.sharing.on:
        bitmaps += sharing_frames(memories)
    disk_pages = 0
    if vmm.swap.on:
        bitmaps += sum(map(mark_frames, memories))
        disk_pages = 2 * sum(gfn_ranges(size)[-1][1] for size in memories)
    return Needs(
        pool_pages=programs
        + disk_pages
        + 2 * tables
        + shadows
        + bitmaps
        + 256
        + (32 + 160 * translating + 16 * vmm.hosted) * len(memories)
        + 32 * more_vcpus,
        code_pages=24 + (20 * translating + vmm.hosted + (CODE_PAGES + 4) * software) * len(memories),
        rows=8192 + (5000 * translating + (ROWS + 4096) * software) * len(memories),
        owners=1 + len(memories),
        host_frames=2 * tables + shadows + bitmaps + 2048 + 64 * (len(memories) + more_vcpus),
    )


def frame_words(machine_memory: int) -> int:
    """Frames of a table that has a word for every frame of the machine."""
    return -(-gfn_ranges(machine_memory)[-1][1] // mem.PAGE_WORDS)


def bitmap_frames(size: int) -> int:
    """Frames of a bit for every frame number of so much guest memory."""
    return -(-gfn_ranges(size)[-1][1] // (64 * mem.PAGE_WORDS))


def pool_frames(size: int, vmm: VmmSpec) -> int:
    """Frames for EPT tables of a VM, in all its views: those that collapsing leaves behind are not used again."""
    return table_frames(size) * (3 if vmm.collapse.on or vmm.dirty_log.ends else 1) * vmm.views


def table_frames(size: int) -> int:
    """Frames of one radix table that maps so much memory in 4 KiB pages, devices' pages included."""
    return sum((end - first) // 512 + 2 for first, end in gfn_ranges(size)) + size // GIB + 32
