"""`vtsim run`: options in, a result on stdout, files in a directory."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from attrs import frozen

from vtsim.base import jit
from vtsim.base.errors import ConfigError
from vtsim.base.trace import Sinks, TraceSink
from vtsim.cli import FINE, GUEST_PANIC, INTERRUPTED
from vtsim.cli.output import coloured, emit, note, show
from vtsim.cli.progress import Watch
from vtsim.config import dump, load_scenario, located
from vtsim.cpu.kernels.run import run_all
from vtsim.guest.kernel.layout import PANIC
from vtsim.study.result import WRITTEN, Result
from vtsim.study.run import run
from vtsim.study.trace_view import TraceFilter, TraceView

COMPILING: Final = "compiling kernels (once per version; takes a minute or two)"


@frozen(kw_only=True)
class Options:
    """What the command line says."""

    file: Path
    settings: tuple[str, ...]
    layout: Literal["report", "json", "perf"]
    trace: bool
    trace_filter: str
    trace_limit: int | None
    timeline: Path | None
    output: Path | None


def run_scenario(options: Options) -> int:
    """Run, print, write; return the exit status."""
    view = _view(options) if options.trace else None
    _check_places(options)
    scenario = load_scenario(options.file, options.settings)
    if options.timeline is not None and not scenario.vms:
        raise ConfigError("the scenario has no VMs, whose time it would show", field="--timeline")
    if scenario.vms and not jit.kernels_are_cached(run_all):
        note(COMPILING)
    with Watch(bar=view is None) as watch, _timeline(options.timeline) as timeline:
        sinks = tuple(sink for sink in (view, timeline) if sink is not None)
        try:
            result = run(scenario, trace=Sinks(sinks) if sinks else None, progress=watch)
        except ConfigError as error:
            raise located(error, options.file, options.settings) from None
    if options.timeline is not None:
        note(f"wrote {options.timeline}{_as_json(options.timeline)}")
    if options.output is not None:
        rows = view.kept if view is not None else None
        for path in result.write(options.output, dump(scenario), rows):
            note(f"wrote {path}")
    _print(result, options.layout)
    if watch.interrupted:
        return INTERRUPTED
    return GUEST_PANIC if any(why.startswith(PANIC) for why in result.stopped.values()) else FINE


@contextmanager
def _timeline(path: Path | None) -> Iterator[TraceSink | None]:
    """The sink that writes a timeline, if one is wanted."""
    if path is None:
        yield None
        return
    from vtsim.study.timeline.formats import timeline_file

    with timeline_file(path) as timeline:
        yield timeline


def _as_json(path: Path) -> str:
    """Say when a timeline is JSON for want of the package."""
    from vtsim.study.timeline.formats import EXTRA, is_chrome

    return f" as JSON; {EXTRA}" if is_chrome(path) and path.suffix != ".json" else ""


def _print(result: Result, layout: str) -> None:
    if layout == "json":
        emit(result.to_json() + "\n")
    elif layout == "perf":
        from vtsim.study.perf_layout import perf_kvm_stat

        emit(perf_kvm_stat(result))
    else:
        from vtsim.study.report import report

        show(report(result))


def _view(options: Options) -> TraceView:
    """The trace goes to stdout, or to stderr where stdout is for the result alone."""
    wanted = TraceFilter.parse(options.trace_filter) if options.trace_filter else TraceFilter()
    to_stdout = options.layout == "report"
    return TraceView(
        write=emit if to_stdout else sys.stderr.write,
        wanted=wanted,
        limit=options.trace_limit,
        colour=to_stdout and coloured(),
        width=os.get_terminal_size().columns if to_stdout and sys.stdout.isatty() else None,
        kept=array("q") if options.output is not None else None,
    )


def _check_places(options: Options) -> None:
    """Find out before a long run, not after it, that a result cannot be written."""
    if options.timeline is not None and options.timeline.exists() and options.timeline.samefile(options.file):
        raise ConfigError(f"{options.timeline} is the scenario", field="--timeline", help="name another file")
    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{options.output}: {error.strerror}", field="--output") from None
        if not os.access(options.output, os.W_OK | os.X_OK):
            raise ConfigError(f"{options.output} is not a directory that can be written to", field="--output")
        for name in WRITTEN:
            if (options.output / name).is_dir():
                raise ConfigError(f"{options.output / name} is a directory", field="--output")
