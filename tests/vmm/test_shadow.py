"""Shadow paging: what the guest sees is what its own tables say."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.oracle.walker import X
from tests.vmm.changing_tables import (
    ADDRESSES,
    CODE_FRAMES,
    CR4_SMEP,
    FIRST_DATA,
    ROOTS,
    USER,
    WINDOW,
    WRITABLE,
    A,
    D,
    P,
    Paging,
    Plan,
    plan,
    signed,
    table_frames,
)
from tests.vmm.machines import MIB, Machine, machine
from tests.vmm.narrow_tables import CR0, CR0_WP, LARGE_FRAMES, TABLES, NarrowPaging, NarrowPlan, narrow_plan
from vtsim.base import jit
from vtsim.base.jit import quiet
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Mem
from vtsim.cpu.codes import PROGRAM_END
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.kernels.shadow_pool import role_in
from vtsim.cpu.profile import load_profile
from vtsim.ept import shadow as d
from vtsim.ept.spec import ADDRESS as PTE_ADDRESS
from vtsim.ept.spec import PF_FETCH, PTE_LARGE
from vtsim.platform.machine import NativeMemory, apply
from vtsim.vmm.personalities.kvm.parameters import PARAMETERS

SEEDS = range(3 if jit.DISABLED else 40)
OFTEN = 2 if jit.DISABLED else 12  # seeds; the others take their minutes only when asked for
STEPS = 150 if jit.DISABLED else 600
WITHOUT_EPT = {"personality": "minimal", "profile": "p4-672", "vpid": False, "tpr_shadow": False}
MACHINES: dict[str, dict[str, Any]] = {
    "ept": {"personality": "kvm", "paging": "ept"},
    "kvm": {"personality": "kvm", "paging": "shadow"},
    "kvm without EPT": {
        "personality": "kvm",
        "paging": "shadow",
        "profile": "p4-672",
        "vpid": False,
        "tpr_shadow": False,
    },
    "kvm without VPID": {"personality": "kvm", "paging": "shadow", "vpid": False},
    "kvm always in sync": {"personality": "kvm", "paging": "shadow", "parameters": (("out_of_sync", 0),)},
    "kvm in large pages": {"personality": "kvm", "paging": "shadow", "page_size": 2 * MIB, "huge_pages": "always"},
    "minimal": {"personality": "minimal", "paging": "shadow"},
    "minimal without EPT": {"paging": "shadow", **WITHOUT_EPT},
}
PAGING = {
    "": Paging(),
    "pcid": Paging(pcid=True),
    "smap": Paging(pcid=True, smap=True),
    "five levels": Paging(pcid=True, five=True),
    "rings": Paging(pcid=True, rings=True),
    "rings with SMEP and SMAP": Paging(pcid=True, smap=True, smep=True, rings=True),
}
NEWER = load_profile("skx-4114").with_overrides({"features.la57": True, "vmx.generation": "ice-lake-sp"})
IN_GATE = {"rings": 3, "rings with SMEP and SMAP": int(not jit.DISABLED)}  # seeds
CASES = [
    pytest.param(paging, seed, marks=pytest.mark.long if seed >= IN_GATE.get(paging, OFTEN) else ())
    for paging in PAGING
    for seed in SEEDS
    if paging in ("", "pcid") or seed < 10
]


def check(made: Any, load: Any) -> None:
    for expected, found in made.seen(load):
        assert found == expected


@pytest.mark.parametrize(("paging", "seed"), CASES)
def test_natively_the_guest_sees_what_the_slow_walker_says(paging: str, seed: int) -> None:
    made = plan(seed, STEPS, PAGING[paging])
    engine = Engine(NEWER, Geometry(memory_bytes=64 * MIB, pool_pages=4096))
    memory = NativeMemory(engine, 64 * MIB)
    with quiet():
        apply(engine, 0, made.guest(memory))
        assert engine.run() == PROGRAM_END
    check(made, lambda gpa: engine.load(gpa))


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize(("paging", "seed"), CASES)
def test_the_guest_never_sees_a_wrong_frame(paging: str, seed: int, name: str) -> None:
    if paging and name.endswith("without EPT"):
        pytest.skip("that processor has no PCIDs")
    made = plan(seed, STEPS, PAGING[paging])
    newer = {"profile": NEWER} if PAGING[paging].five else {}
    m = machine(made.guest, **{**MACHINES[name], **newer}).run()
    assert m.finished == ["vm0"], m.hypervisor.death(m.vcpu)
    check(made, m.vcpu.memory.load)


NARROW = {
    "PAE": NarrowPaging(pae=True),
    "PAE with SMAP": NarrowPaging(pae=True, smap=True),
    "32-bit": NarrowPaging(),
    "32-bit with SMAP": NarrowPaging(smap=True),
    "32-bit of small pages": NarrowPaging(pse=False),
    "protected PAE": NarrowPaging(pae=True, protected=True),
    "protected 32-bit": NarrowPaging(protected=True),
}
NARROW_RINGS = {
    "PAE": NarrowPaging(pae=True, rings=True),
    "PAE with SMEP": NarrowPaging(pae=True, rings=True, smep=True),
    "32-bit": NarrowPaging(rings=True),
    "32-bit with SMEP and SMAP": NarrowPaging(rings=True, smep=True, smap=True),
    "protected PAE": NarrowPaging(pae=True, rings=True, protected=True),
    "protected PAE with SMEP": NarrowPaging(pae=True, rings=True, smep=True, protected=True),
    "protected PAE with SMEP and SMAP": NarrowPaging(pae=True, rings=True, smep=True, smap=True, protected=True),
    "protected 32-bit": NarrowPaging(rings=True, protected=True),
    "protected 32-bit with SMEP": NarrowPaging(rings=True, smep=True, protected=True),
    "protected 32-bit with SMEP and SMAP": NarrowPaging(rings=True, smep=True, smap=True, protected=True),
    "protected 32-bit of small pages": NarrowPaging(rings=True, smep=True, protected=True, pse=False),
}
NARROW_MACHINES = {
    **MACHINES,
    "agile": {"paging": "agile", "profile": NEWER},
    "agile of minimal": {"paging": "agile", "personality": "minimal"},
    "ept of large pages": {"paging": "ept", "page_size": 2 * MIB, "populate": "prebuilt"},
}
PROTECTED = [name for name, paging in NARROW.items() if paging.protected]


NARROW_CASES = [
    (paging, name)
    for paging in NARROW
    for name in MACHINES
    if (name != "ept" or NARROW[paging].protected)
    and not (NARROW[paging].smap and name.endswith("without EPT"))  # that processor has no SMAP
    and (
        name in ("kvm", "ept")
        or not jit.DISABLED
        or (paging in ("PAE", "32-bit", *PROTECTED) and name in ("minimal", "kvm in large pages"))
    )
]


@pytest.mark.parametrize(("paging", "name"), NARROW_CASES)
@pytest.mark.parametrize("seed", range(1 if jit.DISABLED else 3))
def test_a_guest_with_narrow_addresses_never_sees_a_wrong_frame(paging: str, name: str, seed: int) -> None:
    made = narrow_plan(seed, 120 if jit.DISABLED else STEPS, NARROW[paging])
    m = machine(made.guest, **MACHINES[name]).run()
    assert m.finished == ["vm0"], m.hypervisor.death(m.vcpu)
    check(made, m.vcpu.memory.load)


FIRST_RINGS = ("PAE with SMEP", "protected PAE with SMEP and SMAP", "protected 32-bit with SMEP")
INTERPRETED_RINGS = [(paging, name) for paging in FIRST_RINGS[1:] for name in ("native", "ept", "kvm")]
RINGS_SEEDS = {"native": 1 if jit.DISABLED else 8}  # of other machines one
LONG = pytest.mark.long
RINGS_CASES = [
    pytest.param(paging, name, seed, marks=() if paging in FIRST_RINGS and seed < RINGS_SEEDS.get(name, 1) else LONG)
    for paging, modes in NARROW_RINGS.items()
    for name in ("native", *MACHINES)
    for seed in range(8)
    if (modes.protected or name not in ("native", "ept"))  # 64-bit code pages so on shadow tables alone
    and not (modes.smep and name.endswith("without EPT"))  # that processor has no SMEP
    and (not jit.DISABLED or (paging, name) in INTERPRETED_RINGS)
]


@pytest.mark.parametrize(("paging", "name", "seed"), RINGS_CASES)
def test_rings_of_a_guest_with_narrow_addresses_see_what_the_slow_walker_says(
    paging: str, name: str, seed: int
) -> None:
    check_on(narrow_plan(seed, 100 if jit.DISABLED else STEPS, NARROW_RINGS[paging]), name)


def check_on(made: Plan, name: str) -> None:
    """On a machine, or natively, the guest sees what the plan says."""
    if name == "native":
        check(made, ran_natively(made).load)
        return
    m = machine(made.guest, **NARROW_MACHINES[name]).run()
    assert m.finished == ["vm0"], m.hypervisor.death(m.vcpu)
    check(made, m.vcpu.memory.load)


def ran_natively(made: Plan) -> Engine:
    engine = Engine(NEWER, Geometry(memory_bytes=64 * MIB, pool_pages=4096))
    with quiet():
        apply(engine, 0, made.guest(NativeMemory(engine, 64 * MIB)))
        assert engine.run() == PROGRAM_END
    return engine


@pytest.mark.parametrize("paging", PROTECTED)
@pytest.mark.parametrize("seed", range(1 if jit.DISABLED else 3))
def test_natively_a_guest_in_protected_mode_sees_what_the_slow_walker_says(paging: str, seed: int) -> None:
    made = narrow_plan(seed, 120 if jit.DISABLED else STEPS, NARROW[paging])
    engine = ran_natively(made)
    assert engine.cpus[0][s.PAGING_LEVELS] == (3 if NARROW[paging].pae else 2)
    check(made, lambda gpa: engine.load(gpa))


@pytest.mark.parametrize("name", ["ept", "kvm", "minimal", "agile"])
def test_pdptes_that_change_in_memory_are_used_once_cr4_or_cr3_is_loaded(name: str) -> None:
    """An access before the load finds what was loaded, one behind it what is there now."""
    made = NarrowPlan(random.Random(3), NARROW["protected PAE"], 0)
    made.seed = 3
    address = next(at for at in made.addresses if at >> 30 == 2)
    for load in (made.change_cr4, lambda: made.load_root(0, False)):
        for directory in (TABLES[2][1] << 12 | P, 0, TABLES[2][0] << 12 | P):
            made.write(made.place(made.tops[0], 2), directory)
            made.touch(address, False)
            load()
            made.touch(address, False)
    m = machine(made.guest, **NARROW_MACHINES[name]).run()

    assert len({(access.error, access.value) for access in made.log}) >= 2
    assert m.finished == ["vm0"], m.hypervisor.death(m.vcpu)
    check(made, m.vcpu.memory.load)


@pytest.mark.parametrize("name", ["native", *NARROW_MACHINES])
def test_pdptes_are_loaded_by_a_write_of_cr4_smep_or_refused(name: str) -> None:
    """Which kvm has exit with EPT, too; SMEP is not on after the write that is refused: ring 0 fetches a user's page."""
    if name.endswith("without EPT"):
        pytest.skip("that processor has no SMEP")
    made = NarrowPlan(random.Random(3), NarrowPaging(pae=True, protected=True, rings=True, smep=True), 0)
    made.seed = 3
    address = next(each for each in made.addresses if made.code(each) and not made.refused(each, X, False))
    directory = made.place(made.tops[0], address >> 30)
    before = made.words[directory]
    made.touch(address, False, fetch=True)
    for value in (0, before):
        made.write(directory, value)
        made.change_cr4(CR4_SMEP)
        made.touch(address, False, fetch=True)
    made.refused_load(directory, 4, made.cr4 ^ CR4_SMEP)
    made.touch(address, False, fetch=True)

    faults = [access.error for access in made.log]
    assert faults == [-1, PF_FETCH, -1, 0, -1]
    check_on(made, name)


