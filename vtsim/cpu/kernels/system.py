"""Sensitive and privileged operations: their faults, the VM exits they cause, and what they do otherwise.

SDM: "Instructions That Cause VM Exits Conditionally"; "VMX Instructions"; "Exit Qualification".
Not modelled: I/O permission bitmap of the TSS; CR0 and CR4 consistency faults; PAE page-directory-pointer loads.
"""

from __future__ import annotations

from vtsim.base import trace as tr
from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import (
    A_BASE_HZ,
    A_CAPABILITIES,
    A_CPUID,
    A_CPUID_COUNT,
    A_PORTS,
    VMCS_REGION,
    contents,
    give_contents,
    is_memory,
    load,
    store,
)
from vtsim.cpu import accounts as k
from vtsim.cpu import exit_rules as rules
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.exit_rules import BIT, REASON, RING, WHERE
from vtsim.cpu.kernels.apic import TSC_DEADLINE, read_register, write_register
from vtsim.cpu.kernels.events import (
    AGAIN,
    FOREVER,
    GP,
    JUMPED,
    MODEL_FAULT,
    NEXT,
    OUT_OF_MEMORY,
    PORT_READ,
    PORT_WRITE,
    RF_IF,
    SOFTWARE_INTERRUPT,
    STOPPED,
    UD,
    access_as,
    charge,
    deliver,
    raise_exception,
    raise_fault,
    read64,
    read_as,
    record,
    set_limit,
    set_privilege,
    settle,
    vm_entry,
    vm_exit,
    write64,
    write_as,
)
from vtsim.cpu.kernels.translate import (
    CR4_PCIDE,
    GLOBAL_KEY,
    READ,
    WRITE,
    drop_contexts,
    drop_guest_physical,
    drop_page,
    recorded,
    set_context,
)
from vtsim.ept.spec import ADDRESS
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h

# fmt: off
# port kinds: how a port answers in compiled code
PORT_ABSENT, PORT_LATCH, PORT_COUNTER, PORT_PLATFORM = range(4)
PORTS = 65536
PM_TIMER_HZ = 3_579_545
RF_CF, RF_PF, RF_AF, RF_ZF, RF_SF, RF_OF = 1, 4, 16, 64, 128, 1 << 11
ARITHMETIC = RF_CF | RF_PF | RF_AF | RF_ZF | RF_SF | RF_OF
CR0_PAGING = (1 << 31) | (1 << 16) | 1
CR4_PAGING = (1 << 4) | (1 << 5) | (1 << 7) | (1 << 12) | (1 << 17) | (1 << 20) | (1 << 21) | (1 << 22)
FIRST_CAPABILITY, CAPABILITIES = 0x480, 20
# fmt: on


@kernel
def effective(m: Record, a: Arena, r: int) -> int:
    """The linear address of a row's memory operand."""
    packed = a[r + o.ROW_MEM]
    gva = a[r + o.ROW_DISP]
    base = packed & 31
    if base < 16:
        gva += m[s.GPR + base]
    index = (packed >> o.MEM_INDEX) & 31
    if index < 16:
        gva += m[s.GPR + index] << ((packed >> o.MEM_SCALE) & 3)
    segment = packed >> o.MEM_SEGMENT
    if segment:
        gva += m[s.FS_BASE] if segment == 1 else m[s.GS_BASE]
    return gva


@kernel
def mix(digest: int, value: int) -> int:
    """Roll a value into a digest (wraps)."""
    digest = (digest ^ value) * 0x100000001B3
    return digest ^ ((digest >> 29) & 0x7FFFFFFFF)


@kernel
def saw(m: Record, value: int) -> None:
    """The program saw a value that does not depend on time: roll it into its ring's digest."""
    if m[s.PRIVILEGE] & 1:
        m[s.DIGEST_APPLICATION] = mix(m[s.DIGEST_APPLICATION], value)
    else:
        m[s.DIGEST_KERNEL] = mix(m[s.DIGEST_KERNEL], value)


