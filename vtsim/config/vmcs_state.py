"""Reads the state of a VMCS that a user wrote down: a YAML mapping of field names to numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from attrs import frozen

from vtsim.base.errors import ConfigError, Problem, alternatives
from vtsim.config.load import read_text
from vtsim.config.nodes import Node, Source, compose
from vtsim.vmcs.fields import BY_NAME

BASE, PROFILE = "base", "profile"
NAMES: Final = {
    BASE: "the name of a base state of the recordings is accepted, as in b64e",
    PROFILE: "the name of a profile is accepted, as 'vtsim list profile' shows them",
}
NUMBER: Final = "a number is accepted, as in 0x80000031; -1 sets all bits"
SHOWN: Final = 40  # characters of a number in a message
EMPTY: Final = "write fields as in 'GUEST_RIP: 0x401000'"


@frozen(kw_only=True)
class VmcsState:
    """Fields by name, the base state that they change, and the profile of the processor; each may be left out."""

    fields: dict[str, int]
    base: str = ""
    profile: str = ""
    places: dict[str, Node]

    def wrong(self, key: str, error: ConfigError) -> ConfigError:
        """The same mistake, shown at the place of a key."""
        return ConfigError.of(
            self.places[key].source.problem(self.places[key].at, problem.message, path=key, help=problem.help)
            for problem in error.problems
        )


def load_vmcs_state(path: Path) -> VmcsState:
    """Read a file; every problem of it is in the one `ConfigError`."""
    text = read_text(path)
    source = Source.of(str(path), text)
    problems: list[Problem] = []
    root = compose(text, source, problems)
    if root is None or not isinstance(root.value, dict):
        at = (0, 0) if root is None else root.at
        raise ConfigError.of(problems or [source.problem(at, "there is no mapping of fields in it", help=EMPTY)])
    fields: dict[str, int] = {}
    words: dict[str, str] = {}
    for key, node in root.value.items():
        name = key.upper()
        if key in (BASE, PROFILE):
            if isinstance(node.value, str) and node.value:
                words[key] = node.value
            else:
                problems.append(source.problem(node.at, "this is no name", path=key, help=NAMES[key]))
        elif name not in BY_NAME:
            help = alternatives("field", name, (*BY_NAME, BASE, PROFILE))
            problems.append(source.problem(root.keys[key], f"unknown VMCS field {key!r}", help=help))
        elif name in fields:
            first = next(other for other in root.value if other.upper() == name)
            help = f"the first is in line {root.keys[first][0] + 1}"
            problems.append(source.problem(root.keys[key], f"field {name!r} is given twice", help=help))
        else:
            value, why = _number(node, BY_NAME[name].bits)
            if why:
                problems.append(source.problem(node.at, why, path=key, help=NUMBER))
            fields[name] = value
    if problems:
        raise ConfigError.of(sorted(problems, key=lambda problem: problem.line or 0))
    return VmcsState(
        fields=fields, base=words.get(BASE, ""), profile=words.get(PROFILE, ""),
        places={key: root.value[key] for key in words},
    )  # fmt: skip


def _number(node: Node, bits: int) -> tuple[int, str]:
    value = node.value
    if isinstance(value, str):
        try:
            value = int(value, 0)
        except ValueError:
            return 0, f"{value[:40]!r} is no number"
    if isinstance(value, bool) or not isinstance(value, int):
        return 0, "this is no number"
    if value == -1:
        return (1 << bits) - 1, ""
    if not 0 <= value < 1 << bits:
        digits = str(value) if -9999 < value < 0 else f"{value:#x}"
        return 0, f"{digits[:SHOWN]}{'…' * (len(digits) > SHOWN)} does not fit in the {bits} bits of the field"
    return value, ""
