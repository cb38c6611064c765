"""What one processor's VMX can do, as its capability MSRs say it.

SDM: "VMX Capability Reporting Facility"; "Algorithms for Determining VMX Capabilities".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from vtsim.base.errors import ConfigError, ModelError
from vtsim.vmcs.controls import CONTROLS, SECONDARY, SECONDARY_EXIT, TERTIARY, VM_FUNCTION, WORDS, ControlWord
from vtsim.vmcs.fields import FIELDS, SLOT, Area, Field, Width

FIRST_CAPABILITY: Final = 0x480
CAPABILITY_MSRS: Final = 20
BASIC: Final = 0x480
MISC: Final = 0x485
CR0_FIXED0: Final = 0x486
CR0_FIXED1: Final = 0x487
CR4_FIXED0: Final = 0x488
CR4_FIXED1: Final = 0x489
VMCS_ENUM: Final = 0x48A
PROCBASED_CTLS2: Final = 0x48B
EPT_VPID_CAP: Final = 0x48C

MSR_NAMES: Final[dict[int, str]] = {
    BASIC: "IA32_VMX_BASIC",
    0x481: "IA32_VMX_PINBASED_CTLS",
    0x482: "IA32_VMX_PROCBASED_CTLS",
    0x483: "IA32_VMX_EXIT_CTLS",
    0x484: "IA32_VMX_ENTRY_CTLS",
    MISC: "IA32_VMX_MISC",
    CR0_FIXED0: "IA32_VMX_CR0_FIXED0",
    CR0_FIXED1: "IA32_VMX_CR0_FIXED1",
    CR4_FIXED0: "IA32_VMX_CR4_FIXED0",
    CR4_FIXED1: "IA32_VMX_CR4_FIXED1",
    VMCS_ENUM: "IA32_VMX_VMCS_ENUM",
    PROCBASED_CTLS2: "IA32_VMX_PROCBASED_CTLS2",
    EPT_VPID_CAP: "IA32_VMX_EPT_VPID_CAP",
    0x48D: "IA32_VMX_TRUE_PINBASED_CTLS",
    0x48E: "IA32_VMX_TRUE_PROCBASED_CTLS",
    0x48F: "IA32_VMX_TRUE_EXIT_CTLS",
    0x490: "IA32_VMX_TRUE_ENTRY_CTLS",
    0x491: "IA32_VMX_VMFUNC",
    0x492: "IA32_VMX_PROCBASED_CTLS3",
    0x493: "IA32_VMX_EXIT_CTLS2",
}


FIELD_INDEXES: Final = 64
"""Indexes of VMCS fields are below this, so that width, area and index of a field find it in one small table."""


@attrs.frozen
class Feature:
    """One thing a processor may support: a bit of one capability MSR."""

    name: str
    msr: int
    bit: int


# fmt: off
FEATURES: Final[dict[str, Feature]] = {feature.name: feature for feature in (
    *(Feature(c.name, c.word.msr, c.bit + 32 if c.word.bits == 32 else c.bit) for c in CONTROLS),
    Feature("PHYSICAL_ADDRESSES_32_BIT",              BASIC,        48),
    Feature("DUAL_MONITOR",                           BASIC,        49),
    Feature("INS_OUTS_INFORMATION",                   BASIC,        54),
    Feature("TRUE_CONTROLS",                          BASIC,        55),
    Feature("OPTIONAL_ERROR_CODE",                    BASIC,        56),
    Feature("NESTED_EXCEPTION",                       BASIC,        58),
    Feature("SAVE_EFER_LMA",                          MISC,          5),
    Feature("ACTIVITY_HLT",                           MISC,          6),
    Feature("ACTIVITY_SHUTDOWN",                      MISC,          7),
    Feature("ACTIVITY_WAIT_FOR_SIPI",                 MISC,          8),
    Feature("PT_IN_VMX_OPERATION",                    MISC,         14),
    Feature("RDMSR_SMBASE_IN_SMM",                    MISC,         15),
    Feature("VMXOFF_UNBLOCKS_SMI",                    MISC,         28),
    Feature("VMWRITE_EXIT_INFORMATION",               MISC,         29),
    Feature("ZERO_LENGTH_INJECTION",                  MISC,         30),
    Feature("EPT_EXECUTE_ONLY",                       EPT_VPID_CAP,  0),
    Feature("EPT_WALK_LENGTH_4",                      EPT_VPID_CAP,  6),
    Feature("EPT_WALK_LENGTH_5",                      EPT_VPID_CAP,  7),
    Feature("EPT_UNCACHEABLE",                        EPT_VPID_CAP,  8),
    Feature("EPT_WRITE_BACK",                         EPT_VPID_CAP, 14),
    Feature("EPT_2M_PAGES",                           EPT_VPID_CAP, 16),
    Feature("EPT_1G_PAGES",                           EPT_VPID_CAP, 17),
    Feature("INVEPT",                                 EPT_VPID_CAP, 20),
    Feature("EPT_ACCESSED_DIRTY",                     EPT_VPID_CAP, 21),
    Feature("EPT_EXIT_INFORMATION",                   EPT_VPID_CAP, 22),
    Feature("EPT_SUPERVISOR_SHADOW_STACK",            EPT_VPID_CAP, 23),
    Feature("INVEPT_SINGLE_CONTEXT",                  EPT_VPID_CAP, 25),
    Feature("INVEPT_ALL_CONTEXTS",                    EPT_VPID_CAP, 26),
    Feature("INVVPID",                                EPT_VPID_CAP, 32),
    Feature("INVVPID_INDIVIDUAL_ADDRESS",             EPT_VPID_CAP, 40),
    Feature("INVVPID_SINGLE_CONTEXT",                 EPT_VPID_CAP, 41),
    Feature("INVVPID_ALL_CONTEXTS",                   EPT_VPID_CAP, 42),
    Feature("INVVPID_SINGLE_CONTEXT_KEEPING_GLOBALS", EPT_VPID_CAP, 43),
)}

_ACTIVATED_BY: Final[dict[ControlWord, str]] = {
    SECONDARY:      "ACTIVATE_SECONDARY_CONTROLS",
    TERTIARY:       "ACTIVATE_TERTIARY_CONTROLS",
    SECONDARY_EXIT: "EXIT_ACTIVATE_SECONDARY_CONTROLS",
    VM_FUNCTION:    "ENABLE_VM_FUNCTIONS",
}
# fmt: on

_WRITE_BACK: Final = 6 << 50
_CR0_FIXED: Final = 1 << 31 | 1 << 5 | 1 << 0  # PG, NE, PE
_CR4_FIXED: Final = 1 << 13  # VMXE


def _named(word: ControlWord) -> int:
    """Return the bits of a word that have a name, so that they are controls and not reserved."""
    return sum(control.mask for control in CONTROLS if control.word is word)


def _closed(names: set[str]) -> set[str]:
    """Add the controls that activate the words in which the given controls stand."""
    activating = {_ACTIVATED_BY[c.word] for c in CONTROLS if c.name in names and c.word in _ACTIVATED_BY}
    return names if activating <= names else _closed(names | activating)


@attrs.frozen(kw_only=True)
class Capabilities:
    """The VMX capability MSRs of a processor; an MSR it does not have is absent and reads as 0."""

    msrs: Mapping[int, int]

    @classmethod
    def from_features(
        cls,
        features: Iterable[str],
        *,
        revision: int = 1,
        vmcs_bytes: int = 4096,
        cr4_fixed1: int = 0x27FF,
        preemption_timer_shift: int = 0,
        cr3_targets: int = 4,
    ) -> Capabilities:
        """Make the MSRs of a processor that supports the named features and no others."""
        names = set(features)
        for name in sorted(names - set(FEATURES)):
            raise ConfigError.unknown("VMX feature", name, FEATURES)
        names = _closed(names)
        msrs = {
            BASIC: revision | vmcs_bytes << 32 | _WRITE_BACK,
            MISC: preemption_timer_shift | cr3_targets << 16,
            CR0_FIXED0: _CR0_FIXED,
            CR0_FIXED1: 0xFFFF_FFFF,
            CR4_FIXED0: _CR4_FIXED,
            CR4_FIXED1: cr4_fixed1 | _CR4_FIXED,
        }
        for word in WORDS:
            if word.default1:
                msrs[word.msr] = word.default1 | word.default1 << 32
        for name in names:
            feature = FEATURES[name]
            msrs[feature.msr] = msrs.get(feature.msr, 0) | 1 << feature.bit
        if "TRUE_CONTROLS" in names:
            for word in WORDS:
                if word.true_msr is not None:
                    msrs[word.true_msr] = msrs[word.msr] & ~(word.default1 & _named(word))
        highest = max(field.index for field in FIELDS if cls(msrs=msrs).has_field(field))
        return cls(msrs={**msrs, VMCS_ENUM: highest << 1})

    def read(self, msr: int) -> int:
        """Return the raw value of a capability MSR."""
        return self.msrs.get(msr, 0)

    def supports(self, name: str) -> bool:
        """Say whether the processor supports a feature of `FEATURES`; for a control, whether it may be 1."""
        if name not in FEATURES:
            raise ModelError(f"there is no VMX feature {name!r}")
        feature = FEATURES[name]
        return bool(self.read(feature.msr) >> feature.bit & 1)

    def missing(self, names: Iterable[str]) -> tuple[str, ...]:
        """Name those of the given features that the processor lacks, in the given order."""
        return tuple(name for name in names if not self.supports(name))

    @property
    def features(self) -> frozenset[str]:
        """The names of all features that the processor supports."""
        return frozenset(name for name in FEATURES if self.supports(name))

    def has_field(self, field: Field) -> bool:
        """Say whether the processor's VMCS has a field.

        SDM: "Field Encoding in VMCS".
        """
        return not field.needs or any(self.supports(name) for name in field.needs)

    def component_slots(self) -> npt.NDArray[np.int64]:
        """Return the slot of each field this processor has, 0 for the others, by width, area and index."""
        table = np.zeros((len(Width), len(Area), FIELD_INDEXES), np.int64)
        for field in FIELDS:
            if self.has_field(field):
                table[field.width, field.area, field.index] = SLOT[field.name]
        return table.ravel()

    def allowed0(self, word: ControlWord) -> int:
        """Return the bits of a control word that must be 1: those whose 0-setting is not allowed."""
        if word.bits == 64:
            return 0
        true_msr = word.true_msr if self.supports("TRUE_CONTROLS") else None
        return self.read(word.msr if true_msr is None else true_msr) & 0xFFFF_FFFF

    def allowed1(self, word: ControlWord) -> int:
        """Return the bits of a control word that may be 1."""
        value = self.read(word.msr)
        return value if word.bits == 64 else value >> 32

    def adjust(self, word: ControlWord, wanted: int) -> int:
        """Return the nearest legal value of a control word: what must be 1 added, what must be 0 removed."""
        return (wanted | self.allowed0(word)) & self.allowed1(word)

    @property
    def revision(self) -> int:
        """The VMCS revision identifier."""
        return self.read(BASIC) & 0x7FFF_FFFF

    @property
    def vmcs_bytes(self) -> int:
        """How much memory a VMCS region takes."""
        return self.read(BASIC) >> 32 & 0x1FFF

    @property
    def memory_type(self) -> int:
        """The memory type of the VMCS and of what it points to; 6 is write-back."""
        return self.read(BASIC) >> 50 & 0xF

    @property
    def preemption_timer_shift(self) -> int:
        """The VMX-preemption timer counts down whenever this bit of the TSC changes."""
        return self.read(MISC) & 0x1F

    @property
    def cr3_targets(self) -> int:
        """How many CR3-target values there are."""
        return self.read(MISC) >> 16 & 0x1FF

    @property
    def msr_list_entries(self) -> int:
        """How many entries an MSR list should have at most."""
        return 512 * ((self.read(MISC) >> 25 & 7) + 1)

    @property
    def highest_index(self) -> int:
        """The highest index of any VMCS field."""
        return self.read(VMCS_ENUM) >> 1 & 0x1FF

    @property
    def hlat_prefix_bits(self) -> int:
        """The largest HLAT prefix size."""
        return self.read(EPT_VPID_CAP) >> 48 & 0x3F

    def cr0_fixed(self, *, unrestricted_guest: bool = False) -> tuple[int, int]:
        """Return which bits of CR0 must be 1 and which may be 1; an unrestricted guest may clear PE and PG.

        SDM: "VMX-Fixed Bits in CR0"; "Restrictions on VMX Operation".
        """
        must = self.read(CR0_FIXED0)
        return (must & ~(1 << 31 | 1) if unrestricted_guest else must), self.read(CR0_FIXED1)

    def cr4_fixed(self) -> tuple[int, int]:
        """Return which bits of CR4 must be 1 and which may be 1.

        SDM: "VMX-Fixed Bits in CR4".
        """
        return self.read(CR4_FIXED0), self.read(CR4_FIXED1)
