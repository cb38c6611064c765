"""Popek and Goldberg's analysis by execution: what ops do in ring 0 and ring 3 while system state differs.

Nothing here says what an op is: it runs once in every combination of ring and system state, on the engine, and its
class follows from the traps, results and changes of state that were observed. Which operands an op is given is a
table; the answer is not.

IOPL is 0 throughout, as under a monitor that deprivileges its guest. VMX operation is off: VMX instructions only trap.
`isa_nonroot` does the same for VMX non-root operation.

Not modelled: analysis of segment loads, far transfers and other ops of decoded code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from attrs import frozen

from vtsim.base.errors import ModelError
from vtsim.base.jit import quiet
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import PAGE, Assembler, Mem, Program
from vtsim.cpu.engine import Engine, Geometry
from vtsim.cpu.profile import load_profile
from vtsim.ept.tables import PAGING, SIZE_2M, host_table

MEMORY: Final = 32 << 20
IDT, OTHER_IDT, HANDLERS, DATA, STACK, TSS, CODE = (0x400000 + n * PAGE for n in range(7))
TABLES: Final = 0x800000
MAPPED: Final = 0xE7  # present, writable, user, accessed, dirty, large
VECTORS, SOFTWARE = 64, 0x30
CS0, CS3, SS3 = 0x08, 0x1B, 0x23
AUX_MSR: Final = 0xC0000103
PORT: Final = 0x80
ARITHMETIC_FLAGS: Final = 0x8D5
IF, IOPL = 1 << 9, 3 << 12

# fmt: off
MODEL_ONLY: Final = frozenset(  # no instruction of the processor
    (o.WORK, o.STREAM, o.LONG_WORK, o.HOOK, o.REPLAY_EVENT, o.STOP_OP, o.UD, o.LDM, o.STM)
)
IMMEDIATES: Final[Mapping[int, int]] = {
    o.MOV_FROM_DR: 7, o.MOV_TO_DR: 7, o.INT: SOFTWARE, o.IN: PORT, o.OUT: PORT,
}
IO: Final = (o.IN, o.OUT, o.INS, o.OUTS)
REGISTERS: Final[Mapping[int, tuple[int, ...]]] = {  # ops that are analysed once for each of these immediates
    o.MOV_FROM_CR: (0, 3, 4, 8), o.MOV_TO_CR: (0, 3, 4, 8),
}
VALUES: Final[Mapping[str, int]] = {  # RBX, where another value than the address of data is needed
    "MOV_TO_CR0": 0x80010039, "MOV_TO_CR3": TABLES | 8, "MOV_TO_CR4": 0x2024, "MOV_TO_CR8": 5, "MOV_TO_DR": 0x401,
    "LMSW": 0xB, "JMP_REG": CODE + 0x800, "CALL_REG": CODE + 0x800,
}
ON_STACK: Final[Mapping[int, tuple[int, ...]]] = {
    o.POPF: (2,), o.RET: (CODE + 0x800,), o.IRET: (CODE + 0x800, CS3, 2, STACK + 0x900, SS3),
}
STATES: Final[Mapping[str, tuple[tuple[int, int], ...]]] = {
    "as it is":            (),
    "another GDT":         ((s.GDTR_BASE, DATA + 0x800),),
    "another IDT":         ((s.IDTR_BASE, OTHER_IDT),),
    "another LDT":         ((s.LDTR_SELECTOR, 0x58),),
    "another task":        ((s.TR_SELECTOR, 0x68),),
    "CR0.TS":              ((s.CR0, 0x80010039),),
    "interrupts disabled": ((s.RFLAGS, 2),),
}
# fmt: on
RESOURCES: Final = {
    name: getattr(s, name)
    for name in (
        "PRIVILEGE",
        "CR0",
        "CR2",
        "CR8",
        "CR3",
        "CR4",
        "EFER",
        "DR7",
        "GDTR_BASE",
        "GDTR_LIMIT",
        "IDTR_BASE",
        "IDTR_LIMIT",
        "LDTR_SELECTOR",
        "TR_SELECTOR",
        "GS_BASE",
    )
    if hasattr(s, name)
}  # fmt: skip


@frozen(kw_only=True)
class Observed:
    """One execution: its exception or None, what unprivileged code sees, and what of the system it changed."""

    trap: int | None
    seen: tuple[int, ...]
    flags: int
    changed: tuple[str, ...]


@frozen(kw_only=True)
class Judged:
    """An op's class, and why: the names of resources it changed, and of states in which it showed another result."""

    op: str
    executed: bool
    privileged: bool
    control: tuple[str, ...]
    behaviour: tuple[str, ...]
    user_sensitive: bool

    @property
    def kind(self) -> str:
        """Its classes in words; an op that raised an exception in every run has none."""
        if not self.executed:
            return "not executed"
        names = {
            "privileged": self.privileged, "control-sensitive": self.control, "behaviour-sensitive": self.behaviour
        }  # fmt: skip
        return ", ".join(name for name, holds in names.items() if holds) or "innocuous"

    @property
    def sensitive(self) -> bool:
        return bool(self.control or self.behaviour)


