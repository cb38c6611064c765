"""What `vtsim sweep` and `vtsim study …` do."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from pathlib import Path
from statistics import fmean
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final

from attrs import frozen

from vtsim.base import jit
from vtsim.base.units import DURATION, SIZE
from vtsim.cli import FINE, INTERRUPTED
from vtsim.cli.output import columns, emit, note, show
from vtsim.cli.progress import STOPPING
from vtsim.cli.run import COMPILING
from vtsim.config.study import load_study
from vtsim.cpu.kernels.run import run_all
from vtsim.study.analysis.cells import number as figure_of
from vtsim.study.sweep.design import Design, load_design
from vtsim.study.sweep.executors import Cluster, Local, Workers, cpus
from vtsim.study.sweep.export import export
from vtsim.study.sweep.intervals import half_width, is_tight
from vtsim.study.sweep.metrics import absent
from vtsim.study.sweep.run import Estimate, Progress, Sweep, estimate
from vtsim.study.sweep.store import Store
from vtsim.study.sweep.study import Status, Study, cell_text, store_of
from vtsim.study.sweep.table import Column, StudyTable, Value

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as Bar

SOME_FAILED: Final = 1
SHOWN_ROWS: Final = 40
GAP: Final = 2  # between columns
MIB_PER_GIB: Final = 1024
DIMENSIONS: Final = {"B": SIZE, "ns": DURATION}
PLAIN_UNITS: Final = ("ratio", "share", "walks", "references", *DIMENSIONS)  # which label or value say themselves


@frozen(kw_only=True)
class Options:
    """What the command line says."""

    file: Path
    jobs: int
    scheduler: str | None
    retry_failed: bool
    dry_run: bool
    store: Path | None


def sweep_study(options: Options) -> int:
    """Run what is missing, show the table; status 1 if runs failed."""
    design = load_design(options.file)
    emit(f"{design.spec.question}\n")
    path = options.store or store_of(options.file)
    workers: Workers = Cluster(options.scheduler) if options.scheduler is not None else Local(options.jobs or cpus())
    if not jit.kernels_are_cached(run_all):
        note(COMPILING)
    with Store(path) as store:
        if options.dry_run:
            emit(_estimate_text(estimate(design, store, workers)))
            return FINE
        complete = _run(design, store, workers, options)
    study = Study(path)
    status = study.status()
    if complete:
        show(_table(table := study.table()))
    emit(_status_text(status, path))
    if complete:
        _note_absent(design, study, table)
        _note_loose(design, study)
    again = f"vtsim sweep {options.file}" + (f" --store {options.store}" if options.store else "")
    _note_errors(status, again)
    if not complete:
        note(f"stopped; what was run is kept. To go on: {again}")
        return INTERRUPTED
    return SOME_FAILED if status.failed else FINE


def _run(design: Design, store: Store, workers: Workers, options: Options) -> bool:
    with SweepWatch() as watch:
        try:
            return Sweep(design, store, workers, watch=watch, retry_failed=options.retry_failed).run()
        except KeyboardInterrupt:
            return False


def _note_absent(design: Design, study: Study, table: StudyTable) -> None:
    """Say which metrics that the study names no run has: the name of an entry may be mistyped."""
    for column in table.metrics:
        if column.path in design.spec.metrics and table.rows and table.lacks(column):
            note(str(absent(column.path, study.results(), "metrics")))


def _note_loose(design: Design, study: Study) -> None:
    """Say where `until` gave up before its interval was tight."""
    until = design.spec.until
    if not until.metric:
        return
    values: dict[tuple[Value, ...], list[float]] = {}
    table = study.table([until.metric])
    if table.rows and table.lacks(table.metrics[0]):
        note(str(absent(until.metric, study.results(), "until.metric")))
    for row in table.rows:
        value = figure_of(row.metrics[until.metric])
        values.setdefault(tuple(row.axes.values()), []).extend([] if value is None else [value])
    widths = [
        half_width(each, until.confidence) / abs(fmean(each))
        for each in values.values()
        if each and len(each) >= until.max and not is_tight(each, until.confidence, until.ci)
    ]
    if widths:
        note(
            f"until: after {until.max} replicates, {until.metric} is not known to ± {100 * until.ci:g} % at "
            f"{len(widths)} of {len(values)} points; the widest is ± {100 * max(widths):.2g} %"
        )


def show_status(file: Path) -> int:
    """Print how far a study is."""
    study = Study(file)
    status = study.status()
    emit(f"{status.question}\n{_status_text(status, study.path)}")
    _note_errors(status, f"vtsim sweep {file}")
    if file != study.path and not study.is_of(load_study(file)):
        note(f"{file} has changed since; vtsim sweep {file} brings its results up to it")
    return FINE


def export_study(file: Path, form: str, output: Path | None) -> int:
    """Write the table."""
    note(f"wrote {export(Study(file), form, output)}")
    return FINE


def _status_text(status: Status, path: Path) -> str:
    words = [f"{status.done} of {status.planned} runs done"]
    words += [f"{status.failed} failed"] if status.failed else []
    words += [f"{status.missing} missing"] if status.missing else []
    return f"{', '.join(words)}; results in {path}\n"


def _note_errors(status: Status, again: str) -> None:
    for axes, error in status.errors:
        note(f"\nfailed: {axes}\n{error}")
    if status.failed:
        note(f"\nTo run again what failed: {again} --retry-failed")


def _estimate_text(found: Estimate) -> str:
    available = _available_mib()
    room = f" of {available / MIB_PER_GIB:.1f} GiB available" if available else ""
    return (
        f"{found.points} points, {found.runs} runs, {found.missing} of them missing\n"
        f"time: {_duration(found.seconds)} ({found.run_s:.3g} s a run, {found.jobs} at a time)\n"
        f"memory: {found.mib / MIB_PER_GIB:.1f} GiB{room}\n"
    )


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def _available_mib() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:")), 0.0)


def _table(table: StudyTable) -> RenderableType:
    """All rows of a small study, the first of a large one."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, header_style="bold", pad_edge=False)
    rows = table.rows[:SHOWN_ROWS]
    cells = [[_cell(column, row.axes[column.path]) for row in rows] for column in table.axes]
    cells += [[_cell(column, row.metrics[column.path]) for row in rows] for column in table.metrics]
    heads = [_head(column) for column in (*table.axes, *table.metrics)]
    if any(row.replicate for row in rows):
        heads.append("replicate")
        cells.append([str(row.replicate) for row in rows])
    for head, width in zip(heads, _widths(heads, cells), strict=True):
        shown.add_column(Text(_folded(head, width)), overflow="fold", width=width)
    for row_cells in zip(*cells, strict=True):
        shown.add_row(*map(Text, row_cells))
    if len(table.rows) > SHOWN_ROWS:
        shown.caption = f"{len(table.rows) - SHOWN_ROWS} more rows"
    return shown


