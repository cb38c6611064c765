"""Guests in 32-bit protected mode, with PAE and with 32-bit paging: what they see, what exits, how far walks go."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from attrs import frozen

import vtsim
from tests.vmm.test_shadow_guests import EPT, NATIVE, SHADOW, digests, exits
from vtsim.base import jit
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.cpu import accounts as k
from vtsim.cpu import slots as s
from vtsim.cpu.kernels import modes
from vtsim.ept import spec as e
from vtsim.guest.build import build_guest
from vtsim.guest.machine_view import Start
from vtsim.platform.machine import Machine
from vtsim.platform.walk import EVERY_ENTRY
from vtsim.vmcs import bits as b
from vtsim.vmcs import state as h
from vtsim.vmcs.fields import SLOT

TEXT = """
machine: {{memory: {memory}, profile: {profile}}}
vmm: {{personality: minimal}}
vms:
  - memory: 48 MiB
    guest:
      kernel: {{tick: off, paging: {paging}}}
      processes: {processes}
"""
KERNEL = "vms.0.guest.kernel"
PAGING = ("PAE", "32-bit")
SWITCHES = (
    "[{name: a, phases: [{primitive: context_switch, iterations: 5}]}, "
    "{name: b, phases: [{primitive: context_switch, iterations: 5}]}]"
)
TRAPS = "[{phases: [{primitive: %s, iterations: 3}]}]"
GUESTS = {
    "fork": "[{phases: [{primitive: fork, iterations: 2, pages: 5}]}]",
    "exec": "[{phases: [{primitive: exec, iterations: 2, pages: 5}]}]",
    "faults": "[{phases: [{primitive: page_fault, region: 48 KiB, iterations: 3}]}]",
    "protection": "[{phases: [{primitive: protect, region: 48 KiB, iterations: 3}]}]",
    "switches": SWITCHES,
    "stream": "[{phases: [{primitive: stream, pattern: uniform, region: 4 MiB, accesses: 40, write: 0.5}]}]",
    "file": "[{phases: [{primitive: map_file, region: 5 MiB, order: strided, stride: 256 KiB, write: 0.3, iterations: 2}]}]",
    "entries of a table": TRAPS % "pte_write",
    "sleep": "[{phases: [{primitive: idle, duration: 40 us}]}]",
    "signals": TRAPS % "signal_handle",
    "exceptions of the kernel": TRAPS % "divide_error",
    "MSRs": "[{phases: [{primitive: wrmsr, msr: 0x832, value: 0x100EC, iterations: 3}]}]",
}
LARGE = {"PAE": f"{KERNEL}.page_size=2 MiB", "32-bit": f"{KERNEL}.page_size=4 MiB"}
WITHOUT_EPT = (*SHADOW, "machine.profile=p4-672")
AGILE = ("vmm.paging=agile", "machine.profile=skx-4114")
WAYS = {
    "ept": EPT,
    "ept of kvm": (*EPT, "vmm.personality=kvm"),
    "shadow": SHADOW,
    "shadow of kvm": (*SHADOW, "vmm.personality=kvm"),
    "shadow in few pages": (*SHADOW, "vmm.parameters.shadow_permille=0"),
    "shadow of tables in the page of zeroes": (*SHADOW, "vmm.huge_pages=never"),
    "shadow without EPT": WITHOUT_EPT,
    "agile": AGILE,
    "agile of kvm, back and forth": (*AGILE, "vmm.personality=kvm", "vmm.parameters.agile_interval=20"),
}
PROCESSORS = {way: sets[1:2] for way, sets in WAYS.items() if sets[1:] and sets[1].startswith("machine.profile")}
CASES = [
    (guest, way)
    for guest in GUESTS
    for way in WAYS
    if (guest in ("fork", "exec") or way in ("ept", "shadow", "shadow of kvm", "agile"))
    and (not jit.DISABLED or (guest in ("fork", "exec", "switches", "signals") and way in ("ept", "shadow", "agile")))
]


def run(paging: str, guest: str, *sets: str, memory: str = "256 MiB") -> Machine:
    text = TEXT.format(memory=memory, profile="nehalem-ep", paging=paging, processes=GUESTS[guest])
    machine = Machine(parse_scenario(text, list(sets)))
    outcome = machine.run()
    assert [vm.stopped for vm in outcome.vms] == [None]
    return machine


def exceptions(machine: Machine) -> int:
    """The digest of the exceptions that the guest got."""
    if machine.hypervisor is None:
        return int(machine.engine.cpus[0][s.DIGEST_EXCEPTION])
    return int(machine.engine.contents(machine.hypervisor.vcpus[0].vmcs, 0)[h.V_DIGEST_EXCEPTION])


def counter(machine: Machine, number: int) -> int:
    return int(machine.engine.arena[machine.vms[0].owner + number])


@frozen
class Seen:
    """What a guest saw: digests of its processes, its kernel and the exceptions, and how many of what it took."""

    application: int
    kernel: int
    exceptions: int
    exception_count: int
    page_faults: int
    syscalls: int

    @classmethod
    def of(cls, machine: Machine) -> Seen:
        counts = (counter(machine, number) for number in (k.EXCEPTIONS, k.PAGE_FAULTS, k.SYSCALLS))
        return cls(*digests(machine), exceptions(machine), *counts)

    def by_processes(self) -> tuple[int, ...]:
        return self.application, self.exception_count, self.page_faults, self.syscalls


@cache
def seen_natively(paging: str, guest: str, *sets: str) -> Seen:
    return Seen.of(run(paging, guest, *NATIVE, *sets))


@pytest.mark.parametrize("paging", PAGING)
@pytest.mark.parametrize(("guest", "way"), CASES)
def test_a_guest_ends_with_the_results_that_it_has_natively(paging: str, guest: str, way: str) -> None:
    there = Seen.of(run(paging, guest, *WAYS[way]))
    natively = seen_natively(paging, guest, *PROCESSORS.get(way, ()))

    assert there == natively
    assert there.syscalls > 0


@pytest.mark.parametrize("paging", PAGING)
@pytest.mark.parametrize("guest", GUESTS)
def test_applications_see_what_they_see_with_four_levels(paging: str, guest: str) -> None:
    there, long = seen_natively(paging, guest), seen_natively("4-level", guest)

    assert there.by_processes() == long.by_processes()


# every other primitive that such a guest may have, in short
TWICE = (
    "cpuid", "rdtsc", "pause", "mov_from_cr8", "mov_to_cr8", "mov_to_cr3", "syscall", "empty", "call_return",
    "invalid_opcode", "kernel_fault", "signal_install", "protection_fault", "null_io", "stat", "open_close", "select",
)  # fmt: skip
OTHERS = {
    **{name: f"{name}, iterations: 2" for name in TWICE},
    "work": "work, instructions: 3000", "mix": "mix, instructions: 3000, region: 64 KiB",
    "fill": "fill, region: 64 KiB", "rdmsr": "rdmsr, msr: 0x10, iterations: 2",
    "port_out": "port_out, port: 0x80, iterations: 2", "process": "process, iterations: 2, pages: 6",
    "config_read": "config_read, iterations: 2",
}  # fmt: skip


@pytest.mark.parametrize("paging", PAGING)
@pytest.mark.parametrize("phase", OTHERS)
def test_what_a_process_does_does_not_depend_on_how_its_kernel_pages(paging: str, phase: str) -> None:
    processes = f"[{{phases: [{{primitive: {OTHERS[phase]}}}, {{primitive: page_fault, region: 16 KiB}}]}}]"
    assert seen_of_processes(paging, processes).by_processes() == seen_of_processes("4-level", processes).by_processes()


@cache
def seen_of_processes(paging: str, processes: str) -> Seen:
    text = TEXT.format(memory="256 MiB", profile="nehalem-ep", paging=paging, processes=processes)
    machine = Machine(parse_scenario(text, [*NATIVE, "machine.devices=[vga]"]))
    assert [vm.stopped for vm in machine.run().vms] == [None]
    return Seen.of(machine)


@pytest.mark.parametrize(("paging", "guest"), [(paging, guest) for paging in PAGING for guest in ("fork", "exec")])
def test_a_child_has_page_directories_from_the_start_and_loses_its_page_tables_by_exec(
    paging: str, guest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Start] = []

    def build(*arguments: Any, **more: Any) -> Start:
        starts.append(build_guest(*arguments, **more))
        return starts[-1]

    monkeypatch.setattr("vtsim.platform.machine.build_guest", build)
    text = TEXT.format(memory="256 MiB", profile="nehalem-ep", paging=paging, processes=GUESTS[guest])
    machine = Machine(parse_scenario(text, [*NATIVE, f"{KERNEL}.populate=prebuilt"]))
    root = starts[0].roots[-1]
    if paging == "PAE":
        pdptes = [machine.engine.load(root + 8 * n) for n in range(4)]
        assert [pdpte & 0xFFF for pdpte in pdptes] == [e.PTE_PRESENT] * 4
        assert len(set(pdptes)) == 4
    machine.run()

    at = (pdptes[2] & e.ADDRESS) + 8 * 511 if paging == "PAE" else root + 4 * 767  # of the stack, which is not used
    word = machine.engine.load(at & ~7)
    assert (word >> 8 * (at & 4) & e.PTE_PRESENT) == (guest == "fork")
    if paging == "PAE":
        assert [machine.engine.load(root + 8 * n) for n in range(4)] == pdptes


@pytest.mark.parametrize("paging", PAGING)
def test_exceptions_are_seen_in_the_kernel_s_digest_of_them(paging: str) -> None:
    assert exceptions(run(paging, "faults", *NATIVE)) != exceptions(run(paging, "switches", *NATIVE))


@pytest.mark.parametrize("paging", PAGING)
@pytest.mark.parametrize("way", ["native", "ept", "shadow", "agile"])
def test_large_pages_of_the_guest_are_walked_in_fewer_steps(paging: str, way: str) -> None:
    sets = (*(NATIVE if way == "native" else WAYS[way]), f"{KERNEL}.populate=prebuilt")
    small, large = (run(paging, "stream", *sets, *more) for more in ((), (LARGE[paging],)))

    if way in ("native", "ept"):  # the others' host has small pages
        assert counter(large, k.GUEST_REFERENCES) < counter(small, k.GUEST_REFERENCES)
    assert digests(large) == digests(small)


@pytest.mark.parametrize(("paging", "levels"), [("PAE", 3), ("32-bit", 2)])
def test_the_processor_is_in_protected_mode(paging: str, levels: int) -> None:
    m = run(paging, "faults", *NATIVE).engine.cpus[0]

    assert m[s.EFER] & (modes.LMA | 1 << 8) == 0
    assert m[s.PAGING_LEVELS] == levels
    assert m[s.MODE] == modes.SEGMENTED | modes.BIG
    assert (m[s.CR4] >> 5) & 1 == (paging == "PAE")
    assert m[s.CS_ACCESS_RIGHTS] & (modes.AR_L | modes.AR_D) == modes.AR_D


@pytest.mark.parametrize("paging", PAGING)
@pytest.mark.parametrize("way", ["ept", "shadow", "agile"])
def test_vm_entry_is_without_ia_32e_mode_guest(paging: str, way: str) -> None:
    machine = run(paging, "faults", *WAYS[way])
    assert machine.hypervisor is not None
    words = machine.engine.contents(machine.hypervisor.vcpus[0].vmcs, 0)

    assert words[SLOT["ENTRY_CONTROLS"]] & b.ENTRY_IA32E_MODE_GUEST == 0
    assert words[SLOT["GUEST_CS_ACCESS_RIGHTS"]] & (modes.AR_L | modes.AR_D) == modes.AR_D
    # the processor itself has PAE paging on shadow tables, whatever the guest believes in
    assert (words[SLOT["GUEST_CR4"]] >> 5) & 1 == (paging == "PAE" or way != "ept")


@pytest.mark.parametrize("paging", PAGING)
def test_a_load_of_cr3_exits_on_shadow_tables_alone(paging: str) -> None:
    """Even where a processor has a list of roots: a load of CR3 is also one of PDPTEs, which no list holds."""
    listed = (*AGILE, "machine.cpu.features.agile_cr3=true")

    assert exits(run(paging, "switches", *EPT), "CR_ACCESS") == 0
    for way in (SHADOW, AGILE, listed):
        assert exits(run(paging, "switches", *way), "CR_ACCESS") >= 2 * 5


@pytest.mark.parametrize("paging", PAGING)
def test_a_page_fault_of_the_guest_exits_on_shadow_tables_alone(paging: str) -> None:
    assert exits(run(paging, "faults", *EPT), "EXCEPTION_NMI") == 0
    assert exits(run(paging, "faults", *SHADOW), "EXCEPTION_NMI") >= 3 * 12


# --- walks ------------------------------------------------------------------------------------------------------------
GUEST_PAGES = [
    ("4-level", "4 KiB", 4), ("4-level", "2 MiB", 3), ("PAE", "4 KiB", 2), ("PAE", "2 MiB", 1), ("32-bit", "4 KiB", 2),
    ("32-bit", "4 MiB", 1),
]  # fmt: skip
AT = {"4-level": 0x10_0000_0000, "PAE": 0x1000_0000, "32-bit": 0x1000_0000}


@pytest.mark.parametrize(("paging", "page", "g"), GUEST_PAGES)
@pytest.mark.parametrize(("ept", "h"), [("4 KiB", 4), ("2 MiB", 3)])
def test_after_a_run_a_cold_walk_reads_every_crossing_of_the_dimensions(
    paging: str, page: str, g: int, ept: str, h: int
) -> None:
    text = TEXT.format(memory="256 MiB", profile="skx-4114", paging=paging, processes=GUESTS["stream"])
    sets = (
        f"vmm.ept.page_size={ept}", "vmm.ept.populate=prebuilt", f"{KERNEL}.page_size={page}",
        f"{KERNEL}.populate=prebuilt", "vmm.ept.levels=4", *EVERY_ENTRY,
    )  # fmt: skip
    found = vtsim.walk(parse_scenario(text, list(sets)), AT[paging] + 0x123, after_run=True, cold=True)

    assert len(found.references) == (g + 1) * (h + 1) - 1
    assert found.hpa is not None
    assert found.hpa & 0xFFF == 0x123


@pytest.mark.parametrize(("paging", "page", "g"), GUEST_PAGES[2:])
def test_natively_two_levels_are_read_at_most(paging: str, page: str, g: int) -> None:
    text = TEXT.format(memory="256 MiB", profile="skx-4114", paging=paging, processes=GUESTS["stream"])
    sets = [*NATIVE, f"{KERNEL}.page_size={page}", f"{KERNEL}.populate=prebuilt", *EVERY_ENTRY]
    found = vtsim.walk(parse_scenario(text, sets), AT[paging])

    assert len(found.references) == g
    assert found.guest_levels == (3 if paging == "PAE" else 2)


@pytest.mark.parametrize("way", [*EPT, *NATIVE])
def test_the_pdpte_that_a_walk_begins_with_was_loaded_and_leads_to_the_page_directory_that_is_read(way: str) -> None:
    text = TEXT.format(memory="256 MiB", profile="nehalem-ep", paging="PAE", processes=GUESTS["switches"])
    sets = [way, "vmm.ept.populate=prebuilt", f"{KERNEL}.populate=prebuilt", *EVERY_ENTRY]
    found = vtsim.walk(parse_scenario(text, sets), 0xBFFF_E000, process="b", after_run=True, cold=True)

    assert found.pdpte is not None
    assert found.pdpte & (e.PTE_PRESENT | e.PTE_WRITE | e.PTE_USER) == e.PTE_PRESENT
    first = found.levels[0].entry
    assert first is not None
    assert first.name == "PDE"
    assert (first.gpa or 0) >> 12 == found.pdpte >> 12


def test_an_address_of_the_kernel_is_one_above_3_gib() -> None:
    text = TEXT.format(memory="256 MiB", profile="nehalem-ep", paging="PAE", processes=GUESTS["faults"])
    scenario = parse_scenario(text, list(NATIVE))

    assert vtsim.walk(scenario, 0xC010_0000).ring == 0
    assert vtsim.walk(scenario, 0x40_0000).ring == 3
    with pytest.raises(ConfigError) as raised:
        vtsim.walk(scenario, 1 << 32)
    assert raised.value.problems[0].message == "a linear address has 32 bits with PAE paging"


# --- what is refused ----------------------------------------------------------------------------------------------------
INSTEAD = "; or guest.kernel.paging '4-level'"
REFUSED = [
    ("vmm.technique=binary-translation", "vmm.technique", "has ring 0, or VT-x below it",
     "technique can be native, hardware"),
    ("vmm.paging=direct-pv", "vmm.paging", "has tables of its own, which it writes itself",
     "paging can be auto, ept, shadow, agile"),
    ("vmm.pv.events=true", "vmm.pv.events", "has no kernel that is built for hypercalls", "events can be false"),
    ("vmm.features.exit_clustering=true", "vmm.features.exit_clustering",
     "has tables by which exit clusters find no instruction", "exit_clustering can be false"),
    ("vms.0.vcpus=2", "vms.0.vcpus", "has one CPU", "vcpus can be 1"),
    ("vms.0.memory=1 GiB", "vms.0.memory", "maps all its memory above 3 GiB", "memory can be at most 896 MiB"),
    (f"{KERNEL}.kpti=true", f"{KERNEL}.kpti", "has one root for kernel and user mode", "kpti can be false"),
    (f"{KERNEL}.pcid=true", f"{KERNEL}.pcid", "has no PCIDs, which need IA-32e mode", "pcid can be false, auto"),
    (f"{KERNEL}.sensitive=[sgdt]", f"{KERNEL}.sensitive", "has other descriptors, gates and frames than these want",
     "sensitive can be []"),
    ("vms.0.guest.processes.0.phases.0={primitive: mmio_read, address: 0xFEC00000}",
     "vms.0.guest.processes.0.phases.0", "maps no registers of devices",
     "choose others, as page_fault, fork, exec, protect, context_switch, stream"),
    ("vms.0.guest.processes.0.phases.0={primitive: sensitive}", "vms.0.guest.processes.0.phases.0",
     "has other descriptors, gates and registers than this wants",
     "choose others, as page_fault, fork, exec, protect, context_switch, stream"),
    ("vms.0.guest.processes.0.phases.0={primitive: btree, records: 1000, slabs: true}", "vms.0.guest.processes.0.phases.0.slabs",
     "has no linear addresses from 0x10000000000 on", "slabs can be false"),
    ("vms.0.guest.processes.0.phases.0={primitive: netlist_swaps, elements: 1000, grown_heap: true}",
     "vms.0.guest.processes.0.phases.0.grown_heap", "has no linear addresses from 0x100000000000 on",
     "grown_heap can be false"),
]  # fmt: skip


@pytest.mark.parametrize("paging", PAGING)
@pytest.mark.parametrize(("wish", "path", "words", "help"), REFUSED, ids=[row[0][:40] for row in REFUSED])
def test_what_such_a_guest_cannot_have_is_refused_with_what_it_can(
    paging: str, wish: str, path: str, words: str, help: str
) -> None:
    text = TEXT.format(memory="4 GiB", profile="skx-4114", paging=paging, processes=GUESTS["faults"])
    with pytest.raises(ConfigError) as raised:
        parse_scenario(text, ["machine.cpus=2", wish])

    problems = {problem.path: (problem.message, problem.help) for problem in raised.value.problems}
    assert problems[path] == (f"a guest with {paging} paging {words}", help + INSTEAD)


@pytest.mark.parametrize(
    ("paging", "size", "legal"),
    [
        ("PAE", "4 MiB", "4 KiB, 2 MiB"),
        ("32-bit", "2 MiB", "4 KiB, 4 MiB"),
        ("4-level", "4 MiB", "4 KiB, 2 MiB, 1 GiB"),
    ],
)
def test_a_page_size_that_a_paging_mode_does_not_have_is_refused(paging: str, size: str, legal: str) -> None:
    text = TEXT.format(memory="256 MiB", profile="skx-4114", paging=paging, processes=GUESTS["faults"])
    with pytest.raises(ConfigError) as raised:
        parse_scenario(text, [f"{KERNEL}.page_size={size}"])

    (problem,) = raised.value.problems
    assert (problem.path, problem.message, problem.help) == (
        f"{KERNEL}.page_size", f"{paging} paging has no pages of {size}", f"page_size can be {legal}",
    )  # fmt: skip


def test_a_region_that_32_bit_addresses_do_not_reach_is_refused() -> None:
    processes = "[{phases: [{primitive: stream, at: 0xBFFF0000, region: 1 MiB}]}]"
    text = TEXT.format(memory="256 MiB", profile="nehalem-ep", paging="PAE", processes=processes)
    with pytest.raises(ConfigError) as raised:
        Machine(parse_scenario(text, list(NATIVE)))

    assert "the region at 0xbfff0000 to 0xc00effff does not lie below 0xbffff000" in raised.value.problems[0].message
