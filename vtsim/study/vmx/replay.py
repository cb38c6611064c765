"""Runs a file of recorded VMX cases on the model and says where they agree.

What runs is the engine: VM-entry checks are its kernels, exit cases and root cases are operations that it executes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from attrs import define, evolve, field, frozen
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

import vtsim.study.vmx
from vtsim.base.errors import ConfigError
from vtsim.base.registry import import_all
from vtsim.study.table import section
from vtsim.study.vmx.base_states import BaseStates
from vtsim.study.vmx.cases import Case, Environment, Mistakes
from vtsim.study.vmx.comparison import Difference, compare
from vtsim.study.vmx.drivers import Outcome, Skipped, drivers
from vtsim.study.vmx.known_differences import KNOWN, Known, explain
from vtsim.vmcs.events import INSTRUCTION_ERRORS
from vtsim.vmcs.reasons import reason_name

AGREE: Final = "agree"
DIFFER: Final = "differ"
SKIPPED: Final = "skipped"


@frozen(kw_only=True)
class Verdict:
    """What the model did with one case, and whether that agrees with the recording."""

    id: str
    category: str
    status: str
    recorded: tuple[Outcome, ...] = ()
    model: tuple[Outcome, ...] = ()
    differences: tuple[Difference, ...] = ()
    reason: str = ""  # of a case that was skipped
    broken: Exception | None = None  # what broke the model
    explanations: tuple[Known | None, ...] = ()  # of each difference

    @property
    def explained(self) -> bool:
        """Is each difference one of a known cause?"""
        return bool(self.explanations) and None not in self.explanations


@define
class Summary:
    """Counts of verdicts, by category and by reason to skip."""

    agree: int = 0
    differ: int = 0
    explained: int = 0
    skips: Counter[str] = field(factory=Counter)
    causes: Counter[str] = field(factory=Counter)
    """Cases with differences of each known cause, by the cause's name."""
    categories: dict[str, Counter[str]] = field(factory=dict)

    def add(self, verdict: Verdict) -> None:
        if verdict.status == SKIPPED:
            self.skips[verdict.reason] += 1
            return
        self.categories.setdefault(verdict.category, Counter({AGREE: 0, DIFFER: 0}))[verdict.status] += 1
        if verdict.status == AGREE:
            self.agree += 1
        else:
            self.differ += 1
            self.explained += verdict.explained
            self.causes.update({known.name for known in verdict.explanations if known})

    @property
    def skipped(self) -> int:
        return self.skips.total()

    def to_dict(self, differing: Sequence[Verdict], mistakes: Mistakes) -> dict[str, Any]:
        """The one JSON object of a replay."""
        return {
            "agree": self.agree,
            "differ": self.differ,
            "skipped": self.skipped,
            "categories": {name: dict(counts) for name, counts in sorted(self.categories.items())},
            "skips": dict(self.skips.most_common()),
            "differences": [
                {"id": verdict.id, "path": each.path, "recorded": each.recorded, "model": each.model}
                for verdict in differing
                for each in verdict.differences
            ],
            "explained": self.explained,
            "unexplained": self.differ - self.explained,
            "explanations": [
                {
                    "name": known.name,
                    "section": known.section,
                    "whose": known.whose,
                    "differences": [
                        {"id": verdict.id, "path": each.path}
                        for verdict in differing
                        for each, why in zip(verdict.differences, verdict.explanations, strict=False)
                        if why is known
                    ],
                }
                for known in KNOWN
                if self.causes[known.name]
            ],
            "broken": [{"id": verdict.id, "error": str(verdict.broken)} for verdict in differing if verdict.broken],
            "mistakes": [
                {"line": problem.line, "path": problem.path, "message": problem.message}
                for problem in mistakes.problems
            ],
        }


def replay(cases: Iterable[Case], base_states: BaseStates, mistakes: Mistakes | None = None) -> Iterator[Verdict]:
    """Run the cases one by one.

    A case is skipped, with a reason, where nothing can be held against it, or nothing can run it. What breaks the
    model makes its case differ, and does not keep the others from running. A case that cannot be set up is added to
    the mistakes; without mistakes, `ConfigError` is raised.
    """
    import_all(vtsim.study.vmx)
    for case in cases:
        verdict = Verdict(id=case.id, category=case.category, status=SKIPPED)
        try:
            environment = base_states.environment(case)
        except ConfigError as error:
            if mistakes is None or error.problems[0].file != case.file:
                raise
            mistakes.add(error)
            continue
        if case.unusable:
            yield evolve(verdict, reason=case.unusable)
        elif environment.unknown_fields:
            yield evolve(verdict, reason=f"no such VMCS field: {environment.unknown_fields[0]}")
        elif case.kind not in drivers:
            yield evolve(verdict, reason=f"no driver for {case.kind} cases")
        else:
            yield _run(case, environment, evolve(verdict, recorded=case.expected))


