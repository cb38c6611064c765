"""An observed page walk as a grid, a table of its steps, JSON and a drawing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vtsim.base.memory import HOLE_FIRST, HOLE_LAST
from vtsim.base.units import SIZE
from vtsim.ept import spec as e
from vtsim.guest.paging import OF_32_BIT
from vtsim.platform.steps import ENTRY_NAMES, EPT, GUEST, SHADOW, WALK_CACHE, Level, NestedWalk, Reference
from vtsim.platform.walk import EPT_VIOLATION, FETCH, PAGE_FAULT, WRITE, Walk
from vtsim.study.table import section
from vtsim.vmcs import qualification, reasons
from vtsim.vmcs.state import CR3_SWITCHES

WIDE: Final = 110  # columns from which on there is room for where an entry leads
NARROW: Final = 76  # columns below which there is none for where an entry lies, what it holds and the grid's sources
STYLES: Final[Mapping[str, str]] = {
    "L1D": "green", "L2": "cyan", "L3": "yellow", "DRAM": "red", "walk cache": "blue", "nested TLB": "magenta",
}  # fmt: skip
PAGE: Final = "page"
TLB_NAMES: Final[Mapping[str, str]] = {
    "dtlb4k": "first-level TLB of 4 KiB pages", "dtlb2m": "first-level TLB of 2 MiB pages",
    "dtlb1g": "first-level TLB of 1 GiB pages", "itlb4k": "instruction TLB of 4 KiB pages",
    "itlb2m": "instruction TLB of large pages", "stlb": "second-level TLB", "stlb1g": "second-level TLB of 1 GiB pages",
}  # fmt: skip
CACHE_NAMES: Final[Mapping[str, str]] = {
    "nested_tlb": "",
    **{f"{which}.{name.lower()}": f"{name} cache" for which in ("pwc", "ept_pwc") for name in ENTRY_NAMES[2:]},
}
GUEST_FLAGS: Final = (
    (e.PTE_WRITE, "W"), (e.PTE_USER, "U"), (e.PTE_PWT, "PWT"), (e.PTE_PCD, "PCD"), (e.PTE_ACCESSED, "A"),
    (e.PTE_DIRTY, "D"), (e.PTE_GLOBAL, "G"), (e.PTE_NO_EXECUTE & (1 << 64) - 1, "NX"),
)  # fmt: skip
SHADOW_FLAGS: Final = (*GUEST_FLAGS, (e.PTE_SWITCHES, "switch"))  # agile paging: the next table is the guest's own
EPT_FLAGS: Final = ((e.EPT_ACCESSED, "A"), (e.EPT_DIRTY, "D"))
LARGE_NAMES: Final = {2: "2M", 3: "1G"}
ERROR_BITS: Final = (
    (e.PF_PRESENT, "protection", "not present"), (e.PF_WRITE, "write", ""), (e.PF_USER, "user", "supervisor"),
    (e.PF_RESERVED, "reserved bit", ""), (e.PF_FETCH, "fetch", ""), (e.PF_KEY, "protection key", ""),
)  # fmt: skip


# --- words ------------------------------------------------------------------------------------------------------------


def flags(reference: Reference, walk: Walk) -> str:
    """The flags of an entry as letters; those that the walk set are marked with a plus."""
    value, now = reference.value, reference.value if reference.stored is None else reference.stored
    leaf = reference.level == 1 or bool(value & e.PTE_LARGE and reference.level in LARGE_NAMES)
    large = [LARGE_NAMES[reference.level]] if leaf and reference.level > 1 else []
    if large and reference.dimension == GUEST and walk.paging == OF_32_BIT:
        large = ["4M"]
    if reference.dimension == EPT:
        if not value & e.EPT_RWX:
            return "not present"
        rights = "".join(letter if value >> bit & 1 else "-" for bit, letter in enumerate("rwx"))
        kind = [e.MEMORY_TYPES.get(value >> e.EPT_TYPE & 7, "?")] if leaf else []
        return " ".join([rights, *_set(EPT_FLAGS, value, now), *kind, *large])
    if not value & e.PTE_PRESENT:
        return "not present"
    table = SHADOW_FLAGS if reference.dimension == SHADOW else GUEST_FLAGS
    return " ".join(["P", *_set(table, value, now), *large])


def _set(table: Any, before: int, now: int) -> list[str]:
    return [("" if before & bit else "+") + name for bit, name in table if now & bit]


def leads_to(reference: Reference, walk: Walk) -> str:
    """Where an entry points, in the addresses of its dimension."""
    present = e.EPT_RWX if reference.dimension == EPT else e.PTE_PRESENT
    if not reference.value & present:
        return ""
    space = "gpa" if reference.dimension == GUEST and walk.eptp else "hpa"
    leaf = reference.level == 1 or (reference.value & e.PTE_LARGE and reference.level in LARGE_NAMES)
    return f"{'page' if leaf else 'table'} {space} {reference.value & e.ADDRESS:#x}"


def roots(walk: Walk) -> str:
    """Where the walk begins in each dimension."""
    switch = bool(walk.cr3 & CR3_SWITCHES)
    found = f"CR3 {walk.cr3 & ~CR3_SWITCHES:#x}{' switch' if switch else ''}"
    if walk.eptp:
        found += f"   EPTP {walk.eptp:#x}"
    if walk.pdpte is not None:
        switch = walk.technique == "agile" and bool(walk.pdpte & e.PTE_SWITCHES)
        found += f"   PDPTE {walk.pdpte:#x}{' switch' if switch else ''}, loaded by VM entry or MOV to CR3"
    return found


def outcome(walk: Walk) -> str:
    """How the translation ended, in one line."""
    if walk.hpa is not None:
        if not walk.page_bytes:
            return f"host-physical address {walk.hpa:#x}, where no memory is"
        return f"host-physical address {walk.hpa:#x} in a page of {SIZE.format(walk.page_bytes)}"
    if walk.error_code is not None:
        words = [word if walk.error_code & bit else other for bit, word, other in ERROR_BITS]
        words.insert(1, "" if walk.access in (WRITE, FETCH) else "read")
        return f"page fault, error code {walk.error_code:#x}: {', '.join(word for word in words if word)}"
    if walk.qualification is not None:
        said = qualification.describe(reasons.EPT_VIOLATION, walk.qualification)
        return f"EPT violation at gpa {walk.fault_gpa:#x}, qualification {walk.qualification:#x}: {said}"
    if walk.fault_gpa is not None:
        return f"{walk.fault} at gpa {walk.fault_gpa:#x}"
    return {"not canonical": "general-protection fault: the address is not canonical"}.get(walk.fault, walk.fault)


def totals(walk: Walk) -> str:
    """How many entries were read, from where, in how many cycles."""
    references = walk.references
    if walk.tlb:
        return f"found in the {TLB_NAMES[walk.tlb]}: no walk, {walk.cycles} cycles"
    dimensions = {name: sum(r.dimension == name for r in references) for name in (SHADOW, GUEST, EPT)}
    served: dict[str, int] = {}
    for r in references:
        served[r.served] = served.get(r.served, 0) + 1
    parts = [f"{name} {served[name]}" for name in (WALK_CACHE, "L1D", "L2", "L3", "DRAM") if name in served]
    by_dimension = [f"{number} {name}" for name, number in dimensions.items() if number or name != SHADOW]
    counted = f": {', '.join(by_dimension)}" if walk.eptp else ""
    return f"{_count(len(references), 'reference')}{counted}; {', '.join(parts) or 'none'}; {walk.cycles:,} cycles"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def indexes(walk: Walk) -> str:
    """How the linear address is cut into indexes."""
    wide = walk.guest_levels == 2  # tables of 1024 entries
    shift, last = (2, 1023) if wide else (3, 511)
    parts = [
        f"{ENTRY_NAMES[level]} {walk.address >> (shift + (10 if wide else 9) * level) & last}"
        for level in range(walk.guest_levels, 0, -1)
    ]
    return " · ".join([*parts, f"offset {walk.address & 0xFFF:#x}"])


def paging_of(walk: Walk) -> str:
    """What the manual calls the paging mode, and the guest's own where the processor walks other tables."""
    names = {0: "no paging", 2: "32-bit paging", 3: "PAE paging"}
    found = names.get(walk.guest_levels, f"{walk.guest_levels}-level paging")
    return f"{found} over the guest's 32-bit paging" if walk.guest_levels == 3 and walk.paging == OF_32_BIT else found


