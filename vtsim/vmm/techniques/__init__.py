"""The door of techniques: how a guest kernel is virtualized, each in a file of its own, as `vmm.technique` names it.

Importing this package loads no engine, so that scenarios can be checked against it: `build` imports what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from attrs import frozen

from vtsim.base.registry import Registry


@frozen(kw_only=True)
class Technique:
    """One way to run a guest kernel.

    `build` lays the hypervisor and its guests into an engine (None: there is no hypervisor). `paging` is what
    `vmm.paging` can be; empty: what the processor has. A technique that is `deprivileged` runs the guest's kernel in
    ring 3 of root operation and uses nothing of VT-x. One that is `in_software` executes no instruction of the guest
    itself, so that the guest may be of another instruction set.
    """

    meaning: str
    build: Callable[..., Any] | None
    paging: tuple[str, ...] = ()
    deprivileged: bool = False
    in_software: bool = False


techniques: Final[Registry[str, Technique]] = Registry("technique")
