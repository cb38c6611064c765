"""XSBench with the unionized grid: binary search of a random energy, then each nuclide of a random material.

The first steps of a search are hot. Which half is next is a branch, as in the artifact's binary, and no predictor knows
it; where the next word lies needs nothing that was loaded. For each nuclide it reads a word of the energy's row of
indexes and two neighbouring points of 48 bytes of the nuclide's own grid. Nuclides overlap, as many as a reorder buffer
holds.
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
POINT, INDEX, ENERGY = 48, 4, 8
TOGETHER = 4  # nuclides of some 50 instructions in a reorder buffer of 224
SEARCH_WORK, NUCLIDE_WORK = 6, 40


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
        search = Step(0, phase.energies, ENERGY, draws=True, half=half, choices=2, work=SEARCH_WORK)
        while half:
            steps.append(evolve(search, half=half, draws=half == search.half))
            half >>= 1
        here = [n % phase.nuclides for n in range(min(wanted, phase.nuclides))]
        for first in range(0, len(here), TOGETHER):
            part = here[first : first + TOGETHER]
            for nuclide in part:
                needs = nuclide == part[0] and first > 0
                steps.append(Step(grid + nuclide * INDEX, phase.energies, row, needs=needs))
            for nuclide in part:
                start = points + nuclide * phase.points * POINT
                steps.append(Step(start, phase.points - 1, POINT, needs=nuclide == part[0]))
                steps.append(Step(start + POINT, phase.points - 1, POINT, work=NUCLIDE_WORK))
    return steps


@lowering(CrossSectionsSpec, table_words=lambda phase: step_words(cross_section_steps(phase)))
def cross_sections(a: Assembler, phase: CrossSectionsSpec, at: Stage) -> None:
    """Random energies and materials, one after the other."""
    look_up(a, phase, at, cross_section_steps(phase))
