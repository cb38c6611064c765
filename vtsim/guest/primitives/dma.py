"""What drivers ask of devices: buffers mapped, given to the device, waited for, unmapped.

The loop runs in the kernel. R15 is the port; of the descriptors that were ever posted, P_PRODUCER counts all and
P_CONSUMER those whose buffers are unmapped again. Buffers take turns; a slot for each keeps where it is mapped.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest import spec
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel.dma_map import name_of
from vtsim.guest.kernel.invalidation import add_to, count
from vtsim.guest.kernel.timer import read_tsc
from vtsim.guest.primitives import Stage, again, counted_in_r12, lowering


def _port(word: int) -> Mem:
    return Mem(s.R15, word)


@lowering(spec.DmaBuffersSpec, ring=0)
def dma_buffers(a: Assembler, phase: spec.DmaBuffersSpec, at: Stage) -> None:
    """Post all groups, then for each iteration reap one and post it again, then reap them all."""
    place = at.dma
    assert place is not None
    a.activity = ops.DRIVER
    a.mov(s.R15, place.port)
    read_tsc(a, s.RCX)
    a.st(_port(d.S_STARTED), s.RCX)
    a.mov(s.RAX, place.slots)
    a.st(_port(d.P_SLOTS), s.RAX)
    for word in (d.P_POST, d.P_REAP):
        a.st_value(_port(word), 0)
    a.mov(s.R12, phase.groups)
    a.label(at.label("fill"))
    a.call(at.label("post"))
    again(a, at.label("fill"))
    label = counted_in_r12(a, at, at.scaled(phase.iterations))
    a.call(at.label("reap"))
    a.call(at.label("post"))
    again(a, label)
    a.mov(s.R12, phase.groups)
    a.label(at.label("drain"))
    a.call(at.label("reap"))
    again(a, at.label("drain"))
    if phase.mapping == "once":
        _release(a, phase, at)
    read_tsc(a, s.RCX)
    a.ld(s.RAX, _port(d.S_STARTED))
    a.sub(s.RCX, register=s.RAX)
    add_to(a, d.S_ELAPSED, s.RCX)
    a.mov(s.RAX, 0)
    a.ret()
    _post(a, phase, at)
    _reap(a, phase, at)


def _next_slot(a: Assembler, phase: spec.DmaBuffersSpec, at: Stage, word: int, name: str = "") -> None:
    """RBP <- what is kept of the next buffer; after the last comes the first again. Clobbers RAX."""
    name = at.label(name or f"slot_{word}")
    a.ld(s.RAX, _port(word))
    a.ld(s.RBP, _port(d.P_SLOTS))
    a.add(s.RBP, register=s.RAX)
    a.add(s.RAX, d.SLOT_BYTES)
    a.cmp(s.RAX, phase.buffers * d.SLOT_BYTES)
    a.jcc(ops.CC_NZ, name)
    a.mov(s.RAX, 0)
    a.label(name)
    a.st(_port(word), s.RAX)


def _post(a: Assembler, phase: spec.DmaBuffersSpec, at: Stage) -> None:
    """Map a group and ring the doorbell."""
    stride, whole = phase.buffer_pages * phase.page_bytes, phase.mapping == "group"
    writes = d.DEVICE_WRITES if phase.direction == "receive" else 0
    a.activity = ops.DRIVER
    a.label(at.label("post"))
    a.mov(s.R13, phase.group)
    a.label(at.label("post_next"))
    _next_slot(a, phase, at, d.P_POST)
    if whole:  # at the first buffer of a group
        a.cmp(s.R13, phase.group)
        a.jcc(ops.CC_NZ, at.label("mapped"))
    elif phase.mapping == "once":
        a.ld(s.RBX, Mem(s.RBP))
        a.test(s.RBX, -1)
        a.jcc(ops.CC_NZ, at.label("mapped"))
    a.ld(s.RDI, Mem(s.RBP, d.SLOT_BUFFER))
    a.mov(s.RSI, phase.buffer_pages * (phase.group if whole else 1))
    read_tsc(a, s.R14)
    a.call(_routine(phase, at, "map"))
    a.copy(s.RBX, s.RAX)
    read_tsc(a, s.RCX)
    a.sub(s.RCX, register=s.R14)
    add_to(a, d.S_MAP_CYCLES, s.RCX)
    count(a, d.S_MAPS)
    a.label(at.label("mapped"))
    a.st(Mem(s.RBP), s.RBX)
    a.ld(s.RDX, _port(d.P_PRODUCER))
    a.copy(s.RCX, s.RDX)
    a.and_(s.RCX, d.RING_ENTRIES - 1)
    a.shl(s.RCX, 4)
    a.ld(s.RAX, _port(d.P_RING))
    a.add(s.RCX, register=s.RAX)
    a.st(Mem(s.RCX), s.RBX)
    a.mov(s.RAX, phase.bytes | writes)
    a.st(Mem(s.RCX, 8), s.RAX)
    a.add(s.RDX, 1)
    a.st(_port(d.P_PRODUCER), s.RDX)
    a.add(s.RBX, stride)
    a.sub(s.R13, 1)
    a.jcc(ops.CC_NZ, at.label("post_next"))
    a.ld(s.RCX, _port(d.P_DOORBELL))
    a.st(Mem(s.RCX, size=4), s.RDX, "the doorbell")
    a.ret()


def _reap(a: Assembler, phase: spec.DmaBuffersSpec, at: Stage) -> None:
    """Wait until the oldest group is done, and unmap it, unless buffers stay mapped."""
    whole = phase.mapping == "group"
    a.activity = ops.DRIVER
    a.label(at.label("reap"))
    a.ld(s.RSI, _port(d.P_CONSUMER))
    a.add(s.RSI, phase.group)
    a.call("dma_sleep" if phase.wait == "interrupt" else "dma_poll")
    a.mov(s.R13, phase.group)
    a.label(at.label("reap_next"))
    _next_slot(a, phase, at, d.P_REAP)
    a.ld(s.RDX, _port(d.P_CONSUMER))
    a.add(s.RDX, 1)
    a.st(_port(d.P_CONSUMER), s.RDX)
    if whole:
        a.cmp(s.R13, phase.group)
        a.jcc(ops.CC_NZ, at.label("unmapped"))
    if phase.mapping != "once":
        _unmap(a, phase, at)
        a.label(at.label("unmapped"))
        a.st_value(Mem(s.RBP), 0, "the buffer is the driver's again")
    if phase.work:
        a.mov(s.RCX, phase.work)
        a.emit(ops.LONG_WORK, length=64)
    a.sub(s.R13, 1)
    a.jcc(ops.CC_NZ, at.label("reap_next"))
    a.ret()


def _unmap(a: Assembler, phase: spec.DmaBuffersSpec, at: Stage) -> None:
    """Unmap the buffer, or the group, whose slot is at RBP."""
    a.ld(s.RDI, Mem(s.RBP))
    a.mov(s.RSI, phase.buffer_pages * (phase.group if phase.mapping == "group" else 1))
    read_tsc(a, s.R14)
    a.call(_routine(phase, at, "unmap"))
    read_tsc(a, s.RCX)
    a.sub(s.RCX, register=s.R14)
    add_to(a, d.S_UNMAP_CYCLES, s.RCX)
    count(a, d.S_UNMAPS)


def _release(a: Assembler, phase: spec.DmaBuffersSpec, at: Stage) -> None:
    """Unmap all buffers that were mapped once."""
    a.st_value(_port(d.P_REAP), 0)
    a.mov(s.R13, phase.buffers)
    a.label(at.label("release"))
    _next_slot(a, phase, at, d.P_REAP, "release_slot")
    a.ld(s.RDI, Mem(s.RBP))
    a.test(s.RDI, -1)
    a.jcc(ops.CC_Z, at.label("released"))
    _unmap(a, phase, at)
    a.st_value(Mem(s.RBP), 0, "the buffer is the driver's again")
    a.label(at.label("released"))
    a.sub(s.R13, 1)
    a.jcc(ops.CC_NZ, at.label("release"))


def _routine(phase: spec.DmaBuffersSpec, at: Stage, what: str) -> str:
    """The kernel's routine that maps or unmaps a buffer of this phase, or lets its pages be asked for."""
    assert at.dma is not None
    if at.dma.on_request:
        return {"map": "dma_allow", "unmap": "dma_forbid"}[what]
    return name_of(what, 1 if phase.pages == "4 KiB" else 2)
