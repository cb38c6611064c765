"""Translates blocks of a guest into code of the host that works on the guest's registers in memory.

A block ends at a branch, at the end of its page, at an operation that is left to the interpreter's programs, or when it
is long enough. It begins with a look at interrupts, and exits to blocks of its own page become jumps. Where an access
may fault, RIP and the count of instructions are brought up to date before. Flags that are set again before anybody can
ask are not kept, and a conditional jump behind what sets its flags takes them from the processor.

Not modelled: what a translator computes beside its loads and stores; registers of the guest that are kept in registers
of the host from one instruction to the next; lines of code that are in the cache because they were just written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from attrs import define, field

from vtsim.base import memory as mem
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.engine import Engine
from vtsim.cpu.slots import R8, R10, R14, RAX, RBX, RCX, RDX, RSI
from vtsim.vmm.monitor.layout import saved, vcpu
from vtsim.vmm.software.events import ask
from vtsim.vmm.software.instructions import ALU, UNROLLED, flags_of, translated_work
from vtsim.vmm.software.mmu import READ, WRITE, load, look_up, store
from vtsim.vmm.software.platform import Row

BLOCK_INSTRUCTIONS: Final = 24
BLOCK_BYTES: Final = 1024  # of a translation, beyond which no further instruction is taken
BLOCK_ROOM: Final = 4096  # that the cache must have for another block
BLOCKS: Final = 4096  # in the cache, each with at most one operation that is left to the program
PURE: Final = (*ALU, o.MOV, o.LEA, o.WORK, o.NOP)  # neither fault nor leave
INLINE: Final = (
    *PURE, o.LD, o.ST, o.PUSH, o.POP, o.LDM, o.STM, o.XADD, o.JMP, o.JCC, o.LOOP, o.CALL, o.RET, o.JMP_REG, o.CALL_REG,
    o.JMP_MEM, o.PAUSE,
)  # fmt: skip
ENDS: Final = (o.JMP, o.JCC, o.LOOP, o.CALL, o.RET, o.JMP_REG, o.CALL_REG, o.JMP_MEM)


@define
class Made:
    """A translated block: where it begins and ends, where it is entered from a look-up; what it is made of."""

    at: int
    body: int
    end: int
    taken: int
    helpers: int
    rows: int


@define(eq=False)
class Translator:
    """Translates for one virtual CPU, into code pages at `base` whose rows it has to itself.

    `labels` are those of the program; `record` places an entry for an operation that the program executes, and says
    where; `handler` says what executes it.
    """

    engine: Engine
    cpu: int
    base: int
    frames: tuple[int, ...]
    rows: int
    labels: Mapping[str, int]
    row_at: Callable[[int], Row | None]
    record: Callable[[Row], int]
    handler: Callable[[Row], int]
    work_scale: int
    first_row: int = field(init=False)
    next_row: int = field(init=False)
    next: int = field(init=False)
    counts: dict[str, int] = field(
        factory=lambda: dict.fromkeys(("blocks", "taken", "made", "in_line", "call_outs"), 0)
    )
    starts: dict[int, int] = field(factory=dict)  # of blocks, by where they are entered from a look-up
    flushes: int = 0
    evicted: int = 0

    def __attrs_post_init__(self) -> None:
        a = self.engine.arena
        for frame in self.frames:
            self.engine.code_page(frame)
        self.first_row = self.next_row = int(a[mem.A_ROW_COUNT])
        a[mem.A_ROW_COUNT] += self.rows
        self.next = self.base

    @property
    def full(self) -> bool:
        """Is there no room for another block?"""
        end = self.base + len(self.frames) * mem.PAGE_BYTES
        if self.counts["blocks"] - self.evicted >= BLOCKS:
            return True
        return self.next + BLOCK_ROOM > end or self.next_row + BLOCK_ROOM // 2 > self.first_row + self.rows

    def empty(self) -> None:
        """Every translation goes."""
        a, t = self.engine.arena, self.engine.tags
        for frame in self.frames:
            first = int(a[mem.A_CODE_MAPS]) + int(a[int(a[mem.A_CODE_OF]) + frame]) * mem.PAGE_BYTES
            t[first : first + mem.PAGE_BYTES] = -1
        self.next, self.next_row = self.base, self.first_row
        self.starts.clear()
        self.engine.cpus[self.cpu][s.FETCH_GENERATION] += 1
        self.flushes += 1
        self.evicted = self.counts["blocks"]

    def translate(self, rip: int, bytes_at: int) -> Made | None:
        """Translate the block at `rip`, whose bytes stand at a linear address; None where there is no room."""
        if self.full:
            return None
        a = Assembler("translation", self.next, externals=dict(self.labels))
        taken = list(self._taken(rip, bytes_at))
        writer = Writer(a, rip, self)
        writer.block(taken)
        program = a.assemble()
        arena = self.engine.arena
        kept = int(arena[mem.A_ROW_COUNT])
        arena[mem.A_ROW_COUNT] = self.next_row
        self.engine.place(program, lambda page: self.frames[(page - self.base) // mem.PAGE_BYTES])
        made = Made(
            at=self.next, body=program.labels["body"], end=program.end, taken=len(taken), helpers=writer.helpers,
            rows=int(arena[mem.A_ROW_COUNT]) - self.next_row,
        )  # fmt: skip
        self.starts[made.body] = made.at
        self.next_row, arena[mem.A_ROW_COUNT] = int(arena[mem.A_ROW_COUNT]), kept
        self.engine.cpus[self.cpu][s.FETCH_GENERATION] += 1
        self.next = -(-program.end // 16) * 16
        more = {"blocks": 1, "taken": made.taken, "made": made.rows, "call_outs": made.helpers}
        more["in_line"] = made.taken - made.helpers
        for name, number in more.items():
            self.counts[name] += number
        return made

    def _taken(self, rip: int, bytes_at: int) -> Iterator[tuple[int, Row | None]]:
        """The instructions of the block, with their addresses; None is where none is, which is the guest's fault."""
        page = rip >> mem.PAGE_SHIFT
        for _ in range(BLOCK_INSTRUCTIONS):
            row = self.row_at(bytes_at)
            yield rip, row
            if row is None or row.op in ENDS or row.op not in INLINE:
                return
            rip, bytes_at = rip + row.length, bytes_at + row.length
            if rip >> mem.PAGE_SHIFT != page:
                return

    def chain(self, at: int, target: int) -> None:
        """The jump at an address leads to the translation that is entered at `target` from now on."""
        a, t = self.engine.arena, self.engine.tags
        page = int(a[int(a[mem.A_CODE_OF]) + self.frames[(at - self.base) // mem.PAGE_BYTES]])
        row = int(t[int(a[mem.A_CODE_MAPS]) + page * mem.PAGE_BYTES + at % mem.PAGE_BYTES])
        r = int(a[mem.A_ROWS]) + row * o.ROW_WORDS
        a[r + o.ROW_TARGET], a[r + o.ROW_EXTRA] = 0, mem.signed(self.starts[target])


@define(eq=False)
class Writer:
    """Writes one block."""

    a: Assembler
    start: int
    translator: Translator
    pending: int = 0  # instructions that are not counted yet
    helpers: int = 0
    stubs: list[Callable[[], None]] = field(factory=list)

    def block(self, taken: list[tuple[int, Row | None]]) -> None:
        """Every instruction, then how the block is left."""
        a = self.a
        a.activity = o.EXIT_HANDLER
        a.ld(RAX, vcpu("PENDING"))
        a.test(RAX, register=RAX)
        a.jcc(o.CC_NZ, "interrupted")
        self.stubs.append(self._interrupted)
        a.label("body")
        rip = self.start
        for n, (rip, row) in enumerate(taken):
            if row is None:
                self.sync(rip)
                a.jmp("undefined")
                break
            if row.op not in INLINE:
                self._helper(rip, row)
                break
            self._one(rip, row, [each for _, each in taken[n + 1 :]], taken[n - 1][1] if n else None)
            if row.op in ENDS:
                break
            rip += row.length
        else:
            self.leave(rip)
        for stub in self.stubs:
            stub()

    def _interrupted(self) -> None:
        self.a.label("interrupted")
        self.a.mov(RBX, self.start)
        self.a.jmp("next")

    def counted(self) -> None:
        """Count what was executed; flags stay."""
        if self.pending:
            self.a.lea(R14, Mem(R14, self.pending))
            self.pending = 0

    def sync(self, rip: int) -> None:
        """What follows may fault at `rip`."""
        self.counted()
        self.a.mov(RBX, rip)

    def leave(self, target: int) -> None:
        """The block ends, and the guest goes on at a known address."""
        a = self.a
        self.counted()
        if target >> mem.PAGE_SHIFT != self.start >> mem.PAGE_SHIFT:
            a.mov(RBX, target)
            a.jmp("next")
            return
        name = f"chained_{len(self.stubs)}"

        def stub() -> None:
            a.label(name)
            a.mov(RBX, target)
            a.mov(RAX, at)
            a.jmp("chain")

        left = mem.PAGE_BYTES - a.here % mem.PAGE_BYTES
        if left < o.OPS[o.JMP].length:  # so that the jump stands where it is looked for
            a.emit(o.NOP, length=left)
        at = a.here
        a.jmp(name)
        self.stubs.append(stub)

    def indirect(self) -> None:
        """The block ends, and the guest goes on at RBX."""
        self.counted()
        self.a.jmp("next")

    def _helper(self, rip: int, row: Row) -> None:
        """What the program executes, as it would without a translator."""
        self.helpers += 1
        self.sync(rip)
        self.a.mov(s.RDI, self.translator.record(row))
        self.a.jmp(self.translator.handler(row))

    # --- operands ------------------------------------------------------------------------------------------------
    def get(self, to: int, number: int) -> None:
        """`to` <- a register of the guest."""
        self.a.ld(to, saved(number))

    def address(self, row: Row) -> None:
        """RSI <- linear address of the memory operand. Clobbers RCX."""
        a, packed = self.a, row.packed
        if packed & 31 < 16:
            self.get(RSI, packed & 31)
            if row.displacement:
                a.add(RSI, row.displacement)
        else:
            a.mov(RSI, row.displacement)
        index, segment = packed >> o.MEM_INDEX & 31, packed >> o.MEM_SEGMENT & 7
        if index < 16:
            self.get(RCX, index)
            if packed >> o.MEM_SCALE & 3:
                a.shl(RCX, packed >> o.MEM_SCALE & 3)
            a.add(RSI, register=RCX)
        if segment:
            a.ld(RCX, vcpu("FS_BASE" if segment == o.SEGMENT_FS else "GS_BASE"))
            a.add(RSI, register=RCX)

    # --- instructions --------------------------------------------------------------------------------------------
    def _one(self, rip: int, row: Row, following: list[Row | None], before: Row | None) -> None:
        a, op = self.a, row.op
        if op == o.WORK:
            self.work(row.imm * self.translator.work_scale)
        elif op in ALU:
            self.arithmetic(row, dead=flags_are_dead(following))
        elif op == o.MOV:
            if row.r2 < 16:
                self.get(RAX, row.r2)
            else:
                a.mov(RAX, row.imm)
            a.st(saved(row.r1), RAX)
        elif op == o.LEA:
            self.address(row)
            a.st(saved(row.r1), RSI)
        elif op == o.JCC:
            self.conditional(rip, row, fused=before is not None and before.op in ALU)
        elif op == o.JMP:
            self.pending += 1
            self.leave(row.extra)
        elif op == o.LOOP:
            self.pending += 1
            self.counted()
            self.get(RAX, RCX)
            a.sub(RAX, 1)
            a.st(saved(RCX), RAX)
            a.jcc(o.CC_NZ, "taken")
            self._branches(rip, row)
        elif op not in (o.NOP, o.PAUSE):
            self.memory(rip, row)
        if op not in (o.JMP, o.JCC, o.LOOP, *MEMORY_COUNTED, o.WORK):
            self.pending += 1

    def work(self, instructions: int) -> None:
        """Ordinary instructions: short runs one behind the other, longer ones in a loop."""
        a, name = self.a, f"work_{self.a.here & 0xFFFFFF:x}"
        self.pending += instructions
        rounds, rest = divmod(instructions, UNROLLED)
        if rounds:
            a.mov(R10, rounds)
            a.label(name)
            for _ in range(UNROLLED):
                translated_work(a)
            a.sub(R10, 1)
            a.jcc(o.CC_NZ, name)
        for _ in range(rest):
            translated_work(a)

    def arithmetic(self, row: Row, *, dead: bool) -> None:
        """ADD to TEST; the processor's flags are those of the result at the end."""
        a, op = self.a, row.op
        self.get(RDX, row.r1)
        if row.r2 < 16:
            self.get(R8, row.r2)
        else:
            a.mov(R8, row.imm)
        simple = op in (o.ADD, o.SUB, o.CMP)
        if simple and not dead:
            flags_of(a, "flags_add" if op == o.ADD else "flags_sub", RDX, R8)
        a.emit(o.AND if op == o.TEST else op, RDX, R8)
        if not simple and not dead:
            flags_of(a, "flags_result", RDX, None)
        if op not in (o.CMP, o.TEST):
            a.st(saved(row.r1), RDX)

    def conditional(self, rip: int, row: Row, *, fused: bool) -> None:
        """Jcc."""
        self.pending += 1
        self.counted()
        if not fused:
            ask(self.a, "asked")
            self.a.label("asked")
        self.a.jcc(row.condition, "taken")
        self._branches(rip, row)

    def _branches(self, rip: int, row: Row) -> None:
        self.leave(rip + row.length)
        self.a.label("taken")
        self.leave(row.extra)

    def memory(self, rip: int, row: Row) -> None:
        """What accesses memory, or goes where memory or a register says."""
        a, op, size = self.a, row.op, row.packed >> o.MEM_SIZE & 15
        self.sync(rip)
        if op == o.LD:
            self.address(row)
            load(a, size)
            a.st(saved(row.r1), RAX)
        elif op == o.ST:
            self.value(row)
            self.address(row)
            store(a, R8, size)
        elif op == o.XADD:
            self.address(row)
            look_up(a, READ)
            look_up(a, WRITE)
            self.get(R8, row.r1)
            a.xadd(Mem(RSI, index=RDX), R8)
            a.st(saved(row.r1), R8)
        elif op in (o.LDM, o.STM):
            self.many(row)
        elif op == o.PUSH:
            self.value(row)
            self.push()
        elif op in (o.POP, o.RET):
            self.pop()
            if op == o.POP:
                a.st(saved(row.r1), RAX)
                return
            a.copy(RBX, RAX)
        elif op in (o.CALL, o.CALL_REG):
            a.mov(R8, rip + row.length)
            self.push()
            if op == o.CALL_REG:
                self.get(RBX, row.r1)
        elif op == o.JMP_REG:
            self.get(RBX, row.r1)
        else:
            self.address(row)
            load(a)
            a.copy(RBX, RAX)
        if op in (o.RET, o.CALL, o.CALL_REG, o.JMP_REG, o.JMP_MEM):
            self.pending += 1
            if op == o.CALL:
                self.leave(row.extra)
            else:
                self.indirect()

    def value(self, row: Row) -> None:
        """R8 <- what is stored."""
        if row.r1 < 16:
            self.get(R8, row.r1)
        else:
            self.a.mov(R8, row.imm)

    def push(self) -> None:
        """R8 on the guest's stack."""
        self.get(RSI, s.RSP)
        self.a.sub(RSI, 8)
        store(self.a, R8)
        self.a.st(saved(s.RSP), RSI)

    def pop(self) -> None:
        """RAX <- from the guest's stack."""
        self.get(RSI, s.RSP)
        load(self.a)
        self.a.add(RSI, 8)
        self.a.st(saved(s.RSP), RSI)

    def many(self, row: Row) -> None:
        """LDM and STM."""
        a = self.a
        self.address(row)
        numbers = [number for number in range(16) if row.imm >> number & 1]
        for number in numbers:
            if row.op == o.LDM:
                load(a)
                a.st(saved(number), RAX)
            else:
                look_up(a, WRITE)
                self.get(RAX, number)
                a.st(Mem(RSI, index=RDX), RAX)
            a.add(RSI, 8)
        self.pending += len(numbers)


MEMORY_COUNTED: Final = (o.LDM, o.STM, o.RET, o.CALL, o.CALL_REG, o.JMP_REG, o.JMP_MEM)


def flags_are_dead(following: list[Row | None]) -> bool:
    """Are flags set again before anybody can ask for them?"""
    for row in following:
        if row is None or row.op not in PURE:
            return False
        if row.op in ALU:
            return True
    return False
