"""Exit reasons, instruction errors and event types are the manual's, under the names Linux prints.

SDM: "VMX Basic Exit Reasons".
"""

import pytest

from vtsim.vmcs import events, reasons

# Reasons of a processor model that is not ours (Bochs, Skylake-X) that define the VM-exit instruction length.
RECORDED_WITH_LENGTH = {*range(10, 33), 36, 39, 40, 46, 47, 50, 51, 53, 54, 55, 57, 58, 59, 61, 63, 64}


def test_constants_are_the_table():
    others = {"REASON_COUNT", "ENTRY_FAILURE", "BASIC_REASON"}
    constants = {name: value for name, value in vars(reasons).items() if isinstance(value, int)}

    assert {name: value for name, value in constants.items() if name not in others} == {
        reason.name: reason.number for reason in reasons.REASONS
    }


def test_numbers_ascend_up_to_the_count():
    numbers = [reason.number for reason in reasons.REASONS]

    assert numbers == sorted(set(numbers))
    assert numbers[-1] + 1 == reasons.REASON_COUNT


def test_only_numbers_the_manual_leaves_out_are_missing():
    assert set(range(reasons.REASON_COUNT)) - set(reasons.BY_NUMBER) == {35, 38, 42, 71, 82, 83}


def test_reasons_with_an_instruction_length_agree_with_a_recorded_processor():
    recorded_range = range(65)

    assert {r.number for r in reasons.REASONS if r.instruction and r.number in recorded_range} == {
        *RECORDED_WITH_LENGTH,
        reasons.ENCLS,
    }


# as in VMX_EXIT_REASONS of Linux arch/x86/include/uapi/asm/vmx.h, which kvm_exit and perf kvm stat print
@pytest.mark.parametrize(
    "number, name",
    [
        (0, "EXCEPTION_NMI"),
        (1, "EXTERNAL_INTERRUPT"),
        (10, "CPUID"),
        (12, "HLT"),
        (18, "VMCALL"),
        (28, "CR_ACCESS"),
        (30, "IO_INSTRUCTION"),
        (31, "MSR_READ"),
        (32, "MSR_WRITE"),
        (40, "PAUSE_INSTRUCTION"),
        (48, "EPT_VIOLATION"),
        (49, "EPT_MISCONFIG"),
        (52, "PREEMPTION_TIMER"),
        (56, "APIC_WRITE"),
        (74, "BUS_LOCK"),
    ],
)
def test_names_are_those_linux_prints(number, name):
    assert reasons.reason_name(number) == name


def test_an_undefined_reason_is_named_by_its_number():
    assert reasons.reason_name(35) == "REASON_35"


def test_instruction_errors_have_the_gaps_of_the_manual():
    assert set(range(1, 29)) - set(events.INSTRUCTION_ERRORS) == {14, 21, 27}


def test_every_instruction_error_has_one_constant():
    listed = vars(events)
    first, last = list(listed).index("VMCALL_IN_ROOT"), list(listed).index("INVALID_INVALIDATION_OPERAND")

    assert list(listed.values())[first : last + 1] == list(events.INSTRUCTION_ERRORS)


@pytest.mark.parametrize(
    "information, text",
    [
        (0, "none"),
        (0x8000_0030, "external interrupt vector 48"),
        (0x8000_0202, "non-maskable interrupt"),
        (0x8000_0B0E, "hardware exception #PF with error code"),
        (0x8000_0603, "software exception #BP"),
        (0x8000_0480, "software interrupt vector 128"),
        (0x8000_031E, "hardware exception vector 30"),
        (0x8000_0100, "type 1 vector 0"),
    ],
)
def test_interruption_information_reads_as_a_phrase(information, text):
    assert events.describe_event(information) == text
