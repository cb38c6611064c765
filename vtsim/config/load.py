"""Scenario files: in with every error at once, out fully resolved."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from vtsim.base.errors import ConfigError, Problem
from vtsim.base.spec import Group, plain
from vtsim.base.units import Hex, shown
from vtsim.config.checks import resolve
from vtsim.config.nodes import TAG, Node, Source, compose, of_data
from vtsim.config.overrides import override
from vtsim.config.structure import FAILED, Structuring, place
from vtsim.platform.spec import Scenario

LARGEST_FILE = 256 * 1024
STUDY_KEYS = ("question", "axes")  # which no scenario has
SMALLEST = "the smallest scenario is 'vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]'"


def load_scenario(path: str | Path, sets: Sequence[str] = ()) -> Scenario:
    """Read a scenario file; every problem of it is in the one `ConfigError`."""
    return reader(Path(path))(sets)


def reader(path: Path) -> Callable[[Sequence[str]], Scenario]:
    """Read a file once, be it a pipe, for several scenarios: what is returned is given the settings of each."""
    text = read_text(path)
    return lambda sets: parse_scenario(text, sets, label=str(path), folder=path.parent, name=path.stem)


def parse_scenario(
    text: str,
    sets: Sequence[str] = (),
    *,
    label: str = "scenario",
    folder: Path = Path(),
    name: str = "scenario",
) -> Scenario:
    """Read a scenario from text; `label` is the file's name in errors, `name` a name for the nameless."""
    source = Source.of(label, text)
    problems: list[Problem] = []
    root = compose(text, source, problems)
    if root is None:
        raise ConfigError.of(problems or [source.problem((0, 0), "there is nothing in it", help=SMALLEST)])
    if (key := study_key(root)) and not problems:
        help = f"vtsim sweep {label} runs it"
        raise ConfigError.of([source.problem(root.keys[key], "this is a study, and no scenario", path=key, help=help)])
    return _build(root, sets, problems, folder, name)


def scenario_of(given: Scenario | Mapping[str, Any] | str | Path, sets: Sequence[str] = ()) -> Scenario:
    """What a program may give for a scenario: one, the path of a file, or what a file would say as plain data."""
    if not isinstance(sets, list | tuple) or not all(isinstance(one, str) for one in sets):
        raise ConfigError("this is no list of path=value", field="sets", help="write it like ['machine.cpus=2']")
    if isinstance(given, Scenario):
        if sets:
            raise ConfigError(
                "settings override those of a file", field="sets", help="use attrs.evolve on the scenario"
            )
        return resolve(given, given.name or "scenario")
    if isinstance(given, Mapping):
        problems: list[Problem] = []
        root = of_data(given, Source("scenario"), problems)
        if problems:
            raise ConfigError.of(problems)
        return _build(root, sets, problems, Path(), "scenario")
    return load_scenario(path_of(given, "a scenario", ", or as a mapping what is in it"), sets)


def path_of(given: object, what: str, otherwise: str = "") -> Path:
    """The path of a file that a program gives, or `ConfigError`."""
    if isinstance(given, str | PathLike):
        return Path(given)
    raise ConfigError(f"{shown(given)} is not {what}", help=f"give the path of its file{otherwise}")


def _build(root: Node, sets: Sequence[str], problems: list[Problem], folder: Path, name: str) -> Scenario:
    for assignment in sets:
        root = _override(root, assignment, problems)
    scenario = Structuring(folder, problems).build(Group(spec=Scenario), root, "")
    if scenario is not FAILED and not problems:
        try:
            return resolve(scenario, name)
        except ConfigError as error:
            problems += [place(problem, root, "") for problem in error.problems]
    raise ConfigError.of(sorted(problems, key=lambda problem: problem.line or 0))


def study_key(root: Node) -> str:
    """Return a key by which a file is a study; none of a scenario."""
    return next((key for key in STUDY_KEYS if isinstance(root.value, dict) and key in root.value), "")


def is_study(path: Path) -> bool:
    """Is this file a study? One that cannot be read is none."""
    try:
        text = read_text(path)
    except ConfigError:
        return False
    root = compose(text, Source.of(str(path), text), [])
    return root is not None and bool(study_key(root))


def located(error: ConfigError, path: Path, sets: Sequence[str]) -> ConfigError:
    """Show where in its file a setting is that only building the machine found wrong."""
    if not path.is_file():  # a pipe was read and is empty now
        return error
    text = read_text(path)
    root = compose(text, Source.of(str(path), text), [])
    for assignment in sets:
        root = root and _override(root, assignment, [])
    return error if root is None else ConfigError.of(place(problem, root, "") for problem in error.problems)


def _override(root: Node, assignment: str, problems: list[Problem]) -> Node:
    try:
        return override(root, assignment)
    except ConfigError as error:
        problems += error.problems
        return root


def read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:  # a device or a pipe has no size, and may never end
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ConfigError(
                "this is too large for a scenario", file=str(path), help=f"the limit is {LARGEST_FILE} bytes"
            )
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"this is not a text file: byte {error.object[error.start]:#04x} at {error.start}",
            file=str(path),
            help="a scenario is YAML in UTF-8",
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"cannot be read: {reason}", file=str(path), help=nearby(path)) from None


def nearby(path: Path) -> str:
    """Name the scenarios that are where the user looked."""
    try:
        files = sorted(entry.name for entry in path.parent.glob("*.yaml"))
    except (OSError, ValueError):
        files = []
    return f"scenarios in that folder: {', '.join(files[:20])}" if files else "give the path of a scenario file"


def dump(scenario: Scenario) -> str:
    """Write every setting, with units; reading it back gives the same scenario."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.representer.add_representer(Hex, _hexadecimal)
    text = io.StringIO()
    yaml.dump(plain(scenario), text)
    return text.getvalue()


def _hexadecimal(representer: Any, value: Hex) -> Any:
    return representer.represent_scalar(f"{TAG}int", repr(value))
