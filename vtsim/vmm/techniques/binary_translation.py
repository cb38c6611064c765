"""A deprivileged kernel that runs from a cache of translations; processes run directly."""

from __future__ import annotations

from typing import Any

from vtsim.vmm.techniques import Technique, techniques


def build(**machine: Any) -> Any:
    """Lay a monitor that translates, and its guests, into an engine."""
    from vtsim.vmm.monitor.build import build_monitor

    return build_monitor(**machine, translates=True)


techniques.register("binary-translation")(
    Technique(
        meaning="The guest's kernel runs in ring 3 from a cache of rewritten blocks; its processes run directly.",
        build=build,
        paging=("shadow",),
        deprivileged=True,
    )
)
