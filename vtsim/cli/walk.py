"""`vtsim walk`: one translation of a guest's address, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from attrs import evolve, frozen

from vtsim.base import jit
from vtsim.base.errors import ConfigError, Problem
from vtsim.cli import FINE
from vtsim.cli.output import emit, note, show
from vtsim.cli.run import COMPILING
from vtsim.config import load_scenario, located
from vtsim.cpu.kernels.run import run_all
from vtsim.platform.walk import ARGUMENTS, EVERY_ENTRY, walk
from vtsim.study.walk_view import WalkText, walk_json, walk_svg

SVG: Final = ".svg"


@frozen(kw_only=True)
class Options:
    """What the command line says."""

    file: Path
    settings: tuple[str, ...]
    vm: str
    process: str
    address: str
    access: str
    ring: int | None
    native: bool
    after_run: bool
    cold: bool
    every_entry: bool
    plot: Path | None
    json: bool


def show_walk(options: Options) -> int:
    """Observe the walk, print it, draw it."""
    if options.plot is not None and options.plot.suffix != SVG:
        raise ConfigError(
            f"{options.plot.name!r} is no SVG file", field="--plot", help=f"the drawing is SVG, as in walk{SVG}"
        )
    address = _address(options.address)
    settings = (*options.settings, *(EVERY_ENTRY if options.every_entry else ()))
    scenario = load_scenario(options.file, settings)
    if options.after_run and not jit.kernels_are_cached(run_all):
        note(COMPILING)
    try:
        found = walk(
            scenario, options.vm, address, access=options.access, ring=options.ring, process=options.process,
            native=options.native, after_run=options.after_run, cold=options.cold,
        )  # fmt: skip
    except ConfigError as error:
        if any(problem.path in ARGUMENTS for problem in error.problems):
            raise ConfigError.of([_as_option(problem) for problem in error.problems]) from None
        raise located(error, options.file, settings) from None
    if options.plot is not None:
        try:
            options.plot.write_text(walk_svg(found), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{options.plot} cannot be written: {error.strerror}", field="--plot") from None
    if options.json:
        emit(walk_json(found) + "\n")
    else:
        show(WalkText(found))
    if options.plot is not None:
        note(f"wrote {options.plot}")
    return FINE


def _as_option(problem: Problem) -> Problem:
    return evolve(problem, path=f"--{problem.path}")


def _address(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise ConfigError(f"{text!r} is no address", field="--address", help="as in 0x1000000000") from None
