"""`vtsim verdict` and `vtsim compare --equivalence`: what they print, and their exit status."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tests.study.test_verdict import found as example
from vtsim.cli import verdict as command
from vtsim.study.equivalence import SecondRefused
from vtsim.study.verdict import Verdict, verdict_text

if TYPE_CHECKING:
    from tests.cli.conftest import Outcome
    from vtsim.cli.progress import Watch

Command = Callable[..., "Outcome"]
TEXT = """
machine: {memory: 256 MiB, devices: [vga]}
vmm: {personality: minimal}
vms:
  - memory: 16 MiB
    devices: [vga]
    guest:
      kernel: {tick: off}
      processes: [{phases: [{primitive: cpuid, iterations: 1}]}]
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "s.yaml").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "s.yaml")


def test_a_comparison_ends_with_0_where_guests_see_the_same_and_with_1_where_they_do_not(
    vtsim: Command, file: str, tmp_path: Path
) -> None:
    same = vtsim("compare", file, "--equivalence", "--json")
    (tmp_path / "t.yaml").write_text(TEXT.replace("devices: [vga]\n    guest", "guest"), encoding="utf-8")
    other = vtsim("compare", file, str(tmp_path / "t.yaml"), "--equivalence")

    assert (same.status, json.loads(same.out)["equivalent"]) == (0, True)
    assert other.status == 1
    assert "VGA controller (Bochs display), 1234:1111" in other.out


def test_a_second_file_goes_with_equivalence_only(vtsim: Command, file: str) -> None:
    assert vtsim("compare", file, file).status == 2


@pytest.mark.parametrize(
    ("sets", "others", "said"),
    [
        ([], ["nothing"], "--other-set nothing: this is not path=value\n help: write it like --other-set machine"),
        ([], ["vms.0.memory=zz"], "--other-set vms.0.memory=zz: vms.0.memory: 'zz' is not a size"),
        (["seed=x"], ["seed=1"], "--set seed=x: seed: 'x' is not a count"),
        (["vmm.hosted=true"], ["vmm.technique=native"], "--set vmm.hosted=true: vmm.hosted: "),
    ],
)
def test_a_mistake_is_said_of_the_option_that_it_is_in(
    vtsim: Command, file: str, sets: list[str], others: list[str], said: str
) -> None:
    options = [option for each in sets for option in ("--set", each)]
    done = vtsim("compare", file, "--equivalence", *options, *(o for each in others for o in ("--other-set", each)))

    assert done.status == 2
    assert done.err.startswith(said)


def test_what_only_the_second_machine_shows_is_said_of_the_second_file(
    vtsim: Command, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, progress: Watch) -> Any:
        raise SecondRefused("not that much", field="vms.0.memory")

    monkeypatch.setattr(command, "compare", refuse)
    second = tmp_path / "second.yaml"
    second.write_text(TEXT, encoding="utf-8")
    here = vtsim("compare", file, "--equivalence", "--other-set", "vms.0.memory=32 MiB")
    there = vtsim("compare", file, str(second), "--equivalence")

    assert here.err == "--other-set vms.0.memory=32 MiB: vms.0.memory: not that much\n"
    assert there.err.startswith(f"{second}:5: vms.0.memory: not that much\n    5 |   - memory: 16 MiB\n")


def test_a_verdict_is_printed_as_text_or_json_and_is_the_exit_status(
    vtsim: Command, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def judge(scenario: object, thresholds: object, *, progress: object) -> Verdict:
        given.append(thresholds)
        return example()

    monkeypatch.setattr(command, "judge", judge)
    text = vtsim("verdict", file, "--threshold", "efficiency=0.9")
    data = vtsim("verdict", file, "--json")

    assert (text.status, text.out) == (1, verdict_text(example()))
    assert verdict_text(Verdict.from_dict(json.loads(data.out))) == text.out
    assert given[0] == attrs.evolve(given[1], efficiency=0.9)


@pytest.mark.parametrize("arguments", [("verdict",), ("compare", "--equivalence")])
def test_what_was_broken_off_is_neither_a_verdict_nor_a_difference(
    vtsim: Command, file: str, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    def broken_off(*_: object, progress: Watch) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        assert not progress("native", 0.5, 1)
        return example()

    monkeypatch.setattr(command, "judge", broken_off)
    monkeypatch.setattr(command, "compare", broken_off)
    done = vtsim(*arguments, file)

    assert (done.status, done.out) == (130, "")
    assert done.err.splitlines()[-1].startswith("stopped before there was a ")


def test_a_misspelt_threshold_ends_with_2(vtsim: Command, file: str) -> None:
    done = vtsim("verdict", file, "--threshold", "confidance=0.9")

    assert done.status == 2
    assert "did you mean 'confidence'?" in done.err
