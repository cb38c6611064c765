"""VM entries: check the VMCS, load the guest, inject what it asks for; close the account of the exit before.

SDM: "VM Entries"; "Loading Guest State"; "Event Injection".
Not modelled: machine checks during VM entry (exit reason 41); checks of the guest state of a recorded guest, of whose
registers the recording holds only some.
"""

from __future__ import annotations

from vtsim.base import trace as tr
from vtsim.base.jit import Arena, Record, Tags, copy_8, copy_18, copy_20, kernel
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import FOREVER, JUMPED, SHUTDOWN, SOFTWARE_INTERRUPT, STOPPED, VALID
from vtsim.cpu.kernels import ept_walk
from vtsim.cpu.kernels.apic_virtualization import begin_virtual
from vtsim.cpu.kernels.contexts import in_recording, set_context
from vtsim.cpu.kernels.conventions import vm_fail_valid
from vtsim.cpu.kernels.cursor import set_limit
from vtsim.cpu.kernels.digest import see_result
from vtsim.cpu.kernels.events import through_idt
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.host_state import CR0_KEPT, load_host_state
from vtsim.cpu.kernels.invalidate import drop_contexts
from vtsim.cpu.kernels.ledger import charge, record, settle
from vtsim.cpu.kernels.modes import LIMITS_AT, set_mode
from vtsim.cpu.kernels.msr_areas import ABORT_LOADING_MSRS, load_msr_area, vmx_abort
from vtsim.cpu.kernels.pending import arm, begin
from vtsim.cpu.kernels.rare_msrs import load_rare_guest_msrs
from vtsim.cpu.kernels.rights import conditions
from vtsim.cpu.kernels.vmx_capabilities import beyond_addresses
from vtsim.vmcs import bits as b
from vtsim.vmcs import checks as c
from vtsim.vmcs import events as ev
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmcs.kernels.entry_checks import control_or_host_failure, guest_failure
from vtsim.vmcs.kernels.guest_registers import LOADED_MSRS
from vtsim.vmcs.kernels.guest_rest import pdpte, uses_pae
from vtsim.vmcs.kernels.values import CR0_PG, EFER_LMA, EFER_LME, EPT_VPID_CAP, capability

# fmt: off
DR7_ZERO, DR7_ONE = 0xD000, 0x400          # bits 12, 14, 15 and bit 10
APIC_VIRTUALIZATION: int = b.VIRTUAL_INTERRUPT_DELIVERY | b.VIRTUALIZE_APIC_ACCESSES | b.VIRTUALIZE_X2APIC_MODE
EPT_EXTRAS: int = b.ENABLE_EPT | b.MODE_BASED_EXECUTE_CONTROL | b.ENABLE_PML | b.EPT_VIOLATION_VE
RARE_MSRS: int = LOADED_MSRS & ~(b.ENTRY_LOAD_IA32_EFER | b.ENTRY_LOAD_IA32_PAT)
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
def ept_features(a: Arena, secondary: int) -> int:
    """EPT_FEATURES of these secondary controls."""
    found = ept_walk.MODE_BASED if secondary & b.MODE_BASED_EXECUTE_CONTROL else 0
    if secondary & b.ENABLE_PML:
        found |= ept_walk.LOGGING
    if secondary & b.EPT_VIOLATION_VE:
        found |= ept_walk.EXCEPTION
    if secondary & b.VIRTUALIZE_APIC_ACCESSES:
        found |= ept_walk.APIC_PAGE
    return found | (ept_walk.ADVANCED if (capability(a, EPT_VPID_CAP) >> 22) & 1 else 0)


@kernel
def load_translation(m: Record, a: Arena, vmcs: Arena, secondary: int) -> None:
    """EPTP, what goes with it, and the VPID of a VMCS under these secondary controls."""
    m[s.EPTP] = vmcs[v.EPT_POINTER] if secondary & b.ENABLE_EPT else 0
    m[s.EPT_AD] = (m[s.EPTP] >> 6) & 1
    m[s.EPT_FEATURES] = ept_features(a, secondary) if secondary & EPT_EXTRAS else 0
    if vmcs[h.V_AGILE] and m[s.EPTP]:
        m[s.EPT_FEATURES] |= ept_walk.AGILE
    m[s.VPID] = vmcs[v.VPID] if secondary & b.ENABLE_VPID else 0


