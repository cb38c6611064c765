"""What applications do: each primitive is a file's function that writes its loop, registered for its spec class.

A loop is the operation, the registers that it needs anew each time, and the count. Instructions that need ring 0
run there, as in kvm-unit-tests: the process makes a system call whose handler is the loop, in the kernel's text, with
interrupts on and the cycles charged to the application.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from attrs import field, frozen

from vtsim.base.registry import Registry
from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.profile import Profile
from vtsim.guest.kernel import layout

SHARED, OWN, TRACED, FILE = "shared", "own", "traced", "file"


@frozen(kw_only=True)
class DmaPlace:
    """Linear addresses of what a kernel has for a device: its page of words, slots of the buffers of a phase.

    `on_request`: are pages of buffers mapped when the device asks for them?
    """

    port: int
    slots: int
    on_request: bool = False


@frozen(kw_only=True)
class Stage:
    """What the writer of a loop knows about the place where it stands.

    `name` is unique in the program, for labels; `base` is where the phase's memory begins; `place_table` stores
    integers for streams to read and gives their arena index; what fills a window again comes with it. `dma` is
    there for phases that drive a device, `paravirtual` says that the kernel requests what others change in tables,
    `ring3` that it runs in ring 3. `direct` is where the kernel maps all memory, `entry_bytes` the size of an entry
    of its tables. `views` of memory are what the kernel switches between, `exception_page` is where it is told of a
    virtualization exception.
    """

    name: str
    base: int
    profile: Profile
    seed: int
    scaled: Callable[[int], int]
    place_table: Callable[..., int] = field(repr=False)
    dma: DmaPlace | None = None
    paravirtual: bool = False
    ring3: bool = False
    direct: int = layout.DIRECT
    entry_bytes: int = 8
    views: int = 1
    exception_page: int = 0

    def label(self, suffix: str) -> str:
        """A label of this phase."""
        return f"{self.name}_{suffix}"


Emit = Callable[[Assembler, Any, Stage], None]


@frozen(kw_only=True)
class Primitive:
    """How a primitive is lowered: the writer of its loop, the ring it runs in, and the memory that it wants.

    `memory` is `shared`: the process's common region, or where the user placed it; `own`: a region of this phase
    alone, of 4 KiB pages that are always mapped on demand; `file`: addresses of this phase alone where the file is
    mapped; `traced`: what `ranges` says. `before` is what the process does before it calls a loop in ring 0.
    """

    emit: Emit
    ring: int = 3
    memory: str = SHARED
    region: Callable[[Any], int] = lambda phase: int(phase.region_bytes)
    ranges: Callable[[Any], Sequence[tuple[int, int]]] = lambda phase: ()
    table_words: Callable[[Any], int] = lambda phase: 0
    before: Emit = lambda a, phase, at: None

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        return self.emit.__doc__ or ""


lowerings: Final[Registry[type[Any], Primitive]] = Registry("primitive's program")


def lowering(spec: type[Any], **how: Any) -> Callable[[Emit], Emit]:
    """Register the writer of a primitive's loop."""

    def add(emit: Emit) -> Emit:
        lowerings.register(spec)(Primitive(emit=emit, **how))
        return emit

    return add


def counted(a: Assembler, at: Stage, times: int) -> str:
    """Begin a loop whose body leaves RCX alone; end it with `a.loop(label)`."""
    a.mov(s.RCX, times)
    return a.label(at.label("loop"))


def counted_in_r12(a: Assembler, at: Stage, times: int) -> str:
    """Begin a loop whose body needs RCX; end it with `again`."""
    a.mov(s.R12, times)
    return a.label(at.label("loop"))


def again(a: Assembler, label: str) -> None:
    """Count in R12 and go round."""
    a.sub(s.R12, 1)
    a.jcc(ops.CC_NZ, label)


def enter_kernel(a: Assembler) -> None:
    """SYSCALL, or in 32-bit protected mode SYSENTER.

    The kernel is told the stack in RCX and where to return in R11, so that nothing is written to the stack. RCX, RDX
    (which SYSEXIT takes) and R11 are lost.

    Not modelled: the stub of Linux around SYSENTER, which saves registers on the user's stack.
    """
    if a.bits == 64:
        a.op(ops.SYSCALL)
        return
    after = f"after_{a.here:x}"
    a.copy(s.RCX, s.RSP)
    a.mov(s.R11, after)
    a.op(ops.SYSENTER)
    a.label(after)


def registers(a: Assembler, values: Mapping[int, int]) -> None:
    """Give registers their values."""
    for register, value in values.items():
        a.mov(register, value)
