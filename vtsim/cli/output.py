"""Where text goes: results to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from vtsim.base.errors import ConfigError
from vtsim.cli import READER_GONE

if TYPE_CHECKING:
    from rich.console import RenderableType

PIPE_WIDTH = 80  # of a report that no terminal shows
ASCII = str.maketrans("─█·×…", "-#.x.", "▏▎▍▌▋▊▉")


def emit(text: str) -> None:
    """Write to stdout; a reader that has gone ends the program quietly, a full disk with its reason."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence()
        sys.exit(READER_GONE)
    except OSError as error:
        _silence()
        raise ConfigError(f"the output cannot be written: {error.strerror}") from None


def _silence() -> None:
    """Send what is still buffered nowhere, so that the interpreter does not try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str) -> None:
    """Tell the user something that is no result."""
    print(text, file=sys.stderr, flush=True)


def show(renderable: RenderableType) -> None:
    """Print a table: coloured and as wide as the terminal, or plain and 80 columns wide ($COLUMNS)."""
    from rich.console import Console

    from vtsim.study.report import plain_text

    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    if sys.stdout.isatty() and unicode:
        Console(legacy_windows=False).print(renderable)
    else:
        text = plain_text(renderable, columns())
        emit(text if unicode else text.translate(ASCII))


def columns() -> int:
    """The width of output that goes to no terminal."""
    chosen = os.environ.get("COLUMNS", "")
    return int(chosen) if chosen.isdecimal() and int(chosen) >= 40 else PIPE_WIDTH


def coloured() -> bool:
    """May stdout carry colours?"""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