@kernel
def vm_entry(m: Record, a: Arena, t: Tags) -> int:
    """VM entry with the current VMCS, whose launch state is right: VMfailValid, a failed entry, or the guest.

    SDM: "VM Entries"; "Loading Guest State"; "Event Injection".
    """
    at = m[s.VMCS]
    beyond = beyond_addresses(m, a)
    failed = control_or_host_failure(a, at, beyond, m[s.EFER] & EFER_LMA != 0)
    a[at + h.V_FAILED_CHECK] = failed
    if failed:
        error = ev.ENTRY_INVALID_CONTROLS if failed < c.HOST_CR0_FIXED else ev.ENTRY_INVALID_HOST_STATE
        return vm_fail_valid(m, a, error)
    vmcs = a[at : at + 512]
    before = m[s.PRIVILEGE]
    m[s.IN_FLIGHT] = 0
    settle(m, a)
    charge(m, a, o.VM_ENTRY, m[s.ENTRY_CYCLES])
    last = m[s.CYCLE] - vmcs[h.V_EXIT_AT]
    ended = vmcs[h.V_EXIT_REASON] & 0xFF if vmcs[h.V_EXIT_REASON] >= 0 else -1
    close_exit(m, a, at)
    if not in_recording(a, vmcs[v.GUEST_RIP]):
        failed = guest_failure(a, at, beyond, m[s.VMCS_POINTER])
        vmcs[h.V_FAILED_CHECK] = failed
        if failed:
            return entry_failure(m, a, x.INVALID_STATE, failure_qualification(failed))
    load_guest_state(m, a, at)
    if vmcs[v.ENTRY_MSR_LOAD_COUNT]:
        failed = load_msr_area(m, a, vmcs[v.ENTRY_MSR_LOAD_ADDRESS], vmcs[v.ENTRY_MSR_LOAD_COUNT])
        if failed:
            return entry_failure(m, a, x.MSR_LOAD_FAIL, failed)
    primary = vmcs[v.PRIMARY_PROC_CONTROLS]
    secondary = vmcs[v.SECONDARY_PROC_CONTROLS] if primary & b.ACTIVATE_SECONDARY_CONTROLS else 0
    load_translation(m, a, vmcs, secondary)
    m[s.NONROOT] = 1
    m[s.PRIVILEGE] = o.N3 if (m[s.SS_ACCESS_RIGHTS] >> 5) & 3 else o.N0
    m[s.OWNER] = vmcs[h.V_OWNER]
    m[s.ACTIVITY] = o.APPLICATION
    m[s.DIGEST_APPLICATION] = vmcs[h.V_DIGEST_APPLICATION]
    m[s.DIGEST_KERNEL] = vmcs[h.V_DIGEST_KERNEL]
    m[s.DIGEST_EXCEPTION] = vmcs[h.V_DIGEST_EXCEPTION]
    m[s.SEEN] = vmcs[h.V_SEEN]
    see_result(m, a, at)
    m[s.TSC_OFFSET] = vmcs[v.TSC_OFFSET] if primary & b.USE_TSC_OFFSETTING else 0
    m[s.WINDOW] = 1 if primary & b.INTERRUPT_WINDOW_EXITING else 0
    m[s.TIMER_DEADLINE] = FOREVER
    if vmcs[v.PIN_CONTROLS] & b.ACTIVATE_PREEMPTION_TIMER and m[s.ACTIVITY_STATE] != ev.WAIT_FOR_SIPI:
        m[s.TIMER_DEADLINE] = m[s.CYCLE] + (vmcs[v.PREEMPTION_TIMER_VALUE] << m[s.TIMER_RATE])
    if m[s.VPID] == 0 or vmcs[h.V_CONDITIONS] != conditions(m):
        drop_contexts(m, a, 0xFFFF, m[s.VPID], True)
    set_context(m, a)
    vmcs[h.V_LAUNCHED] = h.LAUNCHED
    a[m[s.OWNER] + k.ENTRIES] += 1
    if m[s.TRACE_ON]:
        injected = vmcs[v.ENTRY_INTERRUPTION_INFORMATION] & 0xFFFFFFFF
        record(m, a, before, tr.ENTRY, ended, last, injected, m[s.VMCS_POINTER])
    if secondary & APIC_VIRTUALIZATION:
        begin_virtual(m, a)
    begin(m)
    arm(m, a)
    if vmcs[v.ENTRY_INTERRUPTION_INFORMATION] & VALID:
        return inject(m, a, t, at)
    set_limit(m, a)
    return JUMPED


