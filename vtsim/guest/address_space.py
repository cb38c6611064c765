"""What a process's address space holds: its areas, their pages and where they lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

from attrs import evolve, field, frozen

from vtsim.base.errors import ConfigError
from vtsim.ept import spec as e
from vtsim.ept.tables import USER_PAGE
from vtsim.guest.file_mappings import MapFileSpec
from vtsim.guest.kernel import layout as at
from vtsim.guest.paging import FOUR, ROWS, GuestPaging
from vtsim.guest.primitives import FILE, OWN, SHARED, TRACED, lowerings
from vtsim.guest.spec import GROWN_HEAP, SLAB, SLABS, SLABS_APART, KernelSpec, Phase, ProcessSpec

MAPPED_FILE: Final = "mapped file"  # name of an area
TOP_ENTRY: Final = 1 << 39
USER_ENTRIES: Final = 256


@frozen(kw_only=True)
class Area:
    """Linear addresses of one kind: pages of size 0, 1 or 2, mapped at their fault or before the process starts.

    `piece`: bytes that lie together, the next `apart` bytes further on; 0 if all do.
    """

    start: int
    bytes: int
    piece: int = 0
    apart: int = 0
    size: int = 0
    prebuilt: bool = False
    writable: bool = True
    text: bool = False
    file: bool = False  # mapped and unmapped by system calls
    name: str = field(default="region", kw_only=True)
    paging: GuestPaging = ROWS[FOUR]

    @property
    def page_bytes(self) -> int:
        """How large its pages are."""
        return self.paging.sizes[self.size]

    @property
    def pages(self) -> int:
        """How many pages it has."""
        return -(-self.bytes // self.page_bytes)

    @property
    def end(self) -> int:
        """The address after the last."""
        if self.piece:
            return self.start + -(-self.bytes // self.piece) * self.apart
        return self.start + self.pages * self.page_bytes

    def runs(self, most: int) -> Iterator[tuple[int, int]]:
        """Its pages, as addresses and how many lie together from there on, at most `most`."""
        together = self.piece // self.page_bytes or most
        apart = self.apart or together * self.page_bytes
        for n, first in enumerate(range(0, self.pages, together)):
            yield self.start + n * apart, min(together, self.pages - first)

    def leaf(self, nx: bool) -> int:
        """The bits of an entry that maps one of its pages."""
        bits = USER_PAGE if self.writable else USER_PAGE & ~(e.PTE_WRITE | e.PTE_DIRTY)
        return bits | (e.PTE_LARGE if self.size else 0) | (e.PTE_NO_EXECUTE if nx and not self.text else 0)

    @property
    def tables(self) -> int:
        """How many tables below the top level its mapping needs at most."""
        return sum(((self.end - 1) >> shift) - (self.start >> shift) + 1 for shift in self.paging.reach[self.size :])


@frozen(kw_only=True)
class AddressSpace:
    """The areas of a process, and for each of its threads and each phase where its memory begins."""

    areas: tuple[Area, ...]
    by_thread: tuple[tuple[int, ...], ...]
    paging: GuestPaging = ROWS[FOUR]

    @property
    def bases(self) -> tuple[int, ...]:
        """Where the memory of each phase begins for the first thread."""
        return self.by_thread[0]

    def pages(self, size: int, *, prebuilt: bool) -> int:
        """How many pages of a size are mapped beforehand, or may be mapped at faults."""
        return sum(
            area.pages
            for area in self.areas
            if area.size == size and area.prebuilt == prebuilt and not (area.text or area.file)
        )

    def tables(self, *, prebuilt: bool) -> int:
        """How many tables below the top one need at most."""
        return sum(area.tables for area in self.areas if area.prebuilt == prebuilt)

    @property
    def top_entries(self) -> set[int]:
        """The user entries of the top-level table that lead to tables from the start."""
        return self.paging.prepared([(area.start, area.end - 1) for area in self.areas])


def address_space(process: ProcessSpec, kernel: KernelSpec, text_pages: int, pages_1g: bool) -> AddressSpace:
    """Lay out a process: text, regions, recorded ranges, stacks. Floating regions share one place."""
    prebuilt, paging = kernel.populate == "prebuilt", ROWS[kernel.paging]
    largest = min(paging.sizes.index(kernel.page_size), 2 if pages_1g else 1)
    text = Area(start=at.USER_TEXT, bytes=text_pages << 12, prebuilt=True, writable=False, text=True, name="text")
    areas = [evolve(text, paging=paging)]
    shared = [phase for phase in process.phases if _is(phase, SHARED)]
    floating = max((_wanted(phase) - phase.slab_bytes - phase.grown_bytes for phase in shared), default=0)
    in_slabs = max((phase.slab_bytes for phase in shared), default=0)
    grown = max((phase.grown_bytes for phase in shared), default=0)
    bases: list[list[int]] = [[] for _ in range(process.threads)]
    placed: dict[int, Area] = {}
    here = paging.places.regions
    if floating:
        areas.append(_region(here, floating, largest, prebuilt, paging))
        here = _beyond(areas[-1].end, paging)
    if in_slabs:
        areas.append(_slabs(paging.places.regions + SLABS, in_slabs, largest, prebuilt, paging))
    if grown:
        heap = _region(paging.places.regions + GROWN_HEAP, grown, 0, prebuilt, paging)
        areas.append(evolve(heap, name="heap"))
    for phase in process.phases:
        how = lowerings[type(phase)]
        at_address = phase.span[0] if phase.span else None
        base = paging.places.regions
        if at_address is not None:
            base = at_address
            if base not in placed:
                size = largest if how.memory == SHARED else 0
                while base % paging.sizes[size]:
                    size -= 1
                placed[base] = _region(base, how.region(phase), size, prebuilt and how.memory == SHARED, paging)
                areas.append(placed[base])
        for mine in bases:
            if at_address is None and how.memory in (OWN, FILE):
                base = here
                areas.append(_own(base, phase, paging))
                here = _beyond(areas[-1].end, paging)
            mine.append(base)
    stack = at.USER_STACK_PAGES << 12
    areas += [
        Area(start=user_stack(n, paging.places) - stack, bytes=stack, prebuilt=prebuilt, name="stack", paging=paging)
        for n in range(process.threads)
    ]
    for index, phase in enumerate(process.phases):
        how = lowerings[type(phase)]
        if how.memory == TRACED:
            parts = list(_split(how.ranges(phase)))
            moved = _moved(parts, areas, phase)
            for mine in bases:
                mine[index] = moved
            areas += [
                Area(start=moved ^ start, bytes=end - start, prebuilt=prebuilt, name="recorded") for start, end in parts
            ]
    _check(areas, process, paging)
    return AddressSpace(areas=tuple(areas), by_thread=tuple(map(tuple, bases)), paging=paging)


def user_stack(thread: int, places: at.Places = at.LONG) -> int:
    """The end of a thread's stack."""
    return places.user_stack - 2 * thread * (at.USER_STACK_PAGES << 12)


