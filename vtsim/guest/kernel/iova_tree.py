"""The tree of addresses in use of a domain: a red-black tree as Linux's, searched downwards from a node it remembers.

R15 is the port. Left and right differ in the direction that RDX holds: the offset of a child in a node.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import dma_layout as d

SIDES = d.N_LEFT + d.N_RIGHT  # less one side: the other


def port(word: int) -> Mem:
    """A word of the port."""
    return Mem(s.R15, word)


def _other(a: Assembler, to: int, side: int) -> None:
    a.mov(to, SIDES)
    a.sub(to, register=side)


def lock(a: Assembler, at: Mem) -> None:
    """Take a spin lock, with interrupts off. Clobbers RAX."""
    name = f"spin_{a.here:x}"
    a.label(name)
    a.mov(s.RAX, 1)
    a.xadd(at, s.RAX)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, f"{name}_ours")
    a.op(ops.PAUSE)
    a.jmp(name)
    a.label(f"{name}_ours")


def unlock(a: Assembler, at: Mem) -> None:
    """Give a spin lock back."""
    a.st_value(at, 0)


def find_node(a: Assembler, node: int, name: str, missing: str = "") -> None:
    """Go down from the node in a register to the one that has page RDI; `missing`: where to if none may have it.

    Clobbers RAX.
    """
    a.label(f"{name}_look")
    if missing:
        a.test(node, -1)
        a.jcc(ops.CC_Z, missing)
    a.ld(s.RAX, Mem(node, d.N_LOW))
    a.cmp(s.RDI, register=s.RAX)
    a.jcc(ops.CC_AE, f"{name}_not_left")
    a.ld(node, Mem(node, d.N_LEFT))
    a.jmp(f"{name}_look")
    a.label(f"{name}_not_left")
    a.ld(s.RAX, Mem(node, d.N_HIGH))
    a.cmp(s.RDI, register=s.RAX)
    a.jcc(ops.CC_BE, f"{name}_found")
    a.ld(node, Mem(node, d.N_RIGHT))
    a.jmp(f"{name}_look")
    a.label(f"{name}_found")


@path("address tree")
def tree(a: Assembler, kernel: KernelOptions) -> None:
    """Neighbours, rotation, insertion and removal: `iova_previous`, `iova_next`, `iova_insert`, `iova_remove`."""
    if kernel.dma is None or kernel.dma.mode == "identity":
        return
    a.activity = ops.DMA_MAP
    _neighbour(a, "iova_previous", d.N_LEFT)
    _neighbour(a, "iova_next", d.N_RIGHT)
    _rotate(a)
    _insert(a)
    a.activity = ops.DMA_UNMAP
    _remove(a)


def _neighbour(a: Assembler, name: str, side: int) -> None:
    """RSI <- the node before (or after) it in order, or 0. Clobbers RAX and RCX."""
    a.label(name)
    a.ld(s.RAX, Mem(s.RSI, side))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, f"{name}_up")
    a.label(f"{name}_down")
    a.copy(s.RSI, s.RAX)
    a.ld(s.RAX, Mem(s.RSI, SIDES - side))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_NZ, f"{name}_down")
    a.ret()
    a.label(f"{name}_up")
    a.ld(s.RAX, Mem(s.RSI, d.N_PARENT))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, f"{name}_found")
    a.ld(s.RCX, Mem(s.RAX, side))
    a.cmp(s.RCX, register=s.RSI)
    a.jcc(ops.CC_NZ, f"{name}_found")
    a.copy(s.RSI, s.RAX)
    a.jmp(f"{name}_up")
    a.label(f"{name}_found")
    a.copy(s.RSI, s.RAX)
    a.ret()


def _replace(a: Assembler, name: str, old: int, new: int) -> None:
    """Let the parent of `old`, in RCX, lead to `new`. Clobbers RAX."""
    a.test(s.RCX, -1)
    a.jcc(ops.CC_NZ, f"{name}_below")
    a.st(port(d.P_TREE), new)
    a.jmp(f"{name}_led")
    a.label(f"{name}_below")
    a.ld(s.RAX, Mem(s.RCX, d.N_LEFT))
    a.cmp(s.RAX, register=old)
    a.jcc(ops.CC_NZ, f"{name}_right")
    a.st(Mem(s.RCX, d.N_LEFT), new)
    a.jmp(f"{name}_led")
    a.label(f"{name}_right")
    a.st(Mem(s.RCX, d.N_RIGHT), new)
    a.label(f"{name}_led")


def _rotate(a: Assembler) -> None:
    """`iova_rotate`: the node RSI goes down to side RDX, its other child RDI comes up. Clobbers RAX, RCX, RDI, R11."""
    a.label("iova_rotate")
    _other(a, s.R11, s.RDX)
    a.ld(s.RDI, Mem(s.RSI, index=s.R11))
    a.ld(s.RAX, Mem(s.RDI, index=s.RDX))
    a.st(Mem(s.RSI, index=s.R11), s.RAX)
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "rotate_no_child")
    a.st(Mem(s.RAX, d.N_PARENT), s.RSI)
    a.label("rotate_no_child")
    a.ld(s.RCX, Mem(s.RSI, d.N_PARENT))
    a.st(Mem(s.RDI, d.N_PARENT), s.RCX)
    _replace(a, "rotate", s.RSI, s.RDI)
    a.st(Mem(s.RDI, index=s.RDX), s.RSI)
    a.st(Mem(s.RSI, d.N_PARENT), s.RDI)
    a.ret()


def _side_of(a: Assembler, name: str, parent: int, child: int) -> None:
    """RDX <- the side of `parent` on which `child` is, R10 <- the other. Clobbers RAX."""
    a.mov(s.RDX, d.N_LEFT)
    a.mov(s.R10, d.N_RIGHT)
    a.ld(s.RAX, Mem(parent, d.N_LEFT))
    a.cmp(s.RAX, register=child)
    a.jcc(ops.CC_Z, name)
    a.mov(s.RDX, d.N_RIGHT)
    a.mov(s.R10, d.N_LEFT)
    a.label(name)


def _insert(a: Assembler) -> None:
    """`iova_insert`: the node RBX comes below the node RSI, where its pages belong. Clobbers all but R12 to R15."""
    a.label("iova_insert")
    a.ld(s.R9, Mem(s.RBX, d.N_LOW))
    a.label("insert_down")
    a.mov(s.RDX, d.N_LEFT)
    a.ld(s.RAX, Mem(s.RSI, d.N_LOW))
    a.cmp(s.R9, register=s.RAX)
    a.jcc(ops.CC_B, "insert_left")
    a.mov(s.RDX, d.N_RIGHT)
    a.label("insert_left")
    a.ld(s.RAX, Mem(s.RSI, index=s.RDX))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "insert_here")
    a.copy(s.RSI, s.RAX)
    a.jmp("insert_down")
    a.label("insert_here")
    a.st(Mem(s.RSI, index=s.RDX), s.RBX)
    a.st(Mem(s.RBX, d.N_PARENT), s.RSI)
    for word in (d.N_LEFT, d.N_RIGHT):
        a.st_value(Mem(s.RBX, word), 0)
    a.st_value(Mem(s.RBX, d.N_COLOUR), d.RED)

    a.label("insert_balance")  # RBX is red; R8 its parent, R9 the parent of that
    a.ld(s.R8, Mem(s.RBX, d.N_PARENT))
    a.test(s.R8, -1)
    a.jcc(ops.CC_Z, "insert_root")
    a.ld(s.RAX, Mem(s.R8, d.N_COLOUR))
    a.cmp(s.RAX, d.BLACK)
    a.jcc(ops.CC_Z, "insert_done")
    a.ld(s.R9, Mem(s.R8, d.N_PARENT))
    _side_of(a, "insert_side", s.R9, s.R8)
    a.ld(s.RCX, Mem(s.R9, index=s.R10))
    a.test(s.RCX, -1)
    a.jcc(ops.CC_Z, "insert_turn")
    a.ld(s.RAX, Mem(s.RCX, d.N_COLOUR))
    a.cmp(s.RAX, d.BLACK)
    a.jcc(ops.CC_Z, "insert_turn")
    a.st_value(Mem(s.R8, d.N_COLOUR), d.BLACK)
    a.st_value(Mem(s.RCX, d.N_COLOUR), d.BLACK)
    a.st_value(Mem(s.R9, d.N_COLOUR), d.RED)
    a.copy(s.RBX, s.R9)
    a.jmp("insert_balance")
    a.label("insert_turn")
    a.ld(s.RAX, Mem(s.R8, index=s.R10))
    a.cmp(s.RAX, register=s.RBX)
    a.jcc(ops.CC_NZ, "insert_outside")
    a.copy(s.RSI, s.R8)
    a.call("iova_rotate")
    a.copy(s.R8, s.RBX)
    a.label("insert_outside")
    a.st_value(Mem(s.R8, d.N_COLOUR), d.BLACK)
    a.st_value(Mem(s.R9, d.N_COLOUR), d.RED)
    a.copy(s.RSI, s.R9)
    a.copy(s.RDX, s.R10)
    a.call("iova_rotate")
    a.ret()
    a.label("insert_root")
    a.st_value(Mem(s.RBX, d.N_COLOUR), d.BLACK)
    a.label("insert_done")
    a.ret()


def _transplant(a: Assembler, name: str, old: int, new: int) -> None:
    """`new`, or nothing, takes the place of `old`. Clobbers RAX and RCX."""
    a.ld(s.RCX, Mem(old, d.N_PARENT))
    _replace(a, name, old, new)
    a.test(new, -1)
    a.jcc(ops.CC_Z, f"{name}_nothing")
    a.st(Mem(new, d.N_PARENT), s.RCX)
    a.label(f"{name}_nothing")


def _remove(a: Assembler) -> None:
    """`iova_remove`: take the node RBX out. Clobbers all but RBX and R12 to R15.

    R8 is what moves up into the hole, or 0, RBP the parent of the hole, R9 the colour that is lost.
    """
    a.label("iova_remove")
    a.ld(s.R9, Mem(s.RBX, d.N_COLOUR))
    a.ld(s.RBP, Mem(s.RBX, d.N_PARENT))
    a.ld(s.R8, Mem(s.RBX, d.N_RIGHT))
    a.ld(s.RDI, Mem(s.RBX, d.N_LEFT))
    a.test(s.RDI, -1)
    a.jcc(ops.CC_Z, "remove_one")
    a.test(s.R8, -1)
    a.jcc(ops.CC_NZ, "remove_two")
    a.copy(s.R8, s.RDI)
    a.label("remove_one")
    _transplant(a, "remove_only", s.RBX, s.R8)
    a.jmp("remove_balance")
    a.label("remove_two")  # RSI: the next node, which has no left child
    a.copy(s.RSI, s.R8)
    a.label("remove_next")
    a.ld(s.RAX, Mem(s.RSI, d.N_LEFT))
    a.test(s.RAX, -1)
    a.jcc(ops.CC_Z, "remove_found")
    a.copy(s.RSI, s.RAX)
    a.jmp("remove_next")
    a.label("remove_found")
    a.ld(s.R9, Mem(s.RSI, d.N_COLOUR))
    a.ld(s.R8, Mem(s.RSI, d.N_RIGHT))
    a.copy(s.RBP, s.RSI)
    a.ld(s.RAX, Mem(s.RSI, d.N_PARENT))
    a.cmp(s.RAX, register=s.RBX)
    a.jcc(ops.CC_Z, "remove_near")
    a.copy(s.RBP, s.RAX)
    _transplant(a, "remove_far", s.RSI, s.R8)
    a.ld(s.RAX, Mem(s.RBX, d.N_RIGHT))
    a.st(Mem(s.RSI, d.N_RIGHT), s.RAX)
    a.st(Mem(s.RAX, d.N_PARENT), s.RSI)
    a.label("remove_near")
    _transplant(a, "remove_by_next", s.RBX, s.RSI)
    a.ld(s.RAX, Mem(s.RBX, d.N_LEFT))
    a.st(Mem(s.RSI, d.N_LEFT), s.RAX)
    a.st(Mem(s.RAX, d.N_PARENT), s.RSI)
    a.ld(s.RAX, Mem(s.RBX, d.N_COLOUR))
    a.st(Mem(s.RSI, d.N_COLOUR), s.RAX)

    a.label("remove_balance")
    a.cmp(s.R9, d.RED)
    a.jcc(ops.CC_Z, "remove_done")
    a.label("remove_up")
    a.test(s.RBP, -1)
    a.jcc(ops.CC_Z, "remove_paint")
    a.test(s.R8, -1)
    a.jcc(ops.CC_Z, "remove_black")
    a.ld(s.RAX, Mem(s.R8, d.N_COLOUR))
    a.cmp(s.RAX, d.RED)
    a.jcc(ops.CC_Z, "remove_paint")
    a.label("remove_black")
    _side_of(a, "remove_side", s.RBP, s.R8)
    a.ld(s.R9, Mem(s.RBP, index=s.R10), "the sibling, which is there")
    a.ld(s.RAX, Mem(s.R9, d.N_COLOUR))
    a.cmp(s.RAX, d.BLACK)
    a.jcc(ops.CC_Z, "remove_sibling")
    a.st_value(Mem(s.R9, d.N_COLOUR), d.BLACK)
    a.st_value(Mem(s.RBP, d.N_COLOUR), d.RED)
    a.copy(s.RSI, s.RBP)
    a.call("iova_rotate")
    a.ld(s.R9, Mem(s.RBP, index=s.R10))
    a.label("remove_sibling")
    _is_red(a, "remove_far_child", s.R10, "remove_turned")
    _is_red(a, "remove_near_child", s.RDX, "remove_turn")
    a.st_value(Mem(s.R9, d.N_COLOUR), d.RED)
    a.copy(s.R8, s.RBP)
    a.ld(s.RBP, Mem(s.R8, d.N_PARENT))
    a.jmp("remove_up")
    a.label("remove_turn")  # RCX: the near child, which is red
    a.st_value(Mem(s.RCX, d.N_COLOUR), d.BLACK)
    a.st_value(Mem(s.R9, d.N_COLOUR), d.RED)
    a.push(s.RDX)
    a.copy(s.RDX, s.R10)
    a.copy(s.RSI, s.R9)
    a.call("iova_rotate")
    a.pop(s.RDX)
    a.ld(s.R9, Mem(s.RBP, index=s.R10))
    a.label("remove_turned")
    a.ld(s.RAX, Mem(s.RBP, d.N_COLOUR))
    a.st(Mem(s.R9, d.N_COLOUR), s.RAX)
    a.st_value(Mem(s.RBP, d.N_COLOUR), d.BLACK)
    a.ld(s.RCX, Mem(s.R9, index=s.R10))
    a.st_value(Mem(s.RCX, d.N_COLOUR), d.BLACK)
    a.copy(s.RSI, s.RBP)
    a.call("iova_rotate")
    a.ret()
    a.label("remove_paint")
    a.test(s.R8, -1)
    a.jcc(ops.CC_Z, "remove_done")
    a.st_value(Mem(s.R8, d.N_COLOUR), d.BLACK)
    a.label("remove_done")
    a.ret()


def _is_red(a: Assembler, name: str, side: int, goal: str) -> None:
    """To `goal` if the sibling R9 has a red child, then in RCX, on this side. Clobbers RAX and RCX."""
    a.ld(s.RCX, Mem(s.R9, index=side))
    a.test(s.RCX, -1)
    a.jcc(ops.CC_Z, name)
    a.ld(s.RAX, Mem(s.RCX, d.N_COLOUR))
    a.cmp(s.RAX, d.RED)
    a.jcc(ops.CC_Z, goal)
    a.label(name)
