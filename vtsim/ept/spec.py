"""What the manual says about paging entries, in both dimensions; nothing here acts.

SDM: "4-Level Paging and 5-Level Paging"; "EPT Translation Mechanism".
"""

from __future__ import annotations

from typing import Final

# fmt: off
# --- guest (and native) paging entries ----------------------------------------------------------------------
PTE_PRESENT: Final        = 1 << 0
PTE_WRITE: Final          = 1 << 1
PTE_USER: Final           = 1 << 2
PTE_PWT: Final            = 1 << 3
PTE_PCD: Final            = 1 << 4
PTE_ACCESSED: Final       = 1 << 5
PTE_DIRTY: Final          = 1 << 6
PTE_LARGE: Final          = 1 << 7
PTE_GLOBAL: Final         = 1 << 8
# by number of the bit: PWT, which PCD follows; PAT of a page of 4 KiB, of a larger one
PTE_WRITE_THROUGH, PTE_PAT, PTE_PAT_LARGE = 3, 7, 12
PTE_SWITCHES: Final       = 1 << 11               # agile paging only: the next table is the guest's own
PTE_NO_EXECUTE: Final     = -(1 << 63)            # bit 63 of a two's-complement word

# --- page-fault error code ----------------------------------------------------------------------------------
PF_PRESENT: Final         = 1 << 0
PF_WRITE: Final           = 1 << 1
PF_USER: Final            = 1 << 2
PF_RESERVED: Final        = 1 << 3
PF_FETCH: Final           = 1 << 4
PF_KEY: Final             = 1 << 5

# --- EPT entries --------------------------------------------------------------------------------------------
EPT_READ: Final           = 1 << 0
EPT_WRITE: Final          = 1 << 1
EPT_EXECUTE: Final        = 1 << 2
EPT_TYPE: Final           = 3                     # memory type: bits 5:3 of a leaf
EPT_IGNORE_PAT: Final     = 1 << 6                # of a leaf: the guest's PAT does not count
EPT_LARGE: Final          = 1 << 7
EPT_ACCESSED: Final       = 1 << 8
EPT_DIRTY: Final          = 1 << 9
EPT_RWX: Final            = 7
EPT_SUPPRESS_VE: Final    = -(1 << 63)            # of a leaf or what is not present: no virtualization exception
EPTP_ACCESSED_DIRTY: Final = 1 << 6
EPTP_LEVELS: Final = 3          # levels less one: bits 5:3
EPTP_TYPE: Final = 7            # memory type of EPT's own structures: bits 2:0, uncacheable (0) or
EPTP_WRITE_BACK: Final = 6
MEMORY_TYPES: Final       = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB"}
LEGAL_TYPES: Final        = 0b0111_0011           # bit n set: memory type n is legal in an EPT leaf

# --- exit qualification of EPT violations -------------------------------------------------------------------
Q_READ: Final             = 1 << 0
Q_WRITE: Final            = 1 << 1
Q_FETCH: Final            = 1 << 2
Q_RIGHTS: Final           = 3                     # the entry's read, write, execute rights in bits 5:3
Q_RIGHTS_ANY: Final       = EPT_RWX << 3          # any of them
Q_EXECUTE_USER: Final     = 1 << 6                # the right to execute at user-mode linear addresses
Q_LINEAR_VALID: Final     = 1 << 7
Q_FINAL: Final            = 1 << 8                # the access itself, not one to a paging structure
Q_USER: Final             = 1 << 9                # 11:9 of the linear address, on processors with that information
Q_WRITABLE: Final         = 1 << 10
Q_NO_EXECUTE: Final       = 1 << 11
Q_NMI_UNBLOCKING: Final   = 1 << 12

ADDRESS: Final            = 0x000F_FFFF_FFFF_F000 # bits 51:12
PDPT_ADDRESS: Final       = 0xFFFF_FFE0             # of CR3 with PAE paging
PAGE_SIZES: Final         = (4096, 2 << 20, 1 << 30)
PAGE_NAMES: Final         = ("4 KiB", "2 MiB", "1 GiB")
# fmt: on
