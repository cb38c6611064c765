"""Compiled kernels: the only door to numba.

numba reuses old machine code when a callee in another file was edited, so the cache directory is keyed by the
sources; and it fails at import when it finds no writable place, so the directory is chosen here, first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

Record = npt.NDArray[np.int64]  # the machine record of one logical CPU
Records = npt.NDArray[np.int64]  # the records of all logical CPUs, a row each
Arena = npt.NDArray[np.int64]
Tags = npt.NDArray[np.int32]
F = TypeVar("F", bound=Callable[..., Any])

SOURCES = Path(__file__).resolve().parents[1]
WITHOUT_KERNELS = ("cli", "config", "study")  # editing these costs nobody a compilation; a test keeps it true
SOME_KERNELS = (
    "guest",
    "vmm",
    "platform",
)  # files with kernels count, and take constants from below or from themselves
CODE_OPTIONS = ("NUMBA_BOUNDSCHECK", "NUMBA_OPT", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_DEBUGINFO")
KEPT_KEYS, KEPT_SECONDS = 8, 3600  # a running process may still be using a directory younger than this

DISABLED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


def source_key() -> str:
    """Hash everything that machine code depends on and numba does not notice."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*.py")):
        relative = path.relative_to(SOURCES)
        package = relative.parts[0].removesuffix(".py")
        text = path.read_bytes()
        if package in WITHOUT_KERNELS or (package in SOME_KERNELS and b"@kernel" not in text):
            continue
        digest.update(f"{relative.as_posix()}\0".encode())
        digest.update(text)
    versions = [f"{package} {version(package)}" for package in ("numba", "llvmlite", "numpy")]
    options = [f"{name}={os.environ.get(name, '')}" for name in CODE_OPTIONS]
    machine = [platform.python_version(), platform.machine(), _host_cpu_name()]
    digest.update("\0".join([*versions, *options, *machine]).encode())
    return digest.hexdigest()[:20]


def _host_cpu_name() -> str:
    from llvmlite import binding

    return str(binding.get_host_cpu_name())


def cache_root() -> Path:
    """Return the first writable of $VTSIM_CACHE, the user's cache directory, a private temporary one."""
    candidates = []
    if chosen := os.environ.get("VTSIM_CACHE"):
        candidates.append(Path(chosen))
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        candidates.append(Path(xdg) / "vtsim")
    with contextlib.suppress(RuntimeError):  # no home directory at all
        candidates.append(Path.home() / ".cache" / "vtsim")
    candidates.append(Path(tempfile.gettempdir()) / f"vtsim-{os.getuid()}")
    for candidate in candidates:
        if _is_ours_to_write(candidate):
            return candidate.resolve()
    return Path(tempfile.mkdtemp(prefix="vtsim-"))


