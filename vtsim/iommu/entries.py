"""Root, context and PASID structures and the paging entries of both levels: what their bits mean.

Each table lists the fields of an entry's words; a bit without a field is reserved. Address bits beyond the host address
width are reserved as well; kernels add them.

VT-d: "Translation Structure Formats".
"""

from __future__ import annotations

from typing import Final

import attrs

from vtsim.base.memory import signed
from vtsim.iommu.spec import Bits, bits


@attrs.frozen
class Entry:
    """One kind of entry: its title, its words' fields, and how many of them a table page holds."""

    title: str
    words: tuple[tuple[Bits, ...], ...]

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return 8 * len(self.words)

    def reserved(self, word: int) -> int:
        """The bits of a word that no field names, as a signed word."""
        named = 0
        for field in self.words[word]:
            named |= field.mask
        return signed(~named)


# fmt: off
ROOT_ENTRY: Final = Entry("Root Entry", (
    bits("CTP:63-12 P:0"),
    (),
))
SCALABLE_ROOT_ENTRY: Final = Entry("Scalable-Mode Root Entry", (
    bits("LCTP:63-12 LP:0"),
    bits("UCTP:63-12 UP:0"),
))
CONTEXT_ENTRY: Final = Entry("Context Entry", (
    bits("SLPTPTR:63-12 TT:3-2 FPD:1 P:0"),
    bits("DID:23-8 IGN:6-3 AW:2-0"),
))
SCALABLE_CONTEXT_ENTRY: Final = Entry("Scalable-Mode Context Entry", (
    bits("PASIDDIRPTR:63-12 PDTS:11-9 PRE:4 PASIDE:3 DTE:2 FPD:1 P:0"),
    bits("RID_PRIV:20 RID_PASID:19-0"),
    (),
    (),
))
PASID_DIRECTORY_ENTRY: Final = Entry("Scalable-Mode PASID Directory Entry", (
    bits("SMPTBLPTR:63-12 FPD:1 P:0"),
))
PASID_ENTRY: Final = Entry("Scalable-Mode PASID Table Entry", (
    bits("SLPTPTR:63-12 SLADE:9 PGTT:8-6 SLEE:5 AW:4-2 FPD:1 P:0"),
    bits("PAT:63-32 PCD:31 PWT:30 EMT:29-27 EMTE:26 CD:25 PGSNP:24 PWSNP:23 DID:15-0"),
    bits("FLPTPTR:63-12 EAFE:7 SMEP:6 NXE:5 WPE:4 FLPM:3-2 ERE:1 SRE:0"),
    (), (), (), (), (),
))
FIRST_LEVEL_ENTRY: Final = Entry("First-Stage Paging Entries", (
    bits("XD:63 IGN:62-52 ADDR:51-12 EA:10 IGN:11-11 IGN:9-8 PS:7 D:6 A:5 PCD:4 PWT:3 US:2 RW:1 P:0"),
))
SECOND_LEVEL_ENTRY: Final = Entry("Second-Stage Paging Entries", (
    bits("IGN:63 IGN:61-52 ADDR:51-12 SNP:11 IGN:10 D:9 A:8 PS:7 IPAT:6 EMT:5-3 X:2 W:1 R:0"),
))
ENTRIES: Final = (ROOT_ENTRY, SCALABLE_ROOT_ENTRY, CONTEXT_ENTRY, SCALABLE_CONTEXT_ENTRY, PASID_DIRECTORY_ENTRY,
                  PASID_ENTRY, FIRST_LEVEL_ENTRY, SECOND_LEVEL_ENTRY)

# --- what kernels name ------------------------------------------------------------------------------------------------
PRESENT: Final               = 1 << 0
FPD: Final                   = 1 << 1
POINTER: Final               = signed(0xFFFF_FFFF_FFFF_F000)
# context entry
TT_SHIFT: Final              = 2
TT_UNTRANSLATED, TT_ALL, TT_PASS_THROUGH, TT_RESERVED = range(4)
CONTEXT_AW: Final            = 7
CONTEXT_DID: Final           = 8
# scalable-mode context entry
DTE, PASIDE, PRE             = 1 << 2, 1 << 3, 1 << 4
PDTS_SHIFT: Final            = 9
RID_PASID: Final             = (1 << 20) - 1
RID_PRIV: Final              = 1 << 20
# PASID entry
PASID_AW_SHIFT: Final        = 2
SLEE: Final                  = 1 << 5
PGTT_SHIFT: Final            = 6
PGTT_FIRST, PGTT_SECOND, PGTT_NESTED, PGTT_PASS_THROUGH = 1, 2, 3, 4
SLADE: Final                 = 1 << 9
PWSNP, PGSNP                 = 1 << 23, 1 << 24
CD, EMTE, EMT_SHIFT, PAT_SHIFT = 1 << 25, 1 << 26, 27, 32
MEMORY_TYPING: Final         = -CD              # CD, EMTE, EMT, PWT, PCD and PAT
SRE, ERE, FLPM_SHIFT, WPE, NXE, SMEP, EAFE = 1 << 0, 1 << 1, 2, 1 << 4, 1 << 5, 1 << 6, 1 << 7
# paging entries
ADDRESS: Final               = 0x000F_FFFF_FFFF_F000
FL_RW, FL_US, FL_A, FL_D, FL_PS, FL_EA = 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7, 1 << 10
FL_XD: Final                 = -(1 << 63)
SL_R, SL_W, SL_X, SL_PS, SL_A, SL_D, SL_SNP = 1 << 0, 1 << 1, 1 << 2, 1 << 7, 1 << 8, 1 << 9, 1 << 11
SL_EMT_SHIFT, SL_IPAT        = 3, 1 << 6
SL_RESERVED: Final           = 1 << 62          # the transient-mapping bit of older editions
FL_PWT_SHIFT, FL_PAT_LARGE   = 3, 1 << 12
# words with their reserved bits
ROOT_RESERVED_0              = ROOT_ENTRY.reserved(0)
ROOT_RESERVED_1              = ROOT_ENTRY.reserved(1)
SCALABLE_ROOT_RESERVED       = SCALABLE_ROOT_ENTRY.reserved(0)
CONTEXT_RESERVED_0           = CONTEXT_ENTRY.reserved(0)
CONTEXT_RESERVED_1           = CONTEXT_ENTRY.reserved(1)
SCALABLE_CONTEXT_RESERVED_0  = SCALABLE_CONTEXT_ENTRY.reserved(0)
SCALABLE_CONTEXT_RESERVED_1  = SCALABLE_CONTEXT_ENTRY.reserved(1)
DIRECTORY_RESERVED           = PASID_DIRECTORY_ENTRY.reserved(0)
PASID_RESERVED_0             = PASID_ENTRY.reserved(0)
PASID_RESERVED_1             = PASID_ENTRY.reserved(1)
PASID_RESERVED_2             = PASID_ENTRY.reserved(2)
# fmt: on

ADJUSTED_WIDTHS: Final = {1: 39, 2: 48, 3: 57}  # AW, and the bit of SAGAW: width; the walk has AW + 2 levels
TYPES: Final = {
    PGTT_FIRST: "first-level",
    PGTT_SECOND: "second-level",
    PGTT_NESTED: "nested",
    PGTT_PASS_THROUGH: "pass-through",
}
