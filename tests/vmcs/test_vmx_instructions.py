"""VMX instructions meet the conditions of the manual in its order: #UD, privilege, operand, VMfail, success.

SDM: "Extended-Page-Table Pointer (EPTP)"; "VM-Instruction Error Field"; "VMXON Region".
SDM: "Basic VM-Entry Checks"; "Conventions"; "INVEPT—Invalidate Translations Derived from EPT".
SDM: "INVVPID—Invalidate Translations Based on VPID"; "VMCLEAR—Clear Virtual-Machine Control Structure".
SDM: "VMPTRLD—Load Pointer to Virtual-Machine Control Structure".
SDM: "VMPTRST—Store Pointer to Virtual-Machine Control Structure"; "VMX-Fixed Bits in CR0".
SDM: "VMX-Fixed Bits in CR4"; "VPID and EPT Capabilities"; "Enabling and Entering VMX Operation".
SDM: "VMCALL—Call to VM Monitor"; "VMLAUNCH/VMRESUME—Launch/Resume Virtual Machine".
SDM: "VMXOFF—Leave VMX Operation"; "VMXON—Enter VMX Operation".
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vmcs.root import (
    NOT_CANONICAL,
    OPERAND,
    OTHER,
    REGION,
    REVISION,
    SECOND,
    SHADOW_VMCS,
    UNMAPPED,
    VMCS,
    Root,
    capabilities,
)
from vtsim.base import memory as mem
from vtsim.cpu import slots as s
from vtsim.vmcs import events as ev
from vtsim.vmcs import state as h

UD, GP = ("#UD", 0), ("#GP", 0)
LMA, CS_L, PE, VM, VMXE = 1 << 10, 1 << 13, 1, 1 << 17, 1 << 13
EPTP = 0x10_0000 | 3 << 3 | 6
WITH_POINTER = ("VMXON", "VMCLEAR", "VMPTRLD", "VMPTRST")
WITH_DESCRIPTOR = ("INVEPT", "INVVPID")
ALL = (*WITH_POINTER, *WITH_DESCRIPTOR, "VMXOFF", "VMREAD", "VMWRITE", "VMLAUNCH", "VMRESUME", "VMCALL")


# --- #UD and #GP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALL if name != "VMXON"] + ["VMFUNC"])
def test_outside_vmx_operation_it_is_unknown(name: str) -> None:
    assert Root().execute(name, rsi=OPERAND) == UD


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", ["real", "virtual-8086", "compatibility"])
def test_in_a_mode_without_vmx_instructions_it_is_unknown(name: str, mode: str) -> None:
    root = Root().enter()
    if mode == "real":
        root.m[s.CR0] &= ~PE
    elif mode == "virtual-8086":
        root.m[s.RFLAGS] |= VM
    else:
        root.m[s.CS_ACCESS_RIGHTS] &= ~CS_L

    assert root.execute(name, rsi=OPERAND) == UD


@pytest.mark.parametrize("name", ALL)
def test_outside_ring_0_it_is_refused(name: str) -> None:
    root = Root().enter()
    root.ring = 3

    assert root.execute(name, rsi=OPERAND) == GP


def test_vmxon_outside_ring_0_is_refused_outside_vmx_operation_too() -> None:
    root = Root()
    root.ring = 3

    assert root.pointer("VMXON", REGION) == GP


def test_vmfunc_in_root_operation_is_unknown() -> None:
    assert Root().enter().execute("VMFUNC", rax=0) == UD


@pytest.mark.parametrize(
    ("name", "lacking"),
    [("INVEPT", "INVEPT"), ("INVEPT", "ENABLE_EPT"), ("INVVPID", "INVVPID"), ("INVVPID", "ENABLE_VPID")],
)
def test_an_invalidation_that_the_processor_lacks_is_unknown(name: str, lacking: str) -> None:
    without = {lacking} | ({"UNRESTRICTED_GUEST"} if lacking == "ENABLE_EPT" else set())

    assert Root(capabilities(without=without)).enter().descriptor(name, 2, 0) == UD


@pytest.mark.parametrize("name", WITH_POINTER)
def test_a_memory_operand_that_is_not_mapped_is_a_page_fault(name: str) -> None:
    root = Root() if name == "VMXON" else Root().enter()

    assert root.execute(name, rsi=UNMAPPED) == ("#PF", 2 if name == "VMPTRST" else 0)
    assert int(root.m[s.CR2]) == UNMAPPED


@pytest.mark.parametrize("name", WITH_POINTER)
def test_a_memory_operand_that_is_not_canonical_is_a_protection_fault(name: str) -> None:
    root = Root() if name == "VMXON" else Root().enter()

    assert root.execute(name, rsi=NOT_CANONICAL) == GP


@pytest.mark.parametrize("name", WITH_DESCRIPTOR)
@pytest.mark.parametrize("place", [UNMAPPED, UNMAPPED - 8])
def test_both_halves_of_a_descriptor_are_read(name: str, place: int) -> None:
    root = Root().enter()
    root.engine.store(UNMAPPED - 8, 1)

    assert root.execute(name, rbx=2, rsi=place) == ("#PF", 0)
    assert int(root.m[s.CR2]) == UNMAPPED


# --- VMXON ----------------------------------------------------------------------------------------------------------


def test_vmxon_needs_cr4_vmxe() -> None:
    root = Root()
    root.m[s.CR4] &= ~VMXE

    assert root.pointer("VMXON", REGION) == UD


@pytest.mark.parametrize("feature_control", [0, 1, 4, 3, 2])
def test_vmxon_needs_a_locked_feature_control_that_allows_it_outside_smx(feature_control: int) -> None:
    root = Root()
    root.m[s.MSR_FEATURE_CONTROL] = feature_control

    assert root.pointer("VMXON", REGION) == GP


@pytest.mark.parametrize(("register", "bit"), [(s.CR0, 5), (s.CR4, 11), (s.CR4, 22)])
def test_vmxon_needs_the_fixed_bits_of_cr0_and_cr4(register: int, bit: int) -> None:
    root = Root()
    root.m[register] ^= 1 << bit  # CR0.NE has to be 1; this processor has neither UMIP nor PKE

    assert root.pointer("VMXON", REGION) == GP


@pytest.mark.parametrize("pointer", [REGION | 1, REGION | 0x800, 1 << 46 | REGION, 1 << 63 | REGION])
def test_vmxon_fails_on_a_pointer_that_is_not_aligned_or_too_wide(pointer: int) -> None:
    assert Root().pointer("VMXON", pointer) == "VMfailInvalid"


@pytest.mark.parametrize("header", [REVISION ^ 1, REVISION | h.SHADOW, 0])
def test_vmxon_fails_on_another_revision_or_a_shadow_indicator(header: int) -> None:
    root = Root()
    root.engine.store(REGION, header)

    assert root.pointer("VMXON", REGION) == "VMfailInvalid"
    assert root.execute("VMXOFF") == UD


def test_the_second_half_of_a_regions_header_is_no_part_of_the_revision() -> None:
    root = Root()
    root.engine.store(REGION, REVISION | 0xABCD << 32)

    assert root.pointer("VMXON", REGION) == "ok"


@pytest.mark.parametrize("pointer", [REGION, OTHER, REGION | 1, 1 << 63])
def test_vmxon_in_root_operation_is_error_15_whatever_its_operand(pointer: int) -> None:
    assert Root().enter().pointer("VMXON", pointer) == ev.VMXON_IN_ROOT == 15


def test_vmxon_in_root_operation_without_a_current_vmcs_fails_invalid() -> None:
    assert Root().enter(current=None).pointer("VMXON", REGION) == "VMfailInvalid"


def test_after_vmxon_there_is_no_current_vmcs() -> None:
    root = Root().enter()
    root.execute("VMXOFF")
    root.pointer("VMXON", REGION)

    assert root.current == -1


def test_vmxoff_leaves_vmx_operation() -> None:
    root = Root().enter()

    assert root.execute("VMXOFF") == "ok"
    assert root.execute("VMXOFF") == UD


# --- VMCLEAR, VMPTRLD, VMPTRST --------------------------------------------------------------------------------------

BAD = (VMCS | 1, VMCS | 8, VMCS | 0x800, 1 << 46 | VMCS, 1 << 52 | VMCS, 1 << 63 | VMCS, -1)


@pytest.mark.parametrize("pointer", BAD)
@pytest.mark.parametrize(
    ("name", "error"), [("VMCLEAR", ev.VMCLEAR_INVALID_ADDRESS), ("VMPTRLD", ev.VMPTRLD_INVALID_ADDRESS)]
)
def test_a_vmcs_pointer_that_is_not_aligned_or_too_wide_is_error_2_or_9(name: str, error: int, pointer: int) -> None:
    root = Root().enter()

    assert root.pointer(name, pointer) == error == {"VMCLEAR": 2, "VMPTRLD": 9}[name]
    assert root.current == VMCS
    root.pointer("VMCLEAR", VMCS)
    assert root.pointer(name, pointer) == "VMfailInvalid"


@pytest.mark.parametrize(
    ("name", "error"), [("VMCLEAR", ev.VMCLEAR_VMXON_POINTER), ("VMPTRLD", ev.VMPTRLD_VMXON_POINTER)]
)
def test_the_vmxon_region_as_a_vmcs_is_error_3_or_10(name: str, error: int) -> None:
    assert Root().enter().pointer(name, REGION) == error == {"VMCLEAR": 3, "VMPTRLD": 10}[name]


@pytest.mark.parametrize("pointer", [OTHER, 1 << 31 | OTHER, 1 << 32 | OTHER])
def test_a_processor_with_32_bit_pointers_refuses_wider_ones(pointer: int) -> None:
    root = Root(capabilities(added={"PHYSICAL_ADDRESSES_32_BIT"})).enter()

    assert root.pointer("VMCLEAR", pointer) == (2 if pointer >> 32 else "ok")


@pytest.mark.parametrize("header", [REVISION ^ 1, 0, h.REVISION])
def test_vmptrld_of_another_revision_is_error_11(header: int) -> None:
    root = Root().enter()
    root.engine.store(OTHER, header)

    assert root.pointer("VMPTRLD", OTHER) == ev.VMPTRLD_WRONG_REVISION == 11


@pytest.mark.parametrize("pointer", [1 << 40, 0xC0000000])
def test_vmptrld_where_no_memory_is_reads_no_revision(pointer: int) -> None:
    root = Root().enter()

    assert root.pointer("VMPTRLD", pointer) == 11
    assert root.pointer("VMCLEAR", pointer) == "ok"


@pytest.mark.parametrize(("shadowing", "ended"), [(True, "ok"), (False, 11)])
def test_a_shadow_vmcs_can_be_loaded_where_the_processor_has_vmcs_shadowing(shadowing: bool, ended: str | int) -> None:
    root = Root(capabilities() if shadowing else capabilities(without={"VMCS_SHADOWING"})).enter()

    assert root.pointer("VMPTRLD", SHADOW_VMCS) == ended


def test_vmptrst_stores_the_pointer_of_the_current_vmcs() -> None:
    root = Root().enter()
    assert root.current == VMCS
    root.pointer("VMPTRLD", OTHER)
    assert root.current == OTHER


def test_vmclear_of_another_vmcs_leaves_the_current_one() -> None:
    root = Root().enter()

    assert root.pointer("VMCLEAR", OTHER) == "ok"
    assert root.current == VMCS
    assert root.pointer("VMCLEAR", VMCS) == "ok"
    assert root.current == -1


def test_fields_survive_vmclear_and_another_vmcs() -> None:
    root = Root().enter()
    root.execute("VMWRITE", rcx=0x6800, rbx=0x11)
    root.pointer("VMPTRLD", OTHER)
    root.execute("VMWRITE", rcx=0x6800, rbx=0x22)
    root.pointer("VMCLEAR", VMCS)
    root.pointer("VMPTRLD", VMCS)

    assert (root.field("GUEST_CR0"), root.field("GUEST_CR0", OTHER)) == (0x11, 0x22)


# --- VMREAD, VMWRITE ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["VMREAD", "VMWRITE"])
def test_without_a_current_vmcs_fields_are_out_of_reach(name: str) -> None:
    assert Root().enter(current=None).execute(name, rcx=0x6800) == "VMfailInvalid"


@pytest.mark.parametrize("name", ["VMREAD", "VMWRITE"])
@pytest.mark.parametrize("encoding", [0x7FFE, 0x0814, 0x6801, 0x1000, 0x8000, 1 << 32 | 0x6800, -1, 0x2086])
def test_an_encoding_without_a_component_is_error_12(name: str, encoding: int) -> None:
    assert Root().enter().execute(name, rcx=encoding) == ev.UNSUPPORTED_COMPONENT == 12


@pytest.mark.parametrize("encoding", [0x4400, 0x4402, 0x6400, 0x2400, 0x2401])
def test_vmwrite_of_exit_information_is_error_13_unless_the_processor_allows_it(encoding: int) -> None:
    refused = Root(capabilities(without={"VMWRITE_EXIT_INFORMATION"})).enter()
    allowed = Root(capabilities(added={"VMWRITE_EXIT_INFORMATION"})).enter()

    assert refused.execute("VMWRITE", rcx=encoding, rbx=5) == ev.READ_ONLY_COMPONENT == 13
    assert refused.execute("VMREAD", rcx=encoding) == "ok"
    assert allowed.execute("VMWRITE", rcx=encoding, rbx=5) == "ok"


def test_an_unsupported_component_is_not_a_read_only_one() -> None:
    root = Root(capabilities(without={"VMWRITE_EXIT_INFORMATION"})).enter()

    assert root.execute("VMWRITE", rcx=0x6410) == 12


def test_vmread_and_vmwrite_take_memory_operands() -> None:
    root = Root().enter()
    root.engine.store(OPERAND, 0x1122334455667788)

    assert root.execute("VMWRITE from memory", rcx=0x6800, rsi=OPERAND) == "ok"
    assert root.field("GUEST_CR0") == 0x1122334455667788
    assert root.execute("VMREAD to memory", rcx=0x6800, rsi=SECOND) == "ok"
    assert root.engine.load(SECOND) == 0x1122334455667788


def test_memory_operands_cross_pages() -> None:
    root = Root().enter()
    root.execute("VMWRITE", rcx=0x6800, rbx=0x1122334455667788)

    assert root.execute("VMREAD to memory", rcx=0x6800, rsi=0x502FFD) == "ok"
    assert root.execute("VMWRITE from memory", rcx=0x6802, rsi=0x502FFD) == "ok"
    assert root.field("GUEST_CR3") == 0x1122334455667788


def test_a_refused_component_faults_on_no_operand() -> None:
    root = Root().enter()

    assert root.execute("VMREAD to memory", rcx=0x7FFE, rsi=UNMAPPED) == 12
    assert root.execute("VMREAD to memory", rcx=0x6800, rsi=UNMAPPED) == ("#PF", 2)
    assert root.execute("VMWRITE from memory", rcx=0x6800, rsi=UNMAPPED) == ("#PF", 0)


def test_outside_64_bit_mode_operands_have_32_bits() -> None:
    root = Root().enter()
    root.execute("VMWRITE", rcx=0x2800, rbx=0x1122334455667788)
    root.m[s.EFER] &= ~LMA

    assert root.execute("VMREAD", rcx=7 << 32 | 0x2800, rbx=-1) == "ok"
    assert int(root.m[s.GPR + s.RBX]) == 0x55667788
    assert root.execute("VMREAD", rcx=0x2801) == "ok"
    assert int(root.m[s.GPR + s.RBX]) == 0x11223344
    assert root.execute("VMWRITE", rcx=0x2800, rbx=-1) == "ok"
    assert root.field("VMCS_LINK_POINTER") == 0xFFFFFFFF


def test_a_failure_leaves_its_number_and_a_success_leaves_the_last_one() -> None:
    root = Root().enter()
    root.execute("VMREAD", rcx=0x7FFE)
    assert root.execute("VMREAD", rcx=0x4400) == "ok"

    assert int(root.m[s.GPR + s.RBX]) == 12


# --- VMLAUNCH, VMRESUME, VMCALL -------------------------------------------------------------------------------------


def launched(root: Root, state: int = h.LAUNCHED) -> Root:
    """A current VMCS with a launch state, as if a VM entry had set it."""
    words = root.engine.contents(VMCS >> 12, mem.VMCS_REGION)
    words[h.V_LAUNCHED], words[h.V_SESSION] = state, root.m[s.VMX_SESSION]
    return root


@pytest.mark.parametrize("name", ["VMLAUNCH", "VMRESUME"])
def test_vm_entry_without_a_current_vmcs_fails_invalid(name: str) -> None:
    assert Root().enter(current=None).execute(name) == "VMfailInvalid"


@pytest.mark.parametrize("name", ["VMLAUNCH", "VMRESUME"])
def test_vm_entry_with_a_shadow_vmcs_fails_invalid(name: str) -> None:
    assert Root().enter(SHADOW_VMCS).execute(name) == "VMfailInvalid"


def test_vmlaunch_of_a_launched_vmcs_is_error_4() -> None:
    assert launched(Root().enter()).execute("VMLAUNCH") == ev.VMLAUNCH_NON_CLEAR == 4


def test_vmresume_of_a_clear_vmcs_is_error_5() -> None:
    assert Root().enter().execute("VMRESUME") == ev.VMRESUME_NON_LAUNCHED == 5


def test_vmclear_makes_a_launched_vmcs_clear() -> None:
    root = launched(Root().enter())
    root.pointer("VMCLEAR", VMCS)
    root.pointer("VMPTRLD", VMCS)

    assert root.execute("VMRESUME") == 5


def test_vmresume_of_a_vmcs_launched_before_vmxoff_is_error_6() -> None:
    root = launched(Root().enter())
    root.execute("VMXOFF")
    root.pointer("VMXON", REGION)
    root.pointer("VMPTRLD", VMCS)

    assert root.execute("VMRESUME") == ev.VMRESUME_AFTER_VMXOFF == 6


@pytest.mark.parametrize("name", ["VMLAUNCH", "VMRESUME"])
def test_vm_entry_blocked_by_mov_ss_is_error_26_before_the_launch_state_counts(name: str) -> None:
    root = launched(Root().enter(), h.LAUNCHED if name == "VMLAUNCH" else h.CLEAR)
    root.m[s.INTERRUPT_SHADOW], root.m[s.SHADOW_KIND] = 2, 2

    assert root.execute(name) == ev.ENTRY_BLOCKED_BY_MOV_SS == 26


def test_blocking_by_sti_does_not_keep_a_vm_entry() -> None:
    root = launched(Root().enter())
    root.m[s.INTERRUPT_SHADOW], root.m[s.SHADOW_KIND] = 2, 1

    assert root.execute("VMLAUNCH") == 4


def test_vmcall_in_root_operation_is_error_1() -> None:
    assert Root().enter().execute("VMCALL") == ev.VMCALL_IN_ROOT == 1
    assert Root().enter(current=None).execute("VMCALL") == "VMfailInvalid"


# --- INVEPT, INVVPID ------------------------------------------------------------------------------------------------

MALFORMED = {
    "memory type 1": EPTP & ~7 | 1, "walk length 1": EPTP & ~0x38, "walk length 5": EPTP & ~0x38 | 4 << 3,
    "shadow stack": EPTP | 1 << 7, "bit 8": EPTP | 1 << 8, "bit 11": EPTP | 1 << 11, "too wide": EPTP | 1 << 46,
    "nothing": 0,
}  # fmt: skip


@pytest.mark.parametrize("kind", [0, 3, 4, 1 << 32 | 1, -1])
def test_invept_of_another_type_is_error_28(kind: int) -> None:
    assert Root().enter().descriptor("INVEPT", kind, EPTP) == ev.INVALID_INVALIDATION_OPERAND == 28


@pytest.mark.parametrize(("kind", "feature"), [(1, "INVEPT_SINGLE_CONTEXT"), (2, "INVEPT_ALL_CONTEXTS")])
def test_invept_of_a_type_that_the_processor_lacks_is_error_28(kind: int, feature: str) -> None:
    assert Root(capabilities(without={feature})).enter().descriptor("INVEPT", kind, EPTP) == 28
    assert Root().enter().descriptor("INVEPT", kind, EPTP) == "ok"


@pytest.mark.parametrize("eptp", MALFORMED.values(), ids=MALFORMED)
def test_invept_of_one_context_wants_an_eptp_that_vm_entry_would_accept(eptp: int) -> None:
    root = Root().enter()

    assert root.descriptor("INVEPT", 1, eptp) == 28
    assert root.descriptor("INVEPT", 2, eptp) == "ok"


@pytest.mark.parametrize(("eptp", "feature"), [(EPTP | 1 << 6, "EPT_ACCESSED_DIRTY"), (EPTP & ~7, "EPT_UNCACHEABLE")])
def test_what_an_eptp_may_hold_depends_on_the_processor(eptp: int, feature: str) -> None:
    assert Root(capabilities(without={feature})).enter().descriptor("INVEPT", 1, eptp) == 28
    assert Root(capabilities(added={feature})).enter().descriptor("INVEPT", 1, eptp) == "ok"


@pytest.mark.parametrize("kind", [4, 1 << 32, 1 << 32 | 1, -1])
def test_invvpid_of_another_type_is_error_28(kind: int) -> None:
    assert Root().enter().descriptor("INVVPID", kind, 1) == 28


@pytest.mark.parametrize(
    ("kind", "feature"),
    list(enumerate(("INDIVIDUAL_ADDRESS", "SINGLE_CONTEXT", "ALL_CONTEXTS", "SINGLE_CONTEXT_KEEPING_GLOBALS"))),
)
def test_invvpid_of_a_type_that_the_processor_lacks_is_error_28(kind: int, feature: str) -> None:
    assert Root(capabilities(without={f"INVVPID_{feature}"})).enter().descriptor("INVVPID", kind, 1) == 28
    assert Root().enter().descriptor("INVVPID", kind, 1) == "ok"


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("low", [1 << 16 | 1, 1 << 63 | 1])
def test_invvpid_with_reserved_bits_is_error_28_in_every_type(kind: int, low: int) -> None:
    assert Root().enter().descriptor("INVVPID", kind, low) == 28


@pytest.mark.parametrize(("kind", "ended"), [(0, 28), (1, 28), (2, "ok"), (3, 28)])
def test_invvpid_of_vpid_0_is_error_28_but_where_all_are_meant(kind: int, ended: int | str) -> None:
    assert Root().enter().descriptor("INVVPID", kind, 0) == ended


@pytest.mark.parametrize(("kind", "ended"), [(0, 28), (1, "ok"), (2, "ok"), (3, "ok")])
def test_invvpid_of_an_address_that_is_not_canonical_is_error_28_where_it_is_used(kind: int, ended: int | str) -> None:
    assert Root().enter().descriptor("INVVPID", kind, 1, 1 << 47) == ended


@pytest.mark.parametrize("name", WITH_DESCRIPTOR)
def test_a_type_is_refused_before_the_descriptor_is_read(name: str) -> None:
    assert Root().enter().execute(name, rbx=9, rsi=UNMAPPED) == 28


# --- MOV to CR0 and CR4 in VMX operation ----------------------------------------------------------------------------

CR0, CR4 = 0x80050033, 0x20A0


@pytest.mark.parametrize(
    ("name", "value", "ended"),
    [
        ("CR0", CR0, "ok"), ("CR0", CR0 | 1 << 3, "ok"), ("CR0", CR0 | 1 << 17, "ok"), ("CR0", CR0 & ~(1 << 5), GP),
        ("CR0", CR0 & ~(1 << 31), GP), ("CR0", CR0 | 1 << 29, GP), ("CR0", CR0 | 3 << 29, "ok"), ("CR0", CR0 | 1 << 32, GP),
        ("CR4", CR4, "ok"), ("CR4", CR4 | 1 << 16, "ok"), ("CR4", CR4 & ~(1 << 13), GP), ("CR4", CR4 & ~(1 << 5), GP),
        ("CR4", CR4 | 1 << 22, GP), ("CR4", CR4 | 1 << 40, GP), ("CR4", CR4 | 1 << 12, GP),
    ],
)  # fmt: skip
def test_control_registers_keep_their_fixed_bits_in_vmx_operation(name: str, value: int, ended: object) -> None:
    assert Root().enter().execute(f"MOV to {name}", rbx=value) == ended


def test_outside_vmx_operation_cr4_vmxe_may_be_cleared() -> None:
    assert Root().execute("MOV to CR4", rbx=CR4 & ~VMXE) == "ok"


# --- all of the list ------------------------------------------------------------------------------------------------

WITH_SMM = {16, 17, 18, 19, 20, 22, 23, 24, 25}  # reported by the dual-monitor treatment of SMIs and SMM only
BY_VM_ENTRY = {7, 8}  # tested where the checks of the VMCS are


def test_every_error_number_that_can_occur_outside_smm_has_a_test() -> None:
    text = Path(__file__).read_text()
    named = {value for name, value in vars(ev).items() if isinstance(value, int) and f"ev.{name}" in text}

    assert named >= set(ev.INSTRUCTION_ERRORS) - WITH_SMM - BY_VM_ENTRY