def _is_ours_to_write(directory: Path) -> bool:
    """Machine code is loaded from here: nobody else may have put it there."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        with tempfile.TemporaryFile(dir=directory):
            return status.st_uid == os.getuid() and not status.st_mode & stat.S_IWOTH
    except OSError:
        return False


def prune(root: Path, keep: Path) -> None:
    """Remove the cache directories of old sources."""
    others = [entry for entry in root.glob("kernels-*") if entry != keep]
    ages: dict[Path, float] = {}
    for entry in others:
        with contextlib.suppress(OSError):
            ages[entry] = time.time() - entry.stat().st_mtime
    for entry in sorted(ages, key=ages.__getitem__)[KEPT_KEYS - 1 :]:
        if ages[entry] > KEPT_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)


def _open_cache() -> Path:
    root = cache_root()
    directory = root / f"kernels-{source_key()}"
    directory.mkdir(exist_ok=True)
    os.utime(directory)
    prune(root, directory)
    return directory


if not DISABLED:
    CACHE = _open_cache()
    os.environ["NUMBA_CACHE_DIR"] = str(CACHE)
    import numba

    from vtsim.base import parts

    numba.config.CACHE_DIR = str(CACHE)  # type: ignore[attr-defined]  # numba may have been imported before us
    TUPLE: Any = numba.types.UniTuple
    NUMBA_TYPES = {
        "Record": numba.int64[::1],
        "Records": numba.int64[:, ::1],
        "Arena": numba.int64[::1],
        "Tags": numba.int32[::1],
        "int": numba.int64,
        "bool": numba.boolean,
        "tuple[int, int, int, int]": TUPLE(numba.int64, 4),
    }


# parts of others: compiling them apart would be wasted
PARTS = ("vtsim.cpu.kernels.", "vtsim.vmcs.kernels.", "vtsim.iommu.kernels.")
ENTRIES = ("run_all", "set_context", "vm_exit")  # of them, what Python calls during a run

OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "_nrt": False, "no_rewrites": True}


def kernel(function: F) -> F:
    """Compile a function for the types it is annotated with; with NUMBA_DISABLE_JIT=1 it stays Python.

    One signature for a kernel: callers that pass a bool or a 32-bit element are converted, not compiled for apart.
    Annotations are `Record`, `Records`, `Arena`, `Tags`, `int`, `bool`; anything else is left to numba.
    """
    if DISABLED:
        return function
    if not parts.available or not function.__module__.startswith(PARTS) or function.__name__ in ENTRIES:
        return _entry_of(function)
    part: Any = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)  # type: ignore[call-overload]
    parts.make_part(part, _entry_of)
    return _with_one_signature(part, function)


def _entry_of(function: F) -> F:
    """The compiled function, as a program that Python can call and the disk cache holds."""
    return _with_one_signature(numba.njit(cache=True, **OPTIONS)(function), function)


def _with_one_signature(compiled: Any, function: F) -> F:
    names = list(compiled.py_func.__annotations__.items())
    annotated = tuple(NUMBA_TYPES.get(annotation) for name, annotation in names if name != "return")
    fixed = len(annotated) == compiled.py_func.__code__.co_argcount and all(each is not None for each in annotated)
    compile_for = compiled.compile

    def compile_ours(found: Any) -> Any:
        if not isinstance(compiled, parts.Part) and not kernels_are_cached(compiled):
            from vtsim.base import together  # no other run needs it

            together.compile_kernels_of(compiled)
        with parts.ours():
            return compile_for(annotated if fixed else found)

    compiled.compile = compile_ours
    result: F = compiled
    return result


def _prefetch(array: Arena | Tags, index: int) -> None:
    """Tell the host's memory that an element will be wanted: nothing to do while interpreted."""


def _lowest_bit(value: int) -> int:
    """The number of the lowest bit that is set; the value must not be zero."""
    return (int(value) & -int(value)).bit_length() - 1


def _which_of(lanes: int) -> Callable[[Arena | Tags, int, int], int]:
    def which(array: Arena | Tags, first: int, value: int) -> int:
        """Which of so many elements, all of which must exist, are equal to a value: a bit for each."""
        return sum(1 << n for n in range(lanes) if array[first + n] == value)

    return which


def _copy(words: int) -> Callable[[Arena | Record, int, Arena | Record, int], None]:
    def copy(to: Arena | Record, first: int, source: Arena | Record, start: int) -> None:
        """Copy so many words, all of which must exist, from one array to another one."""
        to[first : first + words] = source[start : start + words]

    return copy


# instructions of the host that kernels ask for by name, as plain Python
PLAIN: Final[dict[str, Callable[..., Any]]] = {
    "prefetch": _prefetch,
    "lowest_bit": _lowest_bit,
    "which_of_4": _which_of(4),
    "which_of_8": _which_of(8),
    "which_of_16": _which_of(16),
    "copy_8": _copy(8),
    "copy_16": _copy(16),
    "copy_18": _copy(18),
    "copy_20": _copy(20),
}


def _instruction(name: str) -> Any:
    return PLAIN[name] if DISABLED else getattr(parts, name)


prefetch = _instruction("prefetch")
lowest_bit = _instruction("lowest_bit")
which_of_4 = _instruction("which_of_4")
which_of_8 = _instruction("which_of_8")
which_of_16 = _instruction("which_of_16")
copy_8 = _instruction("copy_8")
copy_16 = _instruction("copy_16")
copy_18 = _instruction("copy_18")
copy_20 = _instruction("copy_20")


def kernels_are_cached(*kernels: Callable[..., Any]) -> bool:
    """Will these kernels start without compiling? Without arguments: was anything compiled before?"""
    if DISABLED:
        return True
    if not kernels:
        return next(CACHE.rglob("*.nbi"), None) is not None
    return all(each._cache._cache_file._load_index() for each in kernels)  # type: ignore[attr-defined]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence numpy while kernels run as plain Python: 64-bit wrapping is intended."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        yield
