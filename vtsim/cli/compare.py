"""`vtsim compare`: one scenario under several techniques, side by side; or two runs, for what their guests see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from vtsim.cli import FINE, INTERRUPTED
from vtsim.cli.arguments import File, Json, Sets, path

if TYPE_CHECKING:
    from vtsim.study.compare import Comparison

SVG: Final = ".svg"
ALL: Final = "all"


def compare(
    file: File,
    other: Annotated[
        Path | None,
        typer.Argument(
            metavar="OTHER", parser=path, help="With --equivalence: what is compared with it.", show_default=False
        ),
    ] = None,
    techniques: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="`all`, or names between commas, as in native,hardware; all if not given."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", parser=path, help="Also draw it.")] = None,
    equivalence: Annotated[
        bool,
        typer.Option(
            "--equivalence",
            help="Compare what guests see, natively and in VMs (or in FILE and OTHER), up to the first difference; "
            "status 1 if there is one.",
        ),
    ] = False,
    other_sets: Annotated[
        list[str] | None,
        typer.Option(
            "--other-set", metavar="PATH=VALUE", help="With --equivalence: a setting of OTHER, or of FILE's second run."
        ),
    ] = None,
    json: Json = False,
    sets: Sets = None,
) -> None:
    """Run one scenario under several techniques and set the results side by side; or compare what guests see."""
    if equivalence:
        from vtsim.cli.verdict import compare_runs

        if techniques is not None or plot is not None:
            raise typer.BadParameter(
                "--techniques and --plot do not go with --equivalence; --other-set vmm.technique=… does"
            )
        raise typer.Exit(compare_runs(file, other, tuple(sets or ()), tuple(other_sets or ()), json=json))
    if other is not None or other_sets:
        raise typer.BadParameter("OTHER and --other-set go with --equivalence")
    raise typer.Exit(
        compare_techniques(file, tuple(sets or ()), ALL if techniques is None else techniques, plot, json=json)
    )


def compare_techniques(file: Path, sets: tuple[str, ...], wanted: str, plot: Path | None, *, json: bool) -> int:
    """Run, print, draw; return the exit status."""
    from vtsim.base import jit
    from vtsim.base.errors import ConfigError
    from vtsim.cli.output import emit, note, show
    from vtsim.cli.progress import Watch
    from vtsim.cli.run import COMPILING
    from vtsim.cpu.kernels.run import run_all
    from vtsim.study.compare import chosen, compare_scenario
    from vtsim.study.compare_view import comparison_json, comparison_svg, comparison_tables

    if plot is not None and plot.suffix != SVG:
        raise ConfigError(
            f"{plot.name!r} is no SVG file", field="--plot", help=f"the drawing is SVG, as in comparison{SVG}"
        )
    if plot is not None and not plot.parent.is_dir():  # before anything runs
        raise ConfigError(f"there is no folder {str(plot.parent)!r}", field="--plot", help="make it, or name another")
    names = chosen(None if wanted == ALL else wanted.split(","))
    if not jit.kernels_are_cached(run_all):
        note(COMPILING)
    with Watch(bar=True) as watch:
        found: Comparison = compare_scenario(file, names, sets=sets, progress=watch)
    if json:
        emit(comparison_json(found) + "\n")
    else:
        show(comparison_tables(found))
    if plot is not None:
        try:
            plot.write_text(comparison_svg(found), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{plot} cannot be written: {error.strerror}", field="--plot") from None
        note(f"wrote {plot}")
    return INTERRUPTED if watch.interrupted else FINE
