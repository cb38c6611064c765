"""The hooks of shadow paging. Their pool of shadow pages is at RDI; what they change leaves word in RDX.

SDM: "Memory Virtualization".
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import accounts as k
from vtsim.cpu import slots as s
from vtsim.cpu.codes import HARDWARE_EXCEPTION, MODEL_FAULT, PF, VALID
from vtsim.cpu.kernels.agile import ept_written, map_switch, note_write, scan_nested
from vtsim.cpu.kernels.shadow_map import find_device, map_device, map_shadow
from vtsim.cpu.kernels.shadow_pages import evict, free_given_up
from vtsim.cpu.kernels.shadow_pool import begin_shadow
from vtsim.cpu.kernels.shadow_roots import load_root
from vtsim.cpu.kernels.shadow_sync import (
    forget_frame,
    invalidate_address,
    invalidate_contexts,
    protect_unsync,
    synchronize,
    synchronize_all,
    table_written,
    unprotect,
    zap_all,
)
from vtsim.cpu.kernels.shadow_use import find_root, follow_cr3
from vtsim.cpu.kernels.shadow_walk import walk_guest
from vtsim.ept.shadow import MODE_AGILE
from vtsim.vmcs import events as ev
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h

PAGE_FAULT: int = VALID | HARDWARE_EXCEPTION << ev.TYPE_SHIFT | PF

FIRST_SHADOW_HOOK: Final = 16
# fmt: off
(SHADOW_WALK, SHADOW_MAP, SHADOW_MAP_DEVICE, SHADOW_FIND_DEVICE, SHADOW_WRITE, SHADOW_UNPROTECT, SHADOW_UNMAP,
 SHADOW_LOAD_ROOT, SHADOW_SYNC, SHADOW_SYNC_ALL, SHADOW_INVLPG, SHADOW_ZAP_ALL, AGILE_NOTE, AGILE_WRITE,
 AGILE_SCAN, SHADOW_INVPCID) = range(16, 32)
FIRST_SHARED_SHADOW_HOOK: Final = 40
(SHADOW_ROOM, SHADOW_FREE, SHADOW_PROTECT) = range(40, 43)
SHADOW_HOOKS: Final = (
    # name                 registers beside the pool RDI, a vCPU's where they share it; RDX <- bits FLUSH, NO_ROOT and
    #                      others of what is left to do, from bits HELD and FILLED on entries held against the
    #                      guest's, and filled beside
    ("SHADOW_WALK",        "address RSI, error code and RFLAGS.AC RDX; RAX <- 0, or 1 if the guest's tables refuse the "
                           "access; RDX <- error code of that fault; RCX <- guest-physical address"),
    ("SHADOW_MAP",         "host entry RBX of level RCX, slot R14, its flags R10; RAX <- 0, or 1 if the access is a "
                           "write to a table, or 2 if other vCPUs must drop translations before all is walked again"),
    ("SHADOW_MAP_DEVICE",  "the frame of the last walk is a device's"),
    ("SHADOW_FIND_DEVICE", "address RSI; RAX <- guest-physical address of the device, 0 if there is none"),
    ("SHADOW_WRITE",       "guest-physical address RSI, bytes RCX: the guest's table was written there"),
    ("SHADOW_UNPROTECT",   "guest-physical address RSI: its frame is no table any more; RAX <- shadow pages zapped"),
    ("SHADOW_UNMAP",       "guest-physical address RSI: its frame is mapped nowhere any more"),
    ("SHADOW_LOAD_ROOT",   "CR3 RSI, paging mode RBX, RCX: are PDPTEs to be loaded; RAX <- host-physical address of "
                           "the root, 0 if a PDPTE is wrong and nothing was done"),
    ("SHADOW_SYNC",        "synchronize what is below the root"),
    ("SHADOW_SYNC_ALL",    "synchronize everything"),
    ("SHADOW_INVLPG",      "address RSI"),
    ("SHADOW_ZAP_ALL",     "give up all shadow pages"),
    ("AGILE_NOTE",         "guest-physical address RSI: the guest's table was written; it is nested from the RCX-th "
                           "write in an interval on; RAX <- does that begin now?"),
    ("AGILE_WRITE",        "guest-physical address RSI, exit qualification RDX of a write that EPT refused; RAX <- 0 "
                           "if it may be made now, 1 if it is one to a table"),
    ("AGILE_SCAN",         "an interval is over; RAX <- tables that are shadowed again"),
    ("SHADOW_INVPCID",     "type RCX, PCID RBX, address RSI of an INVPCID; RAX <- 1 if it names a root that was loaded "
                           "lately, else 0"),
    ("SHADOW_ROOM",        "where vCPUs share the pool: give up shadow pages if few are free"),
    ("SHADOW_FREE",        "all vCPUs have dropped translations: shadow pages that were given up are free"),
    ("SHADOW_PROTECT",     "leaf tables out of sync are read-only: below the root for RCX 0, for 1 all"),
)
# fmt: on


@kernel
def count_for_exit(m: Record, a: Arena, counter: int) -> None:
    """Count what became of a page fault, for the guest of the current VMCS, if it is one that has exited last."""
    at = m[s.VMCS]
    if at and a[at + v.EXIT_INTERRUPTION_INFORMATION] & (VALID | ev.TYPE | ev.VECTOR) == PAGE_FAULT:
        a[a[at + h.V_OWNER] + counter] += 1


@kernel
def shadow_hook(m: Record, a: Arena, t: Tags, number: int) -> int:
    """Run a hook of shadow paging: 0, or a fault."""
    begin_shadow(m, a, t)
    follow_cr3(m, a, t)
    if m[s.SHADOW_SEVERAL]:
        find_root(m, a, t)
    fault = 0
    if number == SHADOW_WALK:
        address = m[s.GPR + s.RSI]
        fault = walk_guest(m, a, t)
        if fault == 0 and m[s.GPR + s.RAX] and m[s.VMCS] and a[m[s.VMCS] + v.EXIT_QUALIFICATION] == address:
            count_for_exit(m, a, k.TRUE_PAGE_FAULTS)
        return fault
    if number == SHADOW_MAP:
        if m[s.SHADOW_MODE] & MODE_AGILE == 0 or not map_switch(m, a, t):
            fault = map_shadow(m, a, t)
        if fault == 0 and m[s.GPR + s.RAX] == 0:
            count_for_exit(m, a, k.HIDDEN_PAGE_FAULTS)
    elif number == SHADOW_MAP_DEVICE:
        fault = map_device(m, a, t)
    elif number == SHADOW_FIND_DEVICE:
        fault = find_device(m, a, t)
    elif number == SHADOW_WRITE:
        fault = table_written(m, a, t)
    elif number == SHADOW_UNPROTECT:
        fault = unprotect(m, a, t)
        if fault == 0:
            count_for_exit(m, a, k.UNPROTECTING_PAGE_FAULTS)
    elif number == SHADOW_UNMAP:
        fault = forget_frame(m, a, t)
    elif number == SHADOW_LOAD_ROOT:
        fault = load_root(m, a, t)
    elif number == SHADOW_SYNC:
        fault = synchronize(m, a, t)
    elif number == SHADOW_SYNC_ALL:
        fault = synchronize_all(m, a, t)
    elif number == SHADOW_INVLPG:
        fault = invalidate_address(m, a, t)
    elif number == SHADOW_ZAP_ALL:
        fault = zap_all(m, a, t)
    elif number == AGILE_NOTE:
        fault = note_write(m, a, t)
    elif number == AGILE_WRITE:
        fault = ept_written(m, a, t)
    elif number == AGILE_SCAN:
        fault = scan_nested(m, a, t)
    elif number == SHADOW_INVPCID:
        fault = invalidate_contexts(m, a, t)
    elif number == SHADOW_ROOM:
        fault = evict(m, a, t)
    elif number == SHADOW_FREE:
        fault = free_given_up(m, a, t)
    elif number == SHADOW_PROTECT:
        fault = protect_unsync(m, a, t)
    else:
        m[s.STOP] = MODEL_FAULT
    m[s.GPR + s.RDX] = m[s.SHADOW_FLAGS]
    return fault
