"""What the host does from time to time for a VM: each when a host timer says so, by the vCPU's thread, on its way in.

Not modelled: threads of their own for these, beside the guest.
"""

from __future__ import annotations

from attrs import frozen

from vtsim.vmm import layout as at
from vtsim.vmm.registry import Path


@frozen
class Daemon:
    """Words of a vCPU that hold its next time (TSC; 0 never) and whether that has come; the label of its program."""

    at: str
    due: str
    label: str
    cause: int  # of the flushes that it asks other vCPUs for


LOGGING = Daemon("LOG_AT", "LOG_DUE", "log_due", at.FOR_LOG)
SHARING = Daemon("SHARE_AT", "SHARE_DUE", "share_due", at.FOR_SHARING)
COLLAPSE = Daemon("COLLAPSE_AT", "COLLAPSE_DUE", "collapse_due", at.FOR_COLLAPSE)
AGILE = Daemon("AGILE_AT", "AGILE_DUE", "agile_due", at.FOR_SHADOWING)


def daemons(path: Path) -> tuple[Daemon, ...]:
    """Those that the scenario asks for."""
    vmm = path.vmm
    chosen = {
        LOGGING: vmm.dirty_log.on, SHARING: vmm.sharing.on, COLLAPSE: vmm.collapse.on, AGILE: vmm.paging == "agile",
    }  # fmt: skip
    return tuple(daemon for daemon, on in chosen.items() if on)


def what_may_be_due(path: Path) -> tuple[tuple[str, str], ...]:
    """Words of a vCPU that are looked at on the way into its guest, and labels of what is done when they are not 0."""
    swapping = (("SWAP_DUE", "swap_done"),) if path.vmm.swap.on else ()
    return (*swapping, *((daemon.due, daemon.label) for daemon in daemons(path)))
