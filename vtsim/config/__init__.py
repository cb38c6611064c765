"""Scenarios as text: read with every error at once and its line, written fully resolved."""

from vtsim.config.checks import resolve
from vtsim.config.load import dump, is_study, load_scenario, located, parse_scenario, reader
from vtsim.config.reference import reference
from vtsim.config.schema import schema, study_schema_text

__all__ = [
    "dump",
    "is_study",
    "load_scenario",
    "located",
    "parse_scenario",
    "reader",
    "reference",
    "resolve",
    "schema",
    "study_schema_text",
]
