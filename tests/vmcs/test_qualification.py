"""Exit qualifications and instruction information agree with recorded exits and read as phrases.

Values marked recorded are from a processor model that is not ours (Bochs 3.0 development build, Skylake-X).

SDM: "Basic VM-Exit Information".
"""

import pytest

from vtsim.vmcs import instruction_information as information
from vtsim.vmcs import qualification as q
from vtsim.vmcs import reasons

RAX, RCX, RDX, RBX, RSP = range(5)
R9, R12, R13 = 9, 12, 13
DS, FS = 3, 4
NONE = -1


@pytest.mark.parametrize(
    "built, recorded",
    [
        (q.cr_access(0, q.MOV_TO_CR, RBX), 0x300),  # mov cr0,rbx
        (q.cr_access(4, q.MOV_TO_CR, RBX), 0x304),  # mov cr4,rbx
        (q.lmsw(0xABC0, 0), 0xABC0_0030),  # lmsw bx
        (q.mov_dr(7, 1, RBX), 0x317),  # mov rbx,dr7
        (q.mov_dr(3, 0, RBX), 0x303),  # mov dr3,rbx
        (q.io_instruction(0x7FFD, 1, 1, 0, 0, 0), 0x7FFD_0008),  # in al,dx
        (q.io_instruction(0x10, 2, 1, 0, 0, 0), 0x10_0009),  # in ax,dx
        (q.io_instruction(0x80, 1, 1, 1, 1, 0), 0x80_0038),  # rep insb
        (q.io_instruction(0x80, 4, 0, 1, 0, 0), 0x80_0013),  # outsd
        (q.apic_access(0x30, q.APIC_LINEAR_READ), 0x30),  # mov eax,[rcx]
        (q.apic_access(0xC0, q.APIC_LINEAR_WRITE), 0x10C0),  # mov [rcx],eax
        (q.task_switch(0x50, q.TASK_BY_CALL), 0x50),  # call 0x50:0
        (q.task_switch(0x50, q.TASK_BY_IRET), 0x4000_0050),  # iretd
        (q.task_switch(0x88, q.TASK_BY_JMP), 0x8000_0088),  # jmp 0x88:0
        (q.task_switch(0x50, q.TASK_BY_GATE), 0xC000_0050),  # int 0x81
        (q.ept_violation(q.EPT_READ, 0b000, 1, 1) | q.ept_linear_address(1, 1, 0), 0x781),  # mov rax,[rcx]
        (q.ept_violation(q.EPT_READ, 0b100, 1, 1) | q.ept_linear_address(1, 1, 0), 0x7A1),  # mov rax,[rcx]
        (q.ept_violation(q.EPT_WRITE, 0b001, 1, 1) | q.ept_linear_address(1, 1, 0), 0x78A),  # mov [rcx],rax
        (q.ept_violation(q.EPT_FETCH, 0b011, 1, 1) | q.ept_linear_address(1, 1, 0), 0x79C),  # jmp rcx
        (q.ept_violation(q.EPT_READ, 0b100, 1, 0), 0xA1),  # mov eax,[rcx], on a guest page table
    ],
)
def test_builders_give_recorded_qualifications(built, recorded):
    assert built == recorded


def test_an_address_that_is_not_linear_is_never_the_final_one():
    assert q.ept_violation(q.EPT_READ, 0, 0, 1) == q.EPT_READ


@pytest.mark.parametrize(
    "reason, qualification, text",
    [
        (reasons.IO_INSTRUCTION, q.io_instruction(0x608, 4, 1, 0, 0, 0), "port 0x608 in 4 bytes"),
        (reasons.IO_INSTRUCTION, q.io_instruction(0x80, 1, 0, 0, 0, 1), "port 0x80 out 1 byte"),
        (reasons.IO_INSTRUCTION, q.io_instruction(0x1F0, 2, 1, 1, 1, 0), "port 0x1f0 in 2 bytes string rep"),
        (reasons.CR_ACCESS, q.cr_access(3, q.MOV_TO_CR, RAX), "CR3 <- RAX"),
        (reasons.CR_ACCESS, q.cr_access(8, q.MOV_FROM_CR, R12), "R12 <- CR8"),
        (reasons.CR_ACCESS, q.cr_access(0, q.CLTS, 0), "CLTS"),
        (reasons.CR_ACCESS, q.lmsw(0x1, 0), "LMSW 0x1"),
        (reasons.CR_ACCESS, q.lmsw(0x1, 1), "LMSW 0x1 from memory"),
        (reasons.DR_ACCESS, q.mov_dr(7, 0, RCX), "DR7 <- RCX"),
        (reasons.DR_ACCESS, q.mov_dr(6, 1, RDX), "RDX <- DR6"),
        (reasons.EPT_VIOLATION, 0x181, "gpa data read, not present"),
        (reasons.EPT_VIOLATION, 0x18A, "gpa data write, allowed r--"),
        (reasons.EPT_VIOLATION, 0x19C, "gpa instruction fetch, allowed rw-"),
        (reasons.EPT_VIOLATION, 0x083, "gpa paging-structure read+write, not present"),
        (reasons.APIC_ACCESS, 0x10C0, "offset 0xc0 linear write"),
        (reasons.APIC_ACCESS, 0xF000, "physical, instruction"),
        (reasons.APIC_ACCESS, 0x7080, "offset 0x80 type 7"),
        (reasons.APIC_WRITE, 0x300, "offset 0x300"),
        (reasons.EOI_INDUCED, 48, "vector 48"),
        (reasons.TASK_SWITCH, 0xC000_0050, "task gate to selector 0x50"),
        (reasons.INVLPG, 0x82_8040, "linear 0x828040"),
        (reasons.INVLPG, -4096, "linear 0xfffffffffffff000"),
        (reasons.MSR_LOAD_FAIL, 2, "entry 2"),
        (reasons.INVALID_STATE, 4, "VMCS link pointer"),
        (reasons.INVALID_STATE, 0, ""),
        (reasons.MWAIT_INSTRUCTION, 1, "monitor armed"),
        (reasons.CPUID, 0, ""),
        (reasons.VMREAD, 0x10, "0x10"),
        (reasons.EXCEPTION_NMI, 0x4000, ""),
    ],
)
def test_a_qualification_reads_as_a_phrase(reason, qualification, text):
    assert q.describe(reason, qualification) == text


