"""Write docs/gallery: the pictures of the shipped studies, and the page that shows them.

`python -m scripts.draw_gallery [STORES]` sweeps what is missing in the stores (a folder; a temporary one if not given),
which takes some minutes on two cores, and draws. `--page` writes the page alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from attrs import frozen

ROOT: Final = Path(__file__).resolve().parents[1]
STUDIES: Final = ROOT / "workloads" / "studies"
GALLERY: Final = ROOT / "docs" / "gallery"
INTRODUCTION: Final = """# Gallery

Each picture answers the question of a shipped study (`workloads/studies/`), as this version of vtsim answers it. The
command below it draws it again once the study was swept; `python -m scripts.draw_gallery` sweeps and draws all. Lines,
marks and hatches differ, so that they can be printed in grey.
"""


@frozen(kw_only=True)
class Picture:
    """One picture of a study."""

    name: str
    study: str
    metric: str
    where: tuple[str, ...] = ()
    kind: str | None = None
    shows: str

    @property
    def command(self) -> str:
        """What draws it."""
        words = ["vtsim study plot", f"workloads/studies/{self.study}.yaml", f"--metric '{self.metric}'"]
        words += [f"--where '{each}'" for each in self.where]
        return " ".join([*words, *([f"--kind {self.kind}"] if self.kind else [])])


# fmt: off
PICTURES: Final = (
    Picture(name="exit-cost", study="exit_cost", metric="exits.CPUID.mean_cycles",
            shows="the mean cost of a CPUID exit, from the instruction to the re-entry"),
    Picture(name="exit-activities", study="exit_cost", metric="cycles.by.*",
            shows="all cycles of these runs by privilege state and activity"),
    Picture(name="guest-time", study="guest_time", metric="exits.*.share_of_run",
            shows="cycles from each exit to the re-entry, of all cycles of the run"),
    Picture(name="techniques", study="techniques", metric="slowdown",
            shows="elapsed cycles against the same guest natively"),
    Picture(name="mmu", study="mmu", metric="slowdown", kind="heat",
            shows="elapsed cycles against the same guest natively, 2 M random accesses between the changes"),
    Picture(name="page-size", study="page_size", metric="walks.references_per_walk",
            shows="paging-structure entries that a page walk reads"),
    Picture(name="walk-cache", study="walk_cache", metric="walks.references_per_walk",
            shows="paging-structure entries that a page walk reads"),
    Picture(name="vpid", study="vpid", metric="slowdown",
            shows="elapsed cycles against the same guest natively"),
    Picture(name="mitigations", study="mitigations", metric="cycles.elapsed",
            shows="cycles of 10,000 exits of each kind"),
    Picture(name="views", study="views", metric="cycles.elapsed",
            shows="cycles of 2000 groups of 12 loads elsewhere and stores to 16 watched pages"),
    Picture(name="iommu-modes", study="iommu_modes", metric="dma.nic.gbps",
            shows="what a device writes into buffers that are mapped for it and unmapped, in Gb/s"),
)
# fmt: on


def by_study() -> dict[str, list[Picture]]:
    """The pictures of each study."""
    found: dict[str, list[Picture]] = {}
    for picture in PICTURES:
        found.setdefault(picture.study, []).append(picture)
    return found


def question(study: str) -> str:
    """The question that a study asks, from its first line."""
    first = (STUDIES / f"{study}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("question: ")


def page() -> str:
    """The page of all pictures, by study."""
    lines = [INTRODUCTION]
    for study, pictures in by_study().items():
        lines += [f"## {question(study)}", ""]
        for picture in pictures:
            lines += [
                f"![{picture.shows}]({picture.name}.svg)", "",
                f"{picture.shows[0].upper()}{picture.shows[1:]}: `{picture.command}`", "",
            ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str]) -> None:
    """Sweep, draw, write the page."""
    GALLERY.mkdir(exist_ok=True)
    (GALLERY / "README.md").write_text(page(), encoding="utf-8")
    if arguments == ["--page"]:
        return
    with TemporaryDirectory() as temporary:
        stores = Path(arguments[0]) if arguments else Path(temporary)
        for study, pictures in by_study().items():
            draw_study(study, pictures, stores / f"{study}.sqlite")


def draw_study(name: str, pictures: Sequence[Picture], store: Path) -> None:
    """Run what is missing of a study, and draw its pictures."""
    import vtsim
    from vtsim.cli.study_tables import table_of
    from vtsim.study.plots.choose import choose
    from vtsim.study.plots.draw import write

    study = vtsim.sweep(STUDIES / f"{name}.yaml", store=store)
    for picture in pictures:
        table = table_of(study, [picture.metric], picture.where)
        write(choose(table, [picture.metric], picture.kind), GALLERY / f"{picture.name}.svg")
        print(f"{picture.name}: {len(table.rows)} runs, {table.failed} failed")


if __name__ == "__main__":
    main(sys.argv[1:])
