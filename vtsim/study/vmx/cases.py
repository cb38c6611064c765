"""Recorded VMX cases as they stand in a file: one JSON object per line, each an override of a named base state.

Numbers of the machine state are hexadecimal strings in the file and integers here. The recordings name VMCS fields
in their own way; here they have the names of the field table, which are found by encoding.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from attrs import frozen

from vtsim.base.errors import ConfigError, Problem
from vtsim.vmcs.capabilities import Capabilities
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

NEEDED: Final = ("id", "model", "cat", "base")
LONGEST: Final = 120  # characters of a name
ONLY_REASON: Final = "only_reason"
"""Marks an exit of which nothing but the reason is known."""

READINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "fail7": {"kind": "vmfail_valid", "error": 7},
    "fail8": {"kind": "vmfail_valid", "error": 8},
    "fail33": {"kind": "entry_failure", "reason": 33},
}
"""What a word of a disputed case stands for."""

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
    pre: tuple[Any, ...] = ()
    steps: tuple[Any, ...] = ()
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


def number(value: int | str) -> int:
    """A number of the recordings: an integer, or a hexadecimal string."""
    return int(value, 16) if isinstance(value, str) else value


def numbers(values: Mapping[str, int | str]) -> dict[str, int]:
    """Named numbers of the recordings."""
    return {name: number(value) for name, value in values.items()}


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
    except (ValueError, RecursionError) as error:
        raise wrong_line(file, line, f"is not JSON: {error}", "each line is one case, a JSON object") from None
    if not isinstance(raw, dict):
        raise wrong_line(file, line, "is no JSON object", "each line is one case, a JSON object")
    for key in NEEDED:
        if not isinstance(raw.get(key), str):
            raise wrong_line(file, line, f"a case needs {key!r}", f"a case has {', '.join(NEEDED)} and an outcome")
        if not raw[key].isprintable() or len(raw[key]) > LONGEST:
            raise wrong_line(file, line, f"{key!r} cannot be printed", f"at most {LONGEST} printable characters")
    more = raw.get("more", [])
    recorded = raw.get("outcomes", [raw.get("outcome"), *more] if isinstance(more, list) else None)
    if not isinstance(recorded, list) or not all(isinstance(one, dict) and "kind" in one for one in recorded):
        raise wrong_line(
            file,
            line,
            f"{raw['id']} has no recorded outcome",
            'a case has "outcome" (an object with "kind"), or "outcomes"',
        )
    if not all(isinstance(one.get("result", ""), str) for one in recorded):
        raise wrong_line(file, line, f"{raw['id']}: 'result' is no string", "as in 'ok' or 'vmfail_valid'")
    disputed = raw.get("disputed")
    if "disputed" in raw and not _is_reading(disputed):
        raise wrong_line(
            file, line, f"{raw['id']} is disputed without a reading of the manual",
            f"sdm_reading is an object, null, or one of {', '.join(READINGS)}",
        )  # fmt: skip
    return Case(
        id=raw["id"], category=raw["cat"], model=raw["model"], base=raw["base"],
        kind=_kind(raw), line=line, file=file, raw=raw,
    )  # fmt: skip


def _is_reading(disputed: Any) -> bool:
    reading = disputed.get("sdm_reading") if isinstance(disputed, dict) else ""
    return reading is None or isinstance(reading, dict) or (isinstance(reading, str) and reading in READINGS)


def _kind(raw: Mapping[str, Any]) -> str:
    if "outcomes" in raw:
        return ROOT
    return EXIT if "insn" in raw and not raw["id"].startswith("entry-") else ENTRY


def wrong_line(file: str, line: int, message: str, help: str) -> ConfigError:
    return ConfigError.of([Problem(message=message, file=file, line=line, help=help)])


def wrong(case: Case, message: str, help: str) -> ConfigError:
    """The user's mistake in one case, with its file and line."""
    return wrong_line(case.file, case.line, f"{case.id}: {message}", help)
