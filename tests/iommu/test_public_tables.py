"""The tables of the specification agree with what free software publishes of it.

Each number below stands in at least two of: Linux (`drivers/iommu/intel/iommu.h`, `pasid.h`, `dmar.c`, `include/linux/dmar.h`),
QEMU (`hw/i386/intel_iommu_internal.h`, `intel_iommu.c`), FreeBSD (`sys/x86/iommu/intel_reg.h`) and Xen
(`drivers/passthrough/vtd/iommu.h`), except where a comment names the only one.
"""

from __future__ import annotations

import pytest

from vtsim.iommu import descriptors as d
from vtsim.iommu import entries as e
from vtsim.iommu import faults as f
from vtsim.iommu import interrupts as i
from vtsim.iommu import spec as sp

# fmt: off
OFFSETS = {
    "VER": 0x00, "CAP": 0x08, "ECAP": 0x10, "GCMD": 0x18, "GSTS": 0x1C, "RTADDR": 0x20, "CCMD": 0x28, "FSTS": 0x34,
    "FECTL": 0x38, "FEDATA": 0x3C, "FEADDR": 0x40, "FEUADDR": 0x44, "AFLOG": 0x58, "PMEN": 0x64, "PLMBASE": 0x68,
    "PLMLIMIT": 0x6C, "PHMBASE": 0x70, "PHMLIMIT": 0x78, "IQH": 0x80, "IQT": 0x88, "IQA": 0x90, "ICS": 0x9C,
    "IECTL": 0xA0, "IEDATA": 0xA4, "IEADDR": 0xA8, "IEUADDR": 0xAC, "IQERCD": 0xB0, "IRTA": 0xB8, "PQH": 0xC0,
    "PQT": 0xC8, "PQA": 0xD0, "PRS": 0xDC, "PECTL": 0xE0, "PEDATA": 0xE4, "PEADDR": 0xE8, "PEUADDR": 0xEC,
    "MTRRCAP": 0x100, "MTRRDEF": 0x108, "MTRR_FIX64K_00000": 0x120, "MTRR_FIX16K_A0000": 0x130, "MTRR_FIX4K_F8000": 0x170,
    "MTRR_PHYSBASE0": 0x180, "MTRR_PHYSMASK9": 0x218,
    "VCMD": 0xE00, "VCRSP": 0xE10, "VCCAP": 0xE30,         # Linux
}
# Places of fields, as "high-low".
FIELDS = {
    "CAP": "ESRTPS:63 ESIRTPS:62 ECMDS:61 FL5LP:60 PI:59 FL1GP:56 DRD:55 DWD:54 MAMV:53-48 NFR:47-40 PSI:39 SLLPS:37-34 "
           "FRO:33-24 ZLR:22 MGAW:21-16 SAGAW:12-8 CM:7 PHMR:6 PLMR:5 RWBF:4 AFL:3 ND:2-0",
    "ECAP": "PMS:51 RPS:49 SMPWC:48 FLTS:47 SLTS:46 SLADS:45 VCS:44 SMTS:43 PDS:42 DIT:41 PASID:40 PSS:39-35 EAFS:34 "
            "NWFS:33 SRS:31 ERS:30 PRS:29 DIS:27 NEST:26 MTS:25 MHMV:23-20 IRO:17-8 SC:7 PT:6 EIM:4 IR:3 DT:2 QI:1 C:0",
    "GCMD": "TE:31 SRTP:30 SFL:29 EAFL:28 WBF:27 QIE:26 IRE:25 SIRTP:24 CFI:23",
    "GSTS": "TES:31 RTPS:30 FLS:29 AFLS:28 WBFS:27 QIES:26 IRES:25 IRTPS:24 CFIS:23",
    "CCMD": "ICC:63 CIRG:62-61 CAIG:60-59 FM:33-32 SID:31-16 DID:15-0",
    "IOTLB": "IVT:63 IIRG:61-60 IAIG:58-57 DR:49 DW:48 DID:47-32",
    "IVA": "ADDR:63-12 IH:6 AM:5-0",
    "FSTS": "FRI:15-8 PRO:7 ITE:6 ICE:5 IQE:4 APF:3 AFO:2 PPF:1 PFO:0",
    "FECTL": "IM:31 IP:30",
    "PMEN": "EPM:31 PRS:0",
    "IQA": "IQA:63-12 DW:11 QS:2-0",
    "IQERCD": "ICESID:63-48 ITESID:47-32 IQEI:3-0",      # Linux
    "IRTA": "IRTA:63-12 EIME:11 S:3-0",
    "PRS": "PRO:1 PPR:0",
    "VCCAP": "PAS:0", "VCRSP": "RSLT:63-16 SC:7-1 IP:0",  # Linux
}
FAULT_RECORD = "F:63 T1:62 AT:61-60 PV:59-40 FR:39-32 PP:31 SID:15-0"
DESCRIPTORS = {
    "CONTEXT_CACHE": (1, "G:5-4 DID:31-16 SID:47-32 FM:49-48", ""),
    "IOTLB": (2, "G:5-4 DW:6 DR:7 DID:31-16", "AM:5-0 IH:6 ADDR:63-12"),
    "DEVICE_TLB": (3, "PFSID_LOW:15-12 MIP:20-16 SID:47-32 PFSID_HIGH:63-52", "S:0 ADDR:63-12"),
    "INTERRUPT_ENTRY": (4, "G:4 IM:31-27 IIDX:47-32", ""),
    "WAIT": (5, "IF:4 SW:5 FN:6 PD:7 STDATA:63-32", "STADDR:63-2"),
    "PASID_IOTLB": (6, "G:5-4 DID:31-16 PASID:51-32", "AM:5-0 IH:6 ADDR:63-12"),
    "PASID_CACHE": (7, "G:5-4 DID:31-16 PASID:51-32", ""),
    "PASID_DEVICE_TLB": (8, "MIP:8-4 PFSID_LOW:15-12 SID:31-16 PASID:51-32 PFSID_HIGH:63-52", "G:0 S:11 ADDR:63-12"),
    "PAGE_GROUP_RESPONSE": (9, "PP:4 RC:15-12 RID:31-16 PASID:51-32", "PRGI:11-3 LPIG:2"),
}
GRANULARITIES = {"CONTEXT_CACHE": (1, 2, 3), "IOTLB": (1, 2, 3), "INTERRUPT_ENTRY": (0, 1), "PASID_IOTLB": (2, 3),
                 "PASID_CACHE": (0, 1, 3), "PASID_DEVICE_TLB": (0, 1)}
