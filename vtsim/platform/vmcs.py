"""The VMCS of each vCPU of a machine, as it stands when a run ends."""

from __future__ import annotations

from attrs import frozen

from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError
from vtsim.cpu import slots as s
from vtsim.platform.machine import Machine
from vtsim.platform.spec import Scenario
from vtsim.vmcs import state as h
from vtsim.vmcs.fields import FIELDS, SLOT
from vtsim.vmcs.generations import GENERATIONS


@frozen(kw_only=True)
class VcpuVmcs:
    """One vCPU's VMCS: where it is, its state, and the fields that this processor has, as unsigned numbers.

    In non-root operation the guest state is that of the last VM exit: the processor has the present one.
    """

    vm: str
    cpu: int
    address: int
    revision: int
    launched: bool
    current: bool
    nonroot: bool
    cycle: int
    fields: dict[str, int]


def vmcs_after(scenario: Scenario) -> tuple[VcpuVmcs, ...]:
    """Run a scenario to its end or its time limit; the VMCS of each vCPU. Raises `ConfigError` where there is none."""
    if scenario.vmm.technique != "hardware":
        raise ConfigError(
            f"a {scenario.vmm.technique} run has no VMCS",
            field="vmm.technique",
            help="vmm.technique can be hardware, which uses VMX",
        )
    machine = Machine(scenario)
    machine.run()
    capabilities = GENERATIONS[machine.profile.vmx.generation].capabilities()
    known = [field for field in FIELDS if capabilities.has_field(field)]
    engine, hypervisor = machine.engine, machine.hypervisor
    assert hypervisor is not None
    shown = []
    for vcpu in hypervisor.vcpus:
        words, m = engine.contents(vcpu.vmcs, mem.VMCS_REGION), engine.cpus[vcpu.cpu]
        current = int(m[s.VMCS_POINTER]) == vcpu.vmcs << mem.PAGE_SHIFT
        shown.append(
            VcpuVmcs(
                vm=vcpu.name,
                cpu=vcpu.cpu,
                address=vcpu.vmcs << mem.PAGE_SHIFT,
                revision=int(words[h.V_REVISION]) & h.REVISION,
                launched=int(words[h.V_LAUNCHED]) == h.LAUNCHED,
                current=current,
                nonroot=current and bool(m[s.NONROOT]),
                cycle=int(m[s.CYCLE]),
                fields={field.name: int(words[SLOT[field.name]]) & (1 << field.bits) - 1 for field in known},
            )
        )
    return tuple(shown)
