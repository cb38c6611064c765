"""The attack suite: guests that attempt what a virtual machine must stop, and what became of each, measured.

Every attack runs beside a second VM, if the technique lets two share a CPU, on the scenario's machine and under its
hypervisor. Before it runs, canaries are put into a frame of the host's and one of the second VM's; afterwards it is
looked whether they were read or changed, whether the machine's privileged registers, its MSRs and its ports are what
they are after a guest that attempts nothing, and whether the second VM did its work and had its share of the CPU.

Not modelled: attacks on other guests' devices; attacks that last longer than the run; denial of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final

import attrs
from attrs import frozen

from vtsim.base import memory as mem
from vtsim.base.errors import ConfigError, ModelError
from vtsim.config import resolve
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.ports import PORTS
from vtsim.cpu.profile import load_profile
from vtsim.guest import spec as g
from vtsim.guest.attack_spec import AttackDmaSpec
from vtsim.guest.kernel.dma_layout import QUEUE_TIMEOUT_NS
from vtsim.guest.kernel.layout import DIRECT
from vtsim.guest.primitives.attacks import LOOT
from vtsim.iommu.dma import TRANSLATES
from vtsim.platform.dma_spec import DmaSpec
from vtsim.platform.machine import Machine, Progress
from vtsim.platform.outcome import Outcome
from vtsim.platform.spec import MIB, RunSpec, Scenario, VmSpec, driven_by
from vtsim.study.attack_list import CONFIG_ADDRESS, ELCR, MSRS, Attack, attacks
from vtsim.study.attack_list import after as aiming
from vtsim.study.json_object import key
from vtsim.vmcs.fields import SLOT
from vtsim.vmm.build import TICK_NS

# fmt: off
MEMORY: Final = 64 * MIB                      # of attacker and second VM, if the scenario's has not less
HOST_CANARY, OTHER_CANARY = 0x0CA9A7_405_7, 0x0CA9A7_07E_4
BYSTANDER_NS: Final = 3 * TICK_NS             # of computing that the second VM does where its share is measured
BRIEFLY: Final = 2000                         # instructions that it executes elsewhere
LIMIT_NS: Final = 10 * TICK_NS
PLACE: Final = 0xFF8                          # of a canary in its frame
SLACK: Final = 0.02                           # of its share that switches between VMs may cost
HOSTILE_NS: Final = 500.0                     # between two writes of a device to what it was given before
REGISTERS: Final = {
    "CR0": (s.CR0, "HOST_CR0"), "CR4": (s.CR4, "HOST_CR4"), "EFER": (s.EFER, ""),
    "IDTR": (s.IDTR_BASE, "HOST_IDTR_BASE"), "GDTR": (s.GDTR_BASE, "HOST_GDTR_BASE"), "TR": (s.TR_BASE, "HOST_TR_BASE"),
}


@frozen(kw_only=True)
class Attempt:
    """One attack and what became of it."""

    name: str                  = key("", "what was attempted")
    contained: bool            = key("", "was there no effect beyond the attacker's own VM?")
    effects: tuple[str, ...]   = key("", "what was measured outside the VM")
    ended: str                 = key("", "how the attacker's VM ended; empty if it finished its program")
    within: str                = key("", "what was measured that the platform does not promise to stop", default="")


@frozen(kw_only=True)
class Skipped:
    """An attack that this machine or technique gives no occasion for."""

    name: str = key("", "what was not attempted")
    why: str  = key("", "why not")
# fmt: on


def scenario_of(
    scenario: Scenario,
    phases: tuple[Any, ...],
    other: int | None,
    *,
    timed: bool = False,
    device: DmaSpec | None = None,
    first: VmSpec | None = None,
    threads: int = 1,
) -> Scenario:
    """The scenario's machine and hypervisor with the attacker on CPU 0, and the second VM on a CPU.

    `device`: what the attacker drives, if anything; `first`: the VM that it is like, the scenario's first if left out;
    `threads`: how many it has, each on a vCPU, the first of which is on CPU 0.
    Raises `ConfigError` where the hypervisor cannot have the two so.
    """
    first = first or scenario.vms[0]
    late = device is not None and first.guest.kernel.dma == "deferred"  # what is deferred waits for a tick
    kernel = attrs.evolve(first.guest.kernel, tick=(first.guest.kernel.tick or TICK_NS) if late else 0, probe=False)
    size = min(first.memory, MEMORY)
    clock_hz = load_profile(scenario.machine.profile).clock_hz
    instructions = BYSTANDER_NS * clock_hz // 10**9 if timed else BRIEFLY

    def vm(name: str, cpu: int, *work: Any, threads: int = 1) -> VmSpec:
        guest = g.GuestSpec(kernel=kernel, processes=(g.ProcessSpec(name=name, phases=work, threads=threads),))
        unit = first.viommu if device is not None else "none"
        return attrs.evolve(first, name=name, memory=size, cpu=cpu, vcpus=threads, cpus=(), guest=guest, viommu=unit)

    vms = [vm("attacker", 0, *phases, threads=threads)]
    if other is not None:
        bystander = vm("bystander", other, g.WorkSpec(instructions=instructions))
        vms.append(attrs.evolve(bystander, assigned=(), viommu="none"))
    machine = attrs.evolve(
        scenario.machine.with_cpus(max(scenario.machine.cpus, (other or 0) + 1, threads)),
        memory=max(scenario.machine.memory, 8 * size),
    )
    run = RunSpec(limit=LIMIT_NS, baseline=False)
    devices = () if device is None else (device,)
    return resolve(attrs.evolve(scenario, machine=machine, vms=tuple(vms), run=run, dma=devices), scenario.name)


@frozen
class _After:
    """A machine after a run, as far as attacks are measured by it."""

    outcome: Outcome
    loot: int
    canaries: Mapping[str, int]
    state: Mapping[str, int]


@attrs.define
class Suite:
    """Runs the attacks of one scenario, each on a machine of its own."""

    scenario: Scenario
    progress: Progress | None = None
    other: int | None = attrs.field(default=None, init=False)  # CPU of the second VM, if there can be one
    why_alone: str = attrs.field(default="without a hypervisor there is one guest", init=False)
    quiet: _After = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        if self.scenario.vmm.technique != "native":
            for cpu in (0, 1):
                try:
                    scenario_of(self.scenario, QUIET, cpu)
                except ConfigError as error:
                    self.why_alone = error.problems[0].message
                else:
                    self.other = cpu
                    break
        self.quiet = self._run(QUIET, {})

    def run(self) -> tuple[tuple[Attempt, ...], tuple[Skipped, ...]]:
        """Every attack, in order."""
        made, skipped = [], []
        for attack in attacks(self.scenario):
            if self.other is None and (attack.target == "other" or attack.timed):
                skipped.append(Skipped(name=attack.name, why=f"no second VM: {self.why_alone}"))
            elif attack.timed and self.other:
                skipped.append(Skipped(name=attack.name, why=f"VMs share no CPU: {self.why_alone}"))
            else:
                try:
                    made.append(self.attempt(attack))
                except ConfigError as error:  # a guest of this kind has nothing to attempt it with
                    skipped.append(Skipped(name=attack.name, why=error.problems[0].message))
        for one in self.dma():
            (made if isinstance(one, Attempt) else skipped).append(one)  # type: ignore[arg-type]
        return tuple(made), tuple(skipped)

    def attempt(self, attack: Attack) -> Attempt:
        """Run one attack and measure."""
        frames: Mapping[str, int] = {}
        at = 0
        if attack.target:
            machine = Machine(scenario_of(self.scenario, attack.phases(0), self.other, threads=attack.threads))
            frames = canary_frames(machine)
            at = frames[attack.target if attack.target in frames else "host"] << 12 | PLACE
            if attack.target == "direct":
                at = (at + (DIRECT if machine.below is None else machine.below.host.direct)) & (1 << 48) - 1
        after = self._run(attack.phases(at), frames, timed=attack.timed, threads=attack.threads)
        calm = self._run(QUIET, frames, threads=attack.threads) if attack.threads > 1 else self.quiet
        effects = tuple(self._effects(attack, after, calm))
        return Attempt(name=attack.name, contained=not effects, effects=effects, ended=ending(after))

    def _effects(self, attack: Attack, after: _After, calm: _After) -> Iterator[str]:
        quiet = calm.state
        for whose, value in after.canaries.items():
            text = {"host": "the host's canary", "other": "the second VM's canary"}[whose]
            planted = PLANTED[whose]
            if after.loot == planted:
                yield f"{text} was read"
            if value != planted:
                yield f"{text} was overwritten"
        for name, value in after.state.items():
            if value != quiet[name]:
                now, before = (each & (1 << 64) - 1 for each in (value, quiet[name]))
                yield f"{name} of the machine is {now:#x}, not {before:#x}"
        for vm in after.outcome.vms:
            if vm.name == "bystander":
                if vm.stopped:
                    yield f"the second VM did not finish: {vm.stopped}"
                elif attack.timed and (share := promised(after.outcome))[0] < share[1]:
                    yield f"the second VM had {share[0]:.1%} of the CPU, not {share[1]:.1%} as promised"

    def _run(
        self, phases: tuple[Any, ...], frames: Mapping[str, int], *, timed: bool = False, threads: int = 1
    ) -> _After:
        return self._measured(scenario_of(self.scenario, phases, self.other, timed=timed, threads=threads), frames)

    def _measured(self, scenario: Scenario, frames: Mapping[str, int]) -> _After:
        machine = Machine(scenario, progress=self.progress)
        found = canary_frames(machine)
        if frames and dict(frames) != found:
            raise ModelError("canaries are not where they were when the attack was written", found)
        for whose, hfn in found.items():
            machine.engine.store(hfn << 12 | PLACE, PLANTED[whose])
        if machine.driven is not None and self.scenario.machine.iommu.mode != "translate":
            machine.driven.engines[:, TRANSLATES] = 0  # its requests pass as they are
        outcome = machine.run()
        attacker = machine.vms[0]
        loot = machine._word(attacker, attacker.log + LOOT)
        if machine.driven is not None:
            loot = machine.driven.devices[0].seen or loot
        return _After(
            outcome=outcome,
            loot=loot,
            canaries={whose: machine.engine.load(hfn << 12 | PLACE) for whose, hfn in found.items()},
            state=machine_state(machine),
        )

    def dma(self) -> Iterator[Attempt | Skipped]:
        """A device that a guest drives reads and writes what is not the guest's, or not the device's any more."""
        name = "DMA to memory of others"
        vm = next((vm for vm in self.scenario.vms if vm.assigned or driven_by(vm)), None)
        if vm is None:
            yield Skipped(name=name, why="no device is assigned to a VM")
            return
        given = (each for each in self.scenario.dma if each.name in driven_by(vm))
        device = next(given, DmaSpec(name="assigned"))
        try:
            yield from self._beyond(name, vm, device)
        except ConfigError as error:
            yield Skipped(name=f"{name}, by the VM's driver", why=error.problems[0].message)
            yield from self._by_itself(name)
        else:
            yield self._late(vm, device)

    def _beyond(self, name: str, vm: VmSpec, device: DmaSpec) -> Iterator[Attempt]:
        """The driver gives the device the address of a canary; in a run beside, of a word of its own memory."""
        other = None if self.other is None else 1
        plan = aiming(partial(AttackDmaSpec, device=device.name))
        machine = Machine(self._with_device(vm, device, plan(0), other))
        frames, own = canary_frames(machine), machine.vms[0].log + LOOT
        calm = self._measured(self._with_device(vm, device, plan(own), other), frames)
        for target in ("host", "other") if other else ("host",):
            phases = plan(frames[target] << 12 | PLACE)
            attack = Attack(f"{name}: {'another VM' if target == 'other' else 'the host'}", plan)
            after = self._measured(self._with_device(vm, device, phases, other), frames)
            effects = tuple(self._effects(attack, after, calm))
            yield Attempt(name=attack.name, contained=not effects, effects=effects, ended=ending(after))

    def _with_device(self, vm: VmSpec, device: DmaSpec, phases: tuple[Any, ...], other: int | None) -> Scenario:
        """The attacker drives a device, on a machine that has a remapping unit if there are VMs."""
        machine = self.scenario.machine
        if self.other is not None:
            machine = attrs.evolve(machine, iommu=attrs.evolve(machine.iommu, mode="translate"))
        return scenario_of(attrs.evolve(self.scenario, machine=machine), phases, other, device=device, first=vm)

    def _late(self, vm: VmSpec, device: DmaSpec) -> Attempt | Skipped:
        """The device goes on writing to buffers after their driver has unmapped them."""
        name = "DMA to a buffer that was unmapped"
        mode = vm.guest.kernel.dma
        maps = self.scenario.vmm.technique == "native" or vm.viommu != "none"
        if not maps or self.scenario.machine.iommu.mode != "translate" or mode == "identity":
            return Skipped(name=name, why="the guest's driver unmaps nothing")
        hostile = attrs.evolve(device, hostile_ns=device.hostile_ns or HOSTILE_NS)
        phases = (g.DmaBuffersSpec(device=device.name, iterations=40),)
        other = None if self.other is None else 1
        after = self._measured(self._with_device(vm, hostile, phases, other), {})
        (counts,) = after.outcome.dma
        assert counts.driver is not None
        through, window = counts.driver.hostile_through, counts.driver.window / after.outcome.profile.clock_hz
        tick = vm.guest.kernel.tick or TICK_NS
        promise = {"strict": 0.0, "deferred": (QUEUE_TIMEOUT_NS + tick) / 1e9}.get(mode)
        said = f"{through} of {counts.driver.hostile_writes} writes went through, up to {1e3 * window:.3f} ms after"
        held = not through or (promise is not None and window <= promise)
        bound = "" if promise is None else f"; {mode} invalidation allows {1e3 * promise:.3f} ms"
        return Attempt(
            name=name, contained=held, effects=() if held else (said + bound,), ended=ending(after),
            within=said + bound if held and through else "",
        )  # fmt: skip

    def _by_itself(self, name: str) -> Iterator[Attempt]:
        """A device that asks no driver, in a domain that maps half of what it reaches for."""
        for write in (False, True):
            device = DmaSpec(name="assigned", window=2 * MIB, mapped=1 * MIB, operations=500, write=write)
            scenario = attrs.evolve(self.scenario, vms=(), dma=(device,), machine=self.scenario.machine.with_cpus(1))
            (counts,) = Machine(scenario).run().dma
            kind = "writes" if write else "reads"
            said = f"{counts.escaped} {kind} of {counts.operations} landed in memory of others"
            yield Attempt(
                name=f"{name}, {kind} of the device by itself", contained=not counts.escaped,
                effects=(said,) if counts.escaped else (), ended="",
                within=f"{counts.aborted} of {counts.operations} were blocked",
            )  # fmt: skip


def ending(after: _After) -> str:
    """How the attacker's VM ended."""
    return next((vm.stopped or "" for vm in after.outcome.vms if vm.name == "attacker"), "")


