"""Assembles what a guest executes: the text of its kernel, and of its processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from attrs import evolve, field, frozen

from vtsim.base.kept import Kept
from vtsim.base.registry import import_all
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import PAGE, Assembler, Program
from vtsim.cpu.profile import Profile
from vtsim.guest import primitives as primitives_package
from vtsim.guest.address_space import AddressSpace
from vtsim.guest.kernel import KernelOptions, kernel_paths
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.lengths import lengths_of
from vtsim.guest.paging import ROWS
from vtsim.guest.primitives import DmaPlace, Stage, enter_kernel, lowerings
from vtsim.guest.spec import GuestSpec, Phase, ProcessSpec

import_all(primitives_package)

CALLS = {
    at.CALL_YIELD: "call_yield",
    at.CALL_EXIT: "call_exit",
    at.CALL_FORK: "call_fork",
    at.CALL_WAIT: "call_wait",
    at.CALL_UNMAP: "call_unmap",
    at.CALL_PROTECT: "call_protect",
    at.CALL_EXEC: "call_exec",
    at.CALL_SLEEP: "call_sleep",
    at.CALL_BALLOON: "call_balloon",
    at.CALL_SIGACTION: "call_sigaction",
    at.CALL_KILL: "call_kill",
    at.CALL_SIGRETURN: "call_sigreturn",
    at.CALL_STAT: "call_stat",
    at.CALL_OPEN: "call_open",
    at.CALL_CLOSE: "call_close",
    at.CALL_READ: "call_read",
    at.CALL_WRITE: "call_write",
    at.CALL_SELECT: "call_select",
    at.CALL_MAP_FILE: "call_map_file",
    at.CALL_UNMAP_FILE: "call_unmap_file",
    at.CALL_MSYNC: "call_msync",
    at.CALL_SYNC: "call_sync",
}
PLAIN_CALL = "call_plain"
PATHS: Final[Kept[tuple[Program, int, int]]] = Kept(8)  # of the kernel, without loops of phases
TEXTS: Final[Kept[Program]] = Kept(8)


@frozen(kw_only=True)
class Stages:
    """What the loops of a guest's phases have in common."""

    profile: Profile
    seed: int
    scaled: Callable[[int], int]
    place_table: Callable[..., int]
    dma: Mapping[tuple[int, int], DmaPlace] = field(factory=dict)  # by process and phase

    def stage(self, process: int, phase: int, base: int, thread: int = 0) -> Stage:
        """What the writer of one phase's loop is told."""
        return Stage(
            name=f"phase_{process}_{phase}" + (f"_thread_{thread}" if thread else ""),
            base=base,
            profile=self.profile,
            seed=self.seed,
            scaled=self.scaled,
            place_table=self.place_table,
            dma=self.dma.get((process, phase)),
        )


def kernel_loops(guest: GuestSpec) -> list[tuple[int, int, Phase]]:
    """The phases whose loops run in ring 0, by process and phase; their place is their system call."""
    return [
        (number, index, phase)
        for number, process in enumerate(guest.processes)
        for index, phase in enumerate(process.phases)
        if lowerings[type(phase)].ring == 0
    ]


def kernel_text(
    guest: GuestSpec, options: KernelOptions, spaces: Sequence[AddressSpace], stages: Stages
) -> tuple[Program, int]:
    """The kernel's program, and how many of its first pages user page tables also map under KPTI."""
    paths, entry_pages, end = PATHS.get(options, lambda: _paths(options))
    a = Assembler("guest kernel", end, externals=paths.labels)
    for number, index, phase in kernel_loops(guest):
        stage = evolve(
            stages.stage(number, index, spaces[number].bases[index]), paravirtual=options.paravirtual,
            ring3=options.ring3, direct=options.places.direct, entry_bytes=options.entry_bytes,
            views=options.views, exception_page=options.exception_page,
        )  # fmt: skip
        a.activity = ops.APPLICATION
        a.label(stage.name)
        lowerings[type(phase)].emit(a, phase, stage)
        a.mov(s.RAX, 0)
        a.ret()
    loops = a.assemble()
    key = (options, loops.instructions, tuple(loops.labels.items()))
    return TEXTS.get(key, lambda: _joined(paths, loops)), entry_pages


def _paths(options: KernelOptions) -> tuple[Program, int, int]:
    """What does not depend on phases, how many of its pages user page tables map, and the address after it."""
    a = Assembler("guest kernel", options.places.text)
    with lengths_of(options.lengths):
        for path in kernel_paths.values():
            if path.entry:
                path.emit(a, options)
        entry_pages = -(-(a.here - options.places.text) // PAGE)
        a.align(PAGE)
        for path in kernel_paths.values():
            if not path.entry:
                path.emit(a, options)
    return a.assemble(), entry_pages, a.here


def _joined(first: Program, second: Program) -> Program:
    """Two programs as one, the second behind the first."""
    instructions = (*first.instructions, *second.instructions)
    return evolve(first, instructions=instructions, labels=first.labels | second.labels)


def call_table(guest: GuestSpec, text: Program) -> list[int]:
    """The addresses of all system calls, by number; those on mappings are there where a file is."""
    loops = [text.labels[f"phase_{number}_{index}"] for number, index, _ in kernel_loops(guest)]
    names = [CALLS.get(number, PLAIN_CALL) for number in range(at.FIRST_LOOP)]
    return [text.labels.get(name, text.labels[PLAIN_CALL]) for name in names] + loops


def call_count(guest: GuestSpec) -> int:
    """How many system calls there are."""
    return at.FIRST_LOOP + len(kernel_loops(guest))


def process_text(guest: GuestSpec, number: int, by_thread: Sequence[Sequence[int]], stages: Stages) -> Program:
    """The program of a process: for each thread (labels `thread_N`) its phases one after the other, then exit."""
    process: ProcessSpec = guest.processes[number]
    bits = 32 if ROWS[guest.kernel.paging].protected else 64
    a = Assembler(f"process {process.name}", at.USER_TEXT, bits=bits)
    calls = {(p, i): at.FIRST_LOOP + n for n, (p, i, _) in enumerate(kernel_loops(guest))}
    for thread, bases in enumerate(by_thread):
        a.label(f"thread_{thread}")
        for index, phase in enumerate(process.phases):
            how, stage = lowerings[type(phase)], stages.stage(number, index, bases[index], thread)
            if (number, index) in calls:
                how.before(a, phase, stage)
                a.mov(s.RAX, calls[number, index])
                enter_kernel(a)
            else:
                how.emit(a, phase, stage)
        a.mov(s.RAX, at.CALL_EXIT)
        enter_kernel(a)
    return a.assemble()
