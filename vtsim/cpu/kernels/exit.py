"""VM exits: save the guest, record why, load the host.

SDM: "VM Exits"; "Saving Guest State"; "Loading Host State".
"""

from __future__ import annotations

from vtsim.base import trace as tr
from vtsim.base.jit import Arena, Record, copy_8, copy_18, copy_20, kernel
from vtsim.base.memory import A_REPLAY_LOG, A_REPLAY_LOG_LIMIT, A_REPLAY_LOGGED
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import PRIVILEGED_EXCEPTION, SHUTDOWN, SOFTWARE_EXCEPTION, SOFTWARE_INTERRUPT, VALID
from vtsim.cpu.kernels.contexts import recorded
from vtsim.cpu.kernels.cursor import set_limit
from vtsim.cpu.kernels.digest import await_result
from vtsim.cpu.kernels.host_state import load_host_state
from vtsim.cpu.kernels.ledger import charge, record, settle
from vtsim.cpu.kernels.modes import LIMITS_AT
from vtsim.cpu.kernels.msr_areas import (
    ABORT_LOADING_MSRS,
    ABORT_SAVING_MSRS,
    load_msr_area,
    store_msr_area,
    vmx_abort,
)
from vtsim.cpu.kernels.rare_msrs import SAVING, save_rare_msrs
from vtsim.cpu.kernels.rights import conditions
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h
from vtsim.vmcs.kernels.values import CR0_PG, CR4_PAE, EFER_LMA


@kernel
def log_exit(m: Record, a: Arena, reason: int, qualification: int) -> None:
    """Note an exit of a recorded guest: row and reason, qualification."""
    n = a[A_REPLAY_LOGGED]
    if n < a[A_REPLAY_LOG_LIMIT]:
        at = a[A_REPLAY_LOG] + 2 * n
        a[at] = m[s.RIP] - o.REPLAY_BASE | reason << 32
        a[at + 1] = qualification
    a[A_REPLAY_LOGGED] = n + 1


@kernel
def save_pdptes(m: Record, a: Arena, at: int) -> None:
    """Save the page-directory-pointer-table entries of a guest with PAE paging and EPT.

    SDM: "Saving Guest State".
    """
    if m[s.CR0] & CR0_PG and m[s.CR4] & CR4_PAE and m[s.EFER] & EFER_LMA == 0:
        for n in range(4):
            a[at + v.GUEST_PDPTE0 + n] = m[s.PDPTE0 + n]


@kernel
def shut_down(m: Record, a: Arena, indicator: int) -> None:
    """A VMX abort: the indicator is written and the CPU stops for good.

    SDM: "VMX Aborts".
    """
    vmx_abort(m, a, indicator)
    m[s.STOP] = SHUTDOWN
    m[s.LIMIT] = 0


