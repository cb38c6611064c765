"""Shadow paging structures: the words of the pool that holds them, of the record of each page, and bits of entries.

A shadow page stands for one page of the guest's tables, in one role (level, rights of the path, paging mode). Entries
are numbered through the pool: page * 512 + index. Every entry in use hangs in one list: a leaf in that of the guest
frame that it maps, an upper entry in that of the shadow page that it leads to. The note of an entry says what is next.

Each vCPU of a VM has words of the pool of its own: its root and mode, and what its last walk found. Shadow pages, lists
and statistics are shared, in the words of the first one.

SDM: "Memory Virtualization".
"""

from __future__ import annotations

from typing import Final

from vtsim.base.words import byte_offsets
from vtsim.ept.spec import PTE_ACCESSED, PTE_PRESENT, PTE_USER, PTE_WRITE

# fmt: off
POOL_WORDS: Final = (
    # name             words  meaning
    ("MODE",              1, "paging mode of the guest: see the modes"),
    ("ROOT",              1, "shadow page of the root in use, plus 1; 0 none"),
    ("CR3",               1, "CR3 that the guest believes in"),
    ("DIRECT",            1, "linear address of host-physical address 0"),
    ("GUEST",             1, "linear address of guest-physical address 0"),
    ("TABLES",            1, "host-physical address of the first shadow page's table; the others follow"),
    ("NOTES",             1, "linear address of the notes, a word for each entry"),
    ("RECORDS",           1, "linear address of the records of shadow pages"),
    ("PAGES",             1, "how many shadow pages there are"),
    ("FREE",              1, "first free shadow page, plus 1; 0 none"),
    ("FREE_COUNT",        1, "how many are free"),
    ("HAND",              1, "where eviction goes on"),
    ("FRAMES",            1, "linear address of the words of guest frames"),
    ("FRAME_COUNT",       1, "how many guest frames there are"),
    ("LARGE",             1, "linear address of the words of 2 MiB of guest memory each"),
    ("LARGE_NX",          1, "must 2 MiB entries be without execute, so that code splits them?"),
    ("BUCKETS",           1, "linear address of the hash table from guest frame to shadow pages"),
    ("PREFETCH",          1, "leaf entries that are filled together; 1 none but the one asked for"),
    ("OUT_OF_SYNC",       1, "may leaf tables be written without an exit until the next synchronization?"),
    ("HOST_ROOT",         1, "host-physical address of the root of the VM's process"),
    ("SLOTS",             1, "linear address of two words: the memory slots, and how many"),
    ("RESERVED",          1, "address bits that are reserved in the guest's entries"),
    ("SWITCHES",          1, "agile paging: linear address of a word for each guest frame: see the switches"),
    ("NESTED",            1, "first guest frame of a table that is nested, plus 1; 0 none"),
    ("EPT",               1, "host-physical address of the root of EPT"),
    ("LOADED",            4, "roots loaded last: CR3, and the paging mode from bit 52 on"),
    ("VM",                1, "linear address of the words of the VM's first vCPU; 0 where nothing is shared"),
    ("GIVEN_UP",          1, "first shadow page that is free once all vCPUs have dropped translations, plus 1"),
    # what the last walk of the guest's tables found
    ("ADDRESS",           1, "linear address that the guest accessed"),
    ("ERROR",             1, "error code of that access"),
    ("LEVEL",             1, "level of the leaf; 0 where the guest does not use paging"),
    ("FRAME",             1, "guest frame of the access"),
    ("RIGHTS",            1, "rights that its shadow may have"),
    ("TABLE",             6, "guest frames of the tables, by level"),
    ("PATH",              6, "rights of the path down to and including the entry, by level"),
    # statistics
    ("MADE",              1, "shadow pages made"),
    ("REUSED",            1, "shadow pages found again in the hash table"),
    ("ZAPPED",            1, "shadow pages given up"),
    ("FLOODED",           1, "of them, because the guest wrote to them too often"),
    ("EVICTED",           1, "of them, because the pool was used up"),
    ("LEFT_SYNC",         1, "leaf tables that went out of sync"),
    ("SYNCHRONIZED",      1, "leaf tables that were synchronized"),
    ("WRITES",            1, "emulated writes to tables"),
    ("FILLED",            1, "leaf entries filled for an access"),
    ("PREFETCHED",        1, "leaf entries filled beside it"),
    ("TO_NESTED",         1, "tables of the guest that became nested"),
    ("TO_SHADOW",         1, "tables of the guest that became shadowed again"),
    # with PAE paging
    ("PDPTE",             4, "the page-directory-pointer table as the guest loaded it last"),
    # roots in use
    ("HELD",              1, "where pools are shared: shadow page of the root that was loaded last, plus 1; 0 none"),
    ("LISTED",            4, "shadow pages of the roots in the processor's list, plus 1; 0 where a pair is none"),
    # with agile paging
    ("EPT_TABLES",        1, "linear address of two words: the next frame for a table of EPT, and the end of those"),
    ("ROOTS_NESTED",      1, "times that a root was loaded which is nested"),
    ("EPT_SPLIT",         1, "large pages of EPT that were split"),
)
RECORD_WORDS: Final = (
    ("KEY",               1, "guest frame and role"),
    ("NEXT",              1, "next shadow page of the bucket or the free list, plus 1"),
    ("PARENTS",           1, "first entry that leads here, plus 1"),
    ("STATE",             1, "see the states; writes since it was last used from bit 8 on"),
    ("BELOW",             1, "entries below which something is out of sync"),
    ("BITMAP",            8, "which ones"),
    ("ROOTS",             1, "where pools are shared: vCPUs that have loaded it as their root, and lists where it is"),
    ("ORPHAN",            1, "agile paging: next of those that nothing leads to any more, plus 1"),
)
RECORD_BYTES: Final = 128
BUCKET_COUNT: Final = 4096

