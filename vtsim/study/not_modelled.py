"""What the model leaves out, as the docstrings of the code that would model it say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from attrs import frozen

PACKAGE: Final = Path(__file__).resolve().parents[1]


@frozen
class Limit:
    """One thing that is not modelled, and the dotted name of the code that it limits."""

    where: str
    what: str


def docstrings() -> Iterator[tuple[str, str]]:
    """Every docstring of the package with the dotted name of what it describes."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                name = getattr(node, "name", "")
                yield f"{module}.{name}" if name else module, text


def limits() -> list[Limit]:
    """Every limit, in the order of modules."""
    found = []
    for name, text in docstrings():
        match = re.search(r"^Not modelled: (.+?)(?:\n\n|\Z)", text, re.S | re.M)
        if match:
            found.append(Limit(name, " ".join(match[1].split())))
    return found
