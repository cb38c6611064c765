"""Is it a virtual machine? The three requirements of Popek and Goldberg (1974), each with what was measured.

*Equivalence*: guests see the same natively and here. *Efficiency*: a statistically dominant part of the guest's
instructions is executed by the processor itself: of the share that was measured the lower end of Wilson's interval is
above a threshold, half unless told otherwise, because half is where a part begins to dominate. *Isolation* (resource
control): every attack of the suite that there is an occasion for is contained.
"""

# ruff: noqa: RUF009  (`key` declares an attrs field)

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import NormalDist
from typing import Any, Final

from attrs import fields, frozen

from vtsim.base.errors import ConfigError
from vtsim.platform.machine import Progress
from vtsim.platform.spec import Scenario
from vtsim.study.attacks import Attempt, Skipped, Suite
from vtsim.study.equivalence import NOTHING, SEEN_BY, Equivalence, compare_and_measure, name_of
from vtsim.study.json_object import key, plain, reference_tables, structure
from vtsim.study.measure import result_of
from vtsim.study.run import without_hypervisor


# fmt: off
@frozen(kw_only=True)
class Thresholds:
    """Where a requirement begins to hold."""

    efficiency: float = key("share", "of guest instructions; the processor must execute more itself", default=0.5)
    confidence: float = key("share", "of cases in which the measured share is that good or better", default=0.99)
    isolation: float  = key("share", "of attacks that must be contained", default=1.0)


@frozen(kw_only=True)
class Direct:
    """The share of guest instructions that the processor executed itself."""

    executed: int          = key("instructions", "of the guest's program")
    emulated: int          = key("instructions", "of them, completed by the hypervisor in the guest's place")
    share: float | None    = key("share", "executed directly")
    at_least: float | None = key("share", "the lower end of Wilson's interval at the confidence of the thresholds")


@frozen(kw_only=True)
class Attempts:
    """The attacks: those that were made, and those that there was no occasion for."""

    made: int                      = key("attacks", "")
    contained: int                 = key("attacks", "of them, without effect outside the attacker's VM")
    attempts: tuple[Attempt, ...]  = key("", "each attack that was made")
    skipped: tuple[Skipped, ...]   = key("", "each that was not")


@frozen(kw_only=True)
class OfEquivalence:
    """Equivalence."""

    holds: bool           = key("", "do guests see the same?")
    evidence: Equivalence = key("", "what was compared, and the first difference")


@frozen(kw_only=True)
class OfEfficiency:
    """Efficiency."""

    holds: bool      = key("", "does the processor execute a dominant part itself?")
    evidence: Direct = key("", "how much it executed")


@frozen(kw_only=True)
class OfIsolation:
    """Safety and isolation."""

    holds: bool        = key("", "are attacks contained?")
    evidence: Attempts = key("", "which were made, and what became of them")


@frozen(kw_only=True)
class Verdict:
    """The verdict on a scenario."""

    scenario: str                 = key("", "its name")
    technique: str                = key("", "how its guests are virtualized")
    profile: str                  = key("", "processor")
    thresholds: Thresholds        = key("", "where requirements begin to hold")
    equivalence: OfEquivalence    = key("", "")
    efficiency: OfEfficiency      = key("", "")
    isolation: OfIsolation        = key("", "")
    is_virtual_machine: bool      = key("", "do all three hold?")
    because: tuple[str, ...]      = key("", "which requirements do not hold, in words")
# fmt: on

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """The verdict of a JSON object."""
        return structure(cls, data, "verdict")


def thresholds_of(settings: Sequence[str]) -> Thresholds:
    """Thresholds from `name=value`; raises `ConfigError` for what is not one."""
    known = [field.name for field in fields(Thresholds)]
    values: dict[str, float] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in known:
            raise ConfigError.unknown("threshold", name, known, field="--threshold")
        if name in values:
            raise ConfigError(f"{name} is given twice", field="--threshold", help="give each threshold once")
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = -1.0
        if not 0 <= values[name] <= 1:
            raise ConfigError(
                f"{text!r} is not a share",
                field="--threshold",
                help=f"{name} is a number from 0 to 1, as in {name}=0.9",
            )
        if name == "confidence" and values[name] in (0, 1):
            raise ConfigError(
                f"no interval has a confidence of {text}",
                field="--threshold",
                help="confidence is a number between 0 and 1, and neither, as in confidence=0.95",
            )
    return Thresholds(**values)


