"""Write docs/techniques.md: one guest under every technique, on this ISA and on one where sensitive operations trap."""

from __future__ import annotations

from pathlib import Path

from vtsim.study.compare import chosen, compare_scenario
from vtsim.study.techniques_page import page

SCENARIO = Path("workloads/techniques/boot_like.yaml")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "techniques.md"


def main() -> None:
    """Run the comparisons and write the page."""
    sections = {
        "A boot-like guest": (),
        "The same on an instruction set where sensitive operations trap": ("machine.isa=virtualizable",),
    }
    found = {title: compare_scenario(SCENARIO, chosen(), sets=sets) for title, sets in sections.items()}
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
