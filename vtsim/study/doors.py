"""The doors: what a scenario can name and a contributor can add, listed from the registries themselves."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping

from attrs import frozen
from rich.console import RenderableType
from rich.table import Table

from vtsim.base.errors import ConfigError
from vtsim.base.registry import Registry, import_all
from vtsim.cpu.profile import load_profile, profile_names
from vtsim.study.published import row
from vtsim.study.table import section
from vtsim.study.validate import registered as bound

Names = Iterable[tuple[str, str]]  # (name, one line)


@frozen(kw_only=True)
class Door:
    """One open set of named things."""

    meaning: str
    names: Callable[[], Names]


def registered(home: str, attribute: str, package: str = "") -> Callable[[], Names]:
    """The names of a registry; `package` holds the modules that fill it."""

    def names() -> Names:
        if package:
            import_all(importlib.import_module(package))
        registry: Registry[object, object] = getattr(importlib.import_module(home), attribute)
        return [(str(key), registry.describe(key)) for key in registry]

    return names


def profiles() -> Names:
    """The shipped CPU profiles."""
    return [(name, load_profile(name).description) for name in profile_names()]


def bound_rows() -> Names:
    """The published rows that can be simulated."""
    return [(name, row(name).metric) for name in bound()]


def handled_exits() -> Names:
    """Exit reasons with a program, by personality."""
    from vtsim.vmcs.reasons import reason_name
    from vtsim.vmm.registry import exit_paths

    import_all(importlib.import_module("vtsim.vmm.personalities"))
    return [(f"{name} {reason_name(reason)}", exit_paths.describe((name, reason))) for name, reason in exit_paths]


def techniques() -> Names:
    """How a guest kernel can be run."""
    import vtsim.vmm.techniques as door

    import_all(door)
    return [(name, one.meaning) for name, one in door.techniques.items()]


def devices() -> Names:
    """What a machine or a VM can have on bus 0."""
    from vtsim.vmm.pci import MODELS

    return [(name, f"{one.title}, {one.vendor:04x}:{one.device:04x}") for name, one in MODELS.items()]


# fmt: off
DOORS: Mapping[str, Door] = {
    "profile":   Door(meaning="CPUs, as in machine.profile", names=profiles),
    "primitive": Door(meaning="what the phases of a process can be",
                      names=registered("vtsim.guest.spec", "primitives")),
    "technique": Door(meaning="how a guest kernel is virtualized, as in vmm.technique", names=techniques),
    "device":    Door(meaning="devices by their identity, as in machine.devices and vms.0.devices", names=devices),
    "personality": Door(meaning="hypervisors, as in vmm.personality",
                        names=registered("vtsim.vmm.registry", "personalities", "vtsim.vmm.personalities")),
    "exit-path": Door(meaning="hypervisor programs by personality and exit reason", names=handled_exits),
    "kernel-path": Door(meaning="programs of the guest kernel",
                        names=registered("vtsim.guest.kernel", "kernel_paths", "vtsim.guest.kernel")),
    "binding":   Door(meaning="published measurements that `vtsim validate` compares with",
                      names=bound_rows),
}
# fmt: on


def doors_table(door: str) -> RenderableType:
    """The names behind one door, or the doors themselves."""
    if not door:
        return _table("Doors", [(name, one.meaning) for name, one in DOORS.items()])
    if door not in DOORS:
        raise ConfigError.unknown("door", door, DOORS)
    return _table(door, DOORS[door].names())


def _table(title: str, names: Names) -> Table:
    table = section(title)
    table.add_column("")
    for name, meaning in names:
        table.add_row(name, meaning)
    return table
