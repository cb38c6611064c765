"""Roots of shadow tables in use: by which vCPUs, and which of them the processor finds by itself.

Where vCPUs share a pool, a root counts those that have loaded it, and those in whose lists it stands: the guest can go
there without an exit. One that is given up meanwhile is kept until each of them, asked to, has loaded another.

SDM: "Memory Virtualization".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.shadow_pool import (
    GIVEN_UP,
    KEY_FRAME,
    NO_ROOT,
    P_CR3,
    P_FREE,
    P_FREE_COUNT,
    P_GIVEN_UP,
    P_ROOT,
    R_NEXT,
    R_ROOTS,
    R_STATE,
    bucket_at,
    page_behind,
    record_at,
    role_in,
    shadow_get,
    shadow_put,
    top_level,
)
from vtsim.ept import shadow as d
from vtsim.ept.spec import ADDRESS
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h

P_HELD: int = d.POOL["HELD"]
P_LISTED: int = d.POOL["LISTED"]


# --- pages that are not used any more --------------------------------------------------------------------------------
@kernel
def free_page(m: Record, a: Arena, t: Tags, page: int) -> None:
    """A shadow page may be used for something else."""
    vm = m[s.SHADOW_VM]
    at = record_at(m, page)
    shadow_put(m, a, t, at + R_STATE, 0)
    shadow_put(m, a, t, at + R_NEXT, shadow_get(m, a, t, vm + P_FREE))
    shadow_put(m, a, t, vm + P_FREE, page + 1)
    shadow_put(m, a, t, vm + P_FREE_COUNT, shadow_get(m, a, t, vm + P_FREE_COUNT) + 1)


@kernel
def give_up(m: Record, a: Arena, t: Tags, page: int) -> None:
    """A shadow page that nothing leads to may still be in what other CPUs have cached: it waits for their flush."""
    vm = m[s.SHADOW_VM]
    at = record_at(m, page)
    shadow_put(m, a, t, at + R_STATE, 0)
    shadow_put(m, a, t, at + R_NEXT, shadow_get(m, a, t, vm + P_GIVEN_UP))
    shadow_put(m, a, t, vm + P_GIVEN_UP, page + 1)
    m[s.SHADOW_FLAGS] |= GIVEN_UP


# --- by whom roots are used ------------------------------------------------------------------------------------------
@kernel
def take_root(m: Record, a: Arena, t: Tags, root: int) -> None:
    """Where vCPUs share a pool: one more use of a root."""
    if m[s.SHADOW_SEVERAL]:
        at = record_at(m, root) + R_ROOTS
        shadow_put(m, a, t, at, shadow_get(m, a, t, at) + 1)


@kernel
def leave_root(m: Record, a: Arena, t: Tags, root: int) -> None:
    """One use less, after which a root that was given up may go."""
    if m[s.SHADOW_SEVERAL]:
        at = record_at(m, root)
        users = shadow_get(m, a, t, at + R_ROOTS) - 1
        shadow_put(m, a, t, at + R_ROOTS, users)
        if users == 0 and shadow_get(m, a, t, at + R_STATE) == d.GONE:
            give_up(m, a, t, root)


@kernel
def change_root(m: Record, a: Arena, t: Tags, root: int) -> None:
    """Where vCPUs share a pool: this one leaves the root that it loaded last, for another one."""
    at = m[s.SHADOW_POOL] + P_HELD
    old = shadow_get(m, a, t, at) - 1
    if old == root:
        return
    take_root(m, a, t, root)
    shadow_put(m, a, t, at, root + 1)
    if old >= 0:
        leave_root(m, a, t, old)


@kernel
def find_root(m: Record, a: Arena, t: Tags) -> None:
    """Another vCPU may have given up the root of this one, which is not there any more then."""
    root = m[s.SHADOW_ROOT]
    if root < 0 or shadow_get(m, a, t, record_at(m, root) + R_STATE) & d.IN_USE == 0:
        m[s.SHADOW_ROOT] = -1
        m[s.SHADOW_FLAGS] |= NO_ROOT


@kernel
def nested_root(m: Record, a: Arena, t: Tags, frame: int) -> int:
    """With agile paging: the shadow page that stands for a root which is nested itself, -1 if there is none.

    Nothing walks its table. It is a root as others are, so that vCPUs which have it are told when that ends.
    """
    wanted = frame << KEY_FRAME | role_in(m[s.SHADOW_MODE], top_level(m), d.ALL_RIGHTS, True)
    page = shadow_get(m, a, t, bucket_at(m, frame))
    while page:
        if shadow_get(m, a, t, record_at(m, page - 1)) == wanted:
            return page - 1
        page = shadow_get(m, a, t, record_at(m, page - 1) + R_NEXT)
    return -1


# --- the processor's list --------------------------------------------------------------------------------------------
@kernel
def list_of(m: Record, a: Arena) -> int:
    """The host-physical address of the processor's list of roots, 0 where it has none."""
    return a[m[s.VMCS] + h.V_CR3_LIST] if m[s.SHADOW_MODE] & d.MODE_AGILE else 0


