"""A translated request of a device as text and as JSON."""

from __future__ import annotations

import json
from typing import Any, Final

import attrs
from rich.console import Group, RenderableType
from rich.text import Text

from vtsim.base.units import SIZE
from vtsim.platform.iommu_walk import IommuWalk, Step
from vtsim.study.table import section

HEXADECIMAL: Final = ("address", "hpa", "value", "fault")


def outcome(walk: IommuWalk) -> str:
    """How the request ended, in one line."""
    if walk.fault is not None:
        recorded = "recorded" if walk.recorded else "not recorded"
        return f"blocked, {recorded}: fault reason {walk.fault:#04x} ({walk.condition}): {walk.title}"
    if walk.hpa is None:
        return walk.status
    if walk.rights == "---":
        return "completed without rights: there is no translation, and no fault"
    snoop = ", snooped" if walk.snoop else ""
    return (
        f"host-physical address {walk.hpa:#x} in a page of {SIZE.format(walk.page_bytes)}, rights {walk.rights}{snoop}"
    )


def totals(walk: IommuWalk) -> str:
    """How many entries were read, per structure."""
    parts = [f"{count} {name}" for name, count in walk.reads.items() if count]
    total = sum(walk.reads.values())
    return f"{total} memory read{'s' * (total != 1)}" + (f": {', '.join(parts)}" if parts else "")


def iommu_text(walk: IommuWalk) -> RenderableType:
    """The steps of a request as a table, and its end."""
    pasid = "" if walk.pasid is None else f", PASID {walk.pasid}"
    head = f"{walk.address:#x}: {walk.request} {walk.access} request of {walk.device}{pasid}, {walk.mode} mode"
    table = section("#", ("at hpa", "value"))
    table.columns[0].justify = "right"
    table.add_column("entry", no_wrap=True)
    table.add_column("from")
    number = 0
    for step in walk.steps:
        number += step.hpa is not None
        table.add_row(*_row(step, number))
    style = "bold" if walk.fault is None and walk.hpa is not None else "bold red"
    return Group(
        Text(head, style="bold"), Text(""), table, Text(""), Text(outcome(walk), style=style), Text(totals(walk))
    )


def _row(step: Step, number: int) -> tuple[str, str, str, str, str]:
    if step.hpa is None:
        return "", "", f"{step.value:#x}", "", step.served
    return str(number), f"{step.hpa:#x}", f"{step.value:#x}", step.what, step.served


def iommu_json(walk: IommuWalk) -> str:
    """The request as one object; addresses, words and codes are hexadecimal strings."""
    return json.dumps({"walk": _plain(attrs.asdict(walk))}, indent=1)


def _plain(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _plain(each, key) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return hex(value) if name in HEXADECIMAL and isinstance(value, int) else value
