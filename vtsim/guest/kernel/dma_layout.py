"""Where the guest kernel keeps what it needs for DMA: words of a port (a device with its domain) and of the unit.

A port has a page of words, a ring of descriptors, a status page that the device writes, a flush queue, magazines and
tree nodes. The unit has a page of words and the page of its invalidation queue.
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

# fmt: off
# --- words of a port ------------------------------------------------------------------------------------------------
# P_ROOT: physical address of the domain's table. P_TABLES: next frame for a table, end. P_TREE, P_CACHED: nodes of the
# tree of addresses in use. P_NODES, P_MAGAZINES: lists of free ones. P_PAGE_LOW, P_DOMAIN_LOW: first words of
# invalidation descriptors; P_DEVICE_LOW: of that for its device-TLB, 0 without one. P_GROUPS: a word for each page
# request group that is not complete: how it will be answered. P_CONTEXT: the device's context entry; P_CONTEXT_LOW: the
# first word of its invalidation; P_TRIES: how often the last invalidation of the device-TLB was not answered.
# P_RING, P_DOORBELL, P_STATUS, P_SLOTS: linear addresses. P_POST, P_REAP: bytes from there to
# the next slot.
(P_ROOT, P_TABLES, P_TABLES_END, P_TREE, P_CACHED, P_NODES, P_MAGAZINES, P_LOCK, P_PAGE_LOW, P_DOMAIN_LOW, P_RING,
 P_PRODUCER, P_DOORBELL, P_STATUS, P_WAITER, P_CONSUMER,
 Q_HEAD, Q_TAIL, Q_ENTRIES, Q_STARTED, Q_FINISHED, Q_ON, Q_EXPIRES, Q_LOCK, P_SLOTS, P_POST, P_REAP,
 P_DEVICE_LOW, P_GROUPS, P_CONTEXT, P_CONTEXT_LOW, P_TRIES) = range(0, 256, 8)
TRIES: Final = 4              # invalidations of a device-TLB until a device is given up
(SLOT_ADDRESS, SLOT_BUFFER) = range(0, 16, 8)   # of each buffer: where the device finds it, where it is
SLOT_BYTES: Final = 16
CLASSES: Final = 0x100        # of sizes: 1, 2, 4 … 32 pages
CLASS_BYTES: Final = 64
CLASS_COUNT: Final = 6
(C_LOADED, C_PREVIOUS, C_FULL, C_LOCK) = range(0, 32, 8)
STATISTICS: Final = 0x300
STATISTIC_NAMES: Final = (
    "maps", "map_cycles", "unmaps", "unmap_cycles", "invalidations", "invalidation_cycles", "flushes", "interrupts",
    "started", "elapsed", "spins", "device_invalidations", "timeouts", "page_requests", "page_request_cycles",
    "pages_mapped", "page_requests_invalid", "given_up",
)
(S_MAPS, S_MAP_CYCLES, S_UNMAPS, S_UNMAP_CYCLES, S_INVALIDATIONS, S_INVALIDATION_CYCLES, S_FLUSHES, S_INTERRUPTS,
 S_STARTED, S_ELAPSED, S_SPINS, S_DEVICE_INVALIDATIONS, S_TIMEOUTS, S_PAGE_REQUESTS, S_PAGE_REQUEST_CYCLES,
 S_PAGES_MAPPED, S_PAGE_REQUESTS_INVALID, S_GIVEN_UP) = range(STATISTICS, STATISTICS + 144, 8)
DEPOTS: Final = 0x800         # full magazines of each class, DEPOT_LIMIT words
DEPOT_LIMIT: Final = 32       # MAX_GLOBAL_MAGS
MAGAZINE_LIMIT: Final = 127   # IOVA_MAG_SIZE
MAGAZINE_BYTES: Final = 1024  # how many, then page numbers
# --- a node of the tree of addresses in use -------------------------------------------------------------------------
# N_BUFFER: physical address of what the driver allows there, 0 for nothing; N_PAGES: of so many pages
(N_PARENT, N_LEFT, N_RIGHT, N_COLOUR, N_LOW, N_HIGH, N_BUFFER, N_PAGES) = range(0, 64, 8)
NODE_BYTES: Final = 64
RED, BLACK = 0, 1
# --- an entry of the flush queue ------------------------------------------------------------------------------------
(E_PAGE, E_PAGES, E_FREE, E_COUNTER) = range(0, 32, 8)
QUEUE_ENTRIES: Final = 256    # IOVA_FQ_SIZE; one is always empty
QUEUE_BYTES: Final = 32
QUEUE_TIMEOUT_NS: Final = 10_000_000  # IOVA_FQ_TIMEOUT
# --- the device's ring ----------------------------------------------------------------------------------------------
RING_ENTRIES: Final = 1024
# address; bytes in bits 31:0, 1 in bit 32 where the device is to write, in bit 33 where it carries values
RING_ENTRY_BYTES: Final = 16
RING_PAGES: Final = RING_ENTRIES * RING_ENTRY_BYTES // 4096
DEVICE_WRITES, CARRIES = 1 << 32, 1 << 33
# --- words of the unit ----------------------------------------------------------------------------------------------
(U_TICKET, U_SERVING, U_NEXT) = range(0, 24, 8)
U_STATUS: Final = 0x800       # four bytes for each descriptor of the queue
UNIT_ENTRIES: Final = 256     # QI_LENGTH; half of it where descriptors are wide, so that the queue is a page
IN_USE, DONE, ABORTED = 1, 2, 3   # status words
WHOLE: Final = 0x7FFF_FFFF_FFFF_F001  # second word of a device-TLB invalidation: every address
# --- addresses of devices -------------------------------------------------------------------------------------------
FIRST_PAGE, LAST_PAGE = 1, 0xF_FFFF            # of 4 KiB, below 4 GiB: what Linux tries first
INTERRUPT_PAGES: Final = (0xF_EE00, 0xF_EEFF)  # no address of a device: what is written there is an interrupt
ANCHOR: Final = 1 << 52
RING_PAGE: Final = LAST_PAGE - RING_PAGES      # where ring and status page are mapped
STATUS_PAGE: Final = LAST_PAGE
PAGE_REQUEST_VECTOR: Final = 0x40
PAGE_REQUEST_BYTES: Final = 32  # of a descriptor of the page request queue
DMA_VECTOR: Final = 0x41      # of the first port, then upwards
# fmt: on

MODES: Final = ("strict", "deferred", "never", "identity")


@frozen(kw_only=True)
class DmaOptions:
    """What the kernel's text for DMA depends on. Addresses are linear.

    `mode`: of `MODES`. `cached`: are addresses kept in magazines, or is the tree asked each time? `ports`: pages of
    words.
    """

    mode: str
    cached: bool
    coherent: bool
    write_buffers: bool
    caching_mode: bool
    unit: int
    unit_physical: int
    queue: int
    registers: int
    ports: tuple[int, ...]
    owners: tuple[int, ...]  # of each port: the CPU of the process that drives the device
    large: bool
    rights: int  # bits of an entry that leads to a table or to a page
    device_tlbs: tuple[tuple[int, int], ...]  # of each device with one that invalidations must reach: source-id, port
    wide: bool  # descriptors of 32 bytes, which scalable mode has
    page_queue: int  # of page requests, and how many bytes of it
    page_queue_bytes: int
    askers: tuple[tuple[int, int], ...]  # of each device that asks for pages: source-id, port
    timeout_ticks: int
