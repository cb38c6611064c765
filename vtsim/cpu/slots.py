"""Where every number of one logical CPU lives: the slots of its machine record.

A machine record `m` is one int64 vector per logical CPU. Scalars, geometry, prices and counters are slots of it, so
that kernels take three arguments (record, arena, tags), nothing in a scenario changes a type, and the whole state of a
machine is three arrays. Slots that the VMCS saves and loads stand in the order of the VMCS guest area (see `STATE`).
"""

from __future__ import annotations

from typing import Final

from vtsim.vmcs import slots as v

# fmt: off
# --- cursor, general registers -------------------------------------------------------------------------------------
(CYCLE, MARK, RETIRED, RETIRED_MARK, OPS, LIMIT, UNTIL, OPS_LEFT, FRACTION, ROW, STOP, STOP_A, STOP_B, STOP_C,
 GPR, *_) = range(32)
GPR = 16
(RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15) = range(16)
REGISTERS: Final = ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI",
                    "R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15")
NO_REGISTER: Final = 16

# --- privilege and accounting -----------------------------------------------------------------------------------------
# PRIVILEGE is 0 R0, 1 R3, 2 N0, 3 N3. OWNER is the arena offset of the statistics block of whoever runs.
(PRIVILEGE, ACTIVITY, OWNER, HOST_OWNER, NONROOT, HALTED, CPU) = range(32, 39)

# --- control registers and MSRs that VM transitions leave alone or treat one by one ---------------------------------
(CR2, CR8, DR6, XCR0, MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_FMASK, MSR_KERNEL_GS_BASE, MSR_TSC_AUX, MSR_TSC_ADJUST,
 MSR_APIC_BASE, MSR_MISC_ENABLE, MSR_SPEC_CTRL, MSR_TSC_DEADLINE, MSR_FEATURE_CONTROL, MSR_XSS, TSC_OFFSET,
 INTERRUPT_SHADOW, NMI_BLOCKED) = range(40, 60)

# --- the guest-state block: one slot per VMCS guest-state field, in VMCS slot order -------------------------------------
STATE: Final = 64          # m[STATE + slot - GUEST_START]; 96 slots are kept for it

# --- VMX ---------------------------------------------------------------------------------------------------------------
(VMXON, VMXON_POINTER, VMCS_POINTER, VMCS, VMX_REVISION, EPTP, VPID, EXIT_INSTRUCTION_INFO, EXIT_GPA, EXIT_GLA,
 EXIT_INTERRUPTION, EXIT_ERROR_CODE, TIMER_RATE, TIMER_DEADLINE, VECTORING, VECTORING_ERROR, VECTORING_LENGTH, EPT_AD,
 WINDOW, VMX_SESSION) = range(160, 180)

# --- events being raised by the op in flight ------------------------------------------------------------------------------
(EVENT_VECTOR, EVENT_ERROR, EVENT_HAS_ERROR, EVENT_TYPE, EVENT_LENGTH, EVENT_CR2,
 FAULT_KIND, FAULT_GVA, FAULT_GPA, FAULT_CODE, FAULT_QUALIFICATION) = range(184, 195)

# --- local APIC -------------------------------------------------------------------------------------------------------
(APIC_TPR, APIC_TIMER_VECTOR, APIC_TIMER_MODE, APIC_DEADLINE, APIC_PERIOD, APIC_PENDING, APIC_SPURIOUS,
 APIC_DIVIDE, APIC_INITIAL) = range(196, 205)
# interrupts from other CPUs on their way: earliest arrival, how many, arena offset of arrivals and commands
IPI_AT, IPI_COUNT, IPI_FLIGHTS = range(205, 208)
APIC_IRR: Final = 208      # four words of 64 vectors
APIC_ISR: Final = 212

# --- translation context ------------------------------------------------------------------------------------------------
(CONTEXT, CONTEXT_GLOBAL, CONTEXT_KEY, CONTEXT_PHYSICAL, CONTEXTS, CONTEXT_COUNT, FETCH_GENERATION, FETCH_PAGES,
 LINE_GENERATIONS, FETCH_HPA) = range(220, 230)
