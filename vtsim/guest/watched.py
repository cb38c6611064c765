"""Memory of a guest that something watches: how stores to it are noticed, or let through without being noticed."""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtsim.base.spec import Text, counts, setting
from vtsim.base.units import LARGEST
from vtsim.guest.spec import KIB, MIB, Phase, primitives, region_of, repeated

NOBODY, BY_EXIT, BY_EXCEPTION, BY_VMFUNC, BY_VMCALL = WAYS = ("nobody", "exit", "exception", "vmfunc", "vmcall")
SWITCHING: Final = (BY_VMFUNC, BY_VMCALL)


@primitives.register("watched_stores")
@frozen(kw_only=True)
class WatchedStoresSpec(Phase):
    """Groups of loads elsewhere and of stores to pages that one view of memory protects, by the guest kernel.

    The share of watched accesses is stores / (stores + loads). Natively there are no views, and nobody watches.
    """

    iterations: int = repeated(1000)
    pages: int = setting(counts(ge=1, le=1024), "Pages of 4 KiB that are watched", default=16)
    stores: int = setting(
        counts(ge=1, le=2**20), "Stores of a group to watched pages, each to the next page", default=4
    )
    loads: int = setting(counts(le=2**20), "Loads of a group from the other region, anywhere in it", default=12)
    region: int = region_of(MIB)
    by: str = setting(
        Text(choices=WAYS),
        "How stores are dealt with: nobody watches; each is a VM exit, after which the hypervisor has it made and exit "
        "again; each is a virtualization exception, whose handler in the guest's kernel makes it in another view; the "
        "kernel changes the view around each group, by VMFUNC, or by a hypercall",
        default=NOBODY,
    )
    view: int | None = setting(
        counts(le=LARGEST, words={"turn": None}),
        "View in which `vmfunc` and `vmcall` make a group's stores; turn is each but the first, one after the other",
        default=None,
    )

    @property
    def watched_bytes(self) -> int:
        """The size of the watched pages, which come first."""
        return self.pages * 4 * KIB

    @property
    def region_bytes(self) -> int:
        return self.watched_bytes + self.region
