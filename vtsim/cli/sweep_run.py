"""What `vtsim sweep` and `vtsim study …` do."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final

from attrs import frozen

from vtsim.base import jit
from vtsim.cli import FINE, INTERRUPTED
from vtsim.cli.output import emit, note, show
from vtsim.cli.progress import STOPPING
from vtsim.cli.run import COMPILING
from vtsim.cpu.kernels.run import run_all
from vtsim.study.sweep.design import Design, load_design
from vtsim.study.sweep.executors import Cluster, Local, Workers, cpus
from vtsim.study.sweep.export import export
from vtsim.study.sweep.run import Estimate, Progress, Sweep, estimate
from vtsim.study.sweep.store import Store
from vtsim.study.sweep.study import Status, Study, cell_text, store_of
from vtsim.study.sweep.table import StudyTable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as Bar

SOME_FAILED: Final = 1
SHOWN_ROWS: Final = 40
MIB_PER_GIB: Final = 1024


@frozen(kw_only=True)
class Options:
    """What the command line says."""

    file: Path
    jobs: int
    scheduler: str
    retry_failed: bool
    dry_run: bool
    store: Path | None


def sweep_study(options: Options) -> int:
    """Run what is missing, show the table; status 1 if runs failed."""
    design = load_design(options.file)
    emit(f"{design.spec.question}\n")
    path = options.store or store_of(options.file)
    workers: Workers = Cluster(options.scheduler) if options.scheduler else Local(options.jobs or cpus())
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
        show(_table(study.table()))
    emit(_status_text(status, path))
    _note_errors(status, options.file)
    if not complete:
        note(f"stopped; what was run is kept. To go on: vtsim sweep {options.file}")
        return INTERRUPTED
    return SOME_FAILED if status.failed else FINE


def _run(design: Design, store: Store, workers: Workers, options: Options) -> bool:
    with SweepWatch() as watch:
        try:
            return Sweep(design, store, workers, watch=watch, retry_failed=options.retry_failed).run()
        except KeyboardInterrupt:
            return False


def show_status(file: Path) -> int:
    """Print how far a study is."""
    study = Study(file)
    status = study.status()
    emit(f"{status.question}\n{_status_text(status, study.path)}")
    _note_errors(status, file)
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


def _note_errors(status: Status, file: Path) -> None:
    for axes, error in status.errors:
        note(f"\nfailed: {axes}\n{error}")
    if status.failed:
        note(f"\nTo run again what failed: vtsim sweep {file} --retry-failed")


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

    shown = Table(box=None, header_style="bold", pad_edge=False)
    several = any(row.replicate for row in table.rows)
    for column in (*table.axes, *table.metrics):
        unit = f" [{column.unit}]" if column.unit not in ("", "ratio", "share") else ""
        shown.add_column(f"{column.label}{unit}".replace("[", "\\["), overflow="fold")
    if several:
        shown.add_column("replicate")
    for row in table.rows[:SHOWN_ROWS]:
        values = [*(row.axes[each.path] for each in table.axes), *(row.metrics[each.path] for each in table.metrics)]
        shown.add_row(*(cell_text(value) for value in values), *([str(row.replicate)] if several else []))
    if len(table.rows) > SHOWN_ROWS:
        shown.caption = f"{len(table.rows) - SHOWN_ROWS} more rows"
    return shown


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
