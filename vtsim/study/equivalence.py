"""Equivalence: do guests see the same in two runs, and if not, what is the first thing that differs?

Both runs log digests of what each vCPU sees. Where digests part, the runs are made again and log the values around
that place, until the first one that differs is known: the operation, its place in the guest's program, both values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Set
from typing import Final

from attrs import frozen

from vtsim.base.errors import ConfigError, ModelError
from vtsim.cpu import ops as o
from vtsim.cpu import visible
from vtsim.cpu.assembler import Program
from vtsim.cpu.kernels.digest import SEEN_ROWS
from vtsim.guest.primitives.services import OPENED
from vtsim.platform.machine import Machine, Progress, alone
from vtsim.platform.outcome import Outcome
from vtsim.platform.spec import Scenario
from vtsim.platform.witness import APPLICATION, EVERY_SPACE, EXCEPTION, KERNEL, STREAMS, Seen, Stream, Wanted, Witnessed
from vtsim.study.delivered import WINDOWS, deliveries, differing, page_at
from vtsim.study.json_object import key, plain
from vtsim.vmm import pci

ROUNDS: Final = 8
PARTS: Final = ("EAX", "EBX", "ECX", "EDX")
SEEN_BY: Final = {APPLICATION: "by applications", KERNEL: "by kernels", EXCEPTION: "of exceptions"}
ANY_ORDER: Final = (
    "in which order tasks of one vCPU had their turns: time decides when their kernel switches between them"
)
RACES: Final = "how often a page faulted in a VM with several vCPUs, and on which: time decides who touches it first"
TOO_MANY: Final = f"exceptions of a VM with several vCPUs, of which one had more than {WINDOWS * SEEN_ROWS:,}"
NOT_ENDED: Final = "exceptions of a VM with several vCPUs that did not come to its end"
DESCRIPTORS: Final = "which file descriptors threads of one process get: time decides who opens a file first"
TOO_MANY_BESIDE: Final = f"what threads saw that open files, of which one saw more than {WINDOWS * SEEN_ROWS:,} values"
NOTHING: Final = "anything: the time limit came before a value was seen"
BEHIND: Final = "what the kernel would have seen on a further vCPU if the VM had not ended before"
PLACE_IN_KERNEL: Final = re.compile(", rip 0xffff[0-9a-f]{12}")
LIMITS: Final = ("time limit", "interrupted")
Logs = dict[tuple[str, int], Witnessed]
Parted = tuple[int, Seen | None, Seen | None, Witnessed, Witnessed]  # a step, what was seen at it, by whom


# fmt: off
@frozen(kw_only=True)
class Difference:
    """The first thing that a vCPU sees otherwise in the second run."""

    vm: str        = key("", "name of the VM")
    vcpu: int      = key("", "number of its vCPU")
    stream: str    = key("", "`application`, `kernel` or `exception`; `end`: how the VM ended")
    step: int      = key("values", "that the stream saw before it, the same in both runs")
    operation: str = key("", "what the guest executed")
    place: str     = key("", "where in the guest's program")
    first: str     = key("", "what it saw in the first run")
    second: str    = key("", "what it saw in the second")

    def sentence(self, first: str, second: str) -> str:
        """The difference in words."""
        where = f"{self.vm}, vCPU {self.vcpu}, {self.stream}" if self.stream != "end" else self.vm
        at = f" at {self.place}" if self.place else ""
        return f"{where}: {self.operation}{at}: {first}: {self.first}; {second}: {self.second}"


@frozen(kw_only=True)
class Equivalence:
    """How two runs compare: what guests saw, and the first difference of each vCPU that has one."""

    first: str                              = key("", "what the first run is")
    second: str                             = key("", "what the second run is")
    equivalent: bool                        = key("", "did every vCPU see the same?")
    compared: Mapping[str, int]             = key("values", "{stream: compared, over all vCPUs}")
    left_out: tuple[str, ...]               = key("", "what was not compared, and why")
    differences: tuple[Difference, ...]     = key("", "the first of each vCPU")
# fmt: on


@frozen
class _Run:
    logs: Logs
    stopped: Mapping[str, str]
    outcomes: tuple[Outcome, ...] = ()


def name_of(scenario: Scenario) -> str:
    """A run in a word or two: the technique, and how the MMU is virtualized."""
    vmm = scenario.vmm
    return vmm.technique if vmm.technique == "native" else f"{vmm.technique} ({vmm.paging})"


class SecondRefused(ConfigError):
    """The second of two scenarios is one that no machine can be built of."""


def compare(first: Scenario, second: Scenario, *, progress: Progress | None = None) -> Equivalence:
    """Run two resolved scenarios whose VMs have the same names, and compare what their guests see."""
    return compare_and_measure(first, second, progress=progress)[0]


def compare_and_measure(
    first: Scenario, second: Scenario, *, progress: Progress | None = None
) -> tuple[Equivalence, tuple[Outcome, ...]]:
    """The same, and what the machines of the second run left behind."""
    names = [sorted(vm.name for vm in scenario.vms) for scenario in (first, second)]
    if not names[0] or names[0] != names[1]:
        raise ConfigError(
            f"the VMs of the two runs are {' and '.join(', '.join(each) or 'none' for each in names)}",
            field="vms",
            help="equivalence compares VMs of the same names",
        )
    called = [name_of(first), name_of(second)]
    if called[0] == called[1]:
        called = [f"{name}, {which}" for name, which in zip(called, ("first", "second"), strict=True)]
    runs: Callable[[Wanted], tuple[_Run, _Run]]
    runs = lambda wanted: (_run(first, wanted, progress), _run_second(second, wanted, progress))  # noqa: E731
    a, b = runs(Wanted())
    found, left_out, compared = [], set[str](), dict.fromkeys(STREAMS, 0)
    limited = {name for name in names[0] if any(run.stopped.get(name, "") in LIMITS for run in (a, b))}
    several = {vm.name for vm in first.vms if vm.vcpus > 1}
    threads = {(vm.name, n) for vm in first.vms for n, each in enumerate(vm.guest.processes) if each.threads > 1}
    images = set()  # VMs whose kernel is the same program in both runs
    for vcpu in a.logs:
        streams, why = _comparable(a.logs[vcpu], b.logs[vcpu])
        left_out |= {why} - {""}
        images |= {vcpu[0]} if KERNEL in streams else set()
        for stream in streams:
            if stream == EXCEPTION and vcpu[0] in several:
                continue
            here, there = (run.logs[vcpu].streams[stream] for run in (a, b))
            whole = vcpu[0] not in limited
            if stream == KERNEL and vcpu[1] and not any(run.stopped.get(vcpu[0]) for run in (a, b)):
                whole = here.count == there.count
                left_out |= set() if whole else {BEHIND}
            compared[stream] += min(here.count, there.count)
            spaces, parted = _otherwise(a.logs[vcpu], b.logs[vcpu], stream), None
            left_out |= {ANY_ORDER} if not spaces and here.digest != there.digest else set()
            for space in spaces:
                of = a.logs[vcpu].process(max(space, 1))
                if stream == APPLICATION and (vcpu[0], of) in threads:
                    step, why = _beside_descriptors(runs, vcpu, space, whole, max(here.count, there.count))
                    left_out.add(why)
                else:
                    step = _localise(runs, vcpu, stream, space, whole)
                if step is None:
                    continue
                parted = _describe(vcpu, stream, *step, tuple(run.stopped.get(vcpu[0], "") for run in (a, b)))
                break
            if parted is not None:
                found.append(parted)
                break
        if vcpu[0] in several and vcpu[1] == 0 and EXCEPTION in streams:
            count, why, difference = _exceptions(vcpu[0], runs, (a, b), limited)
            compared[EXCEPTION] += count
            left_out.add(why)
            found += difference
    for vm in names[0]:
        ends = [run.stopped.get(vm, "") for run in (a, b)]
        if vm not in images:
            ends = [PLACE_IN_KERNEL.sub("", end) for end in ends]
        if ends[0] != ends[1] and not any(end in LIMITS for end in ends) and vm not in {each.vm for each in found}:
            words = [end or "finished its work" for end in ends]
            found.append(
                Difference(
                    vm=vm, vcpu=0, stream="end", step=0, operation="the end", place="", first=words[0], second=words[1]
                )
            )
    if limited and not any(compared.values()):
        left_out.add(NOTHING)
    equivalence = Equivalence(
        first=called[0], second=called[1], equivalent=not found, compared=compared,
        left_out=tuple(sorted(left_out - {""})), differences=tuple(found),
    )  # fmt: skip
    return equivalence, b.outcomes


def _exceptions(
    vm: str, runs: Callable[[Wanted], tuple[_Run, _Run]], logged: tuple[_Run, _Run], limited: Set[str]
) -> tuple[int, str, list[Difference]]:
    """Of a VM with several vCPUs: how many exceptions were compared, what was not, and the first difference."""
    if vm in limited:
        return 0, NOT_ENDED, []
    logs: Callable[[tuple[_Run, _Run]], tuple[Logs, Logs]] = lambda both: (both[0].logs, both[1].logs)  # noqa: E731
    found = deliveries(lambda wanted: logs(runs(wanted)), logs(logged), vm)
    if found is None:
        return 0, TOO_MANY, []
    count = min(len(each.counts) for each in found)
    kind = next(differing(*found), None)
    if kind is None:
        return count, RACES, []
    vcpu, seen, log = next(each.firsts[kind] for each in found if kind in each.firsts)
    exception, page = visible.shown(seen.op, seen.of), page_at(kind)
    numbers = [each.counts.get(kind, 0) for each in found]
    words = [("a fault" if number else "none") if page else f"{number:,} times" for number in numbers]
    what = f"{exception} in {page}" if page else f"{exception}, {visible.said(seen.op, seen.of, seen.part, kind[1])}"
    difference = Difference(
        vm=vm, vcpu=vcpu, stream=EXCEPTION, step=seen.step, operation=what, place=place(seen, log),
        first=words[0], second=words[1],
    )  # fmt: skip
    return count, RACES, [difference]


def _seen(log: Witnessed, stream: str, space: int) -> tuple[int, int]:
    """How many values of a stream an address space saw, and their digest."""
    whole = log.streams[stream]
    return (whole.count, whole.digest) if space == EVERY_SPACE else log.seen[stream][space]


def _otherwise(first: Witnessed, second: Witnessed, stream: str) -> list[int]:
    """The address spaces that did not see the same; all as one where there is no other process to switch to."""
    spaces = range(len(first.processes) + 1) if len(first.processes) > 1 else (EVERY_SPACE,)
    return [space for space in spaces if _seen(first, stream, space) != _seen(second, stream, space)]


def _run_second(scenario: Scenario, wanted: Wanted, progress: Progress | None) -> _Run:
    try:
        return _run(scenario, wanted, progress)
    except ConfigError as error:
        raise SecondRefused.of(error.problems) from None


def _run(scenario: Scenario, wanted: Wanted, progress: Progress | None) -> _Run:
    native = scenario.vmm.technique == "native"
    scenarios = [alone(scenario, vm) for vm in scenario.vms] if native else [scenario]
    logs: Logs = {}
    stopped: dict[str, str] = {}
    outcomes = []
    for each in scenarios:
        machine = Machine(each, progress=progress, wanted=wanted)
        outcome = machine.run()
        logs |= machine.witnessed()
        outcomes.append(outcome)
        stopped |= {vm.name: vm.stopped for vm in outcome.vms if vm.stopped}
    return _Run(logs, stopped, tuple(outcomes))


def _comparable(first: Witnessed, second: Witnessed) -> tuple[tuple[str, ...], str]:
    """Which streams are compared: a kernel that was built for its hypervisor or its devices executes something else."""
    if first.texts[:1] == second.texts[:1]:
        return STREAMS, ""
    return STREAMS[:1], "what kernels see: they are not one program, but built for their hypervisor or their devices"


def _parting(first: Stream, second: Stream, whole: bool) -> tuple[int, int] | None:
    """The last logged step before which all is the same, and the first at which it is not; None: no difference."""
    ours, theirs = ({row.step: row for row in stream.rows} for stream in (first, second))
    same = -1
    for step in sorted(ours.keys() & theirs.keys()):
        if ours[step].digest != theirs[step].digest:
            return same, step
        same = step
    end = min(first.count, second.count)
    if first.count != second.count:
        return (same, end) if whole else None
    return (same, end - 1) if first.digest != second.digest else None


def _localise(
    runs: Callable[[Wanted], tuple[_Run, _Run]],
    vcpu: tuple[str, int],
    stream: str,
    space: int,
    whole: bool,
) -> Parted | None:
    """The first step at which two streams of an address space differ, with what each saw then."""
    here, there = (run.logs[vcpu].streams[stream] for run in runs(Wanted(space=space)))
    parted = _parting(here, there, whole)
    if parted is None:
        return None
    for _ in range(ROUNDS):
        same, other = parted
        firsts = dict.fromkeys(STREAMS, 1 << 60) | {stream: same + 1}
        wanted = Wanted(fixed=other - same <= SEEN_ROWS, space=space, **firsts)
        a, b = (run.logs[vcpu] for run in runs(wanted))
        ours, theirs = ({row.step: row for row in each.streams[stream].rows} for each in (a, b))
        steps = range(same + 1, other + 1)
        if all(step in ours or step >= a.streams[stream].count for step in steps) and all(
            step in theirs or step >= b.streams[stream].count for step in steps
        ):
            for step in steps:
                x, y = ours.get(step), theirs.get(step)
                if x is None or y is None or x.digest != y.digest:
                    return step, x, y, a, b
            raise ModelError("digests part where no value differs", {"step": same, "end": other})
        again = _parting(a.streams[stream], b.streams[stream], whole)
        if again is None:
            break
        parted = max(again[0], same), again[1]
    raise ModelError("the first difference was not found", {"step": parted[0]})


def _beside_descriptors(
    runs: Callable[[Wanted], tuple[_Run, _Run]], vcpu: tuple[str, int], space: int, whole: bool, longest: int
) -> tuple[Parted | None, str]:
    """The first step at which a thread saw other than another descriptor, as `_localise`; and what is not compared."""
    if longest > WINDOWS * SEEN_ROWS:
        return None, TOO_MANY_BESIDE
    skipped = ""
    for first in range(0, longest, SEEN_ROWS):
        wanted = Wanted(fixed=True, space=space, **dict.fromkeys(STREAMS, 1 << 60) | {APPLICATION: first})
        a, b = (run.logs[vcpu] for run in runs(wanted))
        ours, theirs = ({row.step: row for row in each.streams[APPLICATION].rows} for each in (a, b))
        for step in sorted(ours.keys() | theirs.keys()):
            x, y = ours.get(step), theirs.get(step)
            if x is None or y is None:
                return (step, x, y, a, b) if whole else None, skipped
            if (x.op, x.of, x.part, x.value) == (y.op, y.of, y.part, y.value):
                continue
            opened = any(place(*each).endswith(f"_{OPENED}") for each in ((x, a), (y, b)))
            if x.op != y.op or not opened or min(x.value, y.value) < 0:  # an error is no descriptor
                return (step, x, y, a, b), skipped
            skipped = DESCRIPTORS
    return None, skipped


def _describe(
    vcpu: tuple[str, int],
    stream: str,
    step: int,
    a: Seen | None,
    b: Seen | None,
    first: Witnessed,
    second: Witnessed,
    ends: tuple[str, ...],
) -> Difference:
    either = a or b
    assert either is not None
    same = a is None or b is None or (a.op, a.of & 0xFFFF_FFFF, a.part) == (b.op, b.of & 0xFFFF_FFFF, b.part)
    at = next((each.of >> 32 for each in (a, b) if each is not None and each.op == o.IN and each.of >> 32), 0)
    places = [place(each, there) for each, there in ((a, first), (b, second)) if each is not None]
    return Difference(
        vm=vcpu[0],
        vcpu=vcpu[1],
        stream=stream,
        step=step,
        operation=operation(either, at),
        place=next((text for text in places if text), ""),
        first=_nothing(ends[0]) if a is None else value(a, at) if same else f"{operation(a, at)}: {value(a, at)}",
        second=_nothing(ends[1]) if b is None else value(b, at) if same else f"{operation(b, at)}: {value(b, at)}",
    )


def operation(seen: Seen, at: int = 0) -> str:
    """What the guest executed, in words; `at` is the address in the window to configuration space."""
    text = visible.shown(seen.op, seen.of)
    if seen.op == o.CPUID:
        return f"{text}, {PARTS[seen.part]}"
    if at and seen.op == o.IN:
        return f"{text}, device 00:{at >> 11 & 31:02x}.0 register {at & 0xFC:#04x}"
    return text


def _nothing(end: str) -> str:
    return f"nothing more, for the VM ended: {end}" if end else "nothing more"


def value(seen: Seen, at: int = 0) -> str:
    """What was seen, in words."""
    if seen.op == o.IN and seen.of & 0xFFFF == pci.DATA_PORT:
        return pci.meaning(at, seen.value)
    return visible.said(seen.op, seen.of, seen.part, seen.value & (1 << 64) - 1)


def place(seen: Seen, there: Witnessed) -> str:
    """Where in the guest's program a value was seen: the label before it; empty if that is not known."""
    for text in _programs(seen, there):
        if seen.rip and text.base <= seen.rip < text.end:
            before = [(at, name) for name, at in text.labels.items() if at <= seen.rip]
            if before:
                at, name = max(before)
                return f"{text.name}, {name}" + (f"+{seen.rip - at:#x}" if seen.rip > at else "")
    return ""


def _programs(seen: Seen, there: Witnessed) -> tuple[Program, ...]:
    if seen.rip < 0 or len(there.texts) == 2:
        return there.texts[:1] if seen.rip < 0 else there.texts[1:]
    return (there.texts[1 + there.processes[seen.space - 1]],) if seen.space else ()


def equivalence_json(found: Equivalence) -> str:
    """One JSON object."""
    return json.dumps(plain(found), indent=2, ensure_ascii=False)


def equivalence_text(found: Equivalence) -> str:
    """The comparison in a few lines."""
    seen = ", ".join(f"{count:,} {SEEN_BY[stream]}" for stream, count in found.compared.items() if count)
    lines = [f"{found.first} and {found.second}: {'equivalent' if found.equivalent else 'not equivalent'}"]
    lines += [f"  values compared: {seen or 'none'}"]
    lines += [f"  {each.sentence(found.first, found.second)}" for each in found.differences]
    lines += [f"  not compared: {each}" for each in found.left_out]
    return "\n".join(lines) + "\n"