# Reserved bits that QEMU checks, with the bits of a host address (46 here) left to the reader of an entry.
RESERVED_LOW = {"PASID_IOTLB": 0xFFF0_0000_0000_F1C0, "PASID_CACHE": 0xFFF0_0000_0000_F1C0,
                "PAGE_GROUP_RESPONSE": 0xFFF0_0000_0000_01E0, "IOTLB": 0xFFFF_FFFF_0000_F100,
                "CONTEXT_CACHE": 0xFFFC_0000_0000_F1C0}
RESERVED_HIGH = {"IOTLB": 0xF80, "PASID_IOTLB": 0xF80, "DEVICE_TLB": 0xFFE, "WAIT": 0x3, "PASID_DEVICE_TLB": 0x7FE,
                 "PAGE_GROUP_RESPONSE": 0xFFFF_FFFF_FFFF_F003}
ENTRIES = (
    (e.ROOT_ENTRY,             ("CTP:63-12 P:0", "")),
    (e.CONTEXT_ENTRY,          ("SLPTPTR:63-12 TT:3-2 FPD:1 P:0", "DID:23-8 AW:2-0")),
    (e.SCALABLE_CONTEXT_ENTRY, ("PASIDDIRPTR:63-12 PDTS:11-9 PRE:4 PASIDE:3 DTE:2 FPD:1 P:0", "RID_PASID:19-0")),
    (e.PASID_DIRECTORY_ENTRY,  ("SMPTBLPTR:63-12 FPD:1 P:0",)),
    (e.PASID_ENTRY,            ("SLPTPTR:63-12 SLADE:9 PGTT:8-6 AW:4-2 FPD:1 P:0", "PAT:63-32 CD:25 EMTE:26 EMT:29-27 PCD:31 PGSNP:24 PWSNP:23 DID:15-0",
                                "FLPTPTR:63-12 EAFE:7 WPE:4 FLPM:3-2 SRE:0")),
    (e.FIRST_LEVEL_ENTRY,      ("XD:63 PS:7 D:6 A:5 US:2 RW:1 P:0",)),
    (e.SECOND_LEVEL_ENTRY,     ("SNP:11 PS:7 IPAT:6 EMT:5-3 W:1 R:0",)),
    (i.REMAPPED_ENTRY,         ("DST:63-32 V:23-16 IM:15 AVAIL:11-8 DLM:7-5 TM:4 RH:3 DM:2 FPD:1 P:0", "SVT:19-18 SQ:17-16 SID:15-0")),
    (i.POSTED_ENTRY,           ("PDAL:63-38 VV:23-16 IM:15 URG:14 AVAIL:11-8 FPD:1 P:0", "PDAH:63-32 SVT:19-18 SQ:17-16 SID:15-0")),
    (i.DESCRIPTOR,             ("", "", "", "", "NDST:63-32 NV:23-16 SN:1 ON:0")),
)
# Reserved bits of whole entries as QEMU checks them, but for those beyond the host's addresses.
ENTRY_RESERVED = (
    (e.ROOT_ENTRY, 0, 0xFFE), (e.CONTEXT_ENTRY, 0, 0xFF0), (e.CONTEXT_ENTRY, 1, 0xFFFF_FFFF_FF00_0080),
    (e.SCALABLE_CONTEXT_ENTRY, 0, 0x1E0), (e.SCALABLE_CONTEXT_ENTRY, 1, 0xFFFF_FFFF_FFE0_0000),
)
# What Linux prints for a code, in this project's names; codes of interrupt remapping and of legacy mode also QEMU, Xen.
CODES = {
    0x01: "ROOT_NOT_PRESENT",          0x02: "CONTEXT_NOT_PRESENT",         0x03: "CONTEXT_INVALID",
    0x04: "BEYOND_MGAW",               0x05: "NO_WRITE",                    0x06: "NO_READ",
    0x07: "SECOND_LEVEL_ACCESS",       0x08: "ROOT_ACCESS",                 0x09: "CONTEXT_ACCESS",
    0x0A: "ROOT_RESERVED",             0x0B: "CONTEXT_RESERVED",            0x0C: "SECOND_LEVEL_RESERVED",
    0x0D: "TYPE_BLOCKED",              0x0E: "INTERRUPT_ADDRESS",           0x20: "INTERRUPT_RESERVED",
    0x21: "INTERRUPT_INDEX",           0x22: "IRTE_NOT_PRESENT",            0x23: "IRTE_ACCESS",
    0x24: "IRTE_RESERVED",             0x25: "COMPATIBILITY_BLOCKED",       0x26: "INTERRUPT_SOURCE",
    0x30: "INVALID_ROOT_TABLE",        0x31: "LEGACY_PASID",                0x32: "LEGACY_PAGE_REQUEST",
    0x38: "SCALABLE_ROOT_ACCESS",      0x39: "SCALABLE_ROOT_NOT_PRESENT",   0x3A: "SCALABLE_ROOT_RESERVED",
    0x40: "SCALABLE_CONTEXT_ACCESS",   0x41: "SCALABLE_CONTEXT_NOT_PRESENT", 0x42: "SCALABLE_CONTEXT_RESERVED",
    0x43: "SCALABLE_CONTEXT_INVALID",  0x44: "DEVICE_TLB_DISABLED",         0x45: "PASID_DISABLED",
    0x46: "PASID_BEYOND_DIRECTORY",    0x47: "PAGE_REQUEST_DISABLED",       0x48: "RID_PASID_BEYOND_DIRECTORY",
    0x50: "DIRECTORY_ACCESS",          0x51: "DIRECTORY_NOT_PRESENT",       0x52: "DIRECTORY_RESERVED",
    0x58: "PASID_ACCESS",              0x59: "PASID_NOT_PRESENT",           0x5A: "PASID_RESERVED",
    0x5B: "PASID_INVALID",             0x5C: "EXECUTE_DISABLED",            0x5D: "SUPERVISOR_DISABLED",
    0x70: "FIRST_LEVEL_ACCESS",        0x71: "FIRST_LEVEL_NOT_PRESENT",     0x72: "FIRST_LEVEL_RESERVED",
    0x73: "FIRST_LEVEL_TOP_ACCESS",    0x74: "FIRST_LEVEL_BEYOND",          0x75: "NESTED_NO_READ_TOP",
    0x76: "NESTED_NO_READ",            0x77: "NESTED_NO_WRITE",             0x78: "SCALABLE_SECOND_ACCESS",
    0x79: "SCALABLE_SECOND_NOT_PRESENT", 0x7A: "SCALABLE_SECOND_RESERVED",  0x7B: "SCALABLE_SECOND_TOP_ACCESS",
    0x7C: "SECOND_FLAGS_NOT_SNOOPED",  0x80: "NOT_CANONICAL",               0x81: "SUPERVISOR_PAGE",
    0x82: "NO_EXECUTE",                0x83: "SCALABLE_BEYOND_MGAW",        0x84: "NESTED_BEYOND",
    0x85: "SCALABLE_NO_WRITE",         0x86: "SCALABLE_NO_READ",            0x87: "SCALABLE_INTERRUPT_ADDRESS",
    0x90: "FIRST_FLAGS_NOT_SNOOPED",   0x91: "FIRST_FLAGS_FAILED",          # 0x0E and 0x91: QEMU only
}
# QEMU's list of qualified faults. It has 0x50 and 0x58 as not qualified, which its reviewers questioned: the context entry,
# which has been read by then, has an FPD of its own. Here both are qualified.
QUALIFIED = {0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x0C, 0x0D, 0x0E, 0x51, 0x59, 0x5B, 0x70, 0x71, 0x72, 0x73, 0x80, 0x81,
             0x85, 0x87, 0x91}
