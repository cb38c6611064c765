"""Mitigations of the host: how often each of their operations is executed, for which exits, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest

from tests.vmm.machines import DATA, Body, Machine, machine, tiny_guest
from tests.vmm.test_exits import DEVICE, cpuid, port, repeat
from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.base.jit import quiet
from vtsim.config import parse_scenario
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels.msrs import command
from vtsim.cpu.profile import Profile, load_profile
from vtsim.cpu.slots import RAX, RBX
from vtsim.ept.tables import PAGING, Table
from vtsim.vmm import layout as at
from vtsim.vmm.mitigations_spec import MitigationsSpec
from vtsim.vmm.programs.mitigations import MSR_FLUSH_CMD, MSR_SPEC_CTRL
from vtsim.vmm.spec import VmmSpec

EXTRA: Final = 100_000  # cycles that a price is raised by: much more than what that moves elsewhere
TIMES: Final = 8
PAGES: Final = 12
NO_FLUSH, PLAIN = "MOV_TO_CR3_NOFLUSH", "MOV_TO_CR3"
ALL: Final = MitigationsSpec(pti=True, spectre_v2="ibrs", spectre_v2_user="on", vmentry_l1d_flush="cond", mds="full")
EACH: Final = {
    "pti": MitigationsSpec(pti=True),
    "retpoline": MitigationsSpec(spectre_v2="retpoline"),
    "ibrs": MitigationsSpec(spectre_v2="ibrs"),
    "prctl": MitigationsSpec(spectre_v2_user="prctl"),
    "cond": MitigationsSpec(vmentry_l1d_flush="cond"),
    "always": MitigationsSpec(vmentry_l1d_flush="always"),
    "mds": MitigationsSpec(mds="full"),
    "all": ALL,
}


def undefined(a: Assembler) -> None:
    """An invalid opcode, whose handler skips it."""
    a.op(ops.UD)


def to_user(a: Assembler) -> None:
    port(a, ops.IN, 0x1234)


def in_kernel(a: Assembler) -> None:
    port(a, ops.IN, 0x4D0, 1)


def device(a: Assembler) -> None:
    """A load of device memory that user space answers, by the emulator."""
    a.ld(RAX, Mem(displacement=DEVICE))


EVENTS: Final[dict[str, Body]] = {"cpuid": cpuid, "in_kernel": in_kernel, "to_user": to_user, "device": device}


def guest(body: Body, times: int) -> Any:
    return tiny_guest(repeat(times, body), devices=(0xC000_0000,))


def dearer(profile: str = "skx-4114", **prices: int) -> Profile:
    """A profile whose prices are raised by these cycles."""
    cpu = load_profile(profile)
    return cpu.with_overrides({f"prices.{name}": cpu.prices[name] + more for name, more in prices.items()})


def ran(body: Body, times: int, mitigations: MitigationsSpec, *, profile: str = "skx-4114", **prices: int) -> Machine:
    cpu = dearer(profile, **prices)
    return machine(guest(body, times), profile=cpu, mitigations=mitigations, populate="prebuilt").run()


def paid(price: str, body: Body, mitigations: MitigationsSpec, profile: str = "skx-4114") -> float:
    """How often a price is paid for one event: what raising it adds to a run of more events."""

    def cycles(times: int, more: int) -> int:
        return int(ran(body, times, mitigations, profile=profile, **{price: more}).engine.cpus[0][s.CYCLE])

    def grown(more: int) -> int:
        return cycles(3 * TIMES, more) - cycles(TIMES, more)

    return round((grown(EXTRA) - grown(0)) / (2 * TIMES * EXTRA), 2)


@pytest.mark.parametrize(("event", "loads"), [("cpuid", 0), ("in_kernel", 0), ("to_user", 2), ("device", 2)])
def test_page_table_isolation_loads_cr3_on_the_way_to_user_space_and_back(event: str, loads: int) -> None:
    assert paid(NO_FLUSH, EVENTS[event], EACH["pti"]) == loads
    assert paid(PLAIN, EVENTS[event], EACH["pti"]) == 0
    assert paid(NO_FLUSH, EVENTS[event], MitigationsSpec()) == 0


def test_without_pcids_these_loads_flush() -> None:
    assert paid(PLAIN, to_user, EACH["pti"], "nehalem-ep") == 2
    assert paid(NO_FLUSH, to_user, EACH["pti"], "nehalem-ep") == 0


@pytest.mark.parametrize(("event", "times"), [("cpuid", 1), ("in_kernel", 1), ("to_user", 2), ("device", 2)])
def test_buffers_are_overwritten_before_each_vm_entry_and_before_user_space(event: str, times: int) -> None:
    assert paid("VERW", EVENTS[event], EACH["mds"]) == times
    assert paid("VERW", EVENTS[event], MitigationsSpec()) == 0


@pytest.mark.parametrize(("event", "flagged"), [("cpuid", 0), ("in_kernel", 0), ("to_user", 1), ("device", 1)])
def test_l1d_is_flushed_once_for_what_kvm_flags_and_always_where_that_is_asked(event: str, flagged: int) -> None:
    assert paid("L1D_FLUSH", EVENTS[event], EACH["cond"]) == flagged
    assert paid("L1D_FLUSH", EVENTS[event], EACH["always"]) == 1


def test_an_exit_that_flags_l1d_has_it_flushed_once() -> None:
    def then_others(a: Assembler) -> None:
        to_user(a)
        for _ in range(3):
            cpuid(a)

    assert paid("L1D_FLUSH", then_others, EACH["cond"]) == 1
    assert paid("L1D_FLUSH", then_others, EACH["always"]) == 4


def test_a_flush_empties_l1d_alone_and_what_is_known_of_its_lines() -> None:
    m = ran(cpuid, TIMES, MitigationsSpec()).engine
    cpu = m.cpus[0]

    def held(cache: int) -> int:
        return sum(m.tags[cpu[cache] + n] >= 0 for n in range(cpu[cache + s.SETS] * cpu[cache + s.WAYS]))

    kept, known = held(s.L2), int(cpu[s.DATA_GENERATION])
    assert held(s.L1D) > 0
    with quiet():
        assert not command(cpu, m.arena, m.tags, MSR_SPEC_CTRL)
        assert held(s.L1D) > 0
        assert command(cpu, m.arena, m.tags, MSR_FLUSH_CMD)
    assert (held(s.L1D), held(s.L2)) == (0, kept)
    assert cpu[s.DATA_GENERATION] > known


def pages_touched() -> Any:
    """A guest that loads from each of its pages."""

    def touch(a: Assembler) -> None:
        for page in range(PAGES):
            a.ld(RAX, Mem(displacement=DATA + 4096 * page))
        a.op(ops.STOP_OP)

    return tiny_guest(touch, pages=PAGES)


def flushes(m: Callable[[int], Machine]) -> int:
    return round((int(m(EXTRA).engine.cpus[0][s.CYCLE]) - int(m(0).engine.cpus[0][s.CYCLE])) / EXTRA)


def test_neither_a_violation_of_ept_flags_l1d_nor_a_table_that_it_fills() -> None:
    def m(more: int) -> Machine:
        return machine(pages_touched(), profile=dearer(L1D_FLUSH=more), mitigations=EACH["cond"]).run()

    assert m(0).exits("EPT_VIOLATION") > PAGES
    assert flushes(m) == 0


def test_on_shadow_tables_every_page_fault_that_exits_flags_l1d() -> None:
    def m(more: int) -> Machine:
        options = {"paging": "shadow", "mitigations": EACH["cond"], "populate": "prebuilt"}
        return machine(pages_touched(), profile=dearer(L1D_FLUSH=more), **options).run()

    faults = m(0).exits("EXCEPTION_NMI")
    assert faults > 0
    assert flushes(m) == faults


@pytest.mark.parametrize("how", ["never", "cond", "always"])
def test_behind_a_flush_every_line_of_the_guest_comes_from_l2(how: str) -> None:
    lines = 40

    def look(a: Assembler) -> None:
        for line in range(lines):
            a.ld(RBX, Mem(displacement=DATA + 64 * line))
        cpuid(a)

    def from_l2(times: int) -> int:
        return ran(look, times, MitigationsSpec(vmentry_l1d_flush=how)).counter("data_l2")

    again = (from_l2(30) - from_l2(10)) / 20
    assert again == (lines if how == "always" else 0)


def test_ibrs_is_set_while_the_host_runs_and_clear_in_guests_and_user_space() -> None:
    assert paid("WRMSR", cpuid, EACH["ibrs"]) == 2
    assert paid("WRMSR", to_user, EACH["ibrs"]) - paid("WRMSR", to_user, MitigationsSpec()) == 4

    def seen(body: Body, where: Callable[[Any], bool]) -> set[int]:
        m = machine(guest(body, TIMES), mitigations=EACH["ibrs"], populate="prebuilt")
        cpu, values, until = m.engine.cpus[0], set(), 0
        while until < 200_000:
            until += 97
            m.engine.run(0, until=until)
            if where(cpu):
                values.add(int(cpu[s.MSR_SPEC_CTRL]))
        return values

    assert seen(cpuid, lambda cpu: cpu[s.NONROOT] != 0) == {0}
    assert 0 in seen(to_user, lambda cpu: cpu[s.NONROOT] == 0 and cpu[s.PRIVILEGE] & 1)
    assert 1 not in seen(to_user, lambda cpu: cpu[s.NONROOT] == 0 and cpu[s.PRIVILEGE] & 1)
    assert 1 in seen(cpuid, lambda cpu: cpu[s.NONROOT] == 0)


@pytest.mark.parametrize(
    ("event", "branches"), [("cpuid", 1), ("in_kernel", 1 + 4), ("to_user", 1 + 4), ("device", 1 + 12 + 4)]
)
def test_indirect_branches_that_were_counted_go_through_thunks(event: str, branches: int) -> None:
    """The table of handlers, but for a misconfiguration, which is called; an I/O bus; the ioctl; the emulator."""
    assert paid("RETPOLINE", EVENTS[event], EACH["retpoline"]) == branches
    assert paid("RETPOLINE", EVENTS[event], EACH["ibrs"]) == 0


@pytest.mark.parametrize("how", ["retpoline", "ibrs"])
def test_the_return_stack_is_stuffed_by_32_calls_behind_each_exit(how: str) -> None:
    plain = paid("CALL", cpuid, MitigationsSpec())

    assert paid("CALL", cpuid, EACH[how]) - plain == 32
    assert paid("CALL", to_user, EACH[how]) - paid("CALL", to_user, MitigationsSpec()) == 32


def in_turns(body: Body, times: int, mitigations: MitigationsSpec, tick_ns: int, **prices: int) -> Machine:
    """Two VMs that share a CPU."""
    guests = [guest(body, times) for _ in range(2)]
    options = {"tick_ns": tick_ns, "mitigations": mitigations, "populate": "prebuilt", "memory": 16 << 20}
    return machine(*guests, profile=dearer(**prices), **options).run()


def count(price: str, body: Body, times: int, mitigations: MitigationsSpec, tick_ns: int) -> int:
    """How often a price is paid in such a run: it is raised by so little that turns stay where they are."""
    few = 4

    def cycles(more: int) -> int:
        return int(in_turns(body, times, mitigations, tick_ns, **{price: more}).engine.cpus[0][s.CYCLE])

    return round((cycles(few) - cycles(0)) / few)


@pytest.mark.parametrize(("how", "barriers"), [("off", 0), ("prctl", 1), ("on", 2)])
def test_a_barrier_comes_with_another_vcpu_and_by_wish_with_its_process(how: str, barriers: int) -> None:
    """Each turn loads a VMCS and a CR3; booting loads a VMCS, too."""

    def body(a: Assembler) -> None:
        a.work(40_000)
        cpuid(a)

    counted = (body, 6, MitigationsSpec(spectre_v2_user=how), 20_000)
    turns = count("VMPTRLD", *counted) - 1
    assert turns > 2
    assert count(PLAIN, *counted) == turns
    assert count("IBPB", *counted) == barriers * turns


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("event", EVENTS)
def test_guests_see_and_do_the_same(name: str, event: str) -> None:
    def seen(mitigations: MitigationsSpec) -> tuple[Any, ...]:
        m = ran(EVENTS[event], TIMES, mitigations)
        cpu = m.engine.cpus[0]
        digests = tuple(int(cpu[slot]) for slot in (s.DIGEST_APPLICATION, s.DIGEST_KERNEL, s.DIGEST_EXCEPTION))
        return m.exits(), digests, m.instructions("vm0", ops.N0), m.instructions("host", ops.R3)

    assert seen(EACH[name]) == seen(MitigationsSpec())


def leaf(m: Machine, root: int, address: int) -> int | None:
    """The frame behind an address of tables of the host."""
    host = m.hypervisor.host
    table = Table(root=root, format=PAGING, take=lambda: 0, words=lambda hfn: host.words(hfn, mem.TABLE))
    found = table.find(address)
    return None if found is None else found.frame


def test_tables_of_user_space_have_of_the_kernel_what_enters_it() -> None:
    m = ran(to_user, TIMES, EACH["pti"])
    host, vcpu = m.hypervisor.host, m.vcpu
    kernel, user = vcpu.process.root, vcpu.process.root + 1
    shared = [at.HOST_TEXT, at.frame_address(host.idt), at.frame_address(m.hypervisor.cpu_pages[0])]
    secret = [at.frame_address(vcpu.page), at.frame_address(vcpu.vmcs), at.frame_address(vcpu.process.root)]

    assert kernel % 2 == 0
    for address in (at.USER_TEXT, at.USER_RUN, at.USER_DATA, *shared):
        assert leaf(m, user, address) is not None
    assert [leaf(m, user, address) for address in secret] == [None] * 3
    assert None not in [leaf(m, kernel, address) for address in secret]


@pytest.mark.parametrize("profile", ["skx-4114", "nehalem-ep"])
def test_user_space_never_runs_on_the_kernels_tables_nor_the_kernel_on_its(profile: str) -> None:
    """Two VMs whose devices are asked all the time; the tick often comes while a device process runs."""
    guests = [guest(to_user, 12) for _ in range(2)]
    m = machine(*guests, profile=profile, tick_ns=8_000, mitigations=ALL, populate="prebuilt", memory=16 << 20)
    cpu = m.engine.cpus[0]
    roots = {vcpu.process.root for vcpu in m.hypervisor.vcpus}
    entry_top = at.frame_address(m.hypervisor.cpu_pages[0]) + at.C["ENTRY_TOP"]
    stacks = [vcpu.address for vcpu in m.hypervisor.vcpus]
    interrupted = 0
    for until in range(1, 600_000, 61):
        m.engine.run(0, until=until)
        if cpu[s.NONROOT]:
            continue
        frame, rsp = int(cpu[s.CR3]) >> 12, int(cpu[s.GPR + s.RSP]) & (1 << 64) - 1
        if cpu[s.PRIVILEGE] & 1:
            assert frame - 1 in roots
            assert leaf(m, frame, stacks[0]) is None
        elif any(0 < stack - rsp <= at.STACK_BYTES for stack in stacks):
            assert frame in roots
        interrupted += 0 < entry_top - rsp <= 168
    assert interrupted > 10
    m.run()
    assert [m.exits("IO_INSTRUCTION", vm) for vm in ("vm0", "vm1")] == [12, 12]
    assert sorted(m.finished) == ["vm0", "vm1"]


# --- mistakes --------------------------------------------------------------------------------------------

CPUID: Final = "vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]\n"


def mistake(text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_scenario(text + CPUID, (), label="s.yaml")
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "path", "column", "message", "help"),
    [
        ("vmm: {mitigations: {kpti: true}}", "vmm.mitigations", 20, "unknown key 'kpti'", "did you mean 'pti'?"),
        (
            "vmm: {mitigations: {zz: 1}}", "vmm.mitigations", 20, "unknown key 'zz'",
            "keys here are pti, spectre_v2, spectre_v2_user, vmentry_l1d_flush, mds",
        ),
        (
            "vmm: {mitigations: {spectre_v2: eibrs}}", "vmm.mitigations.spectre_v2", 32,
            "'eibrs' is not possible here", "did you mean 'ibrs'?",
        ),
        (
            "vmm: {mitigations: {vmentry_l1d_flush: 1}}", "vmm.mitigations.vmentry_l1d_flush", 39,
            "1 is not possible here", "it can be never, cond, always",
        ),
        (
            "vmm: {personality: minimal, mitigations: {mds: full}}", "vmm.mitigations.mds", 47,
            "personality 'minimal' has no mitigations", "leave it out; or choose vmm.personality kvm",
        ),
        (
            "machine: {profile: p4-672}\nvmm: {mitigations: {mds: full, pti: true}}", "vmm.mitigations.mds", 25,
            "p4-672 has no microcode for it",
            "leave it out; or choose machine.profile clx-6252, clx-8269cy, nehalem-ep, skx-4114, snb-e5-2450",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_shown_where_it_is(text: str, path: str, column: int, message: str, help: str) -> None:
    lines = text.splitlines()
    number, source = len(lines), lines[-1]
    expected = f"s.yaml:{number}: {path}: {message}\n{number:>5} | {source}\n      | {' ' * column}^\n help: {help}"

    assert mistake(text + "\n") == expected


def test_what_is_left_out_is_off() -> None:
    assert VmmSpec().mitigations == MitigationsSpec()
    assert not list(MitigationsSpec().chosen)
    assert list(ALL.chosen) == ["pti", "spectre_v2", "spectre_v2_user", "vmentry_l1d_flush", "mds"]
