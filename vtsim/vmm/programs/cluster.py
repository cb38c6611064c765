"""Exit clustering: instructions behind one that exited, up to the next that would, are emulated before VM entry.

After an exit the instructions that follow are decoded once, and how far it is to the next one that exits is kept by
address. If that is near, all up to it are executed in the guest's place, and so on while another is near; the hardware
transition, and what every exit does before and after its handler, is saved for each.

Port instructions and CPUID always exit, INVLPG under shadow paging; a store does if one at its address has hit a table
of the guest before.

Source: Agesen, Mattson, Rugina, Sheldon, "Software Techniques for Avoiding Hardware Virtualization Exits" (ATC 2012).
Not modelled: clusters translated into code (each instruction is decoded again); clusters with arithmetic, loads or
branches; clusters in a guest that maps other code at an address where one was found.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.kernels import shadow_hooks as h
from vtsim.cpu.slots import R9, R10, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.ept import spec as e
from vtsim.vmm import layout as at
from vtsim.vmm.programs import shadow
from vtsim.vmm.programs.cluster_table import slot
from vtsim.vmm.programs.ept_leaf import find_slot
from vtsim.vmm.programs.words import count, saved, vcpu, work
from vtsim.vmm.registry import Path

REACH: Final = 4  # instructions that are decoded in search of one that exits
PAGE_END: Final = 4096 - 16 * REACH  # beyond this place of a page no cluster is sought
SPACING: Final = at.CLUSTER_ENTRY_BYTES.bit_length() - 1
IN_DIRECTION: Final = 8  # of the exit qualification for I/O instructions
PORTS: Final = (ops.IN, ops.OUT)
HARMLESS: Final = (ops.MOV, ops.NOP)
STEPS: Final = (
    (ops.MOV, "cluster_move"), (ops.NOP, "cluster_next"), (ops.IN, "cluster_in"), (ops.OUT, "cluster_out"),
    (ops.CPUID, "cluster_cpuid"), (ops.ST, "cluster_store"), (ops.INVLPG, "cluster_invlpg"),
)  # fmt: skip


def clusters(a: Assembler, path: Path) -> None:
    """`cluster` (RDX where the guest goes on), `cluster_next` (behind an instruction of a cluster)."""
    if not path.vmm.features.exit_clustering:
        return
    a.activity = ops.EXIT_HANDLER
    a.label("cluster")
    a.st(vcpu("CLUSTER_RIP"), RDX)
    _show(a)
    a.ld(RDX, vcpu("CLUSTER_RIP"))
    a.label("cluster_look")
    slot(a, RDX, "CLUSTERS", SPACING, RBP)
    a.ld(RCX, Mem(RBP))
    a.cmp(RCX, register=RDX)
    a.jcc(ops.CC_NZ, "cluster_seek")
    a.label("cluster_known")
    a.ld(RAX, Mem(RBP, 16))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "cluster_end")
    a.st(vcpu("CLUSTER_LEFT"), RAX)
    a.ld(RAX, Mem(RBP, 8))
    a.st(vcpu("CLUSTER_BYTES"), RAX)

    a.label("cluster_step")
    a.ld(RSI, vcpu("CLUSTER_RIP"))
    a.ld(RDI, vcpu("CLUSTER_BYTES"))
    a.hook(hooks.DECODE)
    a.st(vcpu("CLUSTER_LENGTH"), R9)
    a.ld(RSI, vcpu("CLUSTER_INSTRUCTIONS"))
    a.add(RSI, 1)
    a.st(vcpu("CLUSTER_INSTRUCTIONS"), RSI)
    for op, label in STEPS:
        a.cmp(RAX, op)
        a.jcc(ops.CC_Z, label)
    a.jmp("cluster_undone")
    _seek(a, path)
    _steps(a, path)

    a.label("cluster_next")
    _show(a)
    a.ld(RDX, vcpu("CLUSTER_RIP"))
    a.ld(RCX, vcpu("CLUSTER_LENGTH"))
    a.add(RDX, register=RCX)
    a.st(vcpu("CLUSTER_RIP"), RDX)
    a.ld(RAX, vcpu("CLUSTER_BYTES"))
    a.add(RAX, register=RCX)
    a.st(vcpu("CLUSTER_BYTES"), RAX)
    a.ld(RAX, vcpu("CLUSTER_LEFT"))
    a.sub(RAX, 1)
    a.st(vcpu("CLUSTER_LEFT"), RAX)
    a.jcc(ops.CC_NZ, "cluster_step")
    a.jmp("cluster_look")
    a.label("cluster_end")
    a.st_value(vcpu("CLUSTER_BYTES"), 0)
    a.ld(RDX, vcpu("CLUSTER_RIP"))
    a.vmwrite("GUEST_RIP", RDX)
    a.jmp("reenter")


def _seek(a: Assembler, path: Path) -> None:
    """`cluster_seek`: from RDX on, how many instructions it is to one that exits, at most; into the entry at RBP."""
    a.label("cluster_seek")
    a.vmwrite("GUEST_RIP", RDX)
    a.st(Mem(RBP), RDX)
    a.st_value(Mem(RBP, 16), 0)
    a.copy(RAX, RDX)
    a.and_(RAX, 4095)
    a.cmp(RAX, PAGE_END)
    a.jcc(ops.CC_A, "cluster_known")
    a.cmp(RAX, 16)  # the page of the instruction that exited is there; another may not be
    a.jcc(ops.CC_B, "cluster_known")
    a.call("fetch_instruction")
    a.st(Mem(RBP, 8), RDI)
    a.copy(R12, RDI)
    a.mov(R13, 0)
    a.label("cluster_seek_next")
    a.copy(RSI, R14)
    a.copy(RDI, R12)
    a.hook(hooks.DECODE)
    a.add(R13, 1)
    for op in (*PORTS, ops.CPUID, *((ops.INVLPG,) if path.vmm.on_shadow else ())):
        a.cmp(RAX, op)
        a.jcc(ops.CC_Z, "cluster_found")
    for op in HARMLESS:
        a.cmp(RAX, op)
        a.jcc(ops.CC_Z, "cluster_seek_on")
    a.cmp(RAX, ops.ST)
    a.jcc(ops.CC_NZ, "cluster_known")
    slot(a, R14, "SEEN_STORES", 3, RCX)
    a.ld(RAX, Mem(RCX))
    a.cmp(RAX, register=R14)
    a.jcc(ops.CC_Z, "cluster_found")
    a.jmp("cluster_known")
    a.label("cluster_seek_on")
    a.add(R12, register=R9)
    a.add(R14, register=R9)
    a.cmp(R13, REACH)
    a.jcc(ops.CC_B, "cluster_seek_next")
    a.jmp("cluster_known")
    a.label("cluster_found")
    a.st(Mem(RBP, 16), R13)
    a.jmp("cluster_known")


def _steps(a: Assembler, path: Path) -> None:
    """What is done for each instruction of a cluster: RCX its register, RBX immediate, RDX bytes, R10 source."""
    a.label("cluster_move")
    a.cmp(R10, 16)
    a.jcc(ops.CC_AE, "cluster_moved")
    a.ld(RBX, Mem(R15, at.V["REGISTERS"], index=R10, scale=8))
    a.label("cluster_moved")
    a.st(Mem(R15, at.V["REGISTERS"], index=RCX, scale=8), RBX)
    a.jmp("cluster_next")

    for name, direction in (("in", IN_DIRECTION), ("out", 0)):  # as the exit qualification would say
        a.label(f"cluster_{name}")
        count(a, "CLUSTERED_EXITS")
        a.copy(R12, RDX)
        a.sub(R12, 1)
        if direction:
            a.or_(R12, direction)
        a.copy(RCX, RBX)
        a.cmp(R10, 16)
        a.jcc(ops.CC_AE, f"cluster_{name}_port")
        a.ld(RCX, saved(RDX, 2))
        a.label(f"cluster_{name}_port")
        work(a, path, "port")
        a.copy(RBX, RDX)
        if direction:
            a.copy(R13, RCX)
            a.lea(RDX, Mem(RBX, -1))
            a.shl(RDX, 32)
            a.or_(RCX, register=RDX)
            _show(a, ops.IN)
            a.copy(RCX, R13)
        a.copy(RAX, RCX)
        a.shl(RAX, 16)
        a.or_(R12, register=RAX)
        a.jmp("port_decoded")

    a.label("cluster_cpuid")
    count(a, "CLUSTERED_EXITS")
    a.ld(RCX, saved(RAX, 4))
    _show(a, ops.CPUID)
    a.jmp("handle_CPUID")

    a.label("cluster_store")
    if not path.vmm.on_shadow:
        a.label("cluster_invlpg")
    else:
        _store(a, path)
    a.label("cluster_undone")  # it is left to the processor
    a.ld(RAX, vcpu("CLUSTER_INSTRUCTIONS"))
    a.sub(RAX, 1)
    a.st(vcpu("CLUSTER_INSTRUCTIONS"), RAX)
    a.jmp("cluster_end")


def _show(a: Assembler, op: int = 0) -> None:
    """What was executed last has shown the guest its result; the next to do so is `op` of RCX. Clobbers RAX and RDX."""
    a.mov(RDX, op)
    a.ld(RAX, vcpu("CLUSTER_RIP"))
    a.hook(hooks.SHOW)


def _operand(a: Assembler) -> None:
    """RSI <- linear address of the instruction's operand. Clobbers RAX and RDI."""
    a.vmread(RAX, "GUEST_RSP")
    a.st(saved(RSP), RAX)
    a.ld(RDI, vcpu("CLUSTER_BYTES"))
    a.lea(RSI, Mem(R15, at.V["REGISTERS"]))
    a.hook(hooks.OPERAND)
    a.copy(RSI, RAX)


