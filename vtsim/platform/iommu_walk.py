"""One translation of a device's request, step by step: the unit's own kernels on tables that a description names."""

from __future__ import annotations

from typing import Final

from attrs import define, evolve, frozen

from vtsim.base.errors import ConfigError
from vtsim.base.jit import quiet
from vtsim.base.memory import PAGE_BYTES, PAGE_SHIFT, PAGE_WORDS, allocate, give_contents, is_memory
from vtsim.ept.tables import Table, Words
from vtsim.iommu import entries as e
from vtsim.iommu import faults as f
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.kernels.requests import translate_request
from vtsim.iommu.kernels.unit_registers import write_unit_register
from vtsim.iommu.tables import (
    Memory,
    Structures,
    domain_table,
    guest_table,
    process_table,
)
from vtsim.iommu.unit import Capabilities, RemappingUnit
from vtsim.platform.iommu_spec import (
    FIRST,
    LEGACY,
    NESTED,
    PAGE_SIZES,
    PASS_THROUGH,
    SCALABLE,
    DeviceSpec,
    IommuSpec,
    PagesSpec,
    requester,
)
from vtsim.platform.machine import Machine
from vtsim.platform.observed import Observed
from vtsim.platform.spec import Scenario

ACCESSES: Final = {"read": sp.READ, "write": sp.WRITE, "execute": sp.READ | sp.EXECUTE, "atomic": sp.WRITE | sp.ATOMIC}
REQUESTS: Final = {"untranslated": 0, "translation": 1, "translated": 2}
ARGUMENTS: Final = ("device", "access", "request", "pasid")
STRUCTURES: Final = {
    st.STEP_ROOT: "root entry",
    st.STEP_CONTEXT: "context entry",
    st.STEP_DIRECTORY: "PASID directory entry",
    st.STEP_PASID: "PASID table entry",
}
PAGING: Final = ("", "PTE", "PDE", "PDPTE", "PML4E", "PML5E")
GUEST_TABLES: Final = 1 << 24  # guest frames of a guest's own tables
GUEST_FRAMES: Final = 1 << 14  # at most
SMALL_DIRECTORY: Final = 1 << 15  # PASIDs of a directory of one page
MOST_TABLES: Final = 1 << 16  # pages


@frozen(kw_only=True)
class Step:
    """An entry that was read, a cache that answered, or a flag that was set: its name, where, and the word."""

    what: str
    level: int
    hpa: int | None
    value: int
    served: str


@frozen(kw_only=True)
class IommuWalk:
    """How one request was translated."""

    device: str
    sid: int
    pasid: int | None
    address: int
    access: str
    request: str
    mode: str
    steps: tuple[Step, ...]
    status: str
    hpa: int | None
    rights: str
    page_bytes: int
    snoop: bool
    fault: int | None
    condition: str
    title: str
    recorded: bool
    reads: dict[str, int]


def observe_request(
    spec: IommuSpec,
    device: str,
    address: int,
    *,
    pasid: int | None = None,
    access: str = "read",
    privileged: bool = False,
    request: str = "untranslated",
    warm: bool = False,
) -> IommuWalk:
    """Build what the description says and translate one request; with `warm` the same request went before.

    Raises `ConfigError` for a request that cannot be made, and for pages that lie beyond memory or over others.
    """
    asked = Request(
        device=device, sid=requester(device), address=address, pasid=pasid, access=access, privileged=privileged,
        request=request,
    )  # fmt: skip
    memory = _TableMemory(spec.memory, min(MOST_TABLES, spec.memory >> PAGE_SHIFT))
    structures = _structures(spec, memory)
    unit = RemappingUnit(
        memory.arena,
        Capabilities().without(*spec.without),
        st.Caches() if spec.caches else st.Caches.none(),
    )
    write = Observed(lambda caller, callee, function: function).copy(write_unit_register)
    with quiet():
        write(unit.u, memory.arena, sp.RTADDR, 8, structures.rtaddr)
        for command in (sp.SRTP, sp.TE):
            write(unit.u, memory.arena, sp.GCMD, 4, command)
    return asked.observed(unit, warm=warm)


