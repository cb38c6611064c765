"""A B+ tree in memory, as the benchmarks of Mitosis and vMitosis walk it: dependent accesses, the first levels hot.

Every node is a structure, an array of keys and an array of pointers; a look-up reads them in turn on each level.
Ascending insertion leaves nodes half full. Mitosis' order 6 has 3 children; the three parts are allocations side by
side, and a record has 15 words. vMitosis' tree (`slabs`, of order 16: set 8 children) keeps structures of 48 bytes
and records of 16 in slabs, each record points to 16 bytes more, and arrays of all levels lie in the heap in the order
in which they were made: a node is near its middle child. Keys come in two passes, even ones from below with odd ones
from above, so that half of the leaves were made by the second, elsewhere.
Source: Mitosis-Project, mitosis-workload-btree, src/btree1.c, config.h (order 6, tuples of 15 words);
vmitosis-workloads, btree/btree.c, and instructions of find_leaf counted in the artifact's binary.
Not modelled: nodes of different levels lie among each other in the heap, without `slabs`; branches that are
mispredicted.
"""

from __future__ import annotations

from collections.abc import Iterator

from attrs import evolve

from vtsim.cpu.assembler import Assembler
from vtsim.guest.primitives import Stage, lowering
from vtsim.guest.primitives.lookups import Step, lines, look_up, step_words
from vtsim.guest.structures import LINE, BTreeSpec

WORK = 6  # compare, branch and address for each of a node's parts
KEY_WORK = 6  # for each key that is compared, half of a node's
POINTERS = 2 * LINE  # of an array of pointers behind the keys'


def btree_steps(phase: BTreeSpec) -> list[Step]:
    """From the root to a record; the key is drawn at the root."""
    if phase.slabs:
        return [step for second in (False, True) for step in _slab_steps(phase, second)]
    steps: list[Step] = []
    offset, bytes_of_node = 0, LINE * phase.node_lines
    for depth, nodes in enumerate(phase.levels):
        for part in range(phase.node_lines):
            draws = depth == part == 0
            steps.append(Step(offset + LINE * part, nodes, bytes_of_node, draws=draws, needs=not draws, work=WORK))
        offset += nodes * bytes_of_node
    record = Step(offset, phase.records, LINE * phase.record_lines, needs=True, work=WORK)
    return [*steps, *lines(record, phase.record_lines)]


def _part(phase: BTreeSpec, depth: int, second: bool, part: int, alignment: int) -> Step:
    """Where one part of the nodes of a level lies: a node at the first of those that it leads to."""
    apart, leaves = phase.apart(part, alignment), phase.levels[-1]
    above = len(phase.levels) - 1 - depth
    if above:
        return Step(0, phase.levels[depth], apart * phase.children**above // 2, needs=True)
    if second:
        return Step((leaves - leaves // 2) * apart, max(leaves // 2, 1), part, needs=True)
    return Step(0, leaves - leaves // 2, apart, needs=True)


def _slab_steps(phase: BTreeSpec, second: bool) -> Iterator[Step]:
    """A look-up whose leaf was made by the first or the second pass."""
    heap = phase.part_bytes(phase.STRUCTURE, 2)
    records = heap + phase.part_bytes(phase.ARRAYS, LINE)
    for depth in range(len(phase.levels)):
        structure = _part(phase, depth, second, phase.STRUCTURE, 2)
        arrays = _part(phase, depth, second, phase.ARRAYS, LINE)
        yield evolve(structure, draws=depth == 0, needs=depth > 0, work=WORK)
        yield evolve(arrays, offset=heap + arrays.offset, work=KEY_WORK * phase.children // 2)
        yield evolve(arrays, offset=heap + arrays.offset + POINTERS, work=WORK)
    record = Step(records, phase.records, phase.RECORD, needs=True, work=WORK)
    yield from (record, evolve(record, offset=records + phase.records * phase.RECORD))


@lowering(BTreeSpec, table_words=lambda phase: step_words(btree_steps(phase)))
def btree(a: Assembler, phase: BTreeSpec, at: Stage) -> None:
    """Random keys, one after the other."""
    look_up(a, phase, at, btree_steps(phase))
