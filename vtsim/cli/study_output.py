"""`vtsim study report|plot|effects|…`: the commands and their options; what they do is in `study_tables`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtsim.cli.arguments import path
from vtsim.cli.sweep import StudyFile, study

__all__ = ["study"]  # with the commands below

Metric = Annotated[
    str, typer.Option("--metric", metavar="KEY", help="A figure of the result, as in slowdown.", show_default=False)
]
Drawn = Annotated[
    list[str] | None,
    typer.Option("--metric", metavar="KEY", help="What to draw; exits.*.share_of_run stacks several. Repeatable."),
]
Where = Annotated[
    list[str] | None, typer.Option("--where", metavar="AXIS=VALUE", help="Only runs with this value. Repeatable.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a setting of every run. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Jobs = Annotated[int, typer.Option("-j", "--jobs", metavar="N", min=0, help="Runs at a time; one for each CPU if 0.")]
BeyondStated = Annotated[
    bool,
    typer.Option("--beyond-stated-range", help="Costs of the processor may be more or less than their sources say."),
]
Scenario = Annotated[Path, typer.Argument(metavar="SCENARIO", parser=path, help="A scenario.", show_default=False)]


@study.command()
def report(
    file: StudyFile,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE.html", parser=path, help="Where; beside the store if not given."),
    ] = None,
    metric: Drawn = None,
    where: Where = None,
) -> None:
    """Write a study as one HTML page: question, pictures, points, and where the numbers come from."""
    from vtsim.cli.study_tables import write_report

    raise typer.Exit(write_report(file, output, metric or (), where or ()))


@study.command()
def plot(
    file: StudyFile,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", parser=path, help="SVG, PNG or PDF; SVG beside the store if not given."
        ),
    ] = None,
    metric: Drawn = None,
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="lines, heat, bars, stacks, cdf or scatter; chosen from the axes if not given."
        ),
    ] = None,
    where: Where = None,
) -> None:
    """Draw a study."""
    from vtsim.cli.study_tables import write_plot

    raise typer.Exit(write_plot(file, output, metric or (), kind, where or ()))


@study.command()
def effects(
    file: StudyFile,
    metric: Metric,
    confidence: Annotated[float, typer.Option(metavar="P", min=0.5, max=0.9999, help="Of the intervals.")] = 0.95,
    where: Where = None,
    json: Json = False,
) -> None:
    """Show what each axis changes, and what two change together, as mean differences."""
    from vtsim.cli.study_tables import show_effects

    raise typer.Exit(show_effects(file, metric, confidence, where or (), json=json))


@study.command()
def pareto(
    file: StudyFile,
    least: Annotated[
        list[str] | None, typer.Option("--min", metavar="KEY", help="A figure that should be small.")
    ] = None,
    most: Annotated[
        list[str] | None, typer.Option("--max", metavar="KEY", help="A figure that should be large.")
    ] = None,
    where: Where = None,
    json: Json = False,
) -> None:
    """Show the points that no other beats in two figures at once."""
    from vtsim.cli.study_tables import show_pareto

    raise typer.Exit(show_pareto(file, least or (), most or (), where or (), json=json))


@study.command()
def fit(
    file: StudyFile,
    measurements: Annotated[
        Path, typer.Argument(metavar="CSV", parser=path, help="Axes and measurements, a row each.", show_default=False)
    ],
    metric: Metric,
    column: Annotated[str, typer.Option(metavar="NAME", help="The column that was measured.")] = "measured",
    where: Where = None,
    json: Json = False,
) -> None:
    """Hold a study against your own measurements: slope, intercept, R², deviation of each row."""
    from vtsim.cli.study_tables import show_fit

    raise typer.Exit(show_fit(file, measurements, metric, column, where or (), json=json))


@study.command()
def sensitivity(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="STUDY|SCENARIO", parser=path, help="A study; with --axis, a scenario to run.", show_default=False
        ),
    ],
    metric: Metric,
    axis: Annotated[
        list[str] | None,
        typer.Option("--axis", metavar="PATH=RANGE", help="What changes: LOW..HIGH, a,b,c, or stated. Repeatable."),
    ] = None,
    beyond_stated_range: BeyondStated = False,
    method: Annotated[str, typer.Option(metavar="NAME", help="sobol or morris, with --axis.")] = "sobol",
    samples: Annotated[
        int, typer.Option(metavar="N", min=2, help="Each is as many runs as there are axes, and 1 or 2.")
    ] = 64,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the samples.")] = 1,
    sets: Sets = None,
    jobs: Jobs = 0,
    json: Json = False,
) -> None:
    """Show which settings a figure depends on: of a whole grid exactly, of a scenario by runs of its own."""
    from vtsim.cli.study_tables import show_sensitivity

    raise typer.Exit(
        show_sensitivity(
            file,
            metric,
            axis or (),
            method,
            samples,
            seed,
            tuple(sets or ()),
            jobs,
            json=json,
            beyond_stated=beyond_stated_range,
        )
    )


@study.command()
def crossover(
    scenario: Scenario,
    axis: Annotated[str, typer.Option(metavar="PATH", help="A numeric setting.", show_default=False)],
    between: Annotated[
        tuple[str, str], typer.Option(metavar="LOW HIGH", help="Where to look for it.", show_default=False)
    ],
    a: Annotated[list[str], typer.Option("--a", metavar="PATH=VALUE", help="What A is. Repeatable.")],
    b: Annotated[list[str], typer.Option("--b", metavar="PATH=VALUE", help="What B is. Repeatable.")],
    metric: Metric,
    step: Annotated[str, typer.Option(metavar="STEP", help="Try LOW, and multiples of STEP above it, only.")] = "",
    tolerance: Annotated[
        float, typer.Option(metavar="SHARE", min=1e-9, max=1, help="How closely, of the interval.")
    ] = 0.01,
    beyond_stated_range: BeyondStated = False,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Find at which value of a setting A begins to beat B, by runs that halve the interval."""
    from vtsim.cli.study_tables import show_crossover

    raise typer.Exit(
        show_crossover(
            scenario,
            axis,
            between,
            tuple(a),
            tuple(b),
            metric,
            step,
            tolerance,
            tuple(sets or ()),
            json=json,
            beyond_stated=beyond_stated_range,
        )
    )