def _title(level: Level) -> str:
    if not level.level:
        return PAGE
    return f"{GUEST if level.entry is None else level.entry.dimension} {ENTRY_NAMES[level.level]}"


def _of_entries(walk: Walk) -> str:
    """The heading above the entries of what CR3 leads to."""
    return "entry" if any(r.dimension == SHADOW for r in walk.references) else "guest entry"


# --- text -------------------------------------------------------------------------------------------------------------


@attrs.frozen
class WalkText:
    """A walk for a terminal: its grid, its steps and its end.

    Wide terminals also see where each entry leads, narrow ones not what it holds.
    """

    walk: Walk

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*_parts(self.walk, options.max_width))


def _parts(walk: Walk, columns: int) -> Iterator[RenderableType]:
    yield Text(f"{walk.address:#x}: {walk.access} from ring {walk.ring} by {walk.process} in {walk.vm}", style="bold")
    dimensions = paging_of(walk)
    if walk.eptp:
        dimensions += f" behind {walk.ept_levels}-level EPT"
    yield Text(f"{walk.profile}, {walk.technique}, {dimensions}; caches {walk.caches}")
    yield Text(indexes(walk))
    yield Text(roots(walk))
    yield Text("")
    if walk.levels:
        if walk.eptp:
            yield _grid(walk, columns)
            yield Text("")
        yield _steps(walk, columns)
        yield Text("")
    yield Text(outcome(walk), style="bold" if walk.hpa is not None else "bold red")
    yield Text(totals(walk))
    if walk.fault == PAGE_FAULT and not (walk.error_code or 0) & e.PF_PRESENT:
        yield Text("")
        yield _areas(walk)
    if walk.fault == EPT_VIOLATION:
        devices = HOLE_FIRST <= (walk.fault_gpa or 0) >> 12 <= HOLE_LAST
        yield Text(
            "Devices are there and no memory: the hypervisor would emulate the access."
            if devices
            else "The hypervisor would map that page now; --set vmm.ept.populate=prebuilt maps all before the start."
        )


