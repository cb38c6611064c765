"""Direct page tables: what a hostile guest asks for is refused, and kernels end as they do natively."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vmm.direct_guest import (
    FREE,
    MEMORY,
    PS,
    READ_ONLY,
    SHARED,
    A,
    D,
    DirectGuest,
    P,
    Recount,
    W,
    answers,
    check_words,
    direct_guest,
    kept_words,
    random_requests,
)
from tests.vmm.machines import MIB, Machine, machine
from tests.vmm.test_shadow_guests import digests, exits, page_faults
from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.config import parse_scenario
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Mem
from vtsim.ept import direct as d
from vtsim.ept.tables import KERNEL_PAGE
from vtsim.platform.machine import Machine as Platform
from vtsim.vmm.needs import frame_words

ONE, TWO, THREE = FREE, FREE + 1, FREE + 2


def run(steps: Any, **options: Any) -> tuple[Machine, dict[str, Any]]:
    holder: dict[str, Any] = {}
    made = machine(
        direct_guest(steps, holder), paging="direct-pv", memory=MEMORY, host_memory=64 * MIB,
        **{"personality": "minimal", **options},
    ).run()  # fmt: skip
    assert made.finished == ["vm0"]
    check_frames(made, holder)
    return made, holder


def check_frames(made: Machine, holder: dict[str, Any]) -> None:
    """What the hypervisor keeps of frames is what the tables imply; no table is writable, no frame is foreign."""
    host, memory = made.hypervisor.host, made.vcpu.memory
    first = (made.hypervisor.path.addresses["frame_words"] - 0xFFFF_8880_0000_0000) >> 12
    owned = {int(frame) for frame in memory.frames}
    kept = kept_words(host.words, first, iter(sorted(owned)))
    recount = Recount(lambda frame: host.words(frame, mem.TABLE))
    check_words(recount, kept, owned, made.field(made.vcpu, "GUEST_CR3") >> 12)


REQUESTS = {
    "a read-only page of its own": (1, lambda g: (g.entry_of(TWO), g.machine(ONE) | P)),
    "a writable page of its own": (1, lambda g: (g.entry_of(TWO), g.machine(ONE) | P | W | A | D)),
    "no page any more": (1, lambda g: (g.entry_of(TWO), 0)),
    "a frame of the host": (0, lambda g: (g.entry_of(ONE), 1 << 12 | P)),
    "a frame beyond memory": (0, lambda g: (g.entry_of(ONE), (1 << 40) | P)),
    "a table of its own, writable": (0, lambda g: (g.entry_of(ONE), g.table.root << 12 | P | W)),
    "a table of its own, read-only": (1, lambda g: (g.entry_of(ONE), g.table.root << 12 | P)),
    "a large page": (0, lambda g: (g.entry_of(ONE), g.machine(TWO) | P | PS)),
    "a reserved bit": (0, lambda g: (g.entry_of(ONE), g.machine(TWO) | P | 1 << 52)),
    "an entry of a frame that is no table": (0, lambda g: (g.machine(ONE), g.machine(TWO) | P)),
    "an entry of a frame of the host": (0, lambda g: (1 << 12, g.machine(TWO) | P)),
    "an entry beyond memory": (0, lambda g: (1 << 50, g.machine(TWO) | P)),
    "a table that it can write to": (0, lambda g: (g.table.root << 12 | 8, g.machine(THREE) | P)),
    "a table that is its root": (0, lambda g: (g.table.root << 12 | 8, g.table.root << 12 | P)),
    "another kernel half": (0, lambda g: (g.table.root << 12 | 256 << 3, 0)),
    "a root that it can write to": (0, lambda g: (d.PIN, g.machine(THREE))),
    "its root once more": (0, lambda g: (d.PIN, g.table.root << 12)),
    "to give up the root in use": (0, lambda g: (d.UNPIN, g.table.root << 12)),
    "CR3 that is no root": (0, lambda g: (d.LOAD, g.machine(ONE))),
    "CR3 with a reserved bit": (0, lambda g: (d.LOAD, g.table.root << 12 | 1 << 60)),
    "CR3 that is its root": (1, lambda g: (d.LOAD, g.table.root << 12)),
    "what is no request": (0, lambda g: (7, 0)),
}  # fmt: skip


def test_requests_are_carried_out_where_they_keep_the_guest_inside_its_memory(personality: str) -> None:
    def steps(guest: DirectGuest) -> None:
        for _, what in REQUESTS.values():
            guest.request(*what(guest))

    made, holder = run(steps, personality=personality)

    assert dict(zip(REQUESTS, answers(holder), strict=True)) == {name: good for name, (good, _) in REQUESTS.items()}
    assert made.hypervisor.word(made.vcpu, "REFUSALS") == sum(not good for good, _ in REQUESTS.values())


def test_a_frame_becomes_a_table_only_as_a_whole_and_only_while_nobody_can_write_to_it() -> None:
    """A level-3 table whose first entry leads to a frame that may be a table, and the second to one that is written."""
    new = FREE + 8

    def steps(guest: DirectGuest) -> None:
        link = guest.table.root << 12 | 8
        for index, below in enumerate((TWO, ONE)):
            guest.store(new, index, guest.machine(below) | P)
        for gfn in (new, TWO):
            guest.request(guest.entry_of(gfn), guest.machine(gfn) | READ_ONLY)
        guest.request(link, guest.machine(new) | P)
        guest.request(guest.entry_of(TWO), guest.machine(TWO) | KERNEL_PAGE)
        for gfn in (ONE, TWO):
            guest.request(guest.entry_of(gfn), guest.machine(gfn) | READ_ONLY)
        guest.request(link, guest.machine(new) | P)
        guest.request(guest.entry_of(ONE), guest.machine(ONE) | KERNEL_PAGE)
        guest.request(link, 0)
        guest.request(guest.entry_of(ONE), guest.machine(ONE) | KERNEL_PAGE)

    assert answers(run(steps)[1]) == [1, 1, 0, 1, 1, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("vpid", [True, False])
def test_what_a_paging_structure_cache_holds_of_a_table_is_gone_before_the_guest_can_write_to_it(vpid: bool) -> None:
    tables = {3: FREE + 8, 2: FREE + 9, 1: FREE + 10}
    where = 1 << 39

    def steps(guest: DirectGuest) -> None:
        link = guest.table.root << 12 | 8
        for level, gfn in tables.items():
            guest.store(gfn, 0, guest.machine(tables.get(level - 1, ONE)) | KERNEL_PAGE)
        for gfn in tables.values():
            guest.request(guest.entry_of(gfn), guest.machine(gfn) | READ_ONLY)
        guest.request(link, guest.machine(tables[3]) | KERNEL_PAGE)
        guest.attempt(lambda: guest.load(where))
        guest.request(link, 0)
        guest.request(guest.entry_of(tables[1]), guest.machine(tables[1]) | KERNEL_PAGE)
        guest.store(tables[1], 1, 1 << 12 | P)  # a frame of the host
        guest.attempt(lambda: guest.load(where + 4096))

    assert answers(run(steps, vpid=vpid)[1]) == [1, 1, 1, 1, 0, 1, 1, 14]


@pytest.mark.parametrize("vpid", [True, False])
def test_what_a_tlb_holds_of_a_frame_does_not_let_the_guest_write_to_it_once_it_is_a_table(vpid: bool) -> None:
    def steps(guest: DirectGuest) -> None:
        guest.store(ONE, 0, 0)
        guest.request(guest.entry_of(ONE), guest.machine(ONE) | READ_ONLY)
        guest.request(guest.table.root << 12 | 8, guest.machine(ONE) | P)
        guest.attempt(lambda: guest.store(ONE, 0, 1 << 12 | P | W))
        guest.request(guest.table.root << 12 | 8, 0)
        guest.request(guest.entry_of(ONE), guest.machine(ONE) | KERNEL_PAGE)
        guest.attempt(lambda: guest.store(ONE, 0, 1 << 12 | P | W))

    assert answers(run(steps, vpid=vpid)[1]) == [1, 1, 14, 1, 1, 0]


def test_a_guest_cannot_leave_direct_tables_by_its_registers(personality: str) -> None:
    def to_cr(guest: DirectGuest, number: int, bit: int) -> None:
        guest.a.op(ops.MOV_FROM_CR, s.RAX, imm=number)
        guest.a.emit(ops.XOR, s.RAX, imm=bit)
        guest.a.op(ops.MOV_TO_CR, s.RAX, imm=number)

    def to_efer(guest: DirectGuest) -> None:
        guest.a.mov(s.RCX, 0xC0000080)
        guest.a.op(ops.RDMSR)
        guest.a.emit(ops.XOR, s.RAX, imm=1 << 11)
        guest.a.op(ops.WRMSR)

    def steps(guest: DirectGuest) -> None:
        for number, bit in ((0, 1 << 16), (3, 0), (4, 1 << 17), (0, 1 << 3), (4, 1 << 7)):
            guest.attempt(lambda number=number, bit=bit: to_cr(guest, number, bit))  # type: ignore[misc]
        guest.attempt(lambda: to_efer(guest))

    assert answers(run(steps, personality=personality)[1]) == [13, 13, 13, 0, 0, 13]


def test_a_multicall_ends_at_the_first_request_that_is_refused() -> None:
    def steps(guest: DirectGuest) -> None:
        good, bad = (guest.entry_of(TWO), guest.machine(ONE) | P), (d.LOAD, guest.machine(ONE))
        for n, words in enumerate((good, good, bad, good)):
            for m, word in enumerate(words):
                at = SHARED + d.SHARED_REQUESTS + 16 * n + 8 * m
                guest.a.st_value(Mem(displacement=at), mem.signed(word))
        for count in (0, 2, 4, d.BATCH_LIMIT + 1, -1):
            guest.a.mov(s.RAX, d.CALL_MULTI)
            guest.a.mov(s.RSI, count)
            guest.a.op(ops.VMCALL)
            guest.log(s.RAX)

    assert answers(run(steps)[1]) == [0, 2, 2, 0, 0]


def test_whatever_a_guest_asks_for_its_tables_stay_its_own_and_read_only() -> None:
    good = 0
    for seed in range(3):
        _, holder = run(random_requests(seed, 60))
        good += sum(answer == 1 for answer in answers(holder))

    assert good > 30


TEXT = """
machine: {{memory: 256 MiB}}
vmm: {{personality: {personality}, paging: {paging}}}
vms:
  - memory: 32 MiB
    guest:
      kernel: {{tick: off, interface: {interface}}}
      processes: {processes}