def observe_in_scenario(
    scenario: Scenario,
    device: str,
    address: int,
    *,
    after: int = 0,
    pasid: int | None = None,
    access: str = "read",
    privileged: bool = False,
    request: str = "untranslated",
    warm: bool = False,
) -> IommuWalk:
    """Translate one request of a device of a scenario, by name or source-id, before the run or `after` so many ns.

    Raises `ConfigError` for a device that is not there and for a machine whose unit is off.
    """
    by_name = {each.name: each.source for each in scenario.dma}
    sources = [*by_name, *by_name.values()]
    if device not in sources:
        raise ConfigError.unknown("device", device, sources, field="device")
    if scenario.machine.iommu.mode == "off":
        raise ConfigError("the remapping unit of this machine is off", field="device", help="see machine.iommu.mode")
    source = by_name.get(device, device)
    asked = Request(
        device=device, sid=requester(source), address=address, pasid=pasid, access=access, privileged=privileged,
        request=request,
    )  # fmt: skip
    machine = Machine(evolve(scenario, run=evolve(scenario.run, limit=after)) if after else scenario)
    if after:
        machine.run()
    devices = machine.devices or machine.driven
    assert devices is not None
    return asked.observed(devices.unit, warm=warm)


@frozen(kw_only=True)
class Request:
    """What is asked of a unit; `ConfigError` for kinds that there are not."""

    device: str
    sid: int
    address: int
    pasid: int | None = None
    access: str = "read"
    privileged: bool = False
    request: str = "untranslated"

    def __attrs_post_init__(self) -> None:
        for name, chosen, legal in (("access", self.access, ACCESSES), ("request", self.request, REQUESTS)):
            if chosen not in legal:
                raise ConfigError.unknown(name, chosen, legal, field=name)

    def observed(self, unit: RemappingUnit, *, warm: bool) -> IommuWalk:
        """Translate it; with `warm` the same request went before."""
        translate = Observed(lambda caller, callee, function: function).copy(translate_request)
        words = ACCESSES[self.access] | (sp.PRIVILEGED if self.privileged else 0)
        pasid = sp.NO_PASID if self.pasid is None else self.pasid
        size = min(4, PAGE_BYTES - self.address % PAGE_BYTES)  # a request crosses no page
        with quiet():
            unit.u[st.STEPS] = 1
            for _ in range(2 if warm else 1):
                translate(
                    unit.u, unit.arena, self.sid, pasid, _signed(self.address), size, words, REQUESTS[self.request]
                )
        return _walk(self, unit)


def _walk(asked: Request, unit: RemappingUnit) -> IommuWalk:
    answer = unit.answer()
    done = answer.status == st.COMPLETED
    fault = f.BY_CODE.get(answer.reason)
    scalable = int(unit.u[st.ROOT_TABLE]) >> 10 & 3 == sp.TTM_SCALABLE
    return IommuWalk(
        device=asked.device,
        sid=asked.sid,
        pasid=asked.pasid,
        address=asked.address,
        access=("privileged " if asked.privileged else "") + asked.access,
        request=asked.request,
        mode=SCALABLE if scalable else LEGACY,
        steps=tuple(_steps(unit)),
        status=st.STATUSES[answer.status],
        hpa=answer.hpa if done else None,
        rights="".join(letter if answer.rights >> bit & 1 else "-" for bit, letter in enumerate("rwx")),
        page_bytes=1 << answer.shift if done else 0,
        snoop=answer.snoop,
        fault=None if fault is None else fault.code,
        condition="" if fault is None else fault.condition,
        title="" if fault is None else fault.title,
        recorded=answer.recorded,
        reads=answer.reads,
    )


def _signed(address: int) -> int:
    return address - (1 << 64) if address >> 63 else address


def _steps(unit: RemappingUnit) -> list[Step]:
    steps = []
    for number in range(int(unit.u[st.STEP_COUNT])):
        at = st.STEP_AREA + number * st.STEP_WORDS
        kind, level, where, value = (int(word) for word in unit.u[at : at + st.STEP_WORDS])
        value &= (1 << 64) - 1
        if kind == st.STEP_CACHE:
            steps.append(Step(what="", level=level, hpa=None, value=value, served=st.CACHE_TITLES[where]))
            continue
        names = {st.STEP_FIRST: f"first-level {PAGING[level]}", st.STEP_SECOND: f"second-level {PAGING[level]}"}
        what = STRUCTURES.get(kind) or names.get(kind, "flags set")
        steps.append(Step(what=what, level=level, hpa=where, value=value, served="memory"))
    return steps


