"""Writes what the guest's kernel and its processor find in memory: descriptors, per-CPU words, tasks, areas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from vtsim.base import memory as mem
from vtsim.cpu.assembler import PAGE, Program
from vtsim.cpu.segment_descriptors import system_descriptor
from vtsim.guest.address_space import AddressSpace, user_stack
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.free_pages import Sizes
from vtsim.guest.machine_view import PhysicalMemory
from vtsim.guest.paging import GuestPaging

USER_FLAGS: Final = 0x202
USER_PCID: Final = 0x800  # beside the PCID of a process, with KPTI: of its other root
FIRST_THREAD: Final = at.USER_TEXT
INTERRUPT_GATE: Final = 0x8E00 << 32
ZONES, ZONE_BYTES, TABLES_AT, ALIVE_AT = 3, 64, 0x100, 0x140  # in the zones' frame
PLACES_AT = 0x200  # in the frame of a CPU's lists: places of those of larger pages
IRET_BYTES: Final = 40  # what IRET takes from the stack
DOUBLE_FAULT: Final = 8
# descriptors of the GDT, by selector / 8; two words of the task state and two of the LDT follow
DESCRIPTORS: Final = (0, 0, 0xAF9B000000FFFF, 0xCF93000000FFFF, 0, 0xCFF3000000FFFF, 0xAFFB000000FFFF, 0)
PROTECTED_DESCRIPTORS: Final = (0, 0, 0xCF9B000000FFFF, 0xCF93000000FFFF, 0xCFFB000000FFFF, 0xCFF3000000FFFF, 0, 0)
GDT_WORDS: Final = len(DESCRIPTORS) + 4
LOCAL_DESCRIPTORS: Final = (0, 0x40F30000000FFF)  # a data segment of 4 KiB


@frozen(kw_only=True)
class Task:
    """A thread of a process, a child set aside for fork, or an idle task (which has no address space)."""

    at: int  # gpa of its words
    stack_top: int
    root: int = 0  # address of the PML4 table as entries have it
    table: int = 0  # its guest frame
    cr3: int = 0  # address of the table that CR3 names: the same, or with five levels the one above
    user_cr3: int = 0  # of that for user mode, where it is another
    pcid: int = 0
    space: AddressSpace | None = None
    areas: int = 0  # first frame of its table of areas
    parent: int | None = None  # place in the list of tasks
    cpu: int = 0
    leader: int | None = None  # place of the first thread of its process, where it is another
    thread: int = 0
    rip: int = FIRST_THREAD
    files: int = 0  # linear address of those of its process


def linear(gfn: int, places: at.Places = at.LONG) -> int:
    """The address of a frame in the kernel's direct map."""
    return places.direct + (gfn << 12)


