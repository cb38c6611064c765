"""The JSON Schemas of a scenario and of a study, so that editors complete and check them."""

from __future__ import annotations

import json
from typing import Any, Final

import attrs

from vtsim.base.errors import ConfigError
from vtsim.base.spec import Group, Kind, Many, Tagged, kind_of, settings
from vtsim.config.kinds import ByPath
from vtsim.config.study_spec import StudySpec
from vtsim.platform.spec import Scenario

FILES: Final[dict[str, type[Any]]] = {"scenario": Scenario, "study": StudySpec}


def schema(file: str = "scenario") -> dict[str, Any]:
    """Return the schema of a scenario or a study, generated from the specs; raises `ConfigError` for another file."""
    if file not in FILES:
        raise ConfigError.unknown("kind of file", file, FILES)
    definitions: dict[str, Any] = {}
    _define(FILES[file], definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"vtsim {file}",
        "$ref": f"#/$defs/{FILES[file].__name__}",
        "$defs": dict(sorted(definitions.items())),
    }


def study_schema_text() -> str:
    """Return the schema of a study as docs/study.schema.json has it."""
    return json.dumps(schema("study"), indent=1, ensure_ascii=False) + "\n"


def default_of(field: attrs.Attribute[Any]) -> Any:
    """Return a default as a user would write it; `NOTHING` when the key must be given."""
    if field.default is attrs.NOTHING:
        return attrs.NOTHING
    default: Any = field.default
    value = default if not hasattr(default, "factory") else default.factory()
    return kind_of(field).plain(kind_of(field).convert(value))


def specs_inside(kind: Kind) -> list[tuple[type[Any], str | None, str | None]]:
    """Return the specs that a value of this kind is made of, with tag and its value when it has one."""
    match kind:
        case Group():
            return [(kind.spec, None, None)]
        case Many() | ByPath():
            return specs_inside(kind.item)
        case Tagged():
            return [(spec, kind.tag, name) for name, spec in kind.registry.items()]
    return []


def _define(spec: type[Any], definitions: dict[str, Any], tag: str | None = None, name: str | None = None) -> None:
    if spec.__name__ in definitions:
        return
    properties: dict[str, Any] = {tag: {"const": name}} if tag else {}
    required = [tag] if tag else []
    definitions[spec.__name__] = {}
    for key, field in settings(spec).items():
        default = default_of(field)
        properties[key] = {**kind_of(field).schema(), "description": field.metadata["doc"]}
        if default is attrs.NOTHING:
            required.append(key)
        else:
            properties[key]["default"] = default
        for inner in specs_inside(kind_of(field)):
            _define(inner[0], definitions, *inner[1:])
    definitions[spec.__name__] = {
        "description": (spec.__doc__ or "").partition("\n")[0],
        "type": "object" if required else ["object", "null"],
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
