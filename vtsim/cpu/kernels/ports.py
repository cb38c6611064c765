"""I/O instructions: which exit, and what a port of this machine answers.

SDM: "I/O-Bitmap Addresses".
Not modelled: I/O permission bitmap of the TSS.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_BASE_HZ, A_PORTS, is_memory, load, store
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import AGAIN, JUMPED, MODEL_FAULT, NEXT, OUT_OF_MEMORY, PORT_READ, PORT_WRITE, STOPPED
from vtsim.cpu.kernels.access import access_as, bitmap_bit
from vtsim.cpu.kernels.digest import saw
from vtsim.cpu.kernels.exceptions import raise_fault
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.ledger import charge
from vtsim.cpu.kernels.walk import READ, WRITE
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v

# fmt: off
# port kinds: how a port answers in compiled code
PORT_ABSENT, PORT_LATCH, PORT_COUNTER, PORT_PLATFORM = range(4)
PORTS = 65536
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
    if kind == PORT_PLATFORM:
        m[s.STOP] = PORT_WRITE if write else PORT_READ
        m[s.STOP_A] = port
        m[s.STOP_B] = size
        m[s.STOP_C] = m[s.GPR + s.RAX]
        return STOPPED
    charge(m, a, o.BUS, m[s.PORT_CYCLES])
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
    if kind != PORT_COUNTER:
        saw(m, value)
    if size == 4:
        m[s.GPR + s.RAX] = value
    else:
        m[s.GPR + s.RAX] = (m[s.GPR + s.RAX] & ~mask) | value
    return NEXT


@kernel
def in_out(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """IN, OUT, INS, OUTS (one element)."""
    string = op == o.INS or op == o.OUTS
    write = op == o.OUT or op == o.OUTS
    if string and a[r + o.ROW_EXTRA] and m[s.GPR + s.RCX] == 0:
        return NEXT
    size = (a[r + o.ROW_MEM] >> o.MEM_SIZE) & 15
    register = a[r + o.ROW_R2]
    immediate = register >= 16 and not string
    port = a[r + o.ROW_IMM] if immediate else m[s.GPR + (s.RDX if string else register)] & 0xFFFF
    if m[s.NONROOT] and port_exits(m, a, port, size):
        q = (size - 1) | (0 if write else 8) | (16 if string else 0) | (64 if immediate else 0) | port << 16
        if string:
            m[s.EXIT_GLA] = m[s.GPR + (s.RSI if write else s.RDI)]
            if a[r + o.ROW_EXTRA]:
                q |= 32
        vm_exit(m, a, x.IO_INSTRUCTION, q, m[s.OP_LENGTH])
        return JUMPED
    if not string:
        return port_access(m, a, port, size, write)
    pointer = s.GPR + (s.RSI if write else s.RDI)
    m[s.FAULT_KIND] = 0
    hpa = access_as(m, a, t, m[pointer], READ if write else WRITE, m[s.PRIVILEGE] & 1)
    if hpa < 0:
        return raise_fault(m, a, t, hpa)
    if not is_memory(a, hpa) or (m[pointer] & 0xFFF) + size > 4096:
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
    m[pointer] += size
    if a[r + o.ROW_EXTRA]:
        m[s.GPR + s.RCX] -= 1
        if m[s.GPR + s.RCX] > 0 and ended == NEXT:
            return AGAIN
    return ended