@pytest.mark.parametrize(
    "qualification, interruption, text",
    [
        (0x5000_0000, 0x8000_0B0E, "#PF at 0x50000000"),
        (0x4001, 0x8000_0301, "#DB B0 BS"),
        (0, 0x8000_0306, "#UD"),
        (0, 0x8000_03FF, "vector 255"),
    ],
)
def test_an_exception_reads_as_its_mnemonic_and_what_it_qualifies(qualification, interruption, text):
    assert q.describe(reasons.EXCEPTION_NMI, qualification, interruption) == text


@pytest.mark.parametrize("reason", range(reasons.REASON_COUNT))
def test_every_reason_and_any_qualification_can_be_described(reason):
    for qualification in (0, 1, -1, 1 << 63, 0xFFFF_FFFF):
        assert isinstance(q.describe(reason, qualification, 0x8000_0300), str)


@pytest.mark.parametrize(
    "recorded, built",
    [
        (0x0041_8100, information.memory_operand(0, 2, DS, NONE, RAX)),  # vmclear [rax]
        (0x06C1_8100, information.memory_operand(0, 2, DS, NONE, R13)),  # vmptrld [r13]
        (0x000D_8101, information.memory_operand(1, 2, DS, RBX, RAX)),  # vmxon [rax+rbx*2+0x10]
        (0x300D_8100, information.memory_operand(0, 2, DS, RBX, RAX) | RBX << 28),  # vmread [rax+rbx],rbx
        (0x3025_8103, information.memory_operand(3, 2, DS, R9, RAX) | RBX << 28),  # vmread [rax+r9*8-8],rbx
        (0x380D_8102, information.memory_operand(2, 2, DS, RBX, NONE) | RBX << 28),  # vmread [rbx*4+...],rbx
        (0x1042_0100, information.memory_operand(0, 2, FS, NONE, RAX) | RCX << 28),  # invvpid rcx,[fs:rax]
        (0x100D_8082, information.memory_operand(2, 1, DS, RBX, RAX) | RCX << 28),  # invvpid rcx,[eax+ebx*4]
    ],
)
def test_memory_operands_are_encoded_as_recorded(recorded, built):
    assert built == recorded


@pytest.mark.parametrize(
    "reason, recorded, instruction",
    [
        (reasons.GDTR_IDTR, 0x0041_8100, "SGDT"),
        (reasons.GDTR_IDTR, 0x1041_8100, "SIDT"),
        (reasons.GDTR_IDTR, 0x20C1_8100, "LGDT"),
        (reasons.GDTR_IDTR, 0x30C1_8100, "LIDT"),
        (reasons.LDTR_TR, 0x1041_8100, "STR"),
        (reasons.LDTR_TR, 0x2041_8100, "LLDT"),
        (reasons.LDTR_TR, 0x3041_8100, "LTR"),
    ],
)
def test_instructions_that_share_a_reason_are_told_apart(reason, recorded, instruction):
    identity = information.decode(reason, recorded)["IDENTITY"]

    assert information.IDENTITIES[reason][identity] == instruction


def test_a_recorded_vmread_decodes_into_its_operands():
    parts = information.decode(reasons.VMREAD, 0x3025_8103)  # vmread [rax+r9*8-8],rbx

    assert parts == {
        "SCALE": 3, "ADDRESS_SIZE": 2, "SEGMENT": DS, "INDEX": R9, "NO_INDEX": 0, "BASE": RAX, "NO_BASE": 0,
        "REGISTER1": 0, "IN_REGISTER": 0, "REGISTER2": RBX,
    }  # fmt: skip


@pytest.mark.parametrize("recorded, size", [(0x400, 0), (0xC00, 1), (0x1400, 2)])  # rdrand of 16, 32, 64 bits
def test_a_recorded_rdrand_tells_its_operand_size(recorded, size):
    parts = information.decode(reasons.RDRAND, recorded)

    assert parts["OPERAND_SIZE"] == size


def test_a_register_operand_is_marked_as_one():
    assert information.decode(reasons.VMREAD, information.register_operand(RSP))["REGISTER1"] == RSP
    assert information.decode(reasons.VMREAD, information.register_operand(RSP))["IN_REGISTER"] == 1


def test_a_reason_without_instruction_information_has_no_parts():
    assert information.decode(reasons.CPUID, 0xFFFF_FFFF) == {}


@pytest.mark.parametrize("reason", information.LAYOUTS)
def test_parts_of_a_layout_do_not_overlap(reason):
    used = [bit for part in information.LAYOUTS[reason] for bit in range(part.low, part.low + part.width)]

    assert len(used) == len(set(used))
    assert max(used) < 32