# the context before this one: transitions go to and fro between two (host speed only)
(OTHER_KEY, OTHER_CONTEXT, OTHER_GLOBAL, OTHER_PHYSICAL) = range(230, 234)
FORESEEN: Final = 234      # arena offset of where page tables were (host speed only)
# how often L1D or a first-level data TLB was filled (host speed only)
DATA_GENERATION: Final = 236
WALK_START: Final = 237    # cycles of a page walk besides those of its references and walk caches
ENTRY_CACHE: Final = 235   # do walk caches hold single entries by their address (AMD), not tables by a part of the address?

# --- structures: base in the arena (a) or tags (t), set mask or count, ways, latency ---------------------------------------
# A translation structure is BASE, MASK, WAYS: tags, then data, then one reference mask per set.
(DTLB4K, DTLB2M, DTLB1G, ITLB4K, ITLB2M, STLB, STLB1G, PWC_PML5E, PWC_PML4E, PWC_PDPTE, PWC_PDE,
 EPT_PML5E, EPT_PML4E, EPT_PDPTE, EPT_PDE, NESTED_TLB) = range(240, 240 + 16 * 4, 4)
MASK: Final = 1
WAYS: Final = 2
DATA: Final = 3            # arena offset of the data words
TRANSLATION_STRUCTURES: Final = ("dtlb4k", "dtlb2m", "dtlb1g", "itlb4k", "itlb2m", "stlb", "stlb1g", "pwc.pml5e",
                                 "pwc.pml4e", "pwc.pdpte", "pwc.pde", "ept_pwc.pml5e", "ept_pwc.pml4e", "ept_pwc.pdpte",
                                 "ept_pwc.pde", "nested_tlb")
# A cache is BASE (in t), SETS, WAYS, LATENCY, REFERENCED (in t): its reference masks.
(L1I, L1D, L2, L3) = range(308, 308 + 4 * 8, 8)
SETS: Final = 1
LATENCY: Final = 3
REFERENCED: Final = 4
POWER: Final = 5           # set mask where the number of sets is a power of two, else -1
AGED: Final = 6            # of L3: do its lines have ages? Then two masks of a set follow each other: see kernels.caches
(DRAM_CYCLES, STLB_HIT_CYCLES, STLB_HOLDS_2M, PWC_HIT_CYCLES, MLP, WALKERS, CPI_NUMERATOR, PORT_CYCLES, MMIO_CYCLES,
 IPI_CYCLES, WAKE_CYCLES, EXIT_CYCLES, ENTRY_CYCLES, PENDING_DRAIN, WORK_SCALE, ATOMIC_CYCLES) = range(340, 356)
# frames of the node that this CPU belongs to: first, end; DRAM elsewhere takes REMOTE_CYCLES
NODE_FIRST, NODE_END, REMOTE_CYCLES = range(356, 359)
POSTED_CYCLES: Final = 359  # of a store to a device register

# --- overlap windows: completion cycles of outstanding misses and of walkers ------------------------------------------------
MISS_WINDOW: Final = 360   # up to 32
WALK_WINDOW: Final = 392   # up to 8
# MISS_HELD: how many before MISS_NEXT still hold back those behind them; ROB: instructions from the oldest of them on
(MISS_NEXT, WALK_NEXT, MISS_HELD, ROB) = range(400, 404)

# --- prices by op number ---------------------------------------------------------------------------------------------
PRICE: Final = 416         # 160 slots

# --- digests, replay, trace -------------------------------------------------------------------------------------------
(DIGEST_APPLICATION, DIGEST_KERNEL, DIGEST_EXCEPTION, TRACE_ON) = range(580, 584)

# --- translation in flight: stall it causes, latency of the walk, page sizes seen, paging mode -----------------------------
(STALL, WALK_LATENCY, EPT_SIZES, PAGE_SIZES, GLOBALS_SEEN, PAGING_LEVELS, RESERVED_BITS, EXECUTE_ONLY,
 OP_LENGTH, LINES, HOOK_NUMBER, HALTED_AT, IN_FLIGHT, EPT_PWC_HIT_CYCLES,
 NESTED_HIT_CYCLES) = range(584, 599)

