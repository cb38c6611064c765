"""What the VT-d specification lists of registers and capabilities; nothing here acts.

A register is a row of `REGISTERS` with the fields that its bits form and who may change them. What is not named by a
field is reserved. `entries.py`, `faults.py` and `descriptors.py` hold the other lists.

VT-d: "Register Descriptions"; "Software Access to Registers".
"""

from __future__ import annotations

from typing import Final

import attrs

RO, RW, WO, RW1C = "RO", "RW", "WO", "RW1C"  # read only; read and write; reads as zero; writing 1 clears


@attrs.frozen
class Bits:
    """A field of a register, a table entry or a descriptor: its name and its lowest and highest bit.

    `needs`, for registers: the field of CAP or ECAP without which it is reserved.
    """

    name: str
    low: int
    high: int
    access: str = RO
    needs: str = ""

    @property
    def mask(self) -> int:
        """The field's bits within its word."""
        return ((1 << (self.high - self.low + 1)) - 1) << self.low


@attrs.frozen
class RegisterRow:
    """One register: byte offset, width in bytes, its fields, and the fields of CAP or ECAP of which it needs one."""

    name: str
    offset: int
    width: int
    title: str
    fields: tuple[Bits, ...]
    needs: str = ""


def bits(text: str, access: str = RO) -> tuple[Bits, ...]:
    """Fields from a line such as `TE:31 CH:2-1 P:0`.

    A field may name its own access, as in `PPF:1=RO`, and after `?` the capability that it needs, as in `EIME:11?EIM`.
    """
    found = []
    for word in text.split():
        name, place = word.split(":")
        place, _, needs = place.partition("?")
        place, _, own = place.partition("=")
        high, _, low = place.partition("-")
        found.append(Bits(name, int(low or high), int(high), own or access, needs))
    return tuple(found)


# fmt: off
# --- offsets that kernels name --------------------------------------------------------------------------------------
VER, CAP, ECAP, GCMD, GSTS, RTADDR, CCMD = 0x00, 0x08, 0x10, 0x18, 0x1C, 0x20, 0x28
FSTS, FECTL, FEDATA, FEADDR, FEUADDR, AFLOG = 0x34, 0x38, 0x3C, 0x40, 0x44, 0x58
PMEN, PLMBASE, PLMLIMIT, PHMBASE, PHMLIMIT = 0x64, 0x68, 0x6C, 0x70, 0x78
IQH, IQT, IQA, ICS, IECTL, IEDATA, IEADDR, IEUADDR, IQERCD, IRTA = (
    0x80, 0x88, 0x90, 0x9C, 0xA0, 0xA4, 0xA8, 0xAC, 0xB0, 0xB8)
PQH, PQT, PQA, PRS, PECTL, PEDATA, PEADDR, PEUADDR = 0xC0, 0xC8, 0xD0, 0xDC, 0xE0, 0xE4, 0xE8, 0xEC
MTRRCAP, MTRRDEF, MTRR_FIXED, MTRR_BASE, MTRR_MASK = 0x100, 0x108, 0x120, 0x180, 0x188
VCMD, VCRSP, VCCAP = 0xE00, 0xE10, 0xE30
REGISTER_BYTES: Final = 4096
STICKY: Final = (FSTS,)        # fields that a reset with power keeps; so are the fault recording registers
FAULT_OFFSET: Final = 0x400    # where FRO leads: the fault recording registers, 16 bytes each
IOTLB_OFFSET: Final = 0x500    # where IRO leads: IVA and the IOTLB invalidate register
IVA: Final = IOTLB_OFFSET
IOTLB: Final = IOTLB_OFFSET + 8
MOST_FAULT_REGISTERS: Final = (IOTLB_OFFSET - FAULT_OFFSET) // 16

