"""Validation of direct page tables: what a request does, and the types and counts of frames.

The same for a guest in VMX non-root operation and for a deprivileged one; what differs is a `Ground`.

SDM: "Caching Translation Information".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

from attrs import frozen

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R8, R9, R10, R12, R13, R14, RAX, RBP, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import direct as d
from vtsim.ept import spec as e
from vtsim.vmm.programs.words import zero

# fmt: off
DROP, DROP_ALL = 1, 2                               # RBP: what is left to do at the end of a hypercall
REFUSED: Final = 1
# fmt: on


@frozen(kw_only=True)
class Ground(ABC):
    """What validation stands on: who keeps the guest's words, and how its translations are dropped.

    `direct`: linear address of physical address 0. `words`: that of the frames' words, `frames`: how many there are.
    `own`: the first and the last entry of a root that the hypervisor keeps for itself, where it is mapped in the
    guest's tables; the guest's kernel then runs in ring 3, and what it maps is user memory. `keeps`: do translations of
    processes stay there when CR3 is loaded? `shared`: are tables those of several vCPUs, of which only one at a time
    carries requests out?
    """

    direct: int
    words: int
    frames: int
    own: tuple[int, int] | None = None
    keeps: bool = True
    shared: bool = False

    @abstractmethod
    def vcpu(self, field: str) -> Mem:
        """A word of the vCPU: NUMBER, KERNEL_ROOT, SHARED_PAGE, REFUSALS; TOP, where there are `own` entries; VM and
        LOOSE, where tables are shared.
        """

    @abstractmethod
    def work(self, a: Assembler, name: str) -> None:
        """The compiled code around a step."""

    @abstractmethod
    def drop_page(self, a: Assembler) -> None:
        """Drop the translations of the address in R13. Changes RAX and RCX."""

    @abstractmethod
    def loaded(self, a: Assembler) -> Sequence[Mem | None]:
        """The words with the roots in use, which cannot be given up; None: it is in RAX already."""

    @abstractmethod
    def load(self, a: Assembler) -> None:
        """The guest's CR3 <- RAX."""

    def other_requests(self) -> dict[int, str]:
        """Labels of what this hypervisor has beside the common requests, by kind."""
        return {}

    def emit_other_requests(self, a: Assembler) -> None:
        """Their programs, which end at `request_done` or `request_refused`."""
        return

    def begun(self, a: Assembler) -> None:
        """A request of the kind in RAX begins. Changes RCX, RDI and flags."""
        return

    def asks_others(self, a: Assembler) -> None:
        """Other vCPUs are asked for a flush. Changes RAX, RCX and RDI."""
        return

    def others(self, a: Assembler, name: str) -> None:
        """A flush, R12 and R13, that is to be made by other vCPUs: they have made it, on to `request_done`.

        Changes RAX, RCX, RDX, RSI, RDI and R10, of which one that is not to be made by others only RAX and R10.
        """
        if not self.shared:
            return
        a.copy(R10, R12)
        a.shr(R10, d.VCPUS)
        a.test(R10, register=R10)
        a.jcc(ops.CC_Z, f"{name}_not")
        self.asks_others(a)
        a.call(name)
        a.jmp("request_done")
        a.label(f"{name}_not")

    def lost_type(self, a: Assembler) -> None:
        """A frame has lost its type; vCPUs may still have translations by it. Changes RDI."""
        if self.shared:
            a.ld(RDI, self.vcpu("VM"))
            a.st_value(Mem(RDI, self.vcpu("LOOSE").displacement), 1)

    def retype(self, a: Assembler) -> None:
        """A frame without a type is to have one: no vCPU has translations by an earlier type. Changes RAX, RDI."""
        if self.shared:
            a.call("settle_types")