# --- recorded guests: when the wire of a recorded interrupt is asserted (0: never), its vector, the host's vector for it
# (0 where the guest is native), host-physical address of the word that then holds the guest's vector
WIRE_AT, WIRE_VECTOR, WIRE_HOST_VECTOR, WIRE_MESSAGE = range(602, 606)

# prices of what is not an op, after those of up to 140 ops
P_EXCEPTION: Final = PRICE + 140
P_INTERRUPT: Final = PRICE + 141
P_CPUID_1: Final = PRICE + 143             # CPUID of a leaf other than 0
P_WRMSR_X2APIC: Final = PRICE + 144
P_MOV_TO_CR: Final = PRICE + 146           # by control register, 9 slots
P_MOV_TO_CR3_NOFLUSH: Final = PRICE + 155
P_MOV_FROM_CR8: Final = PRICE + 156
P_VERW: Final = PRICE + 157                # of a selector in memory
P_IBPB: Final = PRICE + 158
P_L1D_FLUSH: Final = PRICE + 159

# work area of the table-copy hook: a word for each level
COPY_SOURCES, COPY_TARGETS, COPY_INDEX = 608, 614, 620

# a guest whose kernel runs in ring 3 of root operation: arena offset of its statistics block (0 none), arena offset of
# the word in which its monitor says whether it runs its kernel (1), a process (0), or the host a process of its own (2),
# that word while ring 3 runs, and whether sensitive operations trap in ring 3 (an ISA variant)
(MONITORED, BELIEVED_AT, BELIEVED, SENSITIVE_TRAPS) = range(628, 632)
TRANSLATOR: Final = 632    # linear address, in ring 3, of the structure of the binary translator (0 none)
TRANSLATION: Final = 633   # work area of its hooks: six words

# which first-level data TLB answered last, by GiB of the address: page size, 4 if global (host speed only)
HINTS: Final = 640
HINT_COUNT: Final = 16

# --- modes other than 64-bit mode, debug registers, rare events ---------------------------------------------------------------
# MODE is 0 in 64-bit mode; else SEGMENTED with the code segment's default size and what the mode is (kernels.modes).
# SHADOW_KIND: blocking by STI (1) or MOV SS (2) while INTERRUPT_SHADOW is not 0. PENDING: something for kernels.pending.
# ACTIVITY_STATE: as in the VMCS, HALTED says that nothing runs.
(MODE, SHADOW_KIND, PENDING, NMI_PENDING, ACTIVITY_STATE, VIRTUAL_NMI_BLOCKED, SEGMENT_FAULT,
 DR0, DR1, DR2, DR3, IRET_UNBLOCKED, PAUSE_FIRST, PAUSE_LAST, MONITOR_ARMED, BEGUN_AT,
 BEGUN_FLAGS, APIC_WRITTEN, VIRTUAL_PENDING, EPT_FEATURES, FAULT_SUPPRESSED, INJECTED) = range(656, 678)
# an INIT signal waits; a start-up IPI waits (its vector and VALID_SIPI); MSRs that VM exits save because the processor
# has them (kernels.rare_msrs)
(INIT_PENDING, SIPI_PENDING, SAVED_MSRS) = range(680, 683)
# LARGEST: level of the largest page of either dimension that this processor has
# FAULT_NESTED: with agile paging, did the walk that failed last stand in the guest's own tables?
# WALKS_IN_L1D: do page walks look up the L1 data cache?
(PKRU, LARGEST_LEVEL, LARGEST_EPT_LEVEL, FAULT_NESTED, WALKS_IN_L1D) = range(683, 688)
PENDING_DEBUG: Final = STATE + v.GUEST_PENDING_DEBUG_EXCEPTIONS - v.GUEST_START
PDPTE0: Final = STATE + v.GUEST_PDPTE0 - v.GUEST_START