@pytest.mark.parametrize("name", ["native", *NARROW_MACHINES])
def test_what_an_access_may_do_changes_with_cr0_wp_and_cr4_smep_though_nothing_is_invalidated(name: str) -> None:
    """Also where these writes exit, and translations stay for their VPID; a page that ring 0 stored to, and fetched."""
    made = NarrowPlan(random.Random(3), NarrowPaging(protected=True, rings=True, smep=True), 0)
    made.seed = 3
    if name.endswith("without EPT"):
        pytest.skip("that processor has no SMEP")
    data, code = made.addresses[:2]
    table = TABLES[1][0] << 12
    made.write(made.place(made.tops[0], data >> 22), table | P | WRITABLE | USER | A)
    made.write(made.place(table, data >> 12 & 1023), FIRST_DATA << 12 | P | USER | A | D)
    made.write(made.place(table, code >> 12 & 1023), CODE_FRAMES[0] << 12 | P | USER | A)
    made.load_root(0, False)
    for _ in range(2):
        for protects in (False, True):
            made.write_protect = protects
            made.write_register(0, CR0 if protects else CR0 & ~CR0_WP)
            made.touch(data, True)
            made.touch(data, False, user=True)
        for _ in range(2):
            made.touch(code, False, fetch=True)
            made.change_cr4(CR4_SMEP)
            made.touch(code, False, user=True, fetch=True)

    assert [access.error for access in made.log] == 2 * [-1, -1, 3, -1, -1, -1, 0x11, -1]
    check_on(made, name)


