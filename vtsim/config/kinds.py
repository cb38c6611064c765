"""What a setting of a study may be, beyond what settings of scenarios may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.base.spec import Kind
from vtsim.base.units import LARGEST, quantity, shown


@frozen(kw_only=True)
class Anything:
    """A value that only the scenario it is put into can judge."""

    def convert(self, value: Any) -> Any:
        return value

    def plain(self, value: Any) -> Any:
        return value

    def schema(self) -> dict[str, Any]:
        return {}

    def accepted(self) -> str:
        return "value"


@frozen(kw_only=True)
class Amount:
    """A number of whatever dimension, in base units inside; an optional one may be left out."""

    optional: bool = False

    def convert(self, value: Any) -> int | float | None:
        if value is None and self.optional:
            return None
        number = quantity(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int | float) or abs(number) > LARGEST:
            raise ConfigError(
                f"{shown(value)} is not a number", help="write a number, or one with a unit as in '4 KiB'"
            )
        return number

    def plain(self, value: Any) -> Any:
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": ["number", "string", *(["null"] if self.optional else [])]}

    def accepted(self) -> str:
        return "number"


@frozen(kw_only=True)
class ByPath:
    """A mapping from paths of settings, as after `--set`, to values of one kind."""

    item: Kind = attrs.field(factory=Anything)
    least: int = 0

    def convert(self, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{shown(value)} is not a mapping", help="write PATH: VALUE, as in vmm.paging: ept")
        if len(value) < self.least:
            raise ConfigError("it is empty", help="write PATH: VALUE, as in vmm.paging: ept")
        return {str(path): self.item.convert(each) for path, each in value.items()}

    def plain(self, value: Any) -> Any:
        return {path: self.item.plain(each) for path, each in value.items()}

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self.item.schema(), "minProperties": self.least}

    def accepted(self) -> str:
        return f"mapping of paths to {self.item.accepted()}"
