"""The guest's kernel: one program, made of paths, each a file of this package and a registration.

A path writes its part of the kernel's text. What user page tables must also map comes first (`entry`). Interrupts
are off wherever a path touches what another path touches, so a task may be preempted wherever they are on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Final

from attrs import frozen

from vtsim.base.registry import Registry, import_all
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.dma_layout import DmaOptions
from vtsim.guest.kernel.page_cache import FileOptions


@frozen(kw_only=True)
class KernelOptions:
    """What the kernel's text depends on, beside the primitives' own loops."""

    kpti: bool
    pcid: bool
    tick_cycles: int  # 0: no tick; in ring 3 ns
    timer: bool  # is the APIC timer used at all?
    deadline: bool  # IA32_TSC_DEADLINE, or else the one-shot counter
    tasks: int  # in the scheduler's ring
    call_table: int  # linear address of the system-call table
    calls: int
    small_zone: int  # linear address of the zone of 4 KiB frames
    top_entries: tuple[int, ...]  # top-level entries of user address spaces that are in use
    paravirtual: bool = False  # are tables updated by hypercalls?
    ring3: bool = False  # does the kernel run in ring 3, with hypercalls in place of all that is privileged?
    on_host: bool = False  # is it a process of a host, which maps page by page and masks by calls?
    events: bool = False  # are clock, timer and interrupts those of the shared page?
    batch: int = 1  # how many requests one hypercall makes at most
    probe: bool = False  # does it look for hardware at boot?
    sensitive: tuple[str, ...] = ()  # sensitive instructions that it executes at boot
    tries: bool = False  # does it ever execute such a list?
    direct_page: int = 0  # flags of the kernel's mapping of an ordinary frame
    files: int = 0  # linear address of those of the only process that has any, 0: each task says where
    first_file: int = 0  # descriptor of the first ordinary file, 0 without files
    cpus: int = 1
    alive: int = 0  # with several: linear address of how many tasks have not ended
    page_structs: int = 0  # with several: linear address of what is known of each frame, from frame 0 on
    dma: DmaOptions | None = None  # where the guest drives devices
    file: FileOptions | None = None  # that processes map
    places: at.Places = at.LONG
    protected: bool = False  # does it run in 32-bit protected mode?
    user_entries: int = 256  # of a root
    entry_bytes: int = 8  # of an entry of its tables
    lengths: str = "linux-6.1"  # the kernel whose lengths its paths have
    views: int = 1  # of its memory, between which it may switch
    exception_page: int = 0  # with several: linear address of the virtualization-exception information area

    def word(self, word: int, base: int = s.RSP, more: int = 0) -> Mem:
        """A word of the frame on the kernel stack that the CPU or the way in has stored, from F_VECTOR on."""
        if not self.protected:
            return Mem(base, more + word)
        return Mem(base, more + self.frame_bytes - (at.FRAME_BYTES - word) // 2, size=4)

    @property
    def frame_bytes(self) -> int:
        """How large that frame is."""
        return at.PROTECTED_FRAME_BYTES if self.protected else at.FRAME_BYTES

    @property
    def frame_parts(self) -> tuple[int, int]:
        """Where the two parts begin in which eleven registers carry a frame."""
        return 0, self.frame_bytes - 8 * len(at.CARRIERS)

    @property
    def table_reach(self) -> int:
        """Bytes that a last-level table maps."""
        return at.PAGE * (at.PAGE // self.entry_bytes)

    @property
    def entry(self) -> Mem:
        """An entry of a page table at RCX."""
        return Mem(s.RCX, size=self.entry_bytes)

    @property
    def several(self) -> bool:
        """Does it run on several CPUs?"""
        return self.cpus > 1

    @property
    def files_locked(self) -> bool:
        """May threads open files beside each other?"""
        return self.several and self.first_file > 0


@frozen(kw_only=True)
class KernelPath:
    """A part of the kernel's text; `entry` parts are mapped in user page tables too."""

    emit: Callable[[Assembler, KernelOptions], None]
    entry: bool

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        return self.emit.__doc__ or ""


kernel_paths: Final[Registry[str, KernelPath]] = Registry("guest kernel path")
Emit = Callable[[Assembler, KernelOptions], None]


def path(name: str, *, entry: bool = False) -> Callable[[Emit], Emit]:
    """Register a part of the kernel's text under a name."""

    def add(emit: Emit) -> Emit:
        kernel_paths.register(name)(KernelPath(emit=emit, entry=entry))
        return emit

    return add


# The kernel's text is laid out in the order in which paths are registered: the same, whoever imports one of them first.
import_module(f"{__name__}.files")
import_all(sys.modules[__name__])
