"""Popek and Goldberg's analysis by execution: what ops do in ring 0 and ring 3 while system state differs.

Nothing here says what an op is: it runs once in every combination of ring, system state and operands, on the engine,
and its class follows from the traps, results and changes of state that were observed. Which operands an op is given is
a table of `isa_bench`; the answer is not.

IOPL is 0 throughout, as under a monitor that deprivileges its guest. VMX instructions run in VMX operation, all others
outside. SYSCALL and SYSENTER in ring 3 are traps, because nothing else comes to their entries; INT n is none where its
gate lets it through, because its handler cannot tell it from another event of the vector. What ring 3 itself may write
is its own, as general registers are: segment bases, protection-key rights.
`isa_nonroot` does the same for VMX non-root operation.

Not modelled: analysis of modes other than 64-bit mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from attrs import frozen

from vtsim.base.jit import quiet
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.platform.isa_bench import (
    CR0,
    CS0,
    CS3,
    EXCUSED,
    IF,
    IN_VMX_OPERATION,
    IOPL,
    OTHER_GDT,
    OTHER_IDT,
    SS0,
    SS3,
    TASK,
    Bench,
    Setup,
)

UNDEFINED: Final = 6  # vector
X86, VIRTUALIZABLE = ISAS = "x86", "virtualizable"
OFFENDER, NO_OFFENDER = "offender", "no offender"
CR0_TS: Final = 1 << 3
PLAIN: Final = "as it is"
STATES: Final[Mapping[str, tuple[tuple[int, int], ...]]] = {
    PLAIN: (),
    "another GDT": ((s.GDTR_BASE, OTHER_GDT),),
    "another IDT": ((s.IDTR_BASE, OTHER_IDT),),
    "another LDT": ((s.LDTR_SELECTOR, 0x58),),
    "another task": ((s.TR_SELECTOR, 0x68),),
    "another XCR0": ((s.XCR0, 3),),
    "another IA32_TSC_AUX": ((s.MSR_TSC_AUX, 5),),
    "CR0.TS": ((s.CR0, CR0 | CR0_TS),),
    "interrupts disabled": ((s.RFLAGS, 2),),
}
RESOURCES: Final = {
    name: getattr(s, name)
    for name in (
        "PRIVILEGE", "CR0", "CR2", "CR8", "CR3", "CR4", "EFER", "DR7", "GDTR_BASE", "GDTR_LIMIT", "IDTR_BASE",
        "IDTR_LIMIT", "LDTR_SELECTOR", "TR_SELECTOR", "XCR0", "MSR_KERNEL_GS_BASE", "MSR_TSC_AUX", "HALTED", "VMXON",
        "VMCS_POINTER",
    )
}  # fmt: skip

# Robin and Irvine (2000), "Analysis of the Intel Pentium's Ability to Support a Secure Virtual Machine Monitor": their
# list, and the ops that it names here
ROBIN_IRVINE: Final[Mapping[str, tuple[str, ...]]] = {
    "SGDT": ("SGDT",), "SIDT": ("SIDT",), "SLDT": ("SLDT",), "SMSW": ("SMSW",), "PUSHF": ("PUSHF",), "POPF": ("POPF",),
    "LAR": ("LAR",), "LSL": ("LSL",), "VERR": ("VERR",), "VERW": ("VERW",), "POP": ("POP_SEGMENT",),
    "PUSH": ("PUSH_SEGMENT",), "CALL": ("CALL_FAR",), "JMP": ("JMP_FAR",), "INT n": ("INT",), "RET": ("RET_FAR",),
    "STR": ("STR",), "MOV": ("MOV_FROM_CS", "MOV_FROM_SS", "MOV_TO_SS", "MOV_TO_FS"),
}  # fmt: skip
IN_OTHER_MODES: Final[Mapping[str, str]] = {
    "PUSH": "sensitive where CS and SS can be pushed, which show the ring; 64-bit mode has PUSH of FS and GS only",
}


@frozen(kw_only=True)
class Observed:
    """One execution.

    `trap`: its exception, or None. `called`: did it enter the supervisor as a system call? `seen`: what unprivileged
    code sees. `changed`: what of the system it changed.
    """

    trap: int | None
    called: bool
    seen: tuple[int, ...]
    flags: int
    changed: tuple[str, ...]

    @property
    def trapped(self) -> bool:
        return self.trap is not None or self.called


@frozen(kw_only=True)
class Judged:
    """An op's class, and why: the names of resources it changed, and of states in which it showed another result.

    `undefined`: #UD in every run. `calls`: it only ever traps from ring 3 as a system call.
    """

    op: str
    executed: bool
    undefined: bool
    privileged: bool
    calls: bool
    control: tuple[str, ...]
    behaviour: tuple[str, ...]
    user_sensitive: bool

    @property
    def kind(self) -> str:
        """Its classes in words; an op that raised an exception in every run has none."""
        if not self.executed:
            return "undefined" if self.undefined else "traps in every ring"
        names = {
            "system call": self.calls, "privileged": self.privileged, "control-sensitive": self.control,
            "behaviour-sensitive": self.behaviour,
        }  # fmt: skip
        return ", ".join(name for name, holds in names.items() if holds) or "innocuous"

    @property
    def sensitive(self) -> bool:
        return bool(self.control or self.behaviour)

    @property
    def traps(self) -> bool:
        """Does the supervisor learn of it whenever ring 3 executes it?"""
        return self.privileged or self.calls


@frozen(kw_only=True)
class Analysis:
    """All ops that were analysed, the ops that were not and why, and what follows for the instruction set."""

    profile: str
    isa: str
    ops: tuple[Judged, ...]
    left_out: Mapping[str, str]

    @property
    def offenders(self) -> tuple[str, ...]:
        """Sensitive ops that are not privileged. Popek and Goldberg 1974, theorem 1."""
        return tuple(each.op for each in self.ops if each.sensitive and not each.traps)

    @property
    def hybrid_offenders(self) -> tuple[str, ...]:
        """Ops sensitive in user mode that are not privileged. Popek and Goldberg 1974, theorem 3."""
        return tuple(each.op for each in self.ops if each.user_sensitive and not each.traps)

    @property
    def literature(self) -> dict[str, str]:
        """What the instructions of Robin and Irvine came out as."""
        offenders = set(self.offenders)
        return {
            name: IN_OTHER_MODES.get(name, NO_OFFENDER) if not offenders & set(ops) else OFFENDER
            for name, ops in ROBIN_IRVINE.items()
        }


def run(bench: Bench, name: str, ring: int, state: tuple[tuple[int, int], ...], setup: Setup) -> Observed:
    """Execute one op once."""
    engine, m = bench.engine, bench.engine.cpus[0]
    engine.restore(bench.started if bench.rows[name] in IN_VMX_OPERATION else bench.start)
    bench.registers(setup)
    m[s.RFLAGS], m[s.PRIVILEGE] = IF | 2, ring
    m[s.CS_SELECTOR], m[s.SS_SELECTOR] = (CS3, SS3) if ring == o.R3 else (CS0, SS0)
    m[s.SS_ACCESS_RIGHTS] = 0xC093 | (0x60 if ring == o.R3 else 0)
    m[s.CS_ACCESS_RIGHTS] = 0xA09B | (0x60 if ring == o.R3 else 0)
    m[s.TR_SELECTOR], m[s.SENSITIVE_TRAPS] = TASK, bench.traps
    for slot, value in state:
        m[slot] = value
    m[s.RIP] = bench.program.labels[name]
    engine.sync()
    before = {resource: int(m[slot]) for resource, slot in RESOURCES.items()}
    flags = int(m[s.RFLAGS])
    engine.run(ops=1)
    changed = [resource for resource, slot in RESOURCES.items() if int(m[slot]) != before[resource]]
    if (int(m[s.RFLAGS]) ^ flags) & (IF | IOPL):
        changed.append("RFLAGS")
    return Observed(
        trap=bench.trapped(), called=ring == o.R3 and bench.called_supervisor(), seen=bench.seen(),
        flags=int(m[s.RFLAGS]) & (IF | IOPL), changed=tuple(changed),
    )  # fmt: skip


def analyze(profile: str, isa: str = X86) -> Analysis:
    """Run every op in every state on a processor of this name, and judge it. Raises `ConfigError`: no such profile."""
    bench = Bench(profile, traps=isa == VIRTUALIZABLE)
    with quiet():
        judged = tuple(_judge(bench, name) for name in bench.rows)
    return Analysis(
        profile=profile, isa=isa, ops=judged, left_out={o.OPS[op].name: why for op, why in EXCUSED.items()}
    )  # fmt: skip


Runs = Mapping[tuple[int, str, int], Observed]  # by ring, state, number of the setup


def _judge(bench: Bench, op: str) -> Judged:
    setups = bench.setups(op)
    runs = {
        (ring, name, number): run(bench, op, ring, state, setup)
        for ring in (o.R0, o.R3)
        for name, state in STATES.items()
        for number, setup in enumerate(setups)
    }
    inside, outside = ([each for (at, _, _), each in runs.items() if at == ring] for ring in (o.R0, o.R3))
    undefined = all(each.trap == UNDEFINED for each in runs.values())
    if all(each.trap is not None for each in runs.values()):
        return Judged(
            op=op, executed=False, undefined=undefined, privileged=False, calls=False, control=(), behaviour=(),
            user_sensitive=False,
        )  # fmt: skip
    control = {name for each in runs.values() if not each.trapped for name in each.changed}
    different = {ring: list(_different(runs, ring)) for ring in (o.R0, o.R3)}
    mode = [f"ring ({name})" for (ring, name, number), each in runs.items() if ring == o.R3
            and not each.trapped and _shows(each, runs[o.R0, name, number])]  # fmt: skip
    trapping = all(each.trapped for each in outside)
    return Judged(
        op=op,
        executed=True,
        undefined=False,
        privileged=trapping and not any(each.called for each in outside) and any(not each.trapped for each in inside),
        calls=trapping and any(each.called for each in outside),
        control=tuple(sorted(control)),
        behaviour=tuple(dict.fromkeys([*different[o.R0], *different[o.R3], *mode[:1]])),
        user_sensitive=bool(any(each.changed for each in outside if not each.trapped) or different[o.R3] or mode),
    )


def _different(runs: Runs, ring: int) -> Iterator[str]:
    """States in which a ring sees something else than in the plain one, without a trap."""
    for (at, name, number), each in runs.items():
        plain = runs[ring, PLAIN, number]
        if at == ring and not each.trapped and (plain.trapped or each.seen != plain.seen):
            yield name


def _shows(outside: Observed, inside: Observed) -> bool:
    """Does an op do in ring 3, without a trap, something else than in ring 0?"""
    return inside.trapped or outside.seen != inside.seen or outside.flags != inside.flags