def requests(a: Assembler, ground: Ground) -> None:
    """`direct_multi`: so many requests of the shared page as R13 says. `direct_single`: the one in R12, R13.

    R14 counts what was carried out, R12 and R13 hold one, RBX how many are left. Both end at `direct_done`.
    """
    a.label("direct_multi")
    a.copy(RBX, R13)
    a.cmp(RBX, d.BATCH_LIMIT)
    a.jcc(ops.CC_A, "direct_done")
    a.test(RBX, register=RBX)
    a.jcc(ops.CC_Z, "direct_done")
    a.label("direct_next")
    a.ld(RDI, ground.vcpu("SHARED_PAGE"))
    a.copy(RAX, R14)
    a.shl(RAX, 4)
    a.ldm(Mem(RDI, d.SHARED_REQUESTS, index=RAX), (R12, R13))
    a.call("direct_request")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "direct_refused")
    a.add(R14, 1)
    a.sub(RBX, 1)
    a.jcc(ops.CC_NZ, "direct_next")
    a.jmp("direct_done")
    a.label("direct_single")
    a.call("direct_request")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "direct_refused")
    a.add(R14, 1)
    a.jmp("direct_done")
    a.label("direct_refused")
    a.ld(RAX, ground.vcpu("REFUSALS"))
    a.add(RAX, 1)
    a.st(ground.vcpu("REFUSALS"), RAX)


def subroutines(a: Assembler, ground: Ground) -> None:
    """`direct_request`, and the counting of frames."""
    _request(a, ground)
    _other_requests(a, ground)
    _frames(a, ground)
    _entries(a, ground)


def _request(a: Assembler, ground: Ground) -> None:
    """`direct_request`: carry out R12, R13; RAX <- 0, or not. R14, RBX stay, as in all of these."""
    a.label("direct_request")
    a.copy(RAX, R12)
    a.and_(RAX, d.KIND)
    if ground.own or ground.shared:
        ground.begun(a)
        a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "direct_other")
    ground.work(a, "update_entry")
    a.copy(RSI, R12)
    a.shr(RSI, 12)
    a.call("frame_word")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "request_end")
    a.copy(R8, RCX)
    a.shr(R8, d.TYPE)
    a.and_(R8, d.TYPE_MASK)
    a.jcc(ops.CC_Z, "request_refused")
    a.cmp(R8, d.WRITABLE)
    a.jcc(ops.CC_Z, "request_refused")
    a.cmp(R8, 4)
    a.jcc(ops.CC_NZ, "update_new")
    a.test(R12, 8 * d.KERNEL_HALF)
    a.jcc(ops.CC_NZ, "request_refused")
    a.label("update_new")
    a.test(R13, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, "update_old")
    a.copy(RSI, R13)
    if ground.own:
        a.call("entry_for_ring_3")
        a.copy(R13, RSI)
    a.call("entry_get")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "request_end")
    a.label("update_old")
    a.mov(RDI, ground.direct)
    a.add(RDI, register=R12)
    a.ld(RSI, Mem(RDI))
    a.st(Mem(RDI), R13)
    a.test(RSI, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, "request_done")
    a.call("entry_put")
    a.label("request_done")
    zero(a, RAX)
    a.label("request_end")
    a.ret()
    a.label("request_refused")
    a.mov(RAX, REFUSED)
    a.ret()


