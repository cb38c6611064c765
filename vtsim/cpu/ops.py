"""What a logical CPU can do: the operation table, the row layout, activities and privilege states.

A program is a list of rows. A row is eight int64 words of the arena, one host cache line.

SDM: "Instruction Set Reference".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import frozen

# fmt: off
# --- privilege states --------------------------------------------------------------------------------------------------
R0, R3, N0, N3 = range(4)
PRIVILEGES: Final = ("R0", "R3", "N0", "N3")

# --- activities: what cycles are charged to -------------------------------------------------------------------------------
ACTIVITIES: Final = (
    "boot", "application", "syscall", "page_fault", "interrupt", "context_switch", "idle", "driver",           # guest programs
    "exit_dispatch", "exit_handler", "device_emulation", "user_device", "memory_management", "scheduling",     # hypervisor programs
    "reentry", "injection",
    "data_stall", "fetch_stall", "page_walk", "event_delivery", "vm_exit", "vm_entry", "halted", "bus",        # the CPU itself
    "dma_map", "dma_unmap", "invalidation",                                                                    # drivers again
    "shared_core",                                                                                             # the CPU again
)
(BOOT, APPLICATION, SYSCALL_PATH, PAGE_FAULT_PATH, INTERRUPT_PATH, CONTEXT_SWITCH, IDLE, DRIVER,
 EXIT_DISPATCH, EXIT_HANDLER, DEVICE_EMULATION, USER_DEVICE, MEMORY_MANAGEMENT, SCHEDULING,
 REENTRY, INJECTION,
 DATA_STALL, FETCH_STALL, PAGE_WALK, EVENT_DELIVERY, VM_EXIT, VM_ENTRY, HALTED_CYCLES, BUS,
 DMA_MAP, DMA_UNMAP, INVALIDATION,
 SHARED_CORE) = range(len(ACTIVITIES))
ACTIVITY_SLOTS: Final = 32

# --- row layout ---------------------------------------------------------------------------------------------------------
# META packs op (8 bits), length in bytes (16), byte offset in the page (12), whether the bytes reach into the next line
# (1), activity (5), last-in-page (1).
ROW_WORDS: Final = 8
ROW_META, ROW_R1, ROW_R2, ROW_IMM, ROW_MEM, ROW_DISP, ROW_TARGET, ROW_EXTRA = range(ROW_WORDS)
META_LENGTH, META_OFFSET, META_STRADDLES, META_ACTIVITY, META_LAST = 8, 24, 36, 37, 42
META_UNCOUNTED: Final = 43  # of a translation: no instruction of the original program
# MEM packs base register (5 bits), index register (5), scale shift (2), size in bytes (4), segment (3: 0 none, 1 FS, 2 GS).
MEM_INDEX, MEM_SCALE, MEM_SIZE, MEM_SEGMENT = 5, 10, 12, 16
# Rows that were decoded from bytes say more in MEM: segments 3 ES, 4 CS, 5 SS, 6 DS (never 0), address size (2 bits) and
# operand size (2 bits: 0 for 16, 1 for 32, 2 for 64 bits, as in VM-exit instruction information), and flags.
# A base of RIP_BASE is the next instruction's address. Byte registers AH, CH, DH, BH have numbers from HIGH_BYTES on.
MEM_ADDRESS_SIZE, MEM_OPERAND_SIZE = 19, 21
MEM_REGISTER: Final = 1 << 23   # the r/m operand is register R2, not memory
MEM_REP: Final = 1 << 24        # F3
MEM_REPNE: Final = 1 << 25      # F2
MEM_LOCK: Final = 1 << 26
MEM_DECODED: Final = 1 << 27
MEM_TO_RM: Final = 1 << 28      # the r/m operand is the destination
MEM_IMMEDIATE: Final = 1 << 29  # the source is IMM
NO_SEGMENT, SEGMENT_FS, SEGMENT_GS, SEGMENT_ES, SEGMENT_CS, SEGMENT_SS, SEGMENT_DS = range(7)
RIP_BASE: Final = 17
HIGH_BYTES: Final = 20


@frozen
class Op:
    """One operation: its number, encoded length in bytes, price key of the profile and meaning."""

    number: int
    name: str
    length: int
    price: str
    meaning: str


_TABLE: Final = (
    # name             bytes  price            meaning
    ("WORK",              4, "",              "IMM ordinary instructions without memory operands; LENGTH bytes of code"),
    ("MOV",               5, "MOV",           "R1 <- R2, or IMM where R2 is none"),
    ("ADD",               4, "ADD",           "R1 <- R1 + (R2 or IMM); flags"),
    ("SUB",               4, "ADD",           "R1 <- R1 - (R2 or IMM); flags"),
    ("AND",               4, "ADD",           "R1 <- R1 & (R2 or IMM); flags"),
    ("OR",                4, "ADD",           "R1 <- R1 | (R2 or IMM); flags"),
    ("XOR",               4, "ADD",           "R1 <- R1 ^ (R2 or IMM); flags"),
    ("SHL",               4, "ADD",           "R1 <- R1 << IMM"),
    ("SHR",               4, "ADD",           "R1 <- R1 >> IMM, logical"),
    ("CMP",               4, "ADD",           "flags of R1 - (R2 or IMM)"),
    ("TEST",              4, "ADD",           "flags of R1 & (R2 or IMM)"),
    ("LEA",               4, "ADD",           "R1 <- effective address"),
    ("JMP",               5, "JMP",           "to TARGET"),
    ("JCC",               6, "JCC",           "to TARGET if condition IMM holds (conditions below)"),
    ("LOOP",              2, "JCC",           "RCX <- RCX - 1; to TARGET if RCX is not zero; flags stay"),
    ("LD",                4, "LD",            "R1 <- memory (1, 2, 4, 8 bytes, zero-extended)"),
    ("ST",                4, "ST",            "memory <- R1, or IMM where R1 is none"),
    ("LDM",              32, "LD",            "registers of mask IMM <- consecutive memory words: stands for so many MOVs (EXTRA)"),
    ("STM",              32, "ST",            "consecutive memory words <- registers of mask IMM: stands for so many MOVs (EXTRA)"),
    ("PUSH",              2, "PUSH",          "push R1, or IMM where R1 is none"),
    ("POP",               2, "POP",           "pop R1"),
    ("CALL",              5, "CALL",          "push next RIP; to TARGET"),
    ("RET",               1, "RET",           "pop RIP"),
    ("JMP_REG",           3, "INDIRECT",      "RIP <- R1"),
    ("CALL_REG",          3, "INDIRECT",      "push next RIP; RIP <- R1"),
    ("JMP_MEM",           7, "INDIRECT",      "RIP <- memory: the table jump"),
    ("XADD",              5, "ATOMIC",        "locked exchange-and-add of R1 with memory"),
    ("NOP",               1, "MOV",           "nothing"),
    ("STREAM",            3, "",              "REP: RCX accesses in pattern IMM over RDX bytes at RSI (see streams)"),
    ("LONG_WORK",         3, "",              "REP: RCX ordinary instructions in LENGTH bytes of loop body"),
    ("VMREAD",            3, "VMREAD",        "R1 <- VMCS field IMM, or of the encoding in R2"),
    ("VMWRITE",           3, "VMWRITE",       "VMCS field IMM, or of the encoding in R2, <- R1"),
    ("CPUID",             2, "CPUID",         "leaf RAX, subleaf RCX into RAX RBX RCX RDX"),
    ("RDTSC",             2, "RDTSC",         "RDX:RAX <- time-stamp counter"),
    ("RDTSCP",            3, "RDTSCP",        "as RDTSC, RCX <- IA32_TSC_AUX"),
    ("RDPMC",             2, "RDPMC",         "RDX:RAX <- performance counter RCX"),
    ("RDMSR",             2, "RDMSR",         "RDX:RAX <- MSR RCX"),
    ("WRMSR",             2, "WRMSR",         "MSR RCX <- RDX:RAX"),
    ("MOV_FROM_CR",       3, "MOV_FROM_CR",   "R1 <- CR IMM"),
    ("MOV_TO_CR",         3, "MOV_TO_CR",     "CR IMM <- R1"),
    ("MOV_FROM_DR",       3, "MOV_DR",        "R1 <- DR IMM"),
    ("MOV_TO_DR",         3, "MOV_DR",        "DR IMM <- R1"),
    ("CLTS",              2, "CLTS",          "CR0.TS <- 0"),
    ("LMSW",              3, "LMSW",          "CR0 bits 3:0 <- R1"),
    ("SMSW",              3, "SMSW",          "R1 <- CR0"),
    ("LGDT",              4, "LGDT",          "GDTR <- memory (limit, base)"),
    ("SGDT",              4, "SGDT",          "memory <- GDTR"),
    ("LIDT",              4, "LIDT",          "IDTR <- memory (limit, base)"),
    ("SIDT",              4, "SIDT",          "memory <- IDTR"),
    ("LLDT",              3, "LTR",           "LDTR <- R1"),
    ("SLDT",              3, "STR",           "R1 <- LDTR selector"),
    ("LTR",               3, "LTR",           "TR <- R1, base in R2"),
    ("STR",               3, "STR",           "R1 <- TR selector"),
    ("PUSHF",             1, "PUSHF",         "push RFLAGS"),
    ("POPF",              1, "POPF",          "pop RFLAGS"),
    ("CLI",               1, "CLI",           "RFLAGS.IF <- 0"),
    ("STI",               1, "STI",           "RFLAGS.IF <- 1 after the next op"),
    ("HLT",               1, "HLT",           "wait for an interrupt"),
    ("PAUSE",             2, "PAUSE",         "spin-loop hint"),
    ("MONITOR",           3, "MONITOR",       "arm the monitor at RAX"),
    ("MWAIT",             3, "MWAIT",         "wait for a store to the monitored line or an interrupt"),
    ("INVLPG",            4, "INVLPG",        "drop translations of the effective address"),
    ("INVPCID",           5, "INVPCID",       "drop translations by type R1 and descriptor in memory"),
    ("WBINVD",            2, "WBINVD",        "write back and invalidate caches"),
    ("INVD",              2, "WBINVD",        "invalidate caches"),
    ("XSETBV",            3, "XSETBV",        "XCR RCX <- RDX:RAX"),
    ("IN",                2, "IN",            "RAX <- port (R2 or IMM), size from MEM"),
    ("OUT",               2, "OUT",           "port (R2 or IMM) <- RAX, size from MEM"),
    ("INS",               2, "IN",            "memory at RDI <- port RDX"),
    ("OUTS",              2, "OUT",           "port RDX <- memory at RSI"),
    ("RDRAND",            4, "RDRAND",        "R1 <- random"),
    ("RDSEED",            4, "RDSEED",        "R1 <- random"),
    ("XSAVES",            4, "XSAVES",        "save extended state to memory"),
    ("XRSTORS",           4, "XRSTORS",       "restore extended state from memory"),
    ("SYSCALL",           2, "SYSCALL",       "ring 3 to ring 0 through IA32_LSTAR"),
    ("SYSRET",            3, "SYSRET",        "ring 0 to ring 3"),
    ("SYSENTER",          2, "SYSENTER",      "ring 3 to ring 0 through IA32_SYSENTER_EIP"),
    ("SYSEXIT",           2, "SYSEXIT",       "ring 0 to ring 3"),
    ("SWAPGS",            3, "SWAPGS",        "exchange GS base and IA32_KERNEL_GS_BASE"),
    ("INT",               2, "INT",           "software interrupt IMM through the IDT"),
    ("IRET",              2, "IRET",          "return from interrupt or exception"),
    ("UD",                2, "MOV",           "#UD"),
    ("VMXON",             5, "VMXON",         "enter VMX operation with the region whose address is in memory"),
    ("VMXOFF",            3, "VMXOFF",        "leave VMX operation"),
    ("VMCLEAR",           5, "VMCLEAR",       "clear the VMCS whose address is in memory"),
    ("VMPTRLD",           5, "VMPTRLD",       "make the VMCS whose address is in memory current"),
    ("VMPTRST",           5, "VMPTRST",       "memory <- current VMCS address"),
    ("VMLAUNCH",          3, "VM_ENTRY",      "VM entry with a clear VMCS"),
    ("VMRESUME",          3, "VM_ENTRY",      "VM entry with a launched VMCS"),
    ("VMCALL",            3, "VMCALL",        "call the hypervisor"),
    ("VMFUNC",            3, "VMFUNC",        "VM function RAX"),
    ("INVEPT",            5, "INVEPT",        "drop EPT-derived translations by type R1, descriptor in memory"),
    ("INVVPID",           5, "INVVPID",       "drop VPID-tagged translations by type R1, descriptor in memory"),
    ("GETSEC",            2, "MOV",           "#UD outside SMX; exits in non-root mode"),
    ("HOOK",              5, "",              "semantic action IMM: compiled where its number says so, else the platform's"),
    ("REPLAY_EVENT",      1, "",              "recorded event that is not an instruction: kind R1, operands R2, IMM, DISP"),
    ("STOP",              1, "",              "end of the program: the CPU stops with code IMM"),
    # what decoded code needs beyond the above: operands of any size, r/m operands, every segment
    ("MOVE",              3, "MOV",           "destination <- source (R1, IMM or r/m)"),
    ("ARITHMETIC",        3, "ADD",           "destination <- destination by source, kind EXTRA (see ARITHMETIC_KINDS); flags"),
    ("EXCHANGE",          3, "ATOMIC",        "of R1 with r/m: exchange, exchange and add, compare with RAX and exchange (EXTRA, below)"),
    ("DIVIDE",            3, "ADD",           "RAX, RDX <- RDX:RAX by r/m, unsigned; #DE"),
    ("PUSH_OPERAND",      2, "PUSH",          "push R1, IMM or r/m"),
    ("POP_OPERAND",       2, "POP",           "pop into r/m"),
    ("MOVE_STRING",       2, "LD",            "memory at RDI <- memory at RSI"),
    ("MOV_TO_SEGMENT",    2, "LTR",           "segment register IMM <- R1; decoded: EXTRA <- r/m"),
    ("MOV_FROM_SEGMENT",  2, "STR",           "R1 <- segment register IMM; decoded: r/m <- EXTRA"),
    ("JMP_NEAR",          2, "INDIRECT",      "RIP <- r/m"),
    ("JMP_FAR",           7, "INDIRECT",      "CS:RIP <- EXTRA:IMM or memory"),
    ("CALL_FAR",          7, "INDIRECT",      "push CS and next RIP; CS:RIP <- EXTRA:IMM or memory"),
    ("INT3",              1, "INT",           "breakpoint: software exception 3"),
    ("INT1",              1, "INT",           "privileged software exception 1"),
    ("INTO",              1, "INT",           "software exception 4 if RFLAGS.OF"),
    ("BOUND",             2, "LD",            "#BR unless R1 is within the two bounds in memory"),
    ("RSM",               2, "MOV",           "#UD outside system-management mode"),
    ("XGETBV",            3, "XSETBV",        "RDX:RAX <- XCR RCX"),
    ("ENCLS",             3, "MOV",           "enclave leaf RAX; #UD where it is not supported"),
    ("TOUCH",             3, "LD",            "memory accessed for another purpose, kind EXTRA (see TOUCH_KINDS)"),
    ("FNINIT",            2, "MOV",           "initialise the floating-point unit"),
    ("ENCLV",             3, "MOV",           "enclave leaf RAX of a virtual-machine monitor; #UD where it is not supported"),
    ("PCONFIG",           3, "MOV",           "platform-configuration leaf RAX; no leaf is supported"),
    ("LOADIWKEY",         5, "MOV",           "load the internal wrapping key, which nothing here uses"),
    ("TPAUSE",            4, "PAUSE",         "optimized wait for time RDX:RAX, which ends at once"),
    ("UMWAIT",            4, "PAUSE",         "user-level monitored wait, which ends at once"),
    ("UMONITOR",          4, "MONITOR",       "arm the user-level monitor at r/m"),
    ("RET_FAR",           1, "INDIRECT",      "pop RIP and CS, then IMM bytes"),
    ("STAC",              3, "STAC",          "RFLAGS.AC <- 1: ring 0 may access user-mode pages"),
    ("CLAC",              3, "STAC",          "RFLAGS.AC <- 0"),
    ("RDPKRU",            3, "RDPKRU",        "RDX:RAX <- protection-key rights"),
    ("WRPKRU",            3, "WRPKRU",        "protection-key rights <- RAX"),
    ("LAR",               4, "LTR",           "R1 <- access rights of the segment that R2 selects; ZF"),
    ("LSL",               4, "LTR",           "R1 <- limit of the segment that R2 selects; ZF"),
    ("VERR",              3, "LTR",           "ZF <- may the segment that R1 selects be read?"),
    ("VERW",              3, "LTR",           "ZF <- may the segment that R1 selects be written?"),
    ("PUSH_SEGMENT",      2, "PUSH",          "push segment register IMM; decoded: EXTRA"),
    ("POP_SEGMENT",       2, "LTR",           "pop segment register IMM; decoded: EXTRA"),
    ("RDFSBASE",          5, "STR",           "R1 <- FS base"),
    ("RDGSBASE",          5, "STR",           "R1 <- GS base"),
    ("WRFSBASE",          5, "LTR",           "FS base <- R1"),
    ("WRGSBASE",          5, "LTR",           "GS base <- R1"),
    ("RETPOLINE",         5, "RETPOLINE",     "IMM indirect branches of counted code, each through a thunk: what that adds"),
)
OPS: Final = tuple(Op(n, *row) for n, row in enumerate(_TABLE))
BY_NAME: Final = {op.name: op for op in OPS}
(WORK, MOV, ADD, SUB, AND, OR, XOR, SHL, SHR, CMP, TEST, LEA, JMP, JCC, LOOP, LD, ST, LDM, STM, PUSH, POP, CALL, RET,
 JMP_REG, CALL_REG, JMP_MEM, XADD, NOP, STREAM, LONG_WORK, VMREAD, VMWRITE, CPUID, RDTSC, RDTSCP, RDPMC, RDMSR, WRMSR,
 MOV_FROM_CR, MOV_TO_CR, MOV_FROM_DR, MOV_TO_DR, CLTS, LMSW, SMSW, LGDT, SGDT, LIDT, SIDT, LLDT, SLDT, LTR, STR, PUSHF,
 POPF, CLI, STI, HLT, PAUSE, MONITOR, MWAIT, INVLPG, INVPCID, WBINVD, INVD, XSETBV, IN, OUT, INS, OUTS, RDRAND, RDSEED,
 XSAVES, XRSTORS, SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS, INT, IRET, UD, VMXON, VMXOFF, VMCLEAR, VMPTRLD, VMPTRST,
 VMLAUNCH, VMRESUME, VMCALL, VMFUNC, INVEPT, INVVPID, GETSEC, HOOK, REPLAY_EVENT, STOP_OP, MOVE, ARITHMETIC, EXCHANGE,
 DIVIDE, PUSH_OPERAND, POP_OPERAND, MOVE_STRING, MOV_TO_SEGMENT, MOV_FROM_SEGMENT, JMP_NEAR, JMP_FAR, CALL_FAR, INT3, INT1,
 INTO, BOUND, RSM, XGETBV, ENCLS, TOUCH, FNINIT, ENCLV, PCONFIG, LOADIWKEY, TPAUSE, UMWAIT, UMONITOR,
 RET_FAR, STAC, CLAC, RDPKRU, WRPKRU, LAR, LSL, VERR, VERW, PUSH_SEGMENT, POP_SEGMENT, RDFSBASE, RDGSBASE, WRFSBASE,
 WRGSBASE, RETPOLINE) = range(len(OPS))
# kinds of ARITHMETIC and TOUCH
(K_ADD, K_OR, K_ADC, K_SBB, K_AND, K_SUB, K_XOR, K_CMP, K_TEST, K_INC, K_DEC) = range(11)
ARITHMETIC_KINDS: Final = ("ADD", "OR", "ADC", "SBB", "AND", "SUB", "XOR", "CMP", "TEST", "INC", "DEC")
X_CHANGE, X_ADD, X_COMPARE = range(3)  # kinds of EXCHANGE
TOUCH_PREFETCH, TOUCH_FLUSH, TOUCH_FXSAVE = range(3)
TOUCH_KINDS: Final = ("PREFETCH", "CLFLUSH", "FXSAVE")

# --- recorded guests ------------------------------------------------------------------------------------------------------
# Rows of a recorded guest stand one per byte from this linear address on, outside memory: nothing fetches or translates
# them, and linear addresses are physical ones while RIP is there.
REPLAY_BASE: Final = 0x7E00_0000_0000

# --- conditions of JCC ----------------------------------------------------------------------------------------------------
CONDITIONS: Final = ("Z", "NZ", "B", "AE", "S", "NS", "L", "GE", "LE", "G", "BE", "A")
_HOLDS: Final[tuple[Callable[[bool, bool, bool, bool], bool], ...]] = (
    lambda carry, zero, sign, overflow: zero,
    lambda carry, zero, sign, overflow: not zero,
    lambda carry, zero, sign, overflow: carry,
    lambda carry, zero, sign, overflow: not carry,
    lambda carry, zero, sign, overflow: sign,
    lambda carry, zero, sign, overflow: not sign,
    lambda carry, zero, sign, overflow: sign != overflow,
    lambda carry, zero, sign, overflow: sign == overflow,
    lambda carry, zero, sign, overflow: zero or sign != overflow,
    lambda carry, zero, sign, overflow: not zero and sign == overflow,
    lambda carry, zero, sign, overflow: carry or zero,
    lambda carry, zero, sign, overflow: not carry and not zero,
)
# bit n: does the condition hold when CF | ZF << 1 | SF << 2 | OF << 3 is n? A JCC row has it in DISP.
TRUTH: Final = tuple(
    sum(1 << n for n in range(16) if holds(*(bool(n >> bit & 1) for bit in range(4)))) for holds in _HOLDS
)
(CC_Z, CC_NZ, CC_B, CC_AE, CC_S, CC_NS, CC_L, CC_GE, CC_LE, CC_G, CC_BE, CC_A) = range(len(CONDITIONS))

# --- access patterns of STREAM --------------------------------------------------------------------------------------------
# STREAM: IMM packs pattern (4 bits), writes per 1024 (11 bits from bit 4), ordinary instructions per access (16 bits from
# bit 16). RCX accesses left, RSI base gva, RDX region bytes, RDI position in bytes, R8 stride in bytes, RBX random state.
# zipf: R9 is the gva-independent arena index of a quantile table (see streams). chase: every access waits for the last.
# recorded: R9 is the arena index of a window: number of its first word, number after its last, words. RDI counts words.
# A word is store | address << 1 | ordinary instructions after it << 48; a negative one has no access. RSI ^ address: gva.
# lookup: R9 is the arena index of how many steps there are, then steps (see `Step`); RDI is the step, R8 the fraction drawn,
# RDX whose turn it is.
PATTERNS: Final = ("sequential", "strided", "uniform", "zipf", "chase", "recorded", "lookup")
SEQUENTIAL, STRIDED, UNIFORM, ZIPF, CHASE, RECORDED, LOOKUP = range(len(PATTERNS))
STREAM_WRITES, STREAM_WORK = 4, 16
WINDOW_FIRST, WINDOW_END, WINDOW_WORDS = range(3)
RECORDED_WORK: Final = 48
(STEP_OFFSET, STEP_COUNT, STEP_STRIDE, STEP_FLAGS, STEP_HALF, STEP_AFTER, STEP_SLAB, STEP_GAP, STEP_CHOICES,
 STEP_WITHIN, STEP_WORDS) = range(11)
STEP_DRAWS, STEP_TURNS, STEP_BY_TURN, STEP_NEEDS, STEP_STORES, STEP_LOADS = 1, 2, 4, 8, 16, 32
STEP_FOLLOWS, STEP_FOLLOWS_BEFORE, STEP_BY_BEFORE, STEP_SUMS = 64, 128, 256, 512
STEP_KNOWN, STEP_KNOWN_BEFORE = 1024, 2048
STEP_WORK: Final = 12
# fmt: on
