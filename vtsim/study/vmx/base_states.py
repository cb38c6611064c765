"""Base states of recorded processors and the memory image: read from a folder, and made the state a case begins in."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.study.vmx.cases import (
    PAGE,
    VMCS_A,
    VMCS_B,
    VMCS_C,
    VMXON_REGION,
    Case,
    Environment,
    Instruction,
    MemoryImage,
    Processor,
    number,
    numbers,
    wrong,
    wrong_line,
)
from vtsim.vmcs.capabilities import BASIC, Capabilities

IMAGE: Final = "memory_image.json"


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
            raise wrong_line(case.file, case.line, f"model: {missing.message}", missing.help) from None
        if case.base not in processor.bases:
            unknown = ConfigError.unknown("base state", case.base, processor.bases, field="base").problems[0]
            raise wrong_line(case.file, case.line, f"base: {unknown.message}", unknown.help)
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
        places = f"{self.folders[0]}" + (", nor is it shipped" if len(self.folders) > 1 else "")
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
