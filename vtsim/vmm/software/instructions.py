"""How ordinary instructions are interpreted: found, decoded when they are not known yet, and executed one by one.

Not modelled: what decoding computes beside its loads and stores, and the lists of registers that it makes for LDM and
STM; the operands of ordinary instructions that stand for
many (WORK), each of which reads two registers and writes one, with flags.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R8, R9, R10, R12, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.vmm.monitor.layout import RAM, saved, vcpu
from vtsim.vmm.monitor.memory import count
from vtsim.vmm.software import layout as w
from vtsim.vmm.software.events import NO_ERROR, ask
from vtsim.vmm.software.mmu import FETCH, READ, WRITE, address, load, local, look_up, store

ALU: Final = (ops.ADD, ops.SUB, ops.AND, ops.OR, ops.XOR, ops.SHL, ops.SHR, ops.CMP, ops.TEST)
SIZES: Final = (1, 2, 4, 8)
DIVIDE_ERROR: Final = 0  # vector
DIVISOR: Final = Mem(attributes=ops.MEM_DECODED | ops.MEM_REGISTER)  # a register
CHUNK: Final = 64  # ordinary instructions of LONG_WORK between two looks at interrupts
UNROLLED: Final = 8  # ordinary instructions of a translation that stand one behind the other
FORWARD_FROM: Final = 32 * CHUNK  # instructions left, from which on it is worth while to look for equal parts


def fetch(a: Assembler, elsewhere: str, unknown: str) -> None:
    """RDI <- entry of the instruction at RBX; to `elsewhere` if RIP has left its page, to `unknown` if it has none."""
    a.copy(RAX, RBX)
    a.shr(RAX, 12)
    a.cmp(RAX, register=R12)
    a.jcc(ops.CC_NZ, elsewhere)
    find(a)
    a.ld(RAX, w.entry("TAG"))
    a.cmp(RAX, register=RSI)
    a.jcc(ops.CC_NZ, unknown)


def find(a: Assembler) -> None:
    """RSI <- where the bytes at RBX stand, RDI <- their place among the entries."""
    a.lea(RSI, Mem(RBX, index=RBP))
    a.copy(RDI, RSI)
    a.and_(RDI, w.ENTRIES - 1)
    a.shl(RDI, w.ENTRY_BYTES.bit_length() - 1)
    a.ld(RAX, vcpu("DECODED"))
    a.add(RDI, register=RAX)


def loop(a: Assembler, *, translates: bool) -> None:
    """`next`: execute the instruction at RBX, after an interrupt that waits. `advance`: step over the one that was.

    A translator's loop goes from block to block. `to_page`: RIP's page is translated by the software MMU.
    """
    a.activity = ops.EXIT_DISPATCH
    a.label("advance")
    a.ld(RAX, w.entry("LENGTH"))
    a.add(RBX, register=RAX)
    a.add(R14, 1)
    a.label("next")
    a.ld(RAX, vcpu("PENDING"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "interrupt_waits")
    a.label("next_unchecked")
    if translates:
        count(a, "BLOCK_LOOKUPS")
    fetch(a, "to_page", "unknown")
    a.jmp_mem(w.entry("HANDLER"))
    a.label("to_page")
    a.copy(RSI, RBX)
    look_up(a, FETCH, 1)
    a.copy(RBP, RDX)
    a.copy(R12, RBX)
    a.shr(R12, 12)
    a.jmp("next_unchecked")
    a.label("branch")
    a.ld(RBX, w.entry("C"))
    a.add(R14, 1)
    a.jmp("next")
    if translates:
        translate(a)
        chain(a)
    else:
        decode(a)


def decode(a: Assembler) -> None:
    """`unknown`: the instruction whose bytes stand at RSI is decoded into the entry at RDI."""
    a.label("unknown")
    count(a, "DECODES")
    a.ld(RAX, Mem(RSI, size=1))
    a.hook(w.DECODE_ROW)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "undefined")
    for field, register in (("HANDLER", RAX), ("LENGTH", RCX), ("A", RDX), ("B", R8), ("C", R9)):
        a.st(w.entry(field), register)
    a.copy(RAX, R10)
    a.shl(RAX, 32)
    a.shr(RAX, 32)
    a.st(w.entry("BASE"), RAX)
    a.shr(R10, 32)
    a.st(w.entry("INDEX"), R10)
    a.st(w.entry("TAG"), RSI)
    mark_code(a)
    a.jmp_mem(w.entry("HANDLER"))


def translate(a: Assembler) -> None:
    """`unknown`: the block whose bytes stand at RSI is translated; a full cache is emptied before.

    Every instruction that is read costs a load, every eight bytes that are made a store.
    """
    a.label("unknown")
    count(a, "DECODES")
    a.label("translate_again")
    a.hook(w.TRANSLATE_BLOCK)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "translated")
    a.push(RDI)
    a.push(RSI)
    a.call("forget_all")
    a.pop(RSI)
    a.pop(RDI)
    a.jmp("translate_again")
    a.label("translated")
    a.st(w.entry("HANDLER"), RAX)
    a.copy(R9, RSI)
    a.label("translate_read")
    a.ld(R10, Mem(R9, size=1))
    a.add(R9, 4)
    a.sub(R8, 1)
    a.jcc(ops.CC_NZ, "translate_read")
    a.ld(R9, vcpu("IMAGE"))
    a.add(R9, register=RAX)
    a.label("translate_write")
    a.st(Mem(R9), RAX)
    a.add(R9, 8)
    a.loop("translate_write")
    a.st(w.entry("TAG"), RSI)
    mark_code(a)
    a.jmp_mem(w.entry("HANDLER"))


def chain(a: Assembler) -> None:
    """`chain`: as `next`, from the exit at RAX, which leads to the block from then on, if there is one."""
    a.label("chain")
    a.st(vcpu("CHAIN_FROM"), RAX)
    a.ld(RAX, vcpu("PENDING"))
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_NZ, "interrupt_waits")
    count(a, "BLOCK_LOOKUPS")
    fetch(a, "next", "unknown")
    count(a, "CHAINED")
    a.ld(RDX, vcpu("CHAIN_FROM"))
    a.ld(RAX, w.entry("HANDLER"))
    a.hook(w.CHAIN_BLOCK)
    a.ld(RCX, vcpu("IMAGE"))
    a.st(Mem(RDX, index=RCX), RAX)
    a.jmp_mem(w.entry("HANDLER"))


def mark_code(a: Assembler) -> None:
    """The frame of the bytes at RSI holds code that is known. Clobbers RAX and RCX."""
    a.mov(RAX, RAM)
    a.copy(RCX, RSI)
    a.sub(RCX, register=RAX)
    a.shr(RCX, 12)
    a.ld(RAX, vcpu("CODE_PAGES"))
    a.st_value(Mem(RAX, index=RCX, scale=8), 1)


def flags_of(a: Assembler, how: str, left: int, right: int | None) -> None:
    """Leave what the flags of a result are made from. Clobbers R9."""
    a.mov(R9, how)
    a.st(vcpu("FLAGS_HOW"), R9)
    a.st(vcpu("FLAGS_LEFT"), left)
    if right is not None:
        a.st(vcpu("FLAGS_RIGHT"), right)


def get(a: Assembler, to: int, field: str) -> None:
    """`to` <- the register of the guest whose offset is in a field of the entry."""
    a.ld(to, w.entry(field))
    a.ld(to, Mem(R15, index=to))


def put(a: Assembler, register: int) -> None:
    """The register of the guest that field A names <- a register other than RAX."""
    a.ld(RAX, w.entry("A"))
    a.st(Mem(R15, index=RAX), register)


def arithmetic(a: Assembler, op: int, *, immediate: bool) -> None:
    """ADD to TEST."""
    get(a, RDX, "A")
    if immediate:
        a.ld(R8, w.entry("C"))
    else:
        get(a, R8, "B")
    if op in (ops.ADD, ops.SUB, ops.CMP):
        flags_of(a, "flags_add" if op == ops.ADD else "flags_sub", RDX, R8)
        if op != ops.CMP:
            a.emit(op, RDX, R8)
    elif op == ops.TEST:
        a.emit(ops.AND, RDX, R8)
        flags_of(a, "flags_result", RDX, None)
    else:
        a.emit(op, RDX, R8)
        flags_of(a, "flags_result", RDX, None)
    if op not in (ops.CMP, ops.TEST):
        put(a, RDX)
    a.jmp("advance")


def ordinary(a: Assembler) -> None:
    """The body of an instruction that reads two registers and writes one, with flags; here nobody asks for them."""
    get(a, RDX, "BASE")
    get(a, R8, "B")
    a.mov(R9, "flags_add")
    for word, register in enumerate((R9, RDX, R8)):
        a.st(vcpu("RESULT", 1 + word), register)
    a.add(RDX, register=R8)
    a.st(vcpu("RESULT"), RDX)


def work(a: Assembler, *, translates: bool) -> None:
    """`work`: R10 ordinary instructions, at least one. Clobbers RAX, RCX, RDX, RSI, R8 and R9; counts them."""
    a.activity = ops.EXIT_HANDLER
    a.label("work")
    a.add(R14, register=R10)
    a.label("work_next")
    if translates:
        a.cmp(R10, UNROLLED)
        a.jcc(ops.CC_B, "work_rest")
        for _ in range(UNROLLED):
            translated_work(a)
        a.sub(R10, UNROLLED)
        a.jcc(ops.CC_NZ, "work_next")
        a.ret()
        a.label("work_rest")
        translated_work(a)
    else:
        fetch(a, "next", "next")
        a.jmp_mem(vcpu("WORK_BODY"))
        a.label("work_body")
        ordinary(a)
    a.sub(R10, 1)
    a.jcc(ops.CC_NZ, "work_rest" if translates else "work_next")
    a.ret()


def translated_work(a: Assembler) -> None:
    """An ordinary instruction as a translation has it: registers are loaded and stored, flags are dead."""
    a.ld(RAX, vcpu("RESULT"))
    a.ld(RCX, vcpu("RESULT", 1))
    a.add(RAX, register=RCX)
    a.st(vcpu("RESULT"), RAX)


def work_op(a: Assembler) -> None:
    """WORK: so many ordinary instructions, which nothing interrupts."""
    a.ld(R10, w.entry("C"))
    a.call("work")
    a.sub(R14, 1)
    a.jmp("advance")


def long_work(a: Assembler) -> None:
    """LONG_WORK: RCX ordinary instructions, in parts between which interrupts are taken.

    Parts that follow each other and are the same in all that they touch and cost are executed at once by the hook.
    """
    a.ld(R10, saved(RCX))
    a.cmp(R10, 0)
    a.jcc(ops.CC_LE, "long_work_done")
    a.cmp(R10, FORWARD_FROM)
    a.jcc(ops.CC_B, "long_work_here")
    a.hook(w.FORWARD)
    a.ld(R10, saved(RCX))
    a.label("long_work_here")
    a.cmp(R10, CHUNK)
    a.jcc(ops.CC_LE, "long_work_part")
    a.mov(R10, CHUNK)
    a.label("long_work_part")
    a.ld(RAX, saved(RCX))
    a.sub(RAX, register=R10)
    a.st(saved(RCX), RAX)
    a.ld(RAX, w.entry("A"))  # how many are executed for each of them
    a.cmp(RAX, 1)
    a.jcc(ops.CC_Z, "long_work_once")
    a.copy(RCX, R10)
    a.label("long_work_scaled")
    a.sub(RAX, 1)
    a.jcc(ops.CC_Z, "long_work_once")
    a.add(R10, register=RCX)
    a.jmp("long_work_scaled")
    a.label("long_work_once")
    a.call("work")
    a.jmp("next")
    a.label("long_work_done")
    a.sub(R14, 1)
    a.jmp("advance")


def move(a: Assembler, *, immediate: bool) -> None:
    """MOV between registers, or of a constant."""
    if immediate:
        a.ld(RDX, w.entry("C"))
    else:
        get(a, RDX, "B")
    put(a, RDX)
    a.jmp("advance")


def load_op(a: Assembler, size: int, *, indexed: bool) -> None:
    """LD."""
    address(a, indexed=indexed)
    load(a, size)
    a.copy(RDX, RAX)
    put(a, RDX)
    a.jmp("advance")


def store_op(a: Assembler, size: int, *, indexed: bool, immediate: bool) -> None:
    """ST."""
    if immediate:
        a.ld(R8, w.entry("A"))
    else:
        get(a, R8, "A")
    address(a, indexed=indexed)
    store(a, R8, size)
    a.jmp("advance")


def lea_op(a: Assembler, *, indexed: bool) -> None:
    """LEA."""
    address(a, indexed=indexed)
    put(a, RSI)
    a.jmp("advance")


def exchange_and_add(a: Assembler, *, indexed: bool) -> None:
    """XADD."""
    address(a, indexed=indexed)
    look_up(a, READ)
    look_up(a, WRITE)
    get(a, R8, "A")
    a.xadd(Mem(RSI, index=RDX), R8)
    put(a, R8)
    a.jmp("advance")


def divide(a: Assembler) -> None:
    """DIV by a register: #DE for a zero divisor and for a quotient that does not fit."""
    get(a, R8, "B")
    a.ld(RDX, saved(RDX))
    a.cmp(RDX, register=R8)
    a.jcc(ops.CC_AE, "divide_error")
    a.ld(RAX, saved(RAX))
    a.op(ops.DIVIDE, r2=R8, mem=DIVISOR)
    a.st(saved(RAX), RAX)
    a.st(saved(RDX), RDX)
    a.jmp("advance")
    a.label("divide_error")
    a.st_value(vcpu("SCRATCH"), DIVIDE_ERROR)
    a.st_value(vcpu("SCRATCH", 1), NO_ERROR)
    a.jmp("inject_exception")


