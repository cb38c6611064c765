"""How numba is made to compile whole programs: parts that are only linked, indexes that are never negative, no detours.

It reaches into numba's insides, for the kernels of this package only. Where they have other names, `available` is
False and every kernel is compiled as numba does it. Decision 0001 has the measurements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

from llvmlite import ir
from numba.core import cgutils, codegen, types
from numba.core import ir as numba_ir
from numba.core.registry import CPUDispatcher
from numba.core.types.functions import BaseFunction
from numba.extending import intrinsic
from numba.np import arrayobj

# what stays a function of its own, since in one with the rest registers would not suffice; what becomes part of others
APART = ("straight", "execute", "find_lines")
WITHIN = ("effective", "quickly", "transfer", "words_at", "all_hit")

unliteral: Any = types.unliteral
LEAVES = frozenset((str, int, bool, type(None), numba_ir.Loc, FunctionType))  # hold no variables

_names: set[str] = set()  # of parts
_depth = [0]  # of compilations of ours in progress


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """While a kernel of this package is compiled."""
    _depth[0] += 1
    try:
        yield
    finally:
        _depth[0] -= 1


class Part(CPUDispatcher):
    """A kernel that others are compiled with. Called from Python, it becomes an entry of its own."""

    entry: Any = None
    entry_of: Any

    def __call__(self, *arguments: Any) -> Any:
        """Compile this part as an entry, the first time, and run it."""
        if self.entry is None:
            name = f"entry.{self.py_func.__name__}"  # no part has such a name
            own = FunctionType(self.py_func.__code__, self.py_func.__globals__, name)
            own.__qualname__ = name
            own.__module__, own.__annotations__ = self.py_func.__module__, self.py_func.__annotations__
            self.entry = self.entry_of(own)
        return self.entry(*arguments)


def make_part(dispatcher: Any, entry_of: Any) -> None:
    """Let a compiled function be a part; `entry_of` makes it an entry where Python calls it."""
    dispatcher.__class__ = Part
    dispatcher.entry_of = entry_of
    _names.add(dispatcher.py_func.__qualname__)


def _is_part(library: Any) -> bool:
    return bool(_depth[0]) and library.name in _names


def _all_needed(libraries: Iterable[Any], seen: set[int]) -> Iterator[Any]:
    for library in libraries:
        if id(library) not in seen:
            seen.add(id(library))
            yield library
            yield from _all_needed(getattr(library, "needed", ()), seen)


def _replace() -> bool:
    """Replace methods of numba by ones that treat our kernels apart; False where one is missing."""
    library: Any = getattr(codegen, "CPUCodeLibrary", None)
    translator: Any = getattr(codegen, "JITCPUCodegen", None)
    places: dict[str, tuple[Any, str]] = {
        "optimize": (library, "_optimize_final_module"),
        "link": (library, "finalize"),
        "finish": (library, "_finalize_final_module"),
        "set_env": (translator, "set_env"),
        "fix_index": (arrayobj, "fix_integer_index"),
        "index": (arrayobj, "basic_indexing"),
        "call_type": (BaseFunction, "get_call_type"),
        "variables": (numba_ir.Inst, "_rec_list_vars"),
    }
    numbas: dict[str, Any] = {key: getattr(owner, name, None) for key, (owner, name) in places.items()}
    if None in numbas.values():
        return False

    def optimize_entry(self: Any) -> None:
        """Parts are private to the entry: LLVM drops arguments that nobody reads, and calls no other copy of a part."""
        if _is_part(self):
            return
        if _depth[0]:
            for function in self._final_module.functions:
                if function.linkage.name == "linkonce_odr":
                    function.linkage = "internal"
                    for names, attribute in ((APART, "noinline"), (WITHIN, "alwaysinline")):
                        if any(f"{len(name)}{name}B" in function.name for name in names):
                            function.add_function_attribute(attribute)
                    function.name = f"{self.name}.{function.name}"  # the loader knows local symbols by name, too
        numbas["optimize"](self)

    def link_entry(self: Any) -> None:
        """A part is linked with nothing: an entry links all that its parts need, once."""
        if _is_part(self):
            self.needed, self._linking_libraries = self._linking_libraries, []
        elif _depth[0]:
            self._linking_libraries = list(_all_needed(self._linking_libraries, set()))
        numbas["link"](self)

    def finish_entry(self: Any) -> None:
        """A part ends as unoptimized code to link; no machine code is made of it."""
        if _is_part(self):
            self._finalized = True
        else:
            numbas["finish"](self)

    def set_env_of_entry(self: Any, env_name: str, env: Any) -> None:
        if not _depth[0] or self._engine.get_global_value_address(env_name):
            numbas["set_env"](self, env_name, env)

    def fix_index_unless_ours(context: Any, builder: Any, index_type: Any, index: Any, size: Any) -> Any:
        """No index of ours is negative: three instructions less for every access to an array."""
        if _depth[0] and index_type.signed:
            return context.cast(builder, index, index_type, types.intp)
        return numbas["fix_index"](context, builder, index_type, index, size)

    def index_of_ours(
        context: Any, builder: Any, array_type: Any, array: Any, kinds: Any, indexes: Any, **rest: Any
    ) -> Any:
        """An element of a vector is its number away from the first: no shapes, no strides."""
        plain = array_type.ndim == 1 and array_type.layout == "C" and isinstance(kinds[0], types.Integer)
        if not _depth[0] or not plain or rest.get("boundscheck"):
            return numbas["index"](context, builder, array_type, array, kinds, indexes, **rest)
        return builder.gep(array.data, [context.cast(builder, indexes[0], kinds[0], types.intp)]), [], []

    def call_type_once(self: Any, context: Any, arguments: Any, keywords: Any) -> Any:
        """Operators of numbers and arrays have one type for the same arguments: it is looked for once."""
        if not _depth[0] or keywords or getattr(self.typing_key, "__module__", "") != "_operator":
            return numbas["call_type"](self, context, arguments, keywords)
        known = self.__dict__.setdefault("_known", {})
        plain = tuple(unliteral(each) for each in arguments)
        if plain not in known:
            known[plain] = numbas["call_type"](self, context, arguments, keywords)
        return known[plain]

    def variables_of(self: Any, value: Any) -> list[Any]:
        """As numba finds them, with the frequent kinds first."""
        kind = type(value)
        if kind is numba_ir.Var:
            return [value]
        if kind in LEAVES:
            return []
        if kind in (dict, list, tuple):
            held = value.values() if kind is dict else value
            return [each for inner in held if type(inner) not in LEAVES for each in variables_of(self, inner)]
        found: list[Any] = numbas["variables"](self, value)
        return found

    ours_for = {
        "optimize": optimize_entry,
        "link": link_entry,
        "finish": finish_entry,
        "set_env": set_env_of_entry,
        "fix_index": fix_index_unless_ours,
        "index": index_of_ours,
        "call_type": call_type_once,
        "variables": variables_of,
    }
    for key, (owner, name) in places.items():
        setattr(owner, name, ours_for[key])
    return True


available = _replace()


def _address_of(context: Any, builder: Any, signature: Any, arguments: Any, n: int) -> Any:
    """Where the element is that two arguments of an intrinsic, from the one with this number on, name: array, index."""
    make: Any = arrayobj.make_array
    return builder.gep(make(signature.args[n])(context, builder, arguments[n]).data, [arguments[n + 1]])


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Tell the host's memory that an element will be wanted; it need not exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        declare: Any = cgutils.get_or_insert_function
        address = builder.bitcast(_address_of(context, builder, signature, arguments, 0), cgutils.voidptr_t)
        number = ir.IntType(32)
        declared = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        function = declare(builder.module, declared, "llvm.prefetch.p0")
        builder.call(function, [address, number(0), number(3), number(1)])  # to read, into all caches, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@intrinsic
def lowest_bit(typing: Any, value: Any) -> Any:
    """The number of the lowest bit that is set; the value must not be zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


