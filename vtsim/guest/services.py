"""What lmbench's lat_* programs ask of the kernel, where the other primitives do not serve: files, signals, processes.

Source: lmbench 2 (L. McVoy and C. Staelin), src/lat_syscall.c, lat_select.c, lat_sig.c, lat_proc.c, remembered.
"""

from __future__ import annotations

from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.base.spec import Boolean, counts, setting
from vtsim.guest.spec import ForkSpec, Phase, primitives, repeated

COMPONENTS = 4  # of /usr/include/sys/types.h
MOST_COMPONENTS, MOST_SOCKETS = 16, 224  # that the kernel's first page of files has room for


@frozen(kw_only=True)
class FilePhase(Phase):
    """One that needs files to be there."""

    iterations: int = repeated(1000)

    @property
    def path_components(self) -> int:
        return int(getattr(self, "components", 0))

    @property
    def open_sockets(self) -> int:
        return 0 if self.open_files else int(getattr(self, "sockets", 0))

    @property
    def open_files(self) -> int:
        return int(getattr(self, "sockets", 0)) if getattr(self, "ordinary", False) else 0


def components() -> int:
    """Declare how long a path is."""
    value: int = setting(counts(ge=1, le=MOST_COMPONENTS), "Names in the path", default=COMPONENTS)
    return value


@primitives.register("null_io")
@frozen(kw_only=True)
class NullIoSpec(FilePhase):
    """A byte read of /dev/zero and a byte written to /dev/null, in a loop."""


@primitives.register("stat")
@frozen(kw_only=True)
class StatSpec(FilePhase):
    """System calls that look a path up and report what is known of the file."""

    components: int = components()


@primitives.register("open_close")
@frozen(kw_only=True)
class OpenCloseSpec(FilePhase):
    """A file opened by its path, and closed, in a loop."""

    components: int = components()


@primitives.register("select")
@frozen(kw_only=True)
class SelectSpec(FilePhase):
    """System calls that ask whether any of many sockets is ready, or any of many files."""

    sockets: int = setting(counts(ge=1, le=MOST_SOCKETS), "TCP sockets that are asked about", default=100)
    ordinary: bool = setting(Boolean(), "They are ordinary files instead, which have nothing to poll", default=False)


@primitives.register("signal_install")
@frozen(kw_only=True)
class SignalInstallSpec(Phase):
    """System calls that install a handler of a signal."""

    iterations: int = repeated(1000)


@primitives.register("signal_handle")
@frozen(kw_only=True)
class SignalHandleSpec(Phase):
    """Signals that the process sends itself, whose handler counts and returns."""

    iterations: int = repeated(1000)
    null: bool = setting(Boolean(), "Send signal 0, which is none: the kernel only looks whether it may", default=False)


@primitives.register("protection_fault")
@frozen(kw_only=True)
class ProtectionFaultSpec(Phase):
    """Writes to a page that is read-only, whose signal a handler counts."""

    iterations: int = repeated(1000)


@primitives.register("process")
@frozen(kw_only=True)
class LifeSpec(ForkSpec):
    """A process is created, may become other programs, and ends, while its parent waits."""

    pages: int = setting(counts(ge=1, le=2**24), "Pages of 4 KiB that the parent has", default=64)
    written: int = setting(counts(ge=0, le=2**24), "Of them, pages that the child writes, each a copy", default=4)
    images: int = setting(counts(ge=0, le=8), "Programs that the child becomes, one after the other", default=0)
    fresh: int = setting(counts(ge=0, le=2**24), "Pages of 4 KiB that each program writes, each a fault", default=32)
    work: int = setting(counts(le=2**30), "Instructions that each program executes beside them", default=0)

    def __attrs_post_init__(self) -> None:
        if self.written > self.pages:
            raise ConfigError(
                f"a child cannot write {self.written} pages of a parent that has {self.pages}",
                field="written",
                help=f"written can be at most {self.pages}",
            )

    @property
    def copied(self) -> int:
        return max(self.written, self.fresh)
