"""The commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtsim.cli import FINE, USERS_MISTAKE
from vtsim.cli.arguments import File, Json, Sets, path
from vtsim.cli.compare import compare
from vtsim.cli.output import emit, note, show
from vtsim.cli.study_output import study
from vtsim.cli.sweep import sweep

app = typer.Typer(
    name="vtsim",
    help="Simulate virtualization, and see where the cycles go.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
explain = typer.Typer(help="Show what is behind a number.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(explain, name="explain")
vmcs = typer.Typer(
    help="Show what a VMCS is and holds; replay recorded cases.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(vmcs, name="vmcs")
iommu = typer.Typer(help="Show what a remapping unit does.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(iommu, name="iommu")
analyze = typer.Typer(help="Analyse what the processor is.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(analyze, name="analyze")
app.command()(compare)


def _version(wanted: bool) -> None:
    if wanted:
        from vtsim import __version__

        emit(f"vtsim {__version__}\n")
        raise typer.Exit(FINE)


@app.callback()
def vtsim(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Simulate virtualization, and see where the cycles go."""


@app.command()
def run(
    file: File,
    json: Json = False,
    trace: Annotated[bool, typer.Option("--trace", help="Print transitions as they happen.")] = False,
    trace_filter: Annotated[
        str,
        typer.Option(metavar="LIST", help="Trace only these, as in CPUID,EPT_VIOLATION,syscalls,faults."),
    ] = "",
    trace_limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Trace only the first N transitions.")
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(metavar="OUT", parser=path, help="Write the run for ui.perfetto.dev; JSON if OUT ends in .json."),
    ] = None,
    sets: Sets = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Seed of every random choice.")] = None,
    no_baseline: Annotated[bool, typer.Option("--no-baseline", help="Do not also run it natively.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", parser=path, help="Write result.json, resolved.yaml and trace.npz there."
        ),
    ] = None,
    perf: Annotated[
        bool, typer.Option("--perf", help="Print the exits in the layout of perf kvm stat report.")
    ] = False,
) -> None:
    """Run a scenario and report where the cycles went.

    The exit status is 4 if a guest's kernel needs a hypervisor that it does not find.
    """
    if json and perf:
        raise typer.BadParameter("--json and --perf both say what to print; choose one")
    from vtsim.cli.run import Options, run_scenario

    settings = list(sets or ())
    settings += [f"seed={seed}"] if seed is not None else []
    settings += ["run.baseline=false"] if no_baseline else []
    options = Options(
        file=file,
        settings=tuple(settings),
        layout="json" if json else "perf" if perf else "report",
        trace=trace or bool(trace_filter) or trace_limit is not None,
        trace_filter=trace_filter,
        trace_limit=trace_limit,
        timeline=timeline,
        output=output,
    )
    raise typer.Exit(run_scenario(options))


@app.command()
def check(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", parser=path, help="Scenarios and studies.", show_default=False)
    ],
    sets: Sets = None,
) -> None:
    """Check scenarios and studies without running them."""
    from vtsim.base.errors import ConfigError
    from vtsim.config import is_study, load_scenario

    status = FINE
    for file in files:
        try:
            if is_study(file) and not sets:
                from vtsim.study.sweep.design import load_design

                load_design(file)
            else:
                load_scenario(file, sets or ())
        except ConfigError as error:
            note(f"{error}\n")
            status = USERS_MISTAKE
        else:
            emit(f"{file}: fine\n")
    raise typer.Exit(status)


@app.command()
def walk(
    address: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Linear address, as in 0x1000000000.", show_default=False)
    ],
    scenario: Annotated[Path, typer.Option(metavar="FILE", parser=path, help="A scenario.", show_default=False)],
    vm: Annotated[str, typer.Option(metavar="VM", help="Number or name of a VM.")] = "0",
    process: Annotated[str, typer.Option(metavar="PROCESS", help="Number or name of a process.")] = "0",
    access: Annotated[str, typer.Option(metavar="KIND", help="read, write or fetch.")] = "read",
    ring: Annotated[
        int | None, typer.Option(metavar="N", help="0 or 3; by the half of the address space if not given.")
    ] = None,
    native: Annotated[bool, typer.Option("--native", help="Without the hypervisor.")] = False,
    after_run: Annotated[
        bool, typer.Option("--after-run", help="After the run, with tables and caches as they then are.")
    ] = False,
    cold: Annotated[bool, typer.Option("--cold", help="After the run, but with empty caches.")] = False,
    every_entry: Annotated[
        bool, typer.Option("--every-entry", help="Without walk caches and nested TLB: the walk of the textbook.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", parser=path, help="Also draw it.")] = None,
    json: Json = False,
    sets: Sets = None,
) -> None:
    """Show one page walk of a guest, entry by entry, in both dimensions."""
    from vtsim.cli.walk import Options, show_walk

    options = Options(
        file=scenario,
        settings=tuple(sets or ()),
        vm=vm,
        process=process,
        address=address,
        access=access,
        ring=ring,
        native=native,
        after_run=after_run or cold,
        cold=cold,
        every_entry=every_entry,
        plot=plot,
        json=json,
    )
    raise typer.Exit(show_walk(options))


