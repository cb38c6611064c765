"""`vtsim walk`: what is shown is what the engine did."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as xml
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

import vtsim
from vtsim.base.errors import ConfigError
from vtsim.cli import main
from vtsim.config import load_scenario
from vtsim.cpu import accounts as k
from vtsim.cpu import slots as s
from vtsim.cpu.engine import Engine
from vtsim.cpu.kernels import ept_walk
from vtsim.ept.spec import ADDRESS
from vtsim.guest.kernel.layout import LONG
from vtsim.platform import steps
from vtsim.platform.steps import EPT, GUEST, SHADOW, WALK_CACHE, Recorder
from vtsim.platform.walk import EVERY_ENTRY, FAULTS, PAGE_FAULT, Walk
from vtsim.study import walk_view
from vtsim.vmcs.state import CR3_SWITCHES

AT = 0x10_0000_0000  # of the first region
ENTRY_CACHE = (
    "machine.cpu.features.entry_walk_cache=true", "machine.cpu.nested_tlb.entries=0", "machine.cpu.pwc.pde.ways=32",
)  # fmt: skip
SMALL = """
machine: {memory: 256 MiB}
vmm: {ept: {page_size: %s, populate: %s}}
vms:
- memory: 64 MiB
  guest:
    kernel: {tick: off, page_size: %s, populate: prebuilt}
    processes:
    - name: reader
      phases: [{primitive: stream, region: 8 MiB, accesses: 100}]
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: object) -> tuple[int, str, str]:
        status = main(["walk", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


@pytest.fixture
def scenario(tmp_path: Path) -> Callable[..., Path]:
    def write(ept: str = "4 KiB", guest: str = "4 KiB", populate: str = "prebuilt") -> Path:
        path = tmp_path / "small.yaml"
        path.write_text(SMALL % (ept, populate, guest))
        return path

    return write


def counted(found: Walk) -> tuple[int, int]:
    """Entries read of the guest's structures and of EPT."""
    dimensions = [reference.dimension for reference in found.references if reference.served != WALK_CACHE]
    return dimensions.count(GUEST), dimensions.count(EPT)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("pcid", [True, False])
def test_with_kpti_ring_3_has_a_root_of_its_own_in_which_the_kernel_is_not(
    scenario: Callable[..., Path], pcid: bool, native: bool
) -> None:
    sets = ("vms.0.guest.kernel.kpti=true", f"machine.cpu.features.pcid={str(pcid).lower()}", *EVERY_ENTRY)

    def shown(address: int, ring: int) -> Walk:
        return vtsim.walk(scenario(), address, ring=ring, sets=sets, native=native)

    of_kernel, of_user = shown(AT, 0), shown(AT, 3)
    assert of_user.cr3 - of_kernel.cr3 == 0x1000 + (0x800 if pcid else 0)
    assert (of_user.hpa, of_user.fault) == (of_kernel.hpa, "")
    direct = 0xFFFF_8880_0000_0000 + 0x10_0000
    assert shown(direct, 0).fault == ""
    missing = shown(direct, 3)
    assert missing.fault == PAGE_FAULT and missing.error_code == 4  # of user mode, not present
    assert len(missing.levels) == 1


@pytest.mark.parametrize(
    ("address", "ring"), [(0x1000, 3), ((1 << 47) - 1, 3), (1 << 47, 3), (0xFFFF_8000_0000_0000, 0), (1 << 63, 0)]
)
def test_the_half_of_the_address_space_decides_the_ring(scenario: Callable[..., Path], address: int, ring: int) -> None:
    assert vtsim.walk(scenario(), address, native=True).ring == ring


@pytest.mark.parametrize(("ept", "h"), [("4 KiB", 4), ("2 MiB", 3)])
@pytest.mark.parametrize(("guest", "g"), [("4 KiB", 4), ("2 MiB", 3)])
def test_without_walk_caches_every_crossing_of_the_dimensions_is_read(
    scenario: Callable[..., Path], ept: str, h: int, guest: str, g: int
) -> None:
    found = vtsim.walk(scenario(ept, guest), AT + 0x123, sets=EVERY_ENTRY)

    assert counted(found) == (g, (g + 1) * (h + 1) - 1 - g)
    assert [r.number for r in found.references] == list(range(1, (g + 1) * (h + 1)))
    assert [level.level for level in found.levels] == [*range(4, 4 - g, -1), 0]
    assert found.hpa is not None
    assert found.hpa & 0xFFF == 0x123


def test_natively_one_entry_is_read_for_each_level(scenario: Callable[..., Path]) -> None:
    found = vtsim.walk(scenario(), AT, native=True)

    assert counted(found) == (4, 0)
    assert found.technique == "native"


@pytest.mark.parametrize(
    "sets", [(), EVERY_ENTRY, ENTRY_CACHE], ids=["with walk caches", "every entry", "with a cache of entries"]
)
@pytest.mark.parametrize("access", ["read", "write", "fetch"])
def test_the_steps_account_for_every_cycle_and_are_those_that_the_engine_counts(
    scenario: Callable[..., Path], sets: tuple[str, ...], access: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[tuple[Engine, dict[int, int]]] = []
    translate = Recorder.translate

    def watched(self: Recorder, engine: Engine, *more: Any) -> int:
        owner = int(engine.cpus[0][s.OWNER])
        counters = (k.GUEST_REFERENCES, k.EPT_REFERENCES, k.WALK_CYCLES)
        before = {n: int(engine.arena[owner + n]) for n in counters}
        got = translate(self, engine, *more)
        engines.append((engine, {n: int(engine.arena[owner + n]) - before[n] for n in counters}))
        return got

    monkeypatch.setattr(Recorder, "translate", watched)
    address = 0x400000 if access == "fetch" else AT
    found = vtsim.walk(scenario(), address, access=access, sets=sets)
    caches = found.cache_cycles + sum(n.cache_cycles for level in found.levels for n in level.nested)
    ((engine, counts),) = engines
    walk = found.start_cycles + sum(r.cycles for r in found.references) + caches

    assert walk == counts[k.WALK_CYCLES] > 0
    assert found.cycles == walk + found.look_up_cycles == walk + engine.profile.tlb.stlb.hit_cycles
    assert counted(found) == (counts[k.GUEST_REFERENCES], counts[k.EPT_REFERENCES])


def test_a_walk_cache_of_entries_is_shown_at_each_entry_that_it_held(scenario: Callable[..., Path]) -> None:
    found = vtsim.walk(scenario(), AT, sets=ENTRY_CACHE)
    held = [r for r in found.references if r.served == WALK_CACHE]

    assert len(found.references) == 5 * 5 - 1  # no level is saved
    assert held
    assert all(r.level > 1 for r in held)
    assert f"walk cache {len(held)}, " in walk_view.totals(found)


def test_an_entry_names_the_table_that_the_next_is_read_from(scenario: Callable[..., Path]) -> None:
    found = vtsim.walk(scenario(), AT, sets=EVERY_ENTRY)
    entries = [level.entry for level in found.levels if level.entry is not None]

    for upper, lower in itertools.pairwise(entries):
        assert upper.value >> 12 & (1 << 40) - 1 == (lower.gpa or 0) >> 12
    for level in found.levels:
        for nested in level.nested:
            for upper, lower in itertools.pairwise(nested.references):
                assert upper.value >> 12 & (1 << 40) - 1 == lower.hpa >> 12


@pytest.mark.parametrize("width", [80, 120])
def test_the_text_is_as_agreed(
    run: Run,
    scenario: Callable[..., Path],
    width: int,
    monkeypatch: pytest.MonkeyPatch,
    golden: Callable[[str, str], None],
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    status, out, err = run("--scenario", scenario(), "--address", hex(AT))

    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= width
    golden(f"walk_{width}.txt", out)


@pytest.mark.parametrize("width", [40, 60, 75])
def test_a_narrow_text_keeps_order_source_and_cycles_of_every_step(
    run: Run, scenario: Callable[..., Path], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an entry holds goes before what served it and what that took; the grid keeps the order."""
    monkeypatch.setenv("COLUMNS", "120")
    _, full, _ = run("--scenario", scenario(), "--address", hex(AT))
    monkeypatch.setenv("COLUMNS", str(width))
    status, out, err = run("--scenario", scenario(), "--address", hex(AT))

    def steps(text: str) -> list[tuple[str, str, str]]:
        lines = text[text.index("─") :].split("\n\n")[0].splitlines()[1:]
        return [(w[0], w[1] + w[2], w[-1]) for line in lines if (w := line.split()) and w[0].isdecimal()]

    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= width
    assert steps(out) == steps(full)
    grid = re.findall(r"\b\d+\b", out[out.index("guest PML4E") : out.index("#")])
    assert grid == [number for number, _, _ in steps(full)]


def test_an_unmapped_address_is_shown_with_its_fault_and_what_is_mapped(
    run: Run, scenario: Callable[..., Path]
) -> None:
    status, out, _ = run("--scenario", scenario(), "--address", "0x10000", "--access", "write")

    assert status == 0
    assert "page fault, error code 0x6: not present, write, user\n" in out
    assert ["region", "0x1000000000", "0x10007fffff"] in [line.split() for line in out.splitlines()]


def test_memory_that_is_mapped_on_demand_is_an_ept_violation_before_the_run(
    run: Run, scenario: Callable[..., Path]
) -> None:
    options = ("--set", "vmm.ept.accessed_dirty=false")
    status, out, _ = run("--scenario", scenario(populate="demand"), "--address", hex(AT), *options)

    assert status == 0
    assert "qualification 0x81: gpa paging-structure read, not present" in " ".join(out.split())


def test_a_device_is_no_memory_that_the_hypervisor_would_map(run: Run, scenario: Callable[..., Path]) -> None:
    apic = (1 << 64) + LONG.direct + 0xFEE0_0000 & (1 << 64) - 1
    status, out, _ = run("--scenario", scenario(), "--address", hex(apic))

    assert status == 0
    assert "Devices are there and no memory: the hypervisor would emulate the access." in " ".join(out.split())
    assert "populate" not in out


def test_an_address_that_is_not_canonical_is_refused_without_a_walk(run: Run, scenario: Callable[..., Path]) -> None:
    status, out, _ = run("--scenario", scenario(), "--address", "0x800000000000")

    assert status == 0
    assert "general-protection fault: the address is not canonical\n0 references" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vm", "3"), "--vm: there is no VM '3'\n help: vm can be 0 (vm0)\n"),
        (("--process", "x"), "--process: there is no process 'x'\n help: process can be 0 (reader)\n"),
        (("--access", "x"), "--access: there is no access 'x'\n help: access can be read, write, fetch\n"),
        (("--ring", "1"), "--ring: pages know no ring 1\n help: ring can be 0, 3\n"),
        (("--plot", "a.png"), "--plot: 'a.png' is no SVG file\n help: the drawing is SVG, as in walk.svg\n"),
        (("--address", "zz"), "--address: 'zz' is no address\n help: as in 0x1000000000\n"),
        (("--address", hex(1 << 64)), "--address: a linear address has 64 bits\n help: as in 0x10000000\n"),
    ],
)
def test_mistakes_are_explained(
    run: Run, scenario: Callable[..., Path], arguments: tuple[str, ...], message: str
) -> None:
    assert run("--scenario", scenario(), "--address", hex(AT), *arguments) == (2, "", message)


def test_json_holds_every_reference(run: Run, scenario: Callable[..., Path]) -> None:
    _, out, _ = run("--scenario", scenario(), "--address", hex(AT), "--every-entry", "--json")
    walk = json.loads(out)["walk"]

    assert walk["address"] == hex(AT)
    assert len([level["entry"] for level in walk["levels"] if level["entry"]]) == 4
    assert walk["levels"][0]["nested"][0]["references"][0]["served"] == "DRAM"


def test_the_drawing_has_a_box_for_every_reference(run: Run, scenario: Callable[..., Path], tmp_path: Path) -> None:
    drawing = tmp_path / "walk.svg"
    status, _, err = run("--scenario", scenario(), "--address", hex(AT), "--every-entry", "--plot", drawing)
    boxes = [node for node in xml.parse(drawing).getroot() if node.get("rx")]

    assert (status, err) == (0, f"wrote {drawing}\n")
    assert len(boxes) == 24


def test_a_recorded_guest_has_no_tables_to_walk() -> None:
    with pytest.raises(ConfigError) as raised:
        vtsim.walk("workloads/real/linux-boot.yaml", 0)
    assert str(raised.value).startswith("vm: a recorded guest's paging structures are not in memory")


@pytest.mark.compiled_only
def test_after_the_run_the_caches_are_those_of_the_run(scenario: Callable[..., Path]) -> None:
    warm = vtsim.walk(scenario(), AT, after_run=True)
    cold = vtsim.walk(scenario(), AT, after_run=True, cold=True)

    assert warm.hpa == cold.hpa
    assert warm.cycles < cold.cycles
    assert counted(cold) == counted(vtsim.walk(scenario(), AT))


def test_a_shadow_that_the_guest_has_not_used_yet_is_the_users_mistake(scenario: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        vtsim.walk(scenario(), AT, sets=("vmm.personality=minimal", "vmm.paging=shadow"))

    assert str(caught.value) == (
        "vmm.paging: shadow tables come with use: only the root that was loaded last has any\n"
        " help: walk after the run (--after-run), or choose paging 'ept'"
    )


def test_where_devices_have_the_machine_to_themselves_there_is_no_vm_to_name(tmp_path: Path) -> None:
    path = tmp_path / "device.yaml"
    path.write_text("dma: [{}]\n")
    with pytest.raises(ConfigError) as caught:
        vtsim.walk(path, AT)

    assert str(caught.value) == "vm: there is no VM '0'\n help: the scenario has no VM at all"


def churning(tmp_path: Path) -> Path:
    """A region whose last table is written often and which stays mapped."""
    path = tmp_path / "churning.yaml"
    path.write_text("""
machine: {cpu: {features: {agile_paging: true}}}
vms: [{memory: 64 MiB, guest: {processes: [{phases: [{primitive: protect, region: 64 KiB, iterations: 5}]}]}}]
""")
    return path


def test_under_shadow_paging_the_tables_that_are_read_are_the_hypervisors(tmp_path: Path) -> None:
    shown = vtsim.walk(churning(tmp_path), AT, sets=("vmm.paging=shadow",), after_run=True, cold=True)

    assert [r.dimension for r in shown.references] == [SHADOW] * len(shown.references)
    assert [r.name for r in shown.references] == ["PML4E", "PDPTE", "PDE", "PTE"]


@pytest.mark.parametrize("paging", ["4-level", "PAE", "32-bit"])
def test_an_agile_walk_goes_from_shadow_tables_to_the_guests_own_behind_ept(tmp_path: Path, paging: str) -> None:
    at, levels = (AT, 4) if paging == "4-level" else (0x1000_0000, 2)
    sets = ("vmm.paging=agile", f"vms.0.guest.kernel.paging={paging}", *EVERY_ENTRY)
    shown = vtsim.walk(churning(tmp_path), at, sets=sets, after_run=True, cold=True)
    order = [r.dimension for r in shown.references]
    own = order.count(GUEST)  # levels
    switch = shown.references[order.count(SHADOW) - 1]

    assert shown.hpa is not None
    assert 1 <= own < levels
    assert order[: levels - own] == [SHADOW] * (levels - own)
    assert order.count(EPT) == 4 * own  # of each table of the guest but the first, and of the page
    assert walk_view.flags(switch, shown).endswith(" switch")
    assert f"table hpa {switch.value & 0xFFFFFFFFF000:#x}" == walk_view.leads_to(switch, shown)
    assert f"{levels - own} shadow, {own} guest, {4 * own} EPT" in walk_view.totals(shown)
    modes = {"4-level": "4-level paging", "PAE": "PAE paging", "32-bit": "PAE paging over the guest's 32-bit paging"}
    assert walk_view.paging_of(shown) == modes[paging]


DIRECTORY_WRITTEN = (  # a page table for each 4 MiB
    "vms.0.guest.processes.0.phases=[{primitive: stream, pattern: strided, stride: 4 MiB, region: 16 MiB, accesses: 4}]"
)


@pytest.mark.parametrize("paging", ["PAE", "32-bit"])
def test_an_agile_walk_of_two_levels_may_begin_in_the_page_directory_that_a_pdpte_switches_to(
    tmp_path: Path, paging: str
) -> None:
    sets = ("vmm.paging=agile", f"vms.0.guest.kernel.paging={paging}", DIRECTORY_WRITTEN, *EVERY_ENTRY)
    shown = vtsim.walk(churning(tmp_path), 0x1000_0000, sets=sets, after_run=True, cold=True)

    assert [r.dimension for r in shown.references] == [GUEST, *[EPT] * 4, GUEST, *[EPT] * 4]
    assert shown.pdpte is not None
    assert f"PDPTE {shown.pdpte:#x} switch, loaded by" in walk_view.roots(shown)
    assert shown.pdpte & ADDRESS == shown.references[0].hpa & ~0xFFF


def test_a_large_page_of_a_page_directory_of_the_guests_own_is_one_of_4_mib_with_32_bit_paging(tmp_path: Path) -> None:
    sets = ("vmm.paging=agile", "vms.0.guest.kernel.paging=32-bit", DIRECTORY_WRITTEN, *EVERY_ENTRY)
    shown = vtsim.walk(churning(tmp_path), 0xC010_0000, sets=sets, after_run=True, cold=True)

    assert [r.dimension for r in shown.references] == [GUEST, *[EPT] * 4]
    assert walk_view.flags(shown.references[0], shown).endswith("4M")


def test_a_root_that_is_the_guests_own_is_told_from_a_shadow_one(tmp_path: Path) -> None:
    shown = vtsim.walk(churning(tmp_path), AT, sets=("vmm.paging=agile",), after_run=True, cold=True)
    nested = evolve(shown, cr3=shown.cr3 | CR3_SWITCHES)

    assert walk_view.roots(shown) == f"CR3 {shown.cr3:#x}   EPTP {shown.eptp:#x}"
    assert walk_view.roots(nested) == f"CR3 {shown.cr3:#x} switch   EPTP {shown.eptp:#x}"


@pytest.mark.compiled_only
def test_a_deprivileged_kernel_has_other_shadow_tables_than_its_process(tmp_path: Path) -> None:
    text, kernel_text = 0x400000, 0xFFFFFFFF81000000
    how: dict[str, Any] = {"sets": ("vmm.technique=binary-translation",), "after_run": True}
    path = churning(tmp_path)
    of_process, of_kernel, kept_away = (
        vtsim.walk(path, address, **how, **ring)
        for address, ring in ((text, {}), (kernel_text, {}), (kernel_text, {"ring": 3}))
    )

    assert (of_process.fault, of_kernel.fault) == ("", "")
    assert of_process.cr3 == kept_away.cr3 != of_kernel.cr3
    assert {r.dimension for r in (*of_process.references, *of_kernel.references)} <= {SHADOW}
    assert kept_away.fault == PAGE_FAULT


def test_a_scenario_object_does_as_well(scenario: Callable[..., Path]) -> None:
    path = scenario()

    assert vtsim.walk(load_scenario(path), AT).references == vtsim.walk(path, AT).references


def test_what_answers_is_a_tlb_a_paging_structure_cache_of_its_dimension_or_the_nested_tlb() -> None:
    names = {number: name for number, name in steps.NAMES.items() if name != "nested_tlb"}

    assert {names[n] for n in names if n in steps.TLBS} == {name for name in names.values() if "tlb" in name}
    assert {names[n] for n in names if n in steps.PWCS} == {name for name in names.values() if name.startswith("pwc")}


def test_every_way_in_which_a_translation_is_refused_has_words() -> None:
    refusals = (
        "PAGE_FAULT", "VIOLATION", "MISCONFIGURATION", "NOT_CANONICAL", "LOG_FULL", "ON_APIC_ACCESS_PAGE"
    )  # fmt: skip

    assert {getattr(ept_walk, name) for name in refusals} == set(FAULTS) == set(range(-len(refusals), 0))


def test_a_protection_key_is_named_among_the_reasons_of_a_page_fault(scenario: Callable[..., Path]) -> None:
    found = evolve(vtsim.walk(scenario(), AT), hpa=None, fault=PAGE_FAULT, error_code=0x25)

    assert walk_view.outcome(found) == "page fault, error code 0x25: protection, read, user, protection key"
