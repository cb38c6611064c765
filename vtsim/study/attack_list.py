"""Which attacks there are on a machine: the phases of the attacker, and whose memory it is after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from attrs import frozen

from vtsim.cpu import slots as s
from vtsim.cpu.profile import load_profile
from vtsim.guest import spec as g
from vtsim.guest.attack_spec import (
    CALLS,
    STATES,
    AttackHypercallsSpec,
    AttackInterruptsSpec,
    AttackLinearSpec,
    AttackMemorySpec,
    AttackNativeSpec,
    AttackStaleSpec,
    AttackStateSpec,
    AttackStateUserSpec,
    AttackTimeSpec,
    AttackUpdateSpec,
)
from vtsim.platform.spec import MIB, Scenario
from vtsim.vmm.techniques import techniques

Phases = Callable[[int], tuple[Any, ...]]
# fmt: off
WHOSE: Final = {"host": "the host's memory", "other": "another VM's memory"}
ELCR, CONFIG_ADDRESS = 0x4D0, 0xCF8
PAGES: Final = ((4096, "4 KiB"), (2 * MIB, "2 MiB"), (1 << 30, "1 GiB"))
MSRS: Final = {"IA32_MISC_ENABLE": (0x1A0, s.MSR_MISC_ENABLE), "IA32_MTRR_DEF_TYPE": (0x2FF, s.MTRR_DEFAULT)}
# fmt: on


@frozen
class Attack:
    """`phases` of the attacker, given the address of the frame it is after; `target`: whose that is."""

    name: str
    phases: Phases
    target: str = ""
    timed: bool = False  # is the second VM's share of the CPU measured?
    threads: int = 1  # of the attacker, each on a vCPU of its own


def attacks(scenario: Scenario) -> Iterator[Attack]:
    """The suite for a machine."""
    profile, vmm = load_profile(scenario.machine.profile), scenario.vmm
    sizes = PAGES if profile.features.pages_1g else PAGES[:2]
    levels = 5 if scenario.vms[0].guest.kernel.paging == "5-level" else 4
    tables = vmm.paging == "direct-pv"
    call = CALLS[tables and techniques[vmm.technique].deprivileged]
    for target, whose in WHOSE.items():
        for size, name in sizes:
            by_page = partial(AttackMemorySpec, page_size=size, levels=levels)
            yield Attack(f"{whose}, mapped by a page of {name}", after(by_page), target)
        if tables:
            for by, name in (("frame", "an entry asked for"), ("table", "a table made writable")):
                yield Attack(f"{whose}, by {name}", after(partial(AttackUpdateSpec, by=by, call=call)), target)
            if not techniques[vmm.technique].deprivileged:  # its program asks by VMCALL
                name = "a stale translation of another vCPU"
                yield Attack(f"{whose}, by {name}", after(AttackStaleSpec), target, threads=2)
    yield Attack("the host's memory, by the host's own addresses", after(AttackLinearSpec), "direct")
    yield Attack("the host's memory, by native methods", after(AttackNativeSpec), "direct")
    for register in STATES:
        yield Attack(f"{register.upper()} from the kernel", only(AttackStateSpec(register=register)))
    for register in STATES:
        yield Attack(f"{register.upper()} from ring 3", only(AttackStateUserSpec(register=register)))
    for port in (ELCR, CONFIG_ADDRESS):
        yield Attack(f"port {port:#x}", only(g.PortOutSpec(port=port, size=1, value=0x5A, iterations=1)))
    for msr, (index, _) in MSRS.items():
        yield Attack(msr, only(g.WrmsrSpec(msr=index, value=0x800, iterations=1)))
    yield Attack("random hypercalls", only(AttackHypercallsSpec(call=call, tables=tables)))
    yield Attack("a storm of port accesses", only(g.PortOutSpec(port=0x80, size=1, iterations=200)), timed=True)
    yield Attack("a storm of interrupts", only(AttackInterruptsSpec(iterations=200)), timed=True)
    yield Attack("starvation, interrupts disabled", only(AttackTimeSpec()), timed=True)


def after(phase: Callable[..., Any]) -> Phases:
    """An attacker of one phase, which is after an address."""
    return lambda at: (phase(target=at),)


def only(phase: Any) -> Phases:
    """An attacker of one phase, which is after nobody's memory."""
    return lambda at: (phase,)