def many(a: Assembler, *, stores: bool, indexed: bool, translates: bool) -> None:
    """LDM and STM: one instruction for each register in the list at A."""
    name = f"{'stm' if stores else 'ldm'}{'_indexed' if indexed else ''}"
    address(a, indexed=indexed)
    a.copy(R8, RSI)
    a.ld(R10, w.entry("A"))
    a.mov(R9, 0)
    a.label(f"{name}_next")
    a.ld(RCX, Mem(R10))
    a.cmp(RCX, w.LIST_END)
    a.jcc(ops.CC_Z, f"{name}_done")
    if not translates:
        fetch(a, "next", "next")
    a.copy(RSI, R8)
    if stores:
        look_up(a, WRITE)
        a.ld(RCX, Mem(R10))
        a.ld(RAX, Mem(R15, index=RCX))
        a.st(Mem(RSI, index=RDX), RAX)
    else:
        load(a)
        a.ld(RCX, Mem(R10))
        a.st(Mem(R15, index=RCX), RAX)
    a.add(R8, 8)
    a.add(R10, 8)
    a.add(R9, 1)
    a.jmp(f"{name}_next")
    a.label(f"{name}_done")
    a.add(R14, register=R9)
    a.sub(R14, 1)
    a.jmp("advance")


def push_op(a: Assembler, *, immediate: bool) -> None:
    """PUSH."""
    if immediate:
        a.ld(R8, w.entry("A"))
    else:
        get(a, R8, "A")
    _push(a)
    a.jmp("advance")


