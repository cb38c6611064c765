"""Page tables: how fast a hypervisor's page-fault handler runs, and how fast tables are built before a run."""

from __future__ import annotations

import time

import numpy as np

from vtsim.config import parse_scenario
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.profile import load_profile
from vtsim.ept.tables import PAGING, USER_PAGE, host_table
from vtsim.platform.machine import Machine
from vtsim.study.measure import result_of

SCENARIO = """
seed: 1
machine: {profile: skx-4114, memory: 1 GiB}
vmm: {personality: kvm, paging: shadow}
vms:
- memory: 64 MiB
  guest:
    kernel: {tick: off}
    processes:
    - phases:
      - {primitive: page_fault, region: 4 MiB, iterations: 100}
run: {limit: 100 s, baseline: false}
"""
PAGES = 1 << 22  # 16 GiB
GIB = 1 << 30


def shadow_faults() -> dict[str, float]:
    """Page-fault exits handled on shadow tables per second of wall time: the guest's own, hidden ones, table writes."""
    result = result_of([Machine(parse_scenario(SCENARIO)).run()])
    faults = next(one.count for one in result.exits if one.reason == "EXCEPTION_NMI")
    return {"faults_per_s": faults / result.rate.wall_s, "exits_per_s": result.rate.exits_per_s}


def table_construction() -> dict[str, float]:
    """GB of paging structures written per second: 16 GiB in 4 KiB pages at shuffled frames."""
    tables = PAGES // 512 + PAGES // 512**2 + 4
    engine = Engine(load_profile("skx-4114"), Geometry(memory_bytes=32 * GIB, pool_pages=tables))
    engine.frames_from(1, 2 * tables, shuffled=True, seed=1)
    table = host_table(engine, PAGING)
    frames = np.random.default_rng(1).permutation(PAGES)
    started = time.perf_counter()
    table.map(0, frames, USER_PAGE)
    seconds = time.perf_counter() - started
    return {"table_gb_per_s": 8e-9 * PAGES / seconds, "mapped_gb_per_s": 4096e-9 * PAGES / seconds}
