"""The VM-exit instruction information and exit qualification of instructions, from a row's operand form.

SDM: "Information for VM Exits Due to Instruction Execution"; "Basic VM-Exit Information".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.operands import address_mask, linear, offset_of, segment_of

# fmt: off
# fields of the instruction information (vtsim.vmcs.instruction_information has them as a table)
I_REGISTER1, I_ADDRESS_SIZE, I_IN_REGISTER, I_OPERAND_SIZE, I_SEGMENT = 3, 7, 1 << 10, 11, 15
I_INDEX, I_NO_INDEX, I_BASE, I_NO_BASE, I_REGISTER2 = 18, 1 << 22, 23, 1 << 27, 28
# fmt: on


@kernel
def memory_information(a: Arena, r: int) -> int:
    """Scaling, address size, segment, index and base of a decoded row's memory operand."""
    packed = a[r + o.ROW_MEM]
    base = packed & 31
    index = (packed >> o.MEM_INDEX) & 31
    found = ((packed >> o.MEM_SCALE) & 3) | ((packed >> o.MEM_ADDRESS_SIZE) & 3) << I_ADDRESS_SIZE
    found |= segment_of(packed) << I_SEGMENT
    found |= index << I_INDEX if index < 16 else I_NO_INDEX
    return found | (base << I_BASE if base < 16 else I_NO_BASE)


@kernel
def instruction_information(m: Record, a: Arena, r: int, op: int) -> int:
    """What the VM-exit instruction-information field says about a row; 0 where it says nothing."""
    packed = a[r + o.ROW_MEM]
    if packed & o.MEM_DECODED == 0:
        return 0
    in_register = packed & o.MEM_REGISTER != 0
    size = (packed >> o.MEM_OPERAND_SIZE) & 3
    r1 = a[r + o.ROW_R1] & 15
    r2 = a[r + o.ROW_R2] & 15
    if op == o.RDRAND or op == o.RDSEED or op == o.TPAUSE or op == o.UMWAIT:
        return r2 << I_REGISTER1 | size << I_OPERAND_SIZE
    if op == o.LOADIWKEY:
        return r1 << I_REGISTER1 | r2 << I_REGISTER2
    if op == o.INS or op == o.OUTS:
        segment = segment_of(packed) << I_SEGMENT if op == o.OUTS else 0  # INS has only ES
        return ((packed >> o.MEM_ADDRESS_SIZE) & 3) << I_ADDRESS_SIZE | segment
    if op == o.VMREAD or op == o.VMWRITE:
        if in_register:
            return r1 << I_REGISTER1 | I_IN_REGISTER | r2 << I_REGISTER2
        return memory_information(a, r) | r2 << I_REGISTER2
    if op == o.INVEPT or op == o.INVVPID or op == o.INVPCID:
        return memory_information(a, r) | r1 << I_REGISTER2
    if op == o.SLDT or op == o.STR or op == o.LLDT or op == o.LTR:
        identity = 0
        if op == o.STR:
            identity = 1
        elif op == o.LLDT:
            identity = 2
        elif op == o.LTR:
            identity = 3
        if in_register:
            return r2 << I_REGISTER1 | I_IN_REGISTER | identity << I_REGISTER2
        return memory_information(a, r) | identity << I_REGISTER2
    if op == o.SGDT or op == o.SIDT or op == o.LGDT or op == o.LIDT:
        identity = 0
        if op == o.SIDT:
            identity = 1
        elif op == o.LGDT:
            identity = 2
        elif op == o.LIDT:
            identity = 3
        wide = 1 if size == 1 and m[s.MODE] else 0
        return memory_information(a, r) | wide << I_OPERAND_SIZE | identity << I_REGISTER2
    if in_register:
        return 0
    if op == o.VMCLEAR or op == o.VMPTRLD or op == o.VMPTRST or op == o.VMXON or op == o.XSAVES or op == o.XRSTORS:
        return memory_information(a, r)
    return 0


@kernel
def instruction_qualification(m: Record, a: Arena, r: int, op: int) -> int:
    """The exit qualification of an op that exits by rule.

    SDM: "Basic VM-Exit Information".
    """
    packed = a[r + o.ROW_MEM]
    if op == o.MOV_FROM_DR or op == o.MOV_TO_DR:
        return (a[r + o.ROW_IMM] & 7) | (16 if op == o.MOV_FROM_DR else 0) | (a[r + o.ROW_R1] & 15) << 8
    if op == o.INVLPG:
        return linear(m, segment_of(packed), offset_of(m, a, r))
    if op == o.MWAIT:
        return 1 if m[s.MONITOR_ARMED] else 0
    if packed & o.MEM_REGISTER or op == o.INS or op == o.OUTS:
        return 0
    displacement = a[r + o.ROW_DISP]
    if packed & 31 == o.RIP_BASE:
        displacement += m[s.RIP] + m[s.OP_LENGTH]
    return displacement & address_mask(packed)
