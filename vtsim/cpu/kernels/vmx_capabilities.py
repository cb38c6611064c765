"""What the capability MSRs of this processor allow: VMCS components, CR0 and CR4, addresses, EPTPs.

SDM: "VMX Capability Reporting Facility".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import A_FIELDS
from vtsim.cpu import slots as s
from vtsim.vmcs.capabilities import (
    BASIC,
    CR0_FIXED0,
    CR0_FIXED1,
    CR4_FIXED0,
    CR4_FIXED1,
    EPT_VPID_CAP,
    FIELD_INDEXES,
    MISC,
    PROCBASED_CTLS2,
)
from vtsim.vmcs.kernels.values import capability

# fmt: off
# bits of IA32_VMX_EPT_VPID_CAP
CAP_INVEPT, CAP_INVEPT_TYPES = 20, 24              # type n is bit 24 + n
CAP_INVVPID, CAP_INVVPID_TYPES = 32, 40                                                # type n is bit 40 + n
ADDRESSES_32_BIT, MISC_WRITES_EXIT_INFORMATION = 48, 29
HIGH_HALF: int = 1                 # the access type of an encoding
ENCODING_BITS: int = 0x6FFF        # bit 12 and what is above bit 14 are zero in every encoding
BEYOND_52: int = -(1 << 52)
HIGH_32: int = -(1 << 32)
# fmt: on


@kernel
def secondary_allowed(a: Arena, mask: int) -> bool:
    """May a secondary processor-based control be 1 on this processor?"""
    return (capability(a, PROCBASED_CTLS2) >> 32) & mask != 0


@kernel
def ept_vpid(a: Arena, bit: int) -> bool:
    """A bit of IA32_VMX_EPT_VPID_CAP.

    SDM: "VPID and EPT Capabilities".
    """
    return (capability(a, EPT_VPID_CAP) >> bit) & 1 != 0


@kernel
def field_slot(a: Arena, encoding: int) -> int:
    """The slot of the VMCS component that an encoding names on this processor, 0 if it has none.

    SDM: "VMREAD, VMWRITE, and Encodings of VMCS Fields"; "Field Encoding in VMCS".
    """
    if encoding & ~ENCODING_BITS:
        return 0
    index = (encoding >> 1) & 0x1FF
    width = encoding >> 13
    if index >= FIELD_INDEXES or (encoding & HIGH_HALF and width != 1):
        return 0
    return a[a[A_FIELDS] + (width << 2 | (encoding >> 10) & 3) * FIELD_INDEXES + index]


@kernel
def beyond_addresses(m: Record, a: Arena) -> int:
    """The bits of a 64-bit word that no physical address of a VMX structure may have.

    SDM: "Basic VMX Information".
    """
    if (capability(a, BASIC) >> ADDRESSES_32_BIT) & 1:
        return HIGH_32
    return m[s.RESERVED_BITS] | BEYOND_52


@kernel
def cr0_supported(a: Arena, value: int, exempt: int) -> bool:
    """May CR0 have this value in VMX operation? `exempt` are bits that may be 0 whatever IA32_VMX_CR0_FIXED0 says.

    SDM: "VMX-Fixed Bits in CR0"; "Restrictions on VMX Operation".
    """
    must = capability(a, CR0_FIXED0) & ~exempt
    return value & must == must and value & ~capability(a, CR0_FIXED1) == 0


@kernel
def cr4_supported(a: Arena, value: int) -> bool:
    """May CR4 have this value in VMX operation?

    SDM: "VMX-Fixed Bits in CR4"; "Restrictions on VMX Operation".
    """
    must = capability(a, CR4_FIXED0)
    return value & must == must and value & ~capability(a, CR4_FIXED1) == 0


@kernel
def exit_information_writable(a: Arena) -> bool:
    """Does VMWRITE reach read-only fields too?

    SDM: "Miscellaneous Data".
    """
    return (capability(a, MISC) >> MISC_WRITES_EXIT_INFORMATION) & 1 != 0
