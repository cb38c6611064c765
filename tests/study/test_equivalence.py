"""What guests see in two runs is compared, and the first difference is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from vtsim.config import parse_scenario, resolve
from vtsim.cpu import ops as o
from vtsim.cpu.kernels import digest as d
from vtsim.cpu.kernels.digest import mix
from vtsim.cpu.visible import EXCEPTION, LEFT_OUT, RULES, page
from vtsim.platform.spec import Scenario
from vtsim.platform.witness import APPLICATION, EVERY_SPACE, Seen, Stream, Wanted, Witnessed
from vtsim.study import equivalence as e
from vtsim.study.delivered import deliveries, differing
from vtsim.study.run import without_hypervisor
from vtsim.vmm import build, pci

TEXT = """
machine: {memory: 256 MiB, devices: [vga, pro-1000, piix4-ide]}
vmm: {technique: hardware, personality: minimal}
vms:
  - memory: 64 MiB
    devices: [vga, pro-1000, piix4-ide]
    guest:
      kernel: {tick: 200 us}
      processes:
        - phases:
            - {primitive: rdtsc, iterations: 2}
            - {primitive: cpuid, iterations: 1}
            - {primitive: rdmsr, msr: 0x1a0, iterations: 1}
            - {primitive: syscall, iterations: 2}
"""
CLUSTERS = "vmm.features.exit_clustering=true"
WAYS = {
    "VT-x with EPT": (),
    "hosted, shadow paging": ("vmm.personality=kvm", "vmm.paging=shadow"),
    "hosted, exit clusters": ("vmm.personality=kvm", CLUSTERS),
    "binary translation": ("vmm.technique=binary-translation",),
    "trap and emulate on an ISA that traps": ("vmm.technique=trap-and-emulate", "machine.isa=virtualizable"),
}


def scenario(*sets: str) -> Scenario:
    return resolve(parse_scenario(TEXT, list(sets)), "test")


def against_native(*sets: str) -> e.Equivalence:
    there = scenario(*sets)
    return e.compare(without_hypervisor(there), there)


@pytest.mark.parametrize("way", WAYS)
def test_a_guest_sees_the_same_hardware_and_results_under_every_technique_that_shows_it_the_same(way: str) -> None:
    found = against_native(*WAYS[way])

    assert found.differences == ()
    assert found.equivalent
    assert found.left_out == ()
    # three system calls that are phases of the kernel or return to the process, four registers of a CPUID
    assert found.compared[APPLICATION] >= 3 + 4
    # vendor, class and subsystem of three devices, and 29 places where there is none
    assert found.compared["kernel"] >= 3 * 3 + 29


@pytest.mark.parametrize("ways", [(), (CLUSTERS,)], ids=["each read exits", "within an exit cluster"])
def test_another_device_is_a_difference_that_names_both_devices(ways: tuple[str, ...]) -> None:
    found = against_native("vms.0.devices=[vga, rtl8111e, piix4-ide]", *ways)

    (difference,) = found.differences
    assert not found.equivalent
    assert difference.stream == "kernel"
    assert difference.operation == "IN from port 0xcfc, device 00:02.0 register 0x00"
    assert difference.place.startswith("guest kernel, probe_00")
    assert (difference.first, difference.second) == (
        "Intel PRO/1000 MT Desktop (82540EM), 8086:100e",
        "Realtek RTL8111E Gigabit Ethernet, 10ec:8168",
    )


@pytest.mark.parametrize(
    ("shown", "first", "second"),
    [
        ("[vga, pro-1000]", "Intel 82371AB PIIX4 IDE, 8086:7111", "no device"),
        ("[vga, pro-1000, piix4-ide, ahci]", "no device", "Intel 82801IR (ICH9R) SATA AHCI, 8086:2922"),
    ],
)
def test_a_device_that_is_missing_or_too_many_is_a_difference(shown: str, first: str, second: str) -> None:
    (difference,) = against_native(f"vms.0.devices={shown}").differences

    assert (difference.first, difference.second) == (first, second)


def test_the_order_of_devices_is_seen() -> None:
    assert not against_native("vms.0.devices=[pro-1000, vga, piix4-ide]").equivalent


def test_a_planted_value_of_one_register_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The brand string of the VM differs in its sixth character: EBX of the first of its leaves."""
    real = build.cpuid_entries

    def planted(*arguments: object) -> object:
        rows = real(*arguments)  # type: ignore[arg-type]
        for row in rows:
            if row[0] == 0x80000002:
                row[5] ^= 1 << 8
        return rows

    monkeypatch.setattr(build, "cpuid_entries", planted)
    (difference,) = against_native().differences

    assert difference.operation == "CPUID leaf 0x80000002, EBX"
    assert int(difference.first, 16) ^ int(difference.second, 16) == 1 << 8


