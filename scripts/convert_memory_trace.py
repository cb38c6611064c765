"""Write a memory trace in the project's own format, which is read fastest and can be cut and compressed again.

python -m scripts.convert_memory_trace TRACE FILE [RECORDS]
"""

from __future__ import annotations

import sys

from vtsim.base.errors import ConfigError
from vtsim.guest.traces.accesses import words_of, write_words


def main(arguments: list[str]) -> int:
    """Convert; 2 if the trace cannot be read."""
    if len(arguments) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        write_words(arguments[1], words_of(arguments[0], int(arguments[2]) if arguments[2:] else None))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
