"""Write docs/attacks.md: what becomes of every attack under every technique and paging."""

from __future__ import annotations

from pathlib import Path

from vtsim.study.attacks_page import WAYS, page, tried

PAGE = Path(__file__).resolve().parents[1] / "docs" / "attacks.md"


def main() -> None:
    """Make the attacks and write the page."""
    PAGE.write_text(page({way: tried(way) for way in WAYS}), encoding="utf-8")


if __name__ == "__main__":
    main()
