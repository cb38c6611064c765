"""What a scenario sets of a personality: its parameters, checked against what the personality has."""

from __future__ import annotations

from vtsim.base.errors import ConfigError, alternatives
from vtsim.vmm.registry import personalities
from vtsim.vmm.spec import VmmSpec


def resolve_parameters(vmm: VmmSpec) -> dict[str, int]:
    """The personality's parameters with the scenario's changes; an unknown one is the user's mistake."""
    known = personalities[vmm.personality].parameters
    values = {name: parameter.value for name, parameter in known.items()}
    for name, value in vmm.parameters:
        if name not in values:
            raise ConfigError(
                f"unknown parameter {name!r}",
                field=f"vmm.parameters.{name}",
                help=alternatives("parameter", name, values),
            )
        switch = known[name].unit.startswith("flag")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (switch and value > 1):
            wanted = "neither 0 nor 1" if switch else "not a whole number that is not negative"
            raise ConfigError(
                f"{value!r} is {wanted}",
                field=f"vmm.parameters.{name}",
                help=f"{name} is a switch: 0 or 1" if switch else f"{name} is a number of {known[name].unit}",
            )
        values[name] = value
    return values