@pytest.mark.parametrize("name", ["kvm", "minimal", "agile", "agile of minimal"])
def test_a_write_of_cr0_that_loads_the_pdptes_again_loads_those_that_there_are(name: str) -> None:
    """CR0.CD, which the minimal hypervisor leaves to the processor: there they are those of the shadow table."""

    def ran(*values: int) -> Machine:
        made = NarrowPlan(random.Random(3), NARROW["protected PAE"], 0)
        made.seed = 3
        address = next(each for each in made.addresses if made.expected(each, False).error == -1)
        made.touch(address, False)
        for value in values:
            made.write_register(0, value)
        made.touch(address, False)
        m = machine(made.guest, **NARROW_MACHINES[name]).run()
        assert m.finished == ["vm0"], m.hypervisor.death(m.vcpu)
        check(made, m.vcpu.memory.load)
        return m

    plain, changed = ran(), ran(CR0 | 1 << 30, CR0)
    assert changed.exits().get("CR_ACCESS", 0) == (0 if "minimal" in name else 2)
    assert changed.exits("EXCEPTION_NMI") == plain.exits("EXCEPTION_NMI")


@pytest.mark.parametrize("name", ["native", "ept", "ept of large pages", "kvm", "minimal", "agile"])
def test_invlpg_of_one_half_of_a_page_of_4_mib_drops_the_other_half_too(name: str) -> None:
    """A TLB has two pages of 2 MiB for it."""
    made = NarrowPlan(random.Random(3), NARROW["protected 32-bit"], 0)
    made.seed = 3
    one, other = made.addresses[0], made.addresses[0] + (1 << 21)
    place = made.place(made.tops[0], one >> 22)
    for frame in (*LARGE_FRAMES, *LARGE_FRAMES):
        made.write(place, frame << 12 | P | WRITABLE | A | D | PTE_LARGE)
        made.invalidate(one)
        for address in (one, other):
            made.touch(address, False)

    assert len({access.value for access in made.log}) == 4
    check_on(made, name)


