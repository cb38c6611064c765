"""How instructions and events behave in VMX non-root operation where they do not exit, and what blocks events.

SDM: "Changes to Instruction Behavior in VMX Non-Root Operation"; "Event Blocking"; "Other Causes of VM Exits".
SDM: "Time-Stamp Counter Offset and Multiplier"; "Controls for PAUSE-Loop Exiting"; "VMX-Preemption Timer".
SDM: "Guest Non-Register State"; "Restrictions on VMX Operation"; "Instructions That Cause VM Exits Conditionally".
SDM: "ENCLS-Exiting Bitmap"; "ENCLV-Exiting Bitmap"; "PCONFIG-Exiting Bitmap".
SDM: "Fields Controlling Virtualization of the IA32_SPEC_CTRL MSR".
"""

from __future__ import annotations

import pytest

from tests.cpu.bench import END, TEXT, Virtual, virtual
from tests.vmcs.control_cases import IF, NO_EXIT, faults
from tests.vmcs.guests import CODE, DATA, GP, STACK, UD, Guest, quad
from vtsim.base import jit
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.apic import accept
from vtsim.cpu.kernels.msr_storage import scaled
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x

ONES = (1 << 64) - 1
RDTSC, RDTSCP, RDMSR, WRMSR = "0f31", "0f01f9", "0f32", "0f30"
INIT, STARTUP, FIXED_NMI = 5 << 8, 6 << 8, 4 << 8

# --- the time-stamp counter -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 1, 0xFFFF_FFFF, 1 << 32, 0x0123_4567_89AB_CDEF, ONES])
@pytest.mark.parametrize("multiplier", [1, 1 << 47, 1 << 48, 3 << 47, (1 << 48) - 1, 0xFEDC_BA98_7654_3210, ONES])
def test_scaling_is_a_product_of_unsigned_numbers_shifted_by_48(value: int, multiplier: int) -> None:
    import numpy as np

    def word(number: int) -> np.int64:
        return np.array([number], np.uint64).view(np.int64)[0]

    with jit.quiet():
        assert int(scaled(word(value), word(multiplier))) & ONES == (value * multiplier >> 48) & ONES


@pytest.mark.parametrize("code", [RDTSC, RDTSCP, RDMSR])
@pytest.mark.parametrize(
    ("controls", "expected"),
    [("", 1 << 40), ("USE_TSC_OFFSETTING", (1 << 40) + (7 << 40)), ("USE_TSC_SCALING", 1 << 40),
     ("USE_TSC_OFFSETTING USE_TSC_SCALING", (5 << 39) + (7 << 40))],
)  # fmt: skip
def test_the_counter_is_multiplied_then_offset_in_every_way_of_reading_it(
    code: str, controls: str, expected: int
) -> None:
    got = Guest(
        code=code, controls=f"USE_MSR_BITMAPS ENABLE_RDTSCP {controls}", record={s.MSR_TSC_ADJUST: 1 << 40}, gpr={"rcx": 0x10},
        fields={"TSC_OFFSET": 7 << 40, "TSC_MULTIPLIER": 5 << 47},
    ).run()  # fmt: skip

    assert int(got.at("rdx") or 0) << 32 == expected >> 32 << 32


# --- PAUSE loops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "window", "pauses", "leaves"),
    [(0x1000, 0, 1, False), (0x1000, 0, 2, True), (0, 0, 9, False), (0x1000, 0x10000, 9, False)],
)
def test_a_loop_of_pauses_within_the_gap_exits_when_the_window_is_over(
    gap: int, window: int, pauses: int, leaves: bool
) -> None:
    got = Guest(
        code="f390" * pauses, controls="PAUSE_LOOP_EXITING", fields={"PLE_GAP": gap, "PLE_WINDOW": window}
    ).run()

    assert got.at("reason") == (x.PAUSE_INSTRUCTION if leaves else x.VMCALL)


def test_pause_loops_outside_ring_0_do_not_exit() -> None:
    got = Guest(
        code="f390f390", base="b64_cpl3", controls="ACTIVATE_SECONDARY_CONTROLS PAUSE_LOOP_EXITING",
        fields={"PLE_WINDOW": 0},
    ).run()  # fmt: skip

    assert got.differs(NO_EXIT) == {}


def test_pause_exiting_comes_before_pause_loops() -> None:
    got = Guest(code="f390", controls="PAUSE_LOOP_EXITING PAUSE_EXITING", fields={"PLE_WINDOW": 0x10000}).run()

    assert got.at("reason") == x.PAUSE_INSTRUCTION


