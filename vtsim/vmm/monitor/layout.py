"""Where the monitor stands in every address space, and the words of its virtual CPU.

The parts of the address space are those that Xen keeps for itself: no guest kernel here uses them. A CPU's page holds
the monitor's stack below the structure of its vCPU, so that the TSS's RSP0 is both, as HOST_RSP is under VT-x.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.memory import signed
from vtsim.base.words import byte_offsets
from vtsim.cpu.assembler import Mem
from vtsim.cpu.slots import R15

# fmt: off
RAM: Final    = signed(0xFFFF_8200_0000_0000)   # guest-physical address 0: an entry of the top-level table
TEXT: Final   = signed(0xFFFF_82D0_8000_0000)   # the monitor's code
DIRECT: Final = signed(0xFFFF_8300_0000_0000)   # all of physical memory
SHARED: Final = signed(0xFFFF_8180_0000_0000)   # what translations reach in ring 3, in the kernel's address space only
TOP_ENTRY: Final = 1 << 39                      # bytes behind an entry of the top-level table
FIRST_ENTRY: Final = SHARED // TOP_ENTRY % 512
LAST_ENTRY: Final = 271                         # the guest's own kernel half begins behind it

MONITOR_CODE, MONITOR_DATA = 0x10, 0x18         # selectors of the monitor
GUEST_CODE, GUEST_DATA = 0x33, 0x2B             # selectors with which the processor runs a guest
MONITOR_TASK: Final = 0x60                      # of its task state
# its GDT, by selector / 8: code and data of the monitor, data and code of guests; two words of the task state follow
DESCRIPTORS: Final = (0, 0, 0xAF9B000000FFFF, 0xCF93000000FFFF, 0, 0xCFF3000000FFFF, 0xAFFB000000FFFF, 0, 0, 0, 0, 0)
STAR: Final = MONITOR_CODE << 32 | 0x23 << 48
TIMER_VECTOR: Final = 0xEC
RF_IF: Final = 1 << 9
IOPL: Final = 3 << 12
RF_ZF: Final = 1 << 6

STACK_BYTES: Final = 2048
VIEW_WORDS: Final = 4                           # of one address space: see VIEWS
WROTE_SLOTS: Final = 32                         # of WROTE_AT; with 16, two stores 64 bytes apart pushed each other out
VCPU_WORDS: Final = (
    # field         words  meaning
    ("REGISTERS",    16, "general registers of the guest by number"),
    ("KERNEL",        1, "does the guest run its kernel (1) or a process (0), as it believes?"),
    ("INTERRUPTS",    1, "RFLAGS.IF as the guest believes"),
    ("CS",            1, "code segment selector that the guest's kernel believes in"),
    ("SS",            1, "its stack segment selector"),
    ("CR0",           1, "control registers that it believes in"),
    ("CR2",           1, ""),
    ("CR3",           1, ""),
    ("CR4",           1, ""),
    ("CR8",           1, ""),
    ("EFER",          1, "MSRs that it believes in"),
    ("STAR",          1, ""),
    ("LSTAR",         1, ""),
    ("FMASK",         1, ""),
    ("GDTR",          2, "limit, base"),
    ("IDTR",          2, "limit, base"),
    ("TR_BASE",       1, "linear address of its TSS"),
    ("TR",            1, "selector of its TSS"),
    ("LDTR",          1, "selector of its LDT"),
    ("LDT",           2, "limit (-1 where there is none), base"),
    ("SEGMENTS",      6, "selectors in ES, CS, SS, DS, FS, GS: those of CS and SS stand elsewhere"),
    ("DR6",           1, "debug registers that it believes in"),
    ("DR7",           1, ""),
    ("MODE",          1, "paging mode: see vtsim.ept.shadow"),
    ("VIEWS",         8, "of its processes, then of its kernel: root, record of its shadow page, key, number"),
    ("POOL",          1, "linear address of the pool of shadow pages"),
    ("TOP",           1, "linear address of the monitor's own top-level table, through which it sees guest memory"),
    ("SLOTS",         1, "linear address of the memory slots"),
    ("SLOT_ENTRIES",  1, "how many"),
    ("TIMER_LVT",     1, "local vector table entry of the guest's timer"),
    ("PENDING",       1, "vector of the interrupt that waits, 0 none"),
    ("IN_SERVICE",    1, "vector of the interrupt that was delivered last and not acknowledged, 0 none"),
    ("MSR_TABLE",     1, "linear address of the MSRs that are plain storage"),
    ("MSR_ENTRIES",   1, "how many"),
    ("MSR_READ_ONLY", 1, "linear address of the first of them that the guest cannot write, all others behind it"),
    ("PORTS",         1, "linear address of its port devices: port, kind, value"),
    ("PORT_ENTRIES",  1, "how many"),
    ("EMULATING",     1, "is an instruction being emulated, whose page faults are the guest's? 2: its system accesses"),
    ("LENGTH",        1, "bytes of the instruction being emulated"),
    ("SCRATCH",       7, "registers that a system call saves"),
    ("DEATH",         1, "why the VM ended: see the deaths"),
    ("DEATH_OP",      1, "op that the guest executed then"),
    ("TRANSLATOR",    1, "linear address of the binary translator's structure"),
    ("LEAVING_RCX",   1, "registers that a call-out saves"),
    ("LEAVING_R11",   1, ""),
    ("WORLD",         1, "linear address of the page that the worlds of monitor and host share, where it is hosted"),
    ("WORLD_SWITCHES", 1, "switches to the host's world and back"),
    ("BACK_RCX",      1, "registers that the way back into a translation restores"),
    ("BACK_R11",      1, ""),
    ("BACK_TO",       1, "where in a translation it leads"),
    ("TRAPPED_AT",    1, "translated address of the last page fault of the guest's kernel"),
    ("WROTE_AT", WROTE_SLOTS, "original addresses of stores to tables that faulted, by a hash of the address"),
    ("LEFT_AT",       1, "translated address behind a call-out"),
    ("EMULATED",      2, "instructions completed in the guest's place: of processes, of its kernel"),
    ("TRAPS",         1, "faults of privileged operations"),
    ("SYSTEM_CALLS",  1, "system calls, from ring 3 to ring 3 through the monitor"),
    ("INJECTED",      1, "exceptions and interrupts delivered to the guest"),
    ("INJECTED_FAULTS", 1, "of them, page faults"),
    ("INJECTED_INTERRUPTS", 1, "of them, external interrupts"),
    ("SWITCHES",      1, "switches between the two address spaces"),
    ("ZERO",          1, "of a software CPU (see vtsim.vmm.software): 0, the register of operands that have none"),
    ("FLAGS_HOW",     1, "address of what makes the flags again"),
    ("FLAGS_LEFT",    1, "from this operand or result"),
    ("FLAGS_RIGHT",   1, "and this operand"),
    ("FS_BASE",       1, "segment bases"),
    ("GS_BASE",       1, ""),
    ("KERNEL_GS_BASE", 1, ""),
    ("SOFT_TLB",      2, "linear address of the software TLB: of processes, of the kernel"),
    ("DECODED",       1, "linear address of the decoded instructions or translated blocks"),
    ("CODE_PAGES",    1, "linear address of a word for each frame of the guest: does it hold what was decoded?"),
    ("DELIVERING",    1, "is an exception or interrupt being delivered?"),
    ("WORK_BODY",     1, "address of what executes one of many ordinary instructions"),
    ("RESULT",        4, "where ordinary instructions leave what nobody asks for"),
    ("STREAM",        1, "linear address of the accesses of a stream that come next"),
    ("STREAM_AT",     1, "which of them is being made, 0 none"),
    ("LOW_END",       1, "end of guest memory below the devices' hole"),
    ("HIGH_END",      1, "end of guest memory above it"),
    ("AFTER_HOOK",    1, "bytes of the hook that is executed"),
    ("COPY",         16, "what a copy of page tables remembers: a word for each level and kind"),
    ("CHAIN_FROM",    1, "exit of a translated block that may lead on directly"),
    ("IMAGE",         1, "what is added to the address of a translation to reach the bytes that its translator writes"),
    ("LOOKUPS",       1, "look-ups of the software TLB"),
    ("MISSES",        1, "of them, without a translation found"),
    ("TLB_FLUSHES",   1, "times that it was emptied"),
    ("DECODES",       1, "instructions decoded, or blocks translated"),
    ("BLOCK_LOOKUPS", 1, "look-ups of the block to go to"),
    ("CHAINED",       1, "exits of blocks that were made to lead to another block"),
    ("CODE_FLUSHES",  1, "times that all that was decoded or translated went"),
    ("FILLS",         1, "walks that ended in a translation"),
)
# fmt: on

V: Final = byte_offsets(VCPU_WORDS)

# the frame that the processor leaves below the vCPU's structure when ring 3 is left
F_SS, F_RSP, F_RFLAGS, F_CS, F_RIP, F_ERROR = (Mem(R15, -8 * n) for n in range(1, 7))
FRAME_BYTES: Final = 40
AS_SYSTEM: Final = 2  # in EMULATING

(FINISHED, ILLEGAL, NO_DEVICE, NO_STACK, BAD_GATE, IN_MONITOR, NO_PROCESS) = range(1, 8)
DEATHS: Final = {
    FINISHED: "finished",
    ILLEGAL: "the guest's kernel asked for what the monitor does not emulate",
    NO_DEVICE: "the guest accessed device memory, which the monitor does not have",
    NO_STACK: "the guest's stack or descriptor table was not mapped when an exception was delivered",
    BAD_GATE: "the guest has no handler for an exception",
    NO_PROCESS: "the guest's kernel returned to a process without having loaded a root for it",
    IN_MONITOR: "the guest mapped pages where the monitor stands",
}


def vcpu(field: str, word: int = 0, size: int = 8) -> Mem:
    """A word of the vCPU that runs on this CPU."""
    return Mem(R15, V[field] + 8 * word, size=size)


def saved(register: int, size: int = 8) -> Mem:
    """A general register of the guest."""
    return Mem(R15, V["REGISTERS"] + 8 * register, size=size)
