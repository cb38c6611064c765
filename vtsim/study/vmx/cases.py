"""Recorded VMX cases as they stand in a file: one JSON object per line, each an override of a named base state.

Numbers of the machine state are hexadecimal strings in the file and integers here. The recordings name VMCS fields
in their own way; here they have the names of the field table, which are found by encoding.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from attrs import define, field, frozen

from vtsim.base.errors import ConfigError, Problem
from vtsim.study.vmx.format import KINDS, READINGS, flaws_of_case, unknown_keys
from vtsim.study.vmx.places import read_json
from vtsim.study.vmx.shapes import Flaws, problems
from vtsim.vmcs.capabilities import Capabilities
from vtsim.vmcs.fields import BY_ENCODING, BY_NAME

PAGE: Final = 4096
VMXON_REGION: Final = 0x400000
VMCS_A: Final = 0x401000
"""The VMCS that is current when a case begins."""
VMCS_B: Final = 0x402000
VMCS_C: Final = 0x403000

ENTRY: Final = "entry"
EXIT: Final = "exit"
ROOT: Final = "root"

NO_EXIT: Final = "no_exit"
"""The kind of outcome of a VM entry after which no VM exit came."""
ONLY_REASON: Final = "only_reason"
"""Marks an exit of which nothing but the reason is known."""

CpuidLeaf = tuple[int, int]
CpuidAnswer = tuple[int, int, int, int]
Step = tuple[str, tuple[int, ...]]
"""What follows a first run: a word and its numbers."""
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
        """What the field table calls a field, by its name there or in the recordings; None if it has none such."""
        found = BY_ENCODING.get(self.fields[recorded]) if recorded in self.fields else BY_NAME.get(recorded.upper())
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
    text: str = ""
    """The line that it was read from."""

    def wrong(self, flaws: Flaws) -> ConfigError:
        """The user's mistakes in this case, with its file, its line and their places."""
        return ConfigError.of(problems(flaws, self.text, self.file, self.line))

    @property
    def expected(self) -> tuple[Recorded, ...]:
        """What has to happen: in the first run, then in what followed it.

        Where the recorder is known to contradict the manual, it is what the manual says of the first run.
        """
        if "disputed" in self.raw:
            return (_manual_says(self.raw["disputed"]["sdm_reading"], self.raw.get("outcome", {})),)
        if "outcomes" in self.raw:
            return tuple(self.raw["outcomes"])
        return (self.raw["outcome"], *self.raw.get("more", ()))

    @property
    def unusable(self) -> str:
        """Why nothing can be held against this case; empty if something can."""
        if not self.raw.get("usable", True):
            return "recorded as not usable"
        if "disputed" in self.raw and self.raw["disputed"].get("sdm_reading") is None:
            return "the recorder contradicts the manual, whose outcome is not given"
        for outcome in self.expected:
            if outcome["kind"] not in KINDS and not (outcome["kind"] == NO_EXIT and self.kind == ENTRY):
                return f"an outcome of kind {outcome['kind']!r} says nothing of a processor"
        return ""


def _manual_says(reading: str | Mapping[str, Any], recorded: Recorded) -> Recorded:
    """The outcome that replaces a disputed one; with another exit reason, nothing else is known of the exit."""
    if isinstance(reading, str):
        return READINGS[reading]
    if "reason" in reading:
        return {"kind": "exit", **reading, ONLY_REASON: True}
    return {**recorded, **reading}


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
    pre: tuple[int, ...] = ()
    """Values of the interrupt command register, written before the VM entry."""
    steps: tuple[Step, ...] = ()
    dump: tuple[tuple[int, int], ...] = ()
    unknown_fields: tuple[str, ...] = ()

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


@define
class Mistakes:
    """What is wrong with a file of cases, gathered so that the other cases still run; and what is odd about it."""

    problems: list[Problem] = field(factory=list)
    notes: dict[str, str] = field(factory=dict)
    """By key that no case has: where it was seen first."""

    def add(self, error: ConfigError) -> None:
        """Keep the problems of a case."""
        self.problems += error.problems

    def text(self, limit: int) -> str:
        """The problems to print: each sort once, at most so many, and how many there are besides."""
        first = {(problem.path, problem.message): problem for problem in reversed(self.problems)}
        kept = list(reversed(first.values()))[:limit]
        more = len(self.problems) - len(kept)
        return "\n\n".join([*map(str, kept), *([f"and {more} more like these"] if more else [])])


def read_cases(path: Path, mistakes: Mistakes | None = None) -> Iterator[Case]:
    """The cases of a .jsonl or .jsonl.gz file, one after the other.

    A line that is no case is added to the mistakes, and the others are read; without mistakes, it is raised.
    """
    try:
        with _open(path) as lines:
            for line, text in enumerate(lines, 1):
                if not text.strip():
                    continue
                try:
                    case = read_case(str(path), line, text.rstrip("\r\n"))
                except ConfigError as error:
                    if mistakes is None:
                        raise
                    mistakes.add(error)
                else:
                    if mistakes is not None:
                        for key in unknown_keys(case.raw):
                            mistakes.notes.setdefault(key, f"{path}:{line}")
                    yield case
    except UnicodeDecodeError:
        raise ConfigError("is not text", file=str(path), help="one JSON object per line is accepted") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "it is packed, and damaged"
        raise ConfigError(
            f"cannot be read: {reason}", file=str(path), help="a .jsonl file, or .jsonl.gz, is accepted"
        ) from None


def _open(path: Path) -> TextIO:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8-sig") if packed else path.open(encoding="utf-8-sig")


def read_case(file: str, line: int, text: str) -> Case:
    """The case in a line of a file. Raises `ConfigError` with all that is wrong with it."""
    raw, problem = read_json(text, file, line, "each line is one case, a JSON object")
    if problem:
        raise ConfigError.of([problem])
    flaws = flaws_of_case(raw)
    if flaws:
        raise ConfigError.of(problems(flaws, text, file, line))
    return Case(
        id=raw["id"], category=raw["cat"], model=raw["model"], base=raw["base"],
        kind=_kind(raw), line=line, file=file, raw=raw, text=text,
    )  # fmt: skip


def _kind(raw: Mapping[str, Any]) -> str:
    if "outcomes" in raw:
        return ROOT
    return EXIT if "insn" in raw and not raw["id"].startswith("entry-") else ENTRY
