"""What is measured: scenarios with the whole model on, start-up times, and how fast a large guest is built."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from attrs import frozen

from benchmarks.paging import shadow_faults, table_construction
from benchmarks.requests import translations
from benchmarks.sweep import overhead
from benchmarks.traces import replay
from benchmarks.transitions import injections
from vtsim.config import parse_scenario
from vtsim.cpu.slots import OPS
from vtsim.platform.machine import Machine
from vtsim.study.measure import result_of

GUEST = """
seed: 1
machine: {{profile: skx-4114, memory: {machine}}}
vmm: {{technique: {technique}, personality: {personality}, ept: {{populate: prebuilt}}}}
vms:
- memory: {memory}
  guest:
    kernel: {{tick: off, populate: prebuilt}}
    processes:
    - phases:
      - {phase}
run: {{limit: 100 s, baseline: false}}
"""


@frozen(kw_only=True)
class Case:
    """One benchmark. `once` runs it and returns its figures by name (the first is the headline)."""

    name: str
    unit: str
    once: Callable[[], dict[str, float]]
    repeats: int = 5


def scenario(phase: str, *, technique: str = "hardware", personality: str = "kvm", memory: str = "64 MiB") -> str:
    """A scenario with one guest that does one thing."""
    paging = "2 GiB" if memory == "1536 MiB" else "1 GiB"
    return GUEST.format(phase=phase, technique=technique, personality=personality, memory=memory, machine=paging)


def rate(text: str, of: str) -> Callable[[], dict[str, float]]:
    """Simulated events per second of wall time, the building of the machine apart."""

    def once() -> dict[str, float]:
        machine = Machine(parse_scenario(text))
        result = result_of([machine.run()])
        ops = sum(int(n) for n in machine.engine.cpus[:, OPS])
        return {of: getattr(result.rate, of), "dispatched_ops_per_s": ops / result.rate.wall_s}

    return once


def command(*arguments: str, cold: bool = False) -> Callable[[], dict[str, float]]:
    """Wall seconds of a vtsim command in a process of its own."""

    def once() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as cache:
            environment = dict(os.environ, VTSIM_CACHE=cache) if cold else dict(os.environ)
            environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "vtsim", *arguments], check=True, capture_output=True, env=environment
            )
            return {"wall_s": time.perf_counter() - started}

    return once


def build_64g() -> dict[str, float]:
    """A 64 GiB guest at 4 KiB pages, shuffled frames, both dimensions, in a process of its own for its peak memory."""
    code = "from benchmarks.cases import build_here; build_here()"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds, mebibytes = done.stdout.split()
    return {"wall_s": float(seconds), "peak_mib": float(mebibytes)}


def build_here() -> None:
    """Build the large machine and print seconds and peak resident MiB."""
    text = GUEST.format(
        machine="66 GiB", technique="hardware", personality="kvm", memory="65 GiB",
        phase="{primitive: stream, pattern: uniform, region: 64 GiB, accesses: 1000}",
    )  # fmt: skip
    Machine(parse_scenario(scenario("{primitive: work, instructions: 1000}")))  # kernels loaded, imports done
    parsed = parse_scenario(text)
    started = time.perf_counter()
    Machine(parsed)
    seconds = time.perf_counter() - started
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


SMALL = str(Path(__file__).with_name("small.yaml"))
STREAM = "{{primitive: stream, pattern: {pattern}, region: {region}, accesses: {accesses}}}"
RESIDENT = STREAM.format(pattern="uniform", region="32 KiB", accesses="20 M")
SEQUENTIAL = STREAM.format(pattern="sequential", region="1 MiB", accesses="100 M").replace("}", ", stride: 8}")
GUPS = STREAM.format(pattern="uniform", region="1 GiB", accesses="4 M")
ZIPF = STREAM.format(pattern="zipf", region="1 GiB", accesses="4 M")
MIX = "{primitive: mix, instructions: 50 M, memory: 30 %, region: 32 KiB}"
CPUID = "{primitive: cpuid, iterations: 1 M}"
BIG = "1536 MiB"

# fmt: off
CASES = (
    Case(name="resident_loads",      unit="accesses/s",     once=rate(scenario(RESIDENT), "accesses_per_s")),
    Case(name="sequential_loads",    unit="accesses/s",     once=rate(scenario(SEQUENTIAL), "accesses_per_s")),
    Case(name="mix_instructions",    unit="instructions/s", once=rate(scenario(MIX), "instructions_per_s")),
    Case(name="gups_native",         unit="accesses/s",
         once=rate(scenario(GUPS, technique="native", memory=BIG), "accesses_per_s")),
    Case(name="gups_ept",            unit="accesses/s",     once=rate(scenario(GUPS, memory=BIG), "accesses_per_s")),
    Case(name="zipf_ept",            unit="accesses/s",     once=rate(scenario(ZIPF, memory=BIG), "accesses_per_s")),
    Case(name="exits_cpuid",         unit="exits/s",        once=rate(scenario(CPUID), "exits_per_s")),
    Case(name="exits_cpuid_minimal", unit="exits/s",
         once=rate(scenario(CPUID, personality="minimal"), "exits_per_s")),
    Case(name="exits_injection",     unit="exits/s",        once=injections),
    Case(name="shadow_faults",       unit="faults/s",       once=shadow_faults),
    Case(name="table_construction",  unit="GB/s",           once=table_construction),
    Case(name="trace_replay",        unit="records/s",      once=replay),
    Case(name="dma_within",          unit="translations/s", once=translations(48)),
    Case(name="dma_beyond",          unit="translations/s", once=translations(1 << 16)),
    Case(name="sweep_overhead",      unit="ms/point",       once=overhead, repeats=3),
    Case(name="help_s",              unit="s",              once=command("--help")),
    Case(name="warm_run_s",          unit="s",              once=command("run", SMALL, "--json")),
    Case(name="cold_run_s",          unit="s",              once=command("run", SMALL, "--json", cold=True), repeats=1),
    Case(name="build_64g_s",         unit="s",              once=build_64g, repeats=3),
)
# fmt: on