def _other_requests(a: Assembler, ground: Ground) -> None:
    """Flushes, pins and CR3; the kind is in RAX."""
    kinds = {
        d.FLUSH_PAGE: "request_flush_page", d.FLUSH_ALL: "request_flush", d.PIN: "request_pin",
        d.UNPIN: "request_unpin", d.LOAD: "request_load", **ground.other_requests(),
    }  # fmt: skip
    a.label("direct_other")
    for kind, label in kinds.items():
        a.cmp(RAX, kind)
        a.jcc(ops.CC_Z, label)
    a.jmp("request_refused")
    a.label("request_flush_page")
    ground.work(a, "invlpg")
    ground.others(a, "flush_page_of_some")
    ground.drop_page(a)
    a.jmp("request_done")
    a.label("request_flush")
    ground.others(a, "flush_some")
    a.or_(RBP, DROP)
    a.jmp("request_done")

    a.label("request_pin")
    ground.work(a, "pin_table")
    a.call("frame_of_value")
    a.jcc(ops.CC_NZ, "request_refused")
    a.copy(RAX, RCX)
    a.shr(RAX, d.TYPE)
    a.and_(RAX, d.TYPE_MASK)
    a.jcc(ops.CC_NZ, "request_refused", comment="in use already, as a root or otherwise")
    a.mov(R8, 4)
    a.call("type_get")
    a.ret()
    a.label("request_unpin")
    ground.work(a, "pin_table")
    a.call("frame_of_value")
    a.jcc(ops.CC_NZ, "request_refused")
    a.call("is_root")
    a.jcc(ops.CC_NZ, "request_refused")
    for current in (*ground.loaded(a), ground.vcpu("KERNEL_ROOT")):
        if current is not None:
            a.ld(RAX, current)
        refused_if_used(a)
    a.mov(R8, 4)
    a.call("type_put")
    a.jmp("request_done")

    a.label("request_load")
    ground.work(a, "load_cr3")
    root_or_refused(a, e.ADDRESS | 0xFFF | e.PTE_NO_EXECUTE)
    a.copy(RAX, R13)
    a.shl(RAX, 1)
    a.shr(RAX, 1)
    ground.load(a)
    a.test(R13, register=R13)
    a.jcc(ops.CC_S, "request_done", comment="bit 63: keep translations")
    a.or_(RBP, DROP)
    a.jmp("request_done")

    ground.emit_other_requests(a)

    a.label("frame_of_value")  # RSI <- frame that R13 names; flags: is it the guest's?
    a.copy(RSI, R13)
    a.and_(RSI, e.ADDRESS)
    a.shr(RSI, 12)
    a.call("frame_word")
    a.test(RAX, register=RAX)
    a.ret()
    a.label("is_root")  # of the word in RCX; flags
    a.copy(RAX, RCX)
    a.shr(RAX, d.TYPE)
    a.and_(RAX, d.TYPE_MASK)
    a.cmp(RAX, 4)
    a.ret()


def _validate_upper_half(a: Assembler, ground: Ground, own: tuple[int, int]) -> None:
    """The hypervisor writes its own entries into a new root; the others are as in every root, or not there."""
    a.cmp(R10, own[0])
    a.jcc(ops.CC_B, "validate_kernel")
    a.cmp(R10, own[1])
    a.jcc(ops.CC_A, "validate_kernel")
    a.ld(RDI, ground.vcpu("TOP"))
    a.ld(RAX, Mem(RDI, 0, index=R10, scale=8))
    a.st(Mem(R9, 0, index=R10, scale=8), RAX)
    a.jmp("validate_good")
    a.label("validate_kernel")
    a.test(RSI, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, "validate_good")


