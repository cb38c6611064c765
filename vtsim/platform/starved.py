"""Guests that get nowhere, because what comes again and again takes longer than the time until it comes again.

Seen in where the cycles of the last stretch went. The run goes on: its user is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from attrs import define, field, frozen

from vtsim.base.units import DURATION
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu.engine import Engine
from vtsim.platform.spec import Scenario

STRETCH: Final = 1 << 25  # cycles that are looked at together; a look costs microseconds
SHORT: Final = 100_000  # ns; no turn of a daemon takes longer unless it is asked to look at very many pages
OWN_WORK: Final = (o.APPLICATION, o.PAGE_FAULT_PATH, o.DRIVER, o.DMA_MAP, o.DMA_UNMAP, o.INVALIDATION)
AT_REST: Final = (o.IDLE, o.HALTED_CYCLES)


@frozen(kw_only=True, eq=False)
class Spent:
    """What one owner did in a stretch."""

    cycles: Any  # by activity
    user: int  # instructions of ring 3 as a guest believes
    interrupts: int
    halts: int


@define(eq=False)
class Counted:
    """The account of one owner, and how it stood at the last look."""

    engine: Engine
    at: int
    before: Any = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.before = self._now()

    def _now(self) -> Any:
        return self.engine.arena[self.at : self.at + k.OWN_EXITS].copy()

    def spent(self) -> Spent:
        now = self._now()
        new, self.before = now - self.before, now
        instructions = new[k.OWN_INSTRUCTIONS : k.OWN_INSTRUCTIONS + 4]
        user = instructions[o.R3] + instructions[o.N3] - new[k.OWN_DEPRIVILEGED] + new[k.OWN_EMULATED + 1]
        return Spent(
            cycles=new[: 2 * k.RING_STRIDE].reshape(-1, o.ACTIVITY_SLOTS).sum(axis=0),
            user=int(user),
            interrupts=int(new[k.INTERRUPTS]),
            halts=int(new[k.HALTS]),
        )


@define(eq=False)
class Starvation:
    """Looks at a machine from time to time; says each thing once."""

    engine: Engine
    scenario: Scenario
    since: int = field(default=0, init=False)
    owners: dict[str, Counted] = field(init=False)
    said: set[str] = field(factory=set, init=False)

    def __attrs_post_init__(self) -> None:
        self.owners = {name: Counted(self.engine, at) for name, at in self.engine.owners.items()}

    def look(self, now: int, *, last: bool = False) -> Iterator[str]:
        """Yield what is new, once a stretch is over or the run is."""
        stretch = now - self.since
        if stretch < (1 if last else STRETCH):
            return
        self.since = now
        spent = {name: counted.spent() for name, counted in self.owners.items()}
        by_daemons = tuple(self._by_daemons(spent, stretch))  # a tick is all that those leave
        for cause, sentence in by_daemons or self._by_ticks(spent):
            if cause not in self.said:
                self.said.add(cause)
                yield sentence

    def _by_ticks(self, spent: dict[str, Spent]) -> Iterator[tuple[str, str]]:
        halts = sum(each.halts for each in spent.values())
        for number, vm in enumerate(self.scenario.vms):
            tick, its = vm.guest.kernel.tick, spent[vm.name]
            if vm.guest.replays:
                continue
            others = 9 * its.cycles[list(OWN_WORK)].sum() + its.cycles[o.SYSCALL_PATH] + 100 * its.user
            if tick and its.cycles[o.INTERRUPT_PATH] > others and its.interrupts > 10 * halts:
                yield (
                    vm.name,
                    f"{vm.name} does nothing but handle interrupts: its kernel's tick of {DURATION.format(tick)} is "
                    f"shorter than handling one takes; vms.{number}.guest.kernel.tick can be longer, or off",
                )

    def _by_daemons(self, spent: dict[str, Spent], stretch: int) -> Iterator[tuple[str, str]]:
        periods = dict(self._periods())
        if not periods:
            return
        guests = [spent[vm.name] for vm in self.scenario.vms]
        cycles, user = sum(each.cycles for each in guests), sum(each.user for each in guests)
        everyone = sum(each.cycles for each in spent.values())
        busy = int(everyone.sum() - everyone[list(AT_REST)].sum())
        of_guests = int(cycles.sum() - cycles[list(AT_REST)].sum())
        at_work = 10 * busy > 9 * stretch  # on one CPU at least: who rests is not starved
        if at_work and 5 * of_guests < busy < 5 * everyone[o.MEMORY_MANAGEMENT] and 1000 * user < busy:
            which = " and ".join(f"{path} of {DURATION.format(period)}" for path, period in periods.items())
            yield (
                which,
                f"guests have {100 * of_guests / busy:.0f} % of the time, work on their memory takes the rest: {which} "
                "is shorter than a turn takes, and can be longer",
            )

    def _periods(self) -> Iterator[tuple[str, int]]:
        """The periods of what the hypervisor does again and again that are short."""
        vmm = self.scenario.vmm
        for path, on, period in (
            ("vmm.dirty_log.period", vmm.dirty_log.on, vmm.dirty_log.period),
            ("vmm.sharing.period", vmm.sharing.on, vmm.sharing.period),
            ("vmm.collapse.period", vmm.collapse.on, vmm.collapse.period),
        ):
            if on and period <= SHORT and vmm.technique == "hardware":
                yield path, period