def _areas(walk: Walk) -> RenderableType:
    table = section(f"Areas of {walk.process}", ("from", "to"))
    for name, start, end in walk.areas:
        table.add_row(name, f"{start:#x}", f"{end - 1:#x}")
    return table


def _cell(reference: Reference, columns: int) -> Text:
    served = "" if columns < NARROW else f" {reference.served}"
    return Text(f"{reference.number:>2}{served}", style=STYLES.get(reference.served, ""))


def _skipped(nested: NestedWalk, ept_levels: int) -> dict[int, str]:
    """The EPT levels that were not read, with what made that so: a cache, where it answered, else a dot."""
    read = {r.level for r in nested.references}
    found = {level: "·" for level in range(ept_levels, 0, -1) if level not in read}
    if nested.cache == "nested_tlb":
        found[1] = "nested TLB"
    elif nested.cache:
        found[max(read, default=0) + 1] = "walk cache"
    return found


def _grid(walk: Walk, columns: int) -> RenderableType:
    """The two dimensions: a row for each guest level, a column for each EPT level; numbers are the order of reads."""
    narrow = columns < NARROW
    table = Table(box=None, show_edge=False, pad_edge=False, header_style="none", padding=(0, 1, 0, 0))
    table.add_column(Text("two dimensions", style="bold"), no_wrap=True)
    for level in range(walk.ept_levels, 0, -1):
        table.add_column(f"EPT {ENTRY_NAMES[level]}", no_wrap=not narrow)
    table.add_column(_of_entries(walk), no_wrap=not narrow)
    if walk.cache:
        table.add_row("levels above", *[""] * walk.ept_levels, Text("walk cache", style=STYLES["walk cache"]))
    for step in walk.levels:
        for nested in step.nested or (None,):
            cells: list[Text] = []
            read = {} if nested is None else {r.level: r for r in nested.references}
            skipped = {} if nested is None else _skipped(nested, walk.ept_levels)
            for level in range(walk.ept_levels, 0, -1):
                if level in read:
                    cells.append(_cell(read[level], columns))
                else:
                    word = skipped.get(level, "·")
                    cells.append(Text(word, style=STYLES.get(word, "dim")))
            last = nested is (step.nested or (None,))[-1] or nested is None
            first = nested is (step.nested or (None,))[0] or nested is None
            entry = step.entry
            own = (
                _cell(entry, columns)
                if entry is not None and first
                else Text("flag set" if entry and last else "", "dim")
            )
            table.add_row(_title(step) if first else "", *cells, own)
    return table


