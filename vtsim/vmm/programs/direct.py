"""Direct page tables: the hypercalls of a paravirtual guest, each update validated before it is made.

A frame that becomes a table is validated entry by entry, and the frames that its entries lead to before it; one that no
entry relies on any more is let go the same way. Translations are dropped wherever a frame becomes a table or ceases to
be one, since what a TLB holds of its earlier use would let the guest write to tables.

Of several vCPUs one at a time carries requests out: a hypercall holds the lock of the VM's tables from its first
request to its last, as Xen's do_mmu_update held the lock of its domain. Before a frame gets another type, the other
vCPUs have dropped what they may have cached by the earlier one; until some frame loses its type again, that need not be
repeated. A root that any vCPU has loaded is not given up. A flush that a guest asks for may name other vCPUs.

SDM: "VMCALL—Call to VM Monitor"; "Caching Translation Information".
Source: Xen 3.0, xen/arch/x86/mm.c (do_mmu_update, do_mmuext_op, get_page_type).
Not modelled: types and counts that change by compare-exchange alone, page by page (later Xen); a stamp of each frame's
last flush (one word says whether any frame has lost its type since all vCPUs flushed); updates that keep the flags
which a processor sets meanwhile (MMU_PT_UPDATE_PRESERVE_AD); large pages in direct tables; grants of pages between VMs;
five levels; device memory of a paravirtual guest; string I/O of a paravirtual guest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from attrs import frozen

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R12, R13, R14, R15, RAX, RBP, RCX, RDI, RDX, RSI
from vtsim.ept import direct as d
from vtsim.vmm import layout as at
from vtsim.vmm.programs import direct_tables, several, upcalls
from vtsim.vmm.programs.direct_tables import DROP_ALL, Ground, refused_if_used, requests
from vtsim.vmm.programs.shadow import drop_address
from vtsim.vmm.programs.words import GENERAL_PROTECTION, saved, vcpu, work, zero
from vtsim.vmm.registry import Path
from vtsim.vmm.shadow import EFER_NX

# fmt: off
SINGLE, KEEP_GLOBALS = 1, 3                      # types of INVVPID
CR0_FIXED: Final = 1 << 31 | 1 << 16 | 1            # PG, WP, PE
CR4_FIXED: Final = 1 << 5 | 1 << 12 | 1 << 17       # PAE, LA57, PCIDE
EFER_FIXED: Final = EFER_NX | 1 << 10 | 1 << 8      # NXE, LMA, LME
# fmt: on


@frozen(kw_only=True)
class VmxGround(Ground):
    """A guest in VMX non-root operation, whose CR3 stands in its VMCS."""

    path: Path

    def vcpu(self, field: str) -> Mem:
        return vcpu(field)

    def work(self, a: Assembler, name: str) -> None:
        work(a, self.path, name)

    def drop_page(self, a: Assembler) -> None:
        drop_address(a, self.path, R13)

    def loaded(self, a: Assembler) -> Sequence[Mem | None]:
        if self.shared:
            loaded_anywhere(a)
            return ()
        a.vmread(RAX, "GUEST_CR3")
        return (None,)

    def load(self, a: Assembler) -> None:
        a.vmwrite("GUEST_CR3", RAX)
        if self.shared:
            a.st(vcpu("SHADOW_CR3"), RAX)

    def begun(self, a: Assembler) -> None:
        a.ld(RCX, vcpu("PV_REQUESTS"))
        a.add(RCX, 1)
        a.st(vcpu("PV_REQUESTS"), RCX)

    def asks_others(self, a: Assembler) -> None:
        several.because(a, self.path, at.FOR_GUEST)


def vmx_ground(path: Path) -> VmxGround:
    """What direct tables stand on in VMX root operation."""
    addresses = path.addresses
    return VmxGround(
        path=path, direct=at.HOST_DIRECT, words=addresses["frame_words"], frames=addresses["frame_count"],
        shared=path.several,
    )  # fmt: skip


def loaded_anywhere(a: Assembler) -> None:
    """A request about the root in frame RSI is refused if any vCPU of the VM has loaded it. Changes RAX and RDI."""
    a.copy(RDI, R15)
    a.label("loaded_by")
    a.ld(RAX, Mem(RDI, at.V["SHADOW_CR3"]))
    refused_if_used(a)
    a.ld(RDI, Mem(RDI, at.V["PEER"]))
    a.cmp(RDI, register=R15)
    a.jcc(ops.CC_NZ, "loaded_by")


def hypercall(a: Assembler, path: Path) -> None:
    """VMCALL: one request, or many."""
    ground = vmx_ground(path)
    a.activity = ops.MEMORY_MANAGEMENT
    work(a, path, "hypercall")
    upcalls.hypercall(a, path)
    a.ld(RAX, saved(RAX))
    a.ld(R12, saved(RDI))
    a.ld(R13, saved(RSI))
    for register in (R14, RBP):
        zero(a, register)
    if path.several:
        _begin(a, path)
    a.cmp(RAX, d.CALL_REQUEST)
    a.jcc(ops.CC_Z, "direct_single")
    a.cmp(RAX, d.CALL_MULTI)
    a.jcc(ops.CC_NZ, "direct_done")
    requests(a, ground)
    a.label("direct_done")
    several.unlock_tables(a, path)
    a.label("direct_answer")
    a.st(saved(RAX), R14)
    if path.vmm.vpid:  # without a tag the next VM entry drops everything
        a.test(RBP, register=RBP)
        a.jcc(ops.CC_Z, "skip")
        keeps = path.capabilities.supports("INVVPID_SINGLE_CONTEXT_KEEPING_GLOBALS")
        a.mov(RCX, KEEP_GLOBALS if keeps else SINGLE)
        a.test(RBP, DROP_ALL)
        a.jcc(ops.CC_Z, "direct_drop")
        a.mov(RCX, SINGLE)
        a.label("direct_drop")
        a.ld(RAX, vcpu("VPID"))
        a.st(vcpu("DESCRIPTOR"), RAX)
        a.emit(ops.INVVPID, RCX, mem=vcpu("DESCRIPTOR"))
    a.jmp("skip")


def _begin(a: Assembler, path: Path) -> None:
    """Of several vCPUs: if the call in RAX is one of requests, the VM's tables are ours. Changes RCX and RDI."""
    a.cmp(RAX, d.CALL_MULTI)
    a.jcc(ops.CC_A, "direct_answer")
    a.cmp(RAX, d.CALL_REQUEST)
    a.jcc(ops.CC_B, "direct_answer")
    several.lock_tables(a, path, "LOCK_WAITS")
    a.ld(RAX, saved(RAX))


