"""PageRank by pulling, as in the GAP benchmark suite: vertices in order, values of their neighbours from anywhere.

Rows, edges and new scores are read and written in order, a line of edges once; the gathers are independent of each
other. The graph is uniform (GAP's urand, degree 16): every vertex is as likely a neighbour as any other.
Source: sbeamer/gapbs, src/pr.cc; Beamer, Asanović, Patterson, "The GAP Benchmark Suite".
"""

from __future__ import annotations

from vtsim.cpu.assembler import Assembler
from vtsim.guest.primitives import Stage, lowering
from vtsim.guest.primitives.lookups import Step, look_up, step_words
from vtsim.guest.structures import LINE, GraphGatherSpec

ROW, EDGE, VALUE = 8, 4, 4
WORK = 3  # load the edge's number, add, loop


def graph_steps(phase: GraphGatherSpec) -> list[Step]:
    """One vertex: its row, its edges a line at a time, a gather for each, its new score."""
    count = phase.vertices
    edges = count * ROW
    values = edges + count * phase.degree * EDGE
    steps = [Step(0, count, ROW, turns=True, by_turn=True)]
    for first in range(0, phase.degree, LINE // EDGE):
        steps.append(Step(edges + first * EDGE, count, phase.degree * EDGE, by_turn=True))
        gathers = min(LINE // EDGE, phase.degree - first)
        steps += [Step(values, count, VALUE, draws=True, work=WORK)] * gathers
    return [*steps, Step(values + count * VALUE, count, VALUE, by_turn=True, stores=True, work=WORK)]


@lowering(GraphGatherSpec, table_words=lambda phase: step_words(graph_steps(phase)))
def graph_gather(a: Assembler, phase: GraphGatherSpec, at: Stage) -> None:
    """Vertices in order."""
    look_up(a, phase, at, graph_steps(phase))