# --- instructions that do something else --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "control"),
    [("0f01f9", "ENABLE_RDTSCP"), ("660f388201", "ENABLE_INVPCID"), ("0fc729", "ENABLE_XSAVES_XRSTORS"),
     ("0fc719", "ENABLE_XSAVES_XRSTORS"), ("660faef0", "ENABLE_USER_WAIT_AND_PAUSE"),
     ("f20faef0", "ENABLE_USER_WAIT_AND_PAUSE"), ("f30faef1", "ENABLE_USER_WAIT_AND_PAUSE")],
)  # fmt: skip
def test_an_instruction_that_has_to_be_enabled_is_unknown_without_its_control(code: str, control: str) -> None:
    guest = Guest(
        code=code, gpr={"rcx": DATA}, memory={DATA: quad(0, 0), DATA + 512: quad(0, 1 << 63, 0, 0, 0, 0, 0, 0)}
    )

    assert guest.run(f"-{control}").differs(faults(UD)) == {}
    assert guest.run(control).differs(NO_EXIT) == {}


@pytest.mark.parametrize(("code", "reason"), [("660faef0", x.TPAUSE), ("f20faef0", x.UMWAIT)])
def test_waits_for_a_time_exit_as_readings_of_it_do_if_they_are_enabled(code: str, reason: int) -> None:
    assert Guest(code=code).run("RDTSC_EXITING").differs(faults(UD)) == {}
    got = Guest(code=code).run("RDTSC_EXITING ENABLE_USER_WAIT_AND_PAUSE")
    assert got.differs({"reason": reason, "EXIT_INSTRUCTION_LENGTH": 4}) == {}


@pytest.mark.parametrize("code", ["660faef0", "f20faef0"])
def test_a_wait_with_a_reserved_bit_is_refused_and_one_that_ends_clears_the_flags(code: str) -> None:
    assert Guest(code=code, gpr={"rax": 2}).run("ENABLE_USER_WAIT_AND_PAUSE").differs(faults(GP)) == {}
    got = Guest(code=code, gpr={"rax": 1}, fields={"GUEST_RFLAGS": 0x8D7}).run("ENABLE_USER_WAIT_AND_PAUSE")
    assert got.differs({**NO_EXIT, "GUEST_RFLAGS": 2}) == {}


@pytest.mark.parametrize(
    ("code", "control", "field", "reason"),
    [("0f01cf", "ENABLE_ENCLS_EXITING", "ENCLS_EXITING_BITMAP", x.ENCLS),
     ("0f01c0", "ENABLE_ENCLV_EXITING", "ENCLV_EXITING_BITMAP", x.ENCLV),
     ("0f01c5", "ENABLE_PCONFIG", "PCONFIG_EXITING_BITMAP", x.PCONFIG)],
)  # fmt: skip
@pytest.mark.parametrize(("leaf", "bit"), [(0, 0), (5, 5), (62, 62), (63, 63), (64, 63), (0xFFFFFFFF, 63)])
def test_a_leaf_exits_by_its_bit_and_the_last_bit_stands_for_all_beyond(
    code: str, control: str, field: str, reason: int, leaf: int, bit: int
) -> None:
    for bitmap, exits in ((1 << bit, True), (ONES & ~(1 << bit), False)):
        got = Guest(code=code, controls=control, gpr={"rax": leaf}, fields={field: bitmap}).run()
        assert got.differs({"reason": reason} if exits else faults(GP)) == {}


@pytest.mark.parametrize(("code", "vector"), [("0f01cf", UD), ("0f01c0", UD), ("0f01c5", UD), ("f30f38dcc1", GP)])
def test_outside_ring_0_they_fault_before_they_exit(code: str, vector: int) -> None:
    got = Guest(
        code=code, base="b64_cpl3",
        controls="ACTIVATE_SECONDARY_CONTROLS ENABLE_ENCLS_EXITING ENABLE_ENCLV_EXITING ENABLE_PCONFIG "
        "ACTIVATE_TERTIARY_CONTROLS LOADIWKEY_EXITING",
        fields={"ENCLS_EXITING_BITMAP": ONES, "ENCLV_EXITING_BITMAP": ONES, "PCONFIG_EXITING_BITMAP": ONES,
                "GUEST_CR4": 0xC2620},
    ).run()  # fmt: skip

    assert got.differs(faults(vector)) == {}


@pytest.mark.parametrize("code", ["0f01cf", "0f01c0", "0f01c5", "f30f38dcc1", "660faef0", "f20faef0", "f30faef0"])
def test_on_a_processor_without_them_they_are_unknown(code: str) -> None:
    assert Guest(code=code, on="corei7_skylake_x").run().differs(faults(UD)) == {}


