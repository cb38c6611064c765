"""A remapping unit with devices, as a user describes it for `vtsim iommu walk`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from attrs import frozen

from vtsim.base.errors import ConfigError, Problem
from vtsim.base.spec import Boolean, Group, Many, Text, addresses, counts, setting, sizes
from vtsim.iommu import spec as sp

MIB, GIB = 2**20, 2**30
LEGACY, SCALABLE = "legacy", "scalable"
FIRST, SECOND, NESTED, PASS_THROUGH = "first-level", "second-level", "nested", "pass-through"
REQUESTER: Final = re.compile(r"([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})\.([0-7])")
RIGHTS: Final = ("none", "r", "w", "rw")
PAGE_SIZES: Final = {4096: 0, 2 * MIB: 1, GIB: 2}


def requester(text: str, field: str = "device") -> int:
    """The source-id of `bus:device.function` in hexadecimal, as lspci prints it; ConfigError for anything else."""
    found = REQUESTER.fullmatch(text)
    if found is None or int(found[2], 16) > 31:
        help = "bus:device.function is accepted, as in 03:02.0"
        raise ConfigError(f"{text!r} is no device", field=field, help=help)
    return int(found[1], 16) << 8 | int(found[2], 16) << 3 | int(found[3])


@frozen(kw_only=True)
class PagesSpec:
    """Consecutive pages that lead to consecutive pages."""

    iova: int = setting(addresses(le=2**57 - 1), "Address before translation of the first page")
    to: int = setting(addresses(le=2**46 - 1), "Address that it leads to")
    count: int = setting(counts(ge=1, le=512), "Number of pages", default=1)
    size: int = setting(sizes(choices=tuple(PAGE_SIZES)), "Page size", default=4096)
    rights: str = setting(Text(choices=RIGHTS), "What may be done there", default="rw")

    def __attrs_post_init__(self) -> None:
        for name in ("iova", "to"):
            address = getattr(self, name)
            if address % self.size:
                below = address - address % self.size
                raise ConfigError(
                    f"{address:#x} is not aligned to the page size",
                    field=name,
                    help=f"the nearest that are: {below:#x} and {below + self.size:#x}",
                )


@frozen(kw_only=True)
class DeviceSpec:
    """A device, or one PASID of it, and what translates its requests."""

    device: str = setting(Text(), "bus:device.function, as in '03:02.0'")
    pasid: int | None = setting(
        counts(le=2**20 - 1, words={"none": None}), "PASID; requests without one when left out", default=None
    )
    domain: int = setting(counts(le=2**16 - 1), "Domain identifier", default=1)
    translation: str = setting(
        Text(choices=(SECOND, FIRST, NESTED, PASS_THROUGH)), "What translates; legacy mode has no first level",
        default=SECOND,
    )  # fmt: skip
    levels: int = setting(counts(ge=3, le=5), "Levels of the tables that `pages` stand in", default=4)
    ats: bool = setting(Boolean(), "The device has a device-TLB", default=False)
    pages: tuple[PagesSpec, ...] = setting(Many(item=Group(spec=PagesSpec)), "What is mapped", default=())
    second_pages: tuple[PagesSpec, ...] = setting(
        Many(item=Group(spec=PagesSpec)), "Nested: what the second level maps", default=()
    )

    def __attrs_post_init__(self) -> None:
        requester(self.device)
        if self.second_pages and self.translation != NESTED:
            raise ConfigError(
                "only nested translation has both levels", field="second_pages", help="translation can be nested"
            )
        if self.levels == 3 and self.translation in (FIRST, NESTED):
            raise ConfigError("first-level tables have 4 or 5 levels", field="levels", help="levels can be 4 or 5")


@frozen(kw_only=True)
class IommuSpec:
    """A remapping unit and its devices."""

    mode: str = setting(Text(choices=(LEGACY, SCALABLE)), "Which tables the unit reads", default=LEGACY)
    memory: int = setting(sizes(ge=16 * MIB, le=64 * GIB), "Physical memory", default=GIB)
    without: tuple[str, ...] = setting(
        Many(item=Text()), "Capabilities that the unit lacks, by the names of CAP and ECAP", default=()
    )
    caches: bool = setting(Boolean(), "The unit has caches", default=True)
    devices: tuple[DeviceSpec, ...] = setting(Many(item=Group(spec=DeviceSpec), least=1), "The devices")

    def __attrs_post_init__(self) -> None:
        problems = list(self._conflicts())
        if problems:
            raise ConfigError.of(problems)

    def _conflicts(self) -> Iterator[Problem]:
        legal = [each.name for row in ("CAP", "ECAP") for each in sp.register(row).fields]
        for number, name in enumerate(self.without):
            if name not in legal:
                unknown = ConfigError.unknown("capability", name, legal)
                yield Problem(
                    message=str(unknown.problems[0].message), path=f"without.{number}", help=unknown.problems[0].help
                )
        known: dict[tuple[int, int], int] = {}
        for number, each in enumerate(self.devices):
            at = f"devices.{number}"
            first = known.setdefault((requester(each.device), each.pasid or 0), number)
            if first != number:
                yield Problem(
                    message=f"devices.{first} says what translates these requests", path=f"{at}.device",
                    help="give one another device"
                    + (", or another pasid (requests without one have 0)" if self.mode == SCALABLE else ""),
                )  # fmt: skip
            if self.mode == LEGACY and each.pasid is not None:
                yield Problem(message="legacy mode has no PASIDs", path=f"{at}.pasid", help="mode can be scalable")
            if self.mode == LEGACY and each.translation in (FIRST, NESTED):
                yield Problem(
                    message=f"legacy mode has no {each.translation} translation", path=f"{at}.translation",
                    help="mode can be scalable",
                )  # fmt: skip
