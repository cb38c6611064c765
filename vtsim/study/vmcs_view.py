"""VMCS fields and what they hold, as tables and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import attrs
from rich.console import Group, RenderableType
from rich.text import Text

from vtsim.base.errors import ConfigError
from vtsim.platform.vmcs import VcpuVmcs
from vtsim.study.table import section
from vtsim.vmcs.capabilities import FEATURES, MSR_NAMES
from vtsim.vmcs.events import VALID
from vtsim.vmcs.fields import BY_NAME, FIELDS, Area, Field, Width
from vtsim.vmcs.meaning import SEGMENT_PARTS, SEGMENTS, groups, meaning
from vtsim.vmcs.reasons import EXCEPTION_NMI

ENCODING: Final = re.compile(r"0X[0-9A-F]{1,8}|[0-9A-F]{4}")
WIDTHS: Final = {Width.W16: "16", Width.W64: "64", Width.W32: "32", Width.NATURAL: "natural"}
AREAS: Final = {
    Area.CONTROL: "control",
    Area.EXIT_INFO: "VM-exit information",
    Area.GUEST: "guest state",
    Area.HOST: "host state",
}


# --- the field table ------------------------------------------------------------------------------------------------


def matching(pattern: str) -> tuple[Field, ...]:
    """The fields whose name contains a pattern, or whose encoding it is (the high half's too; 0x is not needed)."""
    wanted = pattern.strip().upper()
    encoding = int(wanted, 16) if ENCODING.fullmatch(wanted) else -1
    found = tuple(f for f in FIELDS if wanted in f.name or encoding in (f.encoding, f.high_encoding))
    if not found:
        raise ConfigError(
            f"no VMCS field matches {pattern!r}",
            field="PATTERN",
            help="a part of a name is accepted, as in GUEST_CS, or an encoding, as in 0x681e or 681e",
        )
    return found


def fields_table(pattern: str) -> RenderableType:
    """The fields that match, by area: encoding (and that of the upper half), bits, access, which controls bring it."""
    found = matching(pattern)
    parts: list[RenderableType] = []
    for area in Area:
        fields = [field for field in found if field.area is area]
        if not fields:
            continue
        parts += [Text("")] if parts else []
        heading = f"{AREAS[area]} fields"
        table = section(heading[0].upper() + heading[1:], ("encoding", "bits"))
        table.add_column("access")
        table.add_column("exists with", overflow="fold")
        for field in fields:
            high = f"/{field.high_encoding & 0xF:x}" if field.high_encoding else "  "
            access = "read" if field.read_only else "full"
            table.add_row(
                field.name, f"0x{field.encoding:04x}{high}", WIDTHS[field.width],
                f"{access}+high" if field.high_encoding else access, " or ".join(field.needs),
            )  # fmt: skip
        parts.append(table)
    return Group(*parts)


def fields_json(pattern: str) -> str:
    """The same as a JSON array."""
    return json.dumps({"fields": [_field_object(field) for field in matching(pattern)]}, indent=1)


def _field_object(field: Field) -> dict[str, Any]:
    return {
        "encoding": f"0x{field.encoding:04x}",
        "high_encoding": f"0x{field.high_encoding:04x}" if field.high_encoding else None,
        "name": field.name,
        "bits": field.bits,
        "width": WIDTHS[field.width],
        "area": AREAS[field.area],
        "read_only": field.read_only,
        "exists_with": [
            {"feature": name, "msr": MSR_NAMES[FEATURES[name].msr], "bit": FEATURES[name].bit} for name in field.needs
        ],
    }


# --- what a VMCS holds ----------------------------------------------------------------------------------------------


def vmcs_json(shown: Sequence[VcpuVmcs]) -> str:
    """Each VMCS as an object, numbers as hexadecimal strings, with the words beside them."""
    return json.dumps({"vmcs": [_vmcs_object(one) for one in shown]}, indent=1)


def _vmcs_object(one: VcpuVmcs) -> dict[str, Any]:
    plain = attrs.asdict(one)
    plain["address"] = hex(one.address)
    plain["fields"] = {
        name: {"value": hex(value), "meaning": meaning(name, one.fields)} for name, value in one.fields.items()
    }
    return plain


def vmcs_text(shown: Sequence[VcpuVmcs]) -> RenderableType:
    """Each VMCS in the groups of the manual, with control bits, access rights and reasons in words."""
    return Group(*(part for one in shown for part in _parts(one)))


def _parts(one: VcpuVmcs) -> Iterator[RenderableType]:
    yield Text(f"VMCS of {one.vm}, at cycle {one.cycle:,}", style="bold")
    state = ["launched" if one.launched else "clear", "current" if one.current else "not current"]
    yield Text(f"region 0x{one.address:x}, revision 0x{one.revision:x}, CPU {one.cpu}, {', '.join(state)}")
    if one.nonroot:
        yield Text("The CPU is in non-root operation: guest state is that of the last VM exit.")
    if not one.launched:
        yield Text("No VM entry has been made with it yet.")
    elif one.fields["EXIT_REASON"] == EXCEPTION_NMI and not one.fields["EXIT_INTERRUPTION_INFORMATION"] & VALID:
        yield Text("The guest came to its end in non-root operation and was switched off: that was no VM exit.")
    areas = {name: BY_NAME[name].area.name for name in one.fields}
    for title, names in groups(areas):
        yield Text("")
        if title == "Guest-state area":
            yield _segments(one)
            yield Text("")
            names = [name for name in names if not _of_segment(name)]
        yield _group(title, names, one)
    yield Text("")


def _of_segment(name: str) -> bool:
    return any(name == f"GUEST_{segment}_{part}" for segment in SEGMENTS for part in SEGMENT_PARTS)


def _segments(one: VcpuVmcs) -> RenderableType:
    table = section("Guest segments", ("selector", "base", "limit", "rights"))
    table.add_column("")
    for segment in SEGMENTS:
        selector, base, limit, rights = (one.fields[f"GUEST_{segment}_{part}"] for part in SEGMENT_PARTS)
        table.add_row(
            segment, f"{selector:04x}", f"{base:x}", f"{limit:08x}", f"{rights:05x}",
            meaning(f"GUEST_{segment}_ACCESS_RIGHTS", one.fields),
        )  # fmt: skip
    return table


def _group(title: str, names: Sequence[str], one: VcpuVmcs) -> RenderableType:
    table = section(title, ("",))
    table.add_column("")
    for name in names:
        table.add_row(name, f"0x{one.fields[name]:x}", meaning(name, one.fields))
    return table