@kernel
def failure_qualification(failed: int) -> int:
    """The exit qualification of a VM entry that failed on a check of guest state.

    SDM: "VM-Entry Failures During or After Loading Guest State".
    """
    if failed == c.PDPTE_RESERVED:
        return ev.ENTRY_FAILURE_PDPTE
    if failed == c.BLOCKING_NMI_BY_STI:
        return ev.ENTRY_FAILURE_NMI_INJECTION
    if c.LINK_ADDRESS <= failed <= c.LINK_CURRENT:
        return ev.ENTRY_FAILURE_LINK_POINTER
    return 0


@kernel
def entry_failure(m: Record, a: Arena, reason: int, qualification: int) -> int:
    """Fail a VM entry: record reason and qualification and nothing else, save no guest state, load the host.

    SDM: "VM-Entry Failures During or After Loading Guest State".
    """
    at = m[s.VMCS]
    before = m[s.PRIVILEGE]
    a[at + v.EXIT_REASON] = reason | x.ENTRY_FAILURE
    a[at + v.EXIT_QUALIFICATION] = qualification
    a[at + h.V_EXIT_AT] = m[s.CYCLE]
    a[at + h.V_EXIT_RIP] = a[at + v.GUEST_RIP]
    a[at + h.V_EXIT_REASON] = reason
    load_host_state(m, a)
    charge(m, a, o.VM_EXIT, m[s.EXIT_CYCLES])
    set_limit(m, a)
    if m[s.TRACE_ON]:
        record(m, a, before, tr.EXIT, reason, m[s.EXIT_CYCLES], qualification, 0)
    if a[at + v.EXIT_MSR_LOAD_COUNT]:
        if load_msr_area(m, a, a[at + v.EXIT_MSR_LOAD_ADDRESS], a[at + v.EXIT_MSR_LOAD_COUNT]):
            vmx_abort(m, a, ABORT_LOADING_MSRS)
            m[s.STOP] = SHUTDOWN
            return STOPPED
    return JUMPED


