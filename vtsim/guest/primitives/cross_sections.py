"""XSBench with the unionized grid: binary search of a random energy, then each nuclide of a random material.

The first steps of a search are hot. Which half is next is a branch, as in the artifact's binary, and no predictor knows
it; where the next word lies needs nothing that was loaded. For each nuclide it reads a word of the energy's row of
indexes and two neighbouring points of 48 bytes of the nuclide's own grid, all of their two or three lines. Nuclides
overlap, as many as a reorder buffer holds.
Source: ANL-CESAR/XSBench, Simulation.c, Materials.c (materials of the large Hoogenboom-Martin reactor, and how often
each is hit).
Not modelled: which nuclides a material has: always the first ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from attrs import evolve

from vtsim.cpu.assembler import Assembler
from vtsim.guest.primitives import Stage, lowering
from vtsim.guest.primitives.lookups import Step, look_up, step_words
from vtsim.guest.structures import CrossSectionsSpec

# nuclides of a material, and how often it is hit in 200 look-ups
MATERIALS = (
    (321, 28), (5, 10), (4, 55), (4, 27), (27, 31), (21, 13), (21, 13), (21, 11), (21, 2), (21, 3), (9, 5), (9, 2),
)  # fmt: skip
POINT, INDEX, ENERGY = 48, 4, 16  # an energy has a pointer to its row of indexes beside it
WORD = 8
LOOK_UP_WORK, SEARCH_WORK, INDEX_WORK, NUCLIDE_WORK = 344, 10, 7, 54


def material_order() -> Iterator[int]:
    """Nuclides of 200 look-ups: each material spread evenly."""
    due = [(hit + 0.5) / times for _, times in MATERIALS for hit in range(times)]
    size = [nuclides for nuclides, times in MATERIALS for _ in range(times)]
    yield from (nuclides for _, nuclides in sorted(zip(due, size, strict=True)))


def cross_section_steps(phase: CrossSectionsSpec) -> list[Step]:
    """200 look-ups: as many of each material as its share of the hits."""
    grid = phase.energies * ENERGY
    points = grid + phase.energies * phase.nuclides * INDEX
    row = phase.nuclides * INDEX
    steps = []
    for wanted in material_order():
        half = 1 << (phase.energies - 1).bit_length() - 1
        search = Step(0, phase.energies, ENERGY, half=half, choices=2, work=SEARCH_WORK)
        steps.append(evolve(search, draws=True, needs=True, work=LOOK_UP_WORK + SEARCH_WORK))
        while half := half >> 1:
            steps.append(evolve(search, half=half))
        for nuclide in range(min(wanted, phase.nuclides)):
            start = points + nuclide * phase.points * POINT
            steps += (
                Step(grid + nuclide * INDEX, phase.energies, row, known=int(nuclide == 0), work=INDEX_WORK),
                Step(start, phase.points - 1, POINT, known=1),
                Step(start + POINT, phase.points - 1, POINT, known=2),
                Step(start + 2 * POINT - WORD, phase.points - 1, POINT, work=NUCLIDE_WORK),  # begins with the second
            )
    return steps


@lowering(CrossSectionsSpec, table_words=lambda phase: step_words(cross_section_steps(phase)))
def cross_sections(a: Assembler, phase: CrossSectionsSpec, at: Stage) -> None:
    """Random energies and materials, one after the other."""
    look_up(a, phase, at, cross_section_steps(phase))
