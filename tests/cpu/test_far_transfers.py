"""Far returns, call gates and returns to virtual-8086 mode, in guests whose descriptors are the tests' own."""

from __future__ import annotations

import pytest
from attrs import evolve

from tests.vmcs.control_cases import NO_EXIT
from tests.vmcs.guests import CODE, GP, STACK, Guest, quad
from vtsim.vmcs import reasons as x

GDT, TSS, TARGET, INNER = 0x826000, 0x827000, 0x828100, 0x827800
CODE0, DATA0, CODE3, DATA3, GATE, GATE16, LONG0, LONG_GATE, CONFORMING, CLOSED, ABSENT, LONG3 = (
    0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38, 0x40, 0x50, 0x58, 0x60, 0x68,
)  # fmt: skip
NP = 11
VMCALL = "0f01c1"


def segment(rights: int) -> int:
    """A flat segment with access rights as the VMCS has them."""
    return 0xFFFF | (rights & 0xFF) << 40 | (0xF | rights >> 12 << 4) << 48


def gate(selector: int, rights: int, offset: int = TARGET, count: int = 0) -> int:
    return offset & 0xFFFF | selector << 16 | count << 32 | rights << 40 | (offset >> 16) << 48


def table(count: int = 0) -> str:
    return quad(
        0, segment(0xC09B), segment(0xC093), segment(0xC0FB), segment(0xC0F3), gate(CODE0, 0xEC, count=count),
        gate(CODE0, 0xE4), segment(0xA09B), gate(LONG0, 0xEC), 0, segment(0xC09F), gate(CODE0, 0x8C), gate(CODE0, 0x6C),
        segment(0xA0FB),
    )  # fmt: skip


FIELDS = {"GUEST_GDTR_BASE": GDT, "GUEST_GDTR_LIMIT": 0x6F, "GUEST_TR_BASE": TSS}


def words(*values: int) -> str:
    return b"".join(value.to_bytes(4, "little") for value in values).hex()


def guest(
    base: str, code: str, stack: str = "", count: int = 0, dump: tuple[int, int] = (0, 0), **fields: int
) -> Guest:
    memory = {GDT: table(count), TARGET: VMCALL, TSS + 4: words(INNER, DATA0), STACK: stack}
    if base.startswith("b64"):
        memory[TSS + 4] = quad(INNER)
    return Guest(
        base=base, code=code, memory=memory, fields={**FIELDS, **fields}, dump=dump, gpr={"rcx": 0x828200}
    )  # fmt: skip


# --- returns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "released"), [("cb", 0), ("ca0800", 8)])
def test_a_far_return_in_the_same_ring_pops_two_words_and_the_parameters(code: str, released: int) -> None:
    got = guest("b32", code, words(TARGET, CODE0)).run()

    assert got.differs({
        **NO_EXIT, "GUEST_RIP": TARGET, "GUEST_CS_SELECTOR": CODE0, "GUEST_RSP": STACK + 8 + released,
    }) == {}  # fmt: skip