def test_a_planted_operation_is_named_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run's process executes CPUID of another leaf; both runs are native, so that nothing else differs."""
    native = without_hypervisor(scenario())
    phases = list(native.vms[0].guest.processes[0].phases)
    phases[1] = attrs.evolve(phases[1], leaf=0x80000008)
    other = attrs.evolve(
        native,
        vms=(attrs.evolve(native.vms[0], guest=attrs.evolve(native.vms[0].guest, processes=(
            attrs.evolve(native.vms[0].guest.processes[0], phases=tuple(phases)),
        ))),),
    )  # fmt: skip
    (difference,) = e.compare(native, other).differences

    assert difference.operation == "CPUID leaf 0x0, EAX"
    assert difference.stream == APPLICATION
    assert difference.place.startswith("process app, phase_0_1")
    assert difference.second.startswith("CPUID leaf 0x80000008, EAX: ")


def test_on_x86_a_deprivileged_kernel_is_caught_by_what_its_process_sees() -> None:
    (difference,) = against_native("vmm.technique=trap-and-emulate").differences

    assert difference.stream == APPLICATION


def test_the_rows_of_an_operation_stand_together() -> None:
    for op in {row[0] for row in LEFT_OUT}:
        assert {row[0] for row in LEFT_OUT[slice(*RULES[op])]} == {op}
    assert sum(int(end - first) for first, end in RULES) == len(LEFT_OUT)


def test_the_page_has_a_row_for_everything_that_is_left_out() -> None:
    assert page().count("\n| ") - 1 == len(LEFT_OUT)
    assert Path("docs/equivalence.md").read_text(encoding="utf-8") == page()


def _stream(values: list[int], wanted: Wanted) -> Stream:
    """The log that a run would leave which sees these values, by the rules of the log."""
    count, first, digest, rows, shift = len(values), wanted.application, 0, list[Seen](), 0
    while not wanted.fixed and (count - first) >> shift > d.SEEN_ROWS:
        shift += 1
    for step, value in enumerate(values):
        digest = int(mix(digest, value))
        n = step - first
        if n >= 0 and not n & ((1 << shift) - 1) and len(rows) < d.SEEN_ROWS:
            rows.append(Seen(step=step, digest=digest, op=o.CPUID, of=0, part=0, value=value, rip=0, space=0))
    return Stream(count=count, every=1 << shift, digest=digest, rows=tuple(rows))


@pytest.mark.parametrize("length", [10, 2 * d.SEEN_ROWS + 3])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_the_localiser_finds_the_one_value_that_differs_in_a_log_of_any_length(length: int, share: float) -> None:
    at = int(share * length)
    first = list(range(length))
    second = [value + (1 << 20) * (n == at) for n, value in enumerate(first)]

    def runs(wanted: Wanted) -> tuple[e._Run, e._Run]:
        return tuple(  # type: ignore[return-value]
            e._Run({("vm", 0): Witnessed(streams={APPLICATION: _stream(values, wanted)})}, {})
            for values in (first, second)
        )

    found = e._localise(runs, ("vm", 0), APPLICATION, EVERY_SPACE, whole=True)

    assert found is not None
    step, ours, theirs, *_ = found
    assert step == at
    assert ours is not None and theirs is not None
    assert (ours.value, theirs.value) == (first[at], second[at])


