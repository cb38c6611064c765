"""I/O instructions: which exit, and what a port of this machine answers.

SDM: "I/O-Bitmap Addresses".
Not modelled: the I/O permission bitmap for programs that were not decoded.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_BASE_HZ, A_PORTS, is_memory, load, store
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import AGAIN, GP, JUMPED, MODEL_FAULT, NEXT, OUT_OF_MEMORY, PORT_READ, PORT_WRITE, RF_RF, STOPPED
from vtsim.cpu.kernels import modes
from vtsim.cpu.kernels.access import access_as, bitmap_bit
from vtsim.cpu.kernels.digest import port_named, saw
from vtsim.cpu.kernels.exceptions import raise_exception, raise_fault
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.information import instruction_information
from vtsim.cpu.kernels.ledger import charge
from vtsim.cpu.kernels.operands import SEGMENT_REFUSED, address_mask, checked, linear, load_linear, segment_of
from vtsim.cpu.kernels.pending import between_iterations
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v

# fmt: off
# port kinds: how a port answers in compiled code
PORT_ABSENT, PORT_LATCH, PORT_COUNTER, PORT_PLATFORM = range(4)
PORTS = 65536
RF_DF = 1 << 10
PM_TIMER_HZ = 3_579_545
# fmt: on


@kernel
def port_exits(m: Record, a: Arena, port: int, size: int) -> bool:
    """Does this I/O instruction exit?

    SDM: "I/O-Bitmap Addresses".
    """
    at = m[s.VMCS]
    controls = a[at + v.PRIMARY_PROC_CONTROLS]
    if controls & b.USE_IO_BITMAPS == 0:
        return controls & b.UNCONDITIONAL_IO_EXITING != 0
    if port + size > PORTS:
        return True
    for n in range(port, port + size):
        base = a[at + v.IO_BITMAP_A] if n < 0x8000 else a[at + v.IO_BITMAP_B]
        if bitmap_bit(a, base, n & 0x7FFF):
            return True
    return False


@kernel
def port_access(m: Record, a: Arena, port: int, size: int, write: bool) -> int:
    """A port access that reaches a device of this machine: NEXT, or STOPPED where the platform must answer."""
    a[m[s.OWNER] + k.PORT_ACCESSES] += 1
    kind = a[a[A_PORTS] + port]
    charge(m, a, o.BUS, m[s.PORT_CYCLES])
    if kind == PORT_PLATFORM:
        m[s.STOP] = PORT_WRITE if write else PORT_READ
        m[s.STOP_A] = port
        m[s.STOP_B] = size
        m[s.STOP_C] = m[s.GPR + s.RAX]
        return STOPPED
    mask = (1 << (8 * size)) - 1
    if write:
        if kind == PORT_LATCH:
            a[a[A_PORTS] + PORTS + port] = m[s.GPR + s.RAX] & mask
        return NEXT
    value = mask
    if kind == PORT_LATCH:
        value = a[a[A_PORTS] + PORTS + port] & mask
    elif kind == PORT_COUNTER:
        value = (m[s.CYCLE] * PM_TIMER_HZ // a[A_BASE_HZ]) & 0xFFFFFF & mask
    m[s.STOP_A] = port
    m[s.STOP_B] = size
    port_in(m, a, value)
    return NEXT


@kernel
def port_in(m: Record, a: Arena, value: int) -> None:
    """The value of an IN from port STOP_A of STOP_B bytes arrives in RAX."""
    size = m[s.STOP_B]
    mask = (1 << (8 * size)) - 1
    value &= mask
    saw(m, a, o.IN, port_named(a, m[s.STOP_A]), 0, value)
    if size == 4:
        m[s.GPR + s.RAX] = value
    else:
        m[s.GPR + s.RAX] = (m[s.GPR + s.RAX] & ~mask) | value


@kernel
def permitted(m: Record, a: Arena, t: Tags, port: int, size: int) -> bool:
    """Does the I/O permission bitmap of the TSS allow an access? FAULT_KIND is not 0 where it cannot be read.

    SDM: "I/O Permission Bit Map".
    """
    m[s.FAULT_KIND] = 0
    limit = m[modes.LIMITS_AT + modes.TR]
    if m[modes.RIGHTS + modes.TR] & 0x1F not in (9, 11) or limit < 103:
        return False
    at = load_linear(m, a, t, m[s.TR_BASE] + 102, 2, 0)
    if m[s.FAULT_KIND]:
        return False
    at += port >> 3
    if at + 1 > limit:
        return False
    bits = load_linear(m, a, t, m[s.TR_BASE] + at, 2, 0)
    return m[s.FAULT_KIND] == 0 and (bits >> (port & 7)) & ((1 << size) - 1) == 0


@kernel
def in_out(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """IN, OUT, INS, OUTS (one element)."""
    packed = a[r + o.ROW_MEM]
    decoded = packed & o.MEM_DECODED != 0
    string = op == o.INS or op == o.OUTS
    write = op == o.OUT or op == o.OUTS
    rep = packed & (o.MEM_REP | o.MEM_REPNE) != 0 if decoded else a[r + o.ROW_EXTRA] != 0
    mask = address_mask(packed) if decoded else -1
    if string and rep and m[s.GPR + s.RCX] & mask == 0 and not decoded:
        return NEXT
    size = (packed >> o.MEM_SIZE) & 15
    register = a[r + o.ROW_R2]
    immediate = register >= 16 and not string
    port = a[r + o.ROW_IMM] if immediate else m[s.GPR + (s.RDX if string else register)] & 0xFFFF
    if decoded and (m[s.MODE] & modes.V86 or (m[s.PRIVILEGE] & 1 and (m[s.RFLAGS] >> 12) & 3 != 3)):
        if not permitted(m, a, t, port, size):
            if m[s.FAULT_KIND]:
                return raise_fault(m, a, t, m[s.FAULT_KIND])
            return raise_exception(m, GP, 1, 0)
    segment = segment_of(packed) if decoded and write else modes.ES
    pointer = s.GPR + (s.RSI if write else s.RDI)
    if m[s.NONROOT] and port_exits(m, a, port, size):
        q = (size - 1) | (0 if write else 8) | (16 if string else 0) | (64 if immediate else 0) | port << 16
        if string:
            m[s.EXIT_GLA] = linear(m, segment, m[pointer] & mask) if decoded else m[pointer]
            m[s.EXIT_INSTRUCTION_INFO] = instruction_information(m, a, r, op)
            if rep:
                q |= 32
        m[s.RFLAGS] &= ~RF_RF
        vm_exit(m, a, x.IO_INSTRUCTION, q, m[s.OP_LENGTH])
        return JUMPED
    if not string:
        return port_access(m, a, port, size, write)
    if rep and m[s.GPR + s.RCX] & mask == 0:  # permission and VM exit come first
        return NEXT
    m[s.FAULT_KIND] = 0
    gva = m[pointer]
    if decoded:
        gva = checked(m, segment, m[pointer] & mask, size, not write)
        if m[s.SEGMENT_FAULT]:
            return raise_fault(m, a, t, SEGMENT_REFUSED)
    hpa = access_as(m, a, t, gva, READ if write else WRITE, m[s.PRIVILEGE] & 1)
    if hpa < 0:
        return raise_fault(m, a, t, hpa)
    if not is_memory(a, hpa) or (gva & 0xFFF) + size > 4096:
        m[s.STOP] = MODEL_FAULT
        return STOPPED
    kept = m[s.GPR + s.RAX]
    if write:
        m[s.GPR + s.RAX] = load(a, hpa, size)
    ended = port_access(m, a, port, size, write)
    if not write and store(a, hpa, size, m[s.GPR + s.RAX]) < 0:
        m[s.STOP] = OUT_OF_MEMORY
        return STOPPED
    m[s.GPR + s.RAX] = kept
    by = -size if decoded and m[s.RFLAGS] & RF_DF else size
    m[pointer] = moved(m[pointer], by, mask)
    if rep:
        m[s.GPR + s.RCX] = moved(m[s.GPR + s.RCX], -1, mask)
        if m[s.GPR + s.RCX] & mask and ended == NEXT:
            between_iterations(m)
            return AGAIN
    return ended


@kernel
def moved(value: int, by: int, mask: int) -> int:
    """A pointer or count moved within its address size: 16 bits leave the rest, 32 clear the upper half."""
    if mask == 0xFFFF:
        return (value & ~mask) | ((value + by) & mask)
    return (value + by) & mask
