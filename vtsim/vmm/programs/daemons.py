"""What the host does from time to time for a VM: each when a host timer says so, by the vCPU's thread, on its way in.

Not modelled: threads of their own for these, beside the guest.
"""

from __future__ import annotations

from attrs import frozen

from vtsim.vmm.registry import Path


@frozen
class Daemon:
    """Words of a vCPU that hold its next time (TSC; 0 never) and whether that has come, and the label of its program."""

    at: str
    due: str
    label: str


LOGGING = Daemon("LOG_AT", "LOG_DUE", "log_due")
SHARING = Daemon("SHARE_AT", "SHARE_DUE", "share_due")
COLLAPSE = Daemon("COLLAPSE_AT", "COLLAPSE_DUE", "collapse_due")


def daemons(path: Path) -> tuple[Daemon, ...]:
    """Those that the scenario asks for."""
    chosen = {LOGGING: path.vmm.dirty_log.on, SHARING: path.vmm.sharing.on, COLLAPSE: path.vmm.collapse.on}
    return tuple(daemon for daemon, on in chosen.items() if on)