def test_loadiwkey_needs_cr4_kl_and_names_its_registers() -> None:
    guest = Guest(code="f30f38dcd1", controls="ACTIVATE_TERTIARY_CONTROLS LOADIWKEY_EXITING")
    assert guest.run().differs(faults(UD)) == {}
    exits = Guest(code=guest.code, controls=guest.controls, fields={"GUEST_CR4": 0xC2620})
    assert exits.run().differs({"reason": x.LOADIWKEY, "EXIT_INSTRUCTION_INFORMATION": 2 << 3 | 1 << 28}) == {}


def test_iret_ends_blocking_by_nmi_even_if_it_faults() -> None:
    got = Guest(code="48cf", fields={"GUEST_INTERRUPTIBILITY_STATE": 8}, memory={STACK: quad(1 << 60, 0, 0)}).run()

    assert got.differs({"vector": GP, "GUEST_INTERRUPTIBILITY_STATE": 0}) == {}


def test_mov_from_cr3_and_to_it_are_the_guests_own_without_the_controls() -> None:
    got = Guest(code="0f20d80f22d8", fields={"GUEST_CR3": 0x808000}).run()

    assert got.differs({**NO_EXIT, "rax": 0x808000}) == {}


def test_a_write_of_a_virtualized_spec_ctrl_keeps_the_masked_bits_of_the_register() -> None:
    guest = Guest(
        code=WRMSR, controls="USE_MSR_BITMAPS ACTIVATE_TERTIARY_CONTROLS VIRTUALIZE_IA32_SPEC_CTRL",
        gpr={"rcx": 0x48, "rax": 4}, record={s.MSR_SPEC_CTRL: 1}, fields={"IA32_SPEC_CTRL_MASK": 3},
    )  # fmt: skip

    assert guest.run().differs({**NO_EXIT, s.MSR_SPEC_CTRL: 5, "IA32_SPEC_CTRL_SHADOW": 4}) == {}
    refused = Guest(code=WRMSR, controls=guest.controls, gpr={"rcx": 0x48, "rdx": 1}).run()
    assert refused.differs({"vector": GP, "IA32_SPEC_CTRL_SHADOW": 0}) == {}


# --- blocking -------------------------------------------------------------------------------------------------------

STATES = {"active": 0, "HLT": 1, "shutdown": 2, "wait-for-SIPI": 3}
ARMED = {"PREEMPTION_TIMER_VALUE": 2000, "GUEST_RFLAGS": IF}


@pytest.mark.parametrize(("state", "leaves"), [(0, True), (1, True), (2, False), (3, False)], ids=STATES)
def test_the_interrupt_window_is_open_in_the_states_that_interrupts_wake(state: int, leaves: bool) -> None:
    """Shutdown ends by the timer; in the wait-for-SIPI state not even that, so that the CPU sleeps on."""
    if state == 3:
        bench = sleeping(state, b.INTERRUPT_WINDOW_EXITING)
        assert (int(bench.m[s.NONROOT]), int(bench.m[s.HALTED])) == (1, 1)
        return
    got = Guest(
        code="9090", controls="INTERRUPT_WINDOW_EXITING ACTIVATE_PREEMPTION_TIMER",
        fields={**ARMED, "GUEST_ACTIVITY_STATE": state},
    ).run()  # fmt: skip
    assert got.at("reason") == (x.INTERRUPT_WINDOW if leaves else x.PREEMPTION_TIMER)


@pytest.mark.parametrize(("state", "leaves"), [(0, True), (1, True), (2, True), (3, False)], ids=STATES)
def test_nmis_wake_all_states_but_wait_for_sipi(state: int, leaves: bool) -> None:
    bench = sleeping(state, pin=b.NMI_EXITING)
    arrive(bench, FIXED_NMI)

    assert (int(bench.m[s.NONROOT]) == 0) == leaves
    if leaves:
        assert (bench.reason, bench.field("GUEST_ACTIVITY_STATE")) == (x.EXCEPTION_NMI, state)


@pytest.mark.parametrize("state", [1, 2])
def test_the_preemption_timer_counts_in_the_states_in_which_the_cpu_sleeps(state: int) -> None:
    got = Guest(controls="ACTIVATE_PREEMPTION_TIMER", fields={**ARMED, "GUEST_ACTIVITY_STATE": state}).run()

    assert got.differs({"reason": x.PREEMPTION_TIMER, "GUEST_ACTIVITY_STATE": state}) == {}