@frozen(kw_only=True)
class Analysis:
    """All ops that were analysed, the ops that were not, and what follows for the instruction set."""

    ops: tuple[Judged, ...]
    left_out: tuple[str, ...]

    @property
    def offenders(self) -> tuple[str, ...]:
        """Sensitive ops that are not privileged. Popek and Goldberg 1974, theorem 1."""
        return tuple(each.op for each in self.ops if each.sensitive and not each.privileged)

    @property
    def hybrid_offenders(self) -> tuple[str, ...]:
        """Ops sensitive in user mode that are not privileged. Popek and Goldberg 1974, theorem 3."""
        return tuple(each.op for each in self.ops if each.user_sensitive and not each.privileged)


class Bench:
    """A machine of one CPU and the ops under analysis, each a row of one page of code, by name."""

    def __init__(self, profile: str) -> None:
        self.engine = Engine(
            load_profile(profile),
            Geometry(memory_bytes=MEMORY, pool_pages=100, code_pages=8, rows=1024, owners=2, trace_rows=64),
        )
        engine = self.engine
        engine.frames_from(TABLES >> 12, 16, shuffled=False, seed=0)
        table = host_table(engine, PAGING)
        table.map_range(0, 0, MEMORY >> 12, MAPPED, SIZE_2M)
        handlers = Assembler("handlers", HANDLERS, activity=o.EXIT_HANDLER)
        for vector in range(VECTORS):
            handlers.label(str(vector))
            handlers.op(o.STOP_OP, imm=vector)
        program = handlers.assemble()
        self.handlers = {at: int(name) for name, at in program.labels.items()}
        engine.place(program, lambda page: page >> 12)
        for idt in (IDT, OTHER_IDT):
            for vector in range(VECTORS):
                at = program.labels[str(vector)]
                kind = 0xEE if vector == SOFTWARE else 0x8E
                engine.store(idt + 16 * vector, (at & 0xFFFF) | CS0 << 16 | kind << 40 | (at >> 16 & 0xFFFF) << 48)
                engine.store(idt + 16 * vector + 8, 0)
        engine.store(TSS + 4, STACK + 0xC00)
        m = engine.cpus[0]
        m[s.CR3], m[s.IDTR_BASE], m[s.IDTR_LIMIT] = table.root << 12, IDT, 16 * VECTORS - 1
        m[s.TR_BASE] = TSS
        self.program, self.rows = self._rows()
        engine.place(self.program, lambda page: page >> 12)
        self.start = engine.save()

    def _rows(self) -> tuple[Program, dict[str, int]]:
        a, rows = Assembler("ops under analysis", CODE, activity=o.APPLICATION), {}
        for op in o.OPS:
            if op.number in MODEL_ONLY or op.number >= o.MOVE or op.number in (o.JMP, o.JCC, o.LOOP, o.CALL, o.JMP_MEM):
                continue
            registers = REGISTERS.get(op.number, ())
            for name, imm in [(f"{op.name}{n}", n) for n in registers] or [(op.name, IMMEDIATES.get(op.number, 0))]:
                a.label(name)
                a.op(op.number, s.RBX, s.NO_REGISTER, imm, Mem(s.RSI, size=4 if op.number in IO else 8))
                a.op(o.NOP)
                rows[name] = op.number
        self._more(a)
        return a.assemble(), rows

    def _more(self, a: Assembler) -> None:
        """Other rows that stand behind the ops."""

    def registers(self, name: str) -> None:
        """What an op finds in the general registers and on the stack."""
        engine, m = self.engine, self.engine.cpus[0]
        m[s.GPR : s.GPR + 16] = 0
        m[s.GPR + s.RBX], m[s.GPR + s.RSI] = VALUES.get(name, DATA), DATA
        m[s.GPR + s.RDI], m[s.GPR + s.RCX], m[s.GPR + s.RSP] = DATA + 64, AUX_MSR, STACK + 0x800
        for place, value in enumerate(ON_STACK.get(self.rows[name], ())):
            engine.store(STACK + 0x800 + 8 * place, value)

    def seen(self) -> tuple[int, ...]:
        """What unprivileged code sees after an op."""
        engine, m = self.engine, self.engine.cpus[0]
        memory = [engine.load(at) for at in (DATA, DATA + 8, DATA + 64, STACK + 0x7F8)]
        flags = int(m[s.RFLAGS]) & ARITHMETIC_FLAGS
        return (int(m[s.RIP]), flags, *(int(m[s.GPR + n]) for n in range(16)), *memory)

    def trapped(self) -> int | None:
        """The vector whose handler is next; INT that its gate lets through is no exception."""
        vector = self.handlers.get(int(self.engine.cpus[0][s.RIP]))
        return None if vector == SOFTWARE else vector

    def run(self, name: str, ring: int, state: tuple[tuple[int, int], ...]) -> Observed:
        """Execute one op once."""
        engine, m = self.engine, self.engine.cpus[0]
        engine.restore(self.start)
        self.registers(name)
        m[s.RFLAGS], m[s.PRIVILEGE] = IF | 2, ring
        m[s.CS_SELECTOR], m[s.SS_SELECTOR] = (CS3, SS3) if ring == o.R3 else (CS0, 0)
        for slot, value in state:
            m[slot] = value
        m[s.RIP] = self.program.labels[name]
        engine.sync()
        before = {name: int(m[slot]) for name, slot in RESOURCES.items()}
        flags = int(m[s.RFLAGS])
        engine.run(ops=1)
        changed = [name for name, slot in RESOURCES.items() if int(m[slot]) != before[name]]
        if (int(m[s.RFLAGS]) ^ flags) & (IF | IOPL):
            changed.append("RFLAGS")
        return Observed(
            trap=self.trapped(), seen=self.seen(), flags=int(m[s.RFLAGS]) & (IF | IOPL), changed=tuple(changed)
        )