# memory-type range registers (variable, fixed, default), IA32_MPERF and IA32_APERF
MTRR_VARIABLE: Final = 688
MTRR_FIXED: Final = 704
MTRR_DEFAULT: Final = 715
CLOCKS: Final = 716
# work area of the shadow-paging hooks: what they loaded of the pool, what they tell their program, a word for each level
(SHADOW_POOL, SHADOW_DIRECT, SHADOW_GUEST, SHADOW_TABLES, SHADOW_NOTES, SHADOW_RECORDS, SHADOW_FRAMES, SHADOW_BUCKETS,
 SHADOW_MODE, SHADOW_ROOT, SHADOW_FLAGS, SHADOW_LARGE, SHADOW_SWITCHES, SHADOW_VM, SHADOW_SEVERAL,
 SHADOW_ORPHANS) = range(736, 752)
SEEN: Final = 728          # arena offset of the log of what the guest of this CPU sees now (0 none): see kernels.digest
SHADOW_STACK: Final = 752
# the store of a hook that was refused last: its address, value and bytes. An emulator may have done it meanwhile.
REFUSED_AT, REFUSED_VALUE, REFUSED_BYTES = 760, 761, 767
SHADOW_MARKS: Final = 762  # a second stack, of five words

MISS_ISSUED: Final = 768   # of each outstanding miss: instructions that had retired before it
# pages that were loaded and stored lately (host speed only): see kernels.data_pages
DATA_PAGES: Final = 800
DATA_PAGE_COUNT: Final = 64
# who holds which line: a cache of tags and, behind those of each set, owners; 0 with one CPU: see kernels.coherence
DIRECTORY: Final = DATA_PAGES + DATA_PAGE_COUNT * 8
# arena offset of where the caches of all CPUs are (0: there is one CPU); until a line of another CPU's cache is here;
# arena offset of when lines of the directory came to their owners; when this CPU paused last
PEERS, TRANSFER_CYCLES, REMOTE_TRANSFER_CYCLES, OWNED_SINCE, PAUSED = range(DIRECTORY + 8, DIRECTORY + 13)
# --- wrong paths: lines that they asked for, by miss buffer; 4 KiB pages that walkers walk for ----------------------------
WRONG_LINE: Final = DIRECTORY + 16  # up to 32
WALK_PAGE: Final = DIRECTORY + 48   # up to 8
# when a look-up's last access is there, and the one before it; when all that wrong paths asked for is there; from a
# mispredicted branch to its right path; does a walk stand on a wrong path, where it may change nothing?
LOADED, LOADED_BEFORE, WRONG_UNTIL, MISPREDICT_CYCLES, SPECULATIVE = range(DIRECTORY + 56, DIRECTORY + 61)
# what the translation that was just made says of its page's memory type, if it is not cached: see kernels.memory_types
UNCACHED: Final = DIRECTORY + 61
# of code that is not cached: what LINES is while control is in it, and the line that was fetched last (-1: none)
UNCACHED_LINES, LINE_FETCHED = range(DIRECTORY + 62, DIRECTORY + 64)
# --- memory that several CPUs use: this CPU's node; arena offset of the nodes' bandwidths (see kernels.dram); what a
# line takes of a node's memory, in 1/1024 of a cycle (0: there is more than can be asked for)
NODE, BANDWIDTHS, LINE_TIME = range(DIRECTORY + 72, DIRECTORY + 75)
# its banks: arena offset; ranks of all channels (0: banks are never busy) and banks of a rank; cycles for which a line keeps its
# bank, for which a rank refreshes, and from one refresh to the next; what the access that is made is held back before
BANKS, RANKS, BANKS_OF_RANK, ROW_CYCLE, REFRESH, REFRESH_INTERVAL, HELD_BACK = range(DIRECTORY + 78, DIRECTORY + 85)
# --- what L2 fetches without being asked (see kernels.prefetchers): does it complete pairs; arena offset of what came last;
# how far ahead of a stream it goes; do loads that L1D lacks ask for what comes next; pages whose streams it follows
IN_PAIRS, ARRIVALS, LINES_AHEAD = range(DIRECTORY + 75, DIRECTORY + 78)
NEXT_LINES: Final = DIRECTORY + 85
STREAMS: Final = DIRECTORY + 89  # and MASK, WAYS, DATA
# arena offset of the queue of lines that L2 waits for, and how many it holds
SUPER_QUEUE, SUPER_QUEUE_LINES = range(DIRECTORY + 93, DIRECTORY + 95)
# channels of a node's memory that are told apart; arena offset of their queues, and lines that each holds
CHANNELS, QUEUES, QUEUE = range(DIRECTORY + 86, DIRECTORY + 89)
# --- hyper-threads: the core that this CPU belongs to, how many there are, the other CPU of it (-1: none) ---------------------
# OF_LATE: of its last cycles, the share in 1/1024 in which it executed; SHARED_FRACTION: what is carried; CONTENTION: what an
# executing CPU loses to another one that does, in 1/1024; RAN_LAST: did it run last of its core? WHOLE_ROB: without sharing
CORE, CORES, SIBLING, OF_LATE, SHARED_FRACTION, CONTENTION, RAN_LAST, WHOLE_ROB = range(DIRECTORY + 64, DIRECTORY + 72)
RECORD_SLOTS: Final = DIRECTORY + 96

