"""PARSEC's canneal: what a swap of two random elements would do to the wires to their neighbours.

One element of a swap is that of the swap before: its neighbours and their places are in the cache. The other one is
anywhere, and so are its place, its two arrays of pointers to neighbours, the neighbours and their places. What the
decision depends on is known last, and no predictor knows it: half of the swaps of an unordered netlist shorten the
wires. The next swap begins as predicted; a wrong way has drawn one random number more or less, and so goes to another
element. Two vectors, an atomic pointer and a string are 88 bytes, a place 8. A vector doubles as it grows, the heap
adds 16 bytes, and between the arrays lie the entries of a map of names, 80 bytes for each element, which swaps never
touch. All elements are one allocation. Places are one for each row of the grid, of 88 KB where it is 11,000 wide: below
128 KiB glibc takes them from its heap (M_MMAP_THRESHOLD), which grows by little more than as much at a time
(M_TOP_PAD), and Linux gives a fault no large page that would reach beyond its area. So with transparent huge pages all
but the elements is in small ones (`grown_heap`). Five inputs of an element are those of PARSEC's canneal_netlist.pl; it
has as many outputs in the mean.
Source: PARSEC, pkgs/kernels/canneal/src/netlist_elem.cpp (swap_cost), annealer_thread.cpp, netlist.cpp; instructions
for a neighbour counted in vMitosis' binary without threads; mallopt(3); Linux, do_huge_pmd_anonymous_page in
mm/huge_memory.c.
Not modelled: khugepaged of a guest, which makes 16 MiB of a heap large pages in 10 s; swaps that are made, which store
to two lines that are cached; those made though they lengthen the wires.
"""

from __future__ import annotations

from attrs import evolve

from vtsim.cpu.assembler import Assembler
from vtsim.guest.primitives import Stage, lowering
from vtsim.guest.primitives.lookups import Step, look_up, step_words
from vtsim.guest.spec import GROWN_HEAP
from vtsim.guest.structures import NetlistSwapsSpec

NEIGHBOUR_WORK = 31  # instructions of the loop: two differences, absolute values and sums, twice
DECISION_WORK = 150  # an estimate: three random numbers and an exponential function


def netlist_steps(phase: NetlistSwapsSpec) -> list[Step]:
    """One swap: an element that is cached, and one that is not."""
    count = phase.elements
    places = GROWN_HEAP if phase.grown_heap else count * phase.ELEMENT
    heap = places + count * phase.PLACE
    element = Step(0, count, phase.ELEMENT, draws=True)
    place = Step(places, count, phase.PLACE, draws=True, work=NEIGHBOUR_WORK)
    array = Step(heap, count, phase.heap_bytes, draws=True)

    def neighbours() -> list[Step]:
        """As far as a reorder buffer reaches: all elements of an array at once, then all places."""
        return [evolve(step, needs=n == 0) for step in (element, place) for n in range(phase.neighbours)]

    *others, last = neighbours()
    return [
        element,
        evolve(place, follows=1, work=2 * phase.neighbours * NEIGHBOUR_WORK),
        evolve(array, needs=True),
        *neighbours(),
        evolve(array, offset=heap + phase.array_bytes),
        *others,
        evolve(last, choices=2, by=0, work=NEIGHBOUR_WORK + DECISION_WORK),
    ]


@lowering(NetlistSwapsSpec, table_words=lambda phase: step_words(netlist_steps(phase)))
def netlist_swaps(a: Assembler, phase: NetlistSwapsSpec, at: Stage) -> None:
    """Random elements, one after the other."""
    look_up(a, phase, at, netlist_steps(phase))
