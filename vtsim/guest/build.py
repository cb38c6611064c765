"""Lays a guest into its memory: kernel, page tables, tasks, processes. The same natively and in a VM.

Not modelled: INIT and start-up IPIs of a guest (its other CPUs start in the kernel, too); operands of 32 bits in guests
in 32-bit protected mode, whose programs compute in sixteen 64-bit registers, call with stack slots of 8 bytes and keep
words of 8 bytes; linear addresses beyond 47 bits; the boot of a real kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from attrs import define, evolve, field, frozen
from numpy.typing import NDArray

from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError, ModelError
from vtsim.cpu import ops
from vtsim.cpu.assembler import PAGE, Program
from vtsim.cpu.profile import Profile
from vtsim.ept import spec as e
from vtsim.ept.tables import KERNEL_PAGE, PAGING, SIZE_1G, SIZE_2M, SIZE_4K, Table
from vtsim.guest.address_space import AddressSpace, address_space
from vtsim.guest.file_mappings import MapFileSpec
from vtsim.guest.file_system import ENTRIES, HOST
from vtsim.guest.frames import Frames, Supply
from vtsim.guest.kernel import KernelOptions
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.files import Files
from vtsim.guest.kernel.free_pages import Sizes, sizes
from vtsim.guest.kernel.page_cache import CachedFile, FileOptions
from vtsim.guest.kernel.write_back import queue_words
from vtsim.guest.kernel_data import (
    ALIVE_AT,
    GDT_WORDS,
    TABLES_AT,
    USER_PCID,
    ZONE_BYTES,
    Task,
    cpu_shift,
    fill,
    linear,
    list_frames,
    write_cpu_data,
    write_descriptors,
    write_page_lists,
    write_tasks,
)
from vtsim.guest.machine_view import DirectTables, DmaMachine, PhysicalMemory, Space, Start
from vtsim.guest.paging import FIVE, OF_32_BIT, OF_PAE, ROWS, GuestPaging
from vtsim.guest.primitives import lowerings
from vtsim.guest.programs import Stages, call_count, call_table, kernel_text, process_text
from vtsim.guest.replay.build import Recording, build_replay, recording_of
from vtsim.guest.services import MOST_SOCKETS, FilePhase
from vtsim.guest.spec import BalloonSpec, FillSpec, ForkSpec, GuestSpec, IdleSpec, ReplaySpec
from vtsim.guest.watched import WatchedStoresSpec

if TYPE_CHECKING:
    from vtsim.guest.dma_memory import DmaLayout
    from vtsim.platform.spec import VmSpec

Refill = Callable[[NDArray[np.int64], int], None]

NS: Final = 1_000_000_000
FOUR_GIB_FRAMES: Final = 1 << 20
CR0: Final = 0x8005_0033
CR4_PSE, CR4_PAE, CR4_PGE, CR4_FX, CR4_LA57, CR4_PCIDE = 1 << 4, 1 << 5, 1 << 7, 3 << 9, 1 << 12, 1 << 17
EFER_SYSCALL, EFER_LONG, EFER_NX = 1 << 0, 5 << 8, 1 << 11
STAR, LSTAR, FMASK, KERNEL_GS_BASE = 0xC0000081, 0xC0000082, 0xC0000084, 0xC0000102
SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = 0x174, 0x175, 0x176
FLAGS_CLEARED: Final = 0x47700  # by SYSCALL
USER_FIRST_SELECTOR: Final = 0x23
SPAN: Final = 1 << 16  # pages that are mapped in one go
CHILD_PAGES: Final = 4  # that a child copies beside what its primitive says: its stack
BASE_POOL, BASE_ROWS, ROWS_PER_PHASE, CODE_PAGES_PER_PHASE = 256, 2048, 1536, 10
DMA_ROWS: Final = 2048


@frozen(kw_only=True)
class Needs:
    """What a guest needs of an engine's geometry, at most."""

    pool_pages: int
    code_pages: int
    rows: int
    extra_words: int