@kernel
def vm_exit(m: Record, a: Arena, reason: int, qualification: int, length: int) -> None:
    """Save the guest, record why, load the host. Other exit information is taken from EXIT_… and cleared.

    SDM: "Recording VM-Exit Information and Updating VM-entry Control Fields"; "Saving Guest State";
    "Loading Host State".
    """
    if m[s.IN_FLIGHT]:  # the op that exits neither retires nor costs what it would have cost
        m[s.RETIRED] -= 1
        m[s.CYCLE] -= m[s.IN_FLIGHT] - 1
        m[s.IN_FLIGHT] = 0
    settle(m, a)
    if recorded(m, a):
        log_exit(m, a, reason, qualification)
    at = m[s.VMCS]
    vmcs = a[at : at + 512]
    before = m[s.PRIVILEGE]
    vmcs[h.V_EXIT_AT] = m[s.CYCLE]
    vmcs[h.V_EXIT_RIP] = m[s.RIP]
    vmcs[h.V_EXIT_REASON] = (reason & 0xFFFF) | (before & 1) << 16
    vmcs[h.V_DIGEST_APPLICATION] = m[s.DIGEST_APPLICATION]
    vmcs[h.V_DIGEST_KERNEL] = m[s.DIGEST_KERNEL]
    vmcs[h.V_DIGEST_EXCEPTION] = m[s.DIGEST_EXCEPTION]
    await_result(m, a, at, reason, qualification)
    m[s.SEEN] = 0
    # exit information
    vmcs[v.EXIT_REASON] = reason
    vmcs[v.EXIT_QUALIFICATION] = qualification
    vmcs[v.EXIT_INSTRUCTION_LENGTH] = length
    vmcs[v.EXIT_INSTRUCTION_INFORMATION] = m[s.EXIT_INSTRUCTION_INFO]
    vmcs[v.GUEST_PHYSICAL_ADDRESS] = m[s.EXIT_GPA]
    vmcs[v.GUEST_LINEAR_ADDRESS] = m[s.EXIT_GLA]
    vmcs[v.EXIT_INTERRUPTION_INFORMATION] = m[s.EXIT_INTERRUPTION]
    vmcs[v.EXIT_INTERRUPTION_ERROR_CODE] = m[s.EXIT_ERROR_CODE]
    vmcs[v.IDT_VECTORING_INFORMATION] = m[s.VECTORING]
    vmcs[v.IDT_VECTORING_ERROR_CODE] = m[s.VECTORING_ERROR]
    if m[s.VECTORING] and (m[s.VECTORING] >> 8) & 7 in (SOFTWARE_INTERRUPT, SOFTWARE_EXCEPTION, PRIVILEGED_EXCEPTION):
        vmcs[v.EXIT_INSTRUCTION_LENGTH] = m[s.VECTORING_LENGTH]
    m[s.EXIT_INSTRUCTION_INFO] = 0
    m[s.EXIT_GPA] = 0
    m[s.EXIT_GLA] = 0
    m[s.EXIT_INTERRUPTION] = 0
    m[s.EXIT_ERROR_CODE] = 0
    m[s.VECTORING] = 0
    m[s.VECTORING_ERROR] = 0
    vmcs[v.ENTRY_INTERRUPTION_INFORMATION] &= ~VALID
    # guest state
    controls = vmcs[v.EXIT_CONTROLS]
    vmcs[v.GUEST_INTERRUPTIBILITY_STATE] = (m[s.SHADOW_KIND] if m[s.INTERRUPT_SHADOW] else 0) | (
        m[s.NMI_BLOCKED] | m[s.VIRTUAL_NMI_BLOCKED]
    ) << 3
    vmcs[v.GUEST_ACTIVITY_STATE] = m[s.ACTIVITY_STATE] if m[s.HALTED] else 0
    copy_8(a, at + v.GUEST_ES_SELECTOR, m, s.ES_SELECTOR)
    copy_18(a, at + v.GUEST_ES_LIMIT, m, LIMITS_AT)
    dr7 = vmcs[v.GUEST_DR7]
    copy_20(a, at + v.GUEST_CR0, m, s.CR0)
    vmcs[h.V_CONDITIONS] = conditions(m)
    vmcs[v.GUEST_RSP] = m[s.GPR + s.RSP]
    vmcs[v.GUEST_IA32_SYSENTER_CS] = m[s.SYSENTER_CS]
    if controls & b.EXIT_SAVE_DEBUG_CONTROLS:
        vmcs[v.GUEST_IA32_DEBUGCTL] = m[s.DEBUGCTL]
    else:
        vmcs[v.GUEST_DR7] = dr7
    if controls & b.EXIT_SAVE_IA32_EFER:
        vmcs[v.GUEST_IA32_EFER] = m[s.EFER]
    if controls & b.EXIT_SAVE_IA32_PAT:
        vmcs[v.GUEST_IA32_PAT] = m[s.PAT]
    if m[s.MODE] and m[s.EPTP]:
        save_pdptes(m, a, at)
    if m[s.SAVED_MSRS] or controls & SAVING:
        save_rare_msrs(m, a, at, controls)
    if controls & b.EXIT_SAVE_PREEMPTION_TIMER and vmcs[v.PIN_CONTROLS] & b.ACTIVATE_PREEMPTION_TIMER:
        left = m[s.TIMER_DEADLINE] - m[s.CYCLE]
        vmcs[v.PREEMPTION_TIMER_VALUE] = max(left, 0) >> m[s.TIMER_RATE]
    if vmcs[v.EXIT_MSR_STORE_COUNT]:
        if store_msr_area(m, a, vmcs[v.EXIT_MSR_STORE_ADDRESS], vmcs[v.EXIT_MSR_STORE_COUNT]):
            shut_down(m, a, ABORT_SAVING_MSRS)
    load_host_state(m, a)
    if vmcs[v.EXIT_MSR_LOAD_COUNT]:
        if load_msr_area(m, a, vmcs[v.EXIT_MSR_LOAD_ADDRESS], vmcs[v.EXIT_MSR_LOAD_COUNT]):
            shut_down(m, a, ABORT_LOADING_MSRS)
    charge(m, a, o.VM_EXIT, m[s.EXIT_CYCLES])
    set_limit(m, a)
    if m[s.TRACE_ON]:
        record(m, a, before, tr.EXIT, reason, m[s.EXIT_CYCLES], qualification, vmcs[v.GUEST_PHYSICAL_ADDRESS])
