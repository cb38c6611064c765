"""Recorded VMX cases as they stand in a file: one JSON object per line, each an override of a named base state.

Numbers of the machine state are hexadecimal strings in the file and integers here. The recordings name VMCS fields
in their own way; here they have the names of the field table, which are found by encoding.
"""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, TextIO

from attrs import field, frozen

from vtsim.base.errors import ConfigError, Problem
from vtsim.vmcs.capabilities import BASIC, Capabilities
from vtsim.vmcs.fields import BY_ENCODING

PAGE: Final = 4096
VMXON_REGION: Final = 0x400000
VMCS_A: Final = 0x401000
"""The VMCS that is current when a case begins."""
VMCS_B: Final = 0x402000
VMCS_C: Final = 0x403000

ENTRY: Final = "entry"
EXIT: Final = "exit"
ROOT: Final = "root"

IMAGE: Final = "memory_image.json"
NEEDED: Final = ("id", "model", "cat", "base")

CpuidLeaf = tuple[int, int]
CpuidAnswer = tuple[int, int, int, int]
Recorded = Mapping[str, Any]
"""An outcome as it was recorded."""


@frozen(kw_only=True)
class Instruction:
    """The guest instruction of an exit case: width of the code segment, text and bytes."""

    bits: int
    asm: str
    code: bytes


@frozen(kw_only=True, eq=False)
class Processor:
    """The processor that cases were recorded on, with its base states by name, and their fields by name.

    There is one object for each file, so that what is built for a processor can be kept for it.
    """

    name: str
    capabilities: Capabilities
    cpuid: Mapping[CpuidLeaf, CpuidAnswer]
    physical_address_bits: int
    linear_address_bits: int
    bases: Mapping[str, Mapping[str, int]]


@frozen(kw_only=True)
class MemoryImage:
    """Memory at the start of every case: pages by address, their names, and names of VMCS fields by encoding."""

    pages: Mapping[int, bytes]
    names: Mapping[str, int]
    fields: Mapping[str, int]

    def field_name(self, recorded: str) -> str | None:
        """What the field table calls a field of the recording; None where it has no such field."""
        found = BY_ENCODING.get(self.fields.get(recorded, -1))
        return found.name if found else None


@frozen(kw_only=True)
class Case:
    """One recorded case. `raw` is its JSON object; what it expects is in `expected`, first run first."""

    id: str
    category: str
    model: str
    base: str
    kind: str
    line: int
    file: str
    raw: Mapping[str, Any]

    @property
    def expected(self) -> tuple[Recorded, ...]:
        """The recorded outcomes: of the first run, then of what followed it."""
        if "outcomes" in self.raw:
            return tuple(self.raw["outcomes"])
        return (self.raw["outcome"], *self.raw.get("more", ()))

    @property
    def unusable(self) -> str:
        """Why nothing can be held against this case; empty if something can."""
        if not self.raw.get("usable", True):
            return "recorded as not usable"
        if "disputed" in self.raw:
            return "disputed: the recorder contradicts the manual"
        return ""


@frozen(kw_only=True)
class Environment:
    """Everything that a model needs to run one case: the whole machine state, overrides applied.

    `vmcs` has every field of the base state, by the names of the field table; `memory` has pages by physical address;
    `gpr` and `control_registers` have lower-case names (`rax`, `cr2`, `dr6`).
    """

    processor: Processor
    image: MemoryImage
    vmcs: Mapping[str, int]
    memory: Mapping[int, bytes]
    gpr: Mapping[str, int]
    control_registers: Mapping[str, int]
    run: str | None
    mov_ss_blocking: bool
    instruction: Instruction | None
    pre: tuple[Any, ...] = ()
    steps: tuple[Any, ...] = ()
    dump: tuple[tuple[int, int], ...] = ()
    unknown_fields: tuple[str, ...] = field(default=())

    @property
    def capabilities(self) -> Capabilities:
        """The capability MSRs."""
        return self.processor.capabilities

    @property
    def cpuid(self) -> Mapping[CpuidLeaf, CpuidAnswer]:
        """What CPUID answers: EAX, EBX, ECX, EDX by leaf and subleaf."""
        return self.processor.cpuid

    @property
    def physical_address_bits(self) -> int:
        """The physical-address width."""
        return self.processor.physical_address_bits


def number(value: int | str) -> int:
    """A number of the recordings: an integer, or a hexadecimal string."""
    return int(value, 16) if isinstance(value, str) else value


def numbers(values: Mapping[str, int | str]) -> dict[str, int]:
    """Named numbers of the recordings."""
    return {name: number(value) for name, value in values.items()}


