"""Views of a VM's memory: EPTPs in a list, VMFUNC, what a view protects, virtualization exceptions.

SDM: "VM-Function Controls"; "EPTP Switching"; "VMFUNC—Invoke VM Function".
SDM: "Controls for Virtualization Exceptions"; "Virtualization Exceptions"; "Monitor Trap Flag".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.vmm.machines import DATA, MIB, Body, Machine, machine, tiny_guest
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.profile import load_profile
from vtsim.cpu.slots import R8, R12, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.ept import views as w
from vtsim.vmm import layout as at

UD, VE = 6, 20
ANSWERS, AREA, WATCHED, OTHER = (DATA + 4096 * n for n in range(4))
DEVICE = DATA + (1 << 30)
REGISTERS = (0xFE00_0000, 0xFE00_5000)  # guest-physical, of no device, one table of EPT for both
FIRST_DATA = 0x14B  # guest frame of the first page of data, where the code has one page
NO_EXITS: dict[str, int] = {}


def gpa(linear: int) -> int:
    """Guest-physical address of a data page."""
    return FIRST_DATA + (linear - DATA >> 12) << 12


def call(a: Assembler, number: int, rdi: int = 0, rsi: int = 0, rdx: int = 0) -> None:
    for register, value in ((RDI, rdi), (RSI, rsi), (RDX, rdx), (RAX, number)):
        a.mov(register, value)
    a.op(ops.VMCALL)


def protect(a: Assembler, what: int, view: int = w.RESTRICTED, page: int = WATCHED) -> None:
    call(a, w.PROTECT, view, gpa(page), what)


def function(a: Assembler, view: int) -> None:
    a.mov(RAX, 0)
    a.mov(RCX, view)
    a.op(ops.VMFUNC)


def store(a: Assembler, value: int, linear: int = WATCHED) -> None:
    a.mov(RBX, value)
    a.st(Mem(displacement=linear), RBX)


def keep(a: Assembler, word: int, register: int = RAX) -> None:
    a.st(Mem(displacement=ANSWERS + 8 * word), register)


def repeat(a: Assembler, times: int, emit: Body) -> None:
    a.mov(R8, times)
    a.label("again")
    emit(a)
    a.sub(R8, 1)
    a.jcc(ops.CC_NZ, "again")


def handler(a: Assembler, *, clears: bool = True) -> None:
    """`gate_20`: count, make the store of RBX in the permissive view, go on behind it."""
    a.label("gate_20")
    a.ld(R12, Mem(displacement=ANSWERS + 64))
    a.add(R12, 1)
    a.st(Mem(displacement=ANSWERS + 64), R12)
    for word, field in enumerate((w.LINEAR, w.PHYSICAL), 9):
        a.ld(RDX, Mem(displacement=AREA + field))
        keep(a, word, RDX)
    function(a, w.PERMISSIVE)
    a.ld(RDX, Mem(displacement=AREA + w.LINEAR))
    a.st(Mem(RDX), RBX)
    a.ld(RCX, Mem(displacement=AREA + w.INDEX, size=2))
    a.mov(RAX, 0)
    a.op(ops.VMFUNC)
    if clears:
        a.st_value(Mem(displacement=AREA + w.BUSY, size=4), 0)
    a.ld(RDX, Mem(RSP))
    a.add(RDX, STORE_BYTES)
    a.st(Mem(RSP), RDX)
    a.op(ops.IRET)


def _store_bytes() -> int:
    a = Assembler("store", DATA)
    store(a, 0)
    return a.here - a.assemble().instructions[-1].at


STORE_BYTES = _store_bytes()


def ran(
    body: Body, personality: str = "minimal", *, gates: tuple[int, ...] = (), views: int = 2, **more: Any
) -> Machine:
    """A VM of several views whose guest has executed `body`, and the handlers that it writes behind STOP."""
    devices = more.pop("devices", ())
    build = tiny_guest(body, pages=4, gates=gates, devices=devices)
    m = machine(build, personality=personality, views=views, memory=16 * MIB, host_memory=128 * MIB, **more).run()
    assert m.finished == ["vm0"], m.hypervisor.deaths(0)
    return m


def ended(*parts: Body) -> Body:
    """Parts of a guest, one after the other, up to its end."""

    def body(a: Assembler) -> None:
        for part in parts:
            part(a)
        a.op(ops.STOP_OP)

    return body


def watched(m: Machine, page: int = WATCHED) -> int:
    return m.data(0, page=page - DATA >> 12)


def held(m: Machine) -> int:
    return m.hypervisor.word(m.vcpu, "WATCHED_WRITES")


# --- switching -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rounds", [1, 7])
def test_a_switch_by_vmfunc_is_no_exit_and_by_vmcall_one(personality: str, rounds: int) -> None:
    def by(switch: Callable[[Assembler, int], None]) -> dict[str, int]:
        def there_and_back(a: Assembler) -> None:
            switch(a, w.PERMISSIVE)
            switch(a, w.RESTRICTED)

        return ran(ended(lambda a: repeat(a, rounds, there_and_back)), personality).exits()  # type: ignore[no-any-return]

    assert by(function) == NO_EXITS
    assert by(lambda a, view: call(a, w.SWITCH, view)) == {"VMCALL": 2 * rounds}


@pytest.mark.parametrize("by", [function, lambda a, view: call(a, w.SWITCH, view)], ids=["VMFUNC", "VMCALL"])
def test_a_switch_drops_no_translation_and_a_view_that_was_visited_needs_no_walk(by: Any) -> None:
    def visits(rounds: int) -> Machine:
        def all_views(a: Assembler) -> None:
            for view in (2, 1, 0):
                by(a, view)
                a.ld(RBX, Mem(displacement=OTHER))

        return ran(ended(lambda a: repeat(a, rounds, all_views)), views=3)

    twice, often = visits(2), visits(9)

    assert twice.counter("translations_dropped") == often.counter("translations_dropped") == 0
    assert twice.counter("walks") == often.counter("walks") > 0
    assert twice.counter("nested_tlb_misses") == often.counter("nested_tlb_misses") > 0


@pytest.mark.parametrize("view", [2, 511, 512, 1 << 31])
def test_an_index_without_an_eptp_exits_and_is_an_invalid_opcode(personality: str, view: int) -> None:
    """KVM answers a VMFUNC that exits by #UD where its guest has no VMX (handle_vmx_instruction)."""

    def handled(a: Assembler) -> None:
        a.label("gate_6")
        a.mov(RBX, 0x6)
        keep(a, 0, RBX)
        a.op(ops.STOP_OP)

    m = ran(ended(lambda a: function(a, view), handled), personality, gates=(UD,))

    assert m.exits() == {"VMFUNC": 1}
    assert m.data(0) == UD


