"""What a scenario sets of a personality: its parameters, checked against what the personality has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs

from vtsim.base.errors import ConfigError, alternatives
from vtsim.base.units import LARGEST, shown
from vtsim.cpu.assembler import Assembler
from vtsim.vmm import layout as at
from vtsim.vmm.registry import Path, personalities
from vtsim.vmm.spec import VmmSpec

OF_PAGING: Final[Mapping[str, tuple[str, ...]]] = {  # parameters that no program asks for: who does, by paging
    "shadow_permille": ("shadow", "agile"), "shadow_prefetch": ("shadow", "agile"), "out_of_sync": ("shadow",),
    "nx_huge_pages": ("shadow", "agile"), "agile_interval": ("agile",),
    "ignore_pat": ("agile",),
}  # fmt: skip


def resolve_parameters(vmm: VmmSpec) -> dict[str, int]:
    """The personality's parameters with the scenario's changes; an unknown one is the user's mistake."""
    known = personalities[vmm.personality].parameters(vmm.lengths)
    values = {name: parameter.value for name, parameter in known.items()}
    for name, value in vmm.parameters:
        if name not in values:
            raise ConfigError(
                f"unknown parameter {name!r}",
                field=f"vmm.parameters.{name}",
                help=alternatives("parameter", name, values),
            )
        switch = known[name].unit.startswith("flag")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (switch and value > 1):
            wanted = "neither 0 nor 1" if switch else "not a whole number, 0 or more"
            raise ConfigError(
                f"{shown(value)} is {wanted}",
                field=f"vmm.parameters.{name}",
                help=f"{name} is a switch: 0 or 1"
                if switch
                else f"{name} is a number of {known[name].unit}, 0 to {LARGEST:,}",
            )
        values[name] = value
    return values


class _Asked(dict[str, int]):
    """Parameters that remember the names that they were asked for."""

    def __init__(self, values: Mapping[str, int]) -> None:
        super().__init__(values)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> int:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


def unread_parameters(path: Path) -> list[str]:
    """The parameters that a scenario sets and its hypervisor does not ask for; its programs are emitted to see that."""
    vmm, asked = path.vmm, _Asked(path.parameters)
    if not vmm.parameters:
        return []
    path = attrs.evolve(path, parameters=asked)
    personalities[vmm.personality].kernel(Assembler("kernel", at.HOST_TEXT), path)
    personalities[vmm.personality].user(Assembler("user", at.USER_TEXT), path)
    beside = {name for name, pagings in OF_PAGING.items() if vmm.paging in pagings}
    return [name for name, _ in vmm.parameters if name not in asked.names | beside]
