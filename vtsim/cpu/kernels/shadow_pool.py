"""The pool of shadow pages as hooks see it: where its parts stand, and accesses to it, none of which can be refused."""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.codes import MODEL_FAULT
from vtsim.cpu.kernels.hook_access import hook_load, hook_store
from vtsim.ept import shadow as d
from vtsim.ept.spec import ADDRESS

# fmt: off
# what SHADOW_FLAGS says: drop translations; the root in use was given up; the root was not among those loaded last
FLUSH, NO_ROOT, STRANGE_ROOT = 1, 2, 4
# and where vCPUs share a pool: of FLUSH, a page of the guest became read-only; roots of other vCPUs were given up; so
# were shadow pages, which are free when all have dropped translations
PROTECTED, OTHER_ROOTS, GIVEN_UP = 8, 16, 32
# above them two counts: entries that were held against the guest's, and filled beside the one asked for
HELD, FILLED = 16, 40
HELD_ONE: int = 1 << HELD
FILLED_ONE: int = 1 << FILLED
LOW: int = d.LOW
KEY_FRAME: int = d.KEY_FRAME
RECORD_BYTES: int = d.RECORD_BYTES
R_NEXT: int    = d.RECORD["NEXT"]
R_PARENTS: int = d.RECORD["PARENTS"]
R_STATE: int   = d.RECORD["STATE"]
R_BELOW: int   = d.RECORD["BELOW"]
R_BITMAP: int  = d.RECORD["BITMAP"]
R_ROOTS: int   = d.RECORD["ROOTS"]
R_ORPHAN: int  = d.RECORD["ORPHAN"]
P_ROOT: int    = d.POOL["ROOT"]
P_CR3: int     = d.POOL["CR3"]
P_PAGES: int   = d.POOL["PAGES"]
P_FREE: int    = d.POOL["FREE"]
P_FREE_COUNT: int = d.POOL["FREE_COUNT"]
P_HAND: int    = d.POOL["HAND"]
P_FRAME_COUNT: int = d.POOL["FRAME_COUNT"]
P_OUT_OF_SYNC: int = d.POOL["OUT_OF_SYNC"]
P_MODE: int    = d.POOL["MODE"]
P_MADE: int    = d.POOL["MADE"]
P_REUSED: int  = d.POOL["REUSED"]
P_ZAPPED: int  = d.POOL["ZAPPED"]
P_EVICTED: int = d.POOL["EVICTED"]
P_LEFT_SYNC: int = d.POOL["LEFT_SYNC"]
P_DIRECT: int  = d.POOL["DIRECT"]
P_GUEST: int   = d.POOL["GUEST"]
P_TABLES: int  = d.POOL["TABLES"]
P_NOTES: int   = d.POOL["NOTES"]
P_RECORDS: int = d.POOL["RECORDS"]
P_FRAMES: int  = d.POOL["FRAMES"]
P_BUCKETS: int = d.POOL["BUCKETS"]
P_LARGE: int   = d.POOL["LARGE"]
P_SWITCHES: int = d.POOL["SWITCHES"]
P_VM: int      = d.POOL["VM"]
P_GIVEN_UP: int = d.POOL["GIVEN_UP"]
# fmt: on


@kernel
def shadow_get(m: Record, a: Arena, t: Tags, at: int) -> int:
    """Load a word of the hypervisor's own."""
    value = hook_load(m, a, t, at)
    if m[s.FAULT_KIND]:
        m[s.STOP] = MODEL_FAULT
    return value


@kernel
def shadow_put(m: Record, a: Arena, t: Tags, at: int, value: int) -> None:
    """Store a word of the hypervisor's own."""
    if hook_store(m, a, t, at, value):
        m[s.STOP] = MODEL_FAULT


@kernel
def shadow_count(m: Record, a: Arena, t: Tags, statistic: int) -> None:
    """Count an event in a statistic of the pool."""
    at = m[s.SHADOW_VM] + statistic
    shadow_put(m, a, t, at, shadow_get(m, a, t, at) + 1)


