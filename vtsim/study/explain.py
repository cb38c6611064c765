"""What is behind a number: the values of a profile, and the hypervisor program for an exit reason."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Protocol

import attrs
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vtsim.base.errors import ConfigError
from vtsim.base.trace import PRIVILEGES
from vtsim.cpu import ops
from vtsim.cpu.assembler import Instruction, Mem, render
from vtsim.cpu.kernels.msrs import FLUSH_CMD, PRED_CMD
from vtsim.cpu.profile import Profile, explain, load_profile, profile_names
from vtsim.cpu.slots import NO_REGISTER, RCX
from vtsim.study.report import CONFIDENCE_STYLES, PRIVILEGE_STYLES, count, percent
from vtsim.study.table import section
from vtsim.vmcs import reasons as x
from vtsim.vmcs.generations import GENERATIONS
from vtsim.vmcs.reasons import BY_NUMBER, REASON, Reason
from vtsim.vmm.layout import NOFLUSH

# fmt: off
OPERAND_PRICES: Final[Mapping[tuple[int, int], str]] = {  # (op, IMM) where the operand decides the price
    (ops.MOV_FROM_CR, 8): "MOV_FROM_CR8", (ops.MOV_TO_CR, 0): "MOV_TO_CR0", (ops.MOV_TO_CR, 2): "MOV_TO_CR2",
    (ops.MOV_TO_CR, 3):   "MOV_TO_CR3",   (ops.MOV_TO_CR, 4): "MOV_TO_CR4", (ops.MOV_TO_CR, 8): "MOV_TO_CR8",
}
REQUIRES: Final[Mapping[int, str]] = {  # exits that cannot happen where the processor lacks one control
    x.EPT_VIOLATION:    "ENABLE_EPT",                x.EPT_MISCONFIG: "ENABLE_EPT",
    x.INVEPT:           "ENABLE_EPT",                x.INVVPID:       "ENABLE_VPID",
    x.PML_FULL:         "ENABLE_PML",                x.VMFUNC:        "ENABLE_VM_FUNCTIONS",
    x.XSAVES:           "ENABLE_XSAVES_XRSTORS",     x.XRSTORS:       "ENABLE_XSAVES_XRSTORS",
    x.RDRAND:           "RDRAND_EXITING",            x.RDSEED:        "RDSEED_EXITING",
    x.RDTSCP:           "ENABLE_RDTSCP",             x.INVPCID:       "ENABLE_INVPCID",
    x.PREEMPTION_TIMER: "ACTIVATE_PREEMPTION_TIMER", x.APIC_ACCESS:   "VIRTUALIZE_APIC_ACCESSES",
    x.EOI_INDUCED:      "VIRTUAL_INTERRUPT_DELIVERY", x.APIC_WRITE:   "APIC_REGISTER_VIRTUALIZATION",
    x.MONITOR_TRAP_FLAG: "MONITOR_TRAP_FLAG",
}
MSR_PRICES: Final[Mapping[int, str]] = {  # WRMSR of these MSRs
    PRED_CMD: "IBPB", FLUSH_CMD: "L1D_FLUSH", **dict.fromkeys((0x6E0, *range(0x800, 0x840)), "WRMSR_X2APIC"),
}
# fmt: on
READERS: Final = (ops.STM, ops.CMP, ops.TEST, ops.MOV_TO_CR, ops.PUSH)  # of their first register
NOTHING_HELD: Final[Mapping[int, int]] = {}
GUEST: Final = {"guest": {"processes": [{"phases": [{"primitive": "cpuid"}]}]}}


class Stage(Protocol):
    """A stretch of an exit path in one privilege state."""

    @property
    def privilege(self) -> int: ...
    @property
    def title(self) -> str: ...
    @property
    def instructions(self) -> Sequence[Instruction]: ...


def profile_values(name: str) -> RenderableType:
    """Every value of a profile with unit, confidence, source and meaning."""
    profile = load_profile(name)
    rows = explain(profile)
    texts = [text for row in rows for text in (row.source, row.stated.source if row.stated else "") if text]
    numbers = {source: number for number, source in enumerate(dict.fromkeys(texts), 1)}
    table = section(profile.name, ("value",))
    for column in ("unit", "confidence"):
        table.add_column(column, no_wrap=True)
    table.add_column("source", justify="right")
    ranges = section("stated ranges", ("low", "high"))
    ranges.add_column("unit", no_wrap=True)
    ranges.add_column("source", justify="right")
    for row in rows:
        style, stated = CONFIDENCE_STYLES.get(row.confidence, "none"), row.stated
        table.add_row(row.path, row.value, row.unit, Text(row.confidence, style), str(numbers[row.source]))
        if stated:
            ranges.add_row(row.path, str(stated.low), str(stated.high), row.unit, str(numbers[stated.source]))
    sources = Table.grid(padding=(0, 2, 0, 0))
    for source, number in numbers.items():
        sources.add_row(str(number), source)
    shown = (table, Padding(ranges, (1, 0, 0, 0))) if ranges.row_count else (table,)
    return Group(Text(profile.description, style="dim"), *shown, Padding(sources, (1, 0, 0, 0)))


def exit_program(
    reason: str, personality: str, profile: str, paging: str = "auto", sets: Sequence[str] = ()
) -> RenderableType:
    """The program that a personality runs for an exit reason, with prices of a profile.

    `paging` is how the guests' memory is translated; auto: by EPT, or by shadow tables where the processor has none.
    `sets` are `path=value` settings of the scenario in which the exit happens.
    """
    from vtsim.config import scenario_of
    from vtsim.vmm.listing import PAGINGS, exit_stages, usual_paging
    from vtsim.vmm.programs.common import OF_PAGING

    known = BY_NUMBER.get(int(reason)) if reason.isdecimal() else REASON.get(reason.upper())
    if known is None:
        raise ConfigError.unknown("exit reason", reason, REASON)
    load_profile(profile)
    machine, vmm = {"profile": profile}, {"personality": personality}
    scenario = scenario_of({"machine": machine, "vmm": vmm, "vms": [GUEST]}, sets)
    prices = load_profile(scenario.machine.profile).with_overrides(dict(scenario.machine.cpu))
    if "vmm.paging=none" in sets:
        help = f"it can be {', '.join(PAGINGS)}"
        raise ConfigError("paging 'none' has no hypervisor, so no VM exits", field="vmm.paging", help=help)
    if scenario.vmm.technique != "hardware":
        raise ConfigError(
            f"technique {scenario.vmm.technique!r} has no VM exits", field="vmm.technique", help="it can be hardware"
        )
    if paging == "auto" and any(one.startswith("vmm.paging=") for one in sets):
        paging = scenario.vmm.paging
    if paging not in ("auto", *PAGINGS):
        raise ConfigError.unknown("paging", paging, ("auto", *PAGINGS), field="--paging")
    if known.number in REQUIRES:
        _require(REQUIRES[known.number], prices, f"a VM exit {known.name} needs its control")
    if paging in ("ept", "agile"):
        _require("ENABLE_EPT", prices, f"paging {paging!r} needs EPT", "; or --paging shadow, which can do without")
    able = OF_PAGING.get(known.number, PAGINGS)
    if paging not in ("auto", *able):
        raise ConfigError(
            f"no program handles a VM exit {known.name} with paging {paging!r}",
            field="--paging",
            help=f"paging can be auto, {', '.join(able)}",
        )
    if paging == "auto":
        paging = scenario.vmm.paging if scenario.vmm.paging in able else usual_paging(known.number, prices)
    chosen = attrs.evolve(scenario.vmm, paging=paging)
    return program_listing(known, chosen.personality, prices, exit_stages(chosen, known.number, prices), paging, sets)


def _require(control: str, profile: Profile, what: str, otherwise: str = "") -> None:
    """ConfigError unless a processor may set a control."""

    def has(each: Profile) -> bool:
        return each.has_vmx and GENERATIONS[each.vmx.generation].capabilities().supports(control)

    if has(profile):
        return
    able = [name for name in profile_names() if has(load_profile(name))]
    raise ConfigError(
        f"{what} ({control}), which profile {profile.name!r} does not have",
        field="--profile",
        help=f"profiles that have it: {', '.join(able) or 'none'}{otherwise}",
    )


def program_listing(
    reason: Reason, personality: str, profile: Profile, stages: Iterable[Stage], paging: str, sets: Sequence[str] = ()
) -> RenderableType:
    """Op by op: privilege, program, price; then what share of the cycles comes from ops, WORK and hooks.

    Not modelled: memory stalls, which a listing cannot know; turns of loops after the first.
    """
    stages, memory = list(stages), dict[Mem, int]()
    for stage in stages:  # what an exit finds is what one before it left
        deque(prices_of(stage.instructions, profile, memory), maxlen=0)
    table = section(f"{reason.name} under {personality} with paging {paging} on {profile.name}", ())
    for heading in ("op", "cycles", "charged to"):
        table.add_column(heading, justify="right" if heading == "cycles" else "left", no_wrap=heading != "op")
    sums = {"ops": 0.0, "WORK": 0.0, "hooks": 0.0}
    for stage in stages:
        table.add_section()
        table.add_row(Text(stage.title, style="bold"))
        for instruction, cycles in prices_of(stage.instructions, profile, memory):
            sums[_sort(instruction)] += cycles
            state = Text(PRIVILEGES[stage.privilege], PRIVILEGE_STYLES[PRIVILEGES[stage.privilege]])
            shown = "hook" if instruction.op == ops.HOOK else count(cycles)
            table.add_row(state, render(instruction), shown, ops.ACTIVITIES[instruction.activity])
    transitions = {
        "VM exit": profile.transitions.vm_exit_cycles,
        "VM entry": profile.transitions.vm_entry_cycles,
    }
    total = sum(sums.values()) + transitions["VM exit"]
    entry = f"VM exit {transitions['VM exit']} cycles before it, VM entry {transitions['VM entry']} in it"
    shares = ", ".join(f"{name} {percent(cycles / total if total else None)}" for name, cycles in sums.items())
    lines = [
        Text(f"Exit reason {reason.number}, {reason.title!r} in the manual; {entry}."),
        Text(f"At least {count(total)} cycles in all, with one turn of loops and no memory stalls; of them {shares}."),
    ]
    if sets:
        lines.insert(0, Text(f"With {', '.join(sets)}."))
    return Group(table, Padding(Group(*lines), (1, 0, 0, 0)))


def prices_of(
    instructions: Iterable[Instruction], profile: Profile, memory: dict[Mem, int]
) -> Iterator[tuple[Instruction, float]]:
    """Each with its cycles, which may be decided by bits that an earlier one set in a register, or kept in `memory`."""
    held: dict[int, int] = {}
    for i in instructions:
        yield i, price(i, profile, held)
        if i.op == ops.MOV and i.r2 == NO_REGISTER and i.target is None:
            held[i.r1] = i.imm
        elif i.op == ops.OR and i.r2 == NO_REGISTER:
            held[i.r1] = held.get(i.r1, 0) | i.imm
        elif i.op == ops.LD:
            held[i.r1] = memory.get(i.mem, 0)
        elif i.op == ops.ST:
            memory[i.mem] = held.get(i.r1, 0)
        elif i.op == ops.LDM:
            held.clear()
        elif i.op not in READERS:
            held.pop(i.r1, None)


def price(instruction: Instruction, profile: Profile, held: Mapping[int, int] = NOTHING_HELD) -> float:
    """Cycles of one op when everything it touches is in L1; hooks are charged by what they access.

    `held` are the bits known to be set in registers.
    """
    if instruction.op == ops.WORK:
        return instruction.imm * profile.work.cycles_per_100_instructions / 100
    if instruction.op == ops.RETPOLINE:
        return instruction.imm * profile.prices["RETPOLINE"]
    name = OPERAND_PRICES.get((instruction.op, instruction.imm), ops.OPS[instruction.op].price)
    if instruction.op == ops.WRMSR:
        name = MSR_PRICES.get(held.get(RCX, 0), name)
    elif instruction.op == ops.VERW and instruction.r1 == NO_REGISTER:
        name = "VERW"
    elif name == "MOV_TO_CR3" and held.get(instruction.r1, 0) & NOFLUSH:
        name = "MOV_TO_CR3_NOFLUSH"
    if name == "VM_ENTRY":
        return profile.transitions.vm_entry_cycles
    return profile.prices[name] if name else 0


def _sort(instruction: Instruction) -> str:
    return {ops.WORK: "WORK", ops.HOOK: "hooks"}.get(instruction.op, "ops")
