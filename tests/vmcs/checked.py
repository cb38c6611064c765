"""VMCSs for VM entry to check: base states of the recordings, changed, on processors that have more or less."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from attrs import evolve

from vtsim.study.vmx.base_states import BaseStates
from vtsim.study.vmx.cases import PAGE, VMCS_A, VMCS_B, VMCS_C, VMXON_REGION, Environment, Processor
from vtsim.vmcs.capabilities import FEATURES, Capabilities
from vtsim.vmcs.controls import CONTROL, WORDS
from vtsim.vmcs.generations import GENERATIONS

RECORDED, ALL, NEHALEM = "corei7_skylake_x", "all", "nehalem"
SHIPPED = BaseStates(folders=(files("vtsim.study.vmx.data"),))
SGX, RTM, BUS_LOCK = 1 << 2, 1 << 11, 1 << 24
WAIT, KEY_LOCKER, PCONFIG = 1 << 5, 1 << 23, 1 << 18
MONITORING = (2 | 4 << 8 | 48 << 16, 0, 0, 3 | 48 << 5)  # version 2, four general counters, three fixed


@cache
def processor(name: str) -> Processor:
    """The recorded processor, one that has every feature, or an early one with EPT."""
    recorded = SHIPPED.processor(RECORDED)
    if name == RECORDED:
        return recorded
    if name == NEHALEM:
        return evolve(recorded, name=name, capabilities=GENERATIONS["nehalem"].capabilities())
    everything = Capabilities.from_features(
        FEATURES.keys() - {"OPTIONAL_ERROR_CODE", "PHYSICAL_ADDRESSES_32_BIT"}, cr4_fixed1=(1 << 33) - 1
    )
    leaf = recorded.cpuid[7, 0]
    return evolve(
        recorded, name=name, capabilities=everything,
        cpuid={**recorded.cpuid, (10, 0): MONITORING, (7, 0): (
            leaf[0], leaf[1] | SGX | RTM, leaf[2] | BUS_LOCK | WAIT | KEY_LOCKER, leaf[3] | PCONFIG,
        )},
    )  # fmt: skip


def environment(base: str, controls: str = "", on: str = ALL, **fields: int) -> Environment:
    """A base state on a processor, with controls set (or cleared, as in -NAME) and fields changed."""
    of = processor(on)
    values = dict(processor(RECORDED).bases[base])
    for name in controls.split():
        control = CONTROL[name.lstrip("-")]
        word = values.get(control.word.field, 0)
        values[control.word.field] = word & ~control.mask if name[0] == "-" else word | control.mask
    for word in WORDS:
        if word.field in values:
            values[word.field] = of.capabilities.adjust(word, values[word.field])
    values |= {name: value for name, value in fields.items()}
    revision = of.capabilities.revision.to_bytes(4, "little").ljust(PAGE, b"\0")
    regions = dict.fromkeys((VMXON_REGION, VMCS_A, VMCS_B, VMCS_C), revision)
    image = SHIPPED.image()
    return Environment(
        processor=of, image=image, vmcs=values, memory={**image.pages, **regions}, gpr={}, control_registers={},
        run="vmlaunch", mov_ss_blocking=False, instruction=None,
    )  # fmt: skip