def shared_leaf(made: Plan, address: int) -> int:
    """Where the one 4 KiB entry stands that translates an address for both roots; 0 if there is none."""
    found = set()
    for root in ROOTS:
        at, entry = 0, root << 12 | P
        for level in (4, 3, 2, 1):
            if not entry & P or entry & PTE_LARGE:
                return 0
            at = (entry & PTE_ADDRESS) | ((address >> (3 + 9 * level)) & 511) << 3
            entry = made.words[at]
        found.add(at if entry & P else 0)
    return found.pop() if len(found) == 1 else 0


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["ept", "kvm", "minimal"])
def test_invpcid_drops_what_it_names_in_the_address_space_in_use_and_in_others(name: str, kind: int) -> None:
    """An entry changes, from the second time on without an exit; an access finds the new one once its PCID was named."""
    made = Plan(random.Random(5), Paging(pcid=True), 0)
    made.seed = 5
    address, at = next((each, found) for each in ADDRESSES if (found := shared_leaf(made, each)))
    for root in (1, 0):
        made.load_root(root, False)
        made.touch(address, False)
    for frame in range(FIRST_DATA, FIRST_DATA + 6, 2):
        made.change(at, frame << 12 | P | WRITABLE | USER | A | D)
        made.invalidate_pcid(kind, 0, address)
        made.touch(address, False)
        made.invalidate_pcid(kind, 1, address)
        made.load_root(1, True)
        made.touch(address, False)
        made.change(at, frame + 1 << 12 | P | WRITABLE | USER | A | D)
        made.invalidate_pcid(kind, 0, address)
        made.load_root(0, True)
        made.touch(address, False)

    m = machine(made.guest, **MACHINES[name]).run()
    assert m.finished == ["vm0"], m.hypervisor.death(m.vcpu)
    check(made, m.vcpu.memory.load)