@kernel
def begin_shadow(m: Record, a: Arena, t: Tags) -> None:
    """Load where the parts of the pool at RDI stand."""
    pool = m[s.GPR + s.RDI]
    m[s.SHADOW_POOL] = pool
    m[s.SHADOW_FLAGS] = 0
    m[s.SHADOW_ORPHANS] = -1
    m[s.SHADOW_DIRECT] = shadow_get(m, a, t, pool + P_DIRECT)
    m[s.SHADOW_GUEST] = shadow_get(m, a, t, pool + P_GUEST)
    m[s.SHADOW_TABLES] = shadow_get(m, a, t, pool + P_TABLES)
    m[s.SHADOW_NOTES] = shadow_get(m, a, t, pool + P_NOTES)
    m[s.SHADOW_RECORDS] = shadow_get(m, a, t, pool + P_RECORDS)
    m[s.SHADOW_FRAMES] = shadow_get(m, a, t, pool + P_FRAMES)
    m[s.SHADOW_LARGE] = shadow_get(m, a, t, pool + P_LARGE)
    m[s.SHADOW_BUCKETS] = shadow_get(m, a, t, pool + P_BUCKETS)
    m[s.SHADOW_MODE] = shadow_get(m, a, t, pool + P_MODE)
    m[s.SHADOW_ROOT] = shadow_get(m, a, t, pool + P_ROOT) - 1
    m[s.SHADOW_VM] = pool
    m[s.SHADOW_SEVERAL] = shadow_get(m, a, t, pool + P_VM)
    if m[s.SHADOW_SEVERAL]:
        m[s.SHADOW_VM] = m[s.SHADOW_SEVERAL]
    if m[s.SHADOW_MODE] & d.MODE_AGILE:
        m[s.SHADOW_SWITCHES] = shadow_get(m, a, t, pool + P_SWITCHES)


@kernel
def top_level(m: Record) -> int:
    """The level of a root, in the paging mode of the guest."""
    return top_of(m[s.SHADOW_MODE])


@kernel
def top_of(mode: int) -> int:
    """The same in any paging mode."""
    if mode & d.MODE_PAE_ROOT:
        return 3
    return 5 if mode & d.MODE_LA57 else 4


@kernel
def role_in(mode: int, level: int, rights: int, direct: bool) -> int:
    """The role of a shadow page in a paging mode. CR4.SMEP makes another page of it only while CR0.WP is clear."""
    modes = mode & d.ROLE_MODES
    if mode & d.MODE_WP:
        modes &= ~d.MODE_SMEP
    return level | rights << d.ROLE_RIGHTS | modes << d.ROLE_MODE | (d.ROLE_DIRECT if direct else 0)


@kernel
def record_at(m: Record, page: int) -> int:
    """The linear address of a shadow page's record; its key stands first."""
    return m[s.SHADOW_RECORDS] + page * RECORD_BYTES


@kernel
def entry_at(m: Record, entry: int) -> int:
    """The linear address of an entry."""
    return m[s.SHADOW_DIRECT] + m[s.SHADOW_TABLES] + 8 * entry


@kernel
def note_at(m: Record, entry: int) -> int:
    """The linear address of an entry's note: guest frame (from bit 32 on), next entry of its list plus 1."""
    return m[s.SHADOW_NOTES] + 8 * entry


@kernel
def page_behind(m: Record, word: int) -> int:
    """The shadow page that an upper entry leads to."""
    return ((word & ADDRESS) - m[s.SHADOW_TABLES]) >> 12


@kernel
def bucket_at(m: Record, frame: int) -> int:
    """The linear address of the bucket of a guest frame."""
    return m[s.SHADOW_BUCKETS] + 8 * ((frame ^ frame >> 12) & (d.BUCKET_COUNT - 1))


@kernel
def switch_of(m: Record, frame: int) -> int:
    """With agile paging: the linear address of a guest frame's word."""
    return m[s.SHADOW_SWITCHES] + 8 * frame


@kernel
def has_frame(m: Record, a: Arena, t: Tags, frame: int) -> bool:
    """Is this a guest frame that the pool has a word for?"""
    return 0 <= frame < shadow_get(m, a, t, m[s.SHADOW_POOL] + P_FRAME_COUNT)