EVENT = "IM:31=RW IP:30"
ADDRESS_UPPER = "MUA:31-0"
VARIABLE_MTRRS: Final = 10
FIXED_MTRRS: Final = ("FIX64K_00000", "FIX16K_80000", "FIX16K_A0000", *(f"FIX4K_{n:X}000" for n in range(0xC0, 0x100, 8)))
REGISTERS: Final[tuple[RegisterRow, ...]] = (
    RegisterRow("VER",      VER,      4, "Version Register",                                  bits("MAX:7-4 MIN:3-0")),
    RegisterRow("CAP",      CAP,      8, "Capability Register", bits(
        "ESRTPS:63 ESIRTPS:62 ECMDS:61 FL5LP:60 PI:59 FL1GP:56 DRD:55 DWD:54 MAMV:53-48 NFR:47-40 PSI:39 SLLPS:37-34 "
        "FRO:33-24 ZLR:22 MGAW:21-16 SAGAW:12-8 CM:7 PHMR:6 PLMR:5 RWBF:4 AFL:3 ND:2-0")),
    RegisterRow("ECAP",     ECAP,     8, "Extended Capability Register", bits(
        "RPRIVS:53 ADMS:52 PMS:51 RPS:49 SMPWC:48 FLTS:47 SLTS:46 SLADS:45 VCS:44 SMTS:43 PDS:42 DIT:41 PASID:40 "
        "PSS:39-35 EAFS:34 NWFS:33 SRS:31 ERS:30 PRS:29 DIS:27 NEST:26 MTS:25 MHMV:23-20 IRO:17-8 SC:7 PT:6 EIM:4 IR:3 "
        "DT:2 QI:1 C:0")),
    RegisterRow("GCMD",     GCMD,     4, "Global Command Register", bits(
        "TE:31 SRTP:30 SFL:29 EAFL:28 WBF:27 QIE:26 IRE:25 SIRTP:24 CFI:23", WO)),
    RegisterRow("GSTS",     GSTS,     4, "Global Status Register", bits(
        "TES:31 RTPS:30 FLS:29 AFLS:28 WBFS:27 QIES:26 IRES:25 IRTPS:24 CFIS:23")),
    RegisterRow("RTADDR",   RTADDR,   8, "Root Table Address Register",                       bits("RTA:63-12 TTM:11-10", RW)),
    RegisterRow("CCMD",     CCMD,     8, "Context Command Register", bits(
        "ICC:63=RW CIRG:62-61=RW CAIG:60-59=RO FM:33-32=WO SID:31-16=WO DID:15-0=RW")),
    RegisterRow("FSTS",     FSTS,     4, "Fault Status Register", bits(
        "FRI:15-8 PRO:7=RW1C ITE:6=RW1C ICE:5=RW1C IQE:4=RW1C APF:3=RW1C AFO:2=RW1C PPF:1 PFO:0=RW1C")),
    RegisterRow("FECTL",    FECTL,    4, "Fault Event Control Register",                      bits(EVENT)),
    RegisterRow("FEDATA",   FEDATA,   4, "Fault Event Data Register",                         bits("EIMD:31-16 IMD:15-0", RW)),
    RegisterRow("FEADDR",   FEADDR,   4, "Fault Event Address Register",                      bits("MA:31-2", RW)),
    RegisterRow("FEUADDR",  FEUADDR,  4, "Fault Event Upper Address Register",                bits(ADDRESS_UPPER, RW)),
    RegisterRow("AFLOG",    AFLOG,    8, "Advanced Fault Log Register",                       bits("FLA:63-12 FLS:11-9")),
    RegisterRow("PMEN",     PMEN,     4, "Protected Memory Enable Register",                  bits("EPM:31=RW PRS:0"), "PLMR PHMR"),
    RegisterRow("PLMBASE",  PLMBASE,  4, "Protected Low-Memory Base Register",                bits("PLMB:31-21", RW), "PLMR"),
    RegisterRow("PLMLIMIT", PLMLIMIT, 4, "Protected Low-Memory Limit Register",               bits("PLML:31-21", RW), "PLMR"),
    RegisterRow("PHMBASE",  PHMBASE,  8, "Protected High-Memory Base Register",               bits("PHMB:63-21", RW), "PHMR"),
    RegisterRow("PHMLIMIT", PHMLIMIT, 8, "Protected High-Memory Limit Register",              bits("PHML:63-21", RW), "PHMR"),
    RegisterRow("IQH",      IQH,      8, "Invalidation Queue Head Register",                  bits("QH:18-4"), "QI"),
    RegisterRow("IQT",      IQT,      8, "Invalidation Queue Tail Register",                  bits("QT:18-4", RW), "QI"),
    RegisterRow("IQA",      IQA,      8, "Invalidation Queue Address Register",               bits("IQA:63-12 DW:11 QS:2-0", RW), "QI"),
    RegisterRow("ICS",      ICS,      4, "Invalidation Completion Status Register",           bits("IWC:0", RW1C), "QI"),
    RegisterRow("IECTL",    IECTL,    4, "Invalidation Event Control Register",               bits(EVENT), "QI"),
    RegisterRow("IEDATA",   IEDATA,   4, "Invalidation Event Data Register",                  bits("EIMD:31-16 IMD:15-0", RW), "QI"),
    RegisterRow("IEADDR",   IEADDR,   4, "Invalidation Event Address Register",               bits("MA:31-2", RW), "QI"),
    RegisterRow("IEUADDR",  IEUADDR,  4, "Invalidation Event Upper Address Register",         bits(ADDRESS_UPPER, RW), "QI"),
    RegisterRow("IQERCD",   IQERCD,   8, "Invalidation Queue Error Record Register", bits(
        "ICESID:63-48 ITESID:47-32 IQEI:3-0"), "QI"),
    RegisterRow("IRTA",     IRTA,     8, "Interrupt Remapping Table Address Register",        bits("IRTA:63-12 EIME:11?EIM S:3-0", RW), "IR"),
    RegisterRow("PQH",      PQH,      8, "Page Request Queue Head Register",                  bits("PQH:18-5", RW), "PRS"),
    RegisterRow("PQT",      PQT,      8, "Page Request Queue Tail Register",                  bits("PQT:18-5", RW), "PRS"),
    RegisterRow("PQA",      PQA,      8, "Page Request Queue Address Register",               bits("PQA:63-12 PQS:2-0", RW), "PRS"),
    RegisterRow("PRS",      PRS,      4, "Page Request Status Register",                      bits("PRO:1 PPR:0", RW1C), "PRS"),
    RegisterRow("PECTL",    PECTL,    4, "Page Request Event Control Register",               bits(EVENT), "PRS"),
    RegisterRow("PEDATA",   PEDATA,   4, "Page Request Event Data Register",                  bits("EIMD:31-16 IMD:15-0", RW), "PRS"),
    RegisterRow("PEADDR",   PEADDR,   4, "Page Request Event Address Register",               bits("MA:31-2", RW), "PRS"),
    RegisterRow("PEUADDR",  PEUADDR,  4, "Page Request Event Upper Address Register",         bits(ADDRESS_UPPER, RW), "PRS"),
    RegisterRow("IVA",      IVA,      8, "Invalidate Address Register",                       bits("ADDR:63-12 IH:6 AM:5-0", WO)),
    RegisterRow("IOTLB",    IOTLB,    8, "IOTLB Invalidate Register", bits(
        "IVT:63=RW IIRG:61-60=RW IAIG:58-57=RO DR:49=RW DW:48=RW DID:47-32=RW")),
    RegisterRow("MTRRCAP",  MTRRCAP,  8, "MTRR Capability Register",                          bits("WC:10 FIX:8 VCNT:7-0"), "MTS"),
    RegisterRow("MTRRDEF",  MTRRDEF,  8, "MTRR Default Type Register",                        bits("E:11 FE:10 TYPE:7-0", RW), "MTS"),
    *(RegisterRow(f"MTRR_{name}", MTRR_FIXED + 8 * n, 8, "Fixed-Range MTRRs",           bits("TYPES:63-0", RW), "MTS")
      for n, name in enumerate(FIXED_MTRRS)),
    *(RegisterRow(f"MTRR_PHYS{part}{n}", (MTRR_BASE, MTRR_MASK)[part == "MASK"] + 16 * n, 8, "Variable-Range MTRRs",
                  bits("MASK:63-12 V:11" if part == "MASK" else "BASE:63-12 TYPE:7-0", RW), "MTS")
      for n in range(VARIABLE_MTRRS) for part in ("BASE", "MASK")),
    RegisterRow("VCMD",     VCMD,     8, "Virtual Command Register",                          bits("OP:63-8 CMD:7-0", RW), "VCS"),
    RegisterRow("VCRSP",    VCRSP,    8, "Virtual Command Response Register",                 bits("RSLT:63-16 SC:7-1 IP:0"), "VCS"),
    RegisterRow("VCCAP",    VCCAP,    8, "Virtual Command Capability Register",               bits("PAS:0"), "VCS"),
)
# One fault recording register is two words; these are the fields of each.
FAULT_RECORD_LOW: Final = bits("FI:63-12")
FAULT_RECORD_HIGH: Final = bits("F:63=RW1C T1:62 AT:61-60 PV:59-40 FR:39-32 PP:31 EXE:30 PRIV:29 T2:28 SID:15-0")

