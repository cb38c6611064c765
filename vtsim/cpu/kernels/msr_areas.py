"""MSR areas: lists in memory of MSRs that VM transitions load and store.

SDM: "Loading MSRs"; "Saving MSRs"; "VMX Aborts".
Not modelled: the recommended maximum number of entries, beyond which processors may do as they like.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import is_memory, load_word, store_word
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.msr_storage import TIME_STAMP_COUNTER, msr_slot, store_msr, time_stamp
from vtsim.cpu.kernels.msr_values import EFER, refuses, unloadable, unsavable
from vtsim.vmcs import state as h
from vtsim.vmcs.kernels.values import EFER_LMA

# fmt: off
ENTRY_BYTES: int = 16
# VMX-abort indicators
ABORT_SAVING_MSRS, ABORT_HOST_PDPTES, ABORT_CORRUPTED_VMCS, ABORT_LOADING_MSRS = 1, 2, 3, 4
LOW_32: int = 0xFFFFFFFF
# fmt: on


@kernel
def load_msr_area(m: Record, a: Arena, address: int, count: int) -> int:
    """Load the MSRs of an area in order: 0, or the number of the entry that cannot be loaded, from 1.

    SDM: "Loading MSRs".
    """
    for n in range(count):
        place = address + n * ENTRY_BYTES
        if not is_memory(a, place):
            return n + 1
        head = load_word(a, place)
        index = head & LOW_32
        value = load_word(a, place + 8)
        if (head >> 32) & LOW_32 or unloadable(index) or refuses(m, a, index, value):
            return n + 1
        if index == EFER:
            value = (value & ~EFER_LMA) | (m[s.EFER] & EFER_LMA)
        store_msr(m, a, index, value)
    return 0


@kernel
def store_msr_area(m: Record, a: Arena, address: int, count: int) -> int:
    """Store the MSRs that an area names behind their numbers: 0, or the number of the entry that has none, from 1.

    SDM: "Saving MSRs".
    """
    for n in range(count):
        place = address + n * ENTRY_BYTES
        if not is_memory(a, place):
            return n + 1
        head = load_word(a, place)
        index = head & LOW_32
        slot = msr_slot(a, index)
        if (head >> 32) & LOW_32 or unsavable(index) or (slot < 0 and index != TIME_STAMP_COUNTER):
            return n + 1
        store_word(a, place + 8, time_stamp(m, a) if slot < 0 else m[slot])
    return 0


@kernel
def vmx_abort(m: Record, a: Arena, indicator: int) -> None:
    """Write a VMX-abort indicator into the header of the current VMCS. The caller shuts the CPU down.

    SDM: "VMX Aborts"; "Format of the VMCS Region".
    """
    header = m[s.VMCS] + h.V_REVISION
    a[header] = (a[header] & LOW_32) | indicator << h.ABORT_SHIFT