@define(eq=False)
class _TableMemory(Memory):
    """Memory for the tables of a description; `ConfigError` where they do not fit."""

    def allocate(self) -> int:
        """The next free frame."""
        hfn = int(allocate(self.arena))
        if hfn < 0:
            raise ConfigError("the tables of the devices do not fit", field="memory", help="memory can be larger")
        return hfn

    def contents(self, hfn: int, kind: int) -> Words:
        """The 512 words of a table."""
        at = int(give_contents(self.arena, hfn, kind))
        if at < 0:
            most = f"{self.pool_pages:,} tables are accepted: fewer devices, or larger pages, need fewer"
            raise ConfigError("the devices have more tables than are kept here", field="devices", help=most)
        return self.arena[at : at + PAGE_WORDS]


def _structures(spec: IommuSpec, memory: Memory) -> Structures:
    structures = Structures(memory, scalable=spec.mode == SCALABLE)
    enabled: set[int] = set()
    for number, each in enumerate(spec.devices):
        first, second = _tables(each, memory, f"devices.{number}")
        sid = requester(each.device)
        if not structures.scalable:
            structures.attach(sid, second, each.domain, devices=each.ats)
            continue
        if sid not in enabled:
            mine = [device for device in spec.devices if requester(device.device) == sid]
            structures.enable(
                sid,
                directory_size=7 if any((device.pasid or 0) >= SMALL_DIRECTORY for device in mine) else 2,
                flags=e.PASIDE | (e.DTE if any(device.ats for device in mine) else 0),
            )
            enabled.add(sid)
        structures.assign(
            sid, each.pasid or 0, each.domain, first=first, second=second, middle=e.PWSNP, high=e.SRE | e.ERE | e.WPE
        )  # fmt: skip
    return structures


def _tables(each: DeviceSpec, memory: Memory, where: str) -> tuple[Table | None, Table | None]:
    if each.translation == PASS_THROUGH:
        return None, None
    if each.translation == FIRST:
        first = process_table(memory, each.levels)
        _map(first, each.pages, memory, f"{where}.pages", first=True)
        return first, None
    if each.translation == NESTED:
        second = domain_table(memory)
        _map(second, each.second_pages, memory, f"{where}.second_pages", outer=True)
        first = guest_table(memory, second, GUEST_TABLES, each.levels)
        _map(first, each.pages, None, f"{where}.pages", first=True)
        return first, second
    second = domain_table(memory, each.levels)
    _map(second, each.pages, memory, f"{where}.pages")
    return None, second


def _map(
    table: Table,
    pages: tuple[PagesSpec, ...],
    memory: Memory | None,
    where: str,
    *,
    first: bool = False,
    outer: bool = False,
) -> None:
    for number, each in enumerate(pages):
        field = f"{where}.{number}"
        if first:
            rights = 0 if each.rights == "none" else e.PRESENT | e.FL_US | (e.FL_RW if "w" in each.rights else 0)
        else:
            rights = ("r" in each.rights and each.rights != "none") * e.SL_R | ("w" in each.rights) * e.SL_W
        last = each.to + each.count * each.size - 1
        if each.iova + each.count * each.size > 1 << (12 + 9 * table.levels):
            raise ConfigError(
                f"pages end beyond what {table.levels} levels translate",
                field=f"{field}.iova",
                help=f"the last byte can be at {(1 << (12 + 9 * table.levels)) - 1:#x}",
            )
        ends = each.iova + each.count * each.size
        if outer and each.iova >> PAGE_SHIFT < GUEST_TABLES + GUEST_FRAMES and (ends >> PAGE_SHIFT > GUEST_TABLES):
            first_byte, after = GUEST_TABLES << PAGE_SHIFT, GUEST_TABLES + GUEST_FRAMES << PAGE_SHIFT
            raise ConfigError(
                "the guest's own tables stand there",
                field=f"{field}.iova",
                help=f"pages can be below {first_byte:#x}, or from {after:#x} on",
            )
        if memory is not None and each.rights != "none" and not is_memory(memory.arena, last):
            raise ConfigError(f"{last:#x} is beyond memory", field=f"{field}.to", help="memory can be larger")
        if any(table.find(each.iova + n * each.size) for n in range(each.count)):
            raise ConfigError(
                "pages are mapped there already", field=f"{field}.iova", help="give pages that do not overlap"
            )
        frame, step = each.to >> PAGE_SHIFT, each.size >> PAGE_SHIFT
        table.map(each.iova, [frame + n * step for n in range(each.count)], rights, PAGE_SIZES[each.size])