# --- a guest frame's word: first leaf that maps it plus 1 (32 bits), shadow pages of upper levels, of leaf tables
LOW: Final = 0xFFFF_FFFF
UPPER_TABLES, LEAF_TABLES, COUNT_MASK = 32, 48, 0x7FFF

# --- the word of 2 MiB: first 2 MiB leaf that maps them plus 1 (32 bits), shadow pages of tables in them
TABLES_INSIDE: Final = 32

# --- role: bits below the guest frame in a key
ROLE_LEVEL: Final = 7
ROLE_RIGHTS: Final = 3                              # shift
ROLE_DIRECT: Final = 1 << 6                         # not of a guest table: pieces of a large page, or no paging
ROLE_MODE: Final = 7                                # shift
ROLE_MODES: Final = 255                             # modes in which a page of the same table is another
ROLE_QUADRANT: Final = 15                           # shift: which part of a table of 32-bit paging, which is wider
KEY_FRAME: Final = 20                               # shift
RIGHT_WRITE, RIGHT_USER, RIGHT_EXECUTE = 1, 2, 4
ALL_RIGHTS: Final = 7

# --- modes
MODE_WP, MODE_NX, MODE_SMEP, MODE_PAGING = 1, 2, 4, 8
MODE_KERNEL: Final = 16                             # for a kernel that runs in ring 3: all that it maps is user
MODE_32BIT: Final = 32                              # 32-bit paging: two levels of 1024 entries with 4 bytes
MODE_PAE: Final = 64                                # PAE paging: two levels of 512 entries, below four PDPTEs
MODE_PSE: Final = 128                               # with 32-bit paging: CR4.PSE allows pages of 4 MiB
MODE_AGILE: Final = 256                             # the VM has agile paging: of no role
MODE_LA57: Final = 512                              # walks begin one level higher: of no role
MODE_SMAP: Final = 1024                             # of no role: the processor has it, too
MODE_LEGACY: Final = 2048                           # IA32_EFER.LME is clear: of no role
MODE_PAE_ROOT: Final = 4096                         # the processor has PAE paging, and roots three levels: of no role
MODE_SHIFT: Final = 52                              # of the mode beside CR3 in LOADED
OF_NO_ROOT: Final = MODE_LEGACY | MODE_PAE_ROOT     # what is left out there
NARROW: Final = MODE_32BIT | MODE_PAE               # of linear addresses with 32 bits

# --- the word of a guest frame with agile paging: writes to it as a table | nested | next nested frame plus 1
SWITCH_WRITES: Final = 0xFFFF
SWITCH_NESTED: Final = 1 << 16
SWITCH_NEXT: Final = 32                             # shift

# --- states
IN_USE, UNSYNC = 1, 2
GONE: Final = 4                                     # given up, but still the root of other vCPUs
WRITES: Final = 8                                   # shift
FLOOD: Final = 3                                    # writes to an upper table between two uses that end it

# --- entries
LEADS_TO_TABLE: Final = 1 << 9                      # bits that the processor ignores
HOST_WRITABLE: Final = 1 << 10
MONITOR: Final = 1 << 52                            # of a root: leads to the monitor's own tables
DEVICE: Final = 1 << 51                             # reserved: the access faults, and the frame is a device's
UPPER: Final = PTE_PRESENT | PTE_WRITE | PTE_USER | PTE_ACCESSED | LEADS_TO_TABLE
UPPER_PDPTE: Final = PTE_PRESENT | LEADS_TO_TABLE   # of PAE paging, where rights are reserved bits
LOADED_ROOTS: Final = 4                             # the one in use, and three whose translations may be stale
MIN_FREE, REFILL = 5, 25                            # shadow pages: evict when fewer are free, until so many are
# fmt: on


POOL: Final = byte_offsets(POOL_WORDS)
RECORD: Final = byte_offsets(RECORD_WORDS)