def test_every_model_of_a_device_has_its_own_identity() -> None:
    identities = {(model.vendor, model.device) for model in pci.MODELS.values()}

    assert len(identities) == len(pci.MODELS)


IN_ORDER = """
vms:
  - memory: 64 MiB
    guest:
      processes: {processes}
"""
LEAVES = [f"{{primitive: cpuid, leaf: {leaf}, iterations: 1}}" for leaf in (0, 0x80000008)]


def _natively(processes: str) -> Scenario:
    return without_hypervisor(resolve(parse_scenario(IN_ORDER.replace("{processes}", processes), []), "test"))


SWITCHED = """
machine: {memory: 128 MiB}
vmm: {technique: hardware, personality: minimal}
vms:
  - memory: 64 MiB
    guest:
      kernel: {tick: 100 us}
      processes:
        - {name: one, phases: [{primitive: cpuid, iterations: 600}, &calls {primitive: syscall, iterations: 40}, FIRST]}
        - {name: two, phases: [*calls, {primitive: cpuid, leaf: 7, iterations: 600}, SECOND,
            {primitive: exec, iterations: 1, pages: 2}]}
"""
UNDER = {
    "EPT": (),
    "EPT, KPTI": ("vms.0.guest.kernel.kpti=true",),
    "shadow paging": ("vmm.paging=shadow",),
    "agile paging": (
        "vmm.paging=agile",
        "machine.cpu.features.agile_cr3=true",
    ),
    "direct tables": ("vmm.paging=direct-pv",),
    **{name: (f"vmm.technique={name}",) for name in ("binary-translation", "paravirtual", "user-mode", "interpreter")},
}


def _switched(first: str, second: str, *sets: str) -> Scenario:
    return resolve(parse_scenario(SWITCHED.replace("FIRST", first).replace("SECOND", second), list(sets)), "test")


@pytest.mark.parametrize("way", [pytest.param(way, marks=() if "shadow" in way else pytest.mark.slow) for way in UNDER])
def test_what_each_of_two_processes_saw_is_compared_whenever_a_kernel_switches_between_them(way: str) -> None:
    there = _switched(*LEAVES, *UNDER[way])
    found = e.compare(without_hypervisor(there), there)

    assert found.differences == ()
    assert e.ANY_ORDER in found.left_out  # they had their turns otherwise, or nothing is tested


@pytest.mark.slow
@pytest.mark.parametrize("way", ["EPT, KPTI", "shadow paging", "binary-translation", "paravirtual"])
def test_two_processes_that_saw_what_the_other_should_have_seen_are_a_difference_that_is_found(way: str) -> None:
    first, second = without_hypervisor(_switched(*LEAVES, *UNDER[way])), _switched(*LEAVES[::-1], *UNDER[way])
    (difference,) = e.compare(first, second).differences

    assert difference.stream == APPLICATION
    assert difference.operation == "CPUID leaf 0x0, EAX"
    assert difference.second.startswith("CPUID leaf 0x80000008, EAX")


def test_one_task_sees_values_in_their_order() -> None:
    a, b = LEAVES
    first, second = (_natively(f"[{{phases: [{x}, {y}]}}]") for x, y in ((a, b), (b, a)))

    assert [each.operation for each in e.compare(first, second).differences] == ["CPUID leaf 0x0, EAX"]


def test_zeroes_that_a_guest_sees_first_are_in_its_digest() -> None:
    once = int(mix(0, 0))

    assert len({0, once, int(mix(once, 0))}) == 3


THREADS = """
machine: {memory: 256 MiB, cpus: 2}
vms:
  - memory: 64 MiB
    vcpus: 2
    guest:
      kernel: {tick: off}
      processes:
        - {threads: 2, phases: [{primitive: page_fault, region: REGION, iterations: 1}]}
"""
PAGES = 4


def _threads(region: str = f"{4 * PAGES} KiB", *sets: str) -> Scenario:
    return resolve(parse_scenario(THREADS.replace("REGION", region), list(sets)), "test")


