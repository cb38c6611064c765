"""From what machines leave behind to a Result: names, shares, sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from vtsim import __version__
from vtsim.cpu.ops import ACTIVITIES, PRIVILEGES
from vtsim.cpu.profile import explain
from vtsim.guest.traces.recorded_exits import RecordedExits
from vtsim.platform.outcome import (
    LEVELS,
    DmaOutcome,
    DriverOutcome,
    ExitCounts,
    Outcome,
    OwnerCounts,
    PageRequestOutcome,
)
from vtsim.study import result as r
from vtsim.study.replay_table import recorded_for, replay_table
from vtsim.vmcs.reasons import reason_name

EVENTS: Final = ("exceptions", "page_faults", "interrupts", "injections", "syscalls", "entries", "halts",
                 "device_accesses", "port_accesses", "dirty_assists", "lines_from_other_cpus",
                 "lines_taken_from_other_cpus")  # fmt: skip
PURPOSES: Final = {"data": "data_dram", "guest_tables": "guest_dram", "ept_tables": "ept_dram", "code": "fetch_dram"}
By = dict[str, dict[str, int]]


def cycles_by(owners: Iterable[OwnerCounts], rings: Sequence[int] = (0, 1)) -> By:
    """{privilege: {activity: cycles}}, without zeroes."""
    by: By = {}
    for owner in owners:
        for ring in rings:
            for privilege, row in enumerate(owner.cycles[ring]):
                for activity, cycles in enumerate(row):
                    if cycles:
                        at = by.setdefault(PRIVILEGES[privilege], {})
                        at[ACTIVITIES[activity]] = at.get(ACTIVITIES[activity], 0) + cycles
    return {name: by[name] for name in PRIVILEGES if name in by}


def total(by: Mapping[str, Mapping[str, int]]) -> int:
    """The sum of a table of cycles."""
    return sum(sum(row.values()) for row in by.values())


def added(owners: Sequence[OwnerCounts]) -> dict[str, int]:
    """Counters of several owners, summed."""
    sums: dict[str, int] = {}
    for owner in owners:
        for name, value in owner.counters.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def exits_of(owners: Sequence[OwnerCounts], cycles_of_run: int) -> tuple[r.Exit, ...]:
    """Exits by reason, most cycles first."""
    merged: dict[int, list[ExitCounts]] = {}
    for owner in owners:
        for each in owner.exits:
            merged.setdefault(each.reason, []).append(each)
    exclusive = sum(each.exclusive_cycles for group in merged.values() for each in group)
    found = []
    for reason, group in merged.items():
        distribution: dict[int, int] = {}
        for each in group:
            for cycles, count in each.distribution.items():
                distribution[cycles] = distribution.get(cycles, 0) + count
        found.append(
            r.Exit.measured(
                reason_name(reason),
                distribution,
                cycles=sum(each.cycles for each in group),
                exclusive_cycles=sum(each.exclusive_cycles for each in group),
                max_cycles=max(each.longest for each in group),
                cycles_of_exits=max(exclusive, 1),
                cycles_of_run=max(cycles_of_run, 1),
            )
        )
    return tuple(sorted(found, key=lambda each: (-each.cycles, each.reason)))


def guest_rings(guests: Sequence[OwnerCounts], *, native: bool) -> r.GuestInstructions:
    """Instructions of guest programs by the ring they believe in, the emulated ones included."""
    rings = []
    for ring in (0, 1):
        kernels = sum(g.deprivileged for g in guests) * (-1 if ring else 1)
        retired = sum(g.instructions[ring] + g.instructions[2 + ring] for g in guests) + kernels
        emulated = 0 if native else sum(g.emulated[ring] for g in guests)
        rings.append(r.GuestRing(executed=retired + emulated, emulated=emulated))
    return r.GuestInstructions(ring0=rings[0], ring3=rings[1])


def _served(counts: Iterable[int]) -> r.ServedBy:
    return r.ServedBy(**dict(zip(LEVELS, counts, strict=True)))


def measured(
    everyone: Sequence[OwnerCounts], guests: Sequence[OwnerCounts], elapsed: int, *, native: bool
) -> dict[str, object]:
    """The parts that a run, its baseline and each VM have in common, as keyword arguments."""
    by = cycles_by(everyone)
    n = added(everyone)
    guest = guest_rings(guests, native=native)
    walks = n["walks"]
    references = n["guest_references"] + n["ept_references"]
    guest_served, ept_served = ([n[f"{dimension}_{level}"] for level in LEVELS] for dimension in ("guest", "ept"))
    served = _served(map(sum, zip(guest_served, ept_served, strict=True)))
    beyond = n["data_l2"] + n["data_l3"] + n["data_dram"]
    return {
        "efficiency": guest.efficiency(),
        "slowdown": None,
        "cycles": r.Cycles(
            total=total(by),
            elapsed=elapsed,
            by=by,
            by_owner={
                owner.name: {
                    f"ring{3 * ring}": table for ring in (0, 1) if (table := cycles_by([owner], (ring,)))
                }
                for owner in everyone
            },
        ),
        "instructions": {
            name: sum(owner.instructions[n] for owner in everyone) for n, name in enumerate(PRIVILEGES)
        },
        "guest": guest,
        "exits": exits_of(everyone, total(by)),
        "walks": r.Walks(
            count=walks,
            completed=n["walks_completed"],
            faults=n["walks_faulted"],
            violations=n["walks_violated"],
            misconfigurations=n["walks_misconfigured"],
            abandoned=n["walks_abandoned"],
            wrong_path=n["wrong_walks"],
            cycles=n["walk_cycles"],
            references=references,
            references_per_walk=references / walks if walks else 0.0,
            served_by=served,
            guest=r.WalkDimension(
                references=n["guest_references"],
                served_by=_served(guest_served),
                started_at=r.StartedAt(nested_tlb=0, walk_cache=n["pwc_hits"], root=walks - n["pwc_hits"]),
            ),
            ept=r.WalkDimension(
                references=n["ept_references"],
                served_by=_served(ept_served),
                started_at=r.StartedAt(
                    nested_tlb=n["nested_tlb_hits"],
                    walk_cache=n["ept_pwc_hits"],
                    root=n["nested_tlb_misses"] - n["ept_pwc_hits"],
                ),
            ),
        ),
        "tlb": r.Tlb(
            accesses=n["accesses"], dtlb_misses=n["dtlb_misses"], itlb_misses=n["itlb_misses"],
            stlb_hits=n["stlb_hits"], pwc_hits=n["pwc_hits"], ept_pwc_hits=n["ept_pwc_hits"],
            entry_hits=n["guest_entry_hits"], ept_entry_hits=n["ept_entry_hits"],
            nested_tlb_hits=n["nested_tlb_hits"], nested_tlb_misses=n["nested_tlb_misses"],
            dropped=n["translations_dropped"],
        ),
        "caches": r.Caches(
            data=r.ServedBy(l1d=n["accesses"] - beyond, l2=n["data_l2"], l3=n["data_l3"], dram=n["data_dram"]),
            tables=served,
            code=r.CodeServedBy(l2=n["fetch_l2"], l3=n["fetch_l3"], dram=n["fetch_dram"]),
            pairs=n["pair_dram"],
        ),
        "events": {name: n[name] for name in EVENTS},
        "dram": {
            purpose: {"local": n[counter] - n[f"{counter}_remote"], "remote": n[f"{counter}_remote"]}
            for purpose, counter in PURPOSES.items()
        },
    }  # fmt: skip


def parameters(outcome: Outcome) -> r.Parameters:
    """Every profile value that the run used, with its source."""
    overridden = dict(outcome.scenario.machine.cpu)
    values = {
        row.path: r.Parameter(
            value=row.value,
            unit=row.unit,
            source="scenario" if row.path in overridden else row.source,
            confidence="set" if row.path in overridden else row.confidence,
        )
        for row in explain(outcome.profile)
    }
    counts: dict[str, int] = {}
    for each in values.values():
        counts[each.confidence] = counts.get(each.confidence, 0) + 1
    ranges = {
        row.path: r.Stated(low=row.stated.low, high=row.stated.high, source=row.stated.source)
        for row in explain(outcome.profile)
        if row.stated
    }
    return r.Parameters(confidence=dict(sorted(counts.items())), values=values, ranges=ranges)


def compared(outcome: Outcome) -> r.Replay | None:
    """The predicted exits of a recorded guest beside those that a real hypervisor took, where both are known."""
    if outcome.replayed is None or (file := recorded_for(outcome.scenario)) is None:
        return None
    return replay_table(outcome.replayed, RecordedExits.load(file))


def _driver(driver: DriverOutcome | None, clock_hz: int) -> r.Driver | None:
    if driver is None:
        return None
    n = driver.counts
    elapsed = n["elapsed"] or 1
    return r.Driver(
        descriptors=driver.posted,
        done=driver.done,
        refused=driver.refused,
        elapsed_cycles=n["elapsed"],
        cycles_per_buffer=n["elapsed"] / (driver.done or 1),
        maps=n["maps"],
        map_cycles=n["map_cycles"] / (n["maps"] or 1),
        unmaps=n["unmaps"],
        unmap_cycles=n["unmap_cycles"] / (n["unmaps"] or 1),
        invalidations=n["invalidations"],
        invalidation_cycles=n["invalidation_cycles"] / (n["invalidations"] or 1),
        invalidation_share=n["invalidation_cycles"] / elapsed,
        device_invalidations=n["device_invalidations"],
        timeouts=n["timeouts"],
        given_up=n["given_up"],
        flushes=n["flushes"],
        interrupts=driver.interrupts,
        interrupts_blocked=driver.interrupts_blocked,
        interrupts_merged=driver.interrupts_merged,
        interrupts_handled=n["interrupts"],
        hostile_writes=driver.hostile_writes,
        hostile_through=driver.hostile_through,
        window_ns=driver.window * 1e9 / clock_hz,
        pages=None if driver.pages is None else _pages(driver.pages, n, clock_hz),
    )


def _pages(pages: PageRequestOutcome, n: Mapping[str, int], clock_hz: int) -> r.PageRequests:
    ended = pages.succeeded + pages.refused
    return r.PageRequests(
        requests=pages.requests,
        groups=pages.groups,
        succeeded=pages.succeeded,
        refused=pages.refused,
        waiting=pages.waiting,
        unexpected=pages.unexpected,
        most=pages.most,
        held=pages.held,
        failed=pages.failed,
        wait_mean_ns=pages.wait_sum * 1e9 / clock_hz / (ended or 1),
        wait_max_ns=pages.wait_most * 1e9 / clock_hz,
        handled=n["page_requests"],
        handled_cycles=n["page_request_cycles"] / (n["page_requests"] or 1),
        mapped=n["pages_mapped"],
        invalid=n["page_requests_invalid"],
        flood=pages.flood,
        flood_owed=pages.flood_owed,
        flood_refused=pages.flood_refused,
        flood_succeeded=pages.flood_succeeded,
    )


def _dma(device: DmaOutcome, clock_hz: int) -> r.Dma:
    ended = device.operations or 1
    elapsed_ns = device.elapsed_ns if device.driver is None else device.driver.counts["elapsed"] * 1e9 / clock_hz
    return r.Dma(
        name=device.name,
        operations=device.operations,
        aborted=device.aborted,
        escaped=device.escaped,
        gbps=8 * device.bytes / elapsed_ns if elapsed_ns else 0.0,
        latency=r.Latency(
            mean_ns=device.latency_sum_ns / ended,
            p50_ns=r.percentile(device.latencies or {0: 1}, 50),
            p99_ns=r.percentile(device.latencies or {0: 1}, 99),
            max_ns=device.longest_ns,
        ),
        walks=device.walks,
        walk_reads=device.walk_reads,
        walk_wait_ns=device.walk_wait_ns,
        line_hits=device.line_hits,
        tlb_hits=device.tlb_hits,
        translations=device.translations,
        line_misses=device.line_misses,
        driver=_driver(device.driver, clock_hz),
    )


def _hypercalls(counted: Mapping[str, Mapping[str, int]]) -> r.Hypercalls:
    stops = counted.get("stops", {})
    return r.Hypercalls(calls=counted["calls"], requests=counted["requests"], stops=stops, **counted["events"])


def _shadow(counted: Mapping[str, int] | None, n: Mapping[str, int]) -> r.ShadowPaging | None:
    if counted is None:
        return None
    kinds = {name: n[name] for name in ("true_page_faults", "hidden_page_faults", "unprotecting_page_faults")}
    exits = n["page_fault_exits"]
    return r.ShadowPaging(page_faults=exits, other_page_faults=exits - sum(kinds.values()), **kinds, **counted)


def result_of(outcomes: Sequence[Outcome]) -> r.Result:
    """The Result of one run: one machine, or natively one machine per guest."""
    first = outcomes[0]
    scenario, profile = first.scenario, first.profile
    native = scenario.vmm.technique == "native" or not scenario.vms
    names = [vm.name for outcome in outcomes for vm in outcome.vms]
    everyone = [
        owner
        for outcome in outcomes
        for owner in outcome.owners.values()
        if owner.name in names or not names or total(cycles_by([owner]))
    ]
    guests = [owner for owner in everyone if owner.name in names]
    elapsed = max(outcome.elapsed for outcome in outcomes)
    wall = sum(outcome.wall_s for outcome in outcomes)
    common = measured(everyone, guests, elapsed, native=native)
    memory = {name: count for outcome in outcomes for name, count in outcome.memory.items()}
    for vm in (vm for outcome in outcomes for vm in outcome.vms):
        for name, count in vm.memory.items():
            memory[name] = memory.get(name, 0) + count
    vms = {}
    instruction_sets = {vm.name: vm.isa for outcome in outcomes for vm in outcome.scenario.vms}
    for outcome in outcomes:
        for vm in outcome.vms:
            owner = [outcome.owners[vm.name]]
            vms[vm.name] = r.VmResult(
                cpu=vm.cpu,
                isa=instruction_sets[vm.name],
                host_memory=vm.memory,
                shadow=_shadow(vm.shadow, outcome.owners[vm.name].counters),
                **measured(owner, owner, vm.elapsed, native=native),  # type: ignore[arg-type]
            )
    n = added(everyone)
    instructions = sum(sum(owner.instructions) for owner in everyone)
    exits = sum(each.count for owner in everyone for each in owner.exits)
    return r.Result(
        **common,  # type: ignore[arg-type]
        host_memory=memory,
        simulated_s=elapsed / profile.clock_hz,
        vtsim_version=__version__,
        scenario=scenario.name,
        description=scenario.description,
        seed=scenario.seed,
        profile=profile.name,
        profile_digest=profile.digest(),
        clock_hz=profile.clock_hz,
        hypervisor=r.Hypervisor(
            technique="native" if native else scenario.vmm.technique,
            personality="" if native else scenario.vmm.personality,
            paging="none" if native else scenario.vmm.paging,
        ),
        vms=vms,
        native=None,
        rate=r.Rate(
            instructions_per_s=instructions / wall if wall else 0.0,
            accesses_per_s=n["accesses"] / wall if wall else 0.0,
            exits_per_s=exits / wall if wall else 0.0,
            wall_s=wall,
        ),
        stopped={vm.name: vm.stopped for outcome in outcomes for vm in outcome.vms if vm.stopped},
        partial=any(outcome.partial for outcome in outcomes),
        approximations=tuple(dict.fromkeys(a for outcome in outcomes for a in outcome.approximations)),
        notes=tuple(dict.fromkeys(each for outcome in outcomes for each in outcome.notes)),
        parameters=parameters(first),
        replay=compared(first),
        dma=tuple(_dma(device, profile.clock_hz) for outcome in outcomes for device in outcome.dma),
        iommu=first.iommu,
        translations=None if first.translations is None else r.Translations(**first.translations),
        clusters=None if first.clusters is None else r.Clusters(**first.clusters),
        software=None if first.software is None else r.SoftwareCpu(**first.software),
        monitor=None if first.monitor is None else r.Monitor(**first.monitor),
        hypercalls=None if first.hypercalls is None else _hypercalls(first.hypercalls),
    )
