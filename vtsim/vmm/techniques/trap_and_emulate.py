"""A deprivileged kernel whose privileged operations fault to a monitor, which emulates them."""

from __future__ import annotations

from typing import Any

from vtsim.vmm.techniques import Technique, techniques


def build(**machine: Any) -> Any:
    """Lay a monitor and its guests into an engine."""
    from vtsim.vmm.monitor.build import build_monitor

    return build_monitor(**machine)


techniques.register("trap-and-emulate")(
    Technique(
        meaning="The guest's kernel runs in ring 3; what is privileged faults to a monitor, which emulates it.",
        build=build,
        paging=("shadow",),
        deprivileged=True,
    )
)