@frozen(kw_only=True)
class BaseStates:
    """Where base states and the memory image are: the first of some folders that has the file."""

    folders: tuple[Any, ...]  # paths, or package data

    @classmethod
    def beside(cls, file: Path) -> BaseStates:
        """The folder of a file of cases, and after it the copies that are shipped."""
        return cls(folders=(file.parent, files("vtsim.study.vmx.data")))

    @classmethod
    def of(cls, folder: Path) -> BaseStates:
        """One folder and no other."""
        return cls(folders=(folder,))

    def processor(self, name: str) -> Processor:
        """The processor with this name, from `base_states.NAME.json`."""
        return _processor(self, name)

    def image(self) -> MemoryImage:
        """The memory image that belongs to the cases."""
        return _image(self)

    def environment(self, case: Case) -> Environment:
        """The machine state in which a case begins.

        A value that cannot be read is the user's mistake and reported with the line of the case.
        """
        try:
            processor, image = self.processor(case.model), self.image()
        except ConfigError as error:
            missing = error.problems[0]
            if missing.file:
                raise
            raise _wrong(case.file, case.line, f"model: {missing.message}", missing.help) from None
        if case.base not in processor.bases:
            unknown = ConfigError.unknown("base state", case.base, processor.bases, field="base").problems[0]
            raise _wrong(case.file, case.line, f"base: {unknown.message}", unknown.help)
        try:
            return _environment(case, processor, image)
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            raise wrong(
                case, f"a value cannot be read: {error}",
                'machine state is written as hexadecimal strings ("0x10"), memory as [address, hexadecimal bytes]',
            ) from None  # fmt: skip

    def _read(self, name: str) -> tuple[str, dict[str, Any]]:
        for folder in self.folders:
            for candidate in (folder / name, folder / f"{name}.gz"):
                if candidate.is_file():
                    data = candidate.read_bytes()
                    return str(candidate), _object(str(candidate), data)
        places = " or ".join(str(folder) for folder in self.folders if isinstance(folder, Path))
        known = sorted({path.name.split(".")[1] for folder in self.folders for path in _base_files(folder)})
        help = f"base states are there of {', '.join(known)}" if known and name != IMAGE else "see --base-states"
        raise ConfigError(f"there is no {name} in {places}", help=help)


def _base_files(folder: Any) -> Iterable[Any]:
    return [path for path in folder.iterdir() if path.name.startswith("base_states.")] if folder.is_dir() else []


def _object(name: str, data: bytes) -> dict[str, Any]:
    try:
        loaded = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"cannot be read: {error}", file=name, help="a JSON object is accepted here") from None
    if not isinstance(loaded, dict):
        raise ConfigError("holds no JSON object", file=name, help="a JSON object is accepted here")
    return loaded


