"""A guest kernel that is a process of the host, whose processes a tracing thread stops at every system call."""

from __future__ import annotations

from typing import Any

from vtsim.vmm.techniques import Technique, techniques


def build(**machine: Any) -> Any:
    """Lay a host, its tracing threads and its guests into an engine."""
    from vtsim.vmm.user_mode.build import build_user_mode

    return build_user_mode(**machine)


techniques.register("user-mode")(
    Technique(
        meaning="The guest's kernel is a process of the host; ptrace stops its processes at system calls and faults.",
        build=build,
        paging=("direct-pv",),
        deprivileged=True,
    )
)
