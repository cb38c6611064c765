"""Scenarios as text: read with every error at once and its line, written fully resolved."""

from vtsim.config.checks import resolve
from vtsim.config.load import dump, is_study, load_scenario, located, parse_scenario, path_of, reader, scenario_of
from vtsim.config.reference import reference
from vtsim.config.schema import schema, study_schema_text

__all__ = [
    "dump",
    "is_study",
    "load_scenario",
    "located",
    "parse_scenario",
    "path_of",
    "reader",
    "reference",
    "resolve",
    "scenario_of",
    "schema",
    "study_schema_text",
]
