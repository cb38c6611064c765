"""A program that translates blocks of the guest into code of the host, as for a guest of another instruction set."""

from __future__ import annotations

from typing import Any

from vtsim.vmm.techniques import Technique, techniques


def build(**machine: Any) -> Any:
    """Lay a dynamic translator and its guests into an engine."""
    from vtsim.vmm.software.build import build_software

    return build_software(**machine, translates=True)


techniques.register("dynamic-translation")(
    Technique(
        meaning="A program translates the guest's kernel and processes into code that works on registers in memory.",
        build=build,
        paging=("software",),
        in_software=True,
    )
)
