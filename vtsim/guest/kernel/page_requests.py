"""Pages that a device asks for: a driver allows buffers, and what the device then touches is mapped when it asks.

`dma_allow` takes addresses and writes down in the tree which buffer is there; no table changes. The unit's page request
event interrupts a CPU: the handler reads descriptors from the queue as Linux does, looks the address up in the device's
tree, maps the page, and with the last request of a group queues the response. A page that was never allowed is answered
as invalid. `dma_forbid` takes the buffer out of the tree, then clears what is mapped and invalidates, if anything was.
The lock of the tree keeps the handler and a driver on another CPU apart.

When the queue overflowed, the unit has answered what it could not take, so groups of which it took a part never get
complete: they are dropped, and the overflow is cleared.

VT-d: "Page Request Queue"; "Page Request Event"; "Page Group Response Descriptor".
Not modelled: the thread of Linux's interrupt and its queue of work as tasks (their switches have a length); buffers
whose memory is found when it is asked for; PASIDs, whose requests are answered as invalid.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import dma_layout as d
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.dma_map import KEPT, flush_writes
from vtsim.guest.kernel.dma_tables import flush_line
from vtsim.guest.kernel.invalidation import add_to, count
from vtsim.guest.kernel.iova_tree import find_node, lock, port, unlock
from vtsim.guest.kernel.lengths import length
from vtsim.guest.kernel.timer import read_tsc
from vtsim.iommu import descriptors as q
from vtsim.iommu import entries as e
from vtsim.iommu import spec as sp

MOST_TABLES = 3  # that one page may need
ASKED, LAST, GROUP_SHIFT, GROUPS = sp.READ | sp.WRITE, 1 << 2, 3, 512  # of a descriptor's second word
WITH_PASID = 1 << 8  # of its first
REQUESTER = 0xF_FFFF << 32 | 0xFFFF << 16  # PASID and source-id, in the same places of a response
PASID_PRESENT, CODE_SHIFT = 1 << 4, 12  # of a response


@path("allowed buffers")
def allowed(a: Assembler, kernel: KernelOptions) -> None:
    """`dma_allow`: RAX <- address for RSI pages at physical RDI; `dma_forbid`: no longer RSI pages at RDI.

    R15 is the port. All but callee-saved registers change.
    """
    dma = kernel.dma
    if dma is None or not dma.askers:
        return
    a.activity = ops.DMA_MAP
    a.label("dma_allow")
    a.work(length("dma_map"))
    for register in KEPT:
        a.push(register)
    a.copy(s.R13, s.RDI)
    a.copy(s.R14, s.RSI)
    a.op(ops.CLI)
    a.call("iova_take")
    a.copy(s.R12, s.RAX)
    lock(a, port(d.P_LOCK))
    a.copy(s.RDI, s.R12)
    a.call("iova_find")
    a.st(Mem(s.RCX, d.N_PAGES), s.R14)
    a.st(Mem(s.RCX, d.N_BUFFER), s.R13)
    unlock(a, port(d.P_LOCK))
    a.op(ops.STI)
    a.copy(s.RAX, s.R12)
    a.shl(s.RAX, 12)
    for register in reversed(KEPT):
        a.pop(register)
    a.ret()

    a.activity = ops.DMA_UNMAP
    a.label("dma_forbid")
    a.work(length("dma_unmap"))
    for register in KEPT:
        a.push(register)
    a.copy(s.R12, s.RDI)
    a.copy(s.RBX, s.RDI)
    a.copy(s.RBP, s.RSI)
    a.copy(s.R14, s.RSI)
    a.mov(s.R13, 0)
    a.op(ops.CLI)
    lock(a, port(d.P_LOCK))
    a.shr(s.RDI, 12)
    a.call("iova_find")
    a.st_value(Mem(s.RCX, d.N_BUFFER), 0)
    a.work(length("dma_unmap_run"))
    a.label("forbid_page")
    a.copy(s.RSI, s.RBX)
    a.call("dma_known_1")
    a.test(s.RCX, -1)
    a.jcc(ops.CC_Z, "forbid_next")
    a.ld(s.RAX, Mem(s.RCX))
    a.test(s.RAX, e.PRESENT)
    a.jcc(ops.CC_Z, "forbid_next")
    a.st_value(Mem(s.RCX), 0)
    flush_line(a, kernel, Mem(s.RCX))
    a.mov(s.R13, 1)
    a.label("forbid_next")
    a.add(s.RBX, at.PAGE)
    a.sub(s.R14, 1)
    a.jcc(ops.CC_NZ, "forbid_page")
    unlock(a, port(d.P_LOCK))
    a.test(s.R13, -1)
    a.jcc(ops.CC_Z, "forbid_untouched")
    a.copy(s.RDI, s.R12)
    a.copy(s.RSI, s.RBP)
    a.call("invalidate_pages")
    a.label("forbid_untouched")
    a.copy(s.RDI, s.R12)
    a.shr(s.RDI, 12)
    a.copy(s.RSI, s.RBP)
    a.call("iova_give")
    a.op(ops.STI)
    for register in reversed(KEPT):
        a.pop(register)
    a.ret()

    a.label("iova_find")  # RCX <- the node that has page RDI, or 0; clobbers RAX
    a.ld(s.RCX, port(d.P_TREE))
    find_node(a, s.RCX, "iova_find", missing="iova_find_found")
    a.ret()


@path("page requests")
def page_requests(a: Assembler, kernel: KernelOptions) -> None:
    """`page_request_event`: the unit has put page requests into its queue, or could not."""
    dma = kernel.dma
    if dma is None or not dma.askers:
        return
    status = Mem(displacement=dma.registers + sp.PRS, size=4)
    head, tail = (Mem(displacement=dma.registers + where, size=4) for where in (sp.PQH, sp.PQT))
    a.activity = ops.INTERRUPT_PATH
    a.label("page_request_event")
    a.work(length("page_request_event"))
    a.mov(s.RAX, sp.PRS_PPR)
    a.st(status, s.RAX, "what comes from now on is told again")
    a.ld(s.R13, tail)
    a.ld(s.R12, head)
    a.label("page_request_next")
    a.cmp(s.R12, register=s.R13)
    a.jcc(ops.CC_Z, "page_requests_served")
    a.mov(s.RBX, dma.page_queue)
    a.add(s.RBX, register=s.R12)
    a.ld(s.RBP, Mem(s.RBX))
    a.ld(s.R14, Mem(s.RBX, 8))
    _of_device(a, dma)
    read_tsc(a, s.RBX)
    a.work(length("page_request"))
    count(a, d.S_PAGE_REQUESTS)
    a.mov(s.RDX, q.RESPONSE_INVALID)
    a.test(s.RBP, WITH_PASID)
    a.jcc(ops.CC_NZ, "page_request_pasid")
    _map_if_allowed(a, kernel)
    a.label("page_request_ended")  # RDX: how
    a.test(s.RDX, -1)
    a.jcc(ops.CC_Z, "page_request_good")
    count(a, d.S_PAGE_REQUESTS_INVALID)
    a.label("page_request_good")
    _answer(a)
    a.label("page_request_over")
    read_tsc(a, s.RCX)
    a.sub(s.RCX, register=s.RBX)
    add_to(a, d.S_PAGE_REQUEST_CYCLES, s.RCX)
    a.label("page_request_skipped")
    a.add(s.R12, d.PAGE_REQUEST_BYTES)
    a.and_(s.R12, dma.page_queue_bytes - 1)
    a.jmp("page_request_next")
    a.label("page_request_pasid")  # a stop marker is not answered
    a.test(s.R14, ASKED)
    a.jcc(ops.CC_NZ, "page_request_ended")
    a.jmp("page_request_over")

    a.label("page_requests_served")
    a.st(head, s.R13)
    a.ld(s.RAX, status)
    a.test(s.RAX, sp.PRS_PRO)
    a.jcc(ops.CC_Z, "interrupt_done")
    a.ld(s.RAX, tail)
    a.cmp(s.RAX, register=s.R13)
    a.jcc(ops.CC_NZ, "interrupt_done", "more are told of by an event of their own")
    for _, of in dma.askers:
        a.mov(s.RCX, of)
        a.ld(s.RDI, Mem(s.RCX, d.P_GROUPS))
        a.hook(hooks.PAGE_ZERO)
    a.mov(s.RAX, sp.PRS_PRO)
    a.st(status, s.RAX, "the queue takes requests again")
    a.jmp("interrupt_done")


def _of_device(a: Assembler, dma: d.DmaOptions) -> None:
    """R15 <- the port of the device whose request RBP is; one that nobody has enabled cannot be here."""
    a.copy(s.RAX, s.RBP)
    a.shr(s.RAX, 16)
    a.and_(s.RAX, 0xFFFF)
    for source, of in dma.askers:
        a.mov(s.R15, of)
        a.cmp(s.RAX, source)
        a.jcc(ops.CC_Z, "page_request_of")
    a.jmp("page_request_skipped")
    a.label("page_request_of")


def _map_if_allowed(a: Assembler, kernel: KernelOptions) -> None:
    """RDX <- success where the address in R14 is allowed, its page being mapped then; else RDX stays as it is."""
    assert kernel.dma is not None
    lock(a, port(d.P_LOCK))
    a.copy(s.RDI, s.R14)
    a.shr(s.RDI, 12)
    a.call("iova_find")
    a.test(s.RCX, -1)
    a.jcc(ops.CC_Z, "page_request_looked")
    a.ld(s.R8, Mem(s.RCX, d.N_BUFFER))
    a.test(s.R8, -1)
    a.jcc(ops.CC_Z, "page_request_looked")
    a.ld(s.RAX, Mem(s.RCX, d.N_LOW))
    a.sub(s.RDI, register=s.RAX)
    a.ld(s.RAX, Mem(s.RCX, d.N_PAGES))
    a.cmp(s.RDI, register=s.RAX)
    a.jcc(ops.CC_AE, "page_request_looked")
    a.ld(s.RAX, port(d.P_TABLES))
    a.add(s.RAX, MOST_TABLES)
    a.ld(s.RCX, port(d.P_TABLES_END))
    a.cmp(s.RCX, register=s.RAX)
    a.jcc(ops.CC_B, "page_request_looked", "no table is left")
    a.shl(s.RDI, 12)
    a.add(s.R8, register=s.RDI)
    a.work(length("dma_map_run"))
    a.copy(s.RSI, s.R14)
    a.call("dma_entry_1")
    a.mov(s.RDX, q.RESPONSE_SUCCESS)
    a.ld(s.RAX, Mem(s.RCX))
    a.test(s.RAX, e.PRESENT)
    a.jcc(ops.CC_NZ, "page_request_looked")
    a.or_(s.R8, kernel.dma.rights)
    a.st(Mem(s.RCX), s.R8)
    flush_line(a, kernel, Mem(s.RCX))
    if kernel.dma.write_buffers:
        flush_writes(a, kernel.dma.registers, "page_request")
    count(a, d.S_PAGES_MAPPED)
    a.label("page_request_looked")
    unlock(a, port(d.P_LOCK))


def _answer(a: Assembler) -> None:
    """Answer the group of the request RBP, R14 if it is its last; else keep RDX, how it would be answered."""
    a.copy(s.RCX, s.R14)
    a.shr(s.RCX, GROUP_SHIFT)
    a.and_(s.RCX, GROUPS - 1)
    a.shl(s.RCX, 3)
    a.ld(s.RAX, port(d.P_GROUPS))
    a.add(s.RCX, register=s.RAX)
    a.ld(s.RAX, Mem(s.RCX))
    a.or_(s.RDX, register=s.RAX)
    a.test(s.R14, LAST)
    a.jcc(ops.CC_NZ, "page_group_whole")
    a.st(Mem(s.RCX), s.RDX)
    a.jmp("page_request_over")
    a.label("page_group_whole")
    a.st_value(Mem(s.RCX), 0)
    a.work(length("page_group"))
    a.shl(s.RDX, CODE_SHIFT)
    a.or_(s.RDX, q.PAGE_GROUP_RESPONSE)
    a.copy(s.RAX, s.RBP)
    a.mov(s.RCX, REQUESTER)
    a.and_(s.RAX, register=s.RCX)
    a.or_(s.RAX, register=s.RDX)
    a.copy(s.RCX, s.RBP)
    a.shr(s.RCX, 4)
    a.and_(s.RCX, PASID_PRESENT)
    a.or_(s.RAX, register=s.RCX)
    a.copy(s.RDX, s.R14)
    a.and_(s.RDX, (GROUPS - 1) << GROUP_SHIFT | LAST)
    a.call("invalidate")
