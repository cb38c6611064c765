"""Instruction traces in ChampSim's format: 64 bytes for each instruction, with the addresses it loads and stores.

| bytes | content |
|---|---|
| 0 to 7 | instruction pointer |
| 8, 9 | is it a branch; was it taken |
| 10, 11; 12 to 15 | destination and source registers |
| 16 to 31 | two addresses that it stores to, 0 for none |
| 32 to 63 | four addresses that it loads from, 0 for none |

Everything is little-endian. ChampSim, inc/trace_instruction.h, `input_instr`.

Not modelled: ChampSim's instruction pointers, branches and registers; its traces of SPARC programs (other records).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vtsim.base.errors import ConfigError
from vtsim.guest.traces.content import BLOCK_BYTES, reading

RECORD_BYTES: Final = 64
WANTED: Final = "a ChampSim trace has 64 bytes for each instruction"
BOOLEANS: Final = (("is_branch", 0), ("branch_taken", 8))  # bits of the second word

ChampSimRecords = NDArray[np.int64]  # a row of eight words for each instruction


def read_champsim(path: str | Path, *, block_bytes: int = BLOCK_BYTES) -> Iterator[ChampSimRecords]:
    """Yield a trace's records in order, or raise `ConfigError` with the offset of what cannot be one."""
    records = 0
    with reading(path) as content:
        while data := content.read(max(block_bytes // RECORD_BYTES, 1) * RECORD_BYTES):
            over = len(data) % RECORD_BYTES
            if over:
                at = content.offset - over
                raise _refusal(path, at, f"the file ends {over} bytes into record {at // RECORD_BYTES}")
            block = np.frombuffer(data, "<i8").astype(np.int64, copy=False).reshape(-1, RECORD_BYTES // 8)
            for name, shift in BOOLEANS:
                wrong = block[:, 1] >> shift & 0xFE
                if wrong.any():
                    n = int(np.argmax(wrong != 0))
                    value = int(block[n, 1]) >> shift & 0xFF
                    at = RECORD_BYTES * (records + n)
                    raise _refusal(path, at, f"not a record: its {name} is {value}, not 0 or 1")
            records += len(block)
            yield block
    if not records:
        raise ConfigError("no instruction in this file", file=str(path), help=WANTED)


def _refusal(path: str | Path, offset: int, why: str) -> ConfigError:
    return ConfigError(f"offset {offset}: {why}", file=str(path), help=WANTED)
