"""What a guest may see differ between a machine and a duplicate of it: the one table that says so.

An operation shows its guest values, and each rolls into a digest of the vCPU; two runs are equivalent while their
digests are equal. The rows below are the only things that are left out of them; docs/equivalence.md is made of them.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from vtsim.cpu import ops as o

# fmt: off
ANY: Final = 0xFFFF_FFFF
ALL: Final = -1
EVERY_PART: Final = -1
RAX, RBX, RCX, RDX = range(4)  # parts of what CPUID shows
EXCEPTION: Final = 255  # no operation: an exception that the guest's table delivers
TIME, AMOUNT, CHANCE, MONITOR = "time", "amount of resources", "chance", "the monitor's own"
LEFT_OUT: Final = (
    # op       of what: first, last     part        bits left out     because  what
    (o.RDTSC,  0,          ANY,         EVERY_PART, ALL,              TIME,    "the time-stamp counter"),
    (o.RDTSCP, 0,          ANY,         EVERY_PART, ALL,              TIME,    "the time-stamp counter"),
    (o.RDPMC,  0,          ANY,         EVERY_PART, ALL,              TIME,    "performance counters"),
    (o.RDRAND, 0,          ANY,         EVERY_PART, ALL,              CHANCE,  "random numbers"),
    (o.RDSEED, 0,          ANY,         EVERY_PART, ALL,              CHANCE,  "random seeds"),
    (o.IN,     0x608,      0x60B,       EVERY_PART, ALL,              TIME,    "the power-management timer"),
    (o.IN,     0x40,       0x43,        EVERY_PART, ALL,              TIME,    "counters of the interval timer"),
    (o.RDMSR,  0x10,       0x10,        EVERY_PART, ALL,              TIME,    "IA32_TIME_STAMP_COUNTER"),
    (o.RDMSR,  0xE7,       0xE8,        EVERY_PART, ALL,              TIME,    "IA32_MPERF, IA32_APERF"),
    (o.RDMSR,  0x6E0,      0x6E0,       EVERY_PART, ALL,              TIME,    "IA32_TSC_DEADLINE"),
    (o.RDMSR,  0x800,      0x83F,       EVERY_PART, ALL,              TIME,    "the local APIC: its timer, interrupts"),
    (o.RDMSR,  0x480,      0x493,       EVERY_PART, ALL,              MONITOR, "whether VMX is there to be used again"),
    (o.RDMSR,  0x3A,       0x3A,        EVERY_PART, ALL,              MONITOR, "whether VMX is there to be used again"),
    (o.CPUID,  1,          1,           RBX,        0xFFFF_0000,      AMOUNT,  "logical CPUs, the local APIC's number"),
    (o.CPUID,  1,          1,           RCX,        1 << 31 | 1 << 5, MONITOR, "HYPERVISOR, and VMX to be used again"),
    (o.CPUID,  4,          4,           EVERY_PART, ALL,              AMOUNT,  "caches, and who shares them"),
    (o.CPUID,  0xB,        0xB,         EVERY_PART, ALL,              AMOUNT,  "topology of logical CPUs"),
    (o.CPUID,  0x40000000, 0x4FFFFFFF,  EVERY_PART, ALL,              MONITOR, "leaves that no processor has"),
)
# fmt: on
MASKS: Final = np.array([(op, first, last, part, bits) for op, first, last, part, bits, _, _ in LEFT_OUT], np.int64)
# of each op, the first of its rows and the one behind its last: all rows of an op stand together
RULES: Final = np.zeros((256, 2), np.int64)
for _op in {row[0] for row in LEFT_OUT}:
    _rows = [n for n, row in enumerate(LEFT_OUT) if row[0] == _op]
    RULES[_op] = _rows[0], _rows[-1] + 1
# operations that show their guest something, in words
SHOWN: Final = {
    o.CPUID: "CPUID leaf {of:#x}",
    o.RDMSR: "RDMSR {of:#x}",
    o.IN: "IN from port {of:#x}",
    o.SYSRET: "result of a system call",
    o.SYSEXIT: "result of a system call",
    o.SMSW: "SMSW",
    o.SGDT: "SGDT",
    o.SIDT: "SIDT",
    o.SLDT: "SLDT",
    o.STR: "STR",
    o.PUSHF: "PUSHF",
    o.POPF: "RFLAGS after POPF",
    o.LAR: "LAR of selector {of:#x}",
    o.LSL: "LSL of selector {of:#x}",
    o.VERR: "VERR of selector {of:#x}",
    o.VERW: "VERW of selector {of:#x}",
    o.MOV_FROM_SEGMENT: "MOV from {segment}",
    o.PUSH_SEGMENT: "PUSH of {segment}",
    o.CALL_FAR: "CS pushed by a far CALL",
    EXCEPTION: "{exception}",
}
SEGMENTS: Final = ("ES", "CS", "SS", "DS", "FS", "GS")
EXCEPTIONS: Final = (
    "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "vector 9", "#TS", "#NP", "#SS", "#GP", "#PF",
    "vector 15", "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
)  # fmt: skip
NO_ERROR_CODE: Final = (1 << 64) - 1


def shown(op: int, of: int) -> str:
    """What an operation is called that showed its guest something of `of`."""
    text = SHOWN.get(op) or o.OPS[op].name
    segment = SEGMENTS[of] if op in (o.MOV_FROM_SEGMENT, o.PUSH_SEGMENT) else ""
    exception = "" if op != EXCEPTION else EXCEPTIONS[of] if of < len(EXCEPTIONS) else f"vector {of}"
    return text.format(of=of & 0xFFFF_FFFF, segment=segment, exception=exception)


def said(op: int, of: int, part: int, value: int) -> str:
    """A value that an operation showed, in words; `value` is unsigned."""
    if op in (o.LAR, o.LSL):
        return f"ZF 1, {value >> 1:#x}" if value & 1 else "ZF 0"
    if op in (o.VERR, o.VERW):
        return f"ZF {value & 1}"
    if op == EXCEPTION and part == 0:
        return "no error code" if value == NO_ERROR_CODE else f"error code {value:#x}"
    if op == EXCEPTION:
        return f"CR2 {value:#x}"
    if op in (o.SGDT, o.SIDT):
        return f"{('limit', 'base')[part]} {value:#x}"
    return f"{value:#x}"


def page() -> str:
    """docs/equivalence.md: what may differ between a machine and its duplicate."""
    names = dict.fromkeys("SYSRET" if op == o.SYSEXIT else o.OPS[op].name for op in SHOWN if op != EXCEPTION)
    lines = [line.format(shown=", ".join(names)) for line in HEAD]
    for op, first, last, part, bits, because, what in LEFT_OUT:
        of = "" if (first, last) == (0, ANY) else f"{first:#x}" + (f" to {last:#x}" if last != first else "")
        register = "" if part == EVERY_PART else ("EAX", "EBX", "ECX", "EDX")[part]
        kept = "all" if bits == ALL else f"{bits:#x}"
        lines.append(f"| {o.OPS[op].name} | {of} | {register} | {kept} | {because} | {what} |")
    return "\n".join([*lines, *TAIL]) + "\n"


HEAD: Final = (
    "# When two runs are equivalent",
    "",
    "Popek and Goldberg (1974) ask of a virtual machine that a program behaves in it as on the machine itself, but for",
    "time and for the amount of resources. Every operation that shows its program something rolls the value into one",
    "of three digests of the vCPU: of applications, of the kernel, and of exceptions that the guest's own table",
    "delivers (vector, error code, address of a page fault). Two runs are equivalent where each vCPU saw the same",
    "values in the same order and each VM ended in the same way. `vtsim compare --equivalence` runs both and names the",
    "first value that differs.",
    "",
    "Operations that show something: {shown}.",
    "Those that a hypervisor executes in its guest's place count, too.",
    "",
    "What is left out of the digests is this, and nothing else:",
    "",
    "| operation | of | part | bits | because it is | what |",
    "|---|---|---|---|---|---|",
)
TAIL: Final = (
    "",
    "Also free: when interrupts come, and with them how often a kernel handles them, and in which order tasks that it",
    "switches between had their turns (then what each process saw, and each child, is compared by itself);",
    "which of several vCPUs is first to touch a page, so that of such a VM only this is compared: which pages faulted,",
    "on whichever vCPU, and how often each other exception came on all of them; of pages of a mapped file, which of 16",
    "that a fault maps together: those are left out that another vCPU writes to then; which file descriptor each of",
    "several threads of a process gets (not whether it gets one, nor what else it sees before and after); how far",
    "the kernel was on a further vCPU when its VM had finished its work; and the control registers that a kernel",
    "reads itself, which a binary translator gives it without anybody seeing it. A kernel that was built for its",
    "hypervisor is another program;",
    "what applications see is compared then, and what the kernel sees is not, nor are its exceptions.",
    "",
    "This page is generated from `vtsim/cpu/visible.py`.",
)