UPPER_TABLES = [frame for level in (3, 2) for frame in table_frames(level)]
EMULATED = 3  # stores to them: two are not in use
# fields of the VMCS that KVM reads, each once, for a page fault of the guest's own, a store to a table, a load of CR3
OF_A_FAULT = ("EXIT_REASON", "IDT_VECTORING_INFORMATION", "EXIT_INTERRUPTION_INFORMATION", "EXIT_QUALIFICATION",
              "EXIT_INTERRUPTION_ERROR_CODE", "GUEST_RFLAGS")  # fmt: skip
OF_AN_EMULATED_STORE = (*OF_A_FAULT, "GUEST_RIP", "CR0_READ_SHADOW")
OF_A_LOAD_OF_CR3 = ("EXIT_REASON", "IDT_VECTORING_INFORMATION", "EXIT_QUALIFICATION", "GUEST_RFLAGS",
                    "EXIT_INSTRUCTION_LENGTH", "GUEST_RIP", "GUEST_INTERRUPTIBILITY_STATE")  # fmt: skip


def stores_to_tables(number: int, **options: Any) -> Machine:
    """Everything is mapped, then the first entries of so many upper tables are stored once more as they are."""
    made = Plan(random.Random(5), Paging(), 0)
    made.seed = 5
    for address in ADDRESSES:
        made.touch(address, False)
    for frame in UPPER_TABLES:
        made.emits.append(lambda a, at=frame << 12: a.ld(s.RAX, Mem(displacement=WINDOW + at)))
    for frame in UPPER_TABLES[:number]:
        value = signed(made.words[frame << 12])
        made.emits.append(lambda a, at=frame << 12, value=value: a.st_value(Mem(displacement=WINDOW + at), value))
    m = machine(made.guest, paging="shadow", **options).run()
    assert m.finished == ["vm0"], m.hypervisor.death(m.vcpu)
    check(made, m.vcpu.memory.load)
    return m


@pytest.mark.slow
def test_kvm_emulates_a_store_to_a_table_without_a_look_for_the_hosts_page_and_walks_for_its_operand() -> None:
    """What it executes once more for each: instructions with a length that is longer by a hundred."""

    def instructions(*parameters: tuple[str, int]) -> int:
        first, more = (stores_to_tables(n, parameters=parameters) for n in (0, len(UPPER_TABLES)))
        emulated = more.exits("EXCEPTION_NMI") - first.exits("EXCEPTION_NMI")
        assert emulated == EMULATED
        return (more.instructions("host", ops.R0) - first.instructions("host", ops.R0)) // emulated

    names = ("tracked_write", "emulate", "emulate_paged", "table_written", "guest_walk", "get_user_page", "map_shadow")
    executed = {name: (instructions((name, PARAMETERS[name].value + 100)) - instructions()) // 100 for name in names}

    assert executed == {**dict.fromkeys(names, 1), "guest_walk": 2, "get_user_page": 0, "map_shadow": 0}


def vmreads(run: Any) -> int:
    """How often a run executes VMREAD."""

    def cycles(price: int) -> int:
        profile = load_profile("skx-4114").with_overrides({"prices.VMREAD": price})
        return int(run(profile).engine.cpus[0][s.CYCLE])

    return cycles(1001) - cycles(1000)


def test_kvm_reads_each_field_of_an_exit_once() -> None:
    def steps(number: int, *, load: bool) -> Any:
        made = Plan(random.Random(5), Paging(pcid=True), 0)
        made.seed = 5
        address = next(each for each in ADDRESSES if made.expected(each, False).error == 0)
        for _ in range(number):
            if load:
                made.load_root(0, False)
            else:
                made.touch(address, False)
        return lambda profile: machine(made.guest, paging="shadow", profile=profile).run()

    def stores(number: int) -> Any:
        return lambda profile: stores_to_tables(number, profile=profile)

    for load, fields in ((False, OF_A_FAULT), (True, OF_A_LOAD_OF_CR3)):
        assert vmreads(steps(5, load=load)) - vmreads(steps(2, load=load)) == 3 * len(fields)
    assert vmreads(stores(len(UPPER_TABLES))) - vmreads(stores(0)) == EMULATED * len(OF_AN_EMULATED_STORE)


def test_smep_makes_another_shadow_page_of_a_table_only_while_wp_is_clear() -> None:
    def roles(mode: int) -> set[int]:
        return {role_in(each, 2, d.ALL_RIGHTS, False) for each in (mode, mode | d.MODE_SMEP)}

    assert len(roles(d.MODE_PAGING | d.MODE_WP)) == 1
    assert len(roles(d.MODE_PAGING)) == 2