def fill(memory: PhysicalMemory, gfn: int, words: Sequence[int] | NDArray[np.int64]) -> None:
    """Store consecutive words from the beginning of a frame on."""
    values = words if isinstance(words, np.ndarray) else np.array([mem.signed(word) for word in words], np.int64)
    for start in range(0, len(values), mem.PAGE_WORDS):
        part = values[start : start + mem.PAGE_WORDS]
        memory.contents(gfn + start // mem.PAGE_WORDS, mem.VALUES)[: len(part)] = part


def write_tasks(
    memory: PhysicalMemory,
    tasks: Sequence[Task],
    *,
    zones: int,
    log: int,
    leave: int,
    pcid: bool,
    nx: bool,
    paging: GuestPaging,
    file: int = 0,
) -> None:
    """Write the tasks' words and areas, and the stacks from which threads start; without a space, a task is idle.

    `file` is the linear address of what is known of the file that is mapped.
    """
    ring = [task for task in tasks if task.space]
    store, direct = memory.store, paging.places.direct
    log_at, zones_at = linear(log, paging.places), linear(zones, paging.places)
    keep = at.NOFLUSH if pcid else 0
    for number, task in enumerate(ring):
        child = next((other for other in ring if other.parent == number), None)
        parent = None if task.parent is None else ring[task.parent]
        words = {
            at.T_CR3: task.cr3 | (task.pcid if pcid else 0) | keep,
            at.T_USER_CR3: task.user_cr3 | (task.pcid | USER_PCID if pcid else 0) | keep,
            at.T_STACK_TOP: task.stack_top,
            at.T_STATE: at.FREE if parent else at.RUNNABLE,
            at.T_NEXT: direct + _after(task, [other for other in ring if other.cpu == task.cpu]).at,
            at.T_LOG: log_at + number * at.LOG_BYTES,
            at.T_AREAS: linear(task.areas, paging.places),
            at.T_ROOT: task.root | paging.root_bits,
            at.T_TABLES: direct + task.at + at.T_TABLES_NEXT if parent else zones_at + TABLES_AT,
            at.T_CHILD: direct + child.at if child else 0,
            at.T_PARENT: direct + parent.at if parent else 0,
            at.T_SHARED: int(parent is not None),
            at.T_FILES: task.files,
        }
        if task.space:
            words[at.T_AREA_COUNT] = len(task.space.areas)
        if task.space and task.leader is None:
            fill(memory, task.areas, list(_area_words(task.space, zones_at, nx, file)))
        if len({other.cpu for other in tasks}) > 1:
            first = number if task.leader is None else task.leader
            threads = [other for n, other in enumerate(ring) if first in (n, other.leader)]
            words |= {
                at.T_SPACE: direct + ring[first].at, at.T_PEER: direct + _after(task, threads).at,
                at.T_CPU: at.CPU_DATA + cpu_shift(task.cpu),
            }  # fmt: skip
        for word, value in words.items():
            store(task.at + word, value)
        if parent is None:
            _write_first_frame(memory, task, leave, paging)
    for idle in (task for task in tasks if not task.space):
        store(idle.at + at.T_STACK_TOP, idle.stack_top)
        store(idle.at + at.T_STATE, at.FREE)
        store(idle.at + at.T_NEXT, direct + _first(tasks, idle.cpu).at)


def _after(task: Task, ring: Sequence[Task]) -> Task:
    """The next one in a ring."""
    return ring[(ring.index(task) + 1) % len(ring)]


def _first(tasks: Sequence[Task], cpu: int) -> Task:
    """The first task of a CPU: its idle task where there is no other."""
    return next(task for task in tasks if task.cpu == cpu)


def cpu_shift(cpu: int) -> int:
    """How far behind those of the first CPU a CPU's entry area, data and tables lie."""
    return cpu * at.ENTRY_PAGES * PAGE


def _area_words(space: AddressSpace, zones: int, nx: bool, file: int) -> Iterator[int]:
    """The rows of the table of areas. Where a file will be mapped is nothing yet."""
    for area in space.areas:
        zone = 0 if area.text else zones + area.size * ZONE_BYTES
        end = area.start if area.file else area.end
        row = [area.start, end, area.leaf(nx), area.size + 1, zone, area.page_bytes, file if area.file else 0]
        yield from row + [0] * (at.AREA_BYTES // 8 - len(row))


def _write_first_frame(memory: PhysicalMemory, task: Task, leave: int, paging: GuestPaging) -> None:
    """Prepare the kernel stack so that the first switch to the task goes to user mode."""
    stack = user_stack(task.thread, paging.places) - 16
    if paging.protected:  # words of 4 bytes, from the error code on
        frame = task.stack_top - at.PROTECTED_FRAME_BYTES
        pushed = (0, task.rip, at.PROTECTED_CODE, USER_FLAGS, stack, at.USER_DATA)
        words = {
            task.stack_top - 4 * (len(pushed) - n): pushed[n] | pushed[n + 1] << 32 for n in range(0, len(pushed), 2)
        }
    else:
        frame = task.stack_top - at.FRAME_BYTES
        words = {
            frame + at.F_RIP: task.rip, frame + at.F_CS: at.USER_CODE, frame + at.F_RFLAGS: USER_FLAGS,
            frame + at.F_RSP: stack, frame + at.F_SS: at.USER_DATA,
        }  # fmt: skip
    for address, value in (words | {frame - 8: leave}).items():
        memory.store(address - paging.places.direct, value)
    memory.store(task.at + at.T_RSP, frame - 8 - at.SWITCH_BYTES)


def write_descriptors(
    memory: PhysicalMemory, text: Program, entry: int, stack: int, paging: GuestPaging, cpu: int = 0
) -> None:
    """Write IDT, GDT, LDT and TSS into a CPU's entry area; `stack` is where exceptions in user mode arrive.

    SDM: "64-Bit Mode IDT"; "TSS Descriptor in 64-bit mode"; "64-Bit Mode Stack Frame"; "Segment Descriptors".
    Not modelled: a task gate for double faults in 32-bit protected mode.
    """
    gates: list[int] = []
    moved = paging.places.entry
    for vector in range(256):
        handler = text.labels.get(f"vector_{vector}", text.labels["vector_other"]) & ((1 << 64) - 1)
        table = 1 if vector == DOUBLE_FAULT else 0
        low = (handler & 0xFFFF) | at.KERNEL_CODE << 16 | INTERRUPT_GATE | (handler >> 16 & 0xFFFF) << 48
        gates += [low] if paging.protected else [low | table << 32, handler >> 32]
    fill(memory, entry, gates)
    words = memory.contents(entry + 1, mem.VALUES)
    gdt, tss = at.GDT - at.CPU_DATA, at.TSS - at.CPU_DATA
    state = system_descriptor(0x8B, 0x67, moved(at.TSS) + cpu_shift(cpu))
    local = system_descriptor(0x82, 8 * len(LOCAL_DESCRIPTORS) - 1, moved(at.LDT) + cpu_shift(cpu))
    flat = PROTECTED_DESCRIPTORS if paging.protected else DESCRIPTORS
    for n, descriptor in enumerate((*flat, *state, *local)):
        words[gdt // 8 + n] = mem.signed(descriptor)
    for n, descriptor in enumerate(LOCAL_DESCRIPTORS):
        words[(at.LDT - at.CPU_DATA) // 8 + n] = descriptor
    as_bytes = words.view(np.uint8)
    stacks = {tss + 4: stack, tss + 36: moved(at.DOUBLE_FAULT_STACK) + cpu_shift(cpu)}
    if paging.protected:  # ESP0, SS0
        stacks = {tss + 4: stack | at.KERNEL_STACK << 32}
    for offset, value in stacks.items():
        as_bytes[offset : offset + 8] = np.frombuffer(value.to_bytes(8, "little", signed=True), np.uint8)


def write_cpu_data(
    memory: PhysicalMemory,
    entry: int,
    tasks: Sequence[Task],
    root: int,
    places: at.Places,
    *,
    gather: int = -1,
    lists: Sequence[int] = (),
) -> None:
    """Write every CPU's words: its idle task runs, on the kernel's own root.

    With several CPUs, `gather` is the first frame of their lists of frames to be freed, `lists` where those of free
    pages are.
    """
    for idle in (task for task in tasks if not task.space):
        here = [task for task in tasks if task.cpu == idle.cpu and task.space]
        words = {
            at.CURRENT: places.direct + idle.at,
            at.IDLE_TASK: places.direct + idle.at,
            at.FIRST_TASK: places.direct + _first(tasks, idle.cpu).at,
            at.STACK_TOP: idle.stack_top,
            at.KERNEL_ROOT: root,
            at.ALIVE: sum(task.parent is None for task in here),
        }
        if gather >= 0:
            words |= {
                at.TASKS_HERE: max(len(here), 1), at.APIC_ID: idle.cpu, at.LAZY: 1,
                at.GATHER: linear(gather + idle.cpu * at.GATHER_PAGES), at.PAGE_LISTS: linear(lists[idle.cpu]),
                at.ENTRY_TOP: at.ENTRY_STACK + cpu_shift(idle.cpu) - IRET_BYTES,
            }  # fmt: skip
        for word, value in words.items():
            memory.store(((entry + 1) << 12) + cpu_shift(idle.cpu) + word, value)


def list_frames(sizes: Sizes) -> int:
    """How many frames a CPU's lists of free pages take: one, and the places of the list of 4 KiB pages."""
    return 1 + -(-sizes.places // mem.PAGE_WORDS)


def write_page_lists(memory: PhysicalMemory, first: int, sizes: Sizes) -> None:
    """Write a CPU's lists of free pages into frames from `first` on: all are empty, those of larger pages stay so."""
    alone = Sizes(batch=1, high=1, low_watermark=0)
    for size in range(ZONES):
        of = alone if size else sizes
        places = linear(first) + PLACES_AT + size * ZONE_BYTES if size else linear(first + 1)
        words = {at.P_PLACES: places, at.P_MASK: of.places - 1, at.P_BATCH: of.batch, at.P_HIGH: of.high}
        for word, value in words.items():
            memory.store((first << 12) + size * ZONE_BYTES + word, value)