def _frames(a: Assembler, ground: Ground) -> None:
    """`frame_word`, `type_get`, `type_put`: the word of frame RSI; one more or less entry relies on its type R8."""
    a.label("frame_word")  # RDX <- its address, RCX <- the word, RAX <- 0 if the frame is the guest's
    a.cmp(RSI, ground.frames)
    a.jcc(ops.CC_AE, "frame_foreign")
    a.mov(RDX, ground.words, "words of frames")
    a.lea(RDX, Mem(RDX, 0, index=RSI, scale=8))
    a.ld(RCX, Mem(RDX))
    a.copy(RAX, RCX)
    a.shr(RAX, d.OWNER)
    a.ld(RDI, ground.vcpu("NUMBER"))
    a.add(RDI, 1)
    a.sub(RAX, register=RDI)
    a.ret()
    a.label("frame_foreign")
    a.mov(RAX, REFUSED)
    a.ret()

    a.label("type_get")  # RAX <- 0, or not
    a.call("frame_word")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "type_end")
    a.copy(RAX, RCX)
    a.shr(RAX, d.TYPE)
    a.and_(RAX, d.TYPE_MASK)
    a.jcc(ops.CC_Z, "type_new")
    a.cmp(RAX, register=R8)
    a.jcc(ops.CC_NZ, "type_refused")
    a.add(RCX, 1)
    a.st(Mem(RDX), RCX)
    zero(a, RAX)
    a.label("type_end")
    a.ret()
    a.label("type_refused")
    a.mov(RAX, REFUSED)
    a.ret()
    a.label("type_new")
    ground.retype(a)
    ground.work(a, "validate_table")
    a.copy(RAX, R8)
    a.shl(RAX, d.TYPE)
    a.or_(RCX, register=RAX)
    a.add(RCX, 1)
    a.st(Mem(RDX), RCX)
    a.or_(RBP, DROP_ALL)
    _begin_table(a, ground)
    a.label("validate_next")
    a.ld(RSI, Mem(R9, 0, index=R10, scale=8))
    a.cmp(R8, 4)
    a.jcc(ops.CC_NZ, "validate_entry")
    a.cmp(R10, d.KERNEL_HALF)
    a.jcc(ops.CC_B, "validate_entry")
    if ground.own:
        _validate_upper_half(a, ground, ground.own)
    a.mov(RDI, ground.direct)
    a.ld(RAX, ground.vcpu("KERNEL_ROOT"))
    a.add(RDI, register=RAX)
    a.ld(RAX, Mem(RDI, 0, index=R10, scale=8))
    a.emit(ops.XOR, RAX, RSI)
    a.and_(RAX, ~(e.PTE_ACCESSED | (e.PTE_USER if ground.own else 0)))
    a.jcc(ops.CC_NZ, "validate_undo")
    if ground.own:
        a.ld(RAX, Mem(RDI, 0, index=R10, scale=8))
        a.st(Mem(R9, 0, index=R10, scale=8), RAX)
    a.jmp("validate_good")
    a.label("validate_entry")
    a.test(RSI, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, "validate_good")
    if ground.own:
        a.call("entry_for_ring_3")
        a.st(Mem(R9, 0, index=R10, scale=8), RSI)
    a.call("entry_get")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "validate_undo")
    a.label("validate_good")
    a.add(R10, 1)
    a.cmp(R10, 512)
    a.jcc(ops.CC_NZ, "validate_next")
    _end_table(a)
    zero(a, RAX)
    a.ret()
    a.label("validate_undo")
    a.call("let_go")
    _end_table(a)
    a.call("frame_word")
    a.call("no_type")
    a.mov(RAX, REFUSED)
    a.ret()

    a.label("type_put")
    a.call("frame_word")
    a.label("type_less")
    a.sub(RCX, 1)
    a.st(Mem(RDX), RCX)
    a.mov(RAX, d.COUNT)
    a.test(RAX, register=RCX)
    a.jcc(ops.CC_NZ, "type_end")
    ground.work(a, "validate_table")
    a.call("no_type")
    a.or_(RBP, DROP_ALL)
    _begin_table(a, ground)
    a.mov(R10, 512)
    a.cmp(R8, 4)
    a.jcc(ops.CC_NZ, "put_entries")
    a.mov(R10, d.KERNEL_HALF)
    a.label("put_entries")
    a.call("let_go")
    _end_table(a)
    a.ret()

    a.label("no_type")  # of the frame whose word is RCX at RDX
    a.shr(RCX, d.OWNER)
    a.shl(RCX, d.OWNER)
    a.st(Mem(RDX), RCX)
    ground.lost_type(a)
    a.ret()

    a.label("let_go")  # nothing relies any more on what the R10 first entries of the table at R9 lead to
    a.cmp(R8, 4)
    a.jcc(ops.CC_NZ, "let_go_next")
    a.cmp(R10, d.KERNEL_HALF)
    a.jcc(ops.CC_BE, "let_go_next")
    a.mov(R10, d.KERNEL_HALF)
    a.label("let_go_next")
    a.test(R10, register=R10)
    a.jcc(ops.CC_Z, "type_end")
    a.sub(R10, 1)
    a.ld(RSI, Mem(R9, 0, index=R10, scale=8))
    a.test(RSI, e.PTE_PRESENT)
    a.jcc(ops.CC_Z, "let_go_next")
    a.call("entry_put")
    a.jmp("let_go_next")


def refused_if_used(a: Assembler) -> None:
    """A request about the root in frame RSI is refused if that is the one in RAX. Changes RAX."""
    a.and_(RAX, e.ADDRESS)
    a.shr(RAX, 12)
    a.cmp(RAX, register=RSI)
    a.jcc(ops.CC_Z, "request_refused")


