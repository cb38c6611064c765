"""Where a hypervisor's data stands: linear maps of the host, and the fields of its structures.

A vCPU is a thread: its page holds the thread's kernel stack below the structure, so that HOST_RSP is both. A
physical CPU has a page that the GS base points to.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.memory import PAGE_BYTES
from vtsim.base.words import byte_offsets

# fmt: off
# --- linear addresses of the host --------------------------------------------------------------------------
HOST_DIRECT: Final  = 0xFFFF_8880_0000_0000   # all of physical memory
HOST_TEXT: Final    = 0xFFFF_FFFF_8100_0000   # code of kernel and hypervisor
USER_TEXT: Final    = 0x0000_0000_0040_0000   # the user-space device process
USER_RUN: Final     = 0x0000_0000_0060_0000   # the page it shares with the hypervisor
USER_DATA: Final    = 0x0000_0000_0070_0000   # its device tables
USER_STACK: Final   = 0x0000_0000_0080_0000   # grows down from here
USER_RAM: Final     = 0x0000_7F00_0000_0000   # guest memory: guest-physical address 0

HOST_DISK: Final    = 0xFFFF_C900_0000_0000   # registers of the disk
HOST_UNIT: Final    = 0xFFFF_C900_0010_0000   # registers of the remapping unit
HOST_SERVER: Final  = 0xFFFF_C900_0020_0000   # where a server is told of requests of a VM

# --- CR3 of user space under page-table isolation ----------------------------------------------------------
USER_HALF: Final    = 1 << 12                 # the root is the frame behind the kernel's
USER_PCID: Final    = 1 << 11
NOFLUSH: Final      = 1 << 63                 # of MOV to CR3: translations of the PCID stay
HOST_CR4: Final     = 1 << 5 | 1 << 7 | 1 << 13        # PAE, PGE, VMXE
CR4_PCIDE: Final    = 1 << 17

# --- selectors of the host ---------------------------------------------------------------------------------
KERNEL_CODE, KERNEL_DATA, USER_DATA_SELECTOR, USER_CODE, TASK = 0x10, 0x18, 0x2B, 0x33, 0x40
STAR: Final = KERNEL_CODE << 32 | 0x23 << 48
TIMER_VECTOR: Final = 0xEC                    # local timer of the host
WIRE_VECTOR: Final = 0xF3                     # an outside device interrupts a guest
POSTED_VECTOR: Final = 0xF2                   # notification of posted interrupts
KICK_VECTOR: Final = 0xFD                     # another CPU wants something of a vCPU here

DISK_VECTOR: Final = 0xE1                     # the disk has done something
UNIT_FRAME: Final = 0xFED90                   # of the registers of the remapping unit, real or virtual
DEVICE_VECTOR: Final = 0x50                   # the first device that is assigned to a VM, then upwards

# --- disk: a queue of commands and, a page behind, one of what is done; an entry is command, frame, place, vCPU ------
DISK_FRAME: Final = 0xFE000                   # of its registers
SERVER_FRAME: Final = 0xFE001                  # of the servers of VMs' files: a word each
DISK_READ, DISK_WRITE = 1, 2
DISK_ENTRIES, DISK_ENTRY_BYTES, DISK_DONE_TAIL = 64, 32, 4088

# --- vCPU: byte offsets from the address that HOST_RSP holds -------------------------------------------------
STACK_BYTES: Final = 2048
VCPU_WORDS: Final = (
    # field             words  meaning
    ("REGISTERS",        16, "general registers by number; RSP only while an instruction is emulated"),
    ("LAUNCHED",          1, "has the VMCS been launched?"),
    ("VMCS_POINTER",      1, "host-physical address of the VMCS"),
    ("REQUEST",           1, "what has to be seen to before the next VM entry: see the requests"),
    ("STATE",             1, "see the states below"),
    ("GUEST_CR2",         1, "CR2 of the guest"),
    ("HOST_ROOT",         1, "CR3 of the thread's process"),
    ("PENDING",           1, "event to inject, as VM-entry interruption information; 0 none"),
    ("PENDING_ERROR",     1, "its error code"),
    ("PENDING_LENGTH",    1, "its instruction length"),
    ("GUEST_LOADED",      1, "are the guest's MSRs in the CPU?"),
    ("GUEST_MSRS",        8, "guest values of the switched MSRs, in their table's order"),
    ("IRR",               4, "virtual local APIC: requested vectors"),
    ("ISR",               4, "virtual local APIC: vectors in service"),
    ("APIC_PAGE",         1, "linear address of the virtual-APIC page"),
    ("DEADLINE",          1, "TSC of the host at which the virtual timer fires; 0 never"),
    ("TIMER_LVT",         1, "local vector table entry of the virtual timer"),
    ("TIMER_INITIAL",     1, "its initial count"),
    ("TIMER_DIVIDE",      1, "its divide configuration"),
    ("TIMER_PERIOD",      1, "its period in cycles; 0 one-shot"),
    ("TSC_DEADLINE",      1, "IA32_TSC_DEADLINE of the guest"),
    ("TSC_ADJUST",        1, "IA32_TSC_ADJUST of the guest"),
    ("TSC_OFFSET",        1, "guest TSC less host TSC"),
    ("CPUID_WORDS",       1, "words of a CPUID entry"),
    ("CPUID_ENTRIES",     1, "how many"),
    ("CPUID_TABLE",       1, "linear address of the entries"),
    ("MSR_TABLE",         1, "linear address of the MSRs that are plain storage"),
    ("MSR_ENTRIES",       1, "how many"),
    ("PORTS",             1, "linear address of the ports that the hypervisor itself answers"),
    ("PORT_ENTRIES",      1, "how many"),
    ("EVENTS",            1, "linear address of the device memory whose writes only raise an event for somebody"),
    ("EVENT_ENTRIES",     1, "how many"),
    ("SERVER",            1, "linear address where the server of the VM's file is told of requests"),
    ("EPT_ROOT",          1, "host-physical address of the EPT PML4 table"),
    ("EPT_TOP",           1, "host-physical address of the table that the EPTP names: the same, or the PML5 table"),
    ("EPT_ALLOCATOR",     2, "frames for EPT tables: next, end"),
    ("EPT_FIRST",         1, "first frame of that allocator"),
    ("BACKING_ALLOCATOR", 2, "frames for page tables of the process: next, end"),
    ("SLOTS",             1, "linear address of the memory slots"),
    ("SLOT_ENTRIES",      1, "how many"),
    ("DEATH",             1, "why the VM ended: 0 it did not, else exit reason + 1"),
    ("DEATH_DETAIL",      1, "exit qualification, or what else says more"),
    ("PRIMARY",           1, "primary processor-based controls as last written"),
    ("DR_SWITCHED",       1, "does the guest own the debug registers until its next exit?"),
    ("RETRY_RIP",         1, "instruction that was last retried instead of emulated"),
    ("RETRY_GPA",         1, "its operand"),
    ("RUN_PAGE",          1, "linear address of the page shared with user space"),
    ("COMPLETION",        1, "what to do when user space returns: see the completions"),
    ("USER_RIP",          1, "where the thread goes on in user space"),
    ("USER_RFLAGS",       1, "its flags there"),
    ("USER_RSP",          1, "its stack there"),
    ("DESCRIPTOR",        2, "of the INVEPT or INVVPID in progress"),
    ("DECODED",           3, "the instruction being emulated: its register, bytes of its operand, where it ends"),
    ("UNTIMED",           1, "virtual timers are not armed: a recording says when they fire"),
    ("IO_APIC_PAGE",      1, "linear address of the I/O APIC's registers"),
    ("EXITS",             1, "VM exits, as the hypervisor's own statistics count them"),
    ("LAST_TSC",          2, "TSC at the last exit, low and high half"),
    ("XCR0",              1, "XCR0 of the guest"),
    ("SHADOW_CR3",        1, "CR3 that the guest believes in, under shadow paging"),
    ("CR3_PAIRS",         8, "agile paging: pairs of such a CR3 and its shadow root, for the processor"),
    ("SHADOW",            1, "linear address of the pool of shadow pages"),
    ("NUMBER",            1, "which VM of the scenario"),
    ("LOGGING",           1, "are writes to the VM's memory logged?"),
    ("LOG_AT",            1, "TSC at which logging starts or the log is collected; 0 never"),
    ("LOG_DUE",           1, "that time has come"),
    ("DIRTY_BITMAP",      1, "linear address of a bit for every guest frame that was written"),
    ("DIRTY_WORDS",       1, "its 64-bit words"),
    ("DIRTY_PAGES",       1, "pages found written, over all collections"),
    ("DIRTY_ROUNDS",      1, "collections"),
    ("PML_PAGE",          1, "linear address of the page-modification log"),
    ("ZONE",              1, "linear address of the zone that guest memory comes from"),
    ("OTHER_ZONE",        1, "of the zone of the other node: the same where there is one node"),
    ("LARGE_PAGES",       1, "2 MiB pages of the host that were given to the VM"),
    ("LARGE_MISSING",     1, "times that none was free, so that 4 KiB pages were given"),
    ("MEMORY_END",        1, "guest-physical address behind the last frame of RAM"),
    ("COLLAPSE_AT",       1, "TSC at which the daemon that makes large pages goes on; 0 never"),
    ("COLLAPSE_DUE",      1, "that time has come"),
    ("COLLAPSE_CURSOR",   1, "guest-physical address where it goes on"),
    ("REGIONS_COLLAPSED", 1, "2 MiB of small pages of the host that were copied into a large one"),
    ("REGIONS_RECOVERED", 1, "2 MiB that EPT had mapped small for logging and may map large again"),
    ("LOG_END",           1, "TSC from which on writes are not logged any more; 0 never"),
    ("RESIDENT",          1, "frames that the VM has, those being written to the disk included"),
    ("IN_FLIGHT",         1, "pages being written to the disk"),
    ("SHARE",             1, "frames that it may have"),
    ("SWAP_HAND",         1, "guest-physical address that reclaim looks at next"),
    ("SWAP_MARKS",        1, "linear address of a word for every guest frame: has it a copy on the disk?"),
    ("DISK_FIRST",        1, "place on the disk of its first frame"),
    ("SWAP_DUE",          1, "what it waited for has come, or may have"),
    ("WAIT_FRAME",        1, "frame that a page is being read into; 0 none"),
    ("WAIT_ADDRESS",      1, "guest-physical address whose violation waits; -1 none does"),
    ("WAIT_QUALIFICATION", 1, "its exit qualification"),
    ("SWAP_WAITS",        1, "times that the vCPU waited for a frame to be written"),
    ("PAGES_SWAPPED_IN",  1, "pages read from the disk"),
    ("PAGES_SWAPPED_OUT", 1, "pages written to the disk"),
    ("PAGES_DROPPED",     1, "pages given up that the disk had as they were"),
    ("PAGES_BALLOONED",   1, "frames that the guest gave to the hypervisor"),
    ("PAGES_DEFLATED",    1, "frames that it took back"),
    ("SHARE_AT",          1, "TSC at which the scanner of page sharing goes on; 0 never"),
    ("SHARE_DUE",         1, "that time has come"),
    ("SHARE_CURSOR",      1, "guest-physical address where it goes on"),
    ("SHARE_MARKS",       1, "linear address of what it saw of every frame a round ago"),
    ("SHARE_ROUNDS",      1, "times that it has looked at all memory"),
    ("PAGES_PUBLISHED",   1, "pages of the VM that became shared frames"),
    ("PAGES_MERGED",      1, "pages of the VM that gave way to a shared frame with the same contents"),
    ("PAGES_UNSHARED",    1, "pages of the VM that were copied because a shared frame was written"),
    ("OTHER_NODE",        1, "pages that came from another node than they should, because that had none"),
    ("CACHED_LISTS",      1, "objects in a cache of those that a page fault may need: lists of the reverse map"),
    ("CACHED_PAGES",      1, "pages for tables"),
    ("CACHED_HEADERS",    1, "and what is known of them"),
    ("NOTIFIER_SEQUENCE", 1, "times that the host has changed mappings of the process"),
    ("NOTIFIER_COUNT",    1, "changes that go on"),
    ("TABLES_LEFT",       1, "tables that the VM may still have"),
    ("AGILE_AT",          1, "TSC at which an interval of agile paging ends; 0 never"),
    ("SHARED_PAGE",       1, "linear address of the page that a paravirtual guest shares"),
    ("KERNEL_ROOT",       1, "host-physical address of a root whose kernel half is that of all direct roots"),
    ("REFUSALS",          1, "requests of a paravirtual guest that were refused"),
    ("EVENT_VECTOR",      1, "vector by which the guest is told of events in the shared page; 0 none"),
    ("TIMER_BIT",         1, "bit of its timer's event; 0 where the timer is the local APIC's"),
    ("EVENTS_SENT",       1, "events that became pending in the shared page"),
    ("UPCALLS",           1, "times that the guest was told of them"),
    ("CLUSTER_RIP",       1, "where the guest goes on after what an exit cluster has executed"),
    ("CLUSTER_BYTES",     1, "where the host sees those bytes; 0 outside of clusters"),
    ("CLUSTER_LENGTH",    1, "bytes of the instruction being executed"),
    ("CLUSTER_LEFT",      1, "instructions to the next one that exits, itself included"),
    ("CLUSTERED_EXITS",   1, "exits that clusters have saved"),
    ("CLUSTER_INSTRUCTIONS", 1, "instructions that they executed in the guest's place"),
    ("SEEN_STORES",       8, "addresses of stores that hit tables of the guest, by a hash"),
    ("CLUSTERS",         32, "by a hash of the address: address, where its bytes are, instructions to one that exits"),
    ("VM",                1, "address of the structure of the VM's first vCPU, whose words about the VM all use"),
    ("PEER",              1, "address of the structure of the VM's next vCPU, in a ring"),
    ("INDEX",             1, "which vCPU of its VM: its APIC identifier"),
    ("CPU",               1, "APIC identifier of the physical CPU that it is pinned to"),
    ("TABLES_TICKET",     1, "lock of the VM's tables: next ticket"),
    ("TABLES_SERVING",    1, "and whose turn it is"),
    ("IN_GUEST",          1, "is it in its guest, or about to enter?"),
    ("ASKED",             1, "requests of other vCPUs that it has not seen to"),
    ("ASKED_FLUSH",       1, "one was to drop translations, because EPT changed"),
    ("ASKED_ROOT",        1, "one was to load its shadow root, because the one that it has was given up"),
    ("ASKED_LOG",         1, "one was to empty its page-modification log, and to log as the VM does from now on"),
    ("ASKED_EVENTS",      1, "one was to look at its interrupts"),
    ("ASKED_END",         1, "one was to end: why, as in DEATH"),
    ("REMOTE_FLUSHES",    1, "times that it dropped translations because another vCPU had changed EPT"),
    ("WOKEN_BY",          1, "it was halted, and runs for a daemon only"),
    ("FLUSH_CAUSE",       1, "for which of the following it asks others, if it does"),
    ("FLUSHES_FOR_FAULTS", 1, "times that all other vCPUs had to drop translations for a page that got another frame"),
    ("FLUSHES_FOR_LOG",   1, "the same for writes that are logged from now on, or again"),
    ("FLUSHES_FOR_SHARING", 1, "the same for a page that was to become a shared frame"),
    ("FLUSHES_FOR_COLLAPSE", 1, "the same for 2 MiB that were copied into a large page"),
    ("FLUSHES_FOR_SWAP",  1, "the same for a page that was given up"),
    ("FLUSHES_FOR_BALLOON", 1, "the same for a page that the guest gave"),
    ("FLUSHES_FOR_SHADOWING", 1, "the same for a shadow entry that was made, and what it took the place of"),
    ("FLUSHES_FOR_WRITES", 1, "the same for a table of the guest that was written, and is shadowed"),
    ("FLUSHES_FOR_SYNC",  1, "the same for tables out of sync that were held against the guest's, all or one entry"),
    ("FLUSHES_FOR_ROOM",  1, "the same for shadow pages that were given up because few were free"),
    ("FLUSHES_FOR_TYPES", 1, "the same for a frame that is to be a direct page table, or to be written again"),
    ("FLUSHES_FOR_GUEST", 1, "times that a paravirtual guest had other vCPUs drop translations"),
    ("FLUSH_WAITS",       1, "times that another vCPU had not dropped them yet when it was looked at"),
    ("FAST_FAULTS",       1, "pages that logging alone protected, made writable without the lock of the tables"),
    ("FAST_RETRIES",      1, "times that somebody had changed their leaf since it was read"),
    ("KICKS",             1, "interrupts to CPUs of other vCPUs, so that they leave their guest or go on"),
    ("ASKED_PAGE",        1, "a request was to drop the translations of this address, bit 0 being set"),
    ("LOOSE",             1, "may vCPUs of the VM have translations by what a direct page table or frame was before?"),
    ("LOCK_WAITS",        1, "times that the lock of direct page tables was not free yet when it was looked at"),
    ("PV_REQUESTS",       1, "requests of a paravirtual guest of several vCPUs, about its page tables"),
    ("AGILE_DUE",         1, "an interval of agile paging has ended"),
    ("VPID",              1, "its VPID; 0 where there are none"),
    ("GUEST_CR4",         1, "CR4 of the guest, under shadow paging"),
    ("VIEWS",             1, "linear address of the EPTP list; behind it what is kept while a store is let through"),
    ("WATCHED_WRITES",    1, "stores to pages of a view that may not be written, which exited and were let through"),
)

# --- physical CPU: byte offsets from the GS base ----------------------------------------------------------------
CPU_WORDS: Final = (
    ("CURRENT",      1, "the vCPU whose thread runs here"),
    ("SELF",         1, "linear address of this page"),
    ("COUNT",        1, "vCPUs pinned here"),
    ("TURN",         1, "place of the current one in the list"),
    ("RESCHEDULE",   1, "the scheduler wants the CPU"),
    ("TICK_AT",      1, "TSC of the next scheduler tick; 0 without one"),
    ("ALIVE",        1, "vCPUs here that have not ended"),
    ("USER_STACK",   1, "stack pointer of user space during the entry of a system call"),
    ("VMXON_REGION", 1, "host-physical address of the VMXON region"),
    ("GDTR",         2, "operand of LGDT"),
    ("IDTR",         2, "operand of LIDT"),
    ("MSRS",         8, "what the switched MSRs hold now"),
    ("HOST_MSRS",    8, "what they hold in user space"),
    ("DISK_QUEUE",   1, "linear address of this CPU's commands to the disk; what is done stands a page behind"),
    ("DISK_TAIL",    1, "commands that were queued"),
    ("DISK_HEAD",    1, "commands that are known to be done"),
    ("DOORBELL",     1, "linear address of this CPU's register of the disk"),
    ("LIST",        64, "the vCPUs pinned here"),
    ("TSS_WORDS",   16, "task-state segment, four bytes into it"),
    ("USER_CR3",     1, "under page-table isolation: CR3 of user space, bit 63 clear while a flush of it is wanted"),
    ("USER_CR3_NOW", 1, "what the way out loads"),
    ("ENTRY_STACK", 23, "stack for interrupts from user space"),
    ("L1D_UNSAFE",   1, "L1D may hold something sensitive: l1tf_flush_l1d of the thread and of the CPU"),
    ("SELECTOR",     1, "operand of VERW"),
)
RUN_WORDS: Final = (
    ("REASON",    1, "what user space is asked to do: see the requests"),
    ("ADDRESS",   1, "port, or guest-physical address"),
    ("SIZE",      1, "bytes"),
    ("WRITE",     1, "is it a write?"),
    ("VALUE",     1, "what was written, or what was read"),
    ("COALESCED", 1, "writes that wait in the ring"),
    ("RING",     64, "address and value of each"),
)
# fmt: on


# words of a vCPU that say what became of its VM's memory: they are in the result, by these names in small letters
STATISTICS: Final = (
    "LARGE_PAGES",
    "LARGE_MISSING",
    "OTHER_NODE",
    "DIRTY_PAGES",
    "DIRTY_ROUNDS",
    "REGIONS_COLLAPSED",
    "REGIONS_RECOVERED",
    "SHARE_ROUNDS",
    "PAGES_PUBLISHED",
    "PAGES_MERGED",
    "PAGES_UNSHARED",
    "PAGES_BALLOONED",
    "PAGES_DEFLATED",
    "SWAP_WAITS",
    "PAGES_SWAPPED_IN",
    "PAGES_SWAPPED_OUT",
    "PAGES_DROPPED",
    "REMOTE_FLUSHES",
    "FLUSHES_FOR_FAULTS",
    "FLUSHES_FOR_LOG",
    "FLUSHES_FOR_SHARING",
    "FLUSHES_FOR_COLLAPSE",
    "FLUSHES_FOR_SWAP",
    "FLUSHES_FOR_BALLOON",
    "FLUSHES_FOR_SHADOWING",
    "FLUSHES_FOR_WRITES",
    "FLUSHES_FOR_SYNC",
    "FLUSHES_FOR_ROOM",
    "FLUSHES_FOR_TYPES",
    "FLUSHES_FOR_GUEST",
    "FLUSH_WAITS",
    "LOCK_WAITS",
    "PV_REQUESTS",
    "FAST_FAULTS",
    "FAST_RETRIES",
    "KICKS",
    "WATCHED_WRITES",
)
CLUSTER_ENTRIES, CLUSTER_ENTRY_BYTES = 8, 32
V: Final = byte_offsets(VCPU_WORDS)
# behind them, at a multiple of 64 bytes: the posted-interrupt descriptor, where the processor keeps the local APIC
V["POSTED"] = -(-8 * sum(words for _, words, _ in VCPU_WORDS) // 64) * 64
C: Final = byte_offsets(CPU_WORDS)
C["TSS"] = C["TSS_WORDS"] + 4  # so that the stack pointers in it are aligned
C["ENTRY_TOP"] = C["L1D_UNSAFE"] & ~15
RUN: Final = byte_offsets(RUN_WORDS)
# a page behind the EPTP list: where to go back to behind a store that is let through, and what came meanwhile
STEP: Final = byte_offsets((
    ("LIST",    512, "the EPTPs"),
    ("EPTP",      1, "that of the view in which the store could not be made"),
    ("INDEX",     1, "its number"),
    ("ADDRESS",   1, "guest-physical address of the last such store"),
    ("HELD",      1, "interrupts are to be looked at behind it"),
))  # fmt: skip
LIST_LIMIT: Final = 64
CPUID_BYTES: Final = 48  # leaf, number of subleaves or -1, EAX, ECX, EDX, EBX

# fmt: off
# causes of flushes, in their order
(FOR_FAULTS, FOR_LOG, FOR_SHARING, FOR_COLLAPSE, FOR_SWAP, FOR_BALLOON, FOR_SHADOWING, FOR_WRITES, FOR_SYNC,
 FOR_ROOM, FOR_TYPES, FOR_GUEST) = range(12)
RUNNABLE, HALTED, ENDED, WAITING = range(4)                                  # states of a vCPU
REQUEST_EVENTS, REQUEST_STATE = 1, 2                                # bits of REQUEST: evaluate events, load the guest
REQUEST_PORT, REQUEST_MEMORY = 1, 2                                 # what user space is asked
COMPLETE_NOTHING, COMPLETE_PORT, COMPLETE_LOAD, COMPLETE_STORE, COMPLETE_STRING = range(5)
# MSRs that the host switches in software, in the order of GUEST_MSRS, MSRS and HOST_MSRS
SWITCHED_MSRS: Final = (0xC0000081, 0xC0000082, 0xC0000084, 0xC0000102)   # STAR, LSTAR, FMASK, KERNEL_GS_BASE
USER_RETURN_MSRS: Final = 3                                         # so many of them are restored lazily
# fmt: on


def direct(hpa: int) -> int:
    """The host's linear address of a physical one."""
    return HOST_DIRECT + hpa


def frame_address(hfn: int) -> int:
    """The host's linear address of a frame."""
    return HOST_DIRECT + hfn * PAGE_BYTES
