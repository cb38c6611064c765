"""Write the documents that are generated from the code."""

from __future__ import annotations

from pathlib import Path

from vtsim.config import reference

# Every generated document and what writes it; a test compares them.
DOCS = Path(__file__).resolve().parents[1] / "docs"
GENERATED = {"scenario.md": reference}


def main() -> None:
    """Write every generated document."""
    for name, text in GENERATED.items():
        (DOCS / name).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
