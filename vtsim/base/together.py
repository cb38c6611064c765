"""Parts of an entry compiled by several processes, each part by one of them, before the entry is linked from them.

Three quarters of a first run are numba's front end, which is Python and keeps one processor busy. A process that
compiles a caller needs of a callee what the caller sees, its types and its symbol; only the one that links needs the
code. What a process could not compile is left to numba, which goes on as ever. Decision 0001 has the measurements.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from contextlib import ExitStack, suppress
from graphlib import TopologicalSorter
from heapq import heappop, heappush
from importlib import import_module
from multiprocessing.connection import Connection, Pipe, wait
from types import ModuleType
from typing import Any, Final, cast

from attrs import define, field, frozen
from llvmlite import binding
from numba.core import compiler
from numba.core.environment import Environment
from numba.core.registry import CPUDispatcher

from vtsim.base import parts

Name = tuple[str, str]  # of a kernel: its module and its own
Calls = dict[Name, list[Name]]

ENOUGH: Final = 30  # parts that are worth a process of their own, which takes a second to start
MOST_PROCESSES: Final = 8  # the longest chain of callers is an eighth of all code
SERVE: Final = "import sys; from vtsim.base.together import serve; serve(int(sys.argv[1]))"

_others: dict[tuple[str, bytes], Any] = {}  # numba's libraries that parts need, by name and bitcode


@frozen
class Code:
    """What an entry links of a part: LLVM's bitcode, the parts that it calls, and what numba itself put beside it."""

    bitcode: bytes
    calls: tuple[Name, ...]
    others: tuple[tuple[str, bytes], ...]


def compile_kernels_of(entry: Any) -> None:
    """Compile what `entry` calls on all processors; nothing where little is missing, or there is one processor."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    calls = calls_below(entry)
    missing = sum(not _kernel(name).overloads for name in calls)
    if min(processors, missing // ENOUGH) > 1 and sys.executable:
        with suppress(OSError, EOFError), ExitStack() as stack:
            _compile(calls, [stack.enter_context(_Worker()) for _ in range(min(processors, MOST_PROCESSES))])


def calls_below(entry: Any) -> Calls:
    """The kernels that an entry reaches, each with the kernels that it names."""
    found: Calls = {}
    left = _named_by(entry)
    while left:
        kernel = left.pop()
        if _name_of(kernel) not in found:
            named = _named_by(kernel)
            found[_name_of(kernel)] = [_name_of(each) for each in named]
            left += named
    return found


def _named_by(kernel: Any) -> list[Any]:
    names, space = kernel.py_func.__code__.co_names, kernel.py_func.__globals__
    held = [space[name] for name in names if name in space]
    for module in [each for each in held if isinstance(each, ModuleType)]:
        held += [getattr(module, name) for name in names if hasattr(module, name)]
    return [each for each in held if isinstance(each, CPUDispatcher)]


def _name_of(kernel: Any) -> Name:
    return kernel.py_func.__module__, kernel.py_func.__name__


def _kernel(name: Name) -> Any:
    return getattr(import_module(name[0]), name[1])


def _compile(calls: Calls, idle: list[_Worker]) -> None:
    """Hand out what can be compiled; what the longest chain of callers waits for comes first."""
    chain: dict[Name, int] = dict.fromkeys(calls, 0)  # code of the callers above, the longest way
    for name in reversed(list(TopologicalSorter(calls).static_order())):
        chain[name] += len(_kernel(name).py_func.__code__.co_code)
        for called in calls[name]:
            chain[called] = max(chain[called], chain[name])
    order = TopologicalSorter(calls)
    order.prepare()
    seen: dict[Name, bytes] = {}
    apart: list[tuple[int, Name]] = []  # a heap of parts
    here: list[Name] = []  # entries, which are linked of parts that are here, and what was compiled before
    busy: dict[Connection, _Worker] = {}
    while order.is_active():
        for name in order.get_ready():
            kernel = _kernel(name)
            if isinstance(kernel, parts.Part) and not kernel.overloads:
                heappush(apart, (-chain[name], name))
            else:
                here.append(name)
        while idle and apart:
            worker, name = idle.pop(), heappop(apart)[1]
            worker.begin(name, {each: seen[each] for each in calls[name]})
            busy[worker.connection] = worker
        if here:
            name = here.pop()
            _kernel(name).compile(())
            seen[name] = _seen_of(_kernel(name))
            order.done(name)
            continue
        for answered in wait(list(busy)):
            worker = busy.pop(cast(Connection, answered))
            name, seen[name], code = worker.end()
            _take(seen[name], code)
            order.done(name)
            idle.append(worker)


@define(eq=False)
class _Worker:
    """A process that compiles parts, from this side."""

    connection: Connection = field(init=False)
    _process: subprocess.Popen[bytes] = field(init=False)
    _told: set[Name] = field(factory=set, init=False)

    def __enter__(self) -> _Worker:
        self.connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVE, str(theirs.fileno())],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for the one that started it
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def begin(self, name: Name, seen: dict[Name, bytes]) -> None:
        """Let it compile a part, of whose callees it is told what it has not heard."""
        self.connection.send((name, [what for each, what in seen.items() if each not in self._told]))
        self._told |= {name, *seen}

    def end(self) -> tuple[Name, bytes, Code]:
        """What it has compiled; `EOFError` where it could not."""
        answer: tuple[Name, bytes, Code] = self.connection.recv()
        return answer


def serve(descriptor: int) -> None:
    """Compile what is asked for until nobody asks any more: all that a worker does."""
    with suppress(EOFError), Connection(descriptor) as connection:
        while True:
            name, heard = connection.recv()
            for seen in heard:
                _take(seen)
            kernel = _kernel(name)
            kernel.compile(())
            connection.send((name, _seen_of(kernel), _code_of(kernel)))


def _seen_of(kernel: Any) -> bytes:
    """What a caller sees of a kernel: its types, and numba's description with the symbol."""
    (result,) = kernel.overloads.values()
    result.fndesc.typemap = result.fndesc.calltypes = None  # of its inside
    return pickle.dumps((_name_of(kernel), result.signature, result.fndesc))


