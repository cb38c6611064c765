"""Says which checks of VM entry a VMCS fails, by the manual's titles: the processor's own answer, list by list.

What checks is VMLAUNCH, executed by the engine. After a failure the group of checks that it is in counts as good, and
the next VMLAUNCH finds the next group's first failure.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Final

from attrs import frozen
from rich.console import Group, RenderableType
from rich.text import Text

from vtsim.base.errors import ConfigError
from vtsim.config.vmcs_state import BASE, PROFILE, VmcsState
from vtsim.cpu.profile import load_profile
from vtsim.platform.identity import cpuid_leaves
from vtsim.study.vmx.base_states import BaseStates
from vtsim.study.vmx.cases import PAGE, VMCS_A, VMCS_B, VMCS_C, VMXON_REGION, Environment, Processor
from vtsim.study.vmx.drivers import Outcome
from vtsim.study.vmx.entry_cases import bench
from vtsim.vmcs import state as h
from vtsim.vmcs.checks import BY_CHECK_NUMBER, Check
from vtsim.vmcs.events import INSTRUCTION_ERRORS
from vtsim.vmcs.generations import GENERATIONS
from vtsim.vmcs.groups import GROUP_OF_SECTION, MADE_EVERY_TIME
from vtsim.vmcs.meaning import meaning
from vtsim.vmcs.reasons import reason_name

RECORDED: Final = "corei7_skylake_x"
DEFAULT_PROFILE: Final = "skx-4114"


@frozen(kw_only=True)
class Report:
    """What VM entry does with a VMCS, and the first failed check of each group that has one."""

    processor: str
    outcome: str
    entered: bool
    failures: tuple[Check, ...]
    fields: dict[str, int]


def check_vmcs(state: VmcsState) -> Report:
    """Let VMLAUNCH check a VMCS. Raises `ConfigError` for a base state or a profile that does not exist."""
    environment = _environment(state)
    outcome, failures = failed_checks(environment)
    return Report(
        processor=environment.processor.name, outcome=_describe(outcome), entered=outcome["kind"] == "exit",
        failures=failures, fields=dict(environment.vmcs),
    )  # fmt: skip


def failed_checks(environment: Environment) -> tuple[Outcome, tuple[Check, ...]]:
    """What VMLAUNCH does, and the first failed check of each group that has one."""
    machine = bench()
    checked, mode = 0, 0
    failures: list[Check] = []
    outcome: Outcome = {}
    while True:
        machine.prepare(environment)
        words = machine.vmcs()
        words[h.V_CHECKED], words[h.V_CHECKED_MODE] = checked, mode
        outcome = outcome or machine.enter("vmlaunch")
        if failures:
            machine.enter("vmlaunch")
        number, mode = int(words[h.V_FAILED_CHECK]), int(words[h.V_CHECKED_MODE])
        if number == 0 or BY_CHECK_NUMBER[number] in failures:
            break
        failed = BY_CHECK_NUMBER[number]
        failures.append(failed)
        if failed.name.startswith(MADE_EVERY_TIME):  # it cannot be passed over
            break
        checked |= GROUP_OF_SECTION.get(failed.section, 0)
    return outcome, tuple(failures)


def _environment(state: VmcsState) -> Environment:
    where = BaseStates(folders=(files("vtsim.study.vmx.data"),))
    recorded, image = where.processor(RECORDED), where.image()
    fields: dict[str, int] = {}
    processor = recorded
    if state.base:
        if state.base not in recorded.bases:
            raise state.wrong(BASE, ConfigError.unknown("base state", state.base, recorded.bases))
        fields = dict(recorded.bases[state.base])
    if state.profile or not state.base:
        processor = _profile_processor(state)
    revision = processor.capabilities.revision.to_bytes(4, "little").ljust(PAGE, b"\0")
    memory = dict(image.pages) if state.base else {}
    memory.update(dict.fromkeys((VMXON_REGION, VMCS_A, VMCS_B, VMCS_C), revision))
    return Environment(
        processor=processor, image=image, vmcs=fields | state.fields, memory=memory, gpr={}, control_registers={},
        run="vmlaunch", mov_ss_blocking=False, instruction=None,
    )  # fmt: skip


def _profile_processor(state: VmcsState) -> Processor:
    try:
        profile = load_profile(state.profile or DEFAULT_PROFILE)
    except ConfigError as error:
        raise state.wrong(PROFILE, error) from None
    return Processor(
        name=profile.name,
        capabilities=GENERATIONS[profile.vmx.generation].capabilities(),
        cpuid={(leaf, max(subleaf, 0)): tuple(answer) for leaf, subleaf, *answer in cpuid_leaves(profile)},  # type: ignore[misc]
        physical_address_bits=profile.physical_address_bits,
        linear_address_bits=57 if profile.features.la57 else 48,
        bases={},
    )


def _describe(got: Outcome) -> str:
    if got["kind"] == "exit":
        return "VM entry succeeds"
    if got["kind"] == "vmfail_valid":
        return f"VM entry fails with error {got['error']}, {INSTRUCTION_ERRORS[got['error']]}"
    if got["kind"] == "vmfail_invalid":
        return "VM entry fails: VMfailInvalid"
    reason, qualification = got["reason"], got["qualification"]
    return f"VM entry fails: exit reason {reason}, {reason_name(reason)}, qualification {qualification}"


def report_text(report: Report) -> RenderableType:
    """A report to read, or to paste into one."""
    parts: list[RenderableType] = [Text(report.outcome), Text(f"on {report.processor}")]
    section = ""
    for failed in report.failures:
        if failed.section != section:
            section = failed.section
            parts += [Text(""), Text(section, style="bold")]
        parts.append(Text(f"  {failed.name}: {failed.rule}", overflow="fold"))
        for name in failed.fields:
            values = {**dict.fromkeys(failed.fields, 0), **report.fields}
            words = meaning(name, values)
            parts.append(Text(f"    {name:<36}  {values[name]:#x}" + (f"  {words}" if words else ""), overflow="fold"))
    return Group(*parts)


def report_json(report: Report) -> str:
    """A report as one JSON object."""
    failures = [
        {
            "check": each.name, "section": each.section, "rule": each.rule, "outcome": each.outcome,
            "fields": {name: hex(report.fields.get(name, 0)) for name in each.fields},
        }
        for each in report.failures
    ]  # fmt: skip
    return json.dumps(
        {"processor": report.processor, "outcome": report.outcome, "failures": failures}, indent=1, ensure_ascii=False
    )
