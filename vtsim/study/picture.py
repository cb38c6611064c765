"""The picture of the README: `python -m vtsim.study.picture` runs a shipped scenario and draws its report."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from vtsim.study.report import report
from vtsim.study.result import Result

SCENARIO: Final = Path("workloads/vmexit/cpuid.yaml")
PICTURE: Final = Path("docs/picture.svg")
WIDTH: Final = 90
FROM_ELSEWHERE: Final = r",?\s*url\(\"http[^)]*\) format\(\"[a-z0-9]+\"\)|<!--.*?-->"


def picture(result: Result, command: str) -> str:
    """The report of a run as SVG that needs no network."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ {command}", style="bold"))
    console.print(report(result))
    svg = console.export_svg(title="vtsim", unique_id="vtsim")
    return re.sub(FROM_ELSEWHERE, "", svg)


def main() -> None:
    """Run the scenario and write the picture."""
    from vtsim.study.run import run

    PICTURE.write_text(picture(run(SCENARIO), f"vtsim run {SCENARIO}"), encoding="utf-8")


if __name__ == "__main__":
    main()