def _run(case: Case, environment: Environment, verdict: Verdict) -> Verdict:
    try:
        got = drivers[case.kind](case, environment)
    except Skipped as why:
        return evolve(verdict, reason=str(why))
    except Exception as error:  # ours, whatever it is
        broken = Difference("kind", case.expected[0]["kind"], f"{type(error).__name__}: {error}")
        return evolve(verdict, status=DIFFER, differences=(broken,), broken=error)
    model = (got,) if isinstance(got, Mapping) else tuple(got)
    found = tuple(compare(case, environment, model))
    return evolve(
        verdict, status=DIFFER if found else AGREE, model=model, differences=found,
        explanations=explain(case, environment, found, verdict.recorded, model),
    )  # fmt: skip


def to_json(summary: Summary, differing: Iterable[Verdict], mistakes: Mistakes) -> str:
    """The JSON text of a replay."""
    return json.dumps(summary.to_dict(list(differing), mistakes), indent=1, ensure_ascii=False)


# --- text -----------------------------------------------------------------------------------------------------------


def describe(outcome: Outcome) -> str:
    """Say in words what a processor did with a case."""
    kind = outcome.get("kind")
    if kind == "vmfail_invalid":
        return "VMfailInvalid"
    if kind == "vmfail_valid":
        return _fails(outcome)
    if kind == "entry_failure":
        return f"VM-entry failure {outcome.get('reason')}, qualification {_plain(outcome.get('qualification', 0))}"
    if kind == "exit":
        return _entered(outcome)
    if kind == "op":
        return f"{outcome.get('op')} {_ended(outcome)}"
    return f"{kind}"


def _entered(outcome: Outcome) -> str:
    if "reason" not in outcome:  # a driver that looks no further
        return "entered"
    vector = outcome.get("guest_handler_vector")
    handled = "" if vector is None else f" in the guest's handler of vector {vector}"
    return f"entered, then VM exit {outcome['reason']} {reason_name(outcome['reason'])}{handled}"


def _fails(outcome: Outcome) -> str:
    error = outcome.get("error", 0)
    return f"VMfailValid {error}, {INSTRUCTION_ERRORS.get(error, 'which is not an error number')}"


def _ended(outcome: Outcome) -> str:
    result = outcome.get("result")
    if result == "vmfail_valid":
        return _fails(outcome)
    if result == "fault":
        return f"exception {outcome.get('vector')}"
    return {"ok": "succeeds", "vmfail_invalid": "VMfailInvalid", None: ""}.get(result, str(result)).strip()


def _plain(value: object) -> str:
    return hex(value) if isinstance(value, int) else str(value)


def case_text(verdict: Verdict) -> str:
    """One case: what the model did, and each part in which that is not what was recorded."""
    lines = [f"{verdict.id}  {verdict.category}  {verdict.status}"]
    if verdict.status == SKIPPED:
        return f"{lines[0]}: {verdict.reason}"
    if verdict.model:
        lines.append("  model     " + "; ".join(map(describe, verdict.model)))
    if verdict.status == DIFFER:
        lines.append("  recorded  " + "; ".join(map(describe, verdict.recorded)))
        width = max(len(each.path) for each in verdict.differences)
        lines += [
            f"    {each.path:<{width}}  recorded {each.recorded}  model {each.model}" for each in verdict.differences
        ]
        lines += _why(verdict)
    return "\n".join(lines)


def _why(verdict: Verdict) -> Iterator[str]:
    """The causes of a case's differences, and the parts that nothing explains."""
    for known in dict.fromkeys(verdict.explanations):
        if known is not None:
            cited = f' SDM: "{known.section}".' if known.section else ""
            yield f"    explained by {known.whose}: {known.name}.{cited}"
    unknown = [each.path for each, why in zip(verdict.differences, verdict.explanations, strict=False) if not why]
    if unknown and not verdict.broken:
        yield f"    not explained: {', '.join(unknown)}"


def summary_table(summary: Summary, shown: Sequence[Verdict], limit: int) -> RenderableType:
    """The counts of a replay as a table by category, and the reasons of what was skipped."""
    table = section("Category", ("agree", "differ"))
    for name, counts in sorted(summary.categories.items()):
        table.add_row(escape(name), str(counts[AGREE]), str(counts[DIFFER]))
    table.add_section()
    table.add_row("all", str(summary.agree), str(summary.differ))
    parts: list[RenderableType] = [table]
    if summary.differ > limit and len(shown) >= limit:
        parts.append(Text(f"\n{limit} of {summary.differ} differing cases are shown; --limit shows more"))
    if summary.differ:
        causes = section("Differs by", ("cases",))
        for known in KNOWN:
            if summary.causes[known.name]:
                causes.add_row(f"{known.name} ({known.whose})", str(summary.causes[known.name]))
        causes.add_section()
        causes.add_row("explained", str(summary.explained))
        causes.add_row("not explained", str(summary.differ - summary.explained))
        parts += [Text(""), causes]
    if summary.skipped:
        skips = section("Skipped", ("cases",))
        for reason, count in summary.skips.most_common():
            skips.add_row(escape(reason), str(count))
        parts += [Text(""), skips]
    return Group(*parts)