# --- the parts of the guest-state block that kernels name ------------------------------------------------------------------
CR0: Final = STATE + v.GUEST_CR0 - v.GUEST_START
CR3: Final = STATE + v.GUEST_CR3 - v.GUEST_START
CR4: Final = STATE + v.GUEST_CR4 - v.GUEST_START
DR7: Final = STATE + v.GUEST_DR7 - v.GUEST_START
RIP: Final = STATE + v.GUEST_RIP - v.GUEST_START
RFLAGS: Final = STATE + v.GUEST_RFLAGS - v.GUEST_START
EFER: Final = STATE + v.GUEST_IA32_EFER - v.GUEST_START
PAT: Final = STATE + v.GUEST_IA32_PAT - v.GUEST_START
DEBUGCTL: Final = STATE + v.GUEST_IA32_DEBUGCTL - v.GUEST_START
ES_SELECTOR: Final = STATE
CS_SELECTOR: Final = STATE + v.GUEST_CS_SELECTOR - v.GUEST_START
SS_SELECTOR: Final = STATE + v.GUEST_SS_SELECTOR - v.GUEST_START
LDTR_SELECTOR: Final = STATE + v.GUEST_LDTR_SELECTOR - v.GUEST_START
TR_SELECTOR: Final = STATE + v.GUEST_TR_SELECTOR - v.GUEST_START
CS_ACCESS_RIGHTS: Final = STATE + v.GUEST_CS_ACCESS_RIGHTS - v.GUEST_START
SS_ACCESS_RIGHTS: Final = STATE + v.GUEST_SS_ACCESS_RIGHTS - v.GUEST_START
FS_BASE: Final = STATE + v.GUEST_FS_BASE - v.GUEST_START
GS_BASE: Final = STATE + v.GUEST_GS_BASE - v.GUEST_START
TR_BASE: Final = STATE + v.GUEST_TR_BASE - v.GUEST_START
GDTR_BASE: Final = STATE + v.GUEST_GDTR_BASE - v.GUEST_START
GDTR_LIMIT: Final = STATE + v.GUEST_GDTR_LIMIT - v.GUEST_START
IDTR_BASE: Final = STATE + v.GUEST_IDTR_BASE - v.GUEST_START
IDTR_LIMIT: Final = STATE + v.GUEST_IDTR_LIMIT - v.GUEST_START
SYSENTER_CS: Final = STATE + v.GUEST_IA32_SYSENTER_CS - v.GUEST_START
SYSENTER_ESP: Final = STATE + v.GUEST_IA32_SYSENTER_ESP - v.GUEST_START
SYSENTER_EIP: Final = STATE + v.GUEST_IA32_SYSENTER_EIP - v.GUEST_START
# fmt: on
