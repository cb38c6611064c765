"""`vtsim iommu walk`: what is shown is what the kernels did; mistakes are shown where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vtsim.base.errors import ConfigError
from vtsim.cli import main
from vtsim.config import load_scenario
from vtsim.platform import iommu_walk
from vtsim.platform.iommu_walk import observe_in_scenario

UNIT = """\
mode: scalable
memory: 256 MiB
devices:
- device: "03:02.0"
  pasid: 5
  translation: nested
  pages:
  - {iova: 0x200000, to: 0x600000, count: 4}
  second_pages:
  - {iova: 0x600000, to: 0x200000, count: 4, rights: r}
"""


CROWD = "mode: scalable\nmemory: 16 MiB\ndevices:\n" + "".join(  # a PASID directory of 32 pages for each
    f'- {{device: "{n >> 3:02x}:00.{n & 7}", pasid: 1000000, translation: pass-through}}\n' for n in range(140)
)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(text: str, *arguments: str, device: str = "03:02.0") -> tuple[int, str, str]:
        file = tmp_path / "unit.yaml"
        file.write_text(text, encoding="utf-8")
        status = main(["iommu", "walk", str(file), "--device", device, *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err.replace(f"{tmp_path}/", "")

    return run


def test_a_nested_walk_reads_every_entry_in_both_dimensions(run: Any) -> None:
    status, out, _ = run(UNIT, "--address", "0x201008", "--pasid", "5", "--json")

    walk = json.loads(out)["walk"]
    names = [step["what"] for step in walk["steps"]]
    guest = ["first-level PML4E", "first-level PDPTE", "first-level PDE", "first-level PTE"]
    host = ["second-level PML4E", "second-level PDPTE", "second-level PDE", "second-level PTE"]
    assert status == 0
    assert names[:4] == ["root entry", "context entry", "PASID directory entry", "PASID table entry"]
    assert names[4:28] == [*(each for entry in guest for each in (*host, entry)), *host]
    assert set(names[28:]) == {"flags set"}
    assert (walk["status"], walk["hpa"], walk["rights"], walk["page_bytes"]) == ("completed", "0x201008", "r-x", 4096)
    assert walk["reads"]["second-level"] == 20


def test_text_names_the_caches_that_answered_and_the_fault_by_its_title(run: Any) -> None:
    _, warm, _ = run(UNIT, "--address", "0x201008", "--pasid", "5", "--warm")
    _, refused, _ = run(UNIT, "--address", "0x201008", "--pasid", "5", "--access", "write")

    assert all(word in warm for word in ("context cache", "PASID cache", "IOTLB (4 KiB)", "0 memory reads"))
    assert "blocked, recorded: fault reason 0x85 (SGN.6): no write permission" in refused


def test_an_address_at_the_end_of_a_page_is_translated_as_any_other(run: Any) -> None:
    _, out, _ = run(UNIT, "--address", "0x201fff", "--pasid", "5", "--json")
    walk = json.loads(out)["walk"]
    assert (walk["status"], walk["hpa"]) == ("completed", "0x201fff")


def test_a_translation_request_without_a_mapping_completes_without_rights(run: Any) -> None:
    legacy = 'devices: [{device: "00:01.0", ats: true, pages: [{iova: 0x1000, to: 0x100000}]}]'

    _, out, _ = run(legacy, "--address", "0x5000", "--request", "translation", device="00:01.0")

    assert "completed without rights: there is no translation, and no fault" in out


# fmt: off
MISTAKES: list[tuple[str, tuple[str, ...], str]] = [
    (UNIT.replace("nested", "nestet"), (),
     "unit.yaml:6: devices.0.translation: 'nestet' is not possible here\n"
     "    6 |   translation: nestet\n"
     "      |                ^\n"
     " help: did you mean 'nested'?\n"),
    (UNIT.replace("mode: scalable", "mode: legacy"), (),
     "unit.yaml:5: devices.0.pasid: legacy mode has no PASIDs\n"
     "    5 |   pasid: 5\n"
     "      |          ^\n"
     " help: mode can be scalable\n\n"
     "unit.yaml:6: devices.0.translation: legacy mode has no nested translation\n"
     "    6 |   translation: nested\n"
     "      |                ^\n"
     " help: mode can be scalable\n"),
    (UNIT.replace("to: 0x200000, count: 4", "to: 0x20000000"), (),
     "unit.yaml:10: devices.0.second_pages.0.to: 0x20000fff is beyond memory\n"
     "   10 |   - {iova: 0x600000, to: 0x20000000, rights: r}\n"
     "      |                          ^\n"
     " help: memory can be larger\n"),
    (UNIT.replace("iova: 0x200000", "iova: 0x200800"), (),
     "unit.yaml:8: devices.0.pages.0.iova: 0x200800 is not aligned to the page size\n"
     "    8 |   - {iova: 0x200800, to: 0x600000, count: 4}\n"
     "      |            ^\n"
     " help: the nearest that are: 0x200000 and 0x201000\n"),
    (UNIT.replace("iova: 0x200000", "iova: 0xfffffffff000"), (),
     "unit.yaml:8: devices.0.pages.0.iova: pages end beyond what 4 levels translate\n"
     "    8 |   - {iova: 0xfffffffff000, to: 0x600000, count: 4}\n"
     "      |            ^\n"
     " help: the last byte can be at 0xffffffffffff\n"),
    (UNIT.replace("iova: 0x600000", "iova: 0x1000000000"), (),
     "unit.yaml:10: devices.0.second_pages.0.iova: the guest's own tables stand there\n"
     "   10 |   - {iova: 0x1000000000, to: 0x200000, count: 4, rights: r}\n"
     "      |            ^\n"
     " help: pages can be below 0x1000000000, or from 0x1004000000 on\n"),
    (UNIT.replace("  second_pages", "  - {iova: 0x203000, to: 0}\n  second_pages"), (),
     "unit.yaml:9: devices.0.pages.1.iova: pages are mapped there already\n"
     "    9 |   - {iova: 0x203000, to: 0}\n"
     "      |            ^\n"
     " help: give pages that do not overlap\n"),
    (UNIT.replace("nested", "nested\n  levels: 3"), (),
     "unit.yaml:7: devices.0.levels: first-level tables have 4 or 5 levels\n"
     "    7 |   levels: 3\n"
     "      |           ^\n"
     " help: levels can be 4 or 5\n"),
    (UNIT.replace("nested", "first-level"), (),
     "unit.yaml:10: devices.0.second_pages: only nested translation has both levels\n"
     "   10 |   - {iova: 0x600000, to: 0x200000, count: 4, rights: r}\n"
     "      |   ^\n"
     " help: translation can be nested\n"),
    (CROWD, (),
     "unit.yaml:2: memory: the tables of the devices do not fit\n"
     "    2 | memory: 16 MiB\n"
     "      |         ^\n"
     " help: memory can be larger\n"),
    (UNIT, ("--after", "1 us"),
     "--after: a unit by itself does not run\n help: only --scenario FILE has a run\n"),
    (UNIT + "without: [PASSID]\n", (),
     "unit.yaml:11: without.0: unknown capability 'PASSID'\n"
     "   11 | without: [PASSID]\n"
     "      |           ^\n"
     " help: did you mean 'PASID'?\n"),
    ('devices: [{device: "03:00.0"}, {device: "3:0.0"}]\n', (),
     "unit.yaml:1: devices.1.device: devices.0 says what translates these requests\n"
     '    1 | devices: [{device: "03:00.0"}, {device: "3:0.0"}]\n'
     "      |                                         ^\n"
     " help: give one another device\n"),
    (UNIT, ("--access", "reed"), "--access: unknown access 'reed'\n help: did you mean 'read'?\n"),
    (UNIT, ("--address", "x"), "--address: 'x' is no address\n help: as in 0x200000\n"),
]
# fmt: on


@pytest.mark.parametrize(("text", "arguments", "message"), MISTAKES)
def test_a_mistake_is_shown_where_it_is(run: Any, text: str, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run(text, *(arguments if "--address" in arguments else ("--address", "0", *arguments)))

    assert (status, out, err) == (2, "", message)


def test_a_description_with_more_tables_than_are_kept_is_the_users_mistake(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iommu_walk, "MOST_TABLES", 1000)
    status, _, err = run(CROWD.replace("16 MiB", "1 GiB"), "--address", "0", device="00:00.0")

    assert status == 2
    assert err == (
        "unit.yaml:4: devices: the devices have more tables than are kept here\n"
        '    4 | - {device: "00:00.0", pasid: 1000000, translation: pass-through}\n'
        "      | ^\n"
        " help: 1,000 tables are accepted: fewer devices, or larger pages, need fewer\n"
    )


def test_a_device_is_written_as_lspci_prints_it(run: Any) -> None:
    status, _, err = run(UNIT, "--address", "0", device="3:2")

    assert status == 2
    assert err == "--device: '3:2' is no device\n help: bus:device.function is accepted, as in 03:02.0\n"


STORM = Path(__file__).parents[2] / "workloads" / "iommu" / "map_unmap.yaml"


def test_a_request_of_a_scenario_s_device_is_translated_by_the_tables_that_its_driver_wrote() -> None:
    scenario = load_scenario(STORM)
    ring = 0xFFFF_B000

    cold = observe_in_scenario(scenario, "nic", ring)
    assert (cold.status, cold.page_bytes, sum(cold.reads.values())) == ("completed", 4096, 6)
    assert observe_in_scenario(scenario, "03:00.0", ring, warm=True).reads["second-level"] == 0
    not_yet = observe_in_scenario(scenario, "nic", ring - 4096)
    assert not_yet.fault is not None and not_yet.hpa is None
    with pytest.raises(ConfigError, match="unknown device 'nice'"):
        observe_in_scenario(scenario, "nice", 0)


def test_the_mode_is_the_one_that_the_driver_has_put_the_unit_in() -> None:
    modes = {
        name: observe_in_scenario(load_scenario(STORM.with_name(name)), "nic", 0xFFFF_F000).mode
        for name in ("map_unmap.yaml", "page_requests.yaml")
    }

    assert modes == {"map_unmap.yaml": "legacy", "page_requests.yaml": "scalable"}


def test_what_is_asked_of_a_unit_can_be_asked_in_a_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    """Its unit is in legacy mode, where no request has a PASID, and its devices have no device-TLB."""
    walk = ["iommu", "walk", "--scenario", str(STORM), "--device", "nic", "--address", "0xffffb000"]
    for more, fault in ((("--pasid", "3"), "0x31"), (("--request", "translation"), "0x0d"), (("--privileged",), None)):
        assert main([*walk, *more]) == 0
        out = capsys.readouterr().out
        assert f"fault reason {fault}" in out if fault else "host-physical address" in out