def _split(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges cut where another entry of the top-level table begins."""
    for start, end in ranges:
        while start < end:
            cut = min(end, (start // TOP_ENTRY + 1) * TOP_ENTRY)
            yield start, cut
            start = cut


def _moved(parts: Sequence[tuple[int, int]], areas: Sequence[Area], phase: Phase) -> int:
    """The exclusive-or that brings recorded ranges to top-level entries that nothing else uses."""
    taken = {index for area in areas for index in range(area.start >> 39, ((area.end - 1) >> 39) + 1)}
    wanted = {start // TOP_ENTRY for start, _ in parts}
    for choice in (at.TRACES // TOP_ENTRY, *range(USER_ENTRIES)):
        if not taken & {index ^ choice for index in wanted}:
            return int(choice) * TOP_ENTRY
    raise ConfigError(
        "recorded addresses lie in so many parts of the address space that no room is left for the process itself",
        file=getattr(phase, "trace", ""),
        help="use fewer records: limit",
    )


def _is(phase: Phase, memory: str) -> bool:
    return lowerings[type(phase)].memory == memory and phase.span is None


def _wanted(phase: Phase) -> int:
    return lowerings[type(phase)].region(phase)


def _region(start: int, length: int, largest: int, prebuilt: bool, paging: GuestPaging) -> Area:
    size = largest
    while size and length < paging.sizes[size]:
        size -= 1
    return Area(start=start, bytes=length, size=size, prebuilt=prebuilt, paging=paging)


def _slabs(start: int, length: int, largest: int, prebuilt: bool, paging: GuestPaging) -> Area:
    """Slabs in 4 KiB pages; larger pages reach from one slab to the next."""
    if largest:
        return evolve(_region(start, -(-length // SLAB) * SLABS_APART, largest, prebuilt, paging), name="slabs")
    area = Area(start=start, bytes=length, prebuilt=prebuilt, paging=paging, name="slabs")
    return evolve(area, piece=SLAB, apart=SLABS_APART)


def _own(start: int, phase: Phase, paging: GuestPaging) -> Area:
    """Memory of one phase alone, or the addresses where it maps the file."""
    length = lowerings[type(phase)].region(phase)
    if not isinstance(phase, MapFileSpec):
        return Area(start=start, bytes=length, paging=paging)
    write = phase.write > 0
    return Area(start=start, bytes=length, writable=write, file=True, name=MAPPED_FILE, paging=paging)


def _beyond(end: int, paging: GuestPaging) -> int:
    return -(-end // paging.gap) * paging.gap + paging.gap


def _check(areas: list[Area], process: ProcessSpec, paging: GuestPaging) -> None:
    places = paging.places
    for area in areas:
        if paging.protected and area.end > places.user_stack:
            raise ConfigError(
                f"process {process.name!r}: the {area.name} at {area.start:#x} to {area.end - 1:#x} does not lie below "
                f"{places.user_stack:#x}, where user space ends",
                help=f"regions can be placed from {places.regions:#x} on; or choose guest.kernel.paging '4-level'",
            )
    for first, second in _overlaps(sorted(areas, key=lambda area: area.start)):
        raise ConfigError(
            f"process {process.name!r}: the {second.name} at {second.start:#x} overlaps the {first.name} at "
            f"{first.start:#x} to {first.end - 1:#x}",
            help=f"regions can be placed from {places.regions:#x} on",
        )


def _overlaps(areas: list[Area]) -> Iterator[tuple[Area, Area]]:
    for first, second in itertools.pairwise(areas):
        if second.start < first.end:
            yield first, second
