"""PARSEC's canneal: what a swap of two random elements would do to the wires to their neighbours.

For each of the two: the element, then its place and its two arrays of pointers to neighbours, then all neighbours, then
their places. Neighbours and places are anywhere. Two vectors, an atomic pointer and a string are 88 bytes, a place 8,
an array its pointers and 8 of the heap. Five inputs of an element, as in PARSEC's generated netlists, is an estimate.
Source: PARSEC, pkgs/kernels/canneal/src/netlist_elem.cpp (swap_cost), annealer_thread.cpp.
Not modelled: the swaps that are made, few once it has cooled down.
"""

from __future__ import annotations

from vtsim.cpu.assembler import Assembler
from vtsim.guest.primitives import Stage, lowering
from vtsim.guest.primitives.lookups import Step, look_up, step_words
from vtsim.guest.structures import NetlistSwapsSpec

ELEMENT, PLACE = 88, 8
WORK = 12  # two differences, absolute values and sums for each neighbour, twice


def netlist_steps(phase: NetlistSwapsSpec) -> list[Step]:
    """The routing cost of one element; two of them are a swap."""
    count, array = phase.elements, 8 * phase.neighbours + 8
    places, arrays = count * ELEMENT, count * (ELEMENT + PLACE)
    around = 2 * phase.neighbours
    return [
        Step(0, count, ELEMENT, draws=True),
        Step(arrays, count, 2 * array, needs=True),
        Step(arrays + array, count, 2 * array),
        Step(places, count, PLACE, draws=True),
        *(Step(0, count, ELEMENT, draws=True, needs=n == 0) for n in range(around)),
        *(Step(places, count, PLACE, draws=True, needs=n == 0, work=WORK) for n in range(around)),
    ]


@lowering(NetlistSwapsSpec, table_words=lambda phase: step_words(netlist_steps(phase)))
def netlist_swaps(a: Assembler, phase: NetlistSwapsSpec, at: Stage) -> None:
    """Random elements, one after the other."""
    look_up(a, phase, at, netlist_steps(phase))
