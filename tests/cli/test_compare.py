"""`vtsim compare`: every technique that a scenario can have, side by side; the others with their reason."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import attrs

from vtsim.vmm.techniques import techniques

if TYPE_CHECKING:
    from tests.cli.conftest import Engine, Outcome

Command = Callable[..., "Outcome"]


def test_all_techniques_run_once_each_and_native_first(vtsim: Command, engine: Engine, scenario: str) -> None:
    engine.result = attrs.evolve(engine.result, stopped={})
    done = vtsim("compare", scenario, "--json")
    found = json.loads(done.out)

    assert done.status == 0
    ran = [one.vmm.technique for one in engine.scenarios]
    assert ran[0] == "native"
    assert sorted(ran) == sorted(found["techniques"])
    assert sorted([*found["techniques"], *found["refused"]]) == sorted(techniques)
    assert found["techniques"]["native"]["slowdown"] == 1


def test_a_technique_that_cannot_have_the_scenario_is_listed_with_its_reason(
    vtsim: Command, engine: Engine, scenario: str
) -> None:
    done = vtsim(
        "compare", scenario, "--techniques", "hardware,trap-and-emulate", "--set", "vms.0.guest.kernel.paging=5-level",
        "--set", "machine.cpu={features.la57: true, vmx.generation: ice-lake-sp}",
    )  # fmt: skip

    assert done.status == 0
    assert "trap-and-emulate does not apply: technique 'trap-and-emulate' has shadow tables" in done.out
    assert [one.vmm.technique for one in engine.scenarios] == ["native", "hardware"]


def test_what_a_file_says_of_vt_x_does_not_keep_other_techniques_away(
    vtsim: Command, engine: Engine, scenario: str
) -> None:
    vtsim("compare", scenario, "--techniques", "hardware,binary-translation", "--set", "vmm.paging=ept")

    assert [one.vmm.paging for one in engine.scenarios] == ["none", "ept", "shadow"]


def test_an_unknown_technique_is_refused_with_what_was_probably_meant(vtsim: Command, scenario: str) -> None:
    done = vtsim("compare", scenario, "--techniques", "native,hardwear")

    assert done.status == 2
    assert done.err == "--techniques: unknown technique 'hardwear'\n help: did you mean 'hardware'?\n"


def test_no_technique_is_not_all_of_them(vtsim: Command, engine: Engine, scenario: str) -> None:
    done = vtsim("compare", scenario, "--techniques", "")

    assert (done.status, engine.scenarios) == (2, [])
    assert done.err == f"--techniques: unknown technique ''\n help: technique can be {', '.join(techniques)}\n"


def test_the_drawing_has_a_bar_for_each_technique(
    vtsim: Command, engine: Engine, scenario: str, tmp_path: Path
) -> None:
    plot = tmp_path / "bars.svg"
    done = vtsim("compare", scenario, "--techniques", "native,hardware", "--plot", str(plot))
    root = ElementTree.fromstring(plot.read_text(encoding="utf-8"))
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]

    assert done.err == f"wrote {plot}\n"
    assert {"native", "hardware"} <= set(texts)
    assert vtsim("compare", scenario, "--plot", "bars.png").err.startswith("--plot: 'bars.png' is no SVG file")


def test_a_technique_is_named_once_and_none_where_guests_are_compared(vtsim: Command, scenario: str) -> None:
    twice = vtsim("compare", scenario, "--techniques", "native,native")
    beside = vtsim("compare", scenario, "--techniques", "native", "--equivalence")

    assert (twice.status, twice.err) == (2, "--techniques: native is named twice\n help: name each once\n")
    assert beside.status == 2
    assert "--techniques and --plot do not go with --equivalence" in beside.err


def test_without_a_guest_there_is_nothing_to_compare(vtsim: Command, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("dma: [{operations: 100}]\n", encoding="utf-8")
    done = vtsim("compare", str(tmp_path / "s.yaml"))

    assert (done.status, done.out) == (2, "")
    assert "vms: there is no VM that a technique could run" in done.err


def test_a_scenario_from_a_pipe_is_read_once_for_all_techniques(
    vtsim: Command, engine: Engine, scenario: str, tmp_path: Path
) -> None:
    engine.result = attrs.evolve(engine.result, stopped={})
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(Path(scenario).read_bytes(),))
    writer.start()
    done = vtsim("compare", str(pipe), "--techniques", "native,hardware", "--json")
    writer.join()

    assert json.loads(done.out)["refused"] == {}
    assert [*json.loads(done.out)["techniques"]] == ["native", "hardware"]


def test_a_drawing_that_has_no_folder_is_refused_before_anything_runs(
    vtsim: Command, engine: Engine, scenario: str
) -> None:
    done = vtsim("compare", scenario, "--plot", "nowhere/bars.svg")

    assert done.status == 2
    assert done.err == "--plot: there is no folder 'nowhere'\n help: make it, or name another\n"
    assert engine.scenarios == []


def test_a_drawing_that_cannot_be_written_costs_no_table(
    vtsim: Command, engine: Engine, scenario: str, tmp_path: Path
) -> None:
    (tmp_path / "bars.svg").mkdir()
    done = vtsim("compare", scenario, "--techniques", "native", "--plot", str(tmp_path / "bars.svg"))

    assert done.status == 2
    assert "Technique" in done.out
    assert done.err.endswith("bars.svg cannot be written: Is a directory\n")