@kernel
def msr_slot(index: int) -> int:
    """The record slot of an MSR that is plain storage, or -1."""
    if index == 0xC0000080:
        return s.EFER
    if index == 0xC0000081:
        return s.MSR_STAR
    if index == 0xC0000082:
        return s.MSR_LSTAR
    if index == 0xC0000083:
        return s.MSR_CSTAR
    if index == 0xC0000084:
        return s.MSR_FMASK
    if index == 0xC0000100:
        return s.FS_BASE
    if index == 0xC0000101:
        return s.GS_BASE
    if index == 0xC0000102:
        return s.MSR_KERNEL_GS_BASE
    if index == 0xC0000103:
        return s.MSR_TSC_AUX
    if index == 0x1B:
        return s.MSR_APIC_BASE
    if index == 0x3A:
        return s.MSR_FEATURE_CONTROL
    if index == 0x3B:
        return s.MSR_TSC_ADJUST
    if index == 0x48:
        return s.MSR_SPEC_CTRL
    if index == 0x174:
        return s.SYSENTER_CS
    if index == 0x175:
        return s.SYSENTER_ESP
    if index == 0x176:
        return s.SYSENTER_EIP
    if index == 0x1A0:
        return s.MSR_MISC_ENABLE
    if index == 0x1D9:
        return s.DEBUGCTL
    if index == 0x277:
        return s.PAT
    if index == 0x6E0:
        return s.MSR_TSC_DEADLINE
    if index == 0xDA0:
        return s.MSR_XSS
    return -1


@kernel
def time_stamp(m: Record) -> int:
    """What RDTSC reads now."""
    tsc = m[s.CYCLE] + m[s.MSR_TSC_ADJUST]
    if m[s.NONROOT]:
        tsc += m[s.TSC_OFFSET]
    return tsc


@kernel
def flush_linear(m: Record, a: Arena) -> None:
    """Drop every linear and combined mapping of the current VPID: paging-mode bits changed."""
    drop_contexts(m, a, 0xFFFF, m[s.CONTEXT_KEY] & 0xFFFF, True)


@kernel
def bitmap_bit(a: Arena, address: int, bit: int) -> bool:
    """Bit `bit` of a bitmap page in memory; a page without contents reads as zero, what is not memory as ones."""
    if not is_memory(a, address):
        return True
    at = contents(a, (address >> 12) + (bit >> 15))
    if at == 0:
        return False
    bit &= 0x7FFF
    return (a[at + (bit >> 6)] >> (bit & 63)) & 1 != 0


@kernel
def msr_exits(m: Record, a: Arena, index: int, write: bool) -> bool:
    """Does this RDMSR or WRMSR exit?

    SDM: "MSR-Bitmap Address".
    """
    at = m[s.VMCS]
    if a[at + v.PRIMARY_PROC_CONTROLS] & b.USE_MSR_BITMAPS == 0:
        return True
    bit = index
    if 0xC0000000 <= index <= 0xC0001FFF:
        bit = (index & 0x1FFF) + 1024 * 8
    elif index > 0x1FFF:
        return True
    if write:
        bit += 2048 * 8
    return bitmap_bit(a, a[at + v.MSR_BITMAPS], bit)


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


@kernel
def read_msr(m: Record, a: Arena, index: int) -> int:
    """RDMSR: NEXT with RDX:RAX, or #GP."""
    value = 0
    slot = msr_slot(index)
    if slot >= 0:
        value = m[slot]
        saw(m, value)
    elif index == 0x10:
        value = time_stamp(m)
    elif 0x800 <= index <= 0x83F:
        value = read_register(m, index - 0x800)
    elif FIRST_CAPABILITY <= index < FIRST_CAPABILITY + CAPABILITIES:
        value = a[a[A_CAPABILITIES] + index - FIRST_CAPABILITY]
    elif not recorded(m, a):  # the recorded machine had the register: its guest saw no fault
        return raise_exception(m, GP, 1, 0)
    m[s.GPR + s.RAX] = value & 0xFFFFFFFF
    m[s.GPR + s.RDX] = (value >> 32) & 0xFFFFFFFF
    return NEXT


@kernel
def write_msr(m: Record, a: Arena, index: int, value: int) -> int:
    """WRMSR: NEXT, or #GP."""
    if 0x800 <= index <= 0x83F:
        m[s.CYCLE] += m[s.P_WRMSR_X2APIC] - m[s.PRICE + o.WRMSR]
        write_register(m, a, index - 0x800, value)
        return NEXT
    slot = msr_slot(index)
    if index == 0x10:
        m[s.MSR_TSC_ADJUST] += value - time_stamp(m)
        return NEXT
    if slot < 0:
        return NEXT if recorded(m, a) else raise_exception(m, GP, 1, 0)
    if slot == s.MSR_TSC_DEADLINE and m[s.APIC_TIMER_MODE] != TSC_DEADLINE:
        return NEXT
    old = m[slot]
    m[slot] = value
    if slot == s.EFER and (old ^ value) & (1 << 11):
        flush_linear(m, a)
    if slot == s.MSR_TSC_DEADLINE:
        m[s.CYCLE] += m[s.P_WRMSR_X2APIC] - m[s.PRICE + o.WRMSR]
        m[s.APIC_DEADLINE] = FOREVER
        if value:
            m[s.APIC_DEADLINE] = value - m[s.MSR_TSC_ADJUST] - (m[s.TSC_OFFSET] if m[s.NONROOT] else 0)
        set_limit(m, a)
    return NEXT


