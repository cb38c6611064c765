"""Direct page tables of a paravirtual guest: its hypercalls, and the word that the hypervisor keeps of each frame.

The guest's tables hold host-physical addresses and are the processor's own. Each frame has one type at a time: a table
of one level, or memory that some entry makes writable; a count says how many entries rely on it. So no entry leads to
a frame of somebody else, and no table is writable.

A request is two words: an address or value with its kind in the low bits of the first, and a value. Requests come in
registers, or many of them in the shared page.
"""

from __future__ import annotations

from typing import Final

from vtsim.ept.spec import ADDRESS, PTE_NO_EXECUTE

# fmt: off
# --- hypercalls: number in RAX; RAX <- how many requests were carried out, by the first two --------------------------
CALL_REQUEST, CALL_MULTI = 1, 2                     # one request in RDI, RSI; RSI requests in the shared page
# those of a kernel in ring 3, by SYSCALL; RAX <- 0, or -1 if refused; RCX and R11 are lost
CALL_NOTHING: Final       = 0                       # an event that waits is delivered at the end, as of all of them;
                                                    # RDI: which system call of a host this is (see HOST_CALLS)
CALL_SET_TRAPS: Final     = 3                       # RSI rows of vector and handler at RDI
CALL_SET_CALLBACKS: Final = 4                       # handlers: of events RDI, of system calls RSI
CALL_IRET: Final          = 5                       # to where the frame on the stack says (see IRET_FRAME)
CALL_SCHEDULE: Final      = 6                       # RDI: see below
CALL_SET_TIMER: Final     = 7                       # RDI: time, as the shared page has it
CALL_UPDATE_VA: Final     = 8                       # entry of the address RDI <- RSI; translations dropped if RDX
CALL_EVENT: Final         = 9                       # RDI: see below; RAX <- port, where one is asked for
CALLS: Final = ("nothing", "request", "multi", "set_traps", "set_callbacks", "iret", "schedule", "set_timer",
                "update_va", "event", "mask")
CALL_MASK: Final          = 10                      # no upcalls from now on if RDI is 1, or again if 0
HOST_CALLS: Final = ("none", "getpid", "kill", "sigprocmask", "sigpending", "fcntl", "munmap")
HOST_VECTOR: Final = 0x80                           # INT 80H instead of SYSCALL where the kernel is a host's process
YIELD, BLOCK = 0, 1                                 # CALL_SCHEDULE: give up the CPU; wait for an event, unmasked
BIND_TIMER, SEND, UNMASK = 0, 1, 2                  # CALL_EVENT: port of the timer; make port RSI pending; unmask it
BIND_IPI: Final   = 3                               # of several vCPUs: a port by which others reach this one
OF_VCPU: Final    = 8                               # of several, SEND: from this bit of RSI on, to which one
IRET_FRAME: Final = ("RAX", "R11", "RCX", "flags", "RIP", "CS", "RFLAGS", "RSP", "SS")
IN_SYSCALL: Final = 1 << 8                          # of its flags: RCX and R11 may be lost, so SYSRET will do
# --- requests: low bits of the first word ----------------------------------------------------------------------------
UPDATE: Final     = 0                               # the entry at this host-physical address <- second word
FLUSH_PAGE: Final = 1                               # drop translations of the linear address in the second word
FLUSH_ALL: Final  = 2                               # drop all but global translations
VCPUS: Final      = 8                               # of a flush, from this bit of the first word on: other vCPUs by
                                                    # number, which drop them (all, global ones too) instead of this one
PIN: Final        = 3                               # the frame at the address in the second word is a root from now on
UNPIN: Final      = 4                               # it is not any more
LOAD: Final       = 5                               # the second word becomes CR3; its bit 63 keeps translations
LOAD_USER: Final  = 6                               # ring 3: it becomes the root of processes; 0 none
STACK: Final      = 7                               # ring 3: it becomes the kernel's stack, for entries from processes
KIND: Final       = 7
REQUESTS: Final = ("update", "flush_page", "flush_all", "pin", "unpin", "load", "load_user", "stack")
# --- the shared page ----------------------------------------------------------------------------------------------
SHARED_COUNT: Final    = 0                          # requests that wait, of no interest to the hypervisor
UPCALL_PENDING: Final  = 8                          # an unmasked event waits
UPCALL_MASK: Final     = 16                         # do not call the kernel back now: its interrupt flag, inverted
FAULT_ADDRESS: Final   = 24                         # of the last page fault
EVENTS: Final          = 32                         # a bit for each port that is pending
EVENTS_MASKED: Final   = 40                         # a bit for each port that makes no upcall
SHARED_REQUESTS: Final = 64
REQUEST_BYTES: Final   = 16
BATCH_LIMIT: Final     = 240
TIME_VERSION: Final    = 3904                       # odd while the hypervisor changes the next words
TIME_STAMP: Final      = 3912                       # TSC at TIME_BASE
TIME_BASE: Final       = 3920                       # ns
TIME_SCALE: Final      = 3928                       # ns of a cycle of the TSC, times 2**32
PORTS: Final           = 64
# --- CPUID: what the hypervisor offers -----------------------------------------------------------------------------
FEATURE_LEAF: Final = 0x40000001
DIRECT_TABLES: Final = 1 << 0                       # of its EAX
RING_3: Final        = 1 << 1                       # the kernel runs in ring 3 and makes hypercalls by SYSCALL
SHARED_EVENTS: Final = 1 << 2                       # clock, timer and events by the shared page
# in ring 3 CPUID shows the processor; UD with this immediate before it asks the hypervisor, and is #UD without one
ASK_HYPERVISOR: Final = int.from_bytes(b"vts", "little")

# --- the word of a frame: count (32 bits) | type (3) | owner, VM number plus 1, from bit 40 on ------------------------
TYPE, TYPE_MASK, OWNER = 32, 7, 40
NO_TYPE, WRITABLE = 0, 5                            # 1 to 4: a table of that level
COUNT: Final = 0xFFFF_FFFF
# what an entry may have: address, P, W, U, A, D, G, the bits that processors ignore, XD
LEGAL: Final = ADDRESS | 0xF67 | PTE_NO_EXECUTE
KERNEL_HALF: Final = 256                            # root entries from here on are the same in every root
# fmt: on
