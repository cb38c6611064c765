"""Arguments that several commands have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

LONGEST_NAME = 240  # bytes; what is written beside a file has a few more, and 255 are the most


def path(text: str) -> Path:
    """A path that was given: nothing is none, and not the current directory."""
    if not text:
        raise typer.BadParameter("the name of a file or directory is needed")
    found = Path(text)
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in found.parts):
        raise typer.BadParameter(f"the name of a file or directory has at most {LONGEST_NAME} bytes")
    return found


File = Annotated[Path, typer.Argument(metavar="FILE", parser=path, help="A scenario.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a setting, as in machine.cpus=2. Repeatable."),
]
