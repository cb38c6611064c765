"""The `vtsim` command: parses, calls, prints; every import that takes time is inside a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

from vtsim.base.errors import ConfigError, ModelError

FINE: Final = 0
USERS_MISTAKE: Final = 2
OUR_MISTAKE: Final = 3
GUEST_PANIC: Final = 4  # a guest's kernel found at boot that it cannot run here
INTERRUPTED: Final = 130
READER_GONE: Final = 141  # as a shell reports a process that SIGPIPE ended

REPORT_IT: Final = "This is a mistake in vtsim, not in your scenario. Please report it with the lines above."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    from vtsim.cli.commands import app

    _survive_any_terminal()
    try:
        app(args=None if arguments is None else list(arguments), prog_name="vtsim")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FINE
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USERS_MISTAKE
    except Exception as error:
        show_model_error(error)
        return OUR_MISTAKE
    return FINE


def _survive_any_terminal() -> None:
    """Output that is closed is not missed; a character that it cannot show becomes a question mark, not an error."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def show_model_error(error: Exception | None, where: str = "") -> None:
    """Print our own mistake so that it can be reported: a broken law with its counters, else where it happened."""
    import platform
    import traceback

    from vtsim import __version__

    if isinstance(error, ModelError):
        lines = [f"{where}model error: {error.message}"]
        lines += [f"  {name} = {value}" for name, value in error.counters.items()]
    else:
        lines = ["".join(traceback.format_exception(error)).rstrip(), *([f"{where}model error"] if where else [])]
    lines += [f"vtsim {__version__}, Python {platform.python_version()}, {platform.machine()}", "", REPORT_IT]
    print("\n".join(lines), file=sys.stderr)