def _store(a: Assembler, path: Path) -> None:
    """A store to a table, as that of an exit would be emulated; one that faults or goes elsewhere is left alone."""
    a.st(vcpu("DECODED", 0), RCX)
    a.st(vcpu("DECODED", 1), RDX)
    a.copy(R12, RBX)
    _operand(a)
    a.mov(RDX, e.PF_WRITE)
    work(a, path, "guest_walk")
    shadow.hook(a, h.SHADOW_WALK)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "cluster_undone")
    a.copy(R13, RCX)
    a.ld(RAX, vcpu("MEMORY_END"))
    a.cmp(R13, register=RAX)
    a.jcc(ops.CC_AE, "cluster_undone")
    if path.vmm.huge_pages == "never":  # of a table that was only read the process has the page of zeroes
        find_slot(a, "cluster_slot", "cluster_undone")
        shadow.test_own_page(a)
        a.jcc(ops.CC_Z, "cluster_undone")
    count(a, "CLUSTERED_EXITS")
    a.ld(RCX, vcpu("DECODED", 0))
    a.ld(RDX, vcpu("DECODED", 1))
    a.copy(RBX, R12)
    shadow.store_decoded(a, at.V["REGISTERS"], at.USER_RAM, "cluster")
    a.copy(RCX, RDX)
    a.copy(RSI, R13)
    work(a, path, "table_written")
    shadow.hook(a, h.SHADOW_WRITE)
    a.call("shadow_settle")
    a.jmp("cluster_next")
    a.label("cluster_invlpg")
    count(a, "CLUSTERED_EXITS")
    _operand(a)
    work(a, path, "invlpg")
    a.jmp("invlpg_address")
