"""VMX instructions of a guest: exits, VMCS shadowing, VM functions.

SDM: "VM-Function Controls"; "VMCS Shadowing Bitmap Addresses"; "VMCS Types: Ordinary and Shadow".
SDM: "VM Functions"; "EPTP Switching"; "VMFUNC—Invoke VM Function".
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cpu.bench import DATA, END, TEXT, USER_TEXT, Virtual, exits, o_mem, virtual
from vtsim.base import memory as mem
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.ept.tables import EPT, EPT_PAGE, host_table
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import state as h
from vtsim.vmcs.fields import BY_NAME, SLOT

REASONS = {
    o.VMXON: x.VMON, o.VMXOFF: x.VMOFF, o.VMCLEAR: x.VMCLEAR, o.VMPTRLD: x.VMPTRLD, o.VMPTRST: x.VMPTRST,
    o.VMREAD: x.VMREAD, o.VMWRITE: x.VMWRITE, o.VMLAUNCH: x.VMLAUNCH, o.VMRESUME: x.VMRESUME, o.VMCALL: x.VMCALL,
    o.INVEPT: x.INVEPT, o.INVVPID: x.INVVPID,
}  # fmt: skip
GUEST_RIP, NO_FIELD = BY_NAME["GUEST_RIP"].encoding, 0x7FFE
UD, GP = 6, 13


def instruction(op: int) -> Callable[[Assembler], None]:
    """One VMX instruction with operands that would fail in many ways, were they looked at."""
    operands = op in (o.VMREAD, o.VMWRITE)
    return lambda a: a.emit(op, s.RBX, s.RCX if operands else s.NO_REGISTER, mem=o_mem(DATA), length=4)


@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize("op", REASONS, ids=lambda op: o.OPS[op].name)
def test_a_vmx_instruction_of_a_guest_exits_in_every_ring(op: int, ring: int) -> None:
    bench = virtual()

    assert exits(bench, instruction(op), ring) == REASONS[op]
    assert bench.field("GUEST_RIP") == (USER_TEXT if ring else TEXT)
    assert bench.field("EXIT_INSTRUCTION_LENGTH") == 4


@pytest.mark.parametrize("op", [o.VMREAD, o.VMXOFF, o.INVEPT], ids=lambda op: o.OPS[op].name)
def test_in_compatibility_mode_it_is_unknown_before_it_exits(op: int) -> None:
    bench = virtual()
    bench.set(EXCEPTION_BITMAP=1 << UD)

    bench.guest.code(instruction(op))
    bench.host()
    bench.enter(TEXT)
    bench.engine.run(ops=3)  # VMXON, VMPTRLD, VMLAUNCH
    assert bench.m[s.NONROOT]
    bench.m[s.CS_ACCESS_RIGHTS] &= ~(1 << 13)

    assert bench.engine.run(ops=100) == 4
    assert bench.reason == x.EXCEPTION_NMI
    assert bench.field("EXIT_INTERRUPTION_INFORMATION") & 0xFF == UD


# --- VMCS shadowing -------------------------------------------------------------------------------------------------


def shadowing(link: bool = True, **fields: int) -> tuple[Virtual, int]:
    """A guest whose VMREAD and VMWRITE go to a shadow VMCS, and the frame of that."""
    bench = virtual()
    reads, writes, shadow = (bench.engine.allocate() for _ in range(3))
    bench.engine.store(shadow << 12, int(bench.m[s.VMX_REVISION]) | h.SHADOW)
    bench.set(
        SECONDARY_PROC_CONTROLS=bench.field("SECONDARY_PROC_CONTROLS") | b.VMCS_SHADOWING,
        VMREAD_BITMAP_ADDRESS=reads << 12, VMWRITE_BITMAP_ADDRESS=writes << 12,
        VMCS_LINK_POINTER=shadow << 12 if link else -1, **fields,
    )  # fmt: skip
    return bench, shadow


def field_of(bench: Virtual, frame: int, name: str) -> int:
    return int(bench.engine.contents(frame, mem.VMCS_REGION)[SLOT[name]])


def access(op: int, encoding: int, value: int = 0) -> Callable[[Assembler], None]:
    def write(a: Assembler) -> None:
        a.mov(s.RCX, encoding)
        a.mov(s.RBX, value)
        a.op(op, s.RBX, s.RCX)

    return write


def test_a_shadowed_vmwrite_and_vmread_reach_the_shadow_vmcs_without_an_exit() -> None:
    bench, shadow = shadowing()

    def write(a: Assembler) -> None:
        access(o.VMWRITE, GUEST_RIP, 0x1234)(a)
        a.mov(s.RBX, 0)
        a.op(o.VMREAD, s.RBX, s.RCX)

    assert exits(bench, write) is None
    assert field_of(bench, shadow, "GUEST_RIP") == bench.reg(s.RBX) == 0x1234
    assert bench.field("GUEST_RIP") == TEXT


@pytest.mark.parametrize("op", [o.VMREAD, o.VMWRITE], ids=["VMREAD", "VMWRITE"])
def test_a_bit_of_the_bitmap_makes_one_encoding_exit(op: int) -> None:
    for encoding, ended in ((GUEST_RIP, REASONS[op]), (GUEST_RIP + 2, None)):
        bench, _ = shadowing()
        bitmap = bench.field("VMREAD_BITMAP_ADDRESS" if op == o.VMREAD else "VMWRITE_BITMAP_ADDRESS")
        bench.engine.store(bitmap + GUEST_RIP // 64 * 8, 1 << GUEST_RIP % 64)

        assert exits(bench, access(op, encoding)) == ended


@pytest.mark.parametrize("bit", [15, 16, 31, 32, 63])
def test_an_encoding_beyond_the_bitmaps_exits(bit: int) -> None:
    bench, _ = shadowing()

    assert exits(bench, access(o.VMREAD, mem.signed(GUEST_RIP | 1 << bit))) == x.VMREAD


def test_without_the_control_nothing_is_shadowed() -> None:
    bench, _ = shadowing(link=False)
    bench.set(SECONDARY_PROC_CONTROLS=bench.field("SECONDARY_PROC_CONTROLS") & ~b.VMCS_SHADOWING)

    assert exits(bench, access(o.VMREAD, GUEST_RIP)) == x.VMREAD


def test_without_a_shadow_vmcs_a_shadowed_access_fails_invalid() -> None:
    bench, _ = shadowing(link=False)

    assert exits(bench, access(o.VMREAD, GUEST_RIP)) is None
    assert int(bench.m[s.RFLAGS]) & 0x8D5 == 1


def test_a_shadowed_access_of_no_component_is_error_12() -> None:
    bench, _ = shadowing()

    assert exits(bench, access(o.VMREAD, NO_FIELD)) is None
    assert int(bench.m[s.RFLAGS]) & 0x8D5 == 0x40
    assert bench.field("VM_INSTRUCTION_ERROR") == 12


def test_a_shadowed_access_outside_ring_0_is_refused() -> None:
    bench, _ = shadowing(EXCEPTION_BITMAP=1 << GP)

    assert exits(bench, access(o.VMREAD, GUEST_RIP), 3) == x.EXCEPTION_NMI
    assert bench.field("EXIT_INTERRUPTION_INFORMATION") & 0xFF == GP


# --- VM functions ---------------------------------------------------------------------------------------------------


def function(number: int, index: int = 0) -> Callable[[Assembler], None]:
    def write(a: Assembler) -> None:
        a.mov(s.RAX, number)
        a.mov(s.RCX, index)
        a.op(o.VMFUNC)

    return write


def switching(*, enabled: bool = True) -> tuple[Virtual, int]:
    """A guest that may switch EPTPs, and the address of its EPTP list."""
    bench = virtual()
    eptps = bench.engine.allocate() << 12
    bench.set(
        SECONDARY_PROC_CONTROLS=bench.field("SECONDARY_PROC_CONTROLS") | (b.ENABLE_VM_FUNCTIONS if enabled else 0),
        VM_FUNCTION_CONTROLS=b.EPTP_SWITCHING, EPTP_LIST_ADDRESS=eptps, EXCEPTION_BITMAP=1 << UD,
    )  # fmt: skip
    return bench, eptps


@pytest.mark.parametrize(("enabled", "number"), [(False, 0), (True, 64), (True, 0xFFFF_FFFF)])
def test_vmfunc_is_unknown_without_the_control_and_beyond_function_63(enabled: bool, number: int) -> None:
    bench, _ = switching(enabled=enabled)

    assert exits(bench, function(number)) == x.EXCEPTION_NMI
    assert bench.field("EXIT_INTERRUPTION_INFORMATION") & 0xFF == UD


@pytest.mark.parametrize("number", [1, 63])
def test_a_vm_function_that_is_not_enabled_exits(number: int) -> None:
    bench, _ = switching()

    assert exits(bench, function(number)) == x.VMFUNC
    assert bench.field("EXIT_INSTRUCTION_LENGTH") == 3


@pytest.mark.parametrize(
    ("index", "eptp"), [(512, 0x1E), (1 << 31, 0x1E), (3, 0), (3, 0x1000 | 1 << 3 | 6), (3, 1 << 50 | 0x1E)]
)
def test_eptp_switching_exits_on_a_wrong_index_or_an_eptp_that_vm_entry_would_refuse(index: int, eptp: int) -> None:
    bench, eptps = switching()
    bench.engine.store(eptps + 8 * 3, eptp)

    assert exits(bench, function(0, index)) == x.VMFUNC


@pytest.mark.parametrize("ring", [0, 3])
def test_eptp_switching_changes_what_guest_physical_addresses_mean(ring: int) -> None:
    bench, eptps = switching()
    guest, engine = bench.guest, bench.engine
    other = host_table(engine, EPT)
    leaf, spare = guest.table.find(DATA), engine.allocate()
    assert leaf is not None
    engine.store(spare << 12, 0x2222)
    guest.put(DATA, 0x1111)
    eptp = other.root << 12 | 0x1E
    engine.store(eptps + 8 * 5, eptp)

    def write(a: Assembler) -> None:
        a.ld(s.RBX, o_mem(DATA))
        function(0, 5)(a)
        a.ld(s.RBP, o_mem(DATA))

    base = USER_TEXT if ring else TEXT
    guest.code(lambda a: a.op(o.NOP), base)  # maps the page of the program, so that both tables have it
    for gfn, hfn in guest.frames.items():
        other.map(gfn << 12, spare if gfn == leaf.frame else hfn, EPT_PAGE)

    assert exits(bench, write, ring) is None
    assert int(bench.m[s.STOP_A]) == END
    assert (bench.reg(s.RBX), bench.reg(s.RBP)) == (0x1111, 0x2222)
    assert (bench.field("EPT_POINTER"), bench.field("EPTP_INDEX")) == (eptp, 5)
