"""Reads the description of a remapping unit and its devices: YAML with the same errors as a scenario."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vtsim.base.errors import ConfigError, Problem
from vtsim.base.spec import Group
from vtsim.config.load import read_text
from vtsim.config.nodes import Node, Source, compose
from vtsim.config.structure import FAILED, Structuring, place
from vtsim.platform.iommu_spec import IommuSpec

SMALLEST: Final = (
    "the smallest description is 'devices: [{device: \"03:02.0\", pages: [{iova: 0x1000, to: 0x100000}]}]'"
)


def load_iommu(path: Path) -> tuple[IommuSpec, Node]:
    """Read a description; every problem of it is in the one `ConfigError`. Also the tree, to place later problems."""
    source = Source.of(str(path), text := read_text(path))
    problems: list[Problem] = []
    root = compose(text, source, problems)
    if root is None:
        raise ConfigError.of(problems or [source.problem((0, 0), "there is nothing in it", help=SMALLEST)])
    spec = Structuring(path.parent, problems).build(Group(spec=IommuSpec), root, "")
    if spec is FAILED or problems:
        raise ConfigError.of(sorted(problems, key=lambda problem: problem.line or 0))
    return spec, root


def placed(error: ConfigError, root: Node) -> ConfigError:
    """Show where in its file a setting is that only building the tables found wrong."""
    return ConfigError.of(place(problem, root, "") for problem in error.problems)