NOT_QUALIFIED = {0x01, 0x08, 0x09, 0x0A}
CONSTANTS = (
    (i.QUALIFIERS, (0xFFFF, 0xFFFB, 0xFFF9, 0xFFF8)), ((i.SVT_NONE, i.SVT_SOURCE, i.SVT_BUS), (0, 1, 2)),
    ((e.PGTT_FIRST, e.PGTT_SECOND, e.PGTT_NESTED, e.PGTT_PASS_THROUGH), (1, 2, 3, 4)),
    ((e.TT_UNTRANSLATED, e.TT_ALL, e.TT_PASS_THROUGH), (0, 1, 2)),
    ((d.RESPONSE_SUCCESS, d.RESPONSE_INVALID, d.RESPONSE_FAILURE), (0, 1, 15)), (d.PAGE_REQUEST_TYPE, 1),
    ((sp.VCMD_ALLOCATE, sp.VCMD_FREE, sp.VC_SUCCESS, sp.VC_NO_PASID), (1, 2, 0, 16)), (sp.VC_OPERAND, 16),  # Linux
    ((sp.INTERRUPT_FIRST, sp.INTERRUPT_LAST), (0xFEE0_0000, 0xFEEF_FFFF)),
    (e.ADJUSTED_WIDTHS, {1: 39, 2: 48, 3: 57}),
    (d.PAGE_REQUEST_LOW, sp.bits("TYPE:7-0 PP:8 RID:31-16 PASID:51-32 EXE:52 PM:53")),
    (d.PAGE_REQUEST_HIGH, sp.bits("R:0 W:1 LPIG:2 PRGI:11-3 ADDR:63-12")),
)
# fmt: on


