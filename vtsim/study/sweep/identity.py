"""What a point of a sweep is: the hash of its resolved scenario and of the model that runs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import attrs

from vtsim import __version__
from vtsim.base.spec import FilePath, Group, Kind, Many, Tagged, kind_of, plain, settings
from vtsim.cpu.profile import load_profile
from vtsim.platform.spec import Scenario

SEED_BITS: Final = 32
NO_MATTER: Final = ("name", "description")  # settings that only readers see
PACKAGE: Final = Path(__file__).resolve().parents[2]
DATA: Final = ("*.py", "*.toml")
WITHOUT_MODEL: Final = ("cli", "study")  # packages whose sources change no figure, but for these files of them
WITH_MODEL: Final = tuple(
    f"study/{name}.py" for name in ("__init__", "json_object", "measure", "replay_table", "result", "run")
)


@cache
def model_version() -> str:
    """Return the version with a hash of all sources that a result depends on: a changed model is another version."""
    digest = hashlib.sha256()
    files = {path.relative_to(PACKAGE).as_posix(): path for pattern in DATA for path in PACKAGE.rglob(pattern)}
    for name, path in sorted(files.items()):
        if name.partition("/")[0] not in WITHOUT_MODEL or name in WITH_MODEL:
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def identity(scenario: Scenario, version: str | None = None) -> str:
    """Return 32 hexadecimal digits that depend on every setting and the version, and on nothing else.

    Files and profiles that a scenario names count by what is in them, wherever they are; names and descriptions of
    scenarios do not count. `version` is that of the model that runs it, if not `model_version()`.
    """
    settings_of_it = json.dumps(_contents(Group(spec=Scenario), scenario), sort_keys=True)
    return hashlib.sha256(f"{version or model_version()}\0{settings_of_it}".encode()).hexdigest()[:32]


def replicate(scenario: Scenario, number: int, version: str | None = None) -> Scenario:
    """Return the scenario of one replicate: the first keeps the seed, the others have seeds that follow from it.

    The seed depends on the scenario, the version and the number alone, so the order of points changes nothing.
    """
    if number == 0:
        return scenario
    digest = hashlib.sha256(f"{identity(scenario, version)}\0{number}".encode()).digest()
    return attrs.evolve(scenario, seed=int.from_bytes(digest[: SEED_BITS // 8], "big"))


def resolved_text(scenario: Scenario) -> str:
    """Return every setting as JSON, which is YAML: reading it gives the same scenario."""
    return json.dumps(plain(scenario), ensure_ascii=False, separators=(",", ":"))


def named_files(scenario: Scenario) -> dict[str, str]:
    """Return the files that a scenario names, each with the hash of its contents."""
    return dict(_files(Group(spec=Scenario), scenario))


def _files(kind: Kind, value: Any) -> Iterator[tuple[str, str]]:
    match kind:
        case Group() | Tagged():
            for name, field in settings(type(value)).items():
                yield from _files(kind_of(field), getattr(value, name))
        case Many():
            for each in value:
                yield from _files(kind.item, each)
        case FilePath():
            yield value, _file_digest(value, *_state(value))


def _contents(kind: Kind, value: Any) -> Any:
    """A value as plain data that is the same wherever the files are that it names."""
    match kind:
        case Group():
            return dict(_of_spec(kind.spec, value))
        case Tagged():
            return [kind.plain(value)[kind.tag], dict(_of_spec(type(value), value))]
        case Many():
            return [_contents(kind.item, each) for each in value]
        case FilePath():
            return _file_digest(value, *_state(value))
    if isinstance(value, Mapping | tuple):
        return sorted(dict(value).items())
    return value


def _of_spec(spec: type[Any], value: Any) -> Iterator[tuple[str, Any]]:
    for name, field in settings(spec).items():
        inside = getattr(value, name)
        if spec is Scenario and name in NO_MATTER:
            continue
        if name == "profile" and str(inside).endswith(".toml"):
            inside = load_profile(inside).digest()
        yield name, _contents(kind_of(field), inside)


def _state(path: str) -> tuple[int, int]:
    try:
        found = Path(path).stat()
        return found.st_mtime_ns, found.st_size
    except OSError:
        return 0, 0  # the run will say what is wrong with it


@cache
def _file_digest(path: str, mtime: int, size: int) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return path
