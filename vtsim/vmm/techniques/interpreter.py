"""A program that fetches, decodes and executes every instruction of the guest; nothing of it runs directly."""

from __future__ import annotations

from typing import Any

from vtsim.vmm.techniques import Technique, techniques


def build(**machine: Any) -> Any:
    """Lay an interpreter and its guests into an engine."""
    from vtsim.vmm.software.build import build_software

    return build_software(**machine)


techniques.register("interpreter")(
    Technique(
        meaning="A program executes every instruction of the guest; nothing of it runs directly.",
        build=build,
        paging=("software",),
        in_software=True,
    )
)
