"""Base states of recorded processors and the memory image: read from a folder, and made the state a case begins in."""

from __future__ import annotations

import base64
import gzip
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
    Step,
)
from vtsim.study.vmx.format import flaws_of_fields, flaws_of_image, flaws_of_processor
from vtsim.study.vmx.places import read_json
from vtsim.study.vmx.shapes import Flaw, number, numbers, problems
from vtsim.vmcs.capabilities import BASIC, Capabilities

IMAGE: Final = "memory_image.json"
VMCALL: Final = bytes.fromhex("0f01c1")
"""Stands behind the instruction of a case."""


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

        What cannot be such a state is the user's mistake, and reported with its place in the case.
        """
        try:
            processor, image = self.processor(case.model), self.image()
        except ConfigError as error:
            missing = error.problems[0]
            if missing.file:
                raise
            raise case.wrong([Flaw(("model",), missing.message, missing.help)]) from None
        if case.base not in processor.bases:
            unknown = ConfigError.unknown("base state", case.base, processor.bases).problems[0]
            raise case.wrong([Flaw(("base",), unknown.message, unknown.help)])
        flaws = flaws_of_fields(case.raw, image)
        if flaws:
            raise case.wrong(flaws)
        return _environment(case, processor, image)

    def _read(self, name: str) -> tuple[str, str, dict[str, Any]]:
        """Where a file is, its text, and what it holds."""
        for folder in self.folders:
            for candidate in (folder / name, folder / f"{name}.gz"):
                if candidate.is_file():
                    try:
                        data = candidate.read_bytes()
                    except OSError as error:
                        raise ConfigError(f"cannot be read: {error.strerror}", file=str(candidate)) from None
                    return str(candidate), *_object(str(candidate), data)
        places = f"{self.folders[0]}" + (", nor is it shipped" if len(self.folders) > 1 else "")
        known = sorted({path.name.split(".")[1] for folder in self.folders for path in _base_files(folder)})
        help = f"base states are there of {', '.join(known)}" if known and name != IMAGE else "see --base-states"
        raise ConfigError(f"there is no {name} in {places}", help=help)


def _base_files(folder: Any) -> Iterable[Any]:
    return [path for path in folder.iterdir() if path.name.startswith("base_states.")] if folder.is_dir() else []


def _object(name: str, data: bytes) -> tuple[str, dict[str, Any]]:
    """The text of a file and the JSON object that it holds."""
    help = "a JSON object is accepted here"
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error):
        raise ConfigError("is packed, and damaged", file=name, help=help) from None
    except UnicodeDecodeError:
        raise ConfigError("is not text", file=name, help=help) from None
    loaded, problem = read_json(text, name, None, help)
    if problem:
        raise ConfigError.of([problem])
    if not isinstance(loaded, dict):
        raise ConfigError("holds no JSON object", file=name, help=help)
    return text, loaded


@cache
def _processor(where: BaseStates, name: str) -> Processor:
    file, text, loaded = where._read(f"base_states.{name}.json")
    image = where.image()
    flaws = flaws_of_processor(loaded, image)
    if flaws:
        raise ConfigError.of(problems(flaws, text, file, None))
    cpuid = {}
    for key, answer in loaded["cpuid"].items():
        leaf, _, subleaf = key.partition(".")
        eax, ebx, ecx, edx = (number(value) for value in answer)
        cpuid[number(leaf), number(subleaf or "0")] = eax, ebx, ecx, edx
    return Processor(
        name=name,
        capabilities=Capabilities(msrs={number(msr): number(value) for msr, value in loaded["msrs"].items()}),
        cpuid=cpuid,
        physical_address_bits=number(loaded["physical_address_width"]),
        linear_address_bits=number(loaded.get("linear_address_width", 48)),
        bases={base: dict(_known(image, values)) for base, values in loaded["bases"].items()},
    )


def _known(image: MemoryImage, values: Mapping[str, int | str]) -> Iterator[tuple[str, int]]:
    for recorded, value in values.items():
        name = image.field_name(recorded)
        if name is not None:
            yield name, number(value)


@cache
def _image(where: BaseStates) -> MemoryImage:
    file, text, loaded = where._read(IMAGE)
    flaws = flaws_of_image(loaded)
    pages: dict[int, bytes] = {}
    for index, region in enumerate(() if flaws else loaded["regions"]):
        try:
            data = zlib.decompress(base64.b64decode(region["zlib_base64"], validate=True))
        except (ValueError, zlib.error):
            help = "zlib-packed bytes in base64 are accepted, as in the shipped file"
            flaws.append(Flaw(("regions", index, "zlib_base64"), "these are no packed bytes", help))
            continue
        start = number(region["addr"])
        for offset in range(0, len(data), PAGE):
            pages[start + offset] = data[offset : offset + PAGE].ljust(PAGE, b"\0")
    if flaws:
        raise ConfigError.of(problems(flaws, text, file, None))
    return MemoryImage(pages=pages, names=numbers(loaded["pages"]), fields=numbers(loaded["fields"]))


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
        instruction = Instruction(bits=insn["bits"], asm=insn.get("asm", ""), code=bytes.fromhex(insn["bytes"]))
        at = (vmcs["GUEST_RIP"] + (0 if insn["bits"] == 64 else vmcs["GUEST_CS_BASE"])) & ((1 << 64) - 1)
        written = ((number(address), len(data) // 2) for address, data in raw.get("mem", ()))
        if at & -PAGE in memory and not any(address <= at < address + length for address, length in written):
            _write(memory, at, instruction.code + VMCALL)  # memory is mapped where it is
    return Environment(
        processor=processor,
        image=image,
        vmcs=vmcs,
        memory=memory,
        gpr=numbers(raw.get("gpr", {})),
        control_registers=numbers(raw.get("creg", {})),
        run=raw.get("run", "vmlaunch"),
        mov_ss_blocking=raw.get("mov_ss_blocking", False),
        instruction=instruction,
        pre=tuple(number(action[-1]) for action in raw.get("pre", ())),
        steps=tuple(_step(step) for step in raw.get("steps", ())),
        dump=tuple((number(at), number(length)) for at, length in raw.get("dump", ())),
        unknown_fields=tuple(unknown),
    )


def _step(step: str | list[Any]) -> Step:
    """A step is a word, or a list of a word and numbers."""
    word, *operands = [step] if isinstance(step, str) else step
    return word, tuple(number(operand) for operand in operands)


def _write(memory: dict[int, bytes], address: int, data: bytes) -> None:
    while data:
        page, offset = address & -PAGE, address % PAGE
        part = data[: PAGE - offset]
        old = memory.get(page, bytes(PAGE))
        memory[page] = old[:offset] + part + old[offset + len(part) :]
        address, data = address + len(part), data[len(part) :]