def _steps(walk: Walk, columns: int) -> RenderableType:
    table = section("#", ())
    table.columns[0].justify = "right"
    table.add_column("entry", no_wrap=True)
    if columns >= NARROW:
        table.add_column("at hpa", justify="right", no_wrap=True)
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("flags")
    if columns >= WIDE:
        table.add_column("leads to", no_wrap=True)
    table.add_column("from", no_wrap=True)
    table.add_column("cycles", justify="right", no_wrap=True)
    for number, name, at, value, bits, leads, served, cycles, style in _rows(walk):
        held = (at, value, bits) if columns >= NARROW else ()
        leading = (leads,) if columns >= WIDE else ()
        table.add_row(
            number, Text(name, style=style), *held, *leading, Text(served, style=STYLES.get(served, "")), cycles
        )
    return table


def _rows(walk: Walk) -> Iterator[tuple[str, str, str, str, str, str, str, str, str]]:
    for name, cycles in (("TLB miss", walk.look_up_cycles), ("walk start", walk.start_cycles)):
        if cycles:
            yield "", name, "", "", "", "", "", str(cycles), ""
    if walk.cache:
        below = walk.levels[0].entry if walk.levels else None
        yield (
            "",
            below.dimension if below else GUEST,
            "",
            "",
            CACHE_NAMES[walk.cache],
            "",
            "walk cache",
            str(walk.cache_cycles),
            "bold",
        )
    for step in walk.levels:
        first = step.nested[:1] if step.entry is not None else step.nested
        for nested in first:
            yield from _nested_rows(nested, walk)
        if step.entry is not None:
            r = step.entry
            yield (
                str(r.number), f"{r.dimension} {r.name}", f"{r.hpa:#x}", f"{r.value:#x}", flags(r, walk),
                leads_to(r, walk), r.served, str(r.cycles), "bold",
            )  # fmt: skip
        for nested in step.nested[len(first) :]:
            yield from _nested_rows(nested, walk)


def _nested_rows(nested: NestedWalk, walk: Walk) -> Iterator[tuple[str, str, str, str, str, str, str, str, str]]:
    at = f"gpa {nested.gpa:#x}"
    why = "to set a flag" if nested.for_flags else ""
    if nested.cache:
        served = "nested TLB" if nested.cache == "nested_tlb" else "walk cache"
        end = "" if nested.hpa is None else f"page hpa {nested.hpa:#x}"
        yield "", "EPT", "", at, why or CACHE_NAMES[nested.cache], end, served, str(nested.cache_cycles), ""
    elif nested.references:
        yield "", "EPT", "", at, why, "", "", "", ""
    for r in nested.references:
        yield (
            str(r.number), f"EPT {r.name}", f"{r.hpa:#x}", f"{r.value:#x}", flags(r, walk), leads_to(r, walk), r.served,
            str(r.cycles), "dim",
        )  # fmt: skip


# --- JSON -------------------------------------------------------------------------------------------------------------

ADDRESSES: Final = frozenset(
    {"address", "cr3", "eptp", "hpa", "gpa", "value", "stored", "error_code", "qualification", "fault_gpa"}
)


def walk_json(walk: Walk) -> str:
    """The walk as one object; addresses, entries and codes are hexadecimal strings."""
    plain = attrs.asdict(walk)
    plain["areas"] = [{"name": name, "start": start, "end": end} for name, start, end in walk.areas]
    return json.dumps({"walk": _hexadecimal(plain)}, indent=1)


