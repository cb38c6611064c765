"""Dirty pages of the mapped file: found by the bits of its tree, taken from whoever may store to them, and written.

A page that is to be written is no longer dirty, and whoever maps it loses the right to store (page_mkclean): the
next store faults and makes it dirty again. So a store is in what is written, or the page is dirty behind it. The
device has a queue of requests in memory, a doorbell for as long as it is idle, and an interrupt for what it has done.

Who has dirtied 32 pages looks how many are dirty: beyond a background limit it writes them, half way from there to the
limit it waits until fewer are. Where the host has the file, a store waits for an earlier write of its page, and what is
written is a copy (Linux, fs/fuse/file.c).

Not modelled: a thread of its own that writes; pages written because of their age (30 s); pages of one request; the
file's own metadata; the pace at which writers are held back; several CPUs.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.memory import PAGE_BYTES
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.guest.file_system import DOORBELL, ENTRIES
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel import page_cache as cache
from vtsim.guest.kernel.dirty_pages import count, written
from vtsim.guest.kernel.lengths import length
from vtsim.guest.kernel.page_cache import FileOptions

# fmt: off
# --- the queue: requests that were ever made and done, whether the device wants its doorbell, requests whose end was
# seen, how often the doorbell was rung; then an entry for each: guest-physical address of the data, number of the page
(Q_POSTED, Q_DONE, Q_NOTIFY, Q_SEEN, Q_KICKS) = range(0, 40, 8)
Q_ENTRIES, ENTRY_BYTES = 2048, 16
QUEUE_BYTES: Final = Q_ENTRIES + ENTRIES * ENTRY_BYTES
PLUG: Final = 32                                   # requests that are gathered: BLK_MAX_REQUEST_COUNT
# fmt: on


@path("write-back")
def write_back(a: Assembler, kernel: KernelOptions) -> None:
    """`write_dirty`: begin to write all dirty pages, in order.

    One that is being written is left dirty where R15 is 0 (WB_SYNC_NONE), else waited for. Interrupts are off; clobbers
    all but R11.
    """
    file = written(kernel)
    if file is None:
        return
    a.activity = ops.DRIVER
    a.label("write_dirty")
    a.mov(s.R13, file.mapping)
    a.ld(s.R13, Mem(s.R13, cache.X_ROOT))
    a.call(f"write_level_{file.levels - 1}")
    if not file.bounce:  # what is still gathered
        a.call("ring_for_file")
    a.ret()
    for level in reversed(range(file.levels)):
        _write_level(a, level)
    _write_page(a, kernel, file)


def _write_level(a: Assembler, level: int) -> None:
    """Write what is dirty below the node at R13. RBX is the node, R12 what is left of its bits, R14 the slot."""
    name, kept = f"write_level_{level}", (s.RBX, s.R12, s.R13, s.R14)
    a.label(name)
    for register in kept:
        a.push(register)
    a.copy(s.RBX, s.R13)
    a.ld(s.R12, Mem(s.RBX, cache.NODE_DIRTY))
    a.mov(s.R14, 0)
    a.label(f"{name}_slot")
    a.test(s.R12, -1)
    a.jcc(ops.CC_Z, f"{name}_done")
    a.test(s.R12, 1)
    a.jcc(ops.CC_Z, f"{name}_next")
    a.ld(s.R13, Mem(s.RBX, cache.NODE_HEADER, index=s.R14, scale=8))
    if level:
        a.call(f"write_level_{level - 1}")
        a.ld(s.RAX, Mem(s.R13, cache.NODE_DIRTY))
        a.test(s.RAX, -1)
        a.jcc(ops.CC_NZ, f"{name}_next")
        _clear_bit(a)
    else:
        a.label("write_when_idle")
        a.ld(s.RAX, Mem(s.R13, cache.P_FLAGS))
        a.test(s.RAX, cache.WRITEBACK)
        a.jcc(ops.CC_Z, "write_idle_page")
        a.test(s.R15, -1)
        a.jcc(ops.CC_Z, f"{name}_next")
        a.call("ring_for_file")
        a.call("sleep_for_file")
        a.jmp("write_when_idle")
        a.label("write_idle_page")
        _clear_bit(a)
        a.call("write_page")
    a.label(f"{name}_next")
    a.shr(s.R12, 1)
    a.add(s.R14, 1)
    a.jmp(f"{name}_slot")
    a.label(f"{name}_done")
    for register in reversed(kept):
        a.pop(register)
    a.ret()


def _clear_bit(a: Assembler) -> None:
    """Clear the bit of slot R14 of the node at RBX. Clobbers RAX RDI RSI."""
    a.lea(s.RDI, Mem(s.RBX, cache.NODE_DIRTY))
    a.copy(s.RSI, s.R14)
    a.hook(hooks.CLEAR_BIT)


def _write_page(a: Assembler, kernel: KernelOptions, file: FileOptions) -> None:
    """`write_page`: make a request of the page whose descriptor is at R13; `ring_for_file`: tell the device."""
    a.label("write_page")
    a.work(length("write_page"))
    a.ld(s.RAX, Mem(s.R13, cache.P_FLAGS))
    a.and_(s.RAX, ~cache.DIRTY)
    a.or_(s.RAX, cache.WRITEBACK)
    a.st(Mem(s.R13, cache.P_FLAGS), s.RAX)
    count(a, file, cache.X_DIRTY, -1)
    count(a, file, cache.X_WRITEBACK, 1)
    a.ld(s.RAX, Mem(s.R13, cache.P_MAPPED))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_S, "write_unmapped")
    a.call("clean_mappings")
    a.label("write_unmapped")
    a.mov(s.R8, file.queue)
    a.ld(s.RDX, Mem(s.R8, Q_POSTED))
    a.ld(s.RAX, Mem(s.R8, Q_SEEN))
    a.add(s.RAX, ENTRIES)
    a.cmp(s.RDX, register=s.RAX)
    a.jcc(ops.CC_B, "write_room")
    if not file.bounce:
        a.call("ring_for_file")
    a.call("sleep_for_file")
    a.jmp("write_unmapped")
    a.label("write_room")
    a.work(length("fuse_write" if file.bounce else "disk_write"))
    a.and_(s.RDX, ENTRIES - 1)
    a.copy(s.RSI, s.R13)
    cache.to_frame(a, file, s.RSI)
    if file.bounce:
        a.mov(s.R9, kernel.places.direct)
        a.copy(s.RDI, s.RDX)
        a.shl(s.RDI, cache.FRAME_BITS)
        a.add(s.RDI, file.bounce << cache.FRAME_BITS)
        a.copy(s.R10, s.RDI)
        a.add(s.RDI, register=s.R9)
        a.add(s.RSI, register=s.R9)
        a.hook(hooks.PAGE_COPY)
        a.copy(s.RSI, s.R10)
    a.shl(s.RDX, ENTRY_BYTES.bit_length() - 1)
    a.add(s.RDX, register=s.R8)
    a.st(Mem(s.RDX, Q_ENTRIES), s.RSI)
    a.ld(s.RAX, Mem(s.R13, cache.P_INDEX))
    a.st(Mem(s.RDX, Q_ENTRIES + 8), s.RAX)
    a.ld(s.RAX, Mem(s.R8, Q_POSTED))
    a.add(s.RAX, 1)
    a.st(Mem(s.R8, Q_POSTED), s.RAX)
    if not file.bounce:
        a.test(s.RAX, PLUG - 1)
        a.jcc(ops.CC_NZ, "rung")
    a.label("ring_for_file")
    a.mov(s.R8, file.queue)
    a.ld(s.RAX, Mem(s.R8, Q_NOTIFY))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "rung")
    a.ld(s.RAX, Mem(s.R8, Q_POSTED))
    a.ld(s.RCX, Mem(s.R8, Q_DONE))
    a.cmp(s.RAX, register=s.RCX)
    a.jcc(ops.CC_Z, "rung")
    a.ld(s.RAX, Mem(s.R8, Q_KICKS))
    a.add(s.RAX, 1)
    a.st(Mem(s.R8, Q_KICKS), s.RAX)
    a.mov(s.RCX, kernel.places.direct + DOORBELL)
    a.st(Mem(s.RCX, size=4), s.RAX, "the doorbell")
    a.label("rung")
    a.ret()


@path("end of write-back")
def end(a: Assembler, kernel: KernelOptions) -> None:
    """`sleep_for_file`, `call_sync`: until something, or everything, is written; `file_written`: the interrupt."""
    file = written(kernel)
    if file is None:
        return
    a.activity = ops.DRIVER
    a.label("sleep_for_file")
    a.work(length("wait_event"))
    a.push(s.RBX)
    a.ld(s.RBX, at.cpu_word(at.CURRENT))
    a.st_value(Mem(s.RBX, at.T_STATE), at.DEVICE_WAIT)
    a.call("schedule")
    a.pop(s.RBX)
    a.ret()

    a.label("call_sync")
    a.work(length("msync"))
    a.op(ops.CLI)
    a.mov(s.R15, 1)
    a.call("write_dirty")
    a.label("sync_wait")
    a.mov(s.R8, file.mapping)
    a.ld(s.RAX, Mem(s.R8, cache.X_WRITEBACK))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "synced")
    a.call("sleep_for_file")
    a.jmp("sync_wait")
    a.label("synced")
    a.op(ops.STI)
    a.mov(s.RAX, 0)
    a.ret()

    a.activity = ops.INTERRUPT_PATH
    a.label("file_written")  # RBX: the vector
    a.cmp(s.RBX, at.FILE_VECTOR)
    a.jcc(ops.CC_NZ, "dma_done" if kernel.dma else "interrupt_done")
    a.work(length("device_interrupt"))
    a.mov(s.R12, file.queue)
    a.label("written_next")
    a.ld(s.RDX, Mem(s.R12, Q_SEEN))
    a.ld(s.RAX, Mem(s.R12, Q_DONE))
    a.cmp(s.RAX, register=s.RDX)
    a.jcc(ops.CC_Z, "all_written")
    a.work(length("fuse_written" if file.bounce else "disk_written"))
    a.add(s.RDX, 1)
    a.st(Mem(s.R12, Q_SEEN), s.RDX)
    a.sub(s.RDX, 1)
    a.and_(s.RDX, ENTRIES - 1)
    a.shl(s.RDX, ENTRY_BYTES.bit_length() - 1)
    a.add(s.RDX, register=s.R12)
    a.ld(s.RSI, Mem(s.RDX, Q_ENTRIES + 8))
    a.shl(s.RSI, cache.PAGE_BITS)
    a.mov(s.RAX, file.descriptors)
    a.add(s.RSI, register=s.RAX)
    a.ld(s.RAX, Mem(s.RSI, cache.P_FLAGS))
    a.and_(s.RAX, ~cache.WRITEBACK)
    a.st(Mem(s.RSI, cache.P_FLAGS), s.RAX)
    count(a, file, cache.X_WRITEBACK, -1)
    a.jmp("written_next")
    a.label("all_written")
    a.ld(s.RSI, at.cpu_word(at.FIRST_TASK))
    a.mov(s.R8, kernel.tasks)
    a.label("written_wake")
    a.ld(s.RAX, Mem(s.RSI, at.T_STATE))
    a.cmp(s.RAX, at.DEVICE_WAIT)
    a.jcc(ops.CC_NZ, "written_next_task")
    a.work(length("wake"))
    a.st_value(Mem(s.RSI, at.T_STATE), at.RUNNABLE)
    a.st_value(at.cpu_word(at.NEED_RESCHED), 1)
    a.label("written_next_task")
    a.ld(s.RSI, Mem(s.RSI, at.T_NEXT))
    a.sub(s.R8, 1)
    a.jcc(ops.CC_NZ, "written_wake")
    a.jmp("interrupt_done")


def queue_words() -> list[int]:
    """The queue before the first request: the device is idle."""
    return [0, 0, 1] + [0] * (QUEUE_BYTES // 8 - 3)


assert QUEUE_BYTES <= PAGE_BYTES