"""
FORK = "[{phases: [{primitive: fork, iterations: 2, pages: 5}]}]"
EXEC = "[{phases: [{primitive: exec, iterations: 2, pages: 3}]}]"
UNDEFINED = (
    "[{phases: [{primitive: invalid_opcode, iterations: 3}, {primitive: syscall, iterations: 2}]}]"  # is decoded
)
PORTS = "[{phases: [{primitive: port_in, port: 0x1234, iterations: 3}, {primitive: syscall, iterations: 2}]}]"
FAULTS = "[{phases: [{primitive: page_fault, region: 144 KiB, iterations: 2}]}]"
SWITCHES = (
    "[{name: a, phases: [{primitive: context_switch, iterations: 3}, {primitive: page_fault, region: 48 KiB}]}, "
    "{name: b, phases: [{primitive: context_switch, iterations: 3}]}]"
)


def of_kernel(processes: str, *sets: str, personality: str = "kvm", paging: str = "direct-pv", interface: str = "auto"):  # type: ignore[no-untyped-def]
    text = TEXT.format(personality=personality, paging=paging, interface=interface, processes=processes)
    there = Platform(parse_scenario(text, list(sets)))
    return there, there.run()


@pytest.mark.parametrize(
    ("processes", "sets"),
    [
        (FORK, ()),
        (EXEC, ()),
        (UNDEFINED, ()),
        (PORTS, ("vmm.parameters.fast_pio_in=0",)),
        (FORK, ("vmm.pv.batch=1", "vmm.vpid=false")),
        (FAULTS, ("vmm.pv.batch=7",)),
        (SWITCHES, ()),
    ],
)
def test_a_paravirtual_guest_ends_with_the_results_that_it_has_natively(processes: str, sets: tuple[str, ...]) -> None:
    there, outcome = of_kernel(processes, *sets)
    native, _ = of_kernel(processes, "vmm.technique=native", paging="none")

    assert [vm.stopped for vm in outcome.vms] == [None]
    assert digests(there)[0] == digests(native)[0]
    assert page_faults(there) == page_faults(native)


@pytest.mark.slow
def test_a_page_fault_of_a_paravirtual_guest_is_one_request_and_unmapping_is_batched() -> None:
    """A fault maps one page; unmapping is two requests a page, which one batch of 64 holds for 20 pages."""
    counts = {}
    for batch in (1, 64):
        for iterations in (2, 3):
            once = f"[{{phases: [{{primitive: page_fault, region: 80 KiB, iterations: {iterations}}}]}}]"
            there, _ = of_kernel(once, f"vmm.pv.batch={batch}")
            counts[batch, iterations] = exits(there, "VMCALL")
            assert exits(there, "EXCEPTION_NMI") == exits(there, "CR_ACCESS") == 0

    assert counts[1, 3] - counts[1, 2] == 20 + 2 * 20
    assert counts[64, 3] - counts[64, 2] == 20 + 1


@pytest.mark.parametrize("primitive", ["pte_write", "mov_to_cr3"])
@pytest.mark.parametrize("technique", ["hardware", "paravirtual"])
def test_what_changes_tables_in_a_loop_is_a_hypercall_each(primitive: str, technique: str) -> None:
    """Entries and CR3 end as they were, so that the process goes on."""
    counts = []
    for iterations in (2, 8):
        phase = f"{{primitive: {primitive}, iterations: {iterations}}}"
        once = f"[{{phases: [{phase}, {{primitive: syscall, iterations: 1}}]}}]"
        there, outcome = of_kernel(once, f"vmm.technique={technique}")
        assert [vm.stopped for vm in outcome.vms] == [None]
        if outcome.hypercalls is None:
            counts.append(exits(there, "VMCALL"))
        else:
            counts.append(outcome.hypercalls["requests"][{"pte_write": "update", "mov_to_cr3": "load"}[primitive]])

    assert counts[1] - counts[0] == 8 - 2


@pytest.mark.parametrize("paging", ["none", "ept"])
def test_a_paravirtual_kernel_does_not_start_where_there_are_no_direct_tables(paging: str) -> None:
    native = ("vmm.technique=native",) if paging == "none" else ()
    there, outcome = of_kernel(SWITCHES, *native, paging=paging, interface="paravirtual")

    why = "guest panic: hypervisor interface vtsim-direct not found (CPUID leaves 40000000H and 40000001H)"
    assert [vm.stopped for vm in outcome.vms] == [why]
    assert page_faults(there) == 0


@pytest.mark.parametrize("paging", ["none", "ept", "shadow"])
def test_an_unmodified_kernel_runs_on_the_bare_machine_and_in_a_vm(paging: str) -> None:
    native = ("vmm.technique=native",) if paging == "none" else ()
    _, outcome = of_kernel(FAULTS, *native, paging=paging, interface="hardware")

    assert [vm.stopped for vm in outcome.vms] == [None]


@pytest.mark.parametrize(
    ("setting", "message", "help"),
    [
        ("interface=hardware", "this kernel loads tables of guest-physical addresses, which direct page tables are not",
         "interface can be auto, paravirtual; or choose vmm.paging 'ept', 'shadow'"),
        ("kpti=true", "a paravirtual kernel keeps no separate tables for user mode: Linux turns KPTI off under Xen",
         "kpti can be false; or choose vmm.paging 'ept', 'shadow'"),
        ("page_size=2 MiB", "a paravirtual kernel has 4 KiB pages only: Xen's CPUID has no PSE, and none of its updates takes a large entry",
         "page_size can be 4 KiB; or choose vmm.paging 'ept', 'shadow'"),
    ],
)  # fmt: skip
def test_what_direct_tables_cannot_have_is_the_users_mistake(setting: str, message: str, help: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of_kernel(FAULTS, f"vms.0.guest.kernel.{setting}")

    (problem,) = caught.value.problems
    assert problem.path == "vms.0.guest.kernel." + setting.split("=")[0]
    assert (problem.message, problem.help) == (message, help)


@pytest.mark.parametrize(
    ("processes", "sets", "path", "message", "help"),
    [
        (FAULTS, ("vmm.memory.guest_tables=local",), "vmm.memory.guest_tables",
         "direct page tables name the frames of all others, which are not moved afterwards",
         "guest_tables can be as-data; or choose vmm.paging 'ept', 'shadow'"),
        ("[{phases: [{primitive: mmio_read, address: 0xfeb00000, iterations: 1}]}]", (),
         "vms.0.guest.processes.0.phases.0",
         "a paravirtual kernel finds no emulated device memory: Xen's reach theirs by shared pages, or map a real device's",
         "choose vmm.paging 'ept', 'shadow'"),
    ],
)  # fmt: skip
def test_who_has_direct_tables_neither_moves_them_nor_has_emulated_device_memory(
    processes: str, sets: tuple[str, ...], path: str, message: str, help: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        of_kernel(processes, *sets)

    (problem,) = caught.value.problems
    assert (problem.path, problem.message, problem.help) == (path, message, help)


def test_frames_above_the_devices_hole_have_words_too() -> None:
    """A machine of 4 GiB has its last GiB above 4 GiB."""
    assert frame_words(4 << 30) * mem.PAGE_WORDS == (5 << 30) // mem.PAGE_BYTES