def _hexadecimal(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _hexadecimal(each, key) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_hexadecimal(each) for each in value]
    if name in ADDRESSES | {"start", "end"} and isinstance(value, int):
        return hex(value)
    return value


# --- drawing ----------------------------------------------------------------------------------------------------------

COLOURS: Final[Mapping[str, str]] = {
    "L1D": "#8fce8f", "L2": "#9bd3e6", "L3": "#f6d96b", "DRAM": "#f2a07b", "walk cache": "#b9c4f0",
    "nested TLB": "#d9b3e6", "nothing": "#dddddd",
}  # fmt: skip
CELL_WIDTH, CELL_HEIGHT, GAP, LEFT, TOP = 112, 46, 14, 130, 96


def walk_svg(walk: Walk) -> str:
    """The grid as SVG: a box for each reference, coloured by what served it, with its number and cycles."""
    columns = walk.ept_levels + 1
    rows = [(step, nested) for step in walk.levels for nested in (step.nested or (None,))]
    width = LEFT + columns * (CELL_WIDTH + GAP) + 10
    height = TOP + max(len(rows), 1) * (CELL_HEIGHT + GAP) + 96
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _label(10, 24, f"{walk.address:#x}: {walk.access} from ring {walk.ring} by {walk.process} in {walk.vm}", 16),
        _label(10, 46, f"{walk.profile}, {indexes(walk)}; caches {walk.caches}"),
    ]
    for n, level in enumerate(range(walk.ept_levels, 0, -1)):
        parts.append(_label(LEFT + n * (CELL_WIDTH + GAP) + 8, TOP - 12, f"EPT {ENTRY_NAMES[level]}"))
    parts.append(_label(LEFT + walk.ept_levels * (CELL_WIDTH + GAP) + 8, TOP - 12, _of_entries(walk)))
    shown: set[int] = set()
    for row, (step, nested) in enumerate(rows):
        y = TOP + row * (CELL_HEIGHT + GAP)
        if step.level not in shown:
            parts.append(_label(10, y + 20, _title(step)))
        if nested is not None:
            parts.append(_label(10, y + 38, f"gpa {nested.gpa:#x}", 11))
            read = {r.level: r for r in nested.references}
            skipped = _skipped(nested, walk.ept_levels)
            for n, level in enumerate(range(walk.ept_levels, 0, -1)):
                x = LEFT + n * (CELL_WIDTH + GAP)
                if level in read:
                    parts.append(_box(x, y, read[level]))
                elif skipped.get(level, "·") != "·":
                    parts.append(_named_box(x, y, skipped[level], f"{nested.cache_cycles} cycles"))
        if step.entry is not None and step.level not in shown:
            parts.append(_box(LEFT + walk.ept_levels * (CELL_WIDTH + GAP), y, step.entry))
        shown.add(step.level)
    y = TOP + max(len(rows), 1) * (CELL_HEIGHT + GAP) + 16
    parts += [_label(10, y, outcome(walk), 14), _label(10, y + 20, totals(walk))]
    x = 10
    for name, colour in COLOURS.items():
        parts.append(f'<rect x="{x}" y="{y + 36}" width="14" height="14" fill="{colour}" stroke="#555"/>')
        parts.append(_label(x + 20, y + 48, name, 12))
        x += 34 + 8 * len(name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _label(x: int, y: int, text: str, size: int = 13) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x}" y="{y}" font-size="{size}">{escaped}</text>'


def _box(x: int, y: int, reference: Reference) -> str:
    cycles = f"{reference.served}, {reference.cycles} cycles"
    return _named_box(x, y, str(reference.number), cycles, COLOURS[reference.served])


def _named_box(x: int, y: int, title: str, below: str, colour: str = "") -> str:
    fill = colour or COLOURS[title]
    return (
        f'<rect x="{x}" y="{y}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" rx="5" fill="{fill}" stroke="#555"/>'
        f"{_label(x + 8, y + 20, title, 14)}{_label(x + 8, y + 38, below, 11)}"
    )
