"""Loads that wait for each other, at random places, beside what was measured of the same processors.

InstLatx64, GenuineIntel00206D6_SandyBridgeE_NewMemLat and GenuineIntel0050654_SkylakeX_NewMemLat, "Random_Full", by 64
bytes: cycles of a load in areas that the second-level cache lacks. They read each line once a round, so that L2 has
none; here places are drawn, so only what translation takes is compared: all beyond the third level's latency, 38 and 66
cycles (which the profiles have from "Linear_Forward"). Up to as many pages as the second-level TLB holds this is its
hits alone, then walks.
"""

from __future__ import annotations

import pytest

import vtsim

PHASE = "vms.0.guest.processes.0.phases.0"
# KiB of the area: cycles beyond the third level's
SANDY_BRIDGE = {2048: 44 - 38, 3072: 48 - 38, 4096: 50 - 38, 6144: 52 - 38, 8192: 54 - 38}  # 512 pages are 2 MiB
SKYLAKE = {3072: 75 - 66, 4096: 75 - 66, 6144: 75 - 66, 8192: 80 - 66}  # 1536 pages are 6 MiB


def translation(profile: str, kib: int) -> float:
    """Cycles of a load that its translation takes, in the middle of many."""

    def cycles(accesses: int) -> int:
        sets = (
            f"machine.profile={profile}", "vmm.technique=native", f"{PHASE}.region={kib} KiB",
            f"{PHASE}.accesses={accesses}",
        )  # fmt: skip
        return vtsim.run("workloads/memory/pointer_chase.yaml", sets=sets).cycles.by["R3"]["page_walk"]

    lines = kib << 4
    return (cycles(3 * lines) - cycles(lines)) / (2 * lines)


@pytest.mark.compiled_only
@pytest.mark.parametrize("profile, measured", [("snb-e5-2450", SANDY_BRIDGE), ("skx-4114", SKYLAKE)])
def test_walks_take_what_was_measured(profile: str, measured: dict[int, int]) -> None:
    """Within 1.5 cycles; a walk that took its references alone would be 3 to 8 too short in the larger areas."""
    for kib, cycles in measured.items():
        assert translation(profile, kib) == pytest.approx(cycles, abs=1.5), kib
