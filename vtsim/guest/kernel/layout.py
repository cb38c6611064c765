"""Where the guest kernel keeps things: linear addresses, and the words of its per-CPU data, tasks, areas and frames.

Not modelled: address-space layout randomisation; FS base of user programs.
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Mem

# fmt: off
# --- linear addresses ---------------------------------------------------------------------------------------
DIRECT: Final       = -0x7780_0000_0000             # 0xffff888000000000: all guest-physical memory
TEXT: Final         = -0x7F00_0000                  # 0xffffffff81000000
ENTRY_AREA: Final   = -0x200_0000_0000              # 0xfffffe0000000000: what user page tables also map under KPTI;
                                                    # CPU after CPU
IDT: Final          = ENTRY_AREA
CPU_DATA: Final     = ENTRY_AREA + 0x1000           # per-CPU words from 0 on, then GDT, LDT and TSS
GDT: Final          = CPU_DATA + 0x400
LDT: Final          = CPU_DATA + 0x600
TSS: Final          = CPU_DATA + 0x800
ENTRY_STACK: Final  = ENTRY_AREA + 0x3000           # end of the stack on which KPTI takes exceptions
DOUBLE_FAULT_STACK: Final = ENTRY_AREA + 0x4000     # end
ENTRY_PAGES: Final  = 4
P2M: Final          = -0x7100_0000_0000             # paravirtual: from guest frame to host-physical address
M2P: Final          = -0x7000_0000_0000             # paravirtual: from host frame to guest-physical address
SHARED: Final       = -0x6F00_0000_0000             # paravirtual: the page shared with the hypervisor;
                                                    # those of several CPUs are as far apart as their data
USER_TEXT: Final    = 0x40_0000
REGIONS: Final      = 0x10_0000_0000
TRACES: Final       = 0x2000_0000_0000              # exclusive-or of recorded addresses, if nothing speaks against it
USER_STACK: Final   = 0x7FFF_FFFF_F000              # end
USER_STACK_PAGES: Final = 16
KERNEL_STACK_PAGES: Final = 4
GATHER_PAGES: Final = 20                            # 10,240 frames: Linux gathers at most 10,000

# of a kernel in 32-bit protected mode: user space below 3 GiB, memory mapped from there on, the rest above it
PROTECTED_DIRECT, PROTECTED_TEXT, PROTECTED_ENTRY_AREA = 0xC000_0000, 0xF900_0000, 0xFE00_0000
PROTECTED_REGIONS, PROTECTED_STACK = 0x1000_0000, 0xBFFF_F000

# --- selectors ------------------------------------------------------------------------------------------------
KERNEL_CODE, KERNEL_STACK, USER_CODE, USER_DATA, TASK_STATE = 0x10, 0x18, 0x33, 0x2B, 0x40
LOCAL_TABLE, IN_LOCAL_TABLE = 0x50, 0xC
PROTECTED_CODE: Final = 0x23                        # of ring 3, where SYSEXIT wants it

# --- per-CPU words, at GS base in the kernel --------------------------------------------------------------------
(SCRATCH, STACK_TOP, CURRENT, NEED_RESCHED, JIFFIES, ALIVE, LOADED_CR3, NEXT_TICK, USER_CR3_NOW, SWITCHES, IDLE_TASK,
 FIRST_TASK) = range(0, 96, 8)
# of a kernel with several CPUs: is it idle on a borrowed space; the task whose space is loaded; the space whose lock it
# holds or waits for; tasks of this CPU; its APIC identifier; its list of frames that are to be freed; what it asks
# others to flush; top of its entry stack; calls that it answered, and sent; by CPU, the task whose space that one is
# to flush. IPIS: interrupts of primitive `ipi`
(LAZY, LOADED_TASK, HELD, TASKS_HERE, APIC_ID, GATHER, FLUSH_START, FLUSH_PAGES, ENTRY_TOP, TLB_CALLS,
 CALLS_SENT, IPIS) = range(96, 192, 8)
ASKED: Final        = 192
CPU_LIMIT: Final    = 16
# of a kernel built with hypercalls: has it found its hypervisor; bit of the timer's event; root of the kernel alone
(BOOTED, TIMER_EVENT, KERNEL_ROOT) = range(ASKED + 8 * CPU_LIMIT, ASKED + 8 * CPU_LIMIT + 24, 8)
PAGE_LISTS: Final   = KERNEL_ROOT + 8               # with several CPUs: address of this one's lists of free pages
IPI_PORT: Final     = PAGE_LISTS + 8                # in ring 3: port by which other CPUs interrupt this one
TABLE_LOCK: Final   = IPI_PORT + 8                  # with several CPUs: where it gives back the lock of tables it has

# --- words of a task ------------------------------------------------------------------------------------------
(T_RSP, T_CR3, T_STACK_TOP, T_STATE, T_WAKE, T_NEXT, T_LOG, T_AREAS, T_AREA_COUNT, T_ROOT, T_USER_CR3, T_TABLES,
 T_CHILD, T_PARENT, T_SHARED, T_TABLES_NEXT, T_TABLES_END, T_TABLES_FIRST, T_FAULTS) = range(0, 152, 8)
# with several CPUs: the task that has the words of the address space, the next thread in it, the data of the task's CPU
(T_SPACE, T_PEER, T_CPU) = range(152, 176, 8)
(T_ROUND, T_SENT) = range(216, 232, 8)              # phases of primitive `ipi` begun, and sent to the end
# words of an address space: two tickets and who is served, for its lock and that of its upper tables; who reads
(M_TICKET, M_SERVING, M_READERS, M_TABLES_TICKET, M_TABLES_SERVING) = range(176, 216, 8)
# of what is known of a frame (struct page), with several CPUs: the lock of the last-level table that it is (ptl)
PAGE_STRUCT_BYTES, PTL_TICKET, PTL_SERVING = 64, 40, 48
# where the kernel goes on after an exception of its own, 0: nowhere; four words of a signal's action
T_FIXUP, T_ACTION = 216, 224
T_FILES: Final      = 256                           # the files of its process
RUNNABLE, SLEEPING, WAITING, ZOMBIE, DEAD, FREE, DEVICE_WAIT = range(7)
RESCHEDULE, SIGNAL_PENDING = 1, 2               # in NEED_RESCHED: what is to be done on the way out

# --- words of an area of an address space (a VMA), and of a zone of free frames -----------------------------------
(A_START, A_END, A_LEAF, A_LEVEL, A_ZONE, A_BYTES, A_FILE) = range(0, 56, 8)  # A_FILE: what is mapped, 0: no file
AREA_BYTES: Final = 64
(Z_TOP, Z_BOTTOM, Z_BALLOON, Z_TICKET, Z_SERVING) = range(0, 40, 8)   # the list's beginning to its bottom: the balloon
# of a CPU's list, as far behind the CPU's lists as the zone is behind the first: how many pages, the place after the
# page that was put last, a lock, where the places are and the mask of their numbers, pages that move at once, too many
(P_COUNT, P_HEAD, P_TICKET, P_SERVING, P_PLACES, P_MASK, P_BATCH, P_HIGH) = range(0, 64, 8)

# --- words of a task's line in the log page: how it ended -----------------------------------------------------------
# Children have one line, one after another: why the last was killed stays there, and how many were. L_LOOT: attacks.
LOG_LINE: Final = range(0, 64, 8)
(L_REASON, L_VECTOR, L_ERROR, L_RIP, L_CR2, L_LOOT, L_CAUSE, L_KILLED) = LOG_LINE
LOG_BYTES: Final = 64
PANIC: Final = "guest panic"
RUNNING, ENDED, KILLED, NO_MEMORY, NO_INTERFACE, REFUSED, DEVICE_GONE = range(7)
REASONS: Final = (
    "running", "ended", "killed by an exception", "killed: the guest's memory is used up",
    f"{PANIC}: hypervisor interface vtsim-direct not found (CPUID leaves 40000000H and 40000001H)",
    "stopped: the hypervisor refused a request of the paravirtual kernel",
    "stopped: its device answered no invalidation and was given up",
)

# --- the frame on the kernel stack: general registers, vector, error code, what the CPU pushed -----------------------
SAVED: Final = tuple(r for r in range(16) if r != s.RSP)
AT: Final = {register: 8 * n for n, register in enumerate(SAVED)}
(F_VECTOR, F_ERROR, F_RIP, F_CS, F_RFLAGS, F_RSP, F_SS) = range(120, 176, 8)
FRAME_BYTES: Final = 176
PROTECTED_FRAME_BYTES: Final = 152                  # where vector, error code and what the CPU pushed have 4 bytes each
CALLEE: Final = (s.RBX, s.RBP, s.R12, s.R13, s.R14, s.R15)
SWITCH_BYTES: Final = 8 * len(CALLEE)
CARRIERS: Final = tuple(r for r in SAVED if r not in (s.RSI, s.RDI, s.R14, s.R15))  # 11: half a frame at a time

# --- vectors, system calls ---------------------------------------------------------------------------------------
PAGE_FAULT_VECTOR, TIMER_VECTOR, CALL_VECTOR, IPI_VECTOR = 14, 0xEC, 0xFB, 0xFA
FILE_VECTOR: Final = 0x61                       # of the device that has the mapped file
NOTHING_VECTOR: Final = 0x80                    # of a kernel that tries sensitive instructions: its handler returns
WITH_ERROR: Final = (8, 10, 11, 12, 13, 14, 17, 21)
# Numbers above 511 belong to the primitives: every number of the primitive `syscall` is free.
USER_CALLS: Final = 512
(CALL_YIELD, CALL_EXIT, CALL_FORK, CALL_WAIT, CALL_UNMAP, CALL_SLEEP, CALL_PROTECT, CALL_EXEC,
 CALL_BALLOON, CALL_SIGACTION, CALL_KILL, CALL_SIGRETURN, CALL_STAT, CALL_OPEN, CALL_CLOSE, CALL_READ, CALL_WRITE,
 CALL_SELECT, CALL_MAP_FILE, CALL_UNMAP_FILE, CALL_MSYNC, CALL_SYNC) = range(512, 534)
FIRST_LOOP: Final = 534
SIGUSR1: Final = 10
NOFLUSH: Final = 1 << 63
NATIVE_LOAD, NATIVE_STORE = 0x4A01, 0x4A02      # native methods of the program that runs a guest, by VMCALL
PAGE: Final = 4096
USER_HALF: Final = 0x1800                       # KPTI: the user root is the next page, its PCID has bit 11 set
# fmt: on


@frozen(kw_only=True)
class Places:
    """Linear addresses in a kind of kernel: all memory, its text, the entry area; the first region, the stack's end."""

    direct: int
    text: int
    entry_area: int
    regions: int
    user_stack: int

    def entry(self, address: int) -> int:
        """Where that stands which stands at an address of ENTRY_AREA in a 64-bit kernel."""
        return address - ENTRY_AREA + self.entry_area


LONG: Final = Places(direct=DIRECT, text=TEXT, entry_area=ENTRY_AREA, regions=REGIONS, user_stack=USER_STACK)
PROTECTED: Final = Places(
    direct=PROTECTED_DIRECT, text=PROTECTED_TEXT, entry_area=PROTECTED_ENTRY_AREA, regions=PROTECTED_REGIONS,
    user_stack=PROTECTED_STACK,
)  # fmt: skip


def cpu_word(offset: int) -> Mem:
    """A per-CPU word."""
    return Mem(displacement=offset, segment=2)