@cache
def _processor(where: BaseStates, name: str) -> Processor:
    file, loaded = where._read(f"base_states.{name}.json")
    image = where.image()
    try:
        cpuid = {}
        for key, answer in loaded["cpuid"].items():
            leaf, _, subleaf = key.partition(".")
            eax, ebx, ecx, edx = (number(value) for value in answer)
            cpuid[int(leaf, 16), int(subleaf or "0", 16)] = eax, ebx, ecx, edx
        return Processor(
            name=name,
            capabilities=Capabilities(msrs={int(msr, 16): number(value) for msr, value in loaded["msrs"].items()}),
            cpuid=cpuid,
            physical_address_bits=int(loaded["physical_address_width"]),
            linear_address_bits=int(loaded.get("linear_address_width", 48)),
            bases={base: dict(_known(image, values)) for base, values in loaded["bases"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"is not a file of base states: {error!r}", file=file,
            help="it has msrs, cpuid, physical_address_width and bases, as in the shipped file",
        ) from None  # fmt: skip


def _known(image: MemoryImage, values: Mapping[str, int | str]) -> Iterator[tuple[str, int]]:
    for recorded, value in values.items():
        name = image.field_name(recorded)
        if name is not None:
            yield name, number(value)


@cache
def _image(where: BaseStates) -> MemoryImage:
    file, loaded = where._read(IMAGE)
    try:
        pages: dict[int, bytes] = {}
        for region in loaded["regions"]:
            data, start = zlib.decompress(base64.b64decode(region["zlib_base64"])), number(region["addr"])
            for offset in range(0, len(data), PAGE):
                pages[start + offset] = data[offset : offset + PAGE].ljust(PAGE, b"\0")
        return MemoryImage(pages=pages, names=numbers(loaded["pages"]), fields=numbers(loaded["fields"]))
    except (ValueError, TypeError, KeyError, AttributeError, zlib.error) as error:
        raise ConfigError(
            f"is not a memory image: {error!r}", file=file,
            help="it has regions, pages and fields, as in the shipped file",
        ) from None  # fmt: skip


def _environment(case: Case, processor: Processor, image: MemoryImage) -> Environment:
    raw = case.raw
    vmcs = dict(processor.bases[case.base])
    unknown = []
    for recorded, value in raw.get("vmcs", {}).items():
        name = image.field_name(recorded)
        if name is None:
            unknown.append(recorded)
        else:
            vmcs[name] = number(value)
    memory: dict[int, bytes] = dict(image.pages)
    revision = (processor.capabilities.read(BASIC) & 0x7FFF_FFFF).to_bytes(4, "little").ljust(PAGE, b"\0")
    for region in (VMXON_REGION, VMCS_A, VMCS_B, VMCS_C):
        memory[region] = revision
    for address, data in raw.get("mem", ()):
        _write(memory, number(address), bytes.fromhex(data))
    insn = raw.get("insn")
    instruction = None
    if insn:
        instruction = Instruction(bits=insn["bits"], asm=insn["asm"], code=bytes.fromhex(insn["bytes"]))
    return Environment(
        processor=processor,
        image=image,
        vmcs=vmcs,
        memory=memory,
        gpr=numbers(raw.get("gpr", {})),
        control_registers=numbers(raw.get("creg", {})),
        run=raw.get("run", "vmlaunch"),
        mov_ss_blocking=bool(raw.get("mov_ss_blocking", False)),
        instruction=instruction,
        pre=tuple(raw.get("pre", ())),
        steps=tuple(_step(step) for step in raw.get("steps", ())),
        dump=tuple((number(at), number(length)) for at, length in raw.get("dump", ())),
        unknown_fields=tuple(unknown),
    )


def _step(step: Any) -> Any:
    """A step is a word, or a list of a word and numbers, which have to be readable."""
    if not isinstance(step, str):
        word, *operands = step
        if not isinstance(word, str):
            raise ValueError(f"a step is a word and numbers, not {step!r}")
        for operand in operands:
            number(operand)
    return step


def _write(memory: dict[int, bytes], address: int, data: bytes) -> None:
    while data:
        page, offset = address & -PAGE, address % PAGE
        part = data[: PAGE - offset]
        old = memory.get(page, bytes(PAGE))
        memory[page] = old[:offset] + part + old[offset + len(part) :]
        address, data = address + len(part), data[len(part) :]


def read_cases(path: Path) -> Iterator[Case]:
    """The cases of a .jsonl or .jsonl.gz file, one after the other."""
    try:
        with _open(path) as lines:
            for line, text in enumerate(lines, 1):
                if text.strip():
                    yield _case(str(path), line, text)
    except UnicodeDecodeError:
        raise ConfigError("is not text", file=str(path), help="one JSON object per line is accepted") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot be read: {reason}", file=str(path), help="a .jsonl file, or .jsonl.gz, is accepted"
        ) from None


def _open(path: Path) -> TextIO:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8")


def _case(file: str, line: int, text: str) -> Case:
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise _wrong(file, line, f"is not JSON: {error}", "each line is one case, a JSON object") from None
    if not isinstance(raw, dict):
        raise _wrong(file, line, "is no JSON object", "each line is one case, a JSON object")
    for key in NEEDED:
        if not isinstance(raw.get(key), str):
            raise _wrong(file, line, f"a case needs {key!r}", f"a case has {', '.join(NEEDED)} and an outcome")
    more = raw.get("more", [])
    recorded = raw.get("outcomes", [raw.get("outcome"), *more] if isinstance(more, list) else None)
    if not isinstance(recorded, list) or not all(isinstance(one, dict) and "kind" in one for one in recorded):
        raise _wrong(
            file,
            line,
            f"{raw['id']} has no recorded outcome",
            'a case has "outcome" (an object with "kind"), or "outcomes"',
        )
    return Case(
        id=raw["id"], category=raw["cat"], model=raw["model"], base=raw["base"],
        kind=_kind(raw), line=line, file=file, raw=raw,
    )  # fmt: skip


def _kind(raw: Mapping[str, Any]) -> str:
    if "outcomes" in raw:
        return ROOT
    return EXIT if "insn" in raw and not raw["id"].startswith("entry-") else ENTRY


def _wrong(file: str, line: int, message: str, help: str) -> ConfigError:
    return ConfigError.of([Problem(message=message, file=file, line=line, help=help)])


def wrong(case: Case, message: str, help: str) -> ConfigError:
    """The user's mistake in one case, with its file and line."""
    return _wrong(case.file, case.line, f"{case.id}: {message}", help)
