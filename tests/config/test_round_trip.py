"""What is written reads back; schema and reference say what the loader does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from vtsim.base import spec as kinds
from vtsim.base.errors import ConfigError
from vtsim.base.units import LARGEST
from vtsim.config import dump, load_scenario, parse_scenario, reference, resolve, schema
from vtsim.guest.spec import CpuidSpec, DmaBuffersSpec, GuestSpec, ProcessSpec, primitives
from vtsim.guest.watched import WatchedStoresSpec
from vtsim.platform.dma_spec import DmaSpec
from vtsim.platform.spec import MachineSpec, Scenario, VmSpec
from vtsim.platform.vcpu_spec import OF_TWO_THREADS
from vtsim.vmm.spec import VmmSpec

SMALLEST = """\
vms:
  - guest:
      processes:
        - phases:
            - {primitive: cpuid}
"""


VALIDATOR = jsonschema.Draft202012Validator(schema())


def values_of(kind: kinds.Kind) -> st.SearchStrategy[Any]:
    """Draw values inside that a kind allows."""
    match kind:
        case kinds.Quantity():
            numbers = st.integers(int(kind.ge), int(kind.le)) if kind.dimension.whole else st.floats(kind.ge, kind.le)
            numbers = st.sampled_from(kind.choices) if kind.choices else numbers
            return numbers | st.sampled_from(list(kind.words.values())) if kind.words else numbers
        case kinds.Text():
            return st.sampled_from(kind.choices) if kind.choices else st.text(max_size=20)
        case kinds.FilePath():
            return st.just(__file__)
        case kinds.Boolean():
            return st.sampled_from([True, False, None]) if kind.auto else st.booleans()
        case kinds.Free():
            keys = st.from_regex("[a-z]{1,4}(_[a-z]{1,4})?", fullmatch=True)
            scalars = st.integers(-LARGEST, LARGEST) | st.booleans() | st.sampled_from(["kvm", "1x"])
            return st.dictionaries(keys, scalars, max_size=3).map(lambda d: tuple(sorted(d.items())))
        case kinds.Group():
            return specs_of(kind.spec)
        case kinds.Tagged():
            return st.one_of([specs_of(each) for each in kind.registry.values()])
        case kinds.Many():
            return st.lists(values_of(kind.item), min_size=kind.least, max_size=2).map(tuple)
    raise AssertionError(kind)


def specs_of(spec: type[Any]) -> st.SearchStrategy[Any]:
    """Draw specs that do not contradict themselves."""
    fields = {name: values_of(kinds.kind_of(field)) for name, field in kinds.settings(spec).items()}

    def make(values: dict[str, Any]) -> Any:
        try:
            return spec(**values)
        except ConfigError:
            return None

    return st.fixed_dictionaries(fields).map(make).filter(lambda made: made is not None)


@pytest.mark.parametrize("name", primitives)
@settings(max_examples=10)
@given(data=st.data())
def test_every_primitive_reads_back(name: str, data: st.DataObject) -> None:
    phase = data.draw(specs_of(primitives[name]))
    if "at" in attrs.fields_dict(type(phase)):
        phase = (
            attrs.evolve(phase, region=4096, stride=64)
            if hasattr(phase, "stride")
            else attrs.evolve(phase, region=4096)
        )
    elif isinstance(phase, WatchedStoresSpec):
        phase = attrs.evolve(phase, region=4096)
    elif phase.region_bytes > 1 << 29:
        phase = type(phase)(accesses=phase.accesses)
    dma: list[DmaSpec] = []
    if isinstance(phase, DmaBuffersSpec):
        phase, dma = attrs.evolve(phase, device="nic"), [DmaSpec(name="nic")]
    cpus = 2 if type(phase) in OF_TWO_THREADS else 1
    guest = GuestSpec(processes=[ProcessSpec(phases=[phase], threads=cpus)])
    vmm = VmmSpec(technique="native", paging="none") if dma else VmmSpec(views=1 + isinstance(phase, WatchedStoresSpec))
    vms = [VmSpec(guest=guest, vcpus=cpus)]
    scenario = resolve(Scenario(vms=vms, dma=dma, vmm=vmm, machine=MachineSpec(cpus=cpus)), "x")

    assert parse_scenario(dump(scenario)) == scenario


@pytest.mark.slow
@settings(max_examples=30, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(data=st.data())
def test_every_part_of_a_scenario_reads_back(data: st.DataObject) -> None:
    guest = GuestSpec(
        kernel=data.draw(values_of(kinds.kind_of(attrs.fields(GuestSpec).kernel))),
        processes=[ProcessSpec(phases=[CpuidSpec()])],
    )
    parts = {
        name: data.draw(values_of(kinds.kind_of(kinds.settings(Scenario)[name])), label=name)
        for name in ("name", "description", "seed", "vmm", "run")
    }
    machine = attrs.evolve(
        data.draw(specs_of(type(Scenario(vms=[VmSpec(guest=guest)]).machine))), profile="skx-4114", cpu={}
    )
    try:
        scenario = resolve(Scenario(vms=[VmSpec(guest=guest, memory="16 MiB")], machine=machine, **parts), "x")
    except ConfigError:
        return

    assert parse_scenario(dump(scenario), name="x") == scenario
    assert VALIDATOR.is_valid(YAML(typ="safe", pure=True).load(dump(scenario)))


def test_the_smallest_scenario_has_six_lines_or_less() -> None:
    scenario = parse_scenario(SMALLEST, name="tiny")

    assert len(SMALLEST.splitlines()) <= 6
    assert (scenario.name, scenario.vms[0].name, scenario.vms[0].cpu) == ("tiny", "vm0", 0)
    assert scenario.vmm.paging == "ept"
    assert scenario.vmm.vpid and scenario.vmm.ept.accessed_dirty and scenario.vmm.tpr_shadow


def test_vms_take_the_cpus_in_turn() -> None:
    text = (
        "machine: {cpus: 2}\nvms:\n" + "- memory: 64 MiB\n  guest: {processes: [{phases: [{primitive: pause}]}]}\n" * 3
    )

    assert [vm.cpu for vm in parse_scenario(text).vms] == [0, 1, 0]


def test_what_is_left_open_follows_the_processor() -> None:
    vmm = parse_scenario(SMALLEST, ["machine.profile=p4-672", "vmm.personality=minimal"]).vmm

    assert (vmm.paging, vmm.vpid, vmm.tpr_shadow, vmm.ept.accessed_dirty) == (
        "shadow",
        False,
        False,
        False,
    )


def test_native_runs_translate_nothing() -> None:
    assert parse_scenario(SMALLEST, ["vmm.technique=native", "machine.profile=p4-672"]).vmm.paging == "none"


@pytest.mark.parametrize(
    ("vmm", "technique"),
    [
        ("{}", "hardware"),
        ("{paging: shadow}", "hardware"),
        ("{paging: none}", "native"),
        ("{technique: auto, paging: none}", "native"),
        ("{technique: native, paging: shadow}", "native"),
    ],
)
def test_guests_without_translation_of_their_memory_run_natively(vmm: str, technique: str) -> None:
    assert parse_scenario(f"vmm: {vmm}\n{SMALLEST}").vmm.technique == technique


def test_a_technique_that_is_named_is_not_left_for_another() -> None:
    with pytest.raises(ConfigError, match="technique 'hardware' needs its guests' memory translated"):
        parse_scenario(SMALLEST, ["vmm.technique=hardware", "vmm.paging=none"])


def test_a_trace_is_found_beside_the_scenario(tmp_path: Path) -> None:
    (tmp_path / "boot.npz").write_bytes(b"")
    path = tmp_path / "boot.yaml"
    path.write_text(SMALLEST.replace("cpuid", "replay, trace: boot.npz"))

    scenario = load_scenario(path)

    assert scenario.name == "boot"
    assert scenario.vms[0].guest.processes[0].phases[0].trace == str(tmp_path / "boot.npz")  # type: ignore[attr-defined]


def test_the_schema_is_a_schema_and_accepts_the_smallest_scenario() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(YAML(typ="safe", pure=True).load(SMALLEST), schema())
    json.dumps(schema())


@pytest.mark.parametrize("wrong", ["vms: 3", "nmae: x", "run: {limit: 5 sec}", "vmm: {ept: {page_size: 8 KiB}}"])
def test_the_schema_refuses_what_the_loader_refuses(wrong: str) -> None:
    document = YAML(typ="safe", pure=True).load(SMALLEST) | YAML(typ="safe", pure=True).load(wrong)

    assert not VALIDATOR.is_valid(document)


STUDY = "{question: How much?, scenario: x.yaml, axes: [{how: grid, path: seed, values: [1]}]}"


def test_the_schema_of_studies_accepts_those_that_are_shipped_and_refuses_what_the_loader_refuses() -> None:
    jsonschema.Draft202012Validator.check_schema(schema("study"))
    valid, yaml = jsonschema.Draft202012Validator(schema("study")).is_valid, YAML(typ="safe", pure=True)
    studies = sorted((Path(__file__).parents[2] / "workloads" / "studies").glob("*.yaml"))
    assert len(studies) >= 8
    assert all(valid(yaml.load(study)) for study in studies)
    drawn = "{how: sobol, samples: 8, ranges: {seed: {min: 1, max: 4 k, log: true}}}"
    assert valid(yaml.load(STUDY) | {"axes": [yaml.load(drawn)]})
    for wrong in (
        "question: 3", "axis: []", "axes: [{how: grid, path: seed, values: []}]", "axes: [{how: gird}]",
        "axes: [{path: seed, values: [1]}]", "axes: [{how: random, samples: 0, ranges: {seed: {min: 1, max: 2}}}]",
        "axes: [{how: random, samples: 2, ranges: {seed: {min: 1, max: 2, lg: true}}}]", "replicates: 0",
        "until: {ci: 2}", "baselines: [{name: x}]",
    ):  # fmt: skip
        assert not valid(yaml.load(STUDY) | yaml.load(wrong)), wrong


def test_the_reference_names_every_primitive_and_every_key_of_it() -> None:
    text = reference()

    for name, spec in primitives.items():
        section = text.partition(f"## `primitive: {name}`\n")[2].partition("\n## ")[0]
        assert all(f"| `{key}` |" in section for key in kinds.settings(spec))


def test_every_primitive_and_every_key_is_described() -> None:
    for spec in (Scenario, *primitives.values()):
        assert spec.__doc__
        assert all(field.metadata["doc"] for field in kinds.settings(spec).values())
