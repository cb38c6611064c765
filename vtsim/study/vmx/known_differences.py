"""Why the model contradicts recorded cases: each difference that is known to be one, by its mechanism.

A row holds for differences of one cause, wherever it shows: in no row is there the name of a case. Rows of the
recorder contradict the manual, whose section is named; rows of the model say what it lacks; the others are about what
the recording does not hold, so that nobody can know it.

SDM: "Switching Back to Real-Address Mode"; "Saving Non-Register State"; "General-Detect Exception Condition";
"HLT—Halt"; "RDPMC—Read Performance-Monitoring Counters";
"Model-Specific Registers (MSRs)"; "Saving RIP, RSP, RFLAGS, and SSP"; "Handling Multiple NMIs".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from attrs import frozen

from vtsim.study.vmx.cases import Case, Environment
from vtsim.study.vmx.comparison import Difference
from vtsim.study.vmx.drivers import Outcome
from vtsim.study.vmx.evidence import BLOCKING, Seen
from vtsim.vmcs import events as ev
from vtsim.vmcs import reasons as x

RECORDER, MODEL, NOBODY = "recorder", "model", "not recorded"
IF, RF = 1 << 9, 1 << 16
DR6_BS, DR7_GD, DEBUGCTL_BTF, PENDING_BS = 1 << 14, 1 << 13, 1 << 1, 1 << 14
INFORMATION_SIZE, REGISTER = 1 << 11, 0xF << 3  # of the instruction information
UD, GP, NMI = 6, 13, 2
INVALID_STATE, MSR_LOAD = x.INVALID_STATE, x.MSR_LOAD_FAIL
MISC_ENABLE, DEBUGCTL, KERNEL_GS_BASE = 0x1A0, 0x1D9, 0xC0000102
PERFORMANCE_LEAF = (0xA, 0)
EPTP_INDEX_AT = 32  # in the virtualization-exception information
ACCESSED, DIRTY = 1 << 8, 1 << 9
LAST_OF_LOG = 511
VMCALL_BYTES = 0xC1010F  # as a number


@frozen(kw_only=True)
class Known:
    """One cause of differences: which cases have it, what is recorded, what the model does, and by which section."""

    name: str
    cases: str
    recorded: str
    model: str
    section: str = ""
    """The title in the manual; none for what no manual can say."""
    whose: str = RECORDER
    """Who is at fault: the recorder, the model, or nobody."""
    holds: Callable[[Seen], bool]


# --- mechanisms: VM entries -----------------------------------------------------------------------------------------


def _rip_of_48_bits(seen: Seen) -> bool:
    rip = seen.field("GUEST_RIP")
    return seen.model_enters() and "disputed" in seen.case.raw and rip >> 47 == 1


def _nmi_with_sti(seen: Seen) -> bool:
    information = seen.field("ENTRY_INTERRUPTION_INFORMATION")
    return (
        seen.path == "qualification"
        and seen.of_recorded("reason") == seen.of_model("reason") == INVALID_STATE
        and (information & ev.TYPE) >> ev.TYPE_SHIFT == ev.NMI
        and bool(seen.blocked & ev.BLOCKING_BY_STI)
    )


def _refused_msr(seen: Seen, outcome: Outcome) -> int:
    """The MSR of the VM-entry MSR-load area at which a VM entry failed; -1 if it did not."""
    if outcome.get("kind") != "entry_failure" or outcome.get("reason") != MSR_LOAD:
        return -1
    return seen.msr_entry("ENTRY_MSR_LOAD_ADDRESS", outcome.get("qualification"))


def _loads_debug_msrs(seen: Seen) -> bool:
    return _refused_msr(seen, seen.recorded) in (MISC_ENABLE, DEBUGCTL)


def _steps_while_blocked(seen: Seen) -> bool:
    return (
        seen.model.get("kind") == "entry_failure"
        and seen.of_model("reason") == INVALID_STATE
        and seen.recorded.get("kind") == "exit"
        and seen.single_steps
        and bool(seen.blocked & BLOCKING)
        and not seen.field("GUEST_IA32_DEBUGCTL") & DEBUGCTL_BTF
        and not seen.field("GUEST_PENDING_DEBUG_EXCEPTIONS") & PENDING_BS
    )


# --- mechanisms: VMX instructions in root operation -----------------------------------------------------------------


def _invvpid_of_64_bits(seen: Seen) -> bool:
    wide = any(word == "invvpid" and operands[1] >> 32 for word, operands in seen.environment.steps)
    return wide and seen.path.endswith((".result", ".error")) and seen.difference.model == "vmfail_valid"


# --- mechanisms: VM exits -------------------------------------------------------------------------------------------


def _descriptor_table_size(seen: Seen) -> bool:
    return (
        seen.path == "instruction_info"
        and seen.of_recorded("reason") == x.GDTR_IDTR
        and not seen.in_64_bit_code
        and seen.changed_bits == INFORMATION_SIZE
    )


def _random_size(seen: Seen) -> bool:
    return (
        seen.path == "instruction_info"
        and seen.of_recorded("reason") in (x.RDRAND, x.RDSEED)
        and seen.code[:1] == b"\x66"
        and not seen.changed_bits & REGISTER
    )


def _is_xsave(seen: Seen, register: int) -> bool:
    return seen.code[:2] == b"\x0f\xc7" and len(seen.code) > 2 and seen.code[2] >> 3 & 7 == register


def _xsave_in_ring_3(seen: Seen) -> bool:
    return (
        (_is_xsave(seen, 3) or _is_xsave(seen, 5))
        and seen.ring == 3
        and not seen.control("ENABLE_XSAVES_XRSTORS")
        and seen.raised(seen.model, UD)
        and seen.raised(seen.recorded, GP)
    )


def _invpcid_in_ring_3(seen: Seen) -> bool:
    return (
        seen.of_recorded("reason") == x.INVPCID
        and seen.control("INVLPG_EXITING")
        and seen.ring == 3
        and seen.raised(seen.model, GP)
    )


def _nmi_resume_flag(seen: Seen) -> bool:
    kind = (seen.of_recorded("interruption_info") & ev.TYPE) >> ev.TYPE_SHIFT
    return (
        seen.path == "vmcs.guest_rflags"
        and seen.of_recorded("reason") == x.EXCEPTION_NMI
        and kind == ev.NMI
        and seen.changed_bits == RF
    )


def _ve_eptp_index(seen: Seen) -> bool:
    if not seen.path.endswith(".data") or not seen.control("EPT_VIOLATION_VE"):
        return False
    recorded, model = (bytes.fromhex(str(data)) for data in (seen.difference.recorded, seen.difference.model))
    end = EPTP_INDEX_AT + 2
    alike = recorded[:EPTP_INDEX_AT] + recorded[end:] == model[:EPTP_INDEX_AT] + model[end:]
    return alike and int.from_bytes(model[EPTP_INDEX_AT:end], "little") == seen.field("EPTP_INDEX")


def _log_without_flags(seen: Seen) -> bool:
    if seen.of_recorded("reason") != x.PML_FULL or seen.field("PML_INDEX") <= LAST_OF_LOG:
        return False
    physical = [*seen.translated(seen.field("EPT_POINTER"), seen.operand() or 0)]
    entries = [entry for entry in physical[:-1] if entry is not None]
    written = not seen.asm.startswith("mov [") or bool(entries[-1] & DIRTY)
    return all(entry & ACCESSED for entry in entries) and written


def _debug_msrs(seen: Seen) -> bool:
    if seen.path.startswith("more."):
        place = int(seen.path.split(".")[1]) - len(seen.environment.dump)
        steps = seen.environment.steps
        return 0 <= place < len(steps) and steps[place] in (("rdmsr", (DEBUGCTL,)), ("rdmsr", (MISC_ENABLE,)))
    moves = seen.code in (b"\x0f\x32", b"\x0f\x30")  # RDMSR, WRMSR
    return moves and seen.gpr("rcx") in (MISC_ENABLE, DEBUGCTL) and seen.raised(seen.recorded, GP)


def _no_such_counter(seen: Seen) -> bool:
    counters = seen.environment.cpuid.get(PERFORMANCE_LEAF, (0, 0, 0, 0))[0] >> 8 & 0xFF
    return (
        seen.code == b"\x0f\x33"
        and counters <= seen.gpr("rcx") < 1 << 30
        and seen.raised(seen.model, GP)
        and not seen.raised(seen.recorded, GP)
    )


def _task_priority(seen: Seen) -> bool:
    reads = len(seen.code) == 4 and seen.code[:3] in (b"\x44\x0f\x20", b"\x45\x0f\x20") and seen.code[3] >> 3 & 7 == 0
    free = not seen.control("USE_TPR_SHADOW") and not seen.control("CR8_STORE_EXITING")
    return reads and free and seen.path.startswith("gpr.")


def _gs_base_left(seen: Seen) -> bool:
    if seen.path.endswith(".value"):
        place = int(seen.path.split(".")[1]) - len(seen.environment.dump)
        return seen.environment.steps[place] == ("rdmsr", (KERNEL_GS_BASE,))
    if not seen.path.endswith(".data") or not seen.field("EXIT_MSR_STORE_COUNT"):
        return False
    recorded, model = (bytes.fromhex(str(data)) for data in (seen.difference.recorded, seen.difference.model))
    entries = [at for at in range(0, len(model) - 15, 16) if recorded[at : at + 16] != model[at : at + 16]]
    return bool(entries) and all(int.from_bytes(model[at : at + 4], "little") == KERNEL_GS_BASE for at in entries)


def _pause_loop(seen: Seen) -> bool:
    loops = seen.control("PAUSE_LOOP_EXITING") and not seen.control("PAUSE_EXITING")
    return loops and seen.of_recorded("reason") == x.PAUSE_INSTRUCTION and seen.path == "vmcs.guest_rip"


def _shutdown_flags(seen: Seen) -> bool:
    shut = seen.field("GUEST_ACTIVITY_STATE") == ev.SHUTDOWN
    return shut and seen.path == "vmcs.guest_rflags" and seen.changed_bits == IF


def _rip_before_nmi(seen: Seen) -> bool:
    delivered = seen.of_recorded("reason") == seen.of_model("reason") == x.VMCALL and not seen.control("NMI_EXITING")
    handled = seen.raised(seen.model, NMI) and not seen.raised(seen.recorded, NMI)
    return delivered and handled and seen.path in ("instruction_length", "vmcs.guest_rip", "guest_handler_vector")


def _halted_step(seen: Seen) -> bool:
    return (
        seen.code == b"\xf4"
        and seen.single_steps
        and not seen.control("HLT_EXITING")
        and seen.of_recorded("reason") == x.PREEMPTION_TIMER
        and seen.raised(seen.model, 1)
    )


def _detected_step(seen: Seen) -> bool:
    moves = seen.code[:2] in (b"\x0f\x21", b"\x0f\x23")  # MOV from, to a debug register
    detects = bool(seen.field("GUEST_DR7") & DR7_GD)
    return moves and detects and seen.single_steps and seen.path == "dr6" and seen.changed_bits == DR6_BS


def _int_in_shadow(seen: Seen) -> bool:
    kind = (seen.of_recorded("idt_vectoring_info") & ev.TYPE) >> ev.TYPE_SHIFT
    return (
        seen.path == "vmcs.guest_interruptibility"
        and seen.of_recorded("reason") == x.EXCEPTION_NMI
        and kind == ev.SOFTWARE_INTERRUPT
        and seen.changed_bits == seen.blocked
    )


def _code_without_pe(seen: Seen) -> bool:
    clears = seen.code[:2] == b"\x0f\x22" and bool(seen.field("GUEST_CR0") & 1)
    return clears and seen.path == "vmcs.guest_cs_ar" and seen.changed_bits == 1 << 3


def _not_decoded(seen: Seen) -> bool:
    physical = seen.physical() if seen.asm.startswith("jmp") else None
    if physical is None or seen.beyond_the_image() or seen.word(physical) & 0xFFFFFF == VMCALL_BYTES:
        return False
    return seen.raised(seen.model, UD) and not seen.raised(seen.recorded, UD)


def _beyond_the_image(seen: Seen) -> bool:
    kept = seen.of_recorded("reason") == x.VMCALL and seen.path.split(".")[0] not in ("kind", "more")
    return kept and seen.beyond_the_image()


# --- the rows -------------------------------------------------------------------------------------------------------

# fmt: off
KNOWN: Final[tuple[Known, ...]] = (
    Known(name="RIP of 48 bits", holds=_rip_of_48_bits,
          cases="64-bit guest RIP with bits 63:48 alike and unlike bit 47 (disputed, too, as not canonical)",
          recorded="enters, then #GP",
          model="enters: bits 63:48 must be identical, one bit less than a canonical address is held to",
          section="Checks on Guest RIP, RFLAGS, and SSP"),
    Known(name="qualification of an NMI with blocking by STI", holds=_nmi_with_sti,
          cases="injection of an NMI with blocking by STI",
          recorded="VM-entry failure 33, qualification 0", model="VM-entry failure 33, qualification 3",
          section="VM-Entry Failures During or After Loading Guest State"),
    Known(name="loading of IA32_DEBUGCTL and IA32_MISC_ENABLE", holds=_loads_debug_msrs,
          cases="VM-entry MSR-load area with IA32_DEBUGCTL or IA32_MISC_ENABLE",
          recorded="VM-entry failure 34", model="loads them", section="Loading MSRs"),
    Known(name="INVVPID type of 64 bits", holds=_invvpid_of_64_bits,
          cases="INVVPID in 64-bit mode with a type in bits 31:0 and a bit of 63:32 set",
          recorded="succeeds",
          model="VM-instruction error 28: the operand has 64 bits, and no such type is supported",
          section="INVVPID—Invalidate Translations Based on VPID"),
    Known(name="single step while events are blocked", holds=_steps_while_blocked,
          cases="VM exits of cases with RFLAGS.TF set, blocking by STI or MOV SS, and no pending single step",
          recorded="enters", model="VM-entry failure 33: the pending debug exceptions need BS",
          section="Checks on Guest Non-Register State"),
    Known(name="operand size of LGDT and its like", holds=_descriptor_table_size,
          cases="LGDT, LIDT, SGDT, SIDT outside 64-bit mode: bit 11 of the instruction information",
          recorded="0 with 32-bit operand size", model="1 with 32-bit operand size, 0 with 16-bit",
          section="Information for VM Exits Due to Instruction Execution"),
    Known(name="operand size of RDRAND and RDSEED", holds=_random_size,
          cases="RDRAND and RDSEED with an operand-size prefix: bits 12:11 of the instruction information",
          recorded="as without the prefix", model="the operand size",
          section="Information for VM Exits Due to Instruction Execution"),
    Known(name="XSAVES in ring 3", holds=_xsave_in_ring_3,
          cases="XSAVES and XRSTORS in ring 3 without \"enable XSAVES/XRSTORS\"",
          recorded="#GP", model="#UD: the control is considered first",
          section="Changes to Instruction Behavior in VMX Non-Root Operation"),
    Known(name="INVPCID in ring 3", holds=_invpcid_in_ring_3,
          cases="INVPCID in ring 3 with \"INVLPG exiting\"",
          recorded="VM exit 58", model="#GP: a fault of privilege comes first",
          section="Relative Priority of Faults and VM Exits"),
    Known(name="RFLAGS.RF of VM exits by NMIs", holds=_nmi_resume_flag,
          cases="VM exits by NMIs: RFLAGS.RF as saved",
          recorded="1", model="0: the image that an NMI at an instruction boundary pushes has it clear",
          section="Saving RIP, RSP, RFLAGS, and SSP"),
    Known(name="VM exit after an NMI", holds=_rip_before_nmi,
          cases="VMCALL as the first instruction of the handler of an NMI: RIP and instruction length",
          recorded="RIP of what the NMI interrupted, with the stack of the handler",
          model="RIP of the VMCALL, which has three bytes", section="Saving RIP, RSP, RFLAGS, and SSP"),
    Known(name="RFLAGS.IF in the shutdown state", holds=_shutdown_flags,
          cases="VM exits from the shutdown activity state that VM entry loaded: RFLAGS.IF as saved",
          recorded="0", model="as it was loaded", section="Saving RIP, RSP, RFLAGS, and SSP"),
    Known(name="blocking of an INT n that faults", holds=_int_in_shadow,
          cases="VM exits by faults of INT n under blocking by MOV SS or STI: interruptibility state",
          recorded="no blocking", model="the blocking: the instruction did not complete",
          section="Saving Non-Register State"),
    Known(name="EPTP index of a virtualization exception", holds=_ve_eptp_index,
          cases="virtualization-exception information: EPTP index",
          recorded="0", model="the EPTP-index VM-execution control",
          section="Virtualization-Exception Information"),
    Known(name="full log without flags to set", holds=_log_without_flags,
          cases="PML index beyond the log while all accessed and dirty flags are set",
          recorded="VM exit 62", model="no VM exit: no flag is to be set", section="Page-Modification Logging"),
    Known(name="IA32_MISC_ENABLE and IA32_DEBUGCTL", holds=_debug_msrs,
          cases="RDMSR and WRMSR of IA32_MISC_ENABLE and IA32_DEBUGCTL",
          recorded="#GP, not implemented", model="registers", section="Model-Specific Registers (MSRs)"),
    Known(name="RDPMC of no counter", holds=_no_such_counter,
          cases="RDPMC of a counter that CPUID does not enumerate",
          recorded="reads 0", model="#GP", section="RDPMC—Read Performance-Monitoring Counters"),
    Known(name="single step of HLT", holds=_halted_step,
          cases="HLT with RFLAGS.TF set and the preemption timer running",
          recorded="halts until the timer expires", model="the debug exception resumes execution at once",
          section="HLT—Halt"),
    Known(name="single step and general detect", holds=_detected_step,
          cases="MOV of a debug register with DR7.GD and RFLAGS.TF set: DR6",
          recorded="BD and BS", model="BD: the fault comes before the instruction, which is then no step",
          section="General-Detect Exception Condition"),
    Known(name="CS in real-address mode", holds=_code_without_pe,
          cases="MOV to CR0 that clears PE: access rights of CS",
          recorded="those of a data segment", model="those that CS had: no segment register is loaded",
          section="Switching Back to Real-Address Mode"),
    Known(name="PAUSE-loop exiting", whose=NOBODY, holds=_pause_loop,
          cases="PAUSE-loop exiting: how many PAUSEs are executed",
          recorded="by the recorder's time", model="by the profile's prices",
          section="Controls for PAUSE-Loop Exiting"),
    Known(name="task priority left behind", whose=NOBODY, holds=_task_priority,
          cases="MOV from CR8 without TPR shadow", recorded="what an earlier case left behind", model="0"),
    Known(name="IA32_KERNEL_GS_BASE left behind", whose=NOBODY, holds=_gs_base_left,
          cases="IA32_KERNEL_GS_BASE, which no case sets", recorded="what an earlier case left behind", model="0"),
    Known(name="memory beyond the image", whose=NOBODY, holds=_beyond_the_image,
          cases="guest accesses that EPT maps to memory which the image does not hold",
          recorded="what the recorder's program had there", model="zeros"),
    Known(name="instructions that the model does not decode", whose=MODEL, holds=_not_decoded,
          cases="jumps into memory that the image fills with something else than code",
          recorded="executes it", model="#UD, where its decoder lacks the instruction"),
)
# fmt: on


def explain(
    case: Case,
    environment: Environment,
    differences: Sequence[Difference],
    recorded: Sequence[Outcome],
    model: Sequence[Outcome],
) -> tuple[Known | None, ...]:
    """For each difference of a case the row that explains it; None where none does."""
    first = (dict(recorded[0]) if recorded else {}, dict(model[0]) if model else {})
    return tuple(next(rows_for(Seen(case, environment, each, *first)), None) for each in differences)


def rows_for(seen: Seen) -> Iterator[Known]:
    """The rows that hold for a difference; there is at most one."""
    return (known for known in KNOWN if known.holds(seen))
