"""A B+ tree in memory, as the benchmark of Mitosis walks it: dependent accesses, of which the first levels are hot.

Every node is a structure, an array of keys and an array of pointers, three allocations side by side; a look-up reads
them in turn on each level. Ascending insertion leaves nodes half full: order 6 has 3 children. A record has 15 words.
Source: Mitosis-Project, mitosis-workload-btree, src/btree1.c, config.h (order 6, tuples of 15 words).
Not modelled: nodes of different levels lie among each other in the heap.
"""

from __future__ import annotations

from vtsim.cpu.assembler import Assembler
from vtsim.guest.primitives import Stage, lowering
from vtsim.guest.primitives.lookups import Step, lines, look_up, step_words
from vtsim.guest.structures import LINE, BTreeSpec

WORK = 6  # compare, branch and address for each of a node's parts


def btree_steps(phase: BTreeSpec) -> list[Step]:
    """From the root to a record; the key is drawn at the root."""
    steps: list[Step] = []
    offset, bytes_of_node = 0, LINE * phase.node_lines
    for depth, nodes in enumerate(phase.levels):
        for part in range(phase.node_lines):
            draws = depth == part == 0
            steps.append(Step(offset + LINE * part, nodes, bytes_of_node, draws=draws, needs=not draws, work=WORK))
        offset += nodes * bytes_of_node
    record = Step(offset, phase.records, LINE * phase.record_lines, needs=True, work=WORK)
    return [*steps, *lines(record, phase.record_lines)]


@lowering(BTreeSpec, table_words=lambda phase: step_words(btree_steps(phase)))
def btree(a: Assembler, phase: BTreeSpec, at: Stage) -> None:
    """Random keys, one after the other."""
    look_up(a, phase, at, btree_steps(phase))
