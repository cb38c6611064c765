"""What an access may do: rights of paging entries, supervisor-mode access prevention and protection keys.

A data word of a TLB has one bit for each (access, ring) pair that is allowed whatever comes. What also depends on
RFLAGS.AC or on PKRU, which change without any invalidation, is kept apart as conditional, with the page's key.

SDM: "Determination of Access Rights"; "Protection Keys"; "Page-Fault Exceptions".
Not modelled: protection keys of supervisor-mode pages (IA32_PKRS); accesses that are supervisor-mode implicitly, which
RFLAGS.AC lets through as it does explicit ones.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu.kernels.contexts import CR4_SMEP
from vtsim.cpu.slots import CR0, CR4, FAULT_NESTED, PKRU, RFLAGS, VMCS
from vtsim.ept.spec import PF_KEY, PF_PRESENT
from vtsim.vmcs import slots as v

# fmt: off
READ, WRITE, EXECUTE = range(3)
CR0_WP: int = 1 << 16
CR4_SMAP, CR4_PKE = 1 << 21, 1 << 22
RFLAGS_AC: int = 1 << 18
# rights carried by paging-structure caches
UP_WRITE, UP_USER, UP_NX, UP_HOST_WRITE = 1, 2, 4, 8
UP_NESTED: int = 1 << 7  # agile paging: the table is the guest's own (bits 6:4 are its level)
UP_UNCACHED: int = 1 << 8  # the table is read from memory itself
# data word: address | permissions (5:0) | global (6) | page size (8:7) | key (55:52) | conditional permissions (59:56)
DATA_GLOBAL, DATA_SIZE, DATA_KEY, DATA_CONDITIONAL = 6, 7, 52, 56
KEY_SHIFT, NO_KEY = 59, -1     # bits 62:59 of an entry that maps a page
SUPERVISOR_DATA, ANY_DATA, FETCHES = 0b0101, 0b1111, 0b110000
# fmt: on


@kernel
def conditions(m: Record) -> int:
    """The bits of CR0 and CR4 that the permissions of data words depend on.

    Where they change, MOV to CR0 and CR4 drop translations, and VM entry those of its VPID: a processor looks at these
    bits at each access.

    SDM: "Determination of Access Rights".
    """
    return m[CR0] & CR0_WP | m[CR4] & (CR4_SMEP | CR4_SMAP | CR4_PKE)


@kernel
def key_refuses(m: Record, access: int, user: int, key: int) -> bool:
    """Does PKRU forbid a data access to a user-mode page with this key?

    SDM: "Protection Keys".
    """
    if key < 0 or m[CR4] & CR4_PKE == 0:
        return False
    rights = m[PKRU] >> (2 * key)
    if rights & 1:
        return True
    return access == WRITE and rights & 2 != 0 and (user != 0 or m[CR0] & CR0_WP != 0)


@kernel
def write_protected(m: Record, a: Arena) -> bool:
    """Does CR0.WP hold where the walk stands: in the guest's own tables of agile paging it is the guest's that counts.

    The processor has it set, for shadow tables; what the guest believes is in the read shadow.
    """
    return (a[m[VMCS] + v.CR0_READ_SHADOW] if m[FAULT_NESTED] else m[CR0]) & CR0_WP != 0


@kernel
def refusal(m: Record, access: int, user: int, rights: int, key: int, protected: bool) -> int:
    """What a page fault adds to its error code where these rights do not allow an access, or 0 where they do.

    `protected`: does CR0.WP keep ring 0 from writing to read-only pages?

    SDM: "Determination of Access Rights"; "Page-Fault Exceptions".
    """
    if rights & UP_USER and access != EXECUTE and m[CR4] & (CR4_SMAP | CR4_PKE):
        if key_refuses(m, access, user, key):
            return PF_PRESENT | PF_KEY
        if user == 0 and m[CR4] & CR4_SMAP and m[RFLAGS] & RFLAGS_AC == 0:
            return PF_PRESENT
    if user and rights & UP_USER == 0:
        return PF_PRESENT
    if access == WRITE and rights & UP_WRITE == 0 and (user or protected):
        return PF_PRESENT
    if access == EXECUTE and (rights & UP_NX or (user == 0 and rights & UP_USER and m[CR4] & CR4_SMEP)):
        return PF_PRESENT
    return 0


@kernel
def permissions_of(m: Record, rights: int, dirty: bool, protected: bool) -> int:
    """The permission bits that a translation with these rights has, with CR0.WP or without."""
    permissions = 1 | 1 << 4  # read, execute by ring 0
    if rights & UP_USER:
        permissions |= 2 | 1 << 5
        if m[CR4] & CR4_SMEP:
            permissions &= ~(1 << 4)
    if rights & UP_NX:
        permissions &= ANY_DATA
    if dirty:
        if rights & UP_WRITE or not protected:
            permissions |= 1 << 2
        if rights & UP_WRITE and rights & UP_USER:
            permissions |= 1 << 3
    return permissions


@kernel
def with_conditions(m: Record, permissions: int, rights: int, key: int) -> int:
    """The permission bits of a data word, those apart that RFLAGS.AC and PKRU decide at each access."""
    if rights & UP_USER == 0 or m[CR4] & (CR4_SMAP | CR4_PKE) == 0:
        return permissions
    held = ANY_DATA if key >= 0 and m[CR4] & CR4_PKE else SUPERVISOR_DATA
    found = permissions & ~held | (permissions & held) << DATA_CONDITIONAL
    return found | key << DATA_KEY if held == ANY_DATA else found


@kernel
def allowed_now(m: Record, data: int, access: int, user: int) -> bool:
    """Do RFLAGS.AC and PKRU, as they are now, allow what a data word allows under conditions only?"""
    if access == EXECUTE or (data >> (DATA_CONDITIONAL + access * 2 + user)) & 1 == 0:
        return False
    if user == 0 and m[CR4] & CR4_SMAP and m[RFLAGS] & RFLAGS_AC == 0:
        return False
    return not key_refuses(m, access, user, (data >> DATA_KEY) & 15)