def _code_of(part: Any) -> Code:
    (library,) = (each.library for each in part.overloads.values())
    calls = {id(each.library): _name_of(called) for called in _named_by(part) for each in called.overloads.values()}
    others = [each for each in library.needed if id(each) not in calls]
    return Code(
        library._final_module.as_bitcode(),
        tuple(calls[id(each)] for each in library.needed if id(each) in calls),
        tuple((each.name, each._get_module_for_linking().as_bitcode()) for each in others),
    )


def _take(seen: bytes, code: Code | None = None) -> None:
    """Make a kernel known that another process has compiled; without code, callers can be compiled but not linked."""
    name, signature, descriptor = pickle.loads(seen)
    kernel = _kernel(name)
    create = kernel.targetctx.codegen().create_library
    library = create(name[1])
    library._finalized, library.needed = True, []
    if code is not None:
        library._final_module = binding.parse_bitcode(code.bitcode)
        for called in code.calls:
            library.needed += [each.library for each in _kernel(called).overloads.values()]
        for other in code.others:
            if other not in _others:
                _others[other] = create(other[0])
                _others[other]._finalized, _others[other]._final_module = True, binding.parse_bitcode(other[1])
            library.needed.append(_others[other])
    entry_point = object()  # a key; nobody calls it
    compile_result: Any = compiler.compile_result
    environment: Any = Environment
    kernel.overloads[tuple(signature.args)] = compile_result(
        typing_context=kernel.typingctx,
        target_context=kernel.targetctx,
        entry_point=entry_point,
        fndesc=descriptor,
        library=library,
        signature=signature,
        objectmode=False,
        environment=environment.from_fndesc(descriptor),
    )
    kernel.targetctx.insert_user_function(entry_point, descriptor, [library])