@kernel
def load_guest_state(m: Record, a: Arena, at: int) -> None:
    """Load the guest-state area into the CPU.

    SDM: "Loading Guest State"; "Loading Guest Control Registers, Debug Registers, and MSRs";
    "Loading Guest Segment Registers and Descriptor-Table Registers"; "Loading Guest RIP, RSP, RFLAGS, and SSP";
    "Loading Page-Directory-Pointer-Table Entries"; "Updating Non-Register State".
    """
    vmcs = a[at : at + 512]
    controls = vmcs[v.ENTRY_CONTROLS]
    dr7 = m[s.DR7]
    cr0 = m[s.CR0]
    copy_8(m, s.ES_SELECTOR, a, at + v.GUEST_ES_SELECTOR)
    copy_18(m, LIMITS_AT, a, at + v.GUEST_ES_LIMIT)
    copy_20(m, s.CR0, a, at + v.GUEST_CR0)
    m[s.CR0] = (cr0 & CR0_KEPT) | (m[s.CR0] & ~CR0_KEPT)
    m[s.GPR + s.RSP] = vmcs[v.GUEST_RSP]
    m[s.SYSENTER_CS] = vmcs[v.GUEST_IA32_SYSENTER_CS]
    if controls & b.ENTRY_LOAD_DEBUG_CONTROLS:
        m[s.DEBUGCTL] = vmcs[v.GUEST_IA32_DEBUGCTL]
        m[s.DR7] = (m[s.DR7] & ~DR7_ZERO) | DR7_ONE
    else:
        m[s.DR7] = dr7
    if controls & b.ENTRY_LOAD_IA32_EFER:
        m[s.EFER] = vmcs[v.GUEST_IA32_EFER]
    else:
        loaded = EFER_LMA | (EFER_LME if m[s.CR0] & CR0_PG else 0)
        m[s.EFER] &= ~loaded
        if controls & b.ENTRY_IA32E_MODE_GUEST:
            m[s.EFER] |= loaded
    if controls & b.ENTRY_LOAD_IA32_PAT:
        m[s.PAT] = vmcs[v.GUEST_IA32_PAT]
    if controls & RARE_MSRS:
        load_rare_guest_msrs(m, a, at, controls)
    if uses_pae(a, at):
        for n in range(4):
            m[s.PDPTE0 + n] = pdpte(a, at, n)
    blocking = vmcs[v.GUEST_INTERRUPTIBILITY_STATE]
    m[s.SHADOW_KIND] = blocking & 3
    m[s.INTERRUPT_SHADOW] = 2 if blocking & 3 else 0
    virtual = vmcs[v.PIN_CONTROLS] & b.VIRTUAL_NMIS != 0
    m[s.NMI_BLOCKED] = 0 if virtual else (blocking >> 3) & 1
    m[s.VIRTUAL_NMI_BLOCKED] = (blocking >> 3) & 1 if virtual else 0
    m[s.ACTIVITY_STATE] = vmcs[v.GUEST_ACTIVITY_STATE]
    m[s.HALTED] = 1 if m[s.ACTIVITY_STATE] else 0
    m[s.PENDING_DEBUG] = vmcs[v.GUEST_PENDING_DEBUG_EXCEPTIONS]
    set_mode(m)


@kernel
def inject(m: Record, a: Arena, t: Tags, at: int) -> int:
    """Deliver the event of the VM-entry interruption-information field, or leave at once for a pending MTF VM exit.

    The CPU is active then, and blocked neither by STI nor by MOV SS; an NMI blocks NMIs.

    SDM: "Event Injection"; "Vectored-Event Injection"; "Injection of Pending MTF VM Exits"; "Interruptibility State".
    """
    information = a[at + v.ENTRY_INTERRUPTION_INFORMATION]
    kind = (information & ev.TYPE) >> ev.TYPE_SHIFT
    a[m[s.OWNER] + k.INJECTIONS] += 1
    if kind == ev.OTHER_EVENT:
        vm_exit(m, a, x.MONITOR_TRAP_FLAG, 0, 0)
        return JUMPED
    m[s.HALTED] = 0
    m[s.ACTIVITY_STATE] = ev.ACTIVE
    m[s.INTERRUPT_SHADOW] = 0
    m[s.BEGUN_AT] = m[s.OPS] - 1  # the monitor trap flag exits before the handler's first instruction
    if kind == ev.NMI:
        if a[at + v.PIN_CONTROLS] & b.VIRTUAL_NMIS:
            m[s.VIRTUAL_NMI_BLOCKED] = 1
        else:
            m[s.NMI_BLOCKED] = 1
    m[s.INJECTED] = 1
    m[s.EVENT_VECTOR] = information & ev.VECTOR
    m[s.EVENT_TYPE] = kind
    m[s.EVENT_HAS_ERROR] = (information >> 11) & 1
    m[s.EVENT_ERROR] = a[at + v.ENTRY_EXCEPTION_ERROR_CODE]
    m[s.EVENT_CR2] = m[s.CR2]
    m[s.EVENT_LENGTH] = a[at + v.ENTRY_INSTRUCTION_LENGTH] if kind >= SOFTWARE_INTERRUPT else 0
    set_limit(m, a)
    return through_idt(m, a, t)