def _widths(heads: list[str], cells: list[list[str]]) -> list[int | None]:
    """Return the widths of columns: figures stay whole, then parts of heads; None where figures have no room."""
    widths = [max(map(len, column), default=0) for column in cells]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else columns()
    spare = room - sum(widths) - GAP * len(widths)
    if spare < 0:
        return [None] * len(widths)
    wanted = [max(map(len, _parts(head))) for head in heads]
    while spare and (narrow := [n for n, width in enumerate(widths) if width < wanted[n]]):
        for n in narrow[:spare]:
            widths[n] += 1
        spare -= min(spare, len(narrow))
    return list(widths)


def _parts(head: str) -> list[str]:
    """The parts of a head that are not broken."""
    return [part.rstrip(" ") for part in re.split(r"(?<=[ ._])", head) if part]


def _folded(head: str, width: int | None) -> str:
    """A head in lines of at most this width where its parts allow it."""
    lines = [""]
    for part in re.split(r"(?<=[ ._])", head):
        if width is not None and lines[-1] and len((lines[-1] + part).rstrip(" ")) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip(" ") for line in lines)


def _head(column: Column) -> str:
    return f"{column.label} [{column.unit}]" if column.unit and column.unit not in PLAIN_UNITS else column.label


def _cell(column: Column, value: Value) -> str:
    """A value as a user would have written it, where its unit has larger ones."""
    dimension = DIMENSIONS.get(column.unit)
    return dimension.format(value) if dimension and isinstance(value, int) else cell_text(value)


class SweepWatch:
    """Shows on a terminal how far a sweep is, and passes on a wish to stop: the second one ends it at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self.bar: Bar | None = None
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SweepWatch:
        self.previous = {number: signal.signal(number, self._interrupt) for number in STOPPING}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, progress: Progress) -> bool:
        """Draw; False once the user wants it to stop."""
        if sys.stderr.isatty():
            if self.bar is None:
                self.bar = _bar()
                self.bar.start()
                self.bar.add_task("runs", total=progress.total, rate="", failed="")
            rate = progress.ran / progress.seconds if progress.seconds else 0.0
            self.bar.update(
                self.bar.task_ids[0],
                completed=progress.done,
                total=progress.total,
                rate=f"{rate:.3g} runs/s",
                failed=f"{progress.failed} failed" if progress.failed else "",
            )
        return not self.interrupted

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        note("\nstopping once what is being run is done (Ctrl-C again drops it)")


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
