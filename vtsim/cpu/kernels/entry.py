"""VM entries: load the guest and inject what it asks for; close the account of the exit before.

SDM: "VM Entries"; "Loading Guest State"; "Event Injection".
Not modelled: MSR areas.
"""

from __future__ import annotations

from vtsim.base import trace as tr
from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import FOREVER, JUMPED, SOFTWARE_INTERRUPT, VALID
from vtsim.cpu.kernels.contexts import set_context
from vtsim.cpu.kernels.cursor import set_limit
from vtsim.cpu.kernels.events import through_idt
from vtsim.cpu.kernels.exit import LIMITS, NATURALS, SELECTORS
from vtsim.cpu.kernels.invalidate import drop_contexts
from vtsim.cpu.kernels.ledger import charge, record, settle
from vtsim.cpu.kernels.modes import set_mode
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h

# fmt: off
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
# fmt: on


@kernel
def histogram_bucket(cycles: int) -> int:
    """The bucket of a duration: exact below 128, then 64 buckets per octave."""
    octave = 0
    while cycles >= 2 * k.BUCKETS_PER_OCTAVE:
        cycles >>= 1
        octave += 1
    bucket = octave * k.BUCKETS_PER_OCTAVE + cycles
    return min(bucket, k.HISTOGRAM_BUCKETS - 1)


@kernel
def close_exit(m: Record, a: Arena, at: int) -> None:
    """Account the exit that this VM entry ends: its time, and whether the monitor executed the instruction."""
    reason = a[at + h.V_EXIT_REASON]
    if reason < 0:
        return
    owner = a[at + h.V_OWNER]
    cycles = m[s.CYCLE] - a[at + h.V_EXIT_AT]
    line = owner + k.OWN_EXITS + (reason & 0xFF) * k.EXIT_WORDS
    a[line + k.EXIT_COUNT] += 1
    a[line + k.EXIT_TOTAL] += cycles
    a[line + k.EXIT_EXCLUSIVE] += cycles - a[at + h.V_BELOW]
    a[line + k.EXIT_LONGEST] = max(a[line + k.EXIT_LONGEST], cycles)
    a[owner + k.OWN_HISTOGRAMS + (reason & 0xFF) * k.HISTOGRAM_BUCKETS + histogram_bucket(cycles)] += 1
    if a[at + v.GUEST_RIP] != a[at + h.V_EXIT_RIP]:
        a[owner + k.OWN_EMULATED + ((reason >> 16) & 1)] += 1
    a[at + h.V_EXIT_REASON] = -1
    a[at + h.V_BELOW] = 0


@kernel
def load_long_mode(m: Record, controls: int) -> None:
    """IA32_EFER where VM entry does not load it: LMA follows "IA-32e mode guest", and LME with it while CR0.PG is 1.

    SDM: "Loading Guest Control Registers, Debug Registers, and MSRs".
    """
    bits = EFER_LMA | (EFER_LME if m[s.CR0] & (1 << 31) else 0)
    m[s.EFER] = m[s.EFER] & ~bits
    if controls & b.ENTRY_IA32E_MODE_GUEST:
        m[s.EFER] |= bits