def places(fields: tuple[sp.Bits, ...]) -> set[tuple[str, int, int]]:
    return {(each.name, each.low, each.high) for each in fields}


@pytest.mark.parametrize(("name", "offset"), OFFSETS.items())
def test_a_register_is_where_drivers_look_for_it(name: str, offset: int) -> None:
    assert sp.register(name).offset == offset


@pytest.mark.parametrize(("name", "text"), FIELDS.items())
def test_a_field_of_a_register_is_where_drivers_look_for_it(name: str, text: str) -> None:
    assert places(sp.bits(text)) <= places(sp.register(name).fields)


def test_a_fault_record_has_its_fields_where_drivers_look_for_them() -> None:
    assert places(sp.bits(FAULT_RECORD)) <= places(sp.FAULT_RECORD_HIGH)


@pytest.mark.parametrize("row", d.DESCRIPTORS, ids=lambda row: row.name)
def test_a_descriptor_is_laid_out_as_drivers_write_it(row: d.Descriptor) -> None:
    number, low, high = DESCRIPTORS[row.name]
    assert row.type == number
    assert places(row.low) == places(sp.bits(f"{low} TYPE:3-0 TYPE_HIGH:11-9"))
    assert places(row.high) == places(sp.bits(high))
    assert tuple(row.granularities) == GRANULARITIES.get(row.name, tuple(row.granularities))
    mask = (1 << 64) - 1
    assert row.reserved(0) & mask == RESERVED_LOW.get(row.name, row.reserved(0) & mask)
    assert row.reserved(1) & mask == RESERVED_HIGH.get(row.name, row.reserved(1) & mask)


@pytest.mark.parametrize(("entry", "words"), ENTRIES, ids=lambda each: getattr(each, "title", ""))
def test_an_entry_is_laid_out_as_drivers_write_it(entry: e.Entry, words: tuple[str, ...]) -> None:
    for text, fields in zip(words, entry.words, strict=False):
        assert places(sp.bits(text)) <= places(fields)


@pytest.mark.parametrize(("entry", "word", "reserved"), ENTRY_RESERVED)
def test_reserved_bits_of_an_entry_are_those_that_an_emulator_checks(entry: e.Entry, word: int, reserved: int) -> None:
    assert entry.reserved(word) & ((1 << 64) - 1) == reserved


def test_a_fault_has_the_code_that_drivers_print() -> None:
    assert {each.code: each.name for each in f.FAULTS if each.code in CODES} == CODES
    assert {each.code for each in f.FAULTS} - set(CODES) == {0x27, 0x28, 0x29, 0x33, 0x7D}


def test_faults_are_qualified_as_an_emulator_has_them() -> None:
    qualified = {each.code for each in f.FAULTS if each.qualified}
    assert qualified >= QUALIFIED
    assert not qualified & NOT_QUALIFIED


@pytest.mark.parametrize(("ours", "published"), CONSTANTS)
def test_numbers_that_fields_hold_are_the_published_ones(ours: object, published: object) -> None:
    assert ours == published
