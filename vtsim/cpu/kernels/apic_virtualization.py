"""The virtual local APIC: which accesses are answered by the virtual-APIC page, what a write does, virtual interrupts.

SDM: "APIC Virtualization and Virtual Interrupts"; "Virtualizing Reads from the APIC-Access Page";
"Virtualizing Writes to the APIC-Access Page"; "Virtualizing MSR-Based APIC Accesses".
Not modelled: accesses to the APIC-access page by page walks of 32-bit and PAE paging, or without EPT.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import is_memory, load, store
from vtsim.cpu import slots as s
from vtsim.cpu.codes import EXTERNAL, RF_IF, RF_RF
from vtsim.cpu.kernels.access import touch_physical
from vtsim.cpu.kernels.active_controls import secondary_controls, tertiary_controls
from vtsim.cpu.kernels.apic import REG_EOI, write_register
from vtsim.cpu.kernels.exit import vm_exit
from vtsim.cpu.kernels.posted_interrupts import NOTIFY, OUTSTANDING, post_interrupt
from vtsim.cpu.kernels.rights import WRITE
from vtsim.vmcs import bits as b
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs.events import HLT_STATE

# fmt: off
ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR_LOW, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
FIRST_LVT, LAST_LVT, INITIAL_COUNT, DIVIDE, SELF_IPI = 0x320, 0x370, 0x380, 0x3E0, 0x3F0
BY_ENTRY: int = 1 << 12            # in place of an offset: VM entry found the TPR below its threshold
READ_ACCESS, WRITE_ACCESS, FETCH_ACCESS, DELIVERY = 0, 1, 2, 3
# bits of the interrupt-command register that a self-IPI may not have: all but the vector and "self"
NOT_SELF_IPI: int = 0xFFF3FF00 & ~(1 << 14)
SELF, SHORTHAND = 1 << 18, 3 << 18
# bits that the command of a virtual IPI may not have: it is fixed, physical, edge-triggered and without shorthand
NOT_VIRTUAL_IPI: int = 0xFFFFBF00
# fmt: on


@kernel
def virtual_page(m: Record, a: Arena) -> int:
    """The host-physical address of the virtual-APIC page."""
    return a[m[s.VMCS] + v.VIRTUAL_APIC_ADDRESS] & ~0xFFF


@kernel
def virtual_load(m: Record, a: Arena, offset: int, size: int) -> int:
    """Bytes of the virtual-APIC page; ones where its address is not that of memory."""
    at = virtual_page(m, a) + offset
    return load(a, at, size) if is_memory(a, at) else (1 << 8 * min(size, 7)) - 1


@kernel
def virtual_store(m: Record, a: Arena, offset: int, size: int, value: int) -> None:
    """Write bytes of the virtual-APIC page, if its address is that of memory."""
    at = virtual_page(m, a) + offset
    if is_memory(a, at):
        store(a, at, size, value)


@kernel
def on_apic_page(m: Record, a: Arena, hpa: int) -> bool:
    """Is this an address on the APIC-access page of the guest?"""
    if m[s.NONROOT] == 0 or secondary_controls(m, a) & b.VIRTUALIZE_APIC_ACCESSES == 0:
        return False
    return hpa >> 12 == a[m[s.VMCS] + v.APIC_ACCESS_ADDRESS] >> 12


@kernel
def has_register(offset: int) -> bool:
    """Is there a local-APIC register at this offset that register virtualization reads?"""
    if ISR <= offset < TMR + 0x80 or IRR <= offset < IRR + 0x80 or FIRST_LVT <= offset <= LAST_LVT:
        return True
    if offset == ID or offset == VERSION or offset == TPR or offset == EOI or offset == LDR or offset == DFR:
        return True
    return (
        offset == SVR
        or offset == ESR
        or offset == ICR_LOW
        or offset == ICR_HIGH
        or offset == INITIAL_COUNT
        or offset == DIVIDE
    )


@kernel
def virtualizes_read(m: Record, a: Arena, offset: int, size: int) -> bool:
    """Does the virtual-APIC page answer a read, so that there is no APIC-access VM exit?

    SDM: "Virtualizing Reads from the APIC-Access Page".
    """
    if a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & b.USE_TPR_SHADOW == 0 or size > 4 or (offset & 15) + size > 4:
        return False
    register = offset & ~15
    if secondary_controls(m, a) & b.APIC_REGISTER_VIRTUALIZATION:
        return has_register(register)
    return offset == TPR


@kernel
def virtualizes_write(m: Record, a: Arena, offset: int, size: int) -> bool:
    """Does the virtual-APIC page take a write, so that there is no APIC-access VM exit?

    SDM: "Virtualizing Writes to the APIC-Access Page".
    """
    if a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & b.USE_TPR_SHADOW == 0 or size > 4 or (offset & 15) + size > 4:
        return False
    register = offset & ~15
    controls = secondary_controls(m, a)
    if controls & b.APIC_REGISTER_VIRTUALIZATION:
        return has_register(register) and register != VERSION and not ISR <= register < ESR
    if controls & b.VIRTUAL_INTERRUPT_DELIVERY and (offset == EOI or offset == ICR_LOW):
        return True
    if offset == ICR_LOW and tertiary_controls(m, a) & b.IPI_VIRTUALIZATION:
        return True
    return offset == TPR


@kernel
def fetch_exit(m: Record, a: Arena, offset: int) -> None:
    """The VM exit of an instruction fetch from the APIC-access page.

    SDM: "Virtualizing Reads from the APIC-Access Page"; "Basic VM-Exit Information".
    """
    m[s.RFLAGS] |= RF_RF
    vm_exit(m, a, x.APIC_ACCESS, offset | FETCH_ACCESS << 12, 0)


@kernel
def apic_access_exit(m: Record, a: Arena, offset: int, write: bool) -> None:
    """The VM exit of an access that is not virtualized.

    SDM: "APIC-Access VM Exits"; "Basic VM-Exit Information".
    """
    kind = WRITE_ACCESS if write else READ_ACCESS
    if m[s.VECTORING]:
        kind = DELIVERY
    m[s.RFLAGS] |= RF_RF
    vm_exit(m, a, x.APIC_ACCESS, offset | kind << 12, m[s.OP_LENGTH])


@kernel
def note_write(m: Record, offset: int) -> None:
    """A virtualized write is emulated once its instruction has completed."""
    m[s.APIC_WRITTEN] = offset & ~15 | 1
    m[s.PENDING] = 1
    m[s.LIMIT] = 0


@kernel
def word(m: Record, a: Arena, offset: int) -> int:
    """A register of the virtual-APIC page."""
    return virtual_load(m, a, offset, 4)


@kernel
def set_word(m: Record, a: Arena, offset: int, value: int) -> None:
    """Write a register of the virtual-APIC page."""
    virtual_store(m, a, offset, 4, value)


@kernel
def highest_vector(m: Record, a: Arena, base: int) -> int:
    """The highest vector set in a 256-bit register of the virtual-APIC page; 0 if there is none."""
    for n in range(7, -1, -1):
        bits = word(m, a, base + 16 * n)
        if bits:
            for k in range(31, -1, -1):
                if (bits >> k) & 1:
                    return 32 * n + k
    return 0


@kernel
def update_priority(m: Record, a: Arena) -> None:
    """PPR virtualization.

    SDM: "PPR Virtualization".
    """
    tpr = word(m, a, TPR)
    serving = (a[m[s.VMCS] + v.GUEST_INTERRUPT_STATUS] >> 8) & 0xFF
    set_word(m, a, PPR, tpr & 0xFF if (tpr >> 4) & 15 >= serving >> 4 else serving & 0xF0)


@kernel
def evaluate_virtual(m: Record, a: Arena) -> None:
    """Is a virtual interrupt recognized? Keeps VIRTUAL_PENDING (vector + 1).

    SDM: "Evaluation of Pending Virtual Interrupts".
    """
    m[s.VIRTUAL_PENDING] = 0
    if a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & b.INTERRUPT_WINDOW_EXITING:
        return
    requested = a[m[s.VMCS] + v.GUEST_INTERRUPT_STATUS] & 0xFF
    if requested >> 4 > (word(m, a, PPR) >> 4) & 15:
        m[s.VIRTUAL_PENDING] = requested + 1
        m[s.PENDING] = 1
        m[s.LIMIT] = 0


@kernel
def begin_virtual(m: Record, a: Arena) -> None:
    """What VM entry does with virtual-interrupt delivery, or with a TPR that already is below its threshold.

    SDM: "Updating Non-Register State"; "PPR Virtualization"; "VM Exits Induced by the TPR Threshold".
    """
    m[s.VIRTUAL_PENDING] = 0
    m[s.APIC_WRITTEN] = 0
    controls = secondary_controls(m, a)
    if controls & b.VIRTUAL_INTERRUPT_DELIVERY:
        update_priority(m, a)
        evaluate_virtual(m, a)
    elif controls & b.VIRTUALIZE_APIC_ACCESSES and a[m[s.VMCS] + v.PRIMARY_PROC_CONTROLS] & b.USE_TPR_SHADOW:
        if after_tpr(m, a):
            m[s.APIC_WRITTEN] = BY_ENTRY


@kernel
def after_tpr(m: Record, a: Arena) -> bool:
    """TPR virtualization: True if it exits.

    SDM: "TPR Virtualization".
    """
    if secondary_controls(m, a) & b.VIRTUAL_INTERRUPT_DELIVERY:
        update_priority(m, a)
        evaluate_virtual(m, a)
        return False
    return (word(m, a, TPR) >> 4) & 15 < a[m[s.VMCS] + v.TPR_THRESHOLD] & 15


@kernel
def end_of_interrupt(m: Record, a: Arena) -> int:
    """EOI virtualization: -1, or the vector whose EOI exits.

    SDM: "EOI Virtualization".
    """
    at = m[s.VMCS] + v.GUEST_INTERRUPT_STATUS
    vector = (a[at] >> 8) & 0xFF
    place = ISR + 16 * (vector >> 5)
    set_word(m, a, place, word(m, a, place) & ~(1 << (vector & 31)))
    a[at] = (a[at] & 0xFF) | highest_vector(m, a, ISR) << 8
    update_priority(m, a)
    if (a[m[s.VMCS] + v.EOI_EXIT_BITMAP_0 + (vector >> 6)] >> (vector & 63)) & 1:
        return vector
    evaluate_virtual(m, a)
    return -1


@kernel
def self_interrupt(m: Record, a: Arena, vector: int) -> None:
    """Self-IPI virtualization.

    SDM: "Self-IPI Virtualization".
    """
    place = IRR + 16 * (vector >> 5)
    set_word(m, a, place, word(m, a, place) | 1 << (vector & 31))
    at = m[s.VMCS] + v.GUEST_INTERRUPT_STATUS
    a[at] = (a[at] & 0xFF00) | max(a[at] & 0xFF, vector)
    evaluate_virtual(m, a)


@kernel
def emulate_write(m: Record, a: Arena, t: Tags) -> bool:
    """APIC-write emulation after the instruction: True if it exited.

    SDM: "APIC-Write Emulation"; "APIC-Write VM Exits".
    """
    offset = m[s.APIC_WRITTEN] & ~1
    m[s.APIC_WRITTEN] = 0
    delivery = secondary_controls(m, a) & b.VIRTUAL_INTERRUPT_DELIVERY != 0
    if offset == TPR or offset == BY_ENTRY:
        if offset == TPR:
            set_word(m, a, TPR, word(m, a, TPR) & 0xFF)
        if after_tpr(m, a):
            vm_exit(m, a, x.TPR_BELOW_THRESHOLD, 0, 0)
            return True
        return False
    if offset == EOI and delivery:
        set_word(m, a, EOI, 0)
        vector = end_of_interrupt(m, a)
        if vector >= 0:
            vm_exit(m, a, x.EOI_INDUCED, vector, 0)
            return True
        return False
    if offset == ICR_HIGH:
        set_word(m, a, ICR_HIGH, word(m, a, ICR_HIGH) & 0xFF000000)
        return False
    if offset == ICR_LOW and delivery:
        command = word(m, a, ICR_LOW)
        if command & NOT_SELF_IPI == 0 and command & SHORTHAND == SELF and command & 0xF0:
            self_interrupt(m, a, command & 0xFF)
            return False
    if offset == ICR_LOW and tertiary_controls(m, a) & b.IPI_VIRTUALIZATION:
        command = word(m, a, ICR_LOW)
        wide = secondary_controls(m, a) & b.VIRTUALIZE_X2APIC_MODE
        target = word(m, a, ICR_LOW + 4) if wide else word(m, a, ICR_HIGH) >> 24
        if command & NOT_VIRTUAL_IPI == 0 and post_interrupt(m, a, t, command & 0xFF, target):
            return False
    if offset == SELF_IPI and word(m, a, SELF_IPI) & 0xF0:
        self_interrupt(m, a, word(m, a, SELF_IPI) & 0xFF)
        return False
    vm_exit(m, a, x.APIC_WRITE, offset, 0)
    return True


@kernel
def process_posted(m: Record, a: Arena, t: Tags) -> None:
    """Posted-interrupt processing, once the APIC has acknowledged the notification: no VM exit, nothing wakes.

    SDM: "Posted-Interrupt Processing".
    """
    descriptor = a[m[s.VMCS] + v.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS]
    if not is_memory(a, descriptor):
        write_register(m, a, REG_EOI, 0)
        return
    touch_physical(m, a, t, descriptor, WRITE)
    store(a, descriptor + NOTIFY, 8, load(a, descriptor + NOTIFY, 8) & ~OUTSTANDING)
    write_register(m, a, REG_EOI, 0)
    touch_physical(m, a, t, virtual_page(m, a) + IRR, WRITE)
    touch_physical(m, a, t, virtual_page(m, a) + IRR + 64, WRITE)
    highest = -1
    for n in range(8):
        posted = load(a, descriptor + 4 * n, 4)
        if posted:
            store(a, descriptor + 4 * n, 4, 0)
            set_word(m, a, IRR + 16 * n, word(m, a, IRR + 16 * n) | posted)
            for k in range(32):
                if (posted >> k) & 1:
                    highest = 32 * n + k
    at = m[s.VMCS] + v.GUEST_INTERRUPT_STATUS
    if highest > a[at] & 0xFF:
        a[at] = (a[at] & 0xFF00) | highest
    evaluate_virtual(m, a)


@kernel
def take_virtual(m: Record, a: Arena) -> bool:
    """Virtual-interrupt delivery: True if an interrupt was put into EVENT_…

    SDM: "Virtual-Interrupt Delivery".
    """
    if m[s.VIRTUAL_PENDING] == 0 or m[s.RFLAGS] & RF_IF == 0 or m[s.INTERRUPT_SHADOW]:
        return False
    if m[s.HALTED] and m[s.ACTIVITY_STATE] > HLT_STATE:
        return False
    vector = m[s.VIRTUAL_PENDING] - 1
    m[s.VIRTUAL_PENDING] = 0
    place = 16 * (vector >> 5)
    set_word(m, a, ISR + place, word(m, a, ISR + place) | 1 << (vector & 31))
    set_word(m, a, IRR + place, word(m, a, IRR + place) & ~(1 << (vector & 31)))
    a[m[s.VMCS] + v.GUEST_INTERRUPT_STATUS] = vector << 8 | highest_vector(m, a, IRR)
    set_word(m, a, PPR, vector & 0xF0)
    m[s.EVENT_VECTOR] = vector
    m[s.EVENT_TYPE] = EXTERNAL
    m[s.EVENT_HAS_ERROR] = 0
    m[s.EVENT_ERROR] = 0
    m[s.EVENT_LENGTH] = 0
    m[s.OP_LENGTH] = 0
    return True