def test_vmfunc_is_unknown_to_a_vm_of_one_view() -> None:
    def handled(a: Assembler) -> None:
        a.label("gate_6")
        a.op(ops.STOP_OP)

    minimal = ran(ended(lambda a: function(a, 0), handled), gates=(UD,), views=1)

    assert minimal.exits("VMFUNC") == 0
    assert minimal.counter("exceptions") == 1


# --- hypercalls ------------------------------------------------------------------------------------------------------
REFUSED_CALLS = {
    "a view that is none": (w.SWITCH, 2, 0, 0),
    "a view that is none, protected": (w.PROTECT, 2, gpa(WATCHED), w.EXITS),
    "the view in which stores are let through": (w.PROTECT, w.PERMISSIVE, gpa(WATCHED), w.EXITS),
    "no way to protect": (w.PROTECT, w.RESTRICTED, gpa(WATCHED), w.ALLOWED + 1),
    "what is no memory": (w.PROTECT, w.RESTRICTED, 1 << 40, w.EXITS),
    "the page behind memory": (w.PROTECT, w.RESTRICTED, 16 * MIB, w.EXITS),
    "information that is nowhere": (w.NOTIFY, 1 << 40, 0, 0),
}


@pytest.mark.parametrize("what", REFUSED_CALLS)
def test_a_call_without_sense_is_refused_and_changes_nothing(what: str) -> None:
    def asks(a: Assembler) -> None:
        call(a, *REFUSED_CALLS[what])
        keep(a, 0)
        store(a, 5)

    m = ran(ended(asks))

    assert m.data(0) == w.REFUSED
    assert m.exits() == {"VMCALL": 1}
    assert watched(m) == 5


def test_an_area_that_a_view_protects_is_no_place_for_information() -> None:
    def asks(a: Assembler) -> None:
        protect(a, w.EXITS)
        function(a, w.PERMISSIVE)
        protect(a, w.ALLOWED, view=2, page=OTHER)  # whose tables the hypervisor used last
        call(a, w.NOTIFY, gpa(WATCHED))
        keep(a, 0)

    assert ran(ended(asks), views=3).data(0) == w.REFUSED


def test_a_processor_without_virtualization_exceptions_refuses_them_and_the_rest_works(personality: str) -> None:
    haswell = load_profile("skx-4114").with_overrides({"vmx.generation": "haswell"})

    def asks(a: Assembler) -> None:
        call(a, w.NOTIFY, gpa(AREA))
        keep(a, 0)
        protect(a, w.RAISES)
        store(a, 7)

    m = ran(ended(asks), personality, profile=haswell)

    assert (m.data(0), watched(m), held(m)) == (w.REFUSED, 7, 1)


# --- stores ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stores", [1, 5])
def test_a_store_to_a_protected_page_exits_twice_and_is_made(personality: str, stores: int) -> None:
    def body(a: Assembler) -> None:
        protect(a, w.EXITS)
        repeat(a, stores, lambda a: store(a, 0x77))
        a.ld(RAX, Mem(displacement=WATCHED))
        keep(a, 0)

    m = ran(ended(body), personality)

    assert m.exits() == {"VMCALL": 1, "EPT_VIOLATION": stores, "MONITOR_TRAP_FLAG": stores}
    assert (m.data(0), watched(m), held(m)) == (0x77, 0x77, stores)
    words = m.vcpu.view_list << 12
    assert m.field(m.vcpu, "EPT_POINTER") == m.engine.load(words)
    assert m.engine.load(words + at.STEP["ADDRESS"]) == gpa(WATCHED)


