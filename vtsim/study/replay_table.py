"""Predicted exits of a recorded guest beside those that a real hypervisor took."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final

from vtsim.guest.replay.exits import ReplayedExits
from vtsim.guest.spec import ReplaySpec
from vtsim.guest.traces.recorded_exits import RecordedExits
from vtsim.platform.spec import Scenario
from vtsim.study.result import Replay, ReplayExit
from vtsim.vmcs.reasons import BY_NUMBER

# what the recording of a hypervisor is named after the trace's own name, by personality, paging and huge pages
RECORDINGS: Final = {
    ("kvm", "ept", "always"): "kvm_ept",
    ("kvm", "ept", "never"): "kvm_ept_4k",
    ("kvm", "shadow", "always"): "kvm_shadow",
}


def recorded_for(scenario: Scenario) -> Path | None:
    """The file that holds what a real hypervisor did with the scenario's recorded guest, if there is one."""
    vmm = scenario.vmm
    name = RECORDINGS.get((vmm.personality, vmm.paging, vmm.huge_pages))
    phases = [p for vm in scenario.vms for process in vm.guest.processes for p in process.phases]
    traces = [Path(phase.trace) for phase in phases if isinstance(phase, ReplaySpec)]
    if name is None or vmm.technique == "native" or not traces:
        return None
    file = traces[0].with_suffix(f".{name}.json")
    return file if file.exists() else None


def replay_table(predicted: ReplayedExits, recorded: RecordedExits) -> Replay:
    """Exits by reason. What depends on the speed of the machine is left out on both sides, and counted apart."""
    left_out = _left_out_predicted(predicted, recorded)
    left_out_real = _left_out_recorded(predicted, recorded)
    ours: Counter[str] = Counter()
    for (reason, _, _), counts in predicted.counts.items():
        ours[BY_NUMBER[reason].name] += sum(counts)
    theirs = recorded.total("reasons")
    rows = []
    for name in sorted({*ours, *theirs}, key=lambda name: (-theirs.get(name, 0), name)):
        mine = ours[name] - left_out[name]
        real = theirs.get(name, 0) - left_out_real[name]
        rows.append(
            ReplayExit(
                reason=name,
                predicted=mine,
                recorded=real,
                deviation_percent=100 * (mine - real) / real if real else None,
                left_out_predicted=left_out[name],
                left_out_recorded=left_out_real[name],
            )
        )
    return Replay(trace=predicted.trace, recorded_on=recorded.source, exits=tuple(rows))


def _left_out_predicted(predicted: ReplayedExits, recorded: RecordedExits) -> Counter[str]:
    whole = recorded.time_dependent_reasons | set(recorded.not_recorded)
    left_out: Counter[str] = Counter()
    for (reason, access, _), counts in predicted.counts.items():
        name = BY_NUMBER[reason].name
        if name in whole or access in recorded.time_dependent_accesses:
            left_out[name] += sum(counts)
    return left_out


def _left_out_recorded(predicted: ReplayedExits, recorded: RecordedExits) -> Counter[str]:
    """Recorded accesses do not say by which exit they were seen: by the one that most of ours were."""
    seen: dict[str, Counter[str]] = {}
    for (reason, access, _), counts in predicted.counts.items():
        seen.setdefault(access, Counter())[BY_NUMBER[reason].name] += sum(counts)
    totals = recorded.total("reasons")
    left_out = Counter({name: totals.get(name, 0) for name in recorded.time_dependent_reasons})
    accesses = {**recorded.total("ports"), **recorded.total("mmio")}
    for access in recorded.time_dependent_accesses & seen.keys():
        left_out[seen[access].most_common(1)[0][0]] += accesses.get(access, 0)
    return left_out
