"""What the rows of a recorded guest mean: one table, and nothing that acts on it."""

from __future__ import annotations

from typing import Final

from attrs import frozen


@frozen
class Kind:
    """One kind of row; `a0`, `a1`, `a2` say in words what those columns hold, empty if nothing."""

    number: int
    name: str
    a0: str = ""
    a1: str = ""
    a2: str = ""


# fmt: off
KINDS: Final[tuple[Kind, ...]] = (
    # Instructions.
    Kind( 1, "CPUID",       "EAX",                       "ECX"),
    Kind( 2, "RDMSR",       "index"),
    Kind( 3, "WRMSR",       "index",                     "value"),
    Kind( 4, "IN",          "port and form",             "first value read, 0 if unknown"),
    Kind( 5, "OUT",         "port and form",             "value written, 0 for OUTS"),
    Kind( 6, "MMIO_R",      "gPA",                       "value read",            "bytes"),
    Kind( 7, "MMIO_W",      "gPA",                       "value written",         "bytes"),
    Kind( 8, "MOV_TO_CR",   "register number",           "new value",             "value before"),
    Kind( 9, "MOV_FROM_CR", "register number",           "value"),
    Kind(10, "CLTS"),
    Kind(11, "LMSW"),
    Kind(12, "INVLPG",      "gVA"),
    Kind(13, "INVPCID",     "type",                      "descriptor low",        "descriptor high"),
    Kind(14, "HLT"),
    Kind(15, "PAUSE"),
    Kind(16, "RDTSC"),
    Kind(17, "RDTSCP"),
    Kind(18, "SYSCALL",     "RAX"),
    Kind(19, "SYSRET"),
    Kind(20, "EXC",         "vector",                    "error code",            "CR2"),
    Kind(21, "IRQ",         "vector"),
    Kind(22, "IRET"),
    Kind(23, "WBINVD"),
    Kind(24, "INVD"),
    Kind(25, "XSETBV",      "ECX",                       "value"),
    Kind(26, "MOV_TO_DR",   "register number",           "value"),
    Kind(27, "MOV_FROM_DR", "register number"),
    Kind(28, "LGDT",        "base, long mode only",      "limit"),
    Kind(29, "LIDT",        "base, long mode only",      "limit"),
    Kind(30, "LTR"),
    Kind(31, "LLDT"),
    Kind(32, "MONITOR"),
    Kind(33, "MWAIT"),
    Kind(34, "VMCALL"),
    Kind(35, "RDPMC"),
    Kind(36, "RDRAND"),
    Kind(37, "RDSEED"),
    Kind(38, "SYSENTER"),
    Kind(39, "INTN",        "vector"),
    Kind(40, "SMSW"),
    # First uses of guest-physical pages since the start, and since a re-arm.
    Kind(48, "TOUCH_R",     "gPA",                       "gVA"),
    Kind(49, "TOUCH_W",     "gPA",                       "gVA"),
    Kind(50, "TOUCH_F",     "gPA",                       "gVA"),
    Kind(51, "RETOUCH_R",   "gPA",                       "gVA"),
    Kind(52, "RETOUCH_W",   "gPA",                       "gVA"),
    Kind(53, "RETOUCH_F",   "gPA",                       "gVA"),
    Kind(54, "REARM",       "PCI host-bridge register",  "value"),
    # The guest's own page tables.
    Kind(55, "PTW",         "gPA of the entry | level",  "value after",           "software value before"),
    Kind(56, "ROOT",        "gPA of the root",           "live table pages"),
    Kind(57, "LEAF_R",      "gVA",                       "gPA of the entry | level | 4 if new path", "entry"),
    Kind(58, "LEAF_W",      "gVA",                       "gPA of the entry | level | 4 if new path", "entry"),
    Kind(59, "LEAF_F",      "gVA",                       "gPA of the entry | level | 4 if new path", "entry"),
)
# fmt: on

NUMBER: Final[dict[str, int]] = {kind.name: kind.number for kind in KINDS}
NAME: Final[dict[int, str]] = {kind.number: kind.name for kind in KINDS}

PORT_MASK: Final = 0xFFFF  # in a0 of IN and OUT
PORT_SIZE_SHIFT: Final = 16  # the operand's bytes: 1, 2 or 4
PORT_SIZE_MASK: Final = 0xF
PORT_STRING: Final = 1 << 20  # INS or OUTS
PORT_REP: Final = 1 << 21  # with a REP prefix