def at_least(part: int, whole: int, confidence: float) -> float | None:
    """The lower end of Wilson's one-sided interval for a share; None of nothing."""
    if not whole:
        return None
    if confidence in (0, 1):
        return float(1 - confidence and part / whole)
    z = NormalDist().inv_cdf(confidence)
    share = part / whole
    middle = share + z * z / (2 * whole)
    spread = z * sqrt(share * (1 - share) / whole + z * z / (4 * whole * whole))
    return max(0.0, (middle - spread) / (1 + z * z / whole))


@frozen(kw_only=True)
class Measurements:
    """What a verdict is made of."""

    equivalence: Equivalence
    executed: int
    emulated: int
    attempts: tuple[Attempt, ...]
    skipped: tuple[Skipped, ...]


def measure(scenario: Scenario, progress: Progress | None = None) -> Measurements:
    """Run a resolved scenario natively and as it is, and the attacks under its hypervisor."""
    if not scenario.vms:
        raise ConfigError("there is no VM to judge", field="vms", help="give the scenario a VM")
    equivalence, outcomes = compare_and_measure(without_hypervisor(scenario), scenario, progress=progress)
    guest = result_of(outcomes).guest
    attempts, skipped = Suite(scenario, progress).run()
    return Measurements(
        equivalence=equivalence,
        executed=guest.ring0.executed + guest.ring3.executed,
        emulated=guest.ring0.emulated + guest.ring3.emulated,
        attempts=attempts,
        skipped=skipped,
    )


def decide(scenario: Scenario, found: Measurements, needed: Thresholds) -> Verdict:
    """The verdict that follows from what was measured."""
    whole, part = found.executed, found.executed - found.emulated
    bound = at_least(part, whole, needed.confidence)
    direct = Direct(
        executed=whole, emulated=found.emulated, share=part / whole if whole else None, at_least=bound
    )  # fmt: skip
    made, contained = len(found.attempts), sum(each.contained for each in found.attempts)
    shown = NOTHING not in found.equivalence.left_out
    same = OfEquivalence(holds=found.equivalence.equivalent and shown, evidence=found.equivalence)
    efficient = OfEfficiency(holds=bound is not None and bound > needed.efficiency, evidence=direct)
    isolates = OfIsolation(
        holds=contained >= needed.isolation * made,
        evidence=Attempts(made=made, contained=contained, attempts=found.attempts, skipped=found.skipped),
    )
    holds = (same.holds, efficient.holds, isolates.holds)
    return Verdict(
        scenario=scenario.name,
        technique=name_of(scenario),
        profile=scenario.machine.profile,
        thresholds=needed,
        equivalence=same,
        efficiency=efficient,
        isolation=isolates,
        is_virtual_machine=all(holds),
        because=tuple(reason for held, reason in zip(holds, REASONS, strict=True) if not held),
    )


def judge(scenario: Scenario, thresholds: Thresholds | None = None, *, progress: Progress | None = None) -> Verdict:
    """Measure a resolved scenario, and judge it."""
    return decide(scenario, measure(scenario, progress), thresholds or Thresholds())


REASONS: Final = (
    "it is not equivalent to the machine",
    "the processor does not execute most of it",
    "it does not isolate",
)


def verdict_json(verdict: Verdict) -> str:
    """One JSON object."""
    return json.dumps(plain(verdict), indent=2, ensure_ascii=False)


