"""Page sharing: pages of VMs that hold the same become one frame, which is read-only and copied where it is written.

A scanner looks at some pages of its VM at a time. A page that is as it was a round ago is looked for among the shared
frames, by a checksum and then by its contents; found, it gives way to the shared frame. Else it is noted; if somebody
noted the same contents before, the page becomes a shared frame itself, which that somebody's scanner finds next time.
So every VM changes its own tables only.

SDM: "EPT Violations".
Not modelled: sharing of parts of large pages; pages of zeroes that nobody stored by value.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.memory import HOLE_FIRST, HOLE_LAST
from vtsim.base.words import byte_offsets
from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.kernels.buddy import RECORD_WORDS
from vtsim.cpu.kernels.memory_hooks import PAGE_EQUAL, PAGE_SUM
from vtsim.cpu.slots import R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.ept import spec as e
from vtsim.vmm import layout as at
from vtsim.vmm.programs import daemons, several, swap
from vtsim.vmm.programs.ept_leaf import own_page
from vtsim.vmm.programs.timer import begin_daemon, end_daemon
from vtsim.vmm.programs.words import count, vcpu, work, zero
from vtsim.vmm.registry import Path

# fmt: off
SHARED_WORDS: Final = (     # of a shared frame, in a table by checksum
    ("SUM",        1, "checksum of its contents; 0 nothing stood here yet, -1 nothing stands here any more"),
    ("FRAME",      1, "frame number"),
    ("REFERENCES", 1, "pages of VMs that it is behind"),
)
SHARING_WORDS: Final = (    # of the host
    ("LOCK",       1, "is one of the CPUs changing the tables?"),
    ("FRAMES",     1, "shared frames now"),
    ("PAGES",      1, "pages of VMs that they are behind"),
)
SHARED: Final = byte_offsets(SHARED_WORDS)
SHARING: Final = byte_offsets(SHARING_WORDS)
SHARED_BYTES: Final = 32
NOTED_BYTES: Final = 16     # of a page that was as it was a round ago: checksum, frame
GONE: Final = -1
PROBES: Final = 32          # places of the table that are looked at for one checksum
# fmt: on


def due(a: Assembler, path: Path) -> None:
    """`share_due`: look at the next pages of this VM. R13 address, R12 pages left, RBX entry at RBP, R14 checksum."""
    mask = path.addresses["share_slots"] - 1
    begin_daemon(a, path, daemons.SHARING)
    a.mov(R12, path.vmm.sharing.pages)
    a.ld(R13, vcpu("SHARE_CURSOR"))
    a.label("share_next")
    work(a, path, "share_scan")
    several.lock_tables(a, path)
    own_page(a, R13, "share_step")
    _direct(a, RDI, RBX)
    a.hook(PAGE_SUM)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "share_step", comment="nobody knows what is in it")
    a.copy(R14, RAX)
    a.shl(RDX, 32)
    a.or_(RDX, register=RAX)
    a.copy(RDI, R13)
    a.shr(RDI, 9)
    a.ld(RSI, vcpu("SHARE_MARKS"))
    a.add(RDI, register=RSI)
    a.ld(RAX, Mem(RDI))
    a.st(Mem(RDI), RDX)
    a.cmp(RAX, register=RDX)
    a.jcc(ops.CC_NZ, "share_step", comment="it was written since, or is seen for the first time")
    _lock(a, path, "share_lock")

    a.copy(R9, R14)
    a.mov(R8, PROBES)
    zero(a, R11)
    a.label("share_probe")
    a.and_(R9, mask)
    a.copy(R10, R9)
    a.shl(R10, 5)
    a.mov(RAX, path.addresses["shared"])
    a.add(R10, register=RAX)
    a.ld(RAX, Mem(R10, SHARED["SUM"]))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "share_end_of_chain")
    a.jcc(ops.CC_S, "share_gone")
    a.cmp(RAX, register=R14)
    a.jcc(ops.CC_NZ, "share_other")
    a.ld(RSI, Mem(R10, SHARED["FRAME"]))
    a.shl(RSI, 12)
    _equal(a, "share_other")
    _merge(a, path)
    a.label("share_gone")
    a.test(R11, register=R11)
    a.jcc(ops.CC_NZ, "share_other")
    a.copy(R11, R10)
    a.label("share_other")
    a.add(R9, 1)
    a.sub(R8, 1)
    a.jcc(ops.CC_NZ, "share_probe")
    a.test(R11, register=R11)
    a.jcc(ops.CC_Z, "share_seen", comment="the table is full around here")
    a.label("share_end_of_chain")
    a.test(R11, register=R11)
    a.jcc(ops.CC_Z, "share_guess")
    a.copy(R10, R11)

    a.label("share_guess")
    a.copy(R9, R14)
    a.and_(R9, mask)
    a.shl(R9, 4)
    a.mov(RAX, path.addresses["noted"])
    a.add(R9, register=RAX)
    a.ld(RAX, Mem(R9))
    a.ld(RSI, Mem(R9, 8))
    a.cmp(RAX, register=R14)
    a.jcc(ops.CC_NZ, "share_note")
    a.shl(RSI, 12)
    a.copy(RAX, RBX)
    _address(a, RAX)
    a.cmp(RAX, register=RSI)
    a.jcc(ops.CC_Z, "share_seen")
    _equal(a, "share_note")
    _publish(a, path)
    a.label("share_note")
    a.st(Mem(R9), R14)
    a.copy(RAX, RBX)
    _address(a, RAX)
    a.shr(RAX, 12)
    a.st(Mem(R9, 8), RAX)
    a.label("share_seen")
    _unlock(a, path)

    a.label("share_step")
    several.unlock_tables(a, path)
    a.add(R13, 4096)
    a.cmp(R13, HOLE_FIRST << 12)
    a.jcc(ops.CC_NZ, "share_below_hole")
    a.mov(R13, (HOLE_LAST + 1) << 12)
    a.label("share_below_hole")
    a.ld(RAX, vcpu("MEMORY_END"))
    a.cmp(R13, register=RAX)
    a.jcc(ops.CC_B, "share_within")
    zero(a, R13)
    count(a, "SHARE_ROUNDS")
    a.label("share_within")
    a.sub(R12, 1)
    a.jcc(ops.CC_NZ, "share_next")
    a.st(vcpu("SHARE_CURSOR"), R13)
    end_daemon(a, path, daemons.SHARING, "share_period")


def _merge(a: Assembler, path: Path) -> None:
    """The shared frame of R10 takes the place of the page.

    Other vCPUs may have stored to it since it was looked at: it is taken from all of them, and looked at again.
    """
    work(a, path, "share_merge")
    if path.several:
        a.push(R10)
        a.call("unmap_leaf")
        a.pop(R10)
        a.ld(RSI, Mem(R10, SHARED["FRAME"]))
        a.shl(RSI, 12)
        _equal(a, "share_seen")
    a.ld(RAX, Mem(R10, SHARED["REFERENCES"]))
    a.add(RAX, 1)
    a.st(Mem(R10, SHARED["REFERENCES"]), RAX)
    a.copy(RDX, RBX)
    a.mov(RAX, ~(e.ADDRESS | e.PTE_WRITE | e.PTE_DIRTY))
    a.and_(RDX, register=RAX)
    a.ld(RAX, Mem(R10, SHARED["FRAME"]))
    a.shl(RAX, 12)
    a.or_(RDX, register=RAX)
    a.st(Mem(RBP), RDX)
    _add(a, path, "PAGES", 1)
    if not path.several:
        a.call("unmap_leaf")
    a.copy(RSI, RBX)
    _address(a, RSI)
    a.shr(RSI, 12)
    a.call("give_frame")
    if path.vmm.swap.on:
        swap.bump(a, path, "RESIDENT", -1)
    count(a, "PAGES_MERGED")
    a.jmp("share_seen")


def _publish(a: Assembler, path: Path) -> None:
    """The page becomes a shared frame, in the free place at R10; such a frame is counted as nobody's."""
    work(a, path, "share_merge")
    a.copy(RDX, RBX)
    a.mov(RAX, ~(e.PTE_WRITE | e.PTE_DIRTY))
    a.and_(RDX, register=RAX)
    a.st(Mem(RBP), RDX)
    a.st(Mem(R10, SHARED["SUM"]), R14)
    a.copy(RAX, RBX)
    _address(a, RAX)
    a.shr(RAX, 12)
    a.st(Mem(R10, SHARED["FRAME"]), RAX)
    a.st_value(Mem(R10, SHARED["REFERENCES"]), 1)
    _record(a, path, RDI, RAX)
    a.st(Mem(RDI), R10)
    _add(a, path, "FRAMES", 1)
    _add(a, path, "PAGES", 1)
    a.call("unmap_leaf")
    if path.vmm.swap.on:
        swap.bump(a, path, "RESIDENT", -1)
    count(a, "PAGES_PUBLISHED")
    a.jmp("share_seen")