def test_the_preemption_timer_is_not_activated_in_the_wait_for_sipi_state() -> None:
    bench = sleeping(3, pin=b.ACTIVATE_PREEMPTION_TIMER)

    assert int(bench.m[s.NONROOT]) == 1
    assert int(bench.m[s.CYCLE]) > 10 * bench.field("PREEMPTION_TIMER_VALUE")


def sleeping(state: int, primary: int = 0, pin: int = 0) -> Virtual:
    """A guest that a VM entry put into an activity state; an active one runs a loop."""
    bench = virtual()
    bench.guest.code(lambda a: (a.label("x"), a.op(o.NOP), a.jmp("x"))[0], TEXT)
    bench.host()
    bench.enter(TEXT)
    bench.set(
        PRIMARY_PROC_CONTROLS=bench.field("PRIMARY_PROC_CONTROLS") | primary, PIN_CONTROLS=b.EXTERNAL_INTERRUPT_EXITING | pin,
        GUEST_ACTIVITY_STATE=state, GUEST_RFLAGS=IF, PREEMPTION_TIMER_VALUE=2000,
    )  # fmt: skip
    bench.engine.run(ops=3)  # VMXON, VMPTRLD, VMLAUNCH
    if state:
        bench.engine.run(until=int(bench.m[s.CYCLE]) + 50_000)
    return bench


def arrive(bench: Virtual, command: int) -> None:
    """An interrupt command of another CPU arrives, and time goes on."""
    with jit.quiet():
        accept(bench.m, bench.engine.arena, command)
    bench.engine.run(until=int(bench.m[s.CYCLE]) + 50_000, ops=1000 if bench.m[s.HALTED] else 1)


@pytest.mark.parametrize(("state", "leaves"), [(0, True), (1, True), (2, True), (3, False)], ids=STATES)
def test_an_init_signal_exits_unless_the_guest_waits_for_a_sipi(state: int, leaves: bool) -> None:
    bench = sleeping(state)
    arrive(bench, INIT)

    assert (int(bench.m[s.NONROOT]) == 0) == leaves
    if leaves:
        assert (bench.reason, bench.field("EXIT_QUALIFICATION")) == (x.INIT_SIGNAL, 0)
        assert bench.field("GUEST_ACTIVITY_STATE") == state


@pytest.mark.parametrize(("state", "leaves"), [(0, False), (1, False), (2, False), (3, True)], ids=STATES)
def test_a_sipi_exits_with_its_vector_only_from_the_state_that_waits_for_it(state: int, leaves: bool) -> None:
    bench = sleeping(state)
    arrive(bench, STARTUP | 0x9A)

    assert (int(bench.m[s.NONROOT]) == 0) == leaves
    if leaves:
        assert (bench.reason, bench.field("EXIT_QUALIFICATION")) == (x.SIPI_SIGNAL, 0x9A)
        assert bench.field("GUEST_ACTIVITY_STATE") == 3
    else:
        assert int(bench.m[s.SIPI_PENDING]) == 0  # it is lost


def test_an_init_signal_is_blocked_in_root_operation_and_exits_after_the_next_entry() -> None:
    bench = virtual()
    bench.guest.code(lambda a: (a.op(o.NOP), a.op(o.STOP_OP, imm=END))[0], TEXT)
    bench.host()
    bench.enter(TEXT)
    bench.engine.run(ops=1)  # VMXON
    with jit.quiet():
        accept(bench.m, bench.engine.arena, INIT)
    bench.engine.run(ops=1)
    assert int(bench.m[s.INIT_PENDING]) == 1
    bench.engine.run(ops=20)

    assert (bench.reason, bench.field("GUEST_RIP")) == (x.INIT_SIGNAL, TEXT)
    assert int(bench.m[s.INIT_PENDING]) == 0


def test_an_init_signal_comes_before_the_monitor_trap_flag_and_an_nmi() -> None:
    got = Guest(
        code="9090", controls="MONITOR_TRAP_FLAG NMI_EXITING", record={s.INIT_PENDING: 1, s.NMI_PENDING: 1, s.NMI_BLOCKED: 1}
    ).run()  # fmt: skip

    assert got.differs({"reason": x.INIT_SIGNAL, "GUEST_RIP": CODE}) == {}


@pytest.mark.parametrize("command", [INIT | 1 << 15, 2 << 8])
def test_a_deassert_and_an_smi_do_nothing(command: int) -> None:
    bench = sleeping(0)
    arrive(bench, command)

    assert int(bench.m[s.NONROOT]) == 1