def verdict_text(verdict: Verdict) -> str:
    """The verdict in words."""
    lines = [f"{verdict.scenario}: {verdict.technique} on {verdict.profile}", ""]
    same, direct, attacks = verdict.equivalence, verdict.efficiency, verdict.isolation
    lines += _requirement("equivalence", same.holds, _equivalence(same.evidence))
    lines += _requirement("efficiency", direct.holds, _efficiency(direct.evidence, verdict.thresholds))
    lines += _requirement("isolation", attacks.holds, _isolation(attacks.evidence))
    lines.append("")
    if verdict.is_virtual_machine:
        lines.append("It is a virtual machine.")
    else:
        lines.append(f"It is not a virtual machine, because {_listed(verdict.because)}.")
    return "\n".join(lines) + "\n"


def _requirement(name: str, holds: bool, evidence: list[str]) -> list[str]:
    first, *rest = evidence
    return [f"{name:<12} {'holds' if holds else 'does not hold':<14} {first}", *(f"{'':<28}{line}" for line in rest)]


def _equivalence(found: Equivalence) -> list[str]:
    seen = ", ".join(f"{count:,} {SEEN_BY[stream]}" for stream, count in found.compared.items() if count) or "none"
    lines = [f"values compared, {found.first} and {found.second}: {seen}"]
    lines += [f"first difference: {each.sentence(found.first, found.second)}" for each in found.differences]
    return lines + [f"not compared: {each}" for each in found.left_out]


def _efficiency(direct: Direct, thresholds: Thresholds) -> list[str]:
    if direct.share is None or direct.at_least is None:
        return ["no instruction of a guest was executed"]
    return [
        f"{direct.share:.2%} of {direct.executed:,} guest instructions ran on the processor itself",
        f"at least {direct.at_least:.2%} with {_percent(thresholds.confidence)} confidence; needed: more than "
        f"{_percent(thresholds.efficiency)}",
    ]


def _percent(share: float) -> str:
    """A threshold as it was given."""
    return f"{100 * share:.12g}%"


def _isolation(found: Attempts) -> list[str]:
    lines = [f"{found.contained} of {found.made} attacks contained"]
    for each in found.attempts:
        if not each.contained:
            lines.append(f"got through: {each.name}: {'; '.join(each.effects)}")
    reasons: dict[str, list[str]] = {}
    for one in found.skipped:
        reasons.setdefault(one.why, []).append(one.name)
    return lines + [f"not attempted ({why}): {', '.join(names)}" for why, names in reasons.items()]


def _listed(reasons: Sequence[str]) -> str:
    return reasons[0] if len(reasons) == 1 else f"{', '.join(reasons[:-1])} and {reasons[-1]}"


INTRODUCTION: Final = f"""# The verdict on a scenario

`vtsim verdict FILE` runs a scenario natively and as it is, and the attack suite on its machine under its hypervisor, and
says which of Popek and Goldberg's three requirements (1974) hold. Nothing in a scenario says what comes out.

| requirement | holds where | threshold |
|---|---|---|
| equivalence | every vCPU saw the same values, and every VM ended alike ([what may differ](equivalence.md)); a run that its time limit ends has to have seen something | none |
| efficiency | the lower end of Wilson's interval of the share of guest instructions that the processor executed itself is above the threshold | `efficiency` {Thresholds().efficiency}, at `confidence` {Thresholds().confidence} |
| isolation | of the [attacks](attacks.md) that there was occasion for, at least this share was contained | `isolation` {Thresholds().isolation} |

The definition asks for a *statistically dominant* part of the instructions: half is the least that dominates. The threshold is
an option, as in `--threshold efficiency=0.9`. The exit status is 0 for a virtual machine and 1 for none.

| scenario in workloads/requirements/ | what it is |
|---|---|
| `virtualbox_same_devices` | a hosted VMM on a Core i7 PC that shows its guest the devices of the PC |
| `virtualbox_other_devices` | the same, with a network card and a disk controller that the PC does not have |
| `qemu_raspberry_pi` | dynamic translation of the programs of another processor |
| `java_vm` | the same for a machine that does not exist, with native methods |

`--json` prints the object below. This page is generated from `vtsim/study/verdict.py`.

"""  # noqa: E501  (a table's row is a line)


def page() -> str:
    """docs/verdict.md."""
    return INTRODUCTION + reference_tables(Verdict)
