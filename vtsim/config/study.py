"""Study files: in with every error at once, and from a choice of values to the scenario of a point."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
from attrs import frozen

from vtsim.base.errors import ConfigError, Problem
from vtsim.base.spec import Group
from vtsim.config.checks import resolve
from vtsim.config.load import nearby, read_text, study_key
from vtsim.config.nodes import Node, Source, compose
from vtsim.config.overrides import put
from vtsim.config.paths import dimension_at
from vtsim.config.structure import FAILED, Structuring, place
from vtsim.config.study_spec import StudySpec
from vtsim.platform.spec import Scenario

SCENARIO_KEYS: Final = ("vms", "machine", "vmm", "run")  # which no study has
SMALLEST: Final = (
    "the smallest study is 'question: How much?', a scenario: FILE, "
    "and axes: [{how: grid, path: machine.profile, values: [skx-4114]}]"
)


@frozen(kw_only=True)
class Choice:
    """The value that a point has for one setting."""

    path: str  # of the setting
    place: str  # of the value, or of the range it was drawn from, as a path of the study
    drawn: int | float | None = None


@frozen(kw_only=True, eq=False)
class StudyFile:
    """A study that was read, and the scenario that its points change."""

    spec: StudySpec
    path: Path
    digest: str  # of the texts of study and scenario: what the design depends on
    study: Node
    base: Node
    folder: Path  # of what the scenario names
    scenario_name: str

    def scenario(self, choices: Iterable[Choice]) -> Scenario:
        """Return the scenario of a point, or raise `ConfigError` with all that cannot be, each at its line."""
        root, problems = self.base, list[Problem]()
        for choice in choices:
            value = self.study.find(choice.place)
            if choice.drawn is not None:
                value = attrs.evolve(value, value=choice.drawn, keys={})
            try:
                root = put(root, choice.path, value)
            except ConfigError as error:
                problems += error.problems
        scenario = Structuring(self.folder, problems).build(Group(spec=Scenario), root, "")
        if scenario is not FAILED and not problems:
            try:
                return resolve(scenario, self.scenario_name)
            except ConfigError as error:
                problems += [place(problem, root, "") for problem in error.problems]
        raise ConfigError.of(problems)

    def placed(self, error: ConfigError) -> ConfigError:
        """Show where in the study something is that only its later reading found wrong."""
        return ConfigError.of(place(problem, self.study, "") for problem in error.problems)

    def value(self, where: str) -> Any:
        """Return what is written at a path of the study."""
        return self.study.find(where).plain()


def _ends_of_ranges(spec: StudySpec, root: Node) -> Iterator[Problem]:
    """Find ends of ranges that are written in units of something else than their setting measures."""
    for number, axis in enumerate(spec.axes):
        for path in getattr(axis, "ranges", {}):
            for end in ("min", "max"):
                where = f"axes.{number}.ranges.{path}.{end}"
                written, dimension = root.find(where).value, dimension_at(path)
                if dimension is not None and isinstance(written, str):
                    try:
                        dimension.parse(written)
                    except ConfigError as error:
                        yield attrs.evolve(error.problems[0], path=where)


def load_study(path: str | Path, check: Callable[[StudySpec], Iterable[Problem]] = lambda _: ()) -> StudyFile:
    """Read a study; every problem of it is in the one `ConfigError`, those that `check` finds included."""
    path = Path(path)
    source = Source.of(str(path), text := read_text(path))
    problems: list[Problem] = []
    root = compose(text, source, problems)
    if root is None:
        raise ConfigError.of(problems or [source.problem((0, 0), "there is nothing in it", help=SMALLEST)])
    found = next((key for key in SCENARIO_KEYS if isinstance(root.value, dict) and key in root.value), "")
    if found and not study_key(root) and not problems:
        help = f"vtsim run {path} runs it; a study names it, as in 'scenario: {path.name}'"
        raise ConfigError.of(
            [source.problem(root.keys[found], "this is a scenario, and no study", path=found, help=help)]
        )
    spec = Structuring(path.parent, problems).build(Group(spec=StudySpec), root, "")
    if spec is FAILED:
        raise _sorted(problems)
    problems += [place(problem, root, "") for problem in (*_ends_of_ranges(spec, root), *check(spec))]
    base, file, scenario_text = Node(value=None, source=source, at=root.at), path, ""
    if spec.scenario:
        node, file = root.find("scenario"), path.parent / spec.scenario
        if file.is_file():
            scenario_text = read_text(file)
            base = compose(scenario_text, Source.of(str(file), scenario_text), problems) or base
        else:
            message, help = f"there is no file {spec.scenario!r}", f"it is relative to the study; {nearby(file)}"
            problems.append(source.problem(node.at, message, path="scenario", help=help))
    for setting in spec.set:
        try:
            base = put(base, setting, root.find(f"set.{setting}"))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise _sorted(problems)
    return StudyFile(
        spec=spec,
        path=path,
        digest=hashlib.sha256(f"{text}\0{scenario_text}".encode()).hexdigest(),
        study=root,
        base=base,
        folder=file.parent,
        scenario_name=file.stem,
    )


def _sorted(problems: Iterable[Problem]) -> ConfigError:
    return ConfigError.of(sorted(problems, key=lambda problem: problem.line or 0))