@app.command("list")
def list_(
    door: Annotated[str, typer.Argument(metavar="DOOR", help="What to list; nothing lists the doors.")] = "",
) -> None:
    """List what a scenario can name."""
    from vtsim.study.doors import doors_table

    show(doors_table(door))


@app.command()
def validate(
    row: Annotated[
        list[str] | None, typer.Option("--row", metavar="ID", help="Only this published row. Repeatable.")
    ] = None,
    json: Json = False,
    write_docs: Annotated[bool, typer.Option("--write-docs", help="Rewrite docs/validation.md.")] = False,
    sets: Sets = None,
) -> None:
    """Compare with published measurements; status 1 if a tolerance is broken. --set repeats an experiment on a row."""
    from vtsim.cli.validate import validate_rows

    raise typer.Exit(validate_rows(row, tuple(sets or ()), json=json, write_docs=write_docs))


@app.command()
def verdict(
    file: File,
    json: Json = False,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SHARE", help="efficiency, confidence or isolation, as in efficiency=0.9. Repeatable."
        ),
    ] = None,
    sets: Sets = None,
) -> None:
    """Judge by measurement whether a scenario is a virtual machine; status 1 if it is not."""
    from vtsim.cli.verdict import judge_scenario

    raise typer.Exit(judge_scenario(file, tuple(sets or ()), tuple(threshold or ()), json=json))


@app.command()
def schema(
    file: Annotated[str, typer.Argument(metavar="[scenario|study]", help="Of which kind of file.")] = "scenario",
) -> None:
    """Print the JSON Schema of a scenario or a study, for editors."""
    import json

    from vtsim.config import schema as schema_of

    emit(json.dumps(schema_of(file), indent=2, ensure_ascii=False) + "\n")


@explain.command("exit")
def explain_exit(
    reason: Annotated[str, typer.Argument(metavar="REASON", help="An exit reason, as in CPUID.", show_default=False)],
    personality: Annotated[str, typer.Option(metavar="NAME", help="Whose exit path.")] = "kvm",
    profile: Annotated[str, typer.Option(metavar="NAME", help="Whose prices.")] = "skx-4114",
    paging: Annotated[
        str, typer.Option(metavar="PAGING", help="ept, shadow, agile, direct-pv; auto: what the processor has.")
    ] = "auto",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a setting, as in vmm.lengths=linux-4.19. Repeatable."),
    ] = None,
) -> None:
    """Show the hypervisor program for an exit reason, op by op, with privilege and price."""
    from vtsim.study.explain import exit_program

    show(exit_program(reason, personality, profile, paging, sets or ()))


@explain.command("profile")
def explain_profile(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A CPU profile.", show_default=False)],
) -> None:
    """Show every value of a CPU profile with unit, source and confidence."""
    from vtsim.study.explain import profile_values

    show(profile_values(name))


@vmcs.command("replay")
def vmcs_replay(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", parser=path, help="Recorded cases, .jsonl or .jsonl.gz.", show_default=False),
    ],
    base_states: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", parser=path, help="Base states and memory image; the file's folder, else the shipped ones."
        ),
    ] = None,
    json: Json = False,
    all_cases: Annotated[bool, typer.Option("--all", help="Print every case, not only those that differ.")] = False,
    limit: Annotated[int, typer.Option(metavar="N", min=0, help="Print at most N differing cases.")] = 20,
) -> None:
    """Hold recorded cases against the model, field by field; status 1 if any differ."""
    from vtsim.cli.vmcs import replay_cases

    raise typer.Exit(replay_cases(file, base_states, json=json, all_cases=all_cases, limit=limit))


@vmcs.command("check")
def vmcs_check(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="STATE",
            parser=path,
            help="YAML: fields and values, a base state and a profile if wanted.",
            show_default=False,
        ),
    ],
    json: Json = False,
) -> None:
    """Say which checks of VM entry a VMCS fails, by the manual's titles; status 1 if any does."""
    from vtsim.cli.vmcs import check_state

    raise typer.Exit(check_state(file, json=json))


