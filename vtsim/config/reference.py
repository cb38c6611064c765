"""The scenario reference, generated from the specs: docs/scenario.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from vtsim.base.spec import Group, kind_of, settings
from vtsim.base.units import DIMENSIONS
from vtsim.config.schema import default_of, specs_inside
from vtsim.platform.spec import Scenario

INTRODUCTION = """\
# Scenario reference

Generated from the specs; do not edit. A scenario is a YAML file. Only `vms` must be given:

```yaml
vms:
  - guest:
      processes:
        - phases:
            - {primitive: cpuid}
```

`--set path=value` replaces one value: `--set machine.profile=snb-e5-2450`, `--set vms.0.memory="2 GiB"`.

## Units

A plain number is in the base unit.

| quantity | base unit | units | example |
|---|---|---|---|
"""


def reference() -> str:
    """Return the reference as markdown."""
    units = "".join(
        f"| {d.name} | {d.base or '1'} | {', '.join(u for u in d.units if u)} | `{d.example}` |\n" for d in DIMENSIONS
    )
    return INTRODUCTION + units + "".join(_section(Scenario, "The scenario", set()))


def _section(spec: type[Any], title: str, seen: set[str]) -> Iterator[str]:
    if spec.__name__ in seen:
        return
    seen.add(spec.__name__)
    fields = settings(spec)
    yield f"\n## {title}\n\n{(spec.__doc__ or '').partition(chr(10))[0]}\n"
    if fields:
        yield "\n| key | what | default | meaning |\n|---|---|---|---|\n"
    for name, field in fields.items():
        accepted = kind_of(field).accepted().replace("|", "\\|")
        yield f"| `{name}` | {accepted} | {_default(field)} | {field.metadata['doc']} |\n"
    for name, field in fields.items():
        for inner, tag, value in specs_inside(kind_of(field)):
            path = f"{title}.{name}" if title != "The scenario" else name
            yield from _section(inner, f"`{tag}: {value}`" if tag else f"`{path.replace('`', '')}`", seen)


def _default(field: attrs.Attribute[Any]) -> str:
    default = default_of(field)
    if default is attrs.NOTHING:
        return "must be given"
    if isinstance(kind_of(field), Group):
        return ""
    if default is None or default == "" or isinstance(default, dict | list):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
