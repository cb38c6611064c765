"""A B+ tree in memory, as the benchmarks of Mitosis and vMitosis walk it: dependent accesses, the first levels hot.

Every node is a structure, an array of keys and an array of pointers. The structure says where both arrays are, so that
they are read at once; a pointer's number comes from a loop over the keys that ends at the first one above the key, and
is predicted to go on to the last. What was predicted decides which child is looked into before the keys are there.
Ascending insertion leaves nodes half full. Mitosis' order 6 has 3 children; the three parts are allocations side by
side, and a record has 15 words. vMitosis' tree (`slabs`, of order 16: set 8 children) keeps structures of 48 bytes
and records of 16 in slabs of 256 KiB, each record points to 16 bytes more, and arrays of all levels lie in the heap in
the order in which they were made: a node is near its middle child. Every slab is allocated at a boundary of 2 MiB, and
2 MiB or more lie from one to the next: its 64 pages have a page table of their own. Keys come in two passes, even ones
from below with odd ones from above, so that half of the leaves were made by the second, elsewhere. Arrays that a split
needs for a while leave holes: of a leaf the two arrays lie in different pages in 25 of 100 cases, of another node in
16 (seen in the program itself, a thousandth as large), as if 1024 and 640 bytes lay between them.
Source: Mitosis-Project, mitosis-workload-btree, src/btree1.c, config.h (order 6, tuples of 15 words);
vmitosis-workloads, btree/btree.c, and instructions of find_leaf counted in the artifact's binary.
Not modelled: nodes of different levels lie among each other in the heap, without `slabs`; parents of leaves with more
children than others; that arrays fill the addresses between slabs.
"""

from __future__ import annotations

from collections.abc import Iterator

from attrs import evolve

from vtsim.cpu.assembler import Assembler
from vtsim.guest.primitives import Stage, lowering
from vtsim.guest.primitives.lookups import Step, lines, look_up, step_words
from vtsim.guest.spec import SLAB, SLABS, SLABS_APART
from vtsim.guest.structures import LINE, BTreeSpec

WORK = 6  # compare, branch and address for each of a node's parts
KEY_WORK = 6  # for each key that is compared, half of a node's: they are fetched before keys are there
LEAF_POINTERS, POINTERS = 16 * LINE, 10 * LINE  # of an array of pointers behind the keys'


def btree_steps(phase: BTreeSpec) -> list[Step]:
    """From the root to a record; the key is drawn at the root."""
    if phase.slabs:
        return [step for second in (False, True) for step in _slab_steps(phase, second)]
    steps: list[Step] = []
    offset, bytes_of_node = 0, LINE * phase.node_lines
    last = phase.node_lines - 1  # the pointers' line
    for depth, nodes in enumerate(phase.levels):
        for part in range(phase.node_lines):
            follows = int(depth > 0 if part == 0 else part == 1)
            step = Step(
                offset + LINE * part, nodes, bytes_of_node, draws=depth == part == 0, follows=follows, work=WORK
            )
            steps.append(_decides(step, phase, depth, 2 if last > 1 else 1) if part == last else step)
        offset += nodes * bytes_of_node
    record = Step(offset, phase.records, LINE * phase.record_lines, follows=1, work=WORK)
    return [*steps, *lines(record, phase.record_lines)]


def _decides(step: Step, phase: BTreeSpec, depth: int, by: int) -> Step:
    """Where a node leads to, which its keys decide: they are the last access, or the one before it."""
    return evolve(step, choices=phase.children, within=phase.levels[depth], by=by)


def _arrays(phase: BTreeSpec, depth: int, second: bool) -> Step:
    """Where the arrays of the nodes of a level lie: a node's at the first of those that it leads to."""
    apart, leaves = phase.apart(phase.ARRAYS, LINE), phase.levels[-1]
    if above := len(phase.levels) - 1 - depth:
        return Step(0, phase.levels[depth], apart * phase.children**above // 2)
    if second:
        return Step(phase.second_pass(phase.ARRAYS, LINE), max(leaves // 2, 1), phase.ARRAYS)
    return Step(0, leaves - leaves // 2, apart)


def _structures(phase: BTreeSpec, depth: int, second: bool) -> Step:
    """Where the structures of the nodes of a level lie, in the same order."""
    apart, leaves = phase.apart(phase.STRUCTURE, 2), phase.levels[-1]
    if above := len(phase.levels) - 1 - depth:
        return _in_slabs(0, Step(0, phase.levels[depth], apart * phase.children**above // 2))
    if second:
        start = -(-phase.second_pass(phase.STRUCTURE, 2) // SLAB)
        return _in_slabs(start, Step(0, max(leaves // 2, 1), phase.STRUCTURE))
    return _in_slabs(0, Step(0, leaves - leaves // 2, apart))


def _in_slabs(first: int, step: Step) -> Step:
    """The same elements in slabs from one with this number on."""
    return evolve(step, offset=SLABS + first * SLABS_APART, slab=SLAB, gap=SLABS_APART - SLAB)


def _slab_steps(phase: BTreeSpec, second: bool) -> Iterator[Step]:
    """A look-up whose leaf was made by the first or the second pass."""
    for depth in range(len(phase.levels)):
        arrays = _arrays(phase, depth, second)
        structure = _structures(phase, depth, second)
        pointers = LEAF_POINTERS if depth == len(phase.levels) - 1 else POINTERS
        looped = KEY_WORK * phase.children // 2
        yield evolve(structure, draws=depth == 0, follows=int(depth > 0), work=WORK + looped - KEY_WORK)
        yield evolve(arrays, follows=1, work=KEY_WORK)
        yield _decides(evolve(arrays, offset=arrays.offset + pointers, work=WORK), phase, depth, 2)
    record = Step(0, phase.records, phase.RECORD, follows=1, work=WORK)
    yield _in_slabs(phase.structures_bytes // SLAB, record)
    yield evolve(record, offset=phase.arrays_bytes, follows=1)


@lowering(BTreeSpec, table_words=lambda phase: step_words(btree_steps(phase)))
def btree(a: Assembler, phase: BTreeSpec, at: Stage) -> None:
    """Random keys, one after the other."""
    look_up(a, phase, at, btree_steps(phase))