@kernel
def follow_cr3(m: Record, a: Arena, t: Tags) -> None:
    """The guest may have gone to another root without an exit: its CR3 in the VMCS says to which."""
    cr3_list = list_of(m, a)
    if cr3_list == 0 or m[s.SHADOW_ROOT] < 0:
        return
    m[s.CYCLE] += m[s.PRICE + o.VMREAD]
    cr3 = a[m[s.VMCS] + v.GUEST_CR3] & (ADDRESS | h.CR3_SWITCHES)
    root = m[s.SHADOW_ROOT]
    if cr3 & h.CR3_SWITCHES:
        for n in range(h.CR3_PAIRS):
            if shadow_get(m, a, t, m[s.SHADOW_DIRECT] + cr3_list + 16 + 16 * n) == cr3:
                root = shadow_get(m, a, t, m[s.SHADOW_POOL] + P_LISTED + 8 * n) - 1
    else:
        root = page_behind(m, cr3)
    if root != m[s.SHADOW_ROOT]:
        m[s.SHADOW_ROOT] = root
        shadow_put(m, a, t, m[s.SHADOW_POOL] + P_ROOT, root + 1)
        shadow_put(m, a, t, m[s.SHADOW_POOL] + P_CR3, shadow_get(m, a, t, m[s.SHADOW_DIRECT] + cr3_list))


@kernel
def list_root(m: Record, a: Arena, t: Tags, cr3: int, root: int, page: int) -> None:
    """The processor may from now on go to a root by itself when the guest loads this CR3: first of the pairs.

    `root` is what CR3 then holds, `page` the shadow page that stands for it.
    """
    cr3_list = list_of(m, a)
    if cr3_list == 0:
        return
    take_root(m, a, t, page)
    at, listed = m[s.SHADOW_DIRECT] + cr3_list + 8, m[s.SHADOW_POOL] + P_LISTED
    page += 1
    for _ in range(h.CR3_PAIRS):
        other, its_root = shadow_get(m, a, t, at), shadow_get(m, a, t, at + 8)
        its_page = shadow_get(m, a, t, listed)
        shadow_put(m, a, t, at, cr3)
        shadow_put(m, a, t, at + 8, root)
        shadow_put(m, a, t, listed, page)
        page = its_page
        if other == cr3 or its_root == 0:
            break
        cr3, root = other, its_root
        at += 16
        listed += 8
    if page:
        leave_root(m, a, t, page - 1)


@kernel
def unlist_roots(m: Record, a: Arena, t: Tags) -> None:
    """A root is given up, or roots of another mode are needed: no load of CR3 goes by itself."""
    cr3_list = list_of(m, a)
    for n in range(h.CR3_PAIRS if cr3_list else 0):
        shadow_put(m, a, t, m[s.SHADOW_DIRECT] + cr3_list + 16 + 16 * n, 0)
        listed = m[s.SHADOW_POOL] + P_LISTED + 8 * n
        page = shadow_get(m, a, t, listed)
        if page:
            shadow_put(m, a, t, listed, 0)
            leave_root(m, a, t, page - 1)


@kernel
def unlist_what_is_gone(m: Record, a: Arena, t: Tags) -> None:
    """Where another vCPU has given up a root that this one lists, no load of CR3 goes by itself."""
    for n in range(h.CR3_PAIRS if m[s.SHADOW_SEVERAL] and list_of(m, a) else 0):
        page = shadow_get(m, a, t, m[s.SHADOW_POOL] + P_LISTED + 8 * n)
        if page and shadow_get(m, a, t, record_at(m, page - 1) + R_STATE) & d.IN_USE == 0:
            unlist_roots(m, a, t)
            return
