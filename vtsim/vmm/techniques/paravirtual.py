"""A deprivileged kernel built with hypercalls, as Xen's guests without VT-x."""

from __future__ import annotations

from typing import Any

from vtsim.vmm.techniques import Technique, techniques


def build(**machine: Any) -> Any:
    """Lay a hypervisor for paravirtual guests, and those, into an engine."""
    from vtsim.vmm.paravirtual.build import build_paravirtual

    return build_paravirtual(**machine)


techniques.register("paravirtual")(
    Technique(
        meaning="The guest's kernel runs in ring 3 and is built with hypercalls; its tables are the processor's own.",
        build=build,
        paging=("direct-pv",),
        deprivileged=True,
    )
)
