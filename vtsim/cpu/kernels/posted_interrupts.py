"""Posted-interrupt descriptors: one posts into them, the notification empties them into the virtual APIC.

SDM: "Posted-Interrupt Processing"; "IPI Virtualization".
Not modelled: user interrupts, whose SENDUIPI can be virtualized as well; cycles of the processing itself beyond its
accesses to memory.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import is_memory, load, store
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.access import touch_physical
from vtsim.cpu.kernels.rights import READ, WRITE
from vtsim.vmcs import bits as b
from vtsim.vmcs import slots as v

# fmt: off
# the descriptor: 256 request bits, then a word of notification
NOTIFY: int = 32                           # its offset in bytes
OUTSTANDING, SUPPRESSED = 1 << 0, 1 << 1
NOTIFICATION_VECTOR, DESTINATION = 16, 32  # the places of two of its parts
X2APIC: int = 1 << 10                      # of IA32_APIC_BASE
POINTER_VALID: int = 1                     # in bits 5:0 of an entry of the PID-pointer table
ADDRESSES_BEYOND: int = -(1 << 52)
# fmt: on


@kernel
def is_notification(m: Record, a: Arena) -> bool:
    """Is the external interrupt that is about to be taken the posted-interrupt notification of the guest?

    SDM: "Posted-Interrupt Processing".
    """
    at = m[s.VMCS]
    if a[at + v.PIN_CONTROLS] & b.PROCESS_POSTED_INTERRUPTS == 0:
        return False
    return m[s.APIC_PENDING] - 1 == a[at + v.POSTED_INTERRUPT_NOTIFICATION_VECTOR] & 0xFF


@kernel
def post_interrupt(m: Record, a: Arena, t: Tags, vector: int, target: int) -> bool:
    """IPI virtualization: post a vector for the virtual APIC `target` and notify; False where the write exits.

    SDM: "IPI Virtualization".
    """
    at = m[s.VMCS]
    if vector < 16 or target > a[at + v.LAST_PID_POINTER_INDEX]:
        return False
    entry = a[at + v.PID_POINTER_TABLE_ADDRESS] + 8 * target
    if not is_memory(a, entry):
        return False
    touch_physical(m, a, t, entry, READ)
    pointer = load(a, entry, 8)
    if pointer & (m[s.RESERVED_BITS] | ADDRESSES_BEYOND) or pointer & 0x3F != POINTER_VALID:
        return False
    descriptor = pointer & ~0x3F
    if not is_memory(a, descriptor):
        return False
    touch_physical(m, a, t, descriptor, WRITE)
    word = descriptor + (vector >> 6) * 8
    store(a, word, 8, load(a, word, 8) | 1 << (vector & 63))
    notify = load(a, descriptor + NOTIFY, 8)
    if notify & (OUTSTANDING | SUPPRESSED) == 0:
        store(a, descriptor + NOTIFY, 8, notify | OUTSTANDING)
        destination = (notify >> DESTINATION) & 0xFFFFFFFF
        if m[s.MSR_APIC_BASE] & X2APIC == 0:
            destination = (destination >> 8) & 0xFF
        m[s.PENDING_DRAIN] = destination << 32 | 1 << 14 | (notify >> NOTIFICATION_VECTOR) & 0xFF
        m[s.LIMIT] = 0
    return True