@pytest.mark.parametrize(("code", "released"), [("cb", 0), ("ca0800", 8)])
def test_a_far_return_to_an_outer_ring_pops_its_stack_beyond_the_parameters(code: str, released: int) -> None:
    stack = words(TARGET, CODE3 | 3, *[0] * (released // 4), 0x828800, DATA3 | 3)
    got = guest("b32", code, stack).run()

    assert got.differs({
        **NO_EXIT, "GUEST_RIP": TARGET, "GUEST_CS_SELECTOR": CODE3 | 3, "GUEST_SS_SELECTOR": DATA3 | 3,
        "GUEST_RSP": 0x828800 + released, "GUEST_DS_SELECTOR": 0,
    }) == {}  # fmt: skip


@pytest.mark.parametrize("size", [4, 8])
def test_a_far_return_of_64_bit_code_has_32_or_64_bit_words(size: int) -> None:
    stack = b"".join(value.to_bytes(size, "little") for value in (TARGET, LONG0)).hex()
    got = guest("b64", "cb" if size == 4 else "48cb", stack).run()

    assert (
        got.differs({**NO_EXIT, "GUEST_RIP": TARGET, "GUEST_CS_SELECTOR": LONG0, "GUEST_RSP": STACK + 2 * size}) == {}
    )


@pytest.mark.parametrize(
    ("base", "stack", "vector", "error"),
    [
        ("b32", words(TARGET, 0), GP, 0), ("b32", words(TARGET, DATA0), GP, DATA0), ("b32", words(TARGET, 0x88), GP, 0x88),
        ("b32", words(TARGET, CODE3), GP, CODE3), ("b32", words(TARGET, CODE3 | 3, STACK, DATA0), GP, DATA0),
        ("b32", words(TARGET, CODE3 | 3, STACK, 0), GP, 0), ("b32", words(TARGET, ABSENT), GP, ABSENT),
    ],
)  # fmt: skip
def test_what_a_far_return_may_not_load_faults_and_leaves_the_stack(
    base: str, stack: str, vector: int, error: int
) -> None:
    plain = guest(base, "cb", stack, EXCEPTION_BITMAP=1 << GP).run()

    assert plain.differs({
        "reason": x.EXCEPTION_NMI, "EXIT_INTERRUPTION_ERROR_CODE": error, "GUEST_RIP": CODE, "GUEST_RSP": STACK,
        "EXIT_INTERRUPTION_INFORMATION": 1 << 31 | 1 << 11 | 3 << 8 | vector,
    }) == {}  # fmt: skip


def test_a_far_return_of_real_mode_loads_a_selector_and_its_base() -> None:
    got = Guest(
        base="brealu", code="cb", fields={"GUEST_SS_SELECTOR": 0x1200, "GUEST_SS_BASE": 0x12000, "GUEST_RSP": 0x800},
        memory={0x12800: "00010110", 0x10110: VMCALL},
    ).run()  # fmt: skip

    assert got.differs({
        **NO_EXIT, "GUEST_RIP": 0x100, "GUEST_CS_SELECTOR": 0x1001, "GUEST_CS_BASE": 0x10010, "GUEST_RSP": 0x804,
    }) == {}  # fmt: skip


# --- call gates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("selector", "size"), [(GATE, 4), (GATE16, 2)])
def test_a_call_through_a_gate_in_the_same_ring_pushes_words_of_the_gates_size(selector: int, size: int) -> None:
    target = TARGET & (1 << 8 * size) - 1
    call = guest("b32", f"9a00000000{selector:02x}00", dump=(STACK - 2 * size, 2 * size))
    got = evolve(call, memory={**call.memory, target: VMCALL}).run()
    old = Guest(base="b32").run().fields["GUEST_CS_SELECTOR"]
    pushed = (CODE + 7 & (1 << 8 * size) - 1).to_bytes(size, "little") + old.to_bytes(size, "little")

    assert got.differs({**NO_EXIT, "GUEST_RIP": target, "GUEST_RSP": STACK - 2 * size, "dump": pushed.hex()}) == {}


@pytest.mark.parametrize("count", [0, 3])
def test_a_call_to_an_inner_ring_switches_stacks_and_copies_the_parameters(count: int) -> None:
    parameters = (0x11, 0x22, 0x33)[:count]
    frame = 4 * (4 + count)
    old = Guest(base="b32_cpl3").run().fields
    call = guest("b32_cpl3", f"9a00000000{GATE | 3:02x}00", "", count, (INNER - frame, frame))
    got = evolve(call, memory={**call.memory, old["GUEST_RSP"]: words(*parameters, 0)}).run()
    pushed = words(CODE + 7, old["GUEST_CS_SELECTOR"], *parameters, old["GUEST_RSP"], old["GUEST_SS_SELECTOR"])

    assert got.differs({
        **NO_EXIT, "GUEST_RIP": TARGET, "GUEST_CS_SELECTOR": CODE0, "GUEST_SS_SELECTOR": DATA0,
        "GUEST_RSP": INNER - frame,
    }) == {}  # fmt: skip
    assert got.dump == pushed


def test_a_call_through_a_64_bit_gate_pushes_four_words_of_64_bits_on_the_stack_of_the_tss() -> None:
    old = Guest(base="b64_cpl3").run().fields
    call = guest("b64_cpl3", "ff19", dump=(INNER - 32, 32))
    memory = {**call.memory, 0x828200: words(0, LONG_GATE | 3)}
    got = evolve(call, memory=memory).run()

    assert got.differs({
        **NO_EXIT, "GUEST_RIP": TARGET, "GUEST_CS_SELECTOR": LONG0, "GUEST_SS_SELECTOR": 0, "GUEST_RSP": INNER - 32,
    }) == {}  # fmt: skip
    assert got.dump == quad(CODE + 2, old["GUEST_CS_SELECTOR"], old["GUEST_RSP"], old["GUEST_SS_SELECTOR"])


@pytest.mark.parametrize(
    ("base", "code", "vector", "error"),
    [
        ("b32_cpl3", f"9a00000000{CLOSED | 3:02x}00", GP, CLOSED),    # the gate is for ring 0
        ("b32", f"9a00000000{ABSENT:02x}00", NP, ABSENT),
        ("b32_cpl3", f"ea00000000{GATE | 3:02x}00", GP, CODE0),       # a jump does not change the ring
    ],
)  # fmt: skip
def test_a_gate_that_may_not_be_used_faults_with_the_selector_that_is_wrong(
    base: str, code: str, vector: int, error: int
) -> None:
    got = guest(base, code, EXCEPTION_BITMAP=1 << GP | 1 << NP).run()

    assert got.differs({
        "reason": x.EXCEPTION_NMI, "EXIT_INTERRUPTION_INFORMATION": 1 << 31 | 1 << 11 | 3 << 8 | vector,
        "EXIT_INTERRUPTION_ERROR_CODE": error, "GUEST_RIP": CODE,
    }) == {}  # fmt: skip


def test_a_gate_to_conforming_code_keeps_the_ring_and_the_stack() -> None:
    made = guest("b32_cpl3", f"ea00000000{GATE | 3:02x}00")
    memory = {**made.memory, GDT + GATE: quad(gate(CONFORMING, 0xEC))}
    got = evolve(made, memory=memory).run()

    assert got.differs({**NO_EXIT, "GUEST_RIP": TARGET, "GUEST_CS_SELECTOR": CONFORMING | 3}) == {}


# --- virtual-8086 mode --------------------------------------------------------------------------------------------------


def test_iret_of_ring_0_to_virtual_8086_mode_loads_every_segment() -> None:
    flags = 1 << 17 | 3 << 12 | 0x202
    stack = words(0x100, 0x1001, flags, 0x700, 0x1200, 0x1100, 0x1101, 0x1102, 0x1103)
    made = guest("b32", "cf", stack)
    got = evolve(made, memory={**made.memory, 0x10110: VMCALL}).run()

    assert got.differs({
        **NO_EXIT, "GUEST_RIP": 0x100, "GUEST_CS_SELECTOR": 0x1001, "GUEST_CS_BASE": 0x10010, "GUEST_CS_LIMIT": 0xFFFF,
        "GUEST_RFLAGS": flags, "GUEST_RSP": 0x700, "GUEST_SS_SELECTOR": 0x1200, "GUEST_SS_ACCESS_RIGHTS": 0xF3,
        "GUEST_ES_SELECTOR": 0x1100, "GUEST_DS_SELECTOR": 0x1101, "GUEST_FS_SELECTOR": 0x1102,
        "GUEST_GS_BASE": 0x11030,
    }) == {}  # fmt: skip


def test_iret_to_virtual_8086_mode_beyond_64_kib_is_refused() -> None:
    stack = words(0x10000, 0x1001, 1 << 17 | 2, 0x700, 0x1200, 0, 0, 0, 0)

    got = guest("b32", "cf", stack, EXCEPTION_BITMAP=1 << GP).run()
    assert got.differs({"reason": x.EXCEPTION_NMI, "EXIT_INTERRUPTION_ERROR_CODE": 0, "GUEST_RSP": STACK}) == {}
