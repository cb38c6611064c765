"""VMX non-root operation; the programs are those of the personality."""

from __future__ import annotations

from typing import Any

from vtsim.vmm.techniques import Technique, techniques


def build(**machine: Any) -> Any:
    """Lay a hypervisor that uses VT-x into an engine."""
    from vtsim.vmm.build import build_hypervisor

    return build_hypervisor(**machine)


techniques.register("hardware")(
    Technique(
        meaning="VMX non-root operation: the guest runs on the processor until a control says that it exits.",
        build=build,
        paging=("ept", "shadow", "agile", "direct-pv"),
    )
)