@kernel
def move_cr(m: Record, a: Arena, r: int, op: int) -> int:
    """MOV to and from CR0, CR2, CR3, CR4, CR8; CLTS; LMSW.

    SDM: "Guest/Host Masks and Read Shadows for CR0 and CR4"; "CR3-Target Controls".
    """
    register = a[r + o.ROW_R1]
    number = a[r + o.ROW_IMM]
    at = m[s.VMCS]
    nonroot = m[s.NONROOT] != 0
    primary = a[at + v.PRIMARY_PROC_CONTROLS] if nonroot else 0
    kind = 0
    if op == o.MOV_FROM_CR:
        kind = 1
    elif op == o.CLTS:
        kind = 2
        number = 0
    elif op == o.LMSW:
        kind = 3
        number = 0
    gpr = register & 15
    q = number | kind << 4 | (gpr << 8 if kind < 2 else 0)
    if op == o.MOV_FROM_CR:
        if number == 0 or number == 4:
            slot = s.CR0 if number == 0 else s.CR4
            value = m[slot]
            if nonroot:
                mask = a[at + (v.CR0_GUEST_HOST_MASK if number == 0 else v.CR4_GUEST_HOST_MASK)]
                shadow = a[at + (v.CR0_READ_SHADOW if number == 0 else v.CR4_READ_SHADOW)]
                value = (value & ~mask) | (shadow & mask)
            saw(m, value)
        elif number == 3:
            if primary & b.CR3_STORE_EXITING:
                vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
                return JUMPED
            value = m[s.CR3]
        elif number == 8:
            if primary & b.CR8_STORE_EXITING:
                vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
                return JUMPED
            value = m[s.CR8]
            if primary & b.USE_TPR_SHADOW:
                value = (load(a, a[at + v.VIRTUAL_APIC_ADDRESS] + 0x80, 4) >> 4) & 15
        else:
            value = m[s.CR2]
        if number == 8:
            m[s.CYCLE] += m[s.P_MOV_FROM_CR8] - m[s.PRICE + o.MOV_FROM_CR]
        m[s.GPR + gpr] = value
        return NEXT
    value = m[s.GPR + gpr]
    if op == o.CLTS:
        value = m[s.CR0] & ~8
        if nonroot:
            mask = a[at + v.CR0_GUEST_HOST_MASK]
            if mask & 8:
                if a[at + v.CR0_READ_SHADOW] & 8:
                    vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
                    return JUMPED
                return NEXT
        m[s.CR0] = value
        return NEXT
    if op == o.LMSW:
        q |= (value & 0xFFFF) << 16
        sets_pe = value & 1
        value = (m[s.CR0] & ~14) | (value & 15) | (m[s.CR0] & 1)
        if nonroot:
            mask = a[at + v.CR0_GUEST_HOST_MASK] & 15
            shadow = a[at + v.CR0_READ_SHADOW]
            if (value ^ shadow) & mask & 14 or (mask & 1 and sets_pe and shadow & 1 == 0):
                vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
                return JUMPED
            value = (m[s.CR0] & (mask | ~15)) | (value & 15 & ~mask)
        m[s.CR0] = value
        return NEXT
    if number == 0 or number == 4:
        slot = s.CR0 if number == 0 else s.CR4
        old = m[slot]
        if nonroot:
            mask = a[at + (v.CR0_GUEST_HOST_MASK if number == 0 else v.CR4_GUEST_HOST_MASK)]
            shadow = a[at + (v.CR0_READ_SHADOW if number == 0 else v.CR4_READ_SHADOW)]
            if (value ^ shadow) & mask:
                vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
                return JUMPED
            value = (old & mask) | (value & ~mask)
        m[s.CYCLE] += m[s.P_MOV_TO_CR + number]
        m[slot] = value
        if (old ^ value) & (CR0_PAGING if number == 0 else CR4_PAGING):
            flush_linear(m, a)
        set_context(m, a)
        return NEXT
    if number == 3:
        if primary & b.CR3_LOAD_EXITING:
            listed = False
            for n in range(min(a[at + v.CR3_TARGET_COUNT], 4)):
                listed = listed or a[at + v.CR3_TARGET_VALUE_0 + n] == value
            if not listed:
                vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
                return JUMPED
        m[s.CYCLE] += m[s.P_MOV_TO_CR3_NOFLUSH if value < 0 else s.P_MOV_TO_CR + 3]
        load_cr3(m, a, value)
        return NEXT
    if number == 8:
        if primary & b.CR8_LOAD_EXITING:
            vm_exit(m, a, x.CR_ACCESS, q, m[s.OP_LENGTH])
            return JUMPED
        m[s.CYCLE] += m[s.P_MOV_TO_CR + 8]
        if primary & b.USE_TPR_SHADOW:
            store(a, a[at + v.VIRTUAL_APIC_ADDRESS] + 0x80, 4, (value & 15) << 4)
            if value & 15 < a[at + v.TPR_THRESHOLD] & 15:
                m[s.RIP] += m[s.OP_LENGTH]
                m[s.IN_FLIGHT] = 0  # trap-like: the op has retired
                vm_exit(m, a, x.TPR_BELOW_THRESHOLD, 0, m[s.OP_LENGTH])
                return JUMPED
            return NEXT
        write_register(m, a, 8, (value & 15) << 4)
        return NEXT
    m[s.CYCLE] += m[s.P_MOV_TO_CR + 2]
    m[s.CR2] = value
    return NEXT