@kernel
def vm_entry(m: Record, a: Arena, t: Tags) -> int:
    """Load the guest of the current VMCS and inject what it asks for.

    SDM: "Loading Guest State"; "Event Injection".
    """
    at = m[s.VMCS]
    vmcs = a[at : at + 512]
    before = m[s.PRIVILEGE]
    m[s.IN_FLIGHT] = 0
    settle(m, a)
    charge(m, a, o.VM_ENTRY, m[s.ENTRY_CYCLES])
    last = m[s.CYCLE] - vmcs[h.V_EXIT_AT]
    ended = vmcs[h.V_EXIT_REASON] & 0xFF if vmcs[h.V_EXIT_REASON] >= 0 else -1
    close_exit(m, a, at)
    primary = vmcs[v.PRIMARY_PROC_CONTROLS]
    secondary = vmcs[v.SECONDARY_PROC_CONTROLS] if primary & b.ACTIVATE_SECONDARY_CONTROLS else 0
    controls = vmcs[v.ENTRY_CONTROLS]
    m[s.EPTP] = vmcs[v.EPT_POINTER] if secondary & b.ENABLE_EPT else 0
    m[s.EPT_AD] = (m[s.EPTP] >> 6) & 1
    m[s.VPID] = vmcs[v.VPID] if secondary & b.ENABLE_VPID else 0
    m[s.NONROOT] = 1
    dr7 = m[s.DR7]
    for n in range(SELECTORS):
        m[s.ES_SELECTOR + n] = vmcs[v.GUEST_ES_SELECTOR + n]
    for n in range(LIMITS):
        m[s.STATE + v.GUEST_ES_LIMIT - v.GUEST_START + n] = vmcs[v.GUEST_ES_LIMIT + n]
    for n in range(NATURALS):
        m[s.CR0 + n] = vmcs[v.GUEST_CR0 + n]
    m[s.GPR + s.RSP] = vmcs[v.GUEST_RSP]
    m[s.SYSENTER_CS] = vmcs[v.GUEST_IA32_SYSENTER_CS]
    if controls & b.ENTRY_LOAD_DEBUG_CONTROLS:
        m[s.DEBUGCTL] = vmcs[v.GUEST_IA32_DEBUGCTL]
    else:
        m[s.DR7] = dr7
    if controls & b.ENTRY_LOAD_IA32_EFER:
        m[s.EFER] = vmcs[v.GUEST_IA32_EFER]
    else:
        load_long_mode(m, controls)
    if controls & b.ENTRY_LOAD_IA32_PAT:
        m[s.PAT] = vmcs[v.GUEST_IA32_PAT]
    m[s.INTERRUPT_SHADOW] = 2 if vmcs[v.GUEST_INTERRUPTIBILITY_STATE] & 3 else 0
    m[s.SHADOW_KIND] = vmcs[v.GUEST_INTERRUPTIBILITY_STATE] & 3
    set_mode(m)
    m[s.NMI_BLOCKED] = (vmcs[v.GUEST_INTERRUPTIBILITY_STATE] >> 3) & 1
    m[s.HALTED] = 1 if vmcs[v.GUEST_ACTIVITY_STATE] == 1 else 0
    m[s.PRIVILEGE] = o.N3 if (m[s.SS_ACCESS_RIGHTS] >> 5) & 3 else o.N0
    m[s.OWNER] = vmcs[h.V_OWNER]
    m[s.ACTIVITY] = o.APPLICATION
    m[s.DIGEST_APPLICATION] = vmcs[h.V_DIGEST_APPLICATION]
    m[s.DIGEST_KERNEL] = vmcs[h.V_DIGEST_KERNEL]
    m[s.TSC_OFFSET] = vmcs[v.TSC_OFFSET] if primary & b.USE_TSC_OFFSETTING else 0
    m[s.WINDOW] = 1 if primary & b.INTERRUPT_WINDOW_EXITING else 0
    m[s.TIMER_DEADLINE] = FOREVER
    if vmcs[v.PIN_CONTROLS] & b.ACTIVATE_PREEMPTION_TIMER:
        m[s.TIMER_DEADLINE] = m[s.CYCLE] + (vmcs[v.PREEMPTION_TIMER_VALUE] << m[s.TIMER_RATE])
    if m[s.VPID] == 0:
        drop_contexts(m, a, 0xFFFF, 0, True)
    m[s.CONTEXT_KEY] = -1
    set_context(m, a)
    vmcs[h.V_LAUNCHED] = h.LAUNCHED
    a[m[s.OWNER] + k.ENTRIES] += 1
    if m[s.TRACE_ON]:
        record(m, a, before, tr.ENTRY, ended, last, vmcs[v.ENTRY_INTERRUPTION_INFORMATION] & 0xFFFFFFFF, 0)
    information = vmcs[v.ENTRY_INTERRUPTION_INFORMATION]
    if information & VALID:
        m[s.HALTED] = 0
        a[m[s.OWNER] + k.INJECTIONS] += 1
        m[s.EVENT_VECTOR] = information & 0xFF
        m[s.EVENT_TYPE] = (information >> 8) & 7
        m[s.EVENT_HAS_ERROR] = (information >> 11) & 1
        m[s.EVENT_ERROR] = vmcs[v.ENTRY_EXCEPTION_ERROR_CODE]
        m[s.EVENT_CR2] = m[s.CR2]
        m[s.EVENT_LENGTH] = 0
        if m[s.EVENT_TYPE] >= SOFTWARE_INTERRUPT:
            m[s.EVENT_LENGTH] = vmcs[v.ENTRY_INSTRUCTION_LENGTH]
        set_limit(m, a)
        return through_idt(m, a, t)
    set_limit(m, a)
    return JUMPED
