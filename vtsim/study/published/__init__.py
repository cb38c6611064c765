"""Published results of real machines, as data: what was measured, where it is printed, its use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from attrs import frozen

from vtsim.base.errors import ConfigError

FILE: Final = Path(__file__).parent / "open.json"
SPLITS: Final = ("calibrate", "validate")


@frozen(kw_only=True)
class Row:
    """One published result; its figures stand in `values` under the names that the source uses."""

    id: str
    category: str
    source: str
    where: str
    hardware: str
    metric: str
    unit: str
    values: Mapping[str, Any]
    conditions: str
    model_needs: str
    confidence: str
    evidence: str
    split: str

    def value(self, path: str) -> float:
        """Return one figure by its dotted path; elements of a list are counted from 0."""
        found: Any = self.values
        for step in path.split("."):
            inner = dict(enumerate(found)) if isinstance(found, list) else found
            key: Any = int(step) if isinstance(found, list) and step.isdecimal() else step
            if not isinstance(inner, Mapping) or key not in inner:
                legal = inner if isinstance(inner, Mapping) else ()
                raise ConfigError.unknown(f"figure of {self.id}", path, legal)
            found = inner[key]
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise ConfigError(f"{path} of {self.id} is not one number", field=path)
        return float(found)


@cache
def published() -> Mapping[str, Row]:
    """Return every row by its id, in the order of the file."""
    document = json.loads(FILE.read_text(encoding="utf-8"))
    return MappingProxyType({row["id"]: Row(**row) for row in document["results"]})


def row(id: str) -> Row:
    """Return one row; an unknown id is the user's mistake."""
    try:
        return published()[id]
    except KeyError:
        raise ConfigError.unknown("published row", id, published()) from None