def test_loads_and_stores_elsewhere_and_stores_in_another_view_do_not_exit(personality: str) -> None:
    def body(a: Assembler) -> None:
        protect(a, w.EXITS)
        a.ld(RAX, Mem(displacement=WATCHED))
        store(a, 1, OTHER)
        function(a, w.PERMISSIVE)
        store(a, 2)
        function(a, w.RESTRICTED)

    m = ran(ended(body), personality)

    assert m.exits() == {"VMCALL": 1}
    assert (watched(m), watched(m, OTHER)) == (2, 1)


def test_a_page_that_is_allowed_again_is_as_all_others() -> None:
    def body(a: Assembler) -> None:
        protect(a, w.EXITS)
        protect(a, w.ALLOWED)
        store(a, 3)

    m = ran(ended(body))

    assert m.exits() == {"VMCALL": 2}
    assert watched(m) == 3


def test_each_view_has_rights_of_its_own() -> None:
    """Of three views the first and the last protect the page; in which a store is made, VMFUNC says."""

    def body(a: Assembler) -> None:
        protect(a, w.EXITS)
        protect(a, w.EXITS, view=2)
        for number, view in enumerate((2, 1, 2, 0)):
            function(a, view)
            store(a, number)

    m = ran(ended(body), views=3)

    assert m.exits() == {"VMCALL": 2, "EPT_VIOLATION": 3, "MONITOR_TRAP_FLAG": 3}
    assert watched(m) == 3


# --- virtualization exceptions -----------------------------------------------------------------------------------------
def notified(*parts: Body, what: int = w.RAISES) -> Body:
    def begin(a: Assembler) -> None:
        a.mov(RSP, RSP_AT)
        call(a, w.NOTIFY, gpa(AREA))
        protect(a, what)

    return ended(begin, *parts)


RSP_AT = 0x3000_0000


@pytest.mark.parametrize("stores", [1, 5])
def test_a_store_that_raises_an_exception_is_made_without_an_exit(personality: str, stores: int) -> None:
    body = notified(lambda a: repeat(a, stores, lambda a: store(a, 0x99)))

    m = ran(lambda a: (body(a), handler(a))[0], personality, gates=(VE,))

    assert m.exits() == {"VMCALL": 2}
    assert (m.data(64), watched(m), held(m)) == (stores, 0x99, 0)
    assert (m.data(72), m.data(80)) == (WATCHED, gpa(WATCHED))
    assert m.counter("exceptions") == stores


def test_while_the_busy_word_is_set_such_a_store_exits(personality: str) -> None:
    """The handler leaves it set: the first store is its, the others are the hypervisor's."""
    body = notified(lambda a: repeat(a, 4, lambda a: store(a, 0x55)))

    m = ran(lambda a: (body(a), handler(a, clears=False))[0], personality, gates=(VE,))

    assert m.exits() == {"VMCALL": 2, "EPT_VIOLATION": 3, "MONITOR_TRAP_FLAG": 3}
    assert (m.data(64), watched(m), held(m)) == (1, 0x55, 3)


def test_a_page_whose_entry_suppresses_exceptions_exits() -> None:
    body = notified(lambda a: store(a, 0x44), what=w.EXITS)

    m = ran(lambda a: (body(a), handler(a))[0], gates=(VE,))

    assert (m.exits("EPT_VIOLATION"), m.data(64), watched(m)) == (1, 0, 0x44)


def test_nobody_is_told_any_more_where_that_was_asked_for() -> None:
    def silent(a: Assembler) -> None:
        call(a, w.NOTIFY, 0)
        store(a, 0x33)

    body = notified(silent)
    m = ran(lambda a: (body(a), handler(a))[0], gates=(VE,))

    assert (m.exits("EPT_VIOLATION"), m.data(64), watched(m)) == (1, 0, 0x33)


def test_device_memory_is_no_exception_where_tables_are_made_for_it(personality: str) -> None:
    """The first access makes a table for two pages of registers: the second one's entry is empty, and suppresses."""

    def accesses(a: Assembler) -> None:
        for page in range(len(REGISTERS)):
            a.ld(RAX, Mem(displacement=DEVICE + 4096 * page, size=4))

    body = notified(accesses)
    m = ran(lambda a: (body(a), handler(a))[0], personality, gates=(VE,), devices=REGISTERS)

    assert (m.exits("EPT_VIOLATION"), m.data(64)) == (len(REGISTERS), 0)
    assert m.counter("exceptions") == 0


def test_the_pages_have_the_addresses_that_these_tests_say() -> None:
    m = ran(ended(lambda a: store(a, 0x1234, OTHER)))

    assert m.vcpu.memory.load(gpa(OTHER)) == 0x1234
    assert int(m.engine.cpus[0][s.NONROOT]) == 0
