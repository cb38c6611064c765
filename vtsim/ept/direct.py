"""Direct page tables of a paravirtual guest: its hypercalls, and the word that the hypervisor keeps of each frame.

The guest's tables hold host-physical addresses and are the processor's own. Each frame has one type at a time: a table
of one level, or memory that some entry makes writable; a count says how many entries rely on it. So no entry leads to
a frame of somebody else, and no table is writable.

A request is two words: an address or value with its kind in the low bits of the first, and a value. Requests come in
registers, or many of them in the shared page.
"""

from __future__ import annotations

from typing import Final

from vtsim.ept.spec import ADDRESS, PTE_NO_EXECUTE

# fmt: off
# --- hypercalls: number in RAX; RAX <- how many requests were carried out -----------------------------------------
CALL_REQUEST, CALL_MULTI = 1, 2                     # one request in RDI, RSI; RSI requests in the shared page
# --- requests: low bits of the first word ----------------------------------------------------------------------------
UPDATE: Final     = 0                               # the entry at this host-physical address <- second word
FLUSH_PAGE: Final = 1                               # drop translations of the linear address in the second word
FLUSH_ALL: Final  = 2                               # drop all but global translations
PIN: Final        = 3                               # the frame at the address in the second word is a root from now on
UNPIN: Final      = 4                               # it is not any more
LOAD: Final       = 5                               # the second word becomes CR3; its bit 63 keeps translations
KIND: Final       = 7
# --- the shared page ----------------------------------------------------------------------------------------------
SHARED_COUNT: Final    = 0                          # requests that wait, of no interest to the hypervisor
SHARED_REQUESTS: Final = 64
REQUEST_BYTES: Final   = 16
BATCH_LIMIT: Final     = 240
# --- CPUID: what the hypervisor offers -----------------------------------------------------------------------------
FEATURE_LEAF: Final = 0x40000001
DIRECT_TABLES: Final = 1 << 0                       # of its EAX

# --- the word of a frame: count (32 bits) | type (3) | owner, VM number plus 1, from bit 40 on ------------------------
TYPE, TYPE_MASK, OWNER = 32, 7, 40
NO_TYPE, WRITABLE = 0, 5                            # 1 to 4: a table of that level
COUNT: Final = 0xFFFF_FFFF
# what an entry may have: address, P, W, U, A, D, G, the bits that processors ignore, XD
LEGAL: Final = ADDRESS | 0xF67 | PTE_NO_EXECUTE
KERNEL_HALF: Final = 256                            # root entries from here on are the same in every root
# fmt: on