def _which_of(lanes: int) -> Any:
    """Which of so many elements, from one on, are equal to a value; a bit for each, the first one's the lowest."""

    @intrinsic
    def which(typing: Any, array: Any, first: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            first = _address_of(context, builder, signature, arguments, 0)
            element = first.type.pointee
            vector = ir.VectorType(element, lanes)
            address = builder.bitcast(first, vector.as_pointer())
            elements = builder.load(address, align=element.width // 8)
            value = builder.trunc(arguments[2], element) if element.width < 64 else arguments[2]
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            places = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            equal = builder.icmp_signed("==", elements, builder.shuffle_vector(one, one, places))
            return builder.zext(builder.bitcast(equal, ir.IntType(lanes)), ir.IntType(64))

        return types.int64(array, types.int64, types.int64), generate

    return which


def _copy(words: int) -> Any:
    """Copy so many words from one array, from an index on, to another array."""

    @intrinsic
    def copy(typing: Any, to: Any, first: Any, source: Any, start: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            ends = (_address_of(context, builder, signature, arguments, n) for n in (0, 2))
            move: Any = cgutils.raw_memcpy
            move(builder, *ends, ir.Constant(ir.IntType(64), words), 8)
            return context.get_dummy_value()

        return types.void(to, types.int64, source, types.int64), generate

    return copy


which_of_4: Any = _which_of(4)
which_of_8: Any = _which_of(8)
which_of_16: Any = _which_of(16)
copy_8: Any = _copy(8)
copy_16: Any = _copy(16)
copy_18: Any = _copy(18)
copy_20: Any = _copy(20)