# --- bits that kernels name -------------------------------------------------------------------------------------------
TE, SRTP, SFL, EAFL, WBF, QIE, IRE, SIRTP, CFI = (1 << n for n in range(31, 22, -1))
TTM_LEGACY, TTM_SCALABLE, TTM_RESERVED, TTM_ABORT = range(4)                 # RTADDR bits 11:10
PFO, PPF, AFO, APF, IQE, ICE, ITE, PRO = (1 << n for n in range(8))          # FSTS
FRI: Final = 8
FSTS_EVENTS: Final = PPF | PFO | IQE | ICE | ITE | PRO
IM, IP = 1 << 31, 1 << 30                                                    # FECTL, IECTL, PECTL
IWC: Final = 1 << 0
PRS_PPR, PRS_PRO = 1 << 0, 1 << 1
EPM, PRS_PROTECTED = 1 << 31, 1 << 0
ICC: Final = -(1 << 63)
IVT: Final = -(1 << 63)
CIRG, CAIG, IIRG, IAIG = 61, 59, 60, 57
GLOBAL, DOMAIN_SELECTIVE, FINEST_SELECTIVE = 1, 2, 3                         # granularity asked or performed; 0: reserved
IQA_WIDE, IQA_SIZE = 1 << 11, 7
EIME: Final = 1 << 11
VERSION: Final = 0x40                                                        # major version 4
MTRR_E, MTRR_FE, MTRR_V = 1 << 11, 1 << 10, 1 << 11
MTRRCAP_VALUE: Final = 1 << 10 | 1 << 8 | VARIABLE_MTRRS
VCMD_ALLOCATE, VCMD_FREE = 1, 2                                              # commands
VC_SUCCESS, VC_UNKNOWN, VC_NO_PASID = 0, 1, 16                               # SC; 16 also: that PASID was not given
VC_STATUS, VC_OPERAND = 1, 16
VCCAP_PAS: Final = 1 << 0

