"""Two doors of the hypervisor: personalities, and the exit paths of each. For techniques see `vtsim.vmm.techniques`."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from attrs import frozen

from vtsim.base.registry import Registry
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.profile import Profile, cycles_of
from vtsim.cpu.profile_spec import Features
from vtsim.ept.spec import EPT_IGNORE_PAT
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
class Processor:
    """What programs may know of a processor: not its prices and sizes, so that points of a study share programs."""

    clock_hz: int
    features: Features
    physical_address_bits: int

    @classmethod
    def of(cls, profile: Profile) -> Processor:
        """Return what programs may know of a profile."""
        return cls(
            clock_hz=profile.clock_hz,
            features=profile.features,
            physical_address_bits=profile.physical_address_bits,
        )

    def cycles(self, nanoseconds: int) -> int:
        """Convert a time to whole cycles of its clock, as the profile does."""
        return cycles_of(nanoseconds, self.clock_hz)


@frozen(kw_only=True)
class Path:
    """What an exit path may know when it is assembled; a program depends on this alone."""

    vmm: VmmSpec
    profile: Processor
    capabilities: Capabilities
    parameters: Mapping[str, int]
    addresses: Mapping[str, int]  # linear addresses of the host's own structures
    several: bool = False  # has a VM more than one vCPU?
    parallel: bool = False  # do vCPUs run on more than one CPU?
    recorded: bool = False  # is a guest recorded, so that it may be in real-address mode?

    @property
    def remote(self) -> bool:
        """Can others than its own CPU want something of a vCPU: vCPUs of its VM, or a unit that posts interrupts?"""
        return self.several or self.vmm.posted_interrupts

    @property
    def keeps_cr2(self) -> bool:
        """Is the guest's CR2 stored at every exit and loaded before every entry, as by KVM?"""
        return self.vmm.personality == "kvm"

    @property
    def ignores_pat(self) -> int:
        """The bit of EPT leaves of memory by which the guest's PAT does not count, or 0 where it does.

        SDM: "Memory Type Used for Translated Guest-Physical Addresses".
        """
        return EPT_IGNORE_PAT if self.parameters.get("ignore_pat", 0) else 0

    def __getitem__(self, parameter: str) -> int:
        return self.parameters[parameter]

    @property
    def key(self) -> bytes:
        """Two paths of the same key lead to the same program."""
        return pickle.dumps(self)


ExitPath = Callable[[Assembler, Path], None]


class Personality(Protocol):
    """A hypervisor as programs."""

    def parameters(self, lengths: str) -> Mapping[str, Parameter]:
        """Its path lengths, those of a kernel where it has any, and switches."""
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