@kernel
def load_cr3(m: Record, a: Arena, value: int) -> None:
    """Load CR3 and drop what that invalidates: nothing global, and nothing at all with PCIDs and bit 63 set.

    SDM: "Operations that Invalidate TLBs and Paging-Structure Caches".
    """
    keep_all = m[s.CR4] & CR4_PCIDE != 0 and value < 0
    m[s.CR3] = value & 0x7FFF_FFFF_FFFF_FFFF
    set_context(m, a)
    if not keep_all:
        drop_contexts(m, a, -1, m[s.CONTEXT_KEY], False)


@kernel
def failed(m: Record, a: Arena, error: int) -> int:
    """VMfail: RFLAGS.ZF and the VM-instruction error, or RFLAGS.CF where there is no current VMCS.

    SDM: "Conventions".
    """
    m[s.RFLAGS] &= ~ARITHMETIC
    if m[s.VMCS] == 0:
        m[s.RFLAGS] |= RF_CF
    else:
        m[s.RFLAGS] |= RF_ZF
        a[m[s.VMCS] + v.VM_INSTRUCTION_ERROR] = error
    return NEXT


@kernel
def vmx(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """VMX instructions in root operation, ring 0."""
    if op == o.VMLAUNCH or op == o.VMRESUME:
        at = m[s.VMCS]
        if at == 0:
            return failed(m, a, 0)
        launched = a[at + h.V_LAUNCHED]
        if op == o.VMLAUNCH and launched != h.CLEAR:
            return failed(m, a, 4)
        if op == o.VMRESUME and launched != h.LAUNCHED:
            return failed(m, a, 5)
        return vm_entry(m, a, t)
    if op == o.VMXOFF:
        m[s.VMXON] = 0
        m[s.VMCS] = 0
        m[s.RFLAGS] &= ~ARITHMETIC
        return NEXT
    gva = effective(m, a, r)
    if op == o.VMPTRST:
        fault = write64(m, a, t, gva, m[s.VMCS_POINTER])
        return NEXT if fault == 0 else raise_fault(m, a, t, fault)
    pointer = read64(m, a, t, gva)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    if op == o.INVEPT or op == o.INVVPID:
        kind = m[s.GPR + (a[r + o.ROW_R1] & 15)]
        if op == o.INVEPT:
            if kind < 1 or kind > 2:
                return failed(m, a, 28)
            drop_guest_physical(m, a, pointer & ADDRESS if kind == 1 else 0)
        else:
            vpid = pointer & 0xFFFF
            if kind < 0 or kind > 3 or (kind != 2 and vpid == 0):
                return failed(m, a, 28)
            if kind == 0:
                address = read64(m, a, t, gva + 8)
                if m[s.FAULT_KIND]:
                    return raise_fault(m, a, t, m[s.FAULT_KIND])
                for n in range(m[s.CONTEXT_COUNT]):
                    key = a[m[s.CONTEXTS] + n]
                    if key >= 0 and key & 0xFFFF == vpid:
                        drop_page(m, a, key & ~GLOBAL_KEY, address)
            elif kind == 2:
                for n in range(m[s.CONTEXT_COUNT]):
                    key = a[m[s.CONTEXTS] + n]
                    if key >= 0 and key & 0xFFFF:
                        drop_contexts(m, a, -1, key, True)
            else:
                drop_contexts(m, a, 0xFFFF, vpid, kind == 1)
        m[s.RFLAGS] &= ~ARITHMETIC
        return NEXT
    if pointer & 0xFFF or not is_memory(a, pointer):
        error = 9
        if op == o.VMCLEAR:
            error = 2
        return failed(m, a, error)
    if op == o.VMXON:
        m[s.VMXON] = 1
        m[s.VMXON_POINTER] = pointer
        m[s.VMCS] = 0
        m[s.VMCS_POINTER] = -1
    else:
        if pointer == m[s.VMXON_POINTER]:
            return failed(m, a, 3 if op == o.VMCLEAR else 10)
        at = give_contents(a, pointer >> 12, VMCS_REGION)
        if at < 0:
            return failed(m, a, 9)
        if op == o.VMCLEAR:
            a[at + h.V_LAUNCHED] = h.CLEAR
            a[at + h.V_EXIT_REASON] = -1
            if m[s.VMCS] == at:
                m[s.VMCS] = 0
                m[s.VMCS_POINTER] = -1
        else:
            if a[at + h.V_REVISION] != m[s.VMX_REVISION]:
                return failed(m, a, 11)
            m[s.VMCS] = at
            m[s.VMCS_POINTER] = pointer
    m[s.RFLAGS] &= ~ARITHMETIC
    return NEXT


@kernel
def return_from_interrupt(m: Record, a: Arena, t: Tags) -> int:
    """IRET in 64-bit mode.

    SDM: "IRET/IRETD/IRETQ—Interrupt Return".
    """
    rsp = m[s.GPR + s.RSP]
    user = m[s.PRIVILEGE] & 1
    rip = read_as(m, a, t, rsp, user)
    cs = 0
    flags = 0
    stack = 0
    ss = 0
    if m[s.FAULT_KIND] == 0:
        cs = read_as(m, a, t, rsp + 8, user)
    if m[s.FAULT_KIND] == 0:
        flags = read_as(m, a, t, rsp + 16, user)
    if m[s.FAULT_KIND] == 0:
        stack = read_as(m, a, t, rsp + 24, user)
    if m[s.FAULT_KIND] == 0:
        ss = read_as(m, a, t, rsp + 32, user)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    if user:
        if cs & 3 != 3:
            return raise_exception(m, GP, 1, cs & 0xFFFC)
        kept = 0x3000 if (m[s.RFLAGS] >> 12) & 3 == 3 else 0x3000 | RF_IF
        flags = (flags & ~kept) | (m[s.RFLAGS] & kept)
    before = m[s.PRIVILEGE]
    m[s.RIP] = rip
    m[s.CS_SELECTOR] = cs & 0xFFFF
    m[s.RFLAGS] = flags | 2
    m[s.GPR + s.RSP] = stack
    m[s.SS_SELECTOR] = ss & 0xFFFF
    m[s.NMI_BLOCKED] = 0
    set_privilege(m, a, cs & 3)
    set_limit(m, a)
    if m[s.TRACE_ON]:
        record(m, a, before, tr.IRET, 0, 0, 0, 0)
    return JUMPED


@kernel
def system_call(m: Record, a: Arena, op: int) -> int:
    """SYSCALL, SYSRET, SYSENTER, SYSEXIT.

    SDM: "Fast System Calls in 64-Bit Mode".
    """
    before = m[s.PRIVILEGE]
    if op == o.SYSCALL:
        m[s.GPR + s.RCX] = m[s.RIP] + m[s.OP_LENGTH]
        m[s.GPR + s.R11] = m[s.RFLAGS]
        m[s.RIP] = m[s.MSR_LSTAR]
        m[s.RFLAGS] &= ~m[s.MSR_FMASK]
        m[s.CS_SELECTOR] = (m[s.MSR_STAR] >> 32) & 0xFFFC
        m[s.SS_SELECTOR] = m[s.CS_SELECTOR] + 8
        a[m[s.OWNER] + k.SYSCALLS] += 1
        set_privilege(m, a, 0)
    elif op == o.SYSRET:
        m[s.RIP] = m[s.GPR + s.RCX]
        m[s.RFLAGS] = (m[s.GPR + s.R11] & 0x3C7FD7) | 2
        m[s.CS_SELECTOR] = (((m[s.MSR_STAR] >> 48) & 0xFFFF) + 16) | 3
        m[s.SS_SELECTOR] = (((m[s.MSR_STAR] >> 48) & 0xFFFF) + 8) | 3
        set_privilege(m, a, 3)
        m[s.DIGEST_APPLICATION] = mix(m[s.DIGEST_APPLICATION], m[s.GPR + s.RAX])
    elif op == o.SYSENTER:
        m[s.RIP] = m[s.SYSENTER_EIP]
        m[s.GPR + s.RSP] = m[s.SYSENTER_ESP]
        m[s.RFLAGS] &= ~RF_IF
        a[m[s.OWNER] + k.SYSCALLS] += 1
        set_privilege(m, a, 0)
    else:
        m[s.RIP] = m[s.GPR + s.RDX]
        m[s.GPR + s.RSP] = m[s.GPR + s.RCX]
        set_privilege(m, a, 3)
        m[s.DIGEST_APPLICATION] = mix(m[s.DIGEST_APPLICATION], m[s.GPR + s.RAX])
    set_limit(m, a)
    if m[s.TRACE_ON]:
        record(m, a, before, tr.SYSRET if op == o.SYSRET or op == o.SYSEXIT else tr.SYSCALL, m[s.GPR + s.RAX], 0, 0, 0)
    return JUMPED


@kernel
def cpuid(m: Record, a: Arena) -> None:
    """CPUID from the machine's table; an unknown leaf reads as zero."""
    leaf = m[s.GPR + s.RAX] & 0xFFFFFFFF
    sub = m[s.GPR + s.RCX] & 0xFFFFFFFF
    line = a[A_CPUID]
    found = -1
    if leaf:
        m[s.CYCLE] += m[s.P_CPUID_1] - m[s.PRICE + o.CPUID]
    for n in range(a[A_CPUID_COUNT]):
        if a[line + 6 * n] == leaf and (a[line + 6 * n + 1] == -1 or a[line + 6 * n + 1] == sub):
            found = line + 6 * n
            break
    for n in range(4):
        value = a[found + 2 + n] if found >= 0 else 0
        register = s.RAX
        if n == 1:
            register = s.RBX
        elif n == 2:
            register = s.RCX
        elif n == 3:
            register = s.RDX
        m[s.GPR + register] = value
        saw(m, value)


@kernel
def halt(m: Record, a: Arena) -> int:
    """HLT: nothing runs until an interrupt."""
    a[m[s.OWNER] + k.HALTS] += 1
    settle(m, a)
    m[s.HALTED] = 1
    m[s.LIMIT] = 0
    m[s.HALTED_AT] = m[s.CYCLE]
    return NEXT


@kernel
def exit_qualification(m: Record, a: Arena, r: int, op: int) -> int:
    """The exit qualification of an op that exits by rule.

    SDM: "Exit Qualification".
    """
    if op == o.MOV_FROM_DR or op == o.MOV_TO_DR:
        return a[r + o.ROW_IMM] | (16 if op == o.MOV_FROM_DR else 0) | (a[r + o.ROW_R1] & 15) << 8
    if op == o.INVLPG:
        return effective(m, a, r)
    if a[r + o.ROW_MEM] & 31 < 16 or a[r + o.ROW_DISP] != 0:
        return a[r + o.ROW_DISP]
    return 0


@kernel
def exits_by_rule(m: Record, a: Arena, op: int) -> bool:
    """Does this op, in non-root mode, exit always or because of one control bit?"""
    where = WHERE[op]
    if where == rules.PRIMARY:
        return a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & BIT[op] != 0
    if where == rules.SECONDARY:
        return (
            a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & b.ACTIVATE_SECONDARY_CONTROLS != 0
            and a[m[s.VMCS] + v.SECONDARY_PROC_CONTROLS] & BIT[op] != 0
        )
    return where == rules.ALWAYS


@kernel
def system(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """Execute one sensitive or privileged op: how it ended (NEXT, JUMPED, EVENT, STOPPED, AGAIN)."""
    ring3 = m[s.PRIVILEGE] & 1
    if m[s.NONROOT]:
        if ring3 and RING[op] == 1:
            return raise_exception(m, GP, 1, 0)
        if exits_by_rule(m, a, op):
            vm_exit(m, a, REASON[op], exit_qualification(m, a, r, op), m[s.OP_LENGTH])
            return JUMPED
    elif RING[op] == 3 and m[s.VMXON] == 0:
        return raise_exception(m, UD, 0, 0)
    if ring3:
        if RING[op] == 1 or RING[op] == 3 or (RING[op] == 2 and (m[s.RFLAGS] >> 12) & 3 != 3):
            return raise_exception(m, GP, 1, 0)
    if op == o.RDMSR or op == o.WRMSR:
        index = m[s.GPR + s.RCX] & 0xFFFFFFFF
        if m[s.NONROOT] and msr_exits(m, a, index, op == o.WRMSR):
            vm_exit(m, a, x.MSR_WRITE if op == o.WRMSR else x.MSR_READ, 0, m[s.OP_LENGTH])
            return JUMPED
        if op == o.RDMSR:
            return read_msr(m, a, index)
        return write_msr(m, a, index, (m[s.GPR + s.RAX] & 0xFFFFFFFF) | (m[s.GPR + s.RDX] << 32))
    if op == o.IN or op == o.OUT or op == o.INS or op == o.OUTS:
        return in_out(m, a, t, r, op)
    if op == o.MOV_TO_CR or op == o.MOV_FROM_CR or op == o.CLTS or op == o.LMSW:
        return move_cr(m, a, r, op)
    if op == o.IRET:
        return return_from_interrupt(m, a, t)
    if op == o.SYSCALL or op == o.SYSRET or op == o.SYSENTER or op == o.SYSEXIT:
        return system_call(m, a, op)
    if RING[op] == 3 or op == o.VMXON:
        return vmx(m, a, t, r, op)
    return system_rest(m, a, t, r, op)


@kernel
def system_rest(m: Record, a: Arena, t: Tags, r: int, op: int) -> int:
    """The sensitive ops that need no decision of their own any more."""
    g = s.GPR + (a[r + o.ROW_R1] & 15)
    if op == o.CPUID:
        cpuid(m, a)
    elif op == o.RDTSC or op == o.RDTSCP:
        tsc = time_stamp(m)
        m[s.GPR + s.RAX] = tsc & 0xFFFFFFFF
        m[s.GPR + s.RDX] = (tsc >> 32) & 0xFFFFFFFF
        if op == o.RDTSCP:
            m[s.GPR + s.RCX] = m[s.MSR_TSC_AUX]
    elif op == o.RDPMC:
        m[s.GPR + s.RAX] = m[s.RETIRED] & 0xFFFFFFFF
        m[s.GPR + s.RDX] = 0
    elif op == o.HLT or op == o.MWAIT:
        return halt(m, a)
    elif op == o.CLI:
        m[s.RFLAGS] &= ~RF_IF
        set_limit(m, a)
    elif op == o.STI:
        if m[s.RFLAGS] & RF_IF == 0:
            m[s.RFLAGS] |= RF_IF
            m[s.INTERRUPT_SHADOW] = 2
            m[s.LIMIT] = 0
    elif op == o.PUSHF:
        fault = write_as(m, a, t, m[s.GPR + s.RSP] - 8, m[s.RFLAGS], m[s.PRIVILEGE] & 1)
        if fault:
            return raise_fault(m, a, t, fault)
        m[s.GPR + s.RSP] -= 8
    elif op == o.POPF:
        flags = read_as(m, a, t, m[s.GPR + s.RSP], m[s.PRIVILEGE] & 1)
        if m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        m[s.GPR + s.RSP] += 8
        kept = 0
        if m[s.PRIVILEGE] & 1:
            kept = 0x3000 if (m[s.RFLAGS] >> 12) & 3 == 3 else 0x3000 | RF_IF
        m[s.RFLAGS] = (flags & 0x254DD5 & ~kept) | (m[s.RFLAGS] & kept) | 2
        set_limit(m, a)
    elif op == o.SWAPGS:
        m[s.GS_BASE], m[s.MSR_KERNEL_GS_BASE] = m[s.MSR_KERNEL_GS_BASE], m[s.GS_BASE]
    elif op == o.INVLPG:
        drop_page(m, a, m[s.CONTEXT_KEY], effective(m, a, r))
    elif op == o.INVPCID:
        return invpcid(m, a, t, r)
    elif op == o.MOV_TO_DR:
        number = a[r + o.ROW_IMM]
        if number == 7:
            m[s.DR7] = m[g]
        elif number == 6:
            m[s.DR6] = m[g]
    elif op == o.MOV_FROM_DR:
        number = a[r + o.ROW_IMM]
        m[g] = m[s.DR7] if number == 7 else (m[s.DR6] if number == 6 else 0)
    elif op == o.SMSW:
        value = m[s.CR0]
        if m[s.NONROOT]:
            mask = a[m[s.VMCS] + v.CR0_GUEST_HOST_MASK]
            value = (value & ~mask) | (a[m[s.VMCS] + v.CR0_READ_SHADOW] & mask)
        m[g] = value
        saw(m, value)
    elif op == o.LGDT or op == o.LIDT:
        gva = effective(m, a, r)
        limit = read64(m, a, t, gva) & 0xFFFF
        base = read64(m, a, t, gva + 8) if m[s.FAULT_KIND] == 0 else 0
        if m[s.FAULT_KIND]:
            return raise_fault(m, a, t, m[s.FAULT_KIND])
        m[s.GDTR_BASE if op == o.LGDT else s.IDTR_BASE] = base
        m[s.GDTR_LIMIT if op == o.LGDT else s.IDTR_LIMIT] = limit
    elif op == o.SGDT or op == o.SIDT:
        gva = effective(m, a, r)
        user = m[s.PRIVILEGE] & 1
        fault = write_as(m, a, t, gva, m[s.GDTR_LIMIT if op == o.SGDT else s.IDTR_LIMIT], user)
        if fault == 0:
            fault = write_as(m, a, t, gva + 8, m[s.GDTR_BASE if op == o.SGDT else s.IDTR_BASE], user)
        if fault:
            return raise_fault(m, a, t, fault)
        saw(m, m[s.GDTR_BASE if op == o.SGDT else s.IDTR_BASE])
    elif op == o.LLDT:
        m[s.LDTR_SELECTOR] = m[g] & 0xFFFF
    elif op == o.SLDT:
        m[g] = m[s.LDTR_SELECTOR]
        saw(m, m[g])
    elif op == o.LTR:
        m[s.TR_SELECTOR] = m[g] & 0xFFFF
        m[s.TR_BASE] = m[s.GPR + (a[r + o.ROW_R2] & 15)]
    elif op == o.STR:
        m[g] = m[s.TR_SELECTOR]
        saw(m, m[g])
    elif op == o.XSETBV:
        m[s.XCR0] = (m[s.GPR + s.RAX] & 0xFFFFFFFF) | m[s.GPR + s.RDX] << 32
    elif op == o.WBINVD or op == o.INVD:
        for cache in range(s.L1I, s.L3 + 8, 8):
            forget(m, t, cache)
        m[s.FETCH_GENERATION] += 1
    elif op == o.RDRAND or op == o.RDSEED:
        state = m[s.CYCLE] * 0x9E3779B1 + 0x7F4A7C15
        m[g] = state ^ ((state >> 17) & 0xFFFF)
        m[s.RFLAGS] = (m[s.RFLAGS] & ~ARITHMETIC) | RF_CF
    elif op == o.VMCALL or op == o.VMFUNC or op == o.GETSEC or op == o.UD:
        return raise_exception(m, UD, 0, 0)
    elif op == o.INT:
        m[s.EVENT_VECTOR] = a[r + o.ROW_IMM]
        m[s.EVENT_TYPE] = SOFTWARE_INTERRUPT
        m[s.EVENT_HAS_ERROR] = 0
        m[s.EVENT_ERROR] = 0
        m[s.EVENT_LENGTH] = m[s.OP_LENGTH]
        return deliver(m, a, t)
    return NEXT


@kernel
def forget(m: Record, t: Tags, cache: int) -> None:
    """Empty a cache."""
    for n in range(m[cache + s.SETS] * m[cache + s.WAYS]):
        t[m[cache] + n] = -1


@kernel
def invpcid(m: Record, a: Arena, t: Tags, r: int) -> int:
    """INVPCID: individual address, single context, all with globals, all but globals.

    SDM: "INVPCID—Invalidate Process-Context Identifier".
    """
    kind = m[s.GPR + (a[r + o.ROW_R1] & 15)]
    gva = effective(m, a, r)
    low = read64(m, a, t, gva)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    address = read64(m, a, t, gva + 8)
    if m[s.FAULT_KIND]:
        return raise_fault(m, a, t, m[s.FAULT_KIND])
    if kind < 0 or kind > 3 or low & ~0xFFF:
        return raise_exception(m, GP, 1, 0)
    key = (m[s.CONTEXT_KEY] & ~(0xFFF << 16)) | (low & 0xFFF) << 16
    if kind == 0:
        drop_page(m, a, key, address)
    elif kind == 1:
        drop_contexts(m, a, -1, key, False)
    else:
        others = ~(0xFFF << 16) & ~GLOBAL_KEY
        drop_contexts(m, a, others, m[s.CONTEXT_KEY] & others, kind == 2)
    return NEXT
