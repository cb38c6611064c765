"""What exit paths do for exit clusters (see `cluster`): where handlers end, and which stores are known."""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R8, R14, R15, RAX
from vtsim.vmm import layout as at
from vtsim.vmm.programs.words import vcpu
from vtsim.vmm.registry import Path


def look(a: Assembler, path: Path) -> None:
    """In place of VM entry, RDX being where the guest goes on: GUEST_RIP is written at the end of all clusters."""
    if path.vmm.features.exit_clustering:
        a.jmp("cluster")


def inside(a: Assembler, path: Path) -> None:
    """Where a handler has ended: go on in the cluster that it was part of."""
    if path.vmm.features.exit_clustering:
        a.ld(RAX, vcpu("CLUSTER_BYTES"))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_NZ, "cluster_next")


def remember_store(a: Assembler, path: Path) -> None:
    """A store at R14 hit a table: clusters may contain it. Those that are known were sought without it.

    Clobbers RAX and R8.
    """
    if not path.vmm.features.exit_clustering:
        return
    slot(a, R14, "SEEN_STORES", 3, R8)
    a.ld(RAX, Mem(R8))
    a.cmp(RAX, register=R14)
    a.jcc(ops.CC_Z, "store_is_known")
    a.st(Mem(R8), R14)
    for entry in range(at.CLUSTER_ENTRIES):
        a.st_value(vcpu("CLUSTERS", entry * at.CLUSTER_ENTRY_BYTES // 8), 0)
    a.label("store_is_known")


def slot(a: Assembler, address: int, field: str, spacing: int, to: int) -> None:
    """`to` <- where a table of the vCPU would have an address. Clobbers RAX."""
    a.copy(RAX, address)
    a.shr(RAX, 2)
    a.and_(RAX, at.CLUSTER_ENTRIES - 1)
    a.shl(RAX, spacing)
    a.copy(to, R15)
    a.add(to, register=RAX)
    a.add(to, at.V[field])