def _push(a: Assembler) -> None:
    """R8 on the guest's stack."""
    a.ld(RSI, saved(RSP))
    a.sub(RSI, 8)
    store(a, R8)
    a.st(saved(RSP), RSI)


def _pop(a: Assembler) -> None:
    """RAX <- from the guest's stack."""
    a.ld(RSI, saved(RSP))
    load(a)
    a.add(RSI, 8)
    a.st(saved(RSP), RSI)


def pop_op(a: Assembler) -> None:
    """POP."""
    _pop(a)
    a.copy(RDX, RAX)
    put(a, RDX)
    a.jmp("advance")


def call_op(a: Assembler, *, register: bool) -> None:
    """CALL to a target, or to where a register says."""
    a.ld(R8, w.entry("LENGTH"))
    a.add(R8, register=RBX)
    _push(a)
    if not register:
        a.jmp("branch")
        return
    get(a, RBX, "A")
    a.add(R14, 1)
    a.jmp("next")


def return_op(a: Assembler) -> None:
    """RET."""
    _pop(a)
    a.copy(RBX, RAX)
    a.add(R14, 1)
    a.jmp("next")


def jump_register(a: Assembler) -> None:
    """JMP to where a register says."""
    get(a, RBX, "A")
    a.add(R14, 1)
    a.jmp("next")