def subroutines(a: Assembler, path: Path) -> None:
    """`direct_request`, the counting of frames, and what the guest may do to control registers and EFER.

    `settle_types`: no other vCPU has translations any more by a type that a frame has lost. This one drops its own
    before it enters. Changes RAX and RDI.
    """
    a.activity = ops.MEMORY_MANAGEMENT
    direct_tables.subroutines(a, vmx_ground(path))
    if path.several:
        a.label("settle_types")
        a.ld(RDI, vcpu("VM"))
        a.ld(RAX, Mem(RDI, at.V["LOOSE"]))
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_Z, "types_settled")
        a.st_value(Mem(RDI, at.V["LOOSE"]), 0)
        a.or_(RBP, DROP_ALL)
        for register in (RCX, RDX):
            a.push(register)
        several.because(a, path, at.FOR_TYPES)
        flush_for_types(a)
        for register in (RDX, RCX):
            a.pop(register)
        a.label("types_settled")
        a.ret()
    a.activity = ops.EXIT_HANDLER
    _registers(a, path)


def flush_for_types(a: Assembler) -> None:
    """All other vCPUs drop what they have cached. Changes RAX, RCX, RDX and RDI."""
    a.call("flush_others")


def _registers(a: Assembler, path: Path) -> None:
    """`cr_to_0`, `cr_to_3`, `cr_to_4`, `efer_written`: what would end the hypervisor's hold on tables is #GP."""
    for number, fixed in ((0, CR0_FIXED), (4, CR4_FIXED)):
        a.label(f"cr_to_{number}")
        a.vmread(RCX, f"CR{number}_READ_SHADOW")
        a.emit(ops.XOR, RCX, RAX)
        a.test(RCX, fixed)
        a.jcc(ops.CC_NZ, "cr_to_3")
        a.vmwrite(f"CR{number}_READ_SHADOW", RAX)
        if number == 4:
            a.or_(RAX, 1 << 13, comment="VMXE")
        a.vmwrite(f"GUEST_CR{number}", RAX)
        a.jmp("skip")
    a.label("efer_written")
    a.vmread(RCX, "GUEST_IA32_EFER")
    a.emit(ops.XOR, RCX, RAX)
    a.test(RCX, EFER_FIXED)
    a.jcc(ops.CC_NZ, "cr_to_3")
    a.vmwrite("GUEST_IA32_EFER", RAX)
    a.jmp("skip")
    a.label("cr_to_3")
    a.mov(RAX, GENERAL_PROTECTION)
    zero(a, RDX)
    a.jmp("inject")
