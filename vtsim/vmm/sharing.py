"""Where page sharing keeps what it knows, in the host's memory; what a run's result says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vtsim.base.memory import PAGE_BYTES, PAGE_WORDS, gfn_ranges
from vtsim.vmm import layout as at
from vtsim.vmm.host import Host
from vtsim.vmm.programs.sharing import NOTED_BYTES, SHARED_BYTES, SHARING


def mark_frames(size: int) -> int:
    """Frames of a word for every frame number of so much guest memory."""
    return -(-gfn_ranges(size)[-1][1] // PAGE_WORDS)


def slots(memories: Sequence[int]) -> int:
    """Places of the tables: a power of two that is not less than the frames of all VMs."""
    return 1 << (sum(-(-size // PAGE_BYTES) for size in memories) - 1).bit_length()


def sharing_frames(memories: Sequence[int]) -> int:
    """Frames of everything that page sharing keeps."""
    return slots(memories) * (SHARED_BYTES + NOTED_BYTES) // PAGE_BYTES + 2 + sum(map(mark_frames, memories))


def reserve_sharing(host: Host, memories: Sequence[int]) -> dict[str, int]:
    """Memory for the tables of all VMs together; their linear addresses, and how many places they have."""
    count = slots(memories)
    return {
        "share_slots": count,
        "shared": at.frame_address(host.area(count * SHARED_BYTES // 8)),
        "noted": at.frame_address(host.area(count * NOTED_BYTES // 8)),
        "sharing": at.frame_address(host.reserve()),
    }


def shared_now(host: Host, addresses: Mapping[str, int]) -> dict[str, int]:
    """Shared frames, and pages of VMs that they are behind, as a result has them."""
    if "sharing" not in addresses:
        return {}
    frames, pages = (host.load(addresses["sharing"] + SHARING[word]) for word in ("FRAMES", "PAGES"))
    return {"shared_frames": frames, "sharing_pages": pages}
