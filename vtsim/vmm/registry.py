"""Two doors of the hypervisor: personalities, and the exit paths of each. For techniques see `vtsim.vmm.techniques`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from attrs import frozen

from vtsim.base.registry import Registry
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.profile import Profile
from vtsim.vmcs.capabilities import Capabilities
from vtsim.vmm.spec import VmmSpec
from vtsim.vmm.vmcs import Wanted


@frozen(kw_only=True)
class Parameter:
    """A number of a personality that no manual gives: with its unit, source and confidence."""

    value: int
    unit: str
    source: str
    confidence: str
    meaning: str


@frozen(kw_only=True)
class Path:
    """What an exit path may know when it is assembled."""

    vmm: VmmSpec
    profile: Profile
    capabilities: Capabilities
    parameters: Mapping[str, int]
    addresses: Mapping[str, int]  # linear addresses of the host's own structures
    several: bool = False  # has a VM more than one vCPU?
    parallel: bool = False  # do vCPUs run on more than one CPU?

    @property
    def remote(self) -> bool:
        """Can others than its own CPU want something of a vCPU: vCPUs of its VM, or a unit that posts interrupts?"""
        return self.several or self.vmm.posted_interrupts

    def __getitem__(self, parameter: str) -> int:
        return self.parameters[parameter]


ExitPath = Callable[[Assembler, Path], None]


class Personality(Protocol):
    """A hypervisor as programs."""

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Its path lengths and switches."""
        ...

    def wanted(self, path: Path) -> Wanted:
        """What it asks of the VMCS."""
        ...

    def kernel(self, a: Assembler, path: Path) -> None:
        """Emit everything that runs in R0: labels `exit`, `boot`, `ended` and one for each handler."""
        ...

    def user(self, a: Assembler, path: Path) -> None:
        """Emit the user-space device process, label `user`; nothing where there is none."""
        ...


personalities: Final[Registry[str, Personality]] = Registry("personality")
exit_paths: Final[Registry[tuple[str, int], ExitPath]] = Registry("exit path")
