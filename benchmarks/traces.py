"""How fast recorded accesses are replayed: a cache-friendly trace in each uncompressed format, whole model on."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from vtsim.config import parse_scenario
from vtsim.guest.primitives.recorded import Feed
from vtsim.guest.traces.accesses import words_of, write_words
from vtsim.platform.machine import Machine

RECORDS = 2_000_000
LOADS, STORES = 0.3, 0.1  # of the instructions
HEAP, REGION = 0x5555_5575_6000, 32 << 10
FORMATS = ("champsim", "lackey", "own")
SCENARIO = """
seed: 1
machine: {{profile: skx-4114, memory: 1 GiB}}
vmm: {{technique: hardware, personality: kvm, ept: {{populate: prebuilt}}}}
vms:
- memory: 64 MiB
  guest:
    kernel: {{tick: off, populate: prebuilt}}
    processes:
    - phases:
      - {{primitive: memory_trace, trace: {trace}}}
run: {{limit: 100 s, baseline: false}}
"""


def write_traces(folder: Path) -> None:
    """Write the same accesses in every format, uncompressed."""
    random = np.random.default_rng(1)
    words = np.zeros((RECORDS, 8), np.int64)
    kind = random.random(RECORDS)
    place = HEAP + random.integers(0, REGION // 8, RECORDS) * 8
    words[:, 0] = 0x5555_5555_5000 + np.arange(RECORDS) % 1000 * 4
    words[:, 4] = np.where(kind < LOADS, place, 0)
    words[:, 2] = np.where((kind >= LOADS) & (kind < LOADS + STORES), place, 0)
    words.astype("<i8").tofile(folder / "champsim")
    with (folder / "lackey").open("w") as file:
        for ip, stored, loaded in words[:, [0, 2, 4]].tolist():
            file.write(f"I  {ip:08x},4\n")
            if stored or loaded:
                file.write(f" {'S' if stored else 'L'} {stored or loaded:08x},8\n")
    write_words(folder / "own", words_of(folder / "champsim"))


def replay() -> dict[str, float]:
    """Records replayed per second (the headline is ChampSim's instructions); then parsing and filling alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_traces(folder)
        replayed, parsed, filled = {}, {}, {}
        for each in FORMATS:
            accesses = round(RECORDS * (LOADS + STORES))
            records = {"champsim": RECORDS, "lackey": RECORDS + accesses, "own": accesses}[each]
            machine = Machine(parse_scenario(SCENARIO.format(trace=folder / each)))
            replayed[each] = records / machine.run().wall_s
            started = time.perf_counter()
            for _ in words_of(folder / each):
                pass
            parsed[each] = records / (time.perf_counter() - started)
            ((at, feed),) = machine.engine.feeds.items()
            assert isinstance(feed, Feed)
            fresh, window, words = Feed(feed.phase), np.zeros(at + 2 + feed.window, np.int64), 0
            started = time.perf_counter()
            while words < machine.engine.arena[at + 1]:
                fresh(window, at)
                words = int(window[at + 1])
            filled[each] = records / (time.perf_counter() - started)
    return {
        "champsim_records_per_s": replayed["champsim"],
        "lackey_records_per_s": replayed["lackey"],
        "own_words_per_s": replayed["own"],
        **{f"{each}_parsed_per_s": parsed[each] for each in FORMATS},
        **{f"{each}_filled_per_s": filled[each] for each in FORMATS},
    }