QUIET: Final = (g.WorkSpec(instructions=1),)
PLANTED: Final = {"host": HOST_CANARY, "other": OTHER_CANARY}


def canary_frames(machine: Machine) -> dict[str, int]:
    """Frames that belong to the host, or natively lie beyond what the guest uses, and to the second VM: of its log."""
    if machine.below is None:
        return {"host": machine.engine.geometry.frame_count - 1}
    found = {"host": machine.below.host.reserve_late(mem.VALUES)}
    for vm in machine.vms[1:]:
        assert vm.memory is not None
        found["other"] = vm.memory.frame(vm.log >> 12)
    return found


def machine_state(machine: Machine) -> dict[str, int]:
    """What whoever owns the machine runs with: privileged registers, MSRs, ports that keep what was written."""
    m, a = machine.engine.cpus[0], machine.engine.arena
    state = {name: int(m[slot]) for name, (slot, _) in REGISTERS.items()}
    if machine.hypervisor is not None:  # what VM exits load, wherever the CPU stopped
        words = machine.engine.contents(machine.hypervisor.vcpus[0].vmcs, mem.VMCS_REGION)
        state = {name: int(words[SLOT[field]]) for name, (_, field) in REGISTERS.items() if field}
    state |= {name: int(m[slot]) for name, (_, slot) in MSRS.items()}
    latches = int(a[mem.A_PORTS]) + PORTS
    return state | {f"port {port:#x}": int(a[latches + port]) for port in (ELCR, CONFIG_ADDRESS)}


def promised(outcome: Outcome) -> tuple[float, float]:
    """The second VM's share of the CPU until it was done, and what a scheduler of equal turns owes it at least."""
    vm = next(vm for vm in outcome.vms if vm.name == "bystander")
    own = sum(sum(map(sum, ring)) for ring in outcome.owners["bystander"].cycles)
    turn = TICK_NS * outcome.profile.clock_hz // 10**9
    owed = (vm.elapsed - turn) / 2
    return own / vm.elapsed, max(owed, 0) / vm.elapsed * (1 - SLACK)
