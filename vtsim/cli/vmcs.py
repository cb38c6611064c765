"""`vtsim vmcs`: the fields of a VMCS, what a VMCS holds, and recorded cases held against the model."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from attrs import evolve

from vtsim.base import jit
from vtsim.base.errors import ConfigError
from vtsim.cli import FINE, OUR_MISTAKE, USERS_MISTAKE, show_model_error
from vtsim.cli.output import emit, note, show
from vtsim.cli.run import COMPILING
from vtsim.config import load_scenario, located
from vtsim.config.vmcs_state import load_vmcs_state
from vtsim.cpu.kernels.run import run_all
from vtsim.platform.vmcs import vmcs_after
from vtsim.study.result import WRITTEN
from vtsim.study.vmcs_view import vmcs_json, vmcs_text
from vtsim.study.vmx.base_states import BaseStates
from vtsim.study.vmx.cases import Mistakes, read_cases
from vtsim.study.vmx.check import check_vmcs, report_json, report_text
from vtsim.study.vmx.replay import DIFFER, Summary, Verdict, case_text, replay, summary_table, to_json

DIFFERENCES_FOUND: Final = 1
CHECKS_FAILED: Final = 1
MOST_SHOWN: Final = 20
RESOLVED: Final = WRITTEN[1]


def replay_cases(file: Path, base_states: Path | None, *, json: bool, all_cases: bool, limit: int) -> int:
    """Replay a file, print what is asked for; the exit status says the worst that came of it."""
    where = BaseStates.beside(file) if base_states is None else BaseStates.of(base_states)
    _say_if_compiling()
    summary, mistakes = Summary(), Mistakes()
    differing: list[Verdict] = []
    shown: list[Verdict] = []
    for verdict in replay(read_cases(file, mistakes), where, mistakes):
        summary.add(verdict)
        if verdict.status == DIFFER:
            differing.append(verdict)
        if not json and (all_cases or (verdict.status == DIFFER and len(shown) < limit)):
            emit(case_text(verdict) + "\n")
            shown.append(verdict)
    if json:
        emit(to_json(summary, differing, mistakes) + "\n")
    else:
        if shown:
            emit("\n")
        show(summary_table(summary, shown, limit))
    return _ended(file, summary, mistakes, [verdict for verdict in differing if verdict.broken])


def _ended(file: Path, summary: Summary, mistakes: Mistakes, broken: list[Verdict]) -> int:
    """Say what is wrong with a file of cases, and with the model; return the exit status."""
    for key, at in mistakes.notes.items():
        note(f"{at}: note: a case has no key {key!r}; it is ignored")
    if mistakes.problems:
        note(mistakes.text(MOST_SHOWN))
    elif not summary.agree + summary.differ:
        skipped = f"{summary.skipped} skipped" if summary.skipped else "there is no case in it"
        note(f"{file}: nothing was compared: {skipped}")
    for verdict in broken[:MOST_SHOWN]:
        show_model_error(verdict.broken, f"case {verdict.id}: ")
    if len(broken) > MOST_SHOWN:
        note(f"and {len(broken) - MOST_SHOWN} more cases that broke the model")
    if broken:
        return OUR_MISTAKE
    if mistakes.problems or not summary.agree + summary.differ:
        return USERS_MISTAKE
    return DIFFERENCES_FOUND if summary.differ else FINE


def show_vmcs(run: Path, settings: tuple[str, ...], at: str | None, *, json: bool) -> int:
    """Run a scenario, or the scenario of a result, to its end or up to a time; print the VMCS of each vCPU."""
    limit = f"run.limit={at}"
    if at is not None:
        settings = (*settings, limit)
    file = run
    if run.is_dir():
        file = run / RESOLVED
        if not file.is_file():
            raise ConfigError(
                f"there is no {RESOLVED} in {run}", field="RUN", help="RUN is a scenario, or what run --output wrote"
            )
    try:
        scenario = load_scenario(file, settings)
    except ConfigError as error:
        raise _at(error, limit) from None
    _say_if_compiling()
    try:
        shown = vmcs_after(scenario)
    except ConfigError as error:
        raise located(error, file, settings) from None
    if json:
        emit(vmcs_json(shown) + "\n")
    else:
        show(vmcs_text(shown))
    return FINE


def _at(error: ConfigError, setting: str) -> ConfigError:
    """The same mistake; what is wrong with the setting that `--at` stands for is said of `--at`."""
    return ConfigError.of(
        evolve(problem, file="", path="--at") if problem.file == f"--set {setting}" else problem
        for problem in error.problems
    )


def check_state(file: Path, *, json: bool) -> int:
    """Say which checks of VM entry the VMCS in a file fails; 1 if VM entry does."""
    state = load_vmcs_state(file)
    _say_if_compiling()
    report = check_vmcs(state)
    if json:
        emit(report_json(report) + "\n")
    else:
        show(report_text(report))
    return FINE if report.entered else CHECKS_FAILED


def _say_if_compiling() -> None:
    if not jit.kernels_are_cached(run_all):
        note(COMPILING)
