"""Read a trace of the instrumentation: instructions of the host by call path, episodes for each VM exit.

Counts are by call path: a node of a tree whose root is the system call, one node for each function called from
another. Functions that only jump to another one at their end keep it as a child. Interrupts and exceptions are nodes
of their own, `interrupt` and `exception`, and user mode is one, `user`. What follows a VM exit is cut into episodes by
its phase: up to the handler, in the handler, after it, and after each system call; an interrupt is one episode, and
what it interrupted two.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

# fmt: off
ADDRESS: Final = (1 << 48) - 1
USER, CALL, RETURN, VMREAD, VMWRITE, LOCKED, RING, ENTRY = (1 << bit for bit in range(48, 56))
INTERRUPT, VM_EXIT, MARK, EXCEPTION = 1, 2, 3, 4
END: Final = 0xFFFFFFFF
AFTER_EXIT, IN_HANDLER, BEFORE_ENTRY, SYSTEM_CALL, IN_INTERRUPT = range(5)
# fmt: on
PART: Final = re.compile(r"\.(cold|part|isra|constprop)(\.\d+)?")
HANDLER: Final = "vmx_handle_exit"
MADE_BY_KVM: Final = "vmx_do_interrupt"  # it calls a handler of interrupts, that ends with IRET


class Symbols:
    """Names of functions by address, from the guest's /proc/kallsyms; parts of a function have its name."""

    def __init__(self, listing: Path) -> None:
        found: dict[int, str] = {}
        for line in listing.read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) >= 3 and words[1] in "tTwW" and len(words[0]) == 16:
                found.setdefault(int(words[0], 16) & ADDRESS, PART.sub("", words[2]))
        self._addresses = np.array(sorted(found), np.uint64)
        self.names = [found[int(address)] for address in self._addresses]

    def of(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The number of each word's function in `names`."""
        return np.searchsorted(self._addresses, words & np.uint64(ADDRESS), side="right") - 1

    def starts(self, words: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether each word is at the first instruction of a function."""
        return np.isin(words & np.uint64(ADDRESS), self._addresses)


class Tree:
    """Call paths: node 0 is the root."""

    def __init__(self) -> None:
        self.names, self.parents = [""], [-1]
        self._children: dict[tuple[int, str], int] = {}

    def child(self, parent: int, name: str) -> int:
        node = self._children.get((parent, name))
        if node is None:
            node = self._children[parent, name] = len(self.names)
            self.names.append(name)
            self.parents.append(parent)
        return node

    def path(self, node: int) -> list[str]:
        """Names from the root to the node."""
        names = []
        while node > 0:
            names.append(self.names[node])
            node = self.parents[node]
        return names[::-1]


@frozen
class Episode:
    """What was executed in a phase: instructions by node, VMREAD and VMWRITE apart, and entries of each node.

    `indirect` are those of the instructions that are indirect branches, where their places are known.
    """

    event: int  # the VM exits before it
    reason: int  # -1 before the first one
    phase: int
    work: Counter[int] = field(factory=Counter)
    vmx: Counter[int] = field(factory=Counter)
    calls: Counter[int] = field(factory=Counter)
    indirect: Counter[int] = field(factory=Counter)


class _Stack:
    """The functions that are active: a list of nodes, and which of them another one jumped to."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.nodes, self._jumped = [0], [False]

    def push(self, name: str, jumped: bool = False) -> None:
        self.nodes.append(self._tree.child(self.nodes[-1], name))
        self._jumped.append(jumped)

    def pop(self) -> None:
        while len(self.nodes) > 1 and self._jumped.pop():
            self.nodes.pop()
        if len(self.nodes) > 1:
            self.nodes.pop()
        else:
            self._jumped = [False]

    def cut(self, wanted: Callable[[int], bool]) -> bool:
        """Leave the innermost function that is wanted, if there is one."""
        for n in range(len(self.nodes) - 1, 0, -1):
            if wanted(self.nodes[n]):
                del self.nodes[n:], self._jumped[n:]
                return True
        return False

    def return_to(self, name: str) -> None:
        """Be in the innermost function of that name, or in it alone: of another stack, after a switch of threads."""
        for n in range(len(self.nodes) - 1, 0, -1):
            if self._tree.names[self.nodes[n]] == name:
                del self.nodes[n + 1 :], self._jumped[n + 1 :]
                return
        self.reset(name)

    def reset(self, name: str) -> None:
        self.nodes, self._jumped = [0], [False]
        self.push(name)


def words_of_tests(trace: Path) -> dict[int, NDArray[np.uint64]]:
    """The words of each test, from its mark to the mark of its end."""
    words: NDArray[np.uint64] = np.memmap(trace, np.uint64, "r", shape=trace.stat().st_size // 8)
    marks = np.flatnonzero(words >> np.uint64(60) == 8 | MARK)
    numbers = (words[marks] & np.uint64(END)).tolist()
    ends = [*marks.tolist()[1:], len(words)]
    return {number: words[a:b] for number, a, b in zip(numbers, marks.tolist(), ends, strict=True) if number != END}


def episodes(
    words: NDArray[np.uint64], symbols: Symbols, tree: Tree, places: NDArray[np.uint64] | None = None
) -> Iterator[Episode]:
    """The episodes of a test in their order; `places` are the addresses of indirect branches."""
    numbers, starts = symbols.of(words).tolist(), symbols.starts(words).tolist()
    there = np.isin(words & np.uint64(ADDRESS), [] if places is None else places).tolist()
    names, all_names, parents = symbols.names, tree.names, tree.parents
    stack, user = _Stack(tree), tree.child(0, "user")
    now = Episode(0, -1, SYSTEM_CALL)
    interrupted: list[tuple[int, int]] = []  # depth of the stack, and phase
    last = depth_of_handler = 0

    def ended_by_iret(node: int) -> bool:
        return all_names[node] in ("interrupt", "exception") or all_names[parents[node]].startswith(MADE_BY_KVM)

    for word, number, first, branch in zip(words.tolist(), numbers, starts, there, strict=True):
        if word >> 63:
            kind, value = word >> 60 & 7, word & 0xFFFFFFFF
            if kind in (MARK, VM_EXIT):
                yield now
                now = Episode(now.event + (kind == VM_EXIT), value if kind == VM_EXIT else -1, AFTER_EXIT)
            elif kind in (INTERRUPT, EXCEPTION):
                if kind == INTERRUPT:
                    yield now
                    interrupted.append((len(stack.nodes), now.phase))
                    now = Episode(now.event, now.reason, IN_INTERRUPT)
                stack.push("interrupt" if kind == INTERRUPT else "exception")
                last = word
            continue
        if word & USER:
            now.work[user] += 1
            last = word
            continue
        name = names[number]
        if last & USER or (last & RING and "SYSCALL" in name):
            if last >> 63 == 0 and name.startswith("entry_SYSCALL"):
                yield now
                now = Episode(now.event, now.reason, SYSTEM_CALL)
                interrupted.clear()
                stack.reset(name)
                now.calls[stack.nodes[-1]] += 1
        elif last >> 63:
            stack.push(name)
            now.calls[stack.nodes[-1]] += 1
        elif last & CALL:
            if all_names[stack.nodes[-1]].startswith(MADE_BY_KVM) and name.startswith("asm_"):
                yield now
                interrupted.append((len(stack.nodes), now.phase))
                now = Episode(now.event, now.reason, IN_INTERRUPT)
            elif name == HANDLER:
                yield now
                now = Episode(now.event, now.reason, IN_HANDLER)
                depth_of_handler = len(stack.nodes)
            stack.push(name)
            now.calls[stack.nodes[-1]] += 1
        elif last & (RETURN | RING):
            if last & RETURN:
                stack.pop()
                if now.phase == IN_HANDLER and len(stack.nodes) <= depth_of_handler:
                    yield now
                    now = Episode(now.event, now.reason, BEFORE_ENTRY)
            else:
                stack.cut(ended_by_iret)
            if interrupted and len(stack.nodes) <= interrupted[-1][0]:
                yield now
                now = Episode(now.event, now.reason, interrupted.pop()[1])
            if all_names[stack.nodes[-1]] != name:
                stack.return_to(name)
        if all_names[stack.nodes[-1]] != name:
            stack.push(name, jumped=True)
            if first:
                now.calls[stack.nodes[-1]] += 1
        node = stack.nodes[-1]
        if word & (VMREAD | VMWRITE):
            now.vmx[node] += 1
        else:
            now.work[node] += 1
            if branch:
                now.indirect[node] += 1
        last = word
    yield now