@vmcs.command("fields")
def vmcs_fields(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="A part of a name, or an encoding.")] = "",
    json: Json = False,
) -> None:
    """List the fields of a VMCS: encoding, width, access, area, and which control brings them."""
    from vtsim.study.vmcs_view import fields_json, fields_table

    if json:
        emit(fields_json(pattern) + "\n")
    else:
        show(fields_table(pattern))


@vmcs.command("show")
def vmcs_show(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", parser=path, help="A scenario, or the directory of a result.")
    ] = Path("."),
    json: Json = False,
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="When to look, as in 5ms; the end of the run if not given.")
    ] = None,
    sets: Sets = None,
) -> None:
    """Show the VMCS of each vCPU after a run, with its bits in words."""
    from vtsim.cli.vmcs import show_vmcs

    raise typer.Exit(show_vmcs(run, tuple(sets or ()), at, json=json))


@iommu.command("walk")
def iommu_walk(
    device: Annotated[
        str,
        typer.Option(metavar="B:D.F", help="Who asks, as in 03:02.0; of a scenario also by name.", show_default=False),
    ],
    address: Annotated[str, typer.Option(metavar="ADDRESS", help="As in 0x200000.", show_default=False)],
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", parser=path, help="YAML: a unit, its devices and pages.", show_default=False),
    ] = None,
    scenario: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=path, help="A scenario with devices, instead.", show_default=False),
    ] = None,
    after: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Of a scenario: how long it has run, as in '50 us'.")
    ] = None,
    pasid: Annotated[int | None, typer.Option(metavar="N", min=0, max=(1 << 20) - 1, help="With this PASID.")] = None,
    access: Annotated[str, typer.Option(metavar="KIND", help="read, write, execute or atomic.")] = "read",
    privileged: Annotated[bool, typer.Option("--privileged", help="With supervisor privilege.")] = False,
    request: Annotated[
        str, typer.Option(metavar="KIND", help="untranslated, translation (ATS) or translated.")
    ] = "untranslated",
    warm: Annotated[bool, typer.Option("--warm", help="Once before, so that caches hold it.")] = False,
    json: Json = False,
) -> None:
    """Show the translation of one request of a device, entry by entry."""
    from vtsim.base.errors import ConfigError
    from vtsim.cli.iommu import Asked, show_in_scenario, show_request

    if (file is None) == (scenario is None):
        raise ConfigError("one of the two describes the unit", field="FILE", help="give a FILE, or --scenario")
    asked = Asked(pasid=pasid, access=access, privileged=privileged, request=request, warm=warm)
    if scenario is not None:
        raise typer.Exit(show_in_scenario(scenario, device, address, asked, after=after or "0 s", json=json))
    assert file is not None
    if after is not None:
        raise ConfigError("a unit by itself does not run", field="--after", help="only --scenario FILE has a run")
    raise typer.Exit(show_request(file, device, address, asked, json=json))


@analyze.command("isa")
def analyze_isa(
    profile: Annotated[str, typer.Option(metavar="NAME", help="The processor.")] = "skx-4114",
    isa: Annotated[
        str, typer.Option(metavar="x86|virtualizable", help="As machine.isa: do sensitive ops trap in ring 3?")
    ] = "x86",
    nonroot: Annotated[
        bool, typer.Option("--nonroot", help="N0 and N3 under VT-x, and which controls matter.")
    ] = False,
    json: Json = False,
) -> None:
    """Classify ops by executing them in ring 0 and ring 3; say whether the instruction set is virtualizable."""
    from vtsim.base import jit
    from vtsim.cli.run import COMPILING
    from vtsim.cpu.kernels.run import run_all
    from vtsim.platform.isa import ISAS
    from vtsim.platform.isa import analyze as analyze_ops
    from vtsim.platform.isa_nonroot import analyze_nonroot
    from vtsim.study import isa_view as view

    if not jit.kernels_are_cached(run_all):
        note(COMPILING)
    if nonroot:
        found = analyze_nonroot(profile)
        emit(view.nonroot_json(found) + "\n") if json else show(view.nonroot_text(found))
    else:
        if isa not in ISAS:
            raise typer.BadParameter(f"{isa!r} is neither {' nor '.join(ISAS)}", param_hint="--isa")
        analysis = analyze_ops(profile, isa)
        emit(view.isa_json(analysis) + "\n") if json else show(view.isa_text(analysis))


app.command()(sweep)
app.add_typer(study, name="study")