def root_or_refused(a: Assembler, bits: int) -> None:
    """A request whose value R13 has other bits, or is not of a root of the VM, is refused. Changes RAX."""
    a.mov(RAX, ~bits)
    a.test(RAX, register=R13)
    a.jcc(ops.CC_NZ, "request_refused")
    a.call("frame_of_value")
    a.jcc(ops.CC_NZ, "request_refused")
    a.call("is_root")
    a.jcc(ops.CC_NZ, "request_refused")


def _begin_table(a: Assembler, ground: Ground) -> None:
    """R9 <- the linear address of table RSI, R10 <- its first entry; what they were is kept, with RSI."""
    for register in (RSI, R9, R10):
        a.push(register)
    a.shl(RSI, 12)
    a.mov(R9, ground.direct)
    a.add(R9, register=RSI)
    zero(a, R10)


def _end_table(a: Assembler) -> None:
    for register in (R10, R9, RSI):
        a.pop(register)


def _entries(a: Assembler, ground: Ground) -> None:
    """`entry_get`, `entry_put`: entry RSI of a table of level R8 begins or ceases to rely on its frame."""
    a.label("entry_get")  # RAX <- 0, or not
    a.mov(RAX, ~d.LEGAL)
    a.test(RAX, register=RSI)
    a.jcc(ops.CC_NZ, "type_refused")
    a.cmp(R8, 1)
    a.jcc(ops.CC_Z, "leaf_get")
    a.sub(R8, 1)
    a.and_(RSI, e.ADDRESS)
    a.shr(RSI, 12)
    a.call("type_get")
    a.add(R8, 1)
    a.ret()
    a.label("leaf_get")
    a.push(RSI)
    a.and_(RSI, e.ADDRESS)
    a.shr(RSI, 12)
    a.call("frame_word")
    a.pop(RSI)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "type_end")
    a.test(RSI, e.PTE_WRITE)
    a.jcc(ops.CC_Z, "type_end")
    a.copy(RAX, RCX)
    a.shr(RAX, d.TYPE)
    a.and_(RAX, d.TYPE_MASK)
    a.jcc(ops.CC_Z, "leaf_new" if ground.shared else "leaf_writable")
    a.cmp(RAX, d.WRITABLE)
    a.jcc(ops.CC_NZ, "type_refused")
    a.label("leaf_writable")
    a.mov(RAX, d.WRITABLE << d.TYPE)
    a.or_(RCX, register=RAX)
    a.add(RCX, 1)
    a.st(Mem(RDX), RCX)
    zero(a, RAX)
    a.ret()
    if ground.shared:
        a.label("leaf_new")
        ground.retype(a)
        a.jmp("leaf_writable")

    if ground.own:
        a.label("entry_for_ring_3")  # RSI as the processor needs it
        a.cmp(R8, 1)
        a.jcc(ops.CC_NZ, "entry_of_upper_table")
        a.test(RSI, e.PTE_USER)
        a.jcc(ops.CC_Z, "entry_of_kernel")
        if ground.keeps:
            a.or_(RSI, e.PTE_GLOBAL)
        else:
            a.and_(RSI, ~e.PTE_GLOBAL)
        a.ret()
        a.label("entry_of_kernel")
        a.and_(RSI, ~e.PTE_GLOBAL)
        a.label("entry_of_upper_table")
        a.or_(RSI, e.PTE_USER)
        a.ret()

    a.label("entry_put")
    a.cmp(R8, 1)
    a.jcc(ops.CC_Z, "leaf_put")
    a.sub(R8, 1)
    a.and_(RSI, e.ADDRESS)
    a.shr(RSI, 12)
    a.call("type_put")
    a.add(R8, 1)
    a.ret()
    a.label("leaf_put")
    a.test(RSI, e.PTE_WRITE)
    a.jcc(ops.CC_Z, "type_end")
    a.and_(RSI, e.ADDRESS)
    a.shr(RSI, 12)
    a.call("frame_word")
    a.sub(RCX, 1)
    a.st(Mem(RDX), RCX)
    a.mov(RAX, d.COUNT)
    a.test(RAX, register=RCX)
    a.jcc(ops.CC_NZ, "type_end")
    a.jmp("no_type")