def analyze(profile: str) -> Analysis:
    """Run every op in every state on a processor of this name, and judge it. Raises `ConfigError`: no such profile."""
    bench = Bench(profile)
    with quiet():
        judged = tuple(_judge(bench, name) for name in bench.rows)
    known = {*bench.rows.values(), *MODEL_ONLY}
    return Analysis(ops=judged, left_out=tuple(op.name for op in o.OPS if op.number not in known))


def _judge(bench: Bench, op: str) -> Judged:
    runs = {(ring, name): bench.run(op, ring, state) for ring in (o.R0, o.R3) for name, state in STATES.items()}
    inside = [run for (ring, _), run in runs.items() if ring == o.R0]
    outside = [run for (ring, _), run in runs.items() if ring == o.R3]
    executed = any(run.trap is None for run in runs.values())
    control = {name for run in runs.values() if run.trap is None for name in run.changed}
    user_control = any(run.trap is None and run.changed for run in outside)
    different = {
        ring: [name for name, run in _untrapped(runs, ring) if _differs(run, runs[ring, "as it is"])]
        for ring in (o.R0, o.R3)
    }
    mode = [
        f"ring ({name})"
        for name, run in _untrapped(runs, o.R3)
        if runs[o.R0, name].trap is None and (run.seen != runs[o.R0, name].seen or run.flags != runs[o.R0, name].flags)
    ]
    return Judged(
        op=op,
        executed=executed,
        privileged=all(run.trap is None for run in inside) and all(run.trap is not None for run in outside),
        control=tuple(sorted(control)),
        behaviour=tuple(dict.fromkeys([*different[o.R0], *different[o.R3], *mode[:1]])),
        user_sensitive=bool(user_control or different[o.R3] or mode),
    )


def _untrapped(runs: Mapping[tuple[int, str], Observed], ring: int) -> Iterator[tuple[str, Observed]]:
    return ((name, run) for (at, name), run in runs.items() if at == ring and run.trap is None)


def _differs(run: Observed, plain: Observed) -> bool:
    if plain.trap is not None:
        raise ModelError("an op traps only in the plain state", {"trap": plain.trap})
    return run.seen != plain.seen