def needs(vm: VmSpec, profile: Profile, *, shadow: bool = False, paravirtual: bool = False) -> Needs:
    """Return what an engine must have room for, so that `build_guest` and the guest find it."""
    guest = vm.guest
    if recording := recorded(guest, profile, shadow=shadow):
        return Needs(pool_pages=BASE_POOL, code_pages=0, rows=0, extra_words=recording.words)
    spaces = _spaces(guest, profile)
    phases = sum(len(process.phases) * process.threads for process in guest.processes)
    threads = sum(process.threads - 1 for process in guest.processes)
    tables = sum(space.tables(prebuilt=built) * (2 - built) for space in spaces for built in (False, True))
    lists = sum(space.pages(size, prebuilt=False) for space in spaces for size in range(3))
    direct = (
        (vm.memory >> 21) + 8 + vm.memory // mem.PAGE_BYTES // mem.PAGE_WORDS if paravirtual else (vm.memory >> 30) + 12
    )
    tasks = (2 * len(spaces) + threads) * (at.KERNEL_STACK_PAGES + 8)
    if vm.vcpus > 1:
        free = sizes(vm.memory // PAGE, vm.vcpus)
        lists += free.low_watermark
        tasks += min(tables, struct_frames(vm.memory // PAGE + FOUR_GIB_FRAMES))
        tasks += vm.vcpus * (at.KERNEL_STACK_PAGES + at.ENTRY_PAGES + at.GATHER_PAGES + list_frames(free) + 5)
    return Needs(
        pool_pages=BASE_POOL
        + tables
        + lists // mem.PAGE_WORDS
        + direct
        + tasks
        + _filled(guest)
        + len(_asking(guest)) * _file_pages(guest)
        + _cache_pages(guest),
        code_pages=(16 if guest.driven else 8) + CODE_PAGES_PER_PHASE * phases + 2 * len(spaces),
        rows=BASE_ROWS
        + (DMA_ROWS if guest.driven else 0)
        + sum(_rows(phase) * process.threads for process in guest.processes for phase in process.phases),
        extra_words=sum(
            _table_words(phase) * process.threads for process in guest.processes for phase in process.phases
        ),
    )


def struct_frames(frames: int) -> int:
    """How many frames what is known of so many frames takes."""
    return -(-frames * at.PAGE_STRUCT_BYTES // PAGE)


def _filled(guest: GuestSpec) -> int:
    """Pages that get contents because processes store values in them."""
    phases = [phase for process in guest.processes for phase in process.phases]
    watched = sum(phase.pages for phase in phases if isinstance(phase, WatchedStoresSpec))
    return watched + sum(-(-phase.region // PAGE) for phase in phases if isinstance(phase, FillSpec))


def _files(guest: GuestSpec) -> Files | None:
    """The files that processes ask about, if they do."""
    asking = [phase for process in guest.processes for phase in process.phases if isinstance(phase, FilePhase)]
    if not asking:
        return None
    files = Files(
        components=max(phase.path_components for phase in asking),
        sockets=max(phase.open_sockets for phase in asking),
        ordinary=max(phase.open_files for phase in asking),
        threads=max(process.threads for process in guest.processes),
    )
    if files.sockets + files.ordinary > MOST_SOCKETS:
        raise ConfigError(
            f"processes ask about {files.sockets} sockets and {files.ordinary} files",
            help=f"a guest's kernel has room for {MOST_SOCKETS} of both together",
        )
    return files


def _file_pages(guest: GuestSpec) -> int:
    files = _files(guest)
    return -(-files.bytes // PAGE) if files else 0


def _asking(guest: GuestSpec) -> list[int]:
    """Processes that ask about files: each has its own."""
    return [n for n, each in enumerate(guest.processes) if any(isinstance(phase, FilePhase) for phase in each.phases)]


def _cached(guest: GuestSpec) -> CachedFile | None:
    """The file that processes map, as large as the largest mapping, if they do."""
    sizes = [phase.pages for process in guest.processes for phase in process.phases if isinstance(phase, MapFileSpec)]
    return CachedFile(pages=max(sizes)) if sizes else None


def _cache_pages(guest: GuestSpec) -> int:
    file = _cached(guest)
    requests = 1 + ENTRIES if guest.kernel.file_system.written else 0
    return -(-file.bytes // PAGE) + requests if file else 0


def _table_words(phase: Any) -> int:
    return lowerings[type(phase)].table_words(phase)


def _rows(phase: Any) -> int:
    return ROWS_PER_PHASE + _table_words(phase) // 1024


def recorded(guest: GuestSpec, profile: Profile, *, shadow: bool = False) -> Recording | None:
    """The lowered recording that the guest replays, if it does; kept, because lowering takes a while."""
    phases = [phase for process in guest.processes for phase in process.phases]
    files = [Path(phase.trace) for phase in phases if isinstance(phase, ReplaySpec)]
    return _lowered(guest, profile.clock_hz, shadow, tuple(file.stat().st_mtime_ns for file in files if file.exists()))


@lru_cache(maxsize=2)
def _lowered(guest: GuestSpec, clock_hz: int, shadow: bool, versions: tuple[int, ...]) -> Recording | None:
    return recording_of(guest, clock_hz, shadow)


def build_guest(
    vm: VmSpec,
    profile: Profile,
    memory: PhysicalMemory,
    *,
    seed: int,
    shuffled: bool = True,
    work_scale: float = 1.0,
    extra: int = 0,
    shadow: bool = False,
    direct: DirectTables | None = None,
    events: bool = False,
    foreign: bool = False,
    dma: DmaMachine | None = None,
    views: int = 1,
) -> Start:
    """Lay the guest of a VM into memory and return the state in which its vCPU starts.

    Programs of a `foreign` guest are encoded for another processor: to this one they are invalid opcodes, and nobody
    has set an IDT up for it.
    `extra` is how many words of the engine's extra area earlier guests use, `direct` what the hypervisor offers to a
    paravirtual kernel, `events` whether it offers clock, timer and events in a shared page, `dma` the devices that the
    guest drives, `views` how many views of its memory there are. Raises `ConfigError` where the memory does not
    suffice.
    """
    if recording := recorded(vm.guest, profile, shadow=shadow):
        return build_replay(recording, memory, memory.engine.extra + extra)
    return Builder(
        guest=vm.guest,
        profile=profile,
        memory=memory,
        seed=seed,
        scale=work_scale,
        extra=extra,
        direct=direct,
        offers_events=events,
        foreign=foreign,
        cpus=vm.vcpus,
        dma=dma,
        views=views,
        frames=Frames(size=memory.size, shuffled=shuffled, seed=seed, sizes=ROWS[vm.guest.kernel.paging].sizes),
    ).build()


def _spaces(guest: GuestSpec, profile: Profile, text_pages: tuple[int, ...] = ()) -> list[AddressSpace]:
    pages = text_pages or (1,) * len(guest.processes)
    return [
        address_space(process, guest.kernel, count, profile.features.pages_1g)
        for process, count in zip(guest.processes, pages, strict=True)
    ]


@define(kw_only=True)
class Builder:
    """One guest being laid out."""

    guest: GuestSpec
    profile: Profile
    memory: PhysicalMemory
    seed: int
    scale: float
    extra: int
    direct: DirectTables | None
    offers_events: bool
    foreign: bool = False
    cpus: int
    dma: DmaMachine | None
    views: int = 1
    frames: Frames
    _dma_layout: DmaLayout | None = field(default=None, init=False)
    _tables: Iterator[int] = field(factory=lambda: iter(()), init=False)
    _extra_used: int = field(default=0, init=False)
    _future_tables: list[int] = field(factory=list, init=False)  # frames that the kernel makes tables of

    # --- what follows from the scenario and the profile ---------------------------------------------------------
    @property
    def paging(self) -> GuestPaging:
        return ROWS[self.guest.kernel.paging]

    @property
    def places(self) -> at.Places:
        return self.paging.places

    @property
    def pcid(self) -> bool:
        chosen = self.guest.kernel.pcid
        return not (self.ring3 or self.paging.protected) and (self.profile.features.pcid if chosen is None else chosen)

    @property
    def paravirtual(self) -> bool:
        wanted = self.guest.kernel.interface
        return wanted == "paravirtual" or (wanted == "auto" and self.direct is not None)

    @property
    def ring3(self) -> bool:
        return self.direct is not None and self.direct.ring3

    @property
    def events(self) -> bool:
        """Has the kernel clock, timer and events in a shared page?"""
        return self.ring3 or (self.offers_events and self.guest.kernel.interface != "hardware")

    @property
    def kpti(self) -> bool:
        """In ring 3 the roots of processes are without the kernel as it is, and Linux turns KPTI off."""
        return self.guest.kernel.kpti and not self.ring3

    @property
    def two_roots(self) -> bool:
        """Do processes run on tables where the kernel is not, or hardly, mapped?"""
        return self.kpti or self.ring3

    @property
    def nx(self) -> bool:
        return self.profile.features.nx and self.paging.name != OF_32_BIT

    @property
    def five_levels(self) -> bool:
        return self.paging.name == FIVE

    @property
    def list_sizes(self) -> Sizes:
        """How large the lists of free pages of several CPUs are."""
        return sizes(self.frames.count, self.cpus)

    def _linear(self, gfn: int) -> int:
        return linear(gfn, self.places)

    @property
    def tick_cycles(self) -> int:
        tick = self.guest.kernel.tick
        return tick if self.events else tick * self.profile.clock_hz // NS

    @property
    def stages(self) -> Stages:
        return Stages(
            profile=self.profile, seed=self.seed, scaled=self._scaled, place_table=self._place_table,
            dma=self._dma_layout.places if self._dma_layout else {},
        )  # fmt: skip

    def _scaled(self, count: int) -> int:
        return max(1, round(count * self.scale))

    def _place_table(self, table: NDArray[np.int64], feed: Refill | None = None) -> int:
        engine = self.memory.engine
        start = engine.extra + self.extra + self._extra_used
        if self._extra_used + len(table) > engine.geometry.extra_words - self.extra:
            raise ModelError("the engine's extra area is too small", {"words": self._extra_used + len(table)})
        engine.arena[start : start + len(table)] = table
        self._extra_used += len(table)
        if feed is not None:
            engine.feeds[start] = feed
        return start

    # --- the order of things ----------------------------------------------------------------------------------------
    def build(self) -> Start:
        guest, frames, kpti = self.guest, self.frames, self.kpti
        bases = [space.by_thread for space in _spaces(guest, self.profile)]
        texts = [process_text(guest, n, bases[n], self.stages) for n in range(len(guest.processes))]
        spaces = _spaces(guest, self.profile, tuple(_pages(text) for text in texts))
        forks = [n for n, process in enumerate(guest.processes) if _forks(process.phases)]

        entry = frames.reserve(at.ENTRY_PAGES * self.cpus)
        gather = frames.reserve(at.GATHER_PAGES * self.cpus) if self.cpus > 1 else -1
        lists = [frames.reserve(list_frames(self.list_sizes)) for _ in range(self.cpus)] if self.cpus > 1 else []
        zones = frames.reserve(1)
        threads = sum(process.threads - 1 for process in guest.processes)
        log = frames.reserve(-(-(len(spaces) + len(forks) + threads) * at.LOG_BYTES // PAGE))
        calls = frames.reserve(-(-call_count(guest) * 8 // PAGE))
        structs = frames.reserve(struct_frames(frames.end)) if self.cpus > 1 else 0
        files = _files(guest)
        file_frames = {process: frames.reserve(_file_pages(guest)) for process in _asking(guest)}
        files_at = {process: self._linear(frame) for process, frame in file_frames.items()}
        file = self._cache()
        exception_page = 0
        if self.views > 1:
            exception_page = frames.reserve(2)
            self._words_of_values(exception_page)
            self._words_of_values(exception_page + 1)
        if self.dma is not None and guest.driven:
            from vtsim.guest.dma_memory import DmaBuilder  # which imports all of VT-d

            self._dma_layout = DmaBuilder(
                guest=guest,
                memory=self.memory,
                frames=frames,
                machine=self.dma,
                tick_ns=guest.kernel.tick,
                cpu_of=self._cpu_of,
            ).build()
        options = KernelOptions(
            kpti=kpti,
            pcid=self.pcid,
            tick_cycles=self.tick_cycles,
            timer=bool(self.tick_cycles) or _sleeps(guest),
            deadline=self.profile.features.tsc_deadline,
            tasks=len(spaces) + len(forks),
            call_table=self._linear(calls),
            calls=call_count(guest),
            small_zone=self._linear(zones),
            top_entries=tuple(sorted(set[int]().union(*(space.top_entries for space in spaces)))),
            paravirtual=self.paravirtual,
            ring3=self.ring3,
            events=self.events,
            batch=self.direct.batch if self.direct else 1,
            on_host=self.direct is not None and self.direct.on_host,
            direct_page=self._direct_page,
            files=min(files_at.values(), default=self._linear(0)) if len(files_at) < 2 else 0,
            first_file=files.first_file if files else 0,
            probe=bool(self.guest.kernel.probe),
            sensitive=guest.kernel.sensitive,
            tries=guest.tries_sensitive,
            cpus=self.cpus,
            alive=self._linear(zones) + ALIVE_AT,
            page_structs=self._linear(structs),
            dma=self._dma_layout.options if self._dma_layout else None,
            file=file,
            places=self.places,
            protected=self.paging.protected,
            user_entries=self.paging.user_entries,
            entry_bytes=PAGE // self.paging.format.entries,
            lengths=guest.kernel.lengths,
            views=self.views,
            exception_page=self._linear(exception_page) if exception_page else 0,
        )
        text, entry_pages = kernel_text(guest, options, spaces, self.stages)
        text_frame = frames.reserve(_pages(text))
        fill(self.memory, calls, call_table(guest, text))
        for process, frame in file_frames.items():
            assert files is not None
            fill(self.memory, frame, files.words(files_at[process], min(files_at.values()), text.labels))
        self._place(text, self.places.text, text_frame)

        root = frames.reserve(1)
        cr3 = self._address(self._named(root))
        self._map_kernel(root, text_frame, _pages(text), entry)
        shared = self._map_interface(root) if self.paravirtual or self.events else 0
        trampoline = self._map_trampoline(text_frame, entry_pages, entry) if kpti else -1
        tasks = self._tasks(spaces, forks, root, trampoline, texts, files_at)
        self._supply(spaces, forks, tasks, texts, zones)
        for cpu in range(self.cpus):
            stack = at.ENTRY_STACK + cpu_shift(cpu) if kpti else next(t.stack_top for t in tasks if t.cpu == cpu)
            write_descriptors(self.memory, text, entry + cpu * at.ENTRY_PAGES, stack, self.paging, cpu)
        write_tasks(
            self.memory,
            tasks,
            zones=zones,
            log=log,
            leave=text.labels["leave"],
            pcid=self.pcid,
            nx=self.nx,
            paging=self.paging,
            file=file.mapping if file else 0,
        )
        write_cpu_data(self.memory, entry, tasks, self._address(root), self.places, gather=gather, lists=lists)
        for first_of_cpu in lists:
            write_page_lists(self.memory, first_of_cpu, self.list_sizes)
        if self.cpus > 1:
            self.memory.store((zones << 12) + ALIVE_AT, sum(bool(t.space) and t.parent is None for t in tasks))
        idles = [task for task in tasks if not task.space]
        first = Start(
            rip=text.labels["boot"],
            rsp=idles[0].stack_top,
            rflags=2,
            cr0=CR0,
            cr3=cr3,
            cr4=self._cr4,
            efer=(0 if self.paging.protected else EFER_SYSCALL | EFER_LONG) | (EFER_NX if self.nx else 0),
            idtr_base=self.places.entry(at.IDT),
            idtr_limit=0 if self.foreign else PAGE - 1,
            gdtr_base=self.places.entry(at.GDT),
            gdtr_limit=8 * GDT_WORDS - 1,
            tr_base=self.places.entry(at.TSS),
            cpl=0,
            msrs=self._call_msrs(text.labels["syscall_entry"]),
            gs_base=self.places.entry(at.CPU_DATA),
            fs_base=0,
            roots=self._roots(root, tasks),
            log=log << 12,
            spaces=self._views(spaces, tasks),
            tables=tuple(self._future_tables),
            shared=shared << 12,
            texts=(text, *texts),
            log_lines=tuple(self._process_of(task, tasks) for task in tasks if task.space),
            process_roots=tuple(
                (number if task.parent is None else task.parent, (task.cr3, task.user_cr3)[: 1 + self.kpti])
                for number, task in enumerate(tasks)
                if task.space and task.leader is None
            ),
            dma=self._dma_layout.memory if self._dma_layout else None,
            file_queue=file.queue - self._linear(0) if file and file.queue else 0,
            protected=self.paging.protected,
            pdptes=tuple(int(word) for word in self._words(root)[:4]) if self.paging.name == OF_PAE else (),
        )
        return evolve(first, others=tuple(self._other(first, idle) for idle in idles[1:]))

    def _cache(self) -> FileOptions | None:
        """Put the file that processes map into memory: its pages, and what the kernel knows of them."""
        file = _cached(self.guest)
        if file is None:
            return None
        known = self.frames.reserve(-(-file.bytes // PAGE))
        first = self.frames.reserve(file.pages)
        fill(self.memory, known, file.words(self._linear(known)))
        options = FileOptions(mapping=self._linear(known), first=first, levels=file.levels)
        system = self.guest.kernel.file_system
        if not system.written:
            return options
        queue = self.frames.reserve(1)
        fill(self.memory, queue, queue_words())
        background, ceiling = system.pages(self.memory.size)
        return evolve(
            options,
            queue=self._linear(queue),
            bounce=self.frames.reserve(ENTRIES) if system.kind == HOST else 0,
            background=background,
            ceiling=ceiling,
        )

    def _other(self, first: Start, idle: Task) -> Start:
        """The state in which another CPU starts: the same, with tables and data of its own."""
        shift = cpu_shift(idle.cpu)
        shared = first.shared + idle.cpu * PAGE if first.shared else 0
        return evolve(
            first, shared=shared, rsp=idle.stack_top, gs_base=first.gs_base + shift, idtr_base=first.idtr_base + shift,
            gdtr_base=first.gdtr_base + shift, tr_base=first.tr_base + shift,
        )  # fmt: skip

    def _process_of(self, task: Task, tasks: list[Task]) -> int:
        """The number of the process that a task is a thread or a child of."""
        first = task.parent if task.leader is None else task.leader
        return tasks.index(task) if first is None else first

    def _roots(self, root: int, tasks: list[Task]) -> tuple[int, ...]:
        if self.direct:  # what a child's root leads to is validated when it is pinned
            pinned = [task for task in tasks if task.space and task.parent is None and task.leader is None]
            of_processes = [task.user_cr3 for task in pinned] if self.ring3 else []
            return (self._address(root), *(task.root for task in pinned), *of_processes)
        mine = [task.cr3 for task in tasks if task.space and task.leader is None]
        return (root << 12, *mine, *(at_gpa + PAGE for at_gpa in mine if self.kpti))

    def _views(self, spaces: list[AddressSpace], tasks: list[Task]) -> tuple[Space, ...]:
        return tuple(
            Space(
                name=process.name or f"process {number}",
                cr3=task.cr3 | (task.pcid if self.pcid else 0),
                user_cr3=self._user_cr3(task),
                areas=tuple((area.name, area.start, area.end) for area in space.areas),
            )
            for number, (process, space, task) in enumerate(zip(self.guest.processes, spaces, tasks, strict=False))
        )

    def _user_cr3(self, task: Task) -> int:
        if not (self.ring3 or self.kpti):
            return 0
        return task.user_cr3 | (task.pcid | USER_PCID if self.pcid else 0)

    # --- memory -----------------------------------------------------------------------------------------------------
    def _place(self, program: Program, base: int, gfn: int) -> None:
        if self.foreign:
            program = evolve(program, instructions=tuple(evolve(i, op=ops.UD) for i in program.instructions))
        self.memory.engine.place(program, lambda page: self.memory.frame(gfn + (page - base) // PAGE))

    @property
    def _cr4(self) -> int:
        bits = CR4_PGE | CR4_FX | (0 if self.paging.name == OF_32_BIT else CR4_PAE)
        bits |= CR4_PSE if self.paging.protected else 0
        return bits | (CR4_LA57 if self.five_levels else 0) | (CR4_PCIDE if self.pcid else 0)

    def _call_msrs(self, entry: int) -> dict[int, int]:
        """What system calls need: SYSCALL's registers, or in 32-bit protected mode SYSENTER's."""
        if self.paging.protected:
            stack = self.places.entry(at.ENTRY_STACK)
            return {SYSENTER_CS: at.KERNEL_CODE, SYSENTER_ESP: stack, SYSENTER_EIP: entry}
        return {
            STAR: USER_FIRST_SELECTOR << 48 | at.KERNEL_CODE << 32, LSTAR: entry, FMASK: FLAGS_CLEARED,
            KERNEL_GS_BASE: 0,
        }  # fmt: skip

    def _words(self, gfn: int) -> NDArray[Any]:
        """The entries of a table in a guest frame."""
        words = self.memory.contents(gfn, mem.TABLE)
        return words.view(np.uint32) if self.paging.name == OF_32_BIT else words

    def _address(self, gfn: int) -> int:
        """The address that an entry or CR3 has for a guest frame."""
        return int(self._named_in_entries(np.array([gfn]))[0]) << 12

    def _named_in_entries(self, gfns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Guest frames as entries name them: host frames where tables are direct."""
        return gfns if self.direct is None else self.direct.machine(gfns)

    def _table(self, root: int, take: Callable[[], int]) -> Table:
        """A table of the guest with its root in a guest frame."""
        if self.direct is None:
            return Table(root=root, format=self.paging.format, take=take, words=self._words, levels=self.paging.levels)
        engine = self.memory.engine
        return Table(
            root=self._address(root) >> 12, format=PAGING, take=lambda: self._address(take()) >> 12,
            words=lambda hfn: engine.contents(hfn, mem.TABLE),
        )  # fmt: skip

    def _map_run(self, table: Table, address: int, first: int, count: int, flags: int, largest: int = 0) -> None:
        """Map consecutive guest frames in the largest pages that fit; direct tables have 4 KiB pages only."""
        if self.direct is None:
            table.map_range(address, first, count, flags, largest)
        else:
            table.map(address, self.direct.machine(np.arange(first, first + count)), flags)

    def _kernel_table(self, root: int) -> Table:
        return self._table(root, lambda: self.frames.reserve(1))

    @property
    def _direct_page(self) -> int:
        nx = e.PTE_NO_EXECUTE if self.nx else 0
        return KERNEL_PAGE | nx | (0 if self.kpti else e.PTE_GLOBAL)

    def _map_interface(self, root: int) -> int:
        """Map what only a paravirtual kernel has: translations of frame numbers, and a shared page for each CPU.

        Returns the first one's frame; the others follow it.
        """
        table = self._kernel_table(root)
        nx = e.PTE_NO_EXECUTE if self.nx else 0
        shared = self.frames.reserve(self.cpus)
        for cpu in range(self.cpus):
            self._map_run(table, at.SHARED + cpu_shift(cpu), shared + cpu, 1, KERNEL_PAGE | nx)
            self._words_of_values(shared + cpu)
        if self.direct is None:  # the kernel will find that out
            return shared
        gfns = np.arange(self.frames.end)
        known = (gfns < mem.HOLE_FIRST) | (gfns > mem.HOLE_LAST)
        machine = np.zeros(len(gfns), np.int64)
        machine[known] = self.direct.machine(gfns[known]) << 12
        first = self.frames.reserve(-(-len(gfns) // mem.PAGE_WORDS))
        fill(self.memory, first, machine)
        self._map_run(table, at.P2M, first, -(-len(gfns) // mem.PAGE_WORDS), KERNEL_PAGE | nx)
        read_only = KERNEL_PAGE & ~(e.PTE_WRITE | e.PTE_DIRTY) | nx
        table.map(at.M2P, self.direct.machine_to_physical, read_only)
        return shared

    def _words_of_values(self, gfn: int) -> None:
        self.memory.contents(gfn, mem.VALUES)

    def _map_kernel(self, root: int, text: int, text_pages: int, entry: int) -> None:
        """Map all memory and the devices' hole, the kernel's text and the entry area."""
        nx = e.PTE_NO_EXECUTE if self.nx else 0
        kept = 0 if self.kpti else e.PTE_GLOBAL
        table = self._kernel_table(root)
        self._map_memory(table)
        places = self.places
        self._map_run(table, places.text, text, text_pages, (KERNEL_PAGE & ~e.PTE_WRITE & ~e.PTE_DIRTY) | kept)
        self._map_run(table, places.entry_area, entry, at.ENTRY_PAGES * self.cpus, KERNEL_PAGE | nx | kept)
        for phase in (phase for process in self.guest.processes for phase in process.phases):
            device = getattr(phase, "address", 0) >> 12
            if device and table.find(places.direct + (device << 12)) is None:
                table.map_range(places.direct + (device << 12), device, 1, KERNEL_PAGE | nx)

    def _map_memory(self, table: Table) -> None:
        """Map all memory, and with it what lies below 4 GiB unless tables are direct.

        In the largest pages that fit, but below 2 MiB and where the local APIC is in those of 4 KiB, so that no large
        page holds what a hypervisor has in small ones.
        Source: Linux 6.1, init_mem_mapping and split_mem_range in arch/x86/mm/init.c; the APIC has a fixed mapping.
        """
        end = self.frames.end
        if self.direct is not None:
            for first, last in ((0, min(end, mem.HOLE_FIRST)), (mem.HOLE_LAST + 1, end)):
                if first < last:
                    self._map_run(table, at.DIRECT + (first << 12), first, last - first, self._direct_page)
            return
        if self.paging.protected:  # no device's registers
            count = -(-end // self.paging.format.entries) * self.paging.format.entries
            table.map_range(self.places.direct, 0, count, self._direct_page, SIZE_2M)
            return
        largest = SIZE_1G if self.profile.features.pages_1g else SIZE_2M
        low, apic = min(end, mem.HOLE_FIRST), mem.LOCAL_APIC
        for first, last, size in (
            (0, min(mem.BLOCK, low), SIZE_4K), (mem.BLOCK, low, largest),
            (low, apic, SIZE_2M), (apic, apic + mem.BLOCK, SIZE_4K), (apic + mem.BLOCK, mem.HOLE_LAST + 1, SIZE_2M),
            (mem.HOLE_LAST + 1, end, largest),
        ):  # fmt: skip
            if first < last:
                table.map_range(at.DIRECT + (first << 12), first, last - first, self._direct_page, size)

    def _map_trampoline(self, text: int, pages: int, entry: int) -> int:
        """Map what user page tables hold of the kernel under KPTI."""
        nx = e.PTE_NO_EXECUTE if self.nx else 0
        root = self.frames.reserve(1)
        table = self._kernel_table(root)
        table.map_range(at.TEXT, text, pages, KERNEL_PAGE & ~e.PTE_WRITE & ~e.PTE_DIRTY)
        table.map_range(at.ENTRY_AREA, entry, at.ENTRY_PAGES * self.cpus, KERNEL_PAGE | nx)
        return root

    # --- tasks --------------------------------------------------------------------------------------------------------
    def _tasks(
        self,
        spaces: list[AddressSpace],
        forks: list[int],
        root: int,
        trampoline: int,
        texts: list[Program],
        files: Mapping[int, int],
    ) -> list[Task]:
        """The processes, the children that fork makes, further threads, and last the idle tasks."""
        tasks = []
        half = self.paging.user_entries
        parents = [None] * len(spaces) + forks
        processes = [*range(len(spaces)), *forks]
        for number, space in enumerate(spaces[n] for n in processes):
            top = self.frames.reserve(1) if self.paging.protected else self._pair()
            self._words(top)[half:] = self._words(root)[half:]
            if trampoline >= 0:
                self._words(top + 1)[half:] = self._words(trampoline)[half:]
            elif self.ring3:
                self._words(top + 1)
            cr3 = self._address(self._named(top, pair=True))
            tasks.append(
                Task(
                    at=self.frames.reserve(1) << 12,
                    stack_top=self._stack(),
                    root=self._address(top),
                    table=top,
                    cr3=cr3,
                    user_cr3=self._address(top + 1) if self.ring3 else cr3 + PAGE,
                    pcid=number + 1,
                    space=space,
                    areas=self.frames.reserve(-(-len(space.areas) * at.AREA_BYTES // PAGE)),
                    parent=parents[number],
                    cpu=self._cpu_of(processes[number]),
                    files=files.get(processes[number], 0),
                )
            )
        for number, process in enumerate(self.guest.processes):
            for thread in range(1, process.threads):
                tasks.append(
                    evolve(
                        tasks[number],
                        at=self.frames.reserve(1) << 12,
                        stack_top=self._stack(),
                        leader=number,
                        thread=thread,
                        cpu=self._cpu_of(number, thread),
                        rip=texts[number].labels[f"thread_{thread}"],
                    )
                )
        return [
            *tasks,
            *(Task(at=self.frames.reserve(1) << 12, stack_top=self._stack(), cpu=cpu) for cpu in range(self.cpus)),
        ]

    def _cpu_of(self, process: int | None, thread: int = 0) -> int:
        """The CPU of a process's thread: where the scenario puts it, or in turn."""
        assert process is not None
        first = self.guest.processes[process].vcpu
        return ((process if first is None else first) + thread) % self.cpus

    def _pair(self) -> int:
        """Two frames whose numbers differ in the last bit, as the kernel's root and the user's do under KPTI."""
        first = self.frames.reserve(2)
        return self.frames.reserve(1) - 1 if first & 1 else first

    def _named(self, root: int, *, pair: bool = False) -> int:
        """The frame that CR3 names: the root, or with five levels a table that leads to it from both ends."""
        if not self.five_levels:
            return root
        top = self._pair() if pair else self.frames.reserve(1)
        for frame, below in ((top, root), (top + 1, root + 1))[: 1 + pair]:
            self._words(frame)[[0, mem.PAGE_WORDS - 1]] = below << 12 | PAGING.interior
        return top

    def _stack(self) -> int:
        first = self.frames.reserve(at.KERNEL_STACK_PAGES)
        return self._linear(first + at.KERNEL_STACK_PAGES)

    def _supply(
        self, spaces: list[AddressSpace], forks: list[int], tasks: list[Task], texts: list[Program], zones: int
    ) -> None:
        """Give every process its text, the pages that are mapped beforehand, and the zones the pages for faults."""
        frames = self.frames
        copies = sum(_copies(self.guest.processes[n].phases) + CHILD_PAGES for n in forks)
        kinds = range(len(self.paging.sizes))
        built = [sum(space.pages(size, prebuilt=True) for space in spaces) for size in kinds]
        free = [sum(space.pages(size, prebuilt=False) for space in spaces) for size in kinds]
        free[0] += copies
        more = sum(
            process.threads - 1 for process in self.guest.processes
        )  # who faults on one page at once takes one, too
        free = [count + more if count else 0 for count in free]
        if self.cpus > 1:  # what may lie in the others' lists: as much as Linux keeps free
            free[0] += self.list_sizes.low_watermark
        tables = sum(space.tables(prebuilt=True) + len(space.top_entries) for space in spaces)
        text_frames = [frames.reserve(_pages(text)) for text in texts]
        lists = [frames.reserve(-(-max(count, 1) // mem.PAGE_WORDS)) for count in free]
        for_faults = sum(space.tables(prebuilt=False) for space in spaces) + 1
        first = frames.reserve(for_faults)
        self._future_tables += range(first, first + for_faults)
        self.memory.store((zones << 12) + TABLES_AT, first)
        self.memory.store((zones << 12) + TABLES_AT + 8, first + for_faults)
        for n in range(len(spaces), len(spaces) + len(forks)):
            self._child_tables(tasks[n], spaces[tasks[n].parent or 0])
        pages: dict[int, Supply] = {}
        for size in reversed(kinds):
            pages[size] = frames.take(built[size] + free[size] + (tables if size == 0 else 0), size)
            zone = (zones << 12) + size * ZONE_BYTES
            for start in range(0, free[size], SPAN):
                part = pages[size].draw(min(SPAN, free[size] - start))
                fill(self.memory, lists[size] + start // mem.PAGE_WORDS, part << 12)
            self.memory.store(zone + at.Z_BOTTOM, self._linear(lists[size]))
            self.memory.store(zone + at.Z_TOP, self._linear(lists[size]) + 8 * free[size])
        self._tables = iter(pages[0].draw(tables).tolist())
        for task, space, text, gfn in zip(tasks, spaces, texts, text_frames, strict=False):
            self._place(text, at.USER_TEXT, gfn)
            self._map_process(task, space, gfn, pages)

    def _child_tables(self, task: Task, space: AddressSpace) -> None:
        if self.paging.name == OF_PAE:  # page directories are there from the start, as Linux prepares them
            for index in space.top_entries:
                self._words(task.table)[index] = self.frames.reserve(1) << 12 | e.PTE_PRESENT
        count = space.tables(prebuilt=False) + space.tables(prebuilt=True) + 1
        first = self.frames.reserve(count)
        self._future_tables += range(first, first + count)
        for word, value in (
            (at.T_TABLES_FIRST, first), (at.T_TABLES_NEXT, first), (at.T_TABLES_END, first + count),
        ):  # fmt: skip
            self.memory.store(task.at + word, value)

    def _map_process(self, task: Task, space: AddressSpace, text: int, pages: dict[int, Supply]) -> None:
        """Map what is mapped beforehand. Both roots of KPTI lead to the same tables, which exist from the start."""
        top = task.table
        table = self._table(top, self._tables.__next__)
        for area in space.areas:
            flags = area.leaf(self.nx)
            if area.text:
                self._map_run(table, area.start, text, area.pages, flags)
            elif area.prebuilt:
                for address, together in area.runs(SPAN):
                    frames = self._named_in_entries(pages[area.size].draw(together))
                    table.map(address, frames, flags, area.size)
        for index in sorted(space.top_entries):
            words = self._words(top)
            if not words[index]:
                words[index] = self._address(next(self._tables)) | self.paging.format.above
            if self.two_roots:
                self._words(top + 1)[index] = words[index]


def _pages(program: Program) -> int:
    return -(-(program.end - program.base) // PAGE)


def _forks(phases: tuple[Any, ...]) -> bool:
    return any(isinstance(phase, ForkSpec) for phase in phases)


def _copies(phases: tuple[Any, ...]) -> int:
    return max((phase.copied for phase in phases if isinstance(phase, ForkSpec)), default=0)


def _sleeps(guest: GuestSpec) -> bool:
    return any(isinstance(phase, IdleSpec | BalloonSpec) for process in guest.processes for phase in process.phases)