# --- capabilities: masks and shifts ---------------------------------------------------------------------------------------
CAP_RWBF, CAP_PLMR, CAP_PHMR, CAP_CM, CAP_ZLR = 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 22
CAP_SAGAW, CAP_MGAW, CAP_FRO, CAP_SLLPS, CAP_NFR, CAP_MAMV = 8, 16, 24, 34, 40, 48
CAP_PSI, CAP_DWD, CAP_DRD, CAP_FL1GP, CAP_PI, CAP_FL5LP = 1 << 39, 1 << 54, 1 << 55, 1 << 56, 1 << 59, 1 << 60
ECAP_C, ECAP_QI, ECAP_DT, ECAP_IR, ECAP_EIM, ECAP_PT, ECAP_SC = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 6, 1 << 7
ECAP_IRO, ECAP_MHMV, ECAP_PSS = 8, 20, 35
ECAP_MTS, ECAP_NEST, ECAP_PRS, ECAP_ERS, ECAP_SRS, ECAP_EAFS = 1 << 25, 1 << 26, 1 << 29, 1 << 30, 1 << 31, 1 << 34
ECAP_PASID, ECAP_DIT, ECAP_PDS, ECAP_SMTS, ECAP_VCS, ECAP_SLADS, ECAP_SLTS, ECAP_FLTS = 1 << 40, 1 << 41, 1 << 42, 1 << 43, 1 << 44, 1 << 45, 1 << 46, 1 << 47
ECAP_SMPWC, ECAP_RPS, ECAP_ADMS, ECAP_RPRIVS = 1 << 48, 1 << 49, 1 << 52, 1 << 53

# What a unit never says that it can do: advanced fault logging, enhanced commands, performance monitoring.
NOT_OFFERED: Final = {"CAP": ("AFL", "ECMDS"), "ECAP": ("PMS",)}

# Errors of the invalidation queue, as IQERCD gives them.
IQEI_NONE, IQEI_TAIL, IQEI_FETCH, IQEI_TYPE, IQEI_RESERVED, IQEI_WIDTH, IQEI_MISALIGNED, IQEI_TTM = range(8)
QUEUE_ERRORS: Final = (
    "no information",                       "invalid tail pointer",          "error fetching the descriptor",
    "invalid descriptor type",              "reserved field of a descriptor", "invalid descriptor width",
    "queue tail not aligned",               "invalid translation-table mode",
)

# --- addresses -------------------------------------------------------------------------------------------------------------
INTERRUPT_FIRST: Final = 0xFEE0_0000
INTERRUPT_LAST: Final = 0xFEEF_FFFF
# What a request asks, and the fields that say so: AT of the TLP, access bits of `translate`.
UNTRANSLATED, TRANSLATION_REQUEST, TRANSLATED = 0, 1, 2
READ, WRITE, EXECUTE, PRIVILEGED, ATOMIC = 1, 2, 4, 8, 16
NO_PASID: Final = -1
# fmt: on


def register(name: str) -> RegisterRow:
    """The register of a name."""
    return next(each for each in REGISTERS if each.name == name)


def capability_value(row: str, **fields: int) -> int:
    """The word of a capability register with these fields; a field that is not there, or too large, is a ValueError."""
    word = 0
    known = {each.name: each for each in register(row).fields}
    for name, value in fields.items():
        if name not in known or not 0 <= value <= known[name].mask >> known[name].low:
            raise ValueError(f"{row} has no field {name} = {value}")
        word |= value << known[name].low
    return word