def subroutines(a: Assembler, path: Path) -> None:
    """`share_due`; `unshare` (page of R13, entry RBX): RDX <- address of a frame of its own, with the same contents.

    `drop_shared`: one page less is behind the shared frame of the entry RBX. Keeps RDX RBX RBP R13.
    """
    due(a, path)
    a.label("unshare")
    a.call("take_frame")
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_S, "unshare_fails")
    a.shl(RAX, 12)
    a.copy(RDX, RAX)
    a.mov(RDI, at.HOST_DIRECT)
    a.add(RDI, register=RAX)
    _direct(a, RSI, RBX)
    a.hook(hooks.PAGE_COPY)
    a.call("drop_shared")
    if path.vmm.swap.on:
        swap.bump(a, path, "RESIDENT", 1)
    count(a, "PAGES_UNSHARED")
    a.ret()
    a.label("drop_shared")
    _lock(a, path, "unshare_lock")
    a.copy(RAX, RBX)
    _address(a, RAX)
    a.shr(RAX, 12)
    a.copy(RSI, RAX)
    _record(a, path, RDI, RAX)
    _add(a, path, "PAGES", -1)
    a.ld(R10, Mem(RDI))
    a.ld(RAX, Mem(R10, SHARED["REFERENCES"]))
    a.sub(RAX, 1)
    a.st(Mem(R10, SHARED["REFERENCES"]), RAX)
    a.jcc(ops.CC_NZ, "unshared")
    a.st_value(Mem(R10, SHARED["SUM"]), GONE)
    zero(a, RAX)
    a.st(Mem(RDI), RAX)
    _add(a, path, "FRAMES", -1)
    a.call("give_frame")
    a.label("unshared")
    _unlock(a, path)
    a.ret()
    a.label("unshare_fails")
    a.copy(RSP, R15, comment="the stack is given up")
    a.jmp("no_host_memory")