def test_pages_that_two_vcpus_touch_are_compared_whichever_does_it_first() -> None:
    there = _threads()
    found = e.compare(without_hypervisor(there), there)

    assert found.equivalent
    assert found.compared["exception"] == 2 * PAGES  # each thread in a region of its own
    assert found.left_out == (e.RACES,)


def _two(phase: str, *sets: str) -> Scenario:
    text = THREADS.replace("{primitive: page_fault, region: REGION, iterations: 1}", phase)
    return resolve(parse_scenario(text, list(sets)), "test")


@pytest.mark.slow
def test_descriptors_that_two_threads_get_are_left_out_for_time_decides_who_is_first() -> None:
    there = _two("{primitive: open_close, iterations: 5}", "vmm.paging=shadow")
    found = e.compare(without_hypervisor(there), there)

    assert found.differences == ()
    assert e.DESCRIPTORS in found.left_out  # they got others, or nothing is tested


@pytest.mark.slow
def test_an_error_in_place_of_a_descriptor_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    there = _two("{primitive: open_close, iterations: 5}", "vmm.paging=shadow")
    real, failed = e._run_second, []

    def failing(*arguments: Any) -> e._Run:
        """The second run, in which the second thread's last open fails."""
        run = real(*arguments)
        stream = run.logs["vm0", 1].streams[APPLICATION]
        if not stream.rows:
            return run
        rows = [attrs.evolve(row, value=-2, digest=0) if row.value > 3 else row for row in stream.rows]
        failed.append(rows)
        run.logs["vm0", 1] = attrs.evolve(
            run.logs["vm0", 1], streams={**run.logs["vm0", 1].streams, APPLICATION: attrs.evolve(stream, rows=rows)}
        )
        return run

    monkeypatch.setattr(e, "_run_second", failing)
    (difference,) = e.compare(without_hypervisor(there), there).differences

    assert failed
    assert difference.place.endswith("_opened")
    assert difference.second == f"{(1 << 64) - 2:#x}"


def test_what_threads_see_beside_descriptors_is_compared() -> None:
    phases = "{primitive: open_close, iterations: 5}, {primitive: cpuid, leaf: 7, iterations: 1}"
    first, second = (without_hypervisor(_two(phases, *sets)) for sets in ((), ("machine.profile=snb-e5-2450",)))
    found = e.compare(first, second)

    assert e.DESCRIPTORS in found.left_out
    assert [(each.vcpu, each.operation) for each in found.differences] == [
        (vcpu, "CPUID leaf 0x7, EBX") for vcpu in range(2)
    ]


# A write locks its page of the file, which a read of another thread then does not map with those around it.
MAPPED = "{primitive: map_file, iterations: 3, region: 200 KiB, write: 54 %, order: strided, invalidate: true}"


@pytest.mark.slow
def test_pages_of_a_file_are_mapped_together_whichever_of_them_faults() -> None:
    there = _two(MAPPED)
    found = e.compare(without_hypervisor(there), there)

    assert found.differences == ()


def test_a_window_of_a_file_that_one_never_touches_is_a_difference() -> None:
    first, second = (without_hypervisor(_two(MAPPED.replace("200", size))) for size in ("200", "192"))
    (difference,) = e.compare(first, second).differences

    assert difference.operation.startswith("#PF in page 0x")
    assert (difference.first, difference.second) == ("a fault", "none")


def test_what_two_threads_see_whoever_is_first_is_compared() -> None:
    first = without_hypervisor(_two("{primitive: cpuid, leaf: 7, iterations: 2}"))
    second = without_hypervisor(_two("{primitive: cpuid, leaf: 7, iterations: 2}", "machine.profile=snb-e5-2450"))
    found = e.compare(first, second)

    assert [(each.vcpu, each.stream) for each in found.differences] == [(0, APPLICATION), (1, APPLICATION)]
    assert e.DESCRIPTORS not in found.left_out


