"""What runs recorded cases on the model: one driver per kind of case, registered by the module that has it.

A driver takes a case and its environment and returns what the model did in the format of the recordings, with
integers for numbers and field-table names for VMCS fields: one outcome, or the outcomes of the first run and of all
that followed it. It raises `Skipped` with a reason for a case that it cannot set up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from vtsim.base.registry import Registry
from vtsim.study.vmx.cases import Case, Environment

Outcome = Mapping[str, Any]
Driver = Callable[[Case, Environment], Outcome | Sequence[Outcome]]


class Skipped(Exception):
    """This case cannot be run; the text says why."""


drivers: Final[Registry[str, Driver]] = Registry("kind of recorded case")
"""By kind of case: `ENTRY`, `EXIT`, `ROOT`."""
