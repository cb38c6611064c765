"""The format of recorded cases as a table: which keys a case has, and what may stand under each.

A key that is not in the table is ignored, and said to be; one that is nearly a key of the table is a mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

from vtsim.cpu.slots import REGISTERS
from vtsim.study.vmx.places import Path, printable, quoted
from vtsim.study.vmx.shapes import (
    Flaw,
    Flaws,
    Shape,
    check_anything,
    check_boolean,
    check_bytes,
    check_keys,
    check_object,
    check_text,
    close_to,
    is_number,
    list_of,
    number,
    number_of,
    numbers_by_name,
    pair_of,
)
from vtsim.vmcs.fields import BY_NAME

LONGEST: Final = 120  # characters of a name
LONGEST_DUMP: Final = 1 << 16
GPRS: Final = tuple(name.lower() for name in REGISTERS)
CONTROL_REGISTERS: Final = ("cr2", "dr0", "dr1", "dr2", "dr3", "dr6")
RUNS: Final = ("vmlaunch", "vmresume")
NEEDED: Final = ("id", "model", "cat", "base")
READINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "fail7": {"kind": "vmfail_valid", "error": 7},
    "fail8": {"kind": "vmfail_valid", "error": 8},
    "fail33": {"kind": "entry_failure", "reason": 33},
}
"""What a word of a disputed case stands for."""

# fmt: off
STEPS: Final[Mapping[str, int]] = {  # the numbers that each takes
    "launch": 0, "resume": 0, "advance_resume": 0, "clear_load": 0, "clear_only": 0,
    "vmxon": 2, "vmxoff": 0, "vmclear": 2, "vmptrld": 2, "vmptrst": 0, "vmread": 1, "vmwrite": 2, "vmentryi": 1,
    "vmcall": 0, "vmfunc": 0, "invept": 2, "invvpid": 2, "hostcr": 2, "hostcrrd": 0, "mem64": 2, "mem32": 2, "rdmsr": 1,
}
# fmt: on
KINDS: Final[Mapping[str, tuple[str, ...]]] = {  # what an outcome of each kind has to say
    "vmfail_invalid": (),
    "vmfail_valid": ("error",),
    "entry_failure": ("reason",),
    "exit": ("reason",),
    "mem": ("data",),
    "op": (),
}
WORD: Final = number_of(64)


class FieldNames(Protocol):
    """What knows the names of VMCS fields in the recordings."""

    @property
    def fields(self) -> Mapping[str, int]: ...

    def field_name(self, recorded: str) -> str | None: ...


def _name(value: Any, path: Path, flaws: Flaws) -> None:
    if not isinstance(value, str) or not value:
        flaws.append(Flaw(path, f"{quoted(value)} is no name", "a string is accepted"))
    elif not value.isprintable() or len(value) > LONGEST:
        flaws.append(Flaw(path, "this cannot be printed", f"at most {LONGEST} printable characters are accepted"))


def _run(value: Any, path: Path, flaws: Flaws) -> None:
    if value is not None and value not in RUNS:
        flaws.append(Flaw(path, f"{quoted(value)} enters no guest", f"{' or '.join(RUNS)} is accepted, or null"))


def _step(value: Any, path: Path, flaws: Flaws) -> None:
    """A word, or a list of a word and numbers; a word that is not known is left to what runs the case."""
    word, operands = (value[0], value[1:]) if isinstance(value, list) and value else (value, [])
    at = (*path, 0) if isinstance(value, list) and value else path
    if not isinstance(word, str):
        flaws.append(
            Flaw(at, f"{quoted(word)} is no step", 'a word is accepted, as in "resume", or ["vmread", "0x6800"]')
        )
        return
    if word not in STEPS:
        meant = close_to(word, STEPS)
        if meant:
            flaws.append(Flaw(at, f"unknown step {quoted(word)}", f"did you mean {meant!r}?"))
    elif len(operands) < STEPS[word]:
        count = "a number" if STEPS[word] == 1 else f"{STEPS[word]} numbers"
        flaws.append(
            Flaw(path, f"{word} needs {count}, and has {len(operands) or 'none'}", _EXAMPLES[STEPS[word]].format(word))
        )
    for index, operand in enumerate(operands, 1):
        WORD(operand, (*path, index), flaws)


_EXAMPLES: Final = {1: 'it is written as in ["{}", "0x6800"]', 2: 'it is written as in ["{}", "0x0", "0x403000"]'}


def _before(value: Any, path: Path, flaws: Flaws) -> None:
    if not isinstance(value, list) or len(value) < 2 or value[0] != "selfirq":
        flaws.append(Flaw(path, "this is nothing that can be done before", 'as in ["selfirq", "0x0", "0x4041"]'))
        return
    for index, operand in enumerate(value[1:], 1):
        WORD(operand, (*path, index), flaws)


def _bits(value: Any, path: Path, flaws: Flaws) -> None:
    if isinstance(value, bool) or value not in (16, 32, 64):
        flaws.append(Flaw(path, f"{quoted(value)} is no size of code", "16, 32 or 64 is accepted"))


def _instruction(value: Any, path: Path, flaws: Flaws) -> None:
    example = '{"bits": 64, "asm": "cpuid", "bytes": "0fa2"}'
    if value is not None and check_object(value, path, flaws, example):
        check_keys(
            value, path, flaws, {"bits": _bits, "asm": check_text, "bytes": check_bytes}, ("bits", "bytes"), example
        )


def _length(value: Any, path: Path, flaws: Flaws) -> None:
    before = len(flaws)
    WORD(value, path, flaws)
    if len(flaws) == before and number(value) > LONGEST_DUMP:
        flaws.append(
            Flaw(path, f"{quoted(value)} is too long for a dump", f"at most {LONGEST_DUMP} bytes are accepted")
        )


def _dispute(value: Any, path: Path, flaws: Flaws) -> None:
    if not check_object(value, path, flaws, '{"sdm_reading": "fail33"}'):
        return
    reading = value.get("sdm_reading", "")
    if isinstance(reading, str) and reading not in READINGS:
        said = quoted(reading) if reading else "this"
        help = f"sdm_reading is an object, null, or one of {', '.join(READINGS)}"
        flaws.append(Flaw((*path, "sdm_reading"), f"{said} is no reading of the manual", help))
    elif isinstance(reading, dict):
        check_keys(reading, (*path, "sdm_reading"), flaws, OUTCOME, (), "")
    elif reading is not None and not isinstance(reading, str):
        flaws.append(
            Flaw((*path, "sdm_reading"), f"{quoted(reading)} is no reading of the manual", "an object is accepted")
        )


def _printable(value: Any, path: Path, flaws: Flaws) -> None:
    if not isinstance(value, str) or not value.isprintable() or len(value) > LONGEST:
        flaws.append(Flaw(path, f"{quoted(value)} is no word", "as in 'ok' or 'vmfail_valid'"))


def check_later(value: Any, path: Path, flaws: Flaws) -> None:
    """What is looked at with the base states, which know the names of fields."""


# fmt: off
OUTCOME: Final[Mapping[str, Shape]] = {
    "kind": _printable, "error": WORD, "reason": number_of(32), "qualification": WORD, "instruction_length": WORD,
    "instruction_info": WORD, "interruption_info": WORD, "interruption_error_code": WORD, "idt_vectoring_info": WORD,
    "idt_vectoring_error_code": WORD, "guest_linear_address": WORD, "guest_physical_address": WORD,
    "gpr": numbers_by_name("register", GPRS, WORD), "cr2": WORD, "dr6": WORD, "guest_handler_vector": WORD,
    "data": check_bytes, "op": _printable, "result": _printable, "vector": WORD, "error_code": WORD, "value": WORD,
    "cr0": WORD, "cr4": WORD,
    "vmcs": check_later,
    "guest_stack": check_anything, "addr": check_anything,
    "index": check_anything, "text": check_anything,
}
# fmt: on


def _outcome(value: Any, path: Path, flaws: Flaws) -> None:
    example = '{"kind": "vmfail_valid", "error": 7}'
    if not check_object(value, path, flaws, example):
        return
    check_keys(value, path, flaws, OUTCOME, ("kind",), example)
    kind = value.get("kind")
    if isinstance(kind, str) and kind not in KINDS and (meant := close_to(kind, KINDS)):
        flaws.append(Flaw((*path, "kind"), f"unknown kind of outcome {quoted(kind)}", f"did you mean {meant!r}?"))
    if isinstance(kind, str):
        for key in KINDS.get(kind, ()):
            if key not in value:
                flaws.append(Flaw(path, f"an outcome of kind {kind!r} needs {key!r}", f"as in {_OUTCOMES[kind]}"))


_OUTCOMES: Final = {
    "vmfail_valid": '{"kind": "vmfail_valid", "error": 7}',
    "entry_failure": '{"kind": "entry_failure", "reason": 33, "qualification": 0}',
    "exit": '{"kind": "exit", "reason": 10, "instruction_length": 2}',
    "mem": '{"kind": "mem", "addr": "0x828000", "data": "00112233"}',
}


# fmt: off
CASE: Final[Mapping[str, Shape]] = {
    "id": _name, "model": _name, "cat": _name, "base": _name,
    "vmcs":             check_later,
    "mem":              list_of(pair_of(WORD, check_bytes, '["0x800000", "0fa2"]'), '[["0x800000", "0fa2"]]'),
    "gpr":              numbers_by_name("register", GPRS, WORD),
    "creg":             numbers_by_name("control register", CONTROL_REGISTERS, WORD),
    "run":              _run,
    "mov_ss_blocking":  check_boolean,
    "pre":              list_of(_before, '[["selfirq", "0x0", "0x4041"]]'),
    "insn":             _instruction,
    "dump":             list_of(pair_of(WORD, _length, '["0x828000", 8]'), '[["0x828000", 8]]'),
    "steps":            list_of(_step, '["resume"]'),
    "outcome":          _outcome,
    "more":             list_of(_outcome, '[{"kind": "op", "op": "vmclear", "result": "ok"}]'),
    "outcomes":         list_of(_outcome, '[{"kind": "op", "op": "vmclear", "result": "ok"}]'),
    "also_allowed":     _outcome,
    "disputed":         _dispute,
    "usable":           check_boolean,
    "nondeterministic": list_of(check_text, '["gpr"]'),
    "notes": check_anything, "sources": check_anything, "bochs27_differs": check_anything,
}
# fmt: on


def flaws_of_case(raw: Any) -> Flaws:
    """What is wrong with the JSON value of a case, apart from names of VMCS fields."""
    flaws: Flaws = []
    if not check_object(raw, (), flaws, '{"id": "root-1", "model": …}'):
        return [Flaw((), "this is no JSON object", "each line is one case, a JSON object")]
    check_keys(raw, (), flaws, CASE, NEEDED, f"a case has {', '.join(NEEDED)} and an outcome")
    if not flaws and "outcome" not in raw and "outcomes" not in raw:
        flaws.append(Flaw((), "'outcome' is missing", 'an object with "kind"; or "outcomes", a list of them'))
    return flaws


def unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    """The keys of a case that the format does not have."""
    return [printable(key) for key in raw if key not in CASE]


def flaws_of_fields(raw: Mapping[str, Any], image: FieldNames) -> Flaws:
    """What is wrong with the VMCS fields of a case and of its outcomes: names, and numbers that do not fit."""
    flaws: Flaws = []
    places: list[tuple[Path, Any]] = [((), raw), (("outcome",), raw.get("outcome"))]
    places += [((key, index), one) for key in ("more", "outcomes") for index, one in enumerate(raw.get(key, ()))]
    for path, one in places:
        if isinstance(one, Mapping) and "vmcs" in one:
            check_fields(one["vmcs"], (*path, "vmcs"), flaws, image)
    return flaws


def check_fields(value: Any, path: Path, flaws: Flaws, image: FieldNames) -> None:
    """An object of VMCS fields: each has one of its two names, stands there once, and its number fits."""
    if not check_object(value, path, flaws, '{"guest_rip": "0x800000"}'):
        return
    seen: dict[str, str] = {}
    for recorded, one in value.items():
        here = (*path, recorded)
        name = image.field_name(recorded)
        if name is None and recorded not in image.fields:
            flaws.append(Flaw(here, f"unknown VMCS field {quoted(recorded)}", _meant(recorded, image), at_key=True))
        elif name is None:
            WORD(one, here, flaws)
        elif name in seen:
            flaws.append(Flaw(here, f"this is {quoted(seen[name])} again", "give the field once", at_key=True))
        else:
            seen[name] = recorded
            number_of(BY_NAME[name].bits, name)(one, here, flaws)


def _meant(recorded: str, image: FieldNames) -> str:
    meant = close_to(recorded.lower(), image.fields) or close_to(recorded.upper(), BY_NAME)
    return (
        f"did you mean {meant!r}?"
        if meant
        else "'vtsim vmcs fields' lists the names; those of the recordings are read too"
    )


# --- base states and the memory image --------------------------------------------------------------------------------


def _leaf(value: Any, path: Path, flaws: Flaws) -> None:
    if not isinstance(value, list) or len(value) != 4:
        help = 'EAX, EBX, ECX and EDX are accepted, as in ["0x16", "0x0", "0x0", "0x0"]'
        flaws.append(Flaw(path, f"{quoted(value)} is no answer of CPUID", help))
        return
    for index, register in enumerate(value):
        number_of(32, "a register")(register, (*path, index), flaws)


def _width(lowest: int, highest: int) -> Shape:
    def check(value: Any, path: Path, flaws: Flaws) -> None:
        if not is_number(value) or not lowest <= number(value) <= highest:
            flaws.append(Flaw(path, f"{quoted(value)} is no width of addresses", f"{lowest} to {highest} is accepted"))

    return check


def _numbered(noun: str, each: Shape, example: str) -> Shape:
    """An object whose keys are numbers; CPUID leaves are two, with a dot between."""

    def check(value: Any, path: Path, flaws: Flaws) -> None:
        if not check_object(value, path, flaws, example):
            return
        for key, one in value.items():
            if not all(is_number(part) for part in key.split(".", 1)):
                flaws.append(Flaw((*path, key), f"{quoted(key)} is no {noun}", f"as in {example}", at_key=True))
            each(one, (*path, key), flaws)

    return check


def _named(each: Shape, example: str) -> Shape:
    """An object whose keys are names."""

    def check(value: Any, path: Path, flaws: Flaws) -> None:
        if check_object(value, path, flaws, example):
            for key, one in value.items():
                each(one, (*path, key), flaws)

    return check


def flaws_of_processor(loaded: Mapping[str, Any], image: FieldNames) -> Flaws:
    """What is wrong with a file of base states."""

    def fields(value: Any, path: Path, flaws: Flaws) -> None:
        check_fields(value, path, flaws, image)

    flaws: Flaws = []
    table: dict[str, Shape] = {
        "msrs": _numbered("MSR", WORD, '{"0x480": "0xd810000000002b"}'),
        "cpuid": _numbered("CPUID leaf", _leaf, '{"7.0": ["0x0", "0x0", "0x0", "0x0"]}'),
        "physical_address_width": _width(32, 52),
        "linear_address_width": _width(48, 57),
        "bases": _named(fields, '{"b64": {"guest_rip": "0x800000"}}'),
    }
    check_keys(loaded, (), flaws, table, ("msrs", "cpuid", "physical_address_width", "bases"), _SHIPPED)
    return flaws


def flaws_of_image(loaded: Mapping[str, Any]) -> Flaws:
    """What is wrong with a memory image."""

    def region(value: Any, path: Path, flaws: Flaws) -> None:
        if check_object(value, path, flaws, '{"addr": "0x800000", "zlib_base64": "eNpj…"}'):
            check_keys(
                value, path, flaws, {"addr": _page, "zlib_base64": check_text}, ("addr", "zlib_base64"), _SHIPPED
            )

    flaws: Flaws = []
    named = _named(WORD, '{"CODE": "0x800000"}')
    table: dict[str, Shape] = {"regions": list_of(region, "[]"), "pages": named, "fields": named}
    check_keys(loaded, (), flaws, table, table, _SHIPPED)
    return flaws


def _page(value: Any, path: Path, flaws: Flaws) -> None:
    before = len(flaws)
    WORD(value, path, flaws)
    if len(flaws) == before and number(value) & 0xFFF:
        flaws.append(Flaw(path, f"{quoted(value)} is not where a page begins", "a multiple of 0x1000 is accepted"))


_SHIPPED: Final = "it is written as in the shipped file"