def jump_memory(a: Assembler, *, indexed: bool) -> None:
    """JMP to where memory says."""
    address(a, indexed=indexed)
    load(a)
    a.copy(RBX, RAX)
    a.add(R14, 1)
    a.jmp("next")


def conditional(a: Assembler, condition: int) -> None:
    """Jcc."""
    holds = local(a, "holds")
    ask(a, holds)
    a.label(holds)
    a.jcc(condition, "branch")
    a.jmp("advance")


def loop_op(a: Assembler) -> None:
    """LOOP."""
    a.ld(RAX, saved(RCX))
    a.sub(RAX, 1)
    a.st(saved(RCX), RAX)
    a.jcc(ops.CC_NZ, "branch")
    a.jmp("advance")


Handler = Callable[[Assembler], None]
Form = tuple[int, str]  # an operation, and in which form: see `form_of` of the decoder


def handlers(translates: bool) -> dict[Form, Handler]:
    """What executes each ordinary operation in each form."""
    found: dict[Form, Handler] = {
        (ops.WORK, ""): work_op, (ops.LONG_WORK, ""): long_work, (ops.JMP, ""): lambda a: a.jmp("branch"),
        (ops.DIVIDE, "register8"): divide,
        (ops.NOP, ""): lambda a: a.jmp("advance"), (ops.PAUSE, ""): lambda a: a.jmp("advance"),
        (ops.POP, ""): pop_op, (ops.RET, ""): return_op, (ops.JMP_REG, ""): jump_register, (ops.LOOP, ""): loop_op,
        (ops.CALL, ""): partial(call_op, register=False), (ops.CALL_REG, ""): partial(call_op, register=True),
        (ops.MOV, "immediate"): partial(move, immediate=True), (ops.MOV, ""): partial(move, immediate=False),
        (ops.PUSH, "immediate"): partial(push_op, immediate=True), (ops.PUSH, ""): partial(push_op, immediate=False),
    }  # fmt: skip
    for op in ALU:
        for form in ("", "immediate"):
            found[op, form] = partial(arithmetic, op=op, immediate=bool(form))
    for condition in range(len(ops.CONDITIONS)):
        found[ops.JCC, str(condition)] = partial(conditional, condition=condition)
    for indexed in (False, True):
        form = "indexed" if indexed else ""
        found[ops.LEA, form] = partial(lea_op, indexed=indexed)
        found[ops.XADD, form] = partial(exchange_and_add, indexed=indexed)
        found[ops.JMP_MEM, form] = partial(jump_memory, indexed=indexed)
        for op in (ops.LDM, ops.STM):
            found[op, form] = partial(many, stores=op == ops.STM, indexed=indexed, translates=translates)
        for size in SIZES:
            found[ops.LD, f"{form}{size}"] = partial(load_op, size=size, indexed=indexed)
            for value in ("", "immediate"):
                found[ops.ST, f"{form}{value}{size}"] = partial(
                    store_op, size=size, indexed=indexed, immediate=bool(value)
                )
    return found


def form_of(op: int, r1: int, r2: int, condition: int, packed: int) -> str:
    """In which form an operation's operands are."""
    indexed = "indexed" if (packed >> ops.MEM_INDEX) & 31 < 16 or packed >> ops.MEM_SEGMENT else ""
    if op == ops.JCC:
        return str(condition)
    if op in (*ALU, ops.MOV):
        return "" if r2 < 16 else "immediate"
    if op == ops.PUSH:
        return "" if r1 < 16 else "immediate"
    if op in (ops.LEA, ops.XADD, ops.JMP_MEM, ops.LDM, ops.STM):
        return indexed
    size = (packed >> ops.MEM_SIZE) & 15
    if op == ops.DIVIDE:
        return f"{'register' if packed & ops.MEM_REGISTER else indexed}{size}"
    if op == ops.LD:
        return f"{indexed}{size}"
    if op == ops.ST:
        return f"{indexed}{'' if r1 < 16 else 'immediate'}{size}"
    return ""
