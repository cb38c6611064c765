"""A result as a person reads it: rich tables that fit 80 columns and stay plain text when piped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from itertools import zip_longest

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vtsim.base.trace import PRIVILEGES
from vtsim.study.result import (
    Driver,
    Exit,
    Hypercalls,
    PageRequests,
    Replay,
    Result,
    ServedBy,
    ShadowPaging,
    VmResult,
)
from vtsim.study.table import section

# fmt: off
PRIVILEGE_STYLES: Mapping[str, str] = {"R0": "red", "R3": "yellow", "N0": "cyan", "N3": "green"}
CONFIDENCES = ("measured", "vendor", "paper", "estimated", "set")
CONFIDENCE_STYLES: Mapping[str, str] = {
    "measured": "green", "vendor": "green", "paper": "cyan", "estimated": "yellow", "set": "magenta",
}
# fmt: on

NOTHING = "·"
TECHNIQUE_WORDS: Mapping[str, str] = {"hardware": "VT-x"}


def report(result: Result) -> RenderableType:
    """Everything a run has to say, in the order in which a reader asks."""
    first, *others = _sections(result)
    return Group(first, *(Padding(section, (1, 0, 0, 0)) for section in others))


def plain_text(renderable: RenderableType, width: int) -> str:
    """What a pipe or a file gets: no colours, no spaces at the ends of lines."""
    console = Console(width=width, color_system=None, legacy_windows=False, file=StringIO(), record=True)
    console.print(renderable)
    return "".join(line.rstrip() + "\n" for line in console.export_text().splitlines())


def _sections(result: Result) -> Iterator[RenderableType]:
    yield _headline(result)
    if result.partial or result.stopped or result.notes:
        yield Group(*_warnings(result))
    if result.vms:
        yield _cycles(result)
    if result.exits:
        yield _exits(result.exits)
    if result.walks.count:
        yield _walks(result)
    if shown := {name: vm.shadow for name, vm in result.vms.items() if vm.shadow is not None}:
        yield _shadow(shown)
    structures = [table for table in (_tlbs(result), _caches(result)) if table.row_count]
    if structures:
        yield Beside(structures)
    if len(result.vms) > 1:
        yield _vms(result)
    if result.dma:
        yield _dma(result)
    if result.hypercalls is not None:
        yield _hypercalls(result.hypercalls)
    if result.replay is not None:
        yield _replay(result.replay)
    yield _footer(result)


def _headline(result: Result) -> RenderableType:
    by = result.hypervisor
    words = (by.personality, TECHNIQUE_WORDS.get(by.technique, by.technique), by.paging.upper())
    under = " ".join(word for word in words if word)
    if not result.vms:
        under = "devices"
    elif by.technique == "native":
        under = "native"
    title = Text.assemble((result.scenario, "bold"), f"  {under} on {result.profile}, seed {result.seed}")
    lines: list[RenderableType] = [title]
    if result.description:
        lines.append(Text(result.description, style="dim"))
    shares = result.efficiency
    figures = Table.grid(padding=(0, 2))
    efficiency = Text.assemble(
        (percent(shares.overall), "bold green"),
        f"   ring 0  {percent(shares.ring0)}   ring 3  {percent(shares.ring3)}",
    )
    if result.vms:
        figures.add_row("efficiency", efficiency)
    if result.slowdown is not None and result.native is not None:
        native = f"   against {seconds(result.native.simulated_s)} native"
        figures.add_row("slowdown", Text.assemble((times(result.slowdown), "bold"), native))
    clock = f"   {count(result.cycles.elapsed)} cycles at {result.clock_hz / 1e9:g} GHz"
    simulated = Text.assemble((seconds(result.simulated_s), "bold"), clock)
    figures.add_row("simulated", simulated)
    return Group(*lines, Padding(figures, (1, 0, 0, 2)))


def _warnings(result: Result) -> Iterator[RenderableType]:
    if result.partial:
        yield Text("interrupted: this result is partial", style="bold yellow")
    for name, reason in result.stopped.items():
        yield Text.assemble((f"{name} stopped early", "bold red"), f": {reason}")
    for sentence in result.notes:
        yield Text.assemble(("note", "bold yellow"), f": {sentence}")


def _cycles(result: Result) -> RenderableType:
    """Activities by privilege state, the most expensive first, with a bar split by privilege."""
    by, total = result.cycles.by, result.cycles.total
    activities = {name for activity in by.values() for name, cycles in activity.items() if cycles}
    sums = {name: sum(by[state].get(name, 0) for state in by) for name in activities}
    longest = max(sums.values(), default=0)
    table = section("Cycles", (*PRIVILEGES, "total", "share"))
    for column, state in zip(table.columns[1:5], PRIVILEGES, strict=True):
        column.header_style = column.style = PRIVILEGE_STYLES[state]
    table.add_column("", ratio=1)
    table.expand = True
    for name in sorted(sums, key=lambda activity: (-sums[activity], activity)):
        parts = [by.get(state, {}).get(name, 0) for state in PRIVILEGES]
        share = percent(sums[name] / total)
        bar = Bar([cycles / longest for cycles in parts], list(PRIVILEGE_STYLES.values()))
        table.add_row(_words(name), *map(count, parts), count(sums[name]), share, bar)
    states = [sum(by.get(state, {}).values()) for state in PRIVILEGES]
    table.add_section()
    table.add_row("total", *map(count, states), count(total), percent(1.0 if total else None), style="bold")
    executed = [result.instructions.get(state, 0) for state in PRIVILEGES]
    table.add_row("instructions", *map(count, executed), count(sum(executed)))
    return table


def _exits(exits: Iterable[Exit]) -> Table:
    table = section("Exits", ("count", "mean", "p50", "p99", "cycles", "share", "of run"))
    for one in exits:
        times = (one.mean_cycles, one.p50_cycles, one.p99_cycles)
        shares = (percent(one.share), percent(one.share_of_run))
        table.add_row(one.reason, count(one.count), *(f"{time:,.0f}" for time in times), count(one.cycles), *shares)
    return table


def _hypercalls(counted: Hypercalls) -> RenderableType:
    """Hypercalls by number, page-table requests by kind, the most frequent first."""
    table = section("Hypercalls", ("count", "page-table requests", "count"))
    table.columns[2].justify = "left"
    calls, requests = (
        [(_words(name), count(n)) for name, n in sorted(counts.items(), key=lambda one: (-one[1], one[0]))]
        for counts in (counted.calls, counted.requests)
    )
    for call, request in zip_longest(calls, requests, fillvalue=("", "")):
        table.add_row(*call, *request)
    line = Text(f"{count(counted.events_sent)} events, {count(counted.upcalls)} upcalls", style="dim")
    line.append(f", {count(counted.blocks)} waits, {count(counted.refusals)} refused")
    if counted.stops:
        line.append(", stopped processes: " + ", ".join(f"{count(n)} {name}" for name, n in counted.stops.items()))
    return Group(table, line)


def _walks(result: Result) -> RenderableType:
    walks = result.walks
    table = section("Page walks", ("references", "per walk", "L1D", "L2", "L3", "DRAM"))
    rows = {"guest tables": walks.guest, "EPT tables": walks.ept}
    shown = {name: (one.references, one.served_by) for name, one in rows.items() if one.references}
    for name, (references, served) in [*shown.items(), ("together", (walks.references, walks.served_by))]:
        table.add_row(name, count(references), f"{references / walks.count:.2f}", *map(percent, _parts(served)))
    line = Text(f"{count(walks.count)} walks, {walks.cycles / walks.count:,.0f} cycles each", style="dim")
    if walks.faults:
        line.append(f", {count(walks.faults)} ended in a page fault")
    if walks.violations:
        line.append(f", {count(walks.violations)} in an EPT violation")
    if walks.misconfigurations:
        line.append(f", {count(walks.misconfigurations)} in an EPT misconfiguration")
    if walks.wrong_path:
        line.append(f", {count(walks.wrong_path)} began on a wrong path")
    return Group(table, line)


def _shadow(shown: Mapping[str, ShadowPaging]) -> RenderableType:
    """Page faults that exited, by what they were, and shadow pages; a row for each VM."""
    table = section("Shadow paging", ("page faults", "true", "hidden", "other", "pages"))
    for name, one in shown.items():
        others = one.unprotecting_page_faults + one.other_page_faults
        faults = (one.page_faults, one.true_page_faults, one.hidden_page_faults, others)
        table.add_row(name, *map(count, (*faults, one.pages_made)))
    words = (
        ("pages_reused", "pages found again"), ("pages_zapped", "given up"), ("pages_recycled", "of them for room"),
        ("table_writes", "writes to tables emulated"), ("tables_unsynchronized", "times a leaf table out of sync"),
    )  # fmt: skip
    counted = ((sum(getattr(one, name) for one in shown.values()), text) for name, text in words)
    return Group(table, Text(", ".join(f"{count(number)} {text}" for number, text in counted if number), style="dim"))


def _parts(served: ServedBy) -> tuple[float | None, ...]:
    answers = (served.l1d, served.l2, served.l3, served.dram)
    total = sum(answers)
    return tuple(answer / total if answer else None for answer in answers)


def _tlbs(result: Result) -> Table:
    tlb = result.tlb
    first_misses, nested = tlb.dtlb_misses + tlb.itlb_misses, tlb.nested_tlb_hits + tlb.nested_tlb_misses
    entries = tlb.entry_hits + tlb.ept_entry_hits
    rows = (
        ("first-level, data", tlb.accesses, tlb.accesses - tlb.dtlb_misses),
        ("second-level", first_misses, tlb.stlb_hits),
        ("walk caches, guest", 0 if entries else result.walks.count, tlb.pwc_hits),
        ("walk caches, EPT", 0 if entries else tlb.nested_tlb_misses, tlb.ept_pwc_hits),
        ("walk cache of entries", entries and entries + result.walks.references, entries),
        ("nested TLB", nested, tlb.nested_tlb_hits),
    )
    table = section("TLBs and walk caches", ("lookups", "hit"))
    for name, lookups, hits in rows:
        if lookups:
            table.add_row(name, count(lookups), percent(hits / lookups))
    return table


def _caches(result: Result) -> Table:
    """Who answered, in shares; code only counts what missed the L1 instruction cache."""
    caches = result.caches
    code = ServedBy(l1d=0, l2=caches.code.l2, l3=caches.code.l3, dram=caches.code.dram)
    rows = {"data": caches.data, "page tables": caches.tables, "code, L1I misses": code}
    table = section("Memory", ("accesses", "L1D", "L2", "L3", "DRAM"))
    for name, served in rows.items():
        accesses = served.l1d + served.l2 + served.l3 + served.dram
        if accesses:
            table.add_row(name, count(accesses), *map(percent, _parts(served)))
    return table


def _vms(result: Result) -> Table:
    table = section("VMs", ("cpu", "efficiency", "ring 0", "ring 3", "slowdown", "cycles", "exits", "walks"))
    for name, vm in result.vms.items():
        table.add_row(name, str(vm.cpu), *_vm_figures(vm))
    return table


def _vm_figures(vm: VmResult) -> tuple[str, ...]:
    shares = (vm.efficiency.overall, vm.efficiency.ring0, vm.efficiency.ring3)
    slowdown = NOTHING if vm.slowdown is None else times(vm.slowdown)
    exits = sum(one.count for one in vm.exits)
    return (*map(percent, shares), slowdown, count(vm.cycles.total), count(exits), count(vm.walks.count))


def _dma(result: Result) -> RenderableType:
    table = section("Devices", ("operations", "aborted", "escaped", "Gb/s", "mean ns", "p50 ns", "p99 ns", "walks"))
    for each in result.dma:
        delay = each.latency
        table.add_row(
            each.name, count(each.operations), count(each.aborted), count(each.escaped), f"{each.gbps:.2f}",
            f"{delay.mean_ns:.0f}", str(delay.p50_ns), str(delay.p99_ns), count(each.walks),
        )  # fmt: skip
    unit = ", ".join(f"{name} {count(number)}" for name, number in (result.iommu or {}).items() if number)
    tlbs = [
        Text(
            f"Device-TLB of {each.name}: {count(each.tlb_hits)} hits, {count(each.translations)} translation requests."
        )
        for each in result.dma
        if each.translations
    ]
    drivers = [_driver(each.name, each.driver) for each in result.dma if each.driver is not None]
    return Group(table, *tlbs, *drivers, Padding(Text(f"Remapping unit: {unit or 'off'}."), (1, 0, 0, 0)))


def _driver(name: str, driver: Driver) -> RenderableType:
    lines = [
        f"Driver of {name}: {count(driver.done)} buffers, {driver.cycles_per_buffer:.0f} cycles each; "
        f"a map {driver.map_cycles:.0f}, an unmap {driver.unmap_cycles:.0f} cycles; "
        f"{count(driver.invalidations)} invalidations, {percent(driver.invalidation_share)} of the time."
    ]
    if driver.hostile_writes:
        lines.append(
            f"Of {count(driver.hostile_writes)} writes after their buffers were done, {count(driver.hostile_through)} "
            f"went through after the unmap, up to {driver.window_ns:.0f} ns later."
        )
    if driver.given_up:
        lines.append("The kernel gave the device up, which answered no invalidation: its context entry is not present.")
    if driver.pages is not None:
        lines += _page_requests(driver.pages)
    return Padding(Text("\n".join(lines)), (1, 0, 0, 0))


def _page_requests(pages: PageRequests) -> list[str]:
    lines = [
        f"{count(pages.requests)} page requests in {count(pages.groups)} groups, of which {count(pages.succeeded)} "
        f"were answered with success, {pages.wait_mean_ns:.0f} ns after the request, and {count(pages.refused)} as "
        f"invalid; {count(pages.mapped)} pages mapped, {pages.handled_cycles:.0f} cycles each request."
    ]
    if pages.flood:
        lines.append(
            f"Of {count(pages.flood)} page requests for what was never allowed, {count(pages.flood_refused)} were "
            f"answered as invalid and {count(pages.flood_succeeded)} by the unit, whose queue was full."
        )
    return lines


def _replay(replay: Replay) -> RenderableType:
    table = section("Recorded guest", ("predicted", "real", "deviation", "left out: predicted", "real"))
    for one in replay.exits:
        deviation = NOTHING if one.deviation_percent is None else f"{one.deviation_percent:+.2f} %"
        left_out = (count(one.left_out_predicted), count(one.left_out_recorded))
        table.add_row(one.reason, count(one.predicted), count(one.recorded), deviation, *left_out)
    line = Text(f"{replay.trace}; real: {replay.recorded_on}; left out: depends on host timing", style="dim")
    return Group(table, line)


def _footer(result: Result) -> RenderableType:
    rate, known = result.rate, result.parameters.confidence
    speed = f"{count(rate.instructions_per_s)} instructions/s, {count(rate.accesses_per_s)} accesses/s"
    exits = f", {count(rate.exits_per_s)} exits/s" if rate.exits_per_s else ""
    events = [f"{count(number)} {_words(name)}" for name, number in result.events.items() if number]
    lines = [Text(f"events: {', '.join(events)}", style="dim")] if events else []
    lines += [Text(f"simulated in {seconds(rate.wall_s)}: {speed}{exits}", style="dim")]
    sources = [f"{known[name]} {name}" for name in CONFIDENCES if known.get(name)]
    if sources:
        lines.append(Text(f"parameters: {', '.join(sources)}", style="dim"))
    lines += [Text(f"approximation: {sentence}", style="dim") for sentence in result.approximations]
    return Group(*lines)


class Beside:
    """Tables side by side where they fit, else one below the other."""

    GAP = 4

    def __init__(self, tables: list[Table]) -> None:
        self.tables = tables

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [Measurement.get(console, options, table).maximum for table in self.tables]
        if sum(widths) + self.GAP * (len(widths) - 1) <= options.max_width:
            row = Table.grid(padding=(0, self.GAP, 0, 0))
            row.add_row(*self.tables)
            yield row
        else:
            yield Group(*(Padding(table, (min(at, 1), 0, 0, 0)) for at, table in enumerate(self.tables)))


class Bar:
    """A bar of coloured shares of the column's width, exact to an eighth of a character."""

    EIGHTHS = " ▏▎▍▌▋▊▉"

    def __init__(self, shares: list[float], styles: list[str]) -> None:
        self.shares, self.styles = shares, styles

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text, eighths, ends = Text(no_wrap=True), 0, 0.0
        for share, style in zip(self.shares, self.styles, strict=True):
            ends += share
            before, eighths = eighths, round(ends * options.max_width * 8)
            text.append("█" * (eighths // 8 - before // 8), style)
        if eighths % 8:
            text.append(self.EIGHTHS[eighths % 8], self.styles[self.shares.index(max(self.shares))])
        yield text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, options.max_width)


def count(number: float) -> str:
    """A count: exact below a hundred thousand, three digits and a prefix above."""
    if not number:
        return NOTHING
    if number < 99_999.5:
        return f"{number:,.0f}"
    for limit, prefix in ((999.5e3, "k"), (999.5e6, "M"), (999.5e9, "G"), (999.5e12, "T")):
        if number < limit:
            return f"{_three_digits(number / (limit / 999.5))} {prefix}"
    return f"{number:.2e}"


def seconds(duration: float) -> str:
    """A duration in the largest unit of which there is at least one."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if duration >= size:
            return f"{_three_digits(duration / size)} {unit}"
    return f"{duration * 1e9:.0f} ns"


def percent(share: float | None) -> str:
    """A share in percent that only says 100 % or 0 % when it is."""
    if share is None:
        return NOTHING
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    return f"{min(max(share, 0.0001), 0.9999) * 100:.2f} %"


def times(factor: float) -> str:
    """A factor in three digits."""
    return f"{_three_digits(factor)} ×"


def _three_digits(number: float) -> str:
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


def _words(activity: str) -> str:
    return activity.replace("_", " ")
