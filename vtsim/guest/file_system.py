"""Where the file that processes map is kept, and when its dirty pages are written there.

Source: Linux, mm/page-writeback.c (dirty_background_ratio 10, dirty_ratio 20), fs/fuse/inode.c (a strict limit of 1 %
of those for a file system in user space), fs/fuse/file.c (fuse_vma_close, fuse_page_mkwrite).
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.base.spec import Text, counts, durations, setting, shares

MEMORY, DISK, HOST = "memory", "disk", "host"
STRICT: Final = 0.01  # of the limits, for a file system in user space: its max_ratio, with BDI_CAP_STRICTLIMIT
DOORBELL: Final = 0xFEBE_0000  # guest-physical address of the device's only register
ENTRIES: Final = 128  # of the queue of requests, as virtio-blk and virtio-fs have it by default in QEMU


@frozen(kw_only=True)
class FileSystemSpec:
    """The file system of the file that processes map, and the device that has its pages.

    The latencies are those of the SSD of `vmm.swap`. A server on the host that has the file in its own page cache is
    faster, and mostly serves one request at a time.
    """

    kind: str = setting(
        Text(choices=(MEMORY, DISK, HOST)),
        "memory: no page is written; disk: pages are written when too many are dirty, or on request; host: the host "
        "has the file, as with virtio-fs: pages are written when a mapping goes, too, and a store waits for its page. "
        "disk and host need one vCPU, a 64-bit kernel, technique native or hardware with EPT or shadow tables, "
        "and a kernel that is not built for hypercalls; they do not go with sharing, collapse, swap or balloon, "
        "posted_interrupts, exit_clustering",
        default=MEMORY,
    )
    write: int = setting(
        durations(ge=1),
        "How long the device takes to write a page; nothing with kind: memory, as at_once",
        default=20_000,
    )
    at_once: int = setting(counts(ge=1, le=1024), "Requests that the device serves at a time", default=24)
    background: float = setting(
        shares(), "Share of memory that may be dirty before pages are written (vm.dirty_background_ratio)", default=0.1
    )
    limit: float = setting(
        shares(), "Share of memory that may be dirty at most, background or more (vm.dirty_ratio)", default=0.2
    )

    def __attrs_post_init__(self) -> None:
        if self.background > self.limit:
            raise ConfigError(
                "pages are written in the background before there are too many",
                field="background",
                help=f"background can be at most {100 * self.limit:g} %",
            )

    @property
    def written(self) -> bool:
        """Are pages ever written?"""
        return self.kind != MEMORY

    def pages(self, memory: int) -> tuple[int, int]:
        """Of a guest with so many bytes: dirty pages beyond which they are written, and beyond which writers wait.

        The latter is half way to the limit: Linux lets writers run freely up to there (dirty_freerun_ceiling).
        """
        part = STRICT if self.kind == HOST else 1.0
        background, limit = (int(memory * share * part) >> 12 for share in (self.background, self.limit))
        return background, (background + limit) // 2
