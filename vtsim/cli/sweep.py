"""`vtsim sweep` and `vtsim study …`: the commands and their options; what they do is in `sweep_run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtsim.cli.arguments import path

study = typer.Typer(help="See what came of a study.", no_args_is_help=True, rich_markup_mode=None)

StudyFile = Annotated[
    Path, typer.Argument(metavar="STUDY", parser=path, help="A study, or its store.", show_default=False)
]


def sweep(
    file: Annotated[
        Path, typer.Argument(metavar="STUDY", parser=path, help="A study, as in study.yaml.", show_default=False)
    ],
    jobs: Annotated[
        int, typer.Option("-j", "--jobs", metavar="N", min=0, help="Runs at a time; one for each CPU if 0.")
    ] = 0,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Dask cluster, as in tcp://host:8786.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what failed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show points, time and memory; run one at most.")] = False,
    store: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=path, help="Where results are kept; beside the study if not given."),
    ] = None,
) -> None:
    """Run a scenario over a space of settings; what was run already is not run again."""
    from vtsim.cli.sweep_run import Options, sweep_study

    options = Options(
        file=file, jobs=jobs, scheduler=scheduler, retry_failed=retry_failed, dry_run=dry_run, store=store
    )
    raise typer.Exit(sweep_study(options))


@study.command()
def status(file: StudyFile) -> None:
    """Show how far a study is, and what failed."""
    from vtsim.cli.sweep_run import show_status

    raise typer.Exit(show_status(file))


@study.command()
def export(
    file: StudyFile,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="csv, parquet or netcdf.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", parser=path, help="Where; beside the store if not given."),
    ] = None,
) -> None:
    """Write the table of all finished runs to a file."""
    from vtsim.cli.sweep_run import export_study

    raise typer.Exit(export_study(file, to, output))


# Further commands of `vtsim study` (report, plot): vtsim/cli/study_output.py registers them on `study`; import it here.