def _add(a: Assembler, path: Path, word: str, number: int) -> None:
    """Count, while nobody else does. Changes RAX RCX."""
    a.mov(RCX, path.addresses["sharing"])
    a.ld(RAX, Mem(RCX, SHARING[word]))
    a.add(RAX, number)
    a.st(Mem(RCX, SHARING[word]), RAX)


def _equal(a: Assembler, otherwise: str) -> None:
    """Go on if the page holds the same as the frame at RSI."""
    a.mov(RAX, at.HOST_DIRECT)
    a.add(RSI, register=RAX)
    _direct(a, RDI, RBX)
    a.hook(PAGE_EQUAL)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, otherwise)


def _address(a: Assembler, register: int) -> None:
    """The address in an entry. Changes RCX."""
    a.mov(RCX, e.ADDRESS)
    a.and_(register, register=RCX)


def _direct(a: Assembler, to: int, entry: int) -> None:
    """The host's linear address of the frame in an entry. Changes RCX."""
    a.copy(to, entry)
    _address(a, to)
    a.mov(RCX, at.HOST_DIRECT)
    a.add(to, register=RCX)


def _record(a: Assembler, path: Path, to: int, frame: int) -> None:
    """The linear address of a frame's record, whose first word leads to the shared frame's."""
    a.copy(to, frame)
    a.shl(to, 3 + RECORD_WORDS.bit_length() - 1)
    a.mov(RCX, path.addresses["records"])
    a.add(to, register=RCX)


def _lock(a: Assembler, path: Path, label: str) -> None:
    """Enter what only one CPU may be in. Changes RAX RCX."""
    a.mov(RCX, path.addresses["sharing"])
    a.label(label)
    a.mov(RAX, 1)
    a.xadd(Mem(RCX), RAX)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, f"{label}ed")
    a.mov(RAX, -1)
    a.xadd(Mem(RCX), RAX)
    a.op(ops.PAUSE)
    a.jmp(label)
    a.label(f"{label}ed")


def _unlock(a: Assembler, path: Path) -> None:
    """Leave it. Changes RAX RCX."""
    a.mov(RCX, path.addresses["sharing"])
    a.mov(RAX, -1)
    a.xadd(Mem(RCX), RAX)