def test_a_paravirtual_kernel_is_another_image_so_that_where_it_ends_is_no_difference() -> None:
    sets = ("vms.0.guest.processes.0.phases=[{primitive: rdmsr, msr: 1}]", "vmm.technique=paravirtual")
    there = scenario(*sets)
    found = e.compare(without_hypervisor(there), there)

    assert found.differences == ()


def test_a_page_that_one_vcpu_of_two_never_touches_is_a_difference_that_names_it() -> None:
    first, second = (without_hypervisor(_threads(f"{4 * n} KiB")) for n in (PAGES, PAGES - 1))
    (difference,) = e.compare(first, second).differences

    assert difference.stream == "exception"
    assert difference.operation.startswith("#PF in page 0x")
    assert (difference.first, difference.second) == ("a fault", "none")


def _log(vcpus: list[list[tuple[int, int, int]]], wanted: Wanted) -> dict[tuple[str, int], Witnessed]:
    """The logs that vCPUs would leave that are delivered these: vector, part, value."""
    logs = {}
    for number, rows in enumerate(vcpus):
        every = 1 if wanted.fixed or len(rows) <= d.SEEN_ROWS else 2
        last = wanted.exception + d.SEEN_ROWS if wanted.fixed else None
        seen = [
            Seen(step=n, digest=0, op=EXCEPTION, of=vector, part=part, value=value, rip=0, space=0)
            for n, (vector, part, value) in enumerate(rows)
        ]
        stream = Stream(count=len(rows), every=every, digest=0, rows=tuple(seen[wanted.exception : last : every]))
        logs["vm", number] = Witnessed(streams={"exception": stream})
    return logs


def _delivered(
    first: list[list[tuple[int, int, int]]], second: list[list[tuple[int, int, int]]]
) -> list[tuple[int, int]]:
    runs = lambda wanted: (_log(first, wanted), _log(second, wanted))  # noqa: E731
    found = deliveries(runs, runs(Wanted()), "vm")
    assert found is not None
    return list(differing(*found))


def test_of_page_faults_of_several_vcpus_the_page_counts_and_of_other_exceptions_the_number() -> None:
    fault = lambda page, inside=0, error=4: [(14, 0, error), (14, 1, page << 12 | inside)]  # noqa: E731
    general = [(13, 0, 0)]

    assert _delivered([fault(1) + fault(2), []], [fault(2, 8, 6), fault(1) + fault(1)]) == []
    assert _delivered([fault(1), []], [fault(1), fault(2)]) == [(14, 2)]
    assert _delivered([general, general], [general + general, []]) == []
    assert _delivered([general, general], [general, []]) == [(13, 0)]


@pytest.mark.parametrize("at", [0, 2 * d.SEEN_ROWS + 1])
def test_a_page_is_missed_wherever_it_stands_in_a_log_of_any_length(at: int) -> None:
    pages = list(range(2 * d.SEEN_ROWS + 2))
    rows = [[(14, 1, page << 12) for page in pages if page != missing] for missing in (-1, at)]

    assert _delivered([rows[0]], [rows[1]]) == [(14, at)]


BUSY = """
machine: {memory: 256 MiB, cpus: 2, devices: [vga]}
vms:
  - name: busy
    memory: 32 MiB
    cpu: 1
    devices: [vga]
    guest: {processes: [{phases: [{primitive: work, instructions: 9000000}]}]}
  - name: short
    memory: 32 MiB
    vcpus: 2
    cpus: [0, 1]
    devices: [vga]
    guest: {processes: [{phases: [{primitive: cpuid, iterations: 1}]}]}
"""


@pytest.mark.slow
def test_a_vm_that_ends_before_its_second_vcpu_had_a_turn_is_no_other() -> None:
    there = resolve(parse_scenario(BUSY, []), "test")
    found = e.compare(without_hypervisor(there), there)

    assert found.equivalent
    assert set(found.left_out) == {e.BEHIND, e.RACES}
    assert e._parting(_stream([1, 2, 3], Wanted()), _stream([4], Wanted()), whole=False) == (-1, 0)
