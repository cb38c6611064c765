"""Every open set is closed: what is shipped loads, runs and is listed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from vtsim.base.errors import ConfigError
from vtsim.config import dump, load_scenario, parse_scenario
from vtsim.cpu.profile import load_profile, profile_names
from vtsim.platform.machine import Machine
from vtsim.platform.witness import Wanted
from vtsim.study.measure import result_of
from vtsim.study.run import simulate, without_hypervisor
from vtsim.study.sweep.design import load_design

ROOT = Path(__file__).parents[1]
WORKLOADS = ROOT / "workloads"
STUDIES = sorted((WORKLOADS / "studies").glob("*.yaml"))
SCENARIOS = sorted(path for path in WORKLOADS.rglob("*.yaml") if path not in STUDIES)
SHORT = "run.limit=2 ms"
NAMES = [str(path.relative_to(WORKLOADS)) for path in SCENARIOS]
SCRIPTS = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((ROOT / "scripts").rglob("*.py"))]


@pytest.mark.parametrize("path", SCENARIOS, ids=NAMES)
def test_every_shipped_scenario_loads_and_says_what_it_shows(path: Path) -> None:
    scenario = load_scenario(path)

    assert scenario.description
    assert parse_scenario(dump(scenario), name=scenario.name, folder=path.parent) == scenario


@pytest.mark.parametrize("module", SCRIPTS)
def test_every_script_can_be_imported_and_does_nothing_then(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [module])
    monkeypatch.delitem(sys.modules, module, raising=False)

    importlib.import_module(module)

    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("path", STUDIES, ids=[path.name for path in STUDIES])
def test_every_shipped_study_loads_and_begins_with_its_question(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    question = load_design(path).spec.question

    assert question.endswith("?")
    assert first.removeprefix("question: ").strip("'\"") == question


@pytest.mark.compiled_only
@pytest.mark.parametrize("path", SCENARIOS, ids=NAMES)
def test_every_shipped_scenario_runs_under_its_hypervisor_and_natively(path: Path) -> None:
    scenario = load_scenario(path, [SHORT])

    alone = not scenario.vms or not scenario.run.baseline
    variants = [scenario] if alone else [scenario, without_hypervisor(scenario)]

    for variant in variants:
        result = simulate(variant)
        needs_a_hypervisor = path.stem in ("vmcall", "rd_unknown_msr") and variant is not scenario
        assert needs_a_hypervisor or set(result.stopped.values()) <= {"time limit"}
        assert sum(result.instructions.values()) > 0 or scenario.dma
        assert all(device.operations > 0 for device in result.dma)


SMALL = """
machine: {{profile: {profile}, memory: 256 MiB}}
vmm: {{personality: {personality}}}
vms: [{{memory: 64 MiB, guest: {{kernel: {{tick: off}}, processes: [{{phases: [{{primitive: cpuid, iterations: 50}}]}}]}}}}]
"""


def test_a_processor_without_vmx_runs_no_guest_in_hardware() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_scenario(SMALL.format(profile="xeon-2003", personality="minimal"))

    assert "technique 'hardware' needs VMX, which profile 'xeon-2003' does not have" in str(refused.value)


@pytest.mark.parametrize("profile", [name for name in profile_names() if load_profile(name).has_vmx])
def test_every_shipped_profile_runs_a_guest(profile: str) -> None:
    personality = "kvm" if "ept" in vmx_features(profile) else "minimal"
    machine = Machine(parse_scenario(SMALL.format(profile=profile, personality=personality)))

    result = result_of([machine.run()])

    assert result.stopped == {}
    assert {each.reason: each.count for each in result.exits}["CPUID"] == 50


def vmx_features(profile: str) -> set[str]:
    from vtsim.vmcs.generations import GENERATIONS

    capabilities = GENERATIONS[load_profile(profile).vmx.generation].capabilities()
    return {"ept"} if capabilities.supports("ENABLE_EPT") else set()


@pytest.mark.compiled_only
@pytest.mark.parametrize("lengths", ["linux-6.1", "linux-4.19"])
@pytest.mark.parametrize("name", ["vmexit/cpuid.yaml", "vmexit/inl_from_qemu.yaml", "page_fault.yaml", "syscall.yaml"])
def test_twice_the_ordinary_work_changes_no_count(name: str, lengths: str) -> None:
    """Exits arise from operations, never from how long the work between them takes."""

    def counts(scale: int) -> tuple[object, ...]:
        sets = [f"run.work_scale={scale}", "vms.0.guest.kernel.tick=off", "run.baseline=false"]
        sets += [f"vmm.lengths={lengths}", f"vms.0.guest.kernel.lengths={lengths}"]
        scenario = load_scenario(WORKLOADS / name, sets)
        machine = Machine(scenario)
        result = result_of([machine.run()])
        exits = {each.reason: each.count for each in result.exits}
        return exits, result.walks.references, result.guest.ring0.emulated, result.guest.ring3.emulated

    assert counts(2) == counts(1)


@pytest.mark.compiled_only
@pytest.mark.parametrize("name", ["vmexit/cpuid.yaml", "vmexit/inl_from_qemu.yaml", "page_fault.yaml"])
@pytest.mark.parametrize("paging", ["ept", "shadow"])
def test_the_lengths_of_a_host_change_no_count_and_nothing_that_a_guest_sees(name: str, paging: str) -> None:
    def counts(lengths: str) -> tuple[int, tuple[object, ...]]:
        sets = ["vms.0.guest.kernel.tick=off", "run.baseline=false", f"vmm.paging={paging}", f"vmm.lengths={lengths}"]
        machine = Machine(load_scenario(WORKLOADS / name, sets), wanted=Wanted())
        result = result_of([machine.run()])
        exits = {each.reason: each.count for each in result.exits}
        seen = {
            (*vcpu, name): (stream.count, stream.digest)
            for vcpu, streams in machine.witnessed().items()
            for name, stream in streams.streams.items()
        }
        return result.cycles.elapsed, (exits, result.walks.references, seen)

    (new, counted), (old, as_counted) = counts("linux-6.1"), counts("linux-4.19")
    assert as_counted == counted and old != new


@pytest.mark.compiled_only
def test_a_kernel_with_page_table_isolation_runs_on_the_first_vt_x_processor() -> None:
    """Without EPT every CR3 access exits: a read and two writes for each system call."""
    scenario = load_scenario(
        WORKLOADS / "syscall.yaml",
        [
            "machine.profile=p4-672",
            "vmm.personality=minimal",
            "vms.0.guest.kernel.kpti=true",
            "vms.0.guest.kernel.tick=off",
            "vms.0.guest.processes.0.phases.0.iterations=100",
        ],
    )

    result = simulate(scenario)

    assert result.stopped == {}
    counts = {each.reason: each.count for each in result.exits}
    assert 3 * 100 <= counts["CR_ACCESS"] <= 3 * 100 + 20
