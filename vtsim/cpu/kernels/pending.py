"""Rare events at instruction boundaries: debug exceptions, the monitor trap flag, NMIs and their window.

PENDING is not 0 while any of them is possible, and makes the loop look up after every op.

SDM: "Priority Among Concurrent Events"; "Monitor Trap Flag"; "Debug Exceptions"; "Other Causes of VM Exits".
Not modelled: SMIs; INIT signals and start-up IPIs outside VMX non-root operation, which wait or are lost.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import A_DECODE
from vtsim.cpu import slots as s
from vtsim.cpu.codes import DB, HARDWARE_EXCEPTION, NMI_EVENT, RF_RF, RF_TF, VALID
from vtsim.cpu.kernels.apic_virtualization import emulate_write, take_virtual
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs.events import WAIT_FOR_SIPI

# fmt: off
# what `rare_event` found
NOTHING, EXITED, DELIVER = range(3)
PENDING_HIT, PENDING_STEP = 1 << 12, 1 << 14
BY_MOV_SS, NMI_VECTOR = 2, 2
BREAKPOINTS: int = 0xFF                 # the enable bits of DR7
# fmt: on


@kernel
def arm(m: Record, a: Arena) -> None:
    """Work out PENDING: after RFLAGS, DR7 or the controls changed, or an NMI arrived."""
    wanted = 0
    if a[A_DECODE]:
        wanted = m[s.RFLAGS] & (RF_TF | RF_RF) or m[s.PENDING_DEBUG] or m[s.DR7] & BREAKPOINTS
    if m[s.NMI_PENDING] or m[s.VIRTUAL_PENDING] or m[s.APIC_WRITTEN]:
        wanted = 1
    if m[s.SIPI_PENDING]:
        wanted = 1
    if m[s.NONROOT]:
        wanted = wanted or a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & (b.MONITOR_TRAP_FLAG | b.NMI_WINDOW_EXITING)
        wanted = wanted or m[s.INIT_PENDING]
    m[s.PENDING] = 1 if wanted else 0
    if wanted:
        m[s.LIMIT] = 0


@kernel
def begin(m: Record) -> None:
    """Remember the state in which the next op begins."""
    m[s.BEGUN_AT] = m[s.OPS]
    m[s.BEGUN_FLAGS] = m[s.RFLAGS] & (RF_TF | RF_RF)


@kernel
def rare_event(m: Record, a: Arena, t: Tags) -> int:
    """Take the most urgent rare event at this boundary: NOTHING, EXITED, or DELIVER with the event in EVENT_…."""
    passed = m[s.OPS] != m[s.BEGUN_AT]
    shadow_by_mov = m[s.INTERRUPT_SHADOW] == 2 and m[s.SHADOW_KIND] == BY_MOV_SS
    if passed:
        if m[s.BEGUN_FLAGS] & RF_TF:
            m[s.PENDING_DEBUG] |= PENDING_STEP
        if m[s.BEGUN_FLAGS] & RF_RF:
            m[s.RFLAGS] &= ~RF_RF
        m[s.BEGUN_FLAGS] = 0
        if m[s.INTERRUPT_SHADOW] == 1:
            m[s.INTERRUPT_SHADOW] = 0
    if m[s.APIC_WRITTEN] and emulate_write(m, a, t):
        return EXITED
    if (m[s.INIT_PENDING] or m[s.SIPI_PENDING]) and signal_exits(m, a):
        return EXITED
    if m[s.NONROOT] and a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & b.MONITOR_TRAP_FLAG and passed:
        vm_exit(m, a, x.MONITOR_TRAP_FLAG, 0, 0)
        return EXITED
    waiting = m[s.PENDING_DEBUG]
    if waiting and not shadow_by_mov:
        m[s.PENDING_DEBUG] = 0
        if waiting & PENDING_STEP or (waiting & PENDING_HIT and waiting & 0xF):
            return debug_exception(m, waiting & 0xE00F)
    if m[s.NONROOT] and m[s.CYCLE] >= m[s.TIMER_DEADLINE]:
        return NOTHING
    found = nmi_event(m, a)
    if found == NOTHING and m[s.VIRTUAL_PENDING] and take_virtual(m, a):
        return DELIVER
    return found


@kernel
def signal_exits(m: Record, a: Arena) -> bool:
    """The VM exits of INIT signals and start-up IPIs: True if there was one.

    An INIT signal is blocked in VMX root operation and while the CPU waits for a SIPI; a SIPI that nobody waits for is
    lost.

    SDM: "Other Causes of VM Exits".
    """
    waiting = m[s.NONROOT] != 0 and waits_for_sipi(m)
    if m[s.SIPI_PENDING]:
        vector = m[s.SIPI_PENDING] & 0xFF
        m[s.SIPI_PENDING] = 0
        if waiting:
            vm_exit(m, a, x.SIPI_SIGNAL, vector, 0)
            return True
    if m[s.INIT_PENDING] and m[s.NONROOT] and not waiting:
        m[s.INIT_PENDING] = 0
        vm_exit(m, a, x.INIT_SIGNAL, 0, 0)
        return True
    return False


@kernel
def waits_for_sipi(m: Record) -> bool:
    """Is the CPU in the activity state in which a start-up IPI alone has an effect?

    SDM: "Guest Non-Register State".
    """
    return m[s.HALTED] != 0 and m[s.ACTIVITY_STATE] == WAIT_FOR_SIPI


@kernel
def debug_exception(m: Record, bits: int) -> int:
    """Put a #DB with these bits of DR6 into EVENT_…."""
    m[s.EVENT_VECTOR] = DB
    m[s.EVENT_TYPE] = HARDWARE_EXCEPTION
    m[s.EVENT_HAS_ERROR] = 0
    m[s.EVENT_ERROR] = 0
    m[s.EVENT_LENGTH] = 0
    m[s.EVENT_CR2] = bits
    m[s.OP_LENGTH] = 0
    return DELIVER


@kernel
def nmi_event(m: Record, a: Arena) -> int:
    """NMI-window exiting, then a pending NMI.

    SDM: "Other Causes of VM Exits"; "Handling Multiple NMIs".
    """
    if waits_for_sipi(m):
        return NOTHING
    pin = 0
    if m[s.NONROOT]:
        pin = a[m[s.VMCS] + v.PIN_CONTROLS]
        window = a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & b.NMI_WINDOW_EXITING != 0
        blocked = m[s.VIRTUAL_NMI_BLOCKED] or m[s.NMI_BLOCKED] or m[s.INTERRUPT_SHADOW]
        if window and not blocked:
            vm_exit(m, a, x.NMI_WINDOW, 0, 0)
            return EXITED
    if m[s.NMI_PENDING] == 0 or m[s.NMI_BLOCKED] or (m[s.INTERRUPT_SHADOW] and m[s.SHADOW_KIND] == BY_MOV_SS):
        return NOTHING
    m[s.NMI_PENDING] = 0
    if pin & b.NMI_EXITING:
        m[s.EXIT_INTERRUPTION] = NMI_VECTOR | NMI_EVENT << 8 | VALID
        vm_exit(m, a, x.EXCEPTION_NMI, 0, 0)
        m[s.NMI_BLOCKED] = 1
        return EXITED
    m[s.EVENT_VECTOR] = NMI_VECTOR
    m[s.EVENT_TYPE] = NMI_EVENT
    m[s.EVENT_HAS_ERROR] = 0
    m[s.EVENT_ERROR] = 0
    m[s.EVENT_LENGTH] = 0
    m[s.OP_LENGTH] = 0
    return DELIVER
