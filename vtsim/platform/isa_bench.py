"""The machine on which ops are analysed: one CPU, every op as a row, and what each finds in registers and memory.

Nothing here says what an op is. What no assembled row can say is written as the bytes of an instruction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from attrs import frozen

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import PAGE, Assembler, Mem, Program
from vtsim.cpu.decode import decode
from vtsim.cpu.engine import Engine, Geometry, Snapshot
from vtsim.cpu.kernels.modes import CS, FS, SS
from vtsim.cpu.profile import load_profile
from vtsim.cpu.segment_descriptors import descriptor
from vtsim.cpu.visible import SEGMENTS
from vtsim.ept.tables import PAGING, SIZE_2M, host_table
from vtsim.vmcs import state as h
from vtsim.vmcs.generations import GENERATIONS

MEMORY: Final = 32 << 20
IDT, OTHER_IDT, HANDLERS, DATA, STACK, TSS, GDT, OTHER_GDT, CODE = (0x400000 + n * PAGE for n in range(9))
TABLES: Final = 0x800000
MAPPED: Final = 0xE7  # present, writable, user, accessed, dirty, large
VECTORS, SOFTWARE, BREAKPOINT = 64, 0x30, 3
CALLED: Final = VECTORS  # of the handler of SYSCALL and SYSENTER
CS0, SS0, CS3, SS3, LOOKED_AT, TASK, LOCAL = 0x08, 0x10, 0x1B, 0x23, 0x2B, 0x30, 0x40
AUX_MSR: Final = 0xC0000103
PORT: Final = 0x80
ARITHMETIC_FLAGS: Final = 0x8D5
IF, IOPL = 1 << 9, 3 << 12
TARGET: Final = CODE + 0x800
POINTERS: Final = DATA + 0x400  # addresses of a VMXON region and of a VMCS
CR4_TSD, CR4_PAE, CR4_PGE, CR4_VMXE, CR4_FSGSBASE, CR4_PKE = (1 << n for n in (2, 5, 7, 13, 16, 22))
CR4: Final = CR4_PAE | CR4_PGE | CR4_VMXE
CR0: Final = 0x80050033

# fmt: off
EXCUSED: Final[Mapping[int, str]] = {  # ops that no execution classifies, and why
    o.STREAM: "stands for loads and stores, which are analysed",
    o.HOOK: "stands for a stretch of loads, stores and arithmetic",
    o.REPLAY_EVENT: "what a recorded guest did that is no instruction",
    o.STOP_OP: "the end of a simulated program",
    o.RETPOLINE: "stands for calls and returns, which are analysed",
}
# what only decoded rows do, as the bytes of an instruction whose memory operand is at RSI; the name of each row
BYTES: Final[Mapping[int, Mapping[str, str]]] = {
    o.MOVE: {"MOVE": "488b1e"}, o.ARITHMETIC: {"ARITHMETIC": "48011e"}, o.EXCHANGE: {"EXCHANGE": "48871e"},
    o.DIVIDE: {"DIVIDE": "48f736"}, o.PUSH_OPERAND: {"PUSH_OPERAND": "ff36"}, o.POP_OPERAND: {"POP_OPERAND": "8f06"},
    o.MOVE_STRING: {"MOVE_STRING": "48a5"}, o.JMP_NEAR: {"JMP_NEAR": "ffe3"}, o.INT3: {"INT3": "cc"},
    o.INT1: {"INT1": "f1"}, o.RSM: {"RSM": "0faa"}, o.ENCLS: {"ENCLS": "0f01cf"}, o.ENCLV: {"ENCLV": "0f01c0"},
    o.PCONFIG: {"PCONFIG": "0f01c5"}, o.LOADIWKEY: {"LOADIWKEY": "f30f38dcc1"}, o.TPAUSE: {"TPAUSE": "660faef1"},
    o.UMWAIT: {"UMWAIT": "f20faef1"}, o.UMONITOR: {"UMONITOR": "f30faef1"}, o.FNINIT: {"FNINIT": "dbe3"},
    o.TOUCH: {"PREFETCH": "0f180e", "CLFLUSH": "0fae3e", "FXSAVE": "0fae06"},
}
IMMEDIATES: Final[Mapping[int, int]] = {
    o.MOV_FROM_DR: 7, o.MOV_TO_DR: 7, o.INT: SOFTWARE, o.IN: PORT, o.OUT: PORT, o.LDM: 5, o.STM: 5, o.WORK: 1,
    o.PUSH_SEGMENT: FS, o.POP_SEGMENT: FS,
}
IO: Final = (o.IN, o.OUT, o.INS, o.OUTS)
TARGETED: Final = (o.JMP, o.JCC, o.LOOP, o.CALL)
IN_VMX_OPERATION: Final = (
    o.VMXOFF, o.VMCLEAR, o.VMPTRLD, o.VMPTRST, o.VMLAUNCH, o.VMRESUME, o.VMCALL, o.VMFUNC, o.INVEPT, o.INVVPID,
    o.VMREAD, o.VMWRITE,
)
EACH: Final[Mapping[int, Mapping[int, str]]] = {  # ops that are analysed once for each of these immediates
    **{op: {n: f"{o.OPS[op].name}{n}" for n in (0, 3, 4, 8)} for op in (o.MOV_FROM_CR, o.MOV_TO_CR)},
    o.MOV_FROM_SEGMENT: {n: f"MOV_FROM_{SEGMENTS[n]}" for n in (CS, SS, FS)},
    o.MOV_TO_SEGMENT: {n: f"MOV_TO_{SEGMENTS[n]}" for n in (SS, FS)},
}


@frozen(kw_only=True)
class Setup:
    """What an op finds: registers by number beside the usual ones, further slots, words on the stack and at RSI."""

    registers: Mapping[int, int] = {}
    slots: Mapping[int, int] = {}
    stack: tuple[int, ...] = ()
    data: tuple[int, ...] = ()


def with_rbx(value: int) -> tuple[Setup, ...]:
    """RBX holds something else than the address of data."""
    return (Setup(registers={s.RBX: value}),)


COUNTED: Final = (Setup(registers={s.RCX: 2}),)
ZEROES: Final = {s.RCX: 0, s.RDX: 0, s.RAX: 3}
FIRST: Final = (Setup(registers=ZEROES),)
KEYS: Final = (Setup(registers=ZEROES, slots={s.CR4: CR4 | CR4_PKE}),)
BASES: Final = (Setup(slots={s.CR4: CR4 | CR4_FSGSBASE}),)
SELECTORS: Final = tuple(Setup(registers={s.RCX: selector}) for selector in (CS0, SS3, LOOKED_AT, TASK))
IN_RBX: Final = tuple(Setup(registers={s.RBX: selector}) for selector in (CS0, SS3, LOOKED_AT, TASK))
FAR: Final = tuple(Setup(data=(TARGET, selector)) for selector in (CS0, CS3))
SETUPS: Final[Mapping[str, tuple[Setup, ...]]] = {  # by the name of the row
    "MOV_TO_CR0": with_rbx(CR0 | 8), "MOV_TO_CR3": with_rbx(TABLES | 8),
    "MOV_TO_CR4": with_rbx(CR4 | CR4_TSD), "MOV_TO_CR8": with_rbx(5), "MOV_TO_DR": with_rbx(0x401),
    "LMSW": with_rbx(0xB), "JMP_REG": with_rbx(TARGET), "CALL_REG": with_rbx(TARGET), "JMP_NEAR": with_rbx(TARGET),
    "LLDT": with_rbx(LOCAL), "INVPCID": with_rbx(2), "INVEPT": with_rbx(2), "INVVPID": with_rbx(2),
    "LOOP": COUNTED, "LONG_WORK": COUNTED, "DIVIDE": (Setup(data=(3,)),), "JMP_MEM": (Setup(data=(TARGET,)),),
    **dict.fromkeys(("XGETBV", "XSETBV", "MONITOR", "MWAIT"), FIRST), "RDPKRU": KEYS, "WRPKRU": KEYS,
    **dict.fromkeys(("RDFSBASE", "RDGSBASE", "WRFSBASE", "WRGSBASE"), BASES),
    **dict.fromkeys(("LAR", "LSL"), SELECTORS), **dict.fromkeys(("VERR", "VERW"), IN_RBX),
    "MOV_TO_SS": tuple(Setup(registers={s.RBX: selector}) for selector in (SS0, SS3)),
    "MOV_TO_FS": tuple(Setup(registers={s.RBX: selector}) for selector in (SS0, SS3, LOOKED_AT)),
    "POP_SEGMENT": tuple(Setup(stack=(selector,)) for selector in (SS0, SS3, LOOKED_AT)),
    "POPF": (Setup(stack=(2,)),), "RET": (Setup(stack=(TARGET,)),),
    "IRET": (Setup(stack=(TARGET, CS3, 2, STACK + 0x900, SS3)),),
    "RET_FAR": tuple(Setup(stack=(TARGET, selector, STACK + 0x900, SS3)) for selector in (CS0, CS3)),
    "JMP_FAR": FAR, "CALL_FAR": FAR,
}
USUAL: Final = (Setup(),)
# fmt: on


def gdt(limit: int, base: int, rights: int) -> list[int]:
    """A GDT whose last segments, task and local table are of some limit, base and rights."""
    flat = [descriptor(each, 0xFFFFF) for each in (0xA09B, 0xC093, 0xA0FB, 0xC0F3)]
    return [0, *flat, descriptor(rights, limit, base), descriptor(0x89, limit, TSS), 0, descriptor(0x82, limit), 0]


class Bench:
    """A machine of one CPU and the ops under analysis, each a row of one page of code, by name.

    `traps`: do all sensitive ops trap in ring 3 (`machine.isa: virtualizable`)?
    """

    def __init__(self, profile: str, *, traps: bool = False) -> None:
        self.engine = Engine(
            load_profile(profile),
            Geometry(memory_bytes=MEMORY, pool_pages=100, code_pages=8, rows=2048, owners=2, trace_rows=64),
        )
        engine = self.engine
        self.traps = traps
        engine.frames_from(TABLES >> 12, 16, shuffled=False, seed=0)
        table = host_table(engine, PAGING)
        table.map_range(0, 0, MEMORY >> 12, MAPPED, SIZE_2M)
        self._tables()
        m = engine.cpus[0]
        self.capabilities = GENERATIONS[engine.profile.vmx.generation].capabilities()
        engine.vmx(self.capabilities)
        values = {
            s.CR3: table.root << 12, s.IDTR_BASE: IDT, s.IDTR_LIMIT: 16 * VECTORS - 1, s.TR_BASE: TSS,
            s.GDTR_BASE: GDT, s.GDTR_LIMIT: 8 * len(gdt(0, 0, 0)) - 1, s.CR0: CR0,
            s.CR4: CR4, s.EFER: 0xD01, s.MSR_KERNEL_GS_BASE: DATA,
            s.MSR_LSTAR: self.called, s.MSR_STAR: CS0 << 48 | CS0 << 32, s.SYSENTER_CS: CS0,
            s.SYSENTER_EIP: self.called, s.SYSENTER_ESP: STACK + 0xC00,
        }  # fmt: skip
        for slot, value in values.items():
            m[slot] = mem.signed(value)
        self.program, self.rows = self._rows()
        engine.place(self.program, lambda page: page >> 12)
        self.start = engine.save()
        self.started = self._start_vmx()

    def _tables(self) -> None:
        """Handlers, gates and descriptors. What INT, INT3 and a system call reach is let through from ring 3."""
        engine = self.engine
        handlers = Assembler("handlers", HANDLERS, activity=o.EXIT_HANDLER)
        for vector in range(VECTORS + 1):
            handlers.label(str(vector))
            handlers.op(o.STOP_OP, imm=vector)
        program = handlers.assemble()
        self.handlers = {at: int(name) for name, at in program.labels.items()}
        self.called = program.labels[str(CALLED)]
        engine.place(program, lambda page: page >> 12)
        for idt in (IDT, OTHER_IDT):
            for vector in range(VECTORS):
                at = program.labels[str(vector)]
                kind = 0xEE if vector in (SOFTWARE, BREAKPOINT) else 0x8E
                engine.store(idt + 16 * vector, (at & 0xFFFF) | CS0 << 16 | kind << 40 | (at >> 16 & 0xFFFF) << 48)
                engine.store(idt + 16 * vector + 8, 0)
        engine.store(TSS + 4, STACK + 0xC00)
        for place, words in ((GDT, gdt(0xFF, 0x1000, 0x40F3)), (OTHER_GDT, gdt(0xEF, 0x2000, 0x40F1))):
            for n, word in enumerate(words):
                engine.store(place + 8 * n, word)

    def _start_vmx(self) -> Snapshot:
        """The machine in VMX operation with a current VMCS, for VMX instructions."""
        engine, m = self.engine, self.engine.cpus[0]
        self.vmcs, self.region = engine.allocate(), engine.allocate()
        words = engine.contents(self.vmcs, mem.VMCS_REGION)
        words[h.V_OWNER], words[h.V_EXIT_REASON] = engine.owner("guest"), -1
        words[h.V_REVISION] = m[s.VMX_REVISION]
        engine.store(self.region << 12, int(m[s.VMX_REVISION]))
        engine.store(POINTERS, self.region << 12)
        engine.store(POINTERS + 8, self.vmcs << 12)
        self.start = engine.save()
        m[s.PRIVILEGE], m[s.RFLAGS], m[s.RIP] = o.R0, 2, self.program.labels["on"]
        m[s.GPR + s.RSP] = STACK + 0x800
        engine.sync()
        engine.run(ops=2)
        return engine.save()

    def _rows(self) -> tuple[Program, dict[str, int]]:
        a, rows = Assembler("ops under analysis", CODE, activity=o.APPLICATION), {}
        for op in (each.number for each in o.OPS if each.number not in EXCUSED):
            for name in self._names(a, op):
                rows[name] = op
                a.op(o.NOP)
        a.align(TARGET - CODE)
        if a.here != TARGET:
            raise ModelError("the ops under analysis reach beyond the target of their jumps", {"at": a.here})
        a.label("target")
        a.op(o.NOP)
        a.label("on")
        a.op(o.VMXON, mem=Mem(displacement=POINTERS))
        a.op(o.VMPTRLD, mem=Mem(displacement=POINTERS + 8))
        self._more(a)
        return a.assemble(), rows

    def _names(self, a: Assembler, op: int) -> Iterator[str]:
        """Write the rows of an op, and say what each is called."""
        if op in BYTES:
            for name, code in BYTES[op].items():
                row = decode(bytes.fromhex(code), 64, a.here)
                a.label(name)
                a.emit(row.op, row.r1, row.r2, row.imm, row.mem, extra=row.extra, length=row.length)
                yield name
            return
        for imm, name in EACH.get(op, {IMMEDIATES.get(op, 0): o.OPS[op].name}).items():
            a.label(name)
            if op in TARGETED:
                a.emit(op, imm=imm, target="target")
            elif op == o.VMREAD:
                a.vmread(s.RBX, "GUEST_RIP")
            elif op == o.VMWRITE:
                a.vmwrite("GUEST_RIP", s.RBX)
            else:
                second = s.RCX if op in (o.LAR, o.LSL) else s.NO_REGISTER
                a.emit(op, s.RBX, second, imm, Mem(s.RSI, size=4 if op in IO else 8))
            yield name

    def _more(self, a: Assembler) -> None:
        """Other rows that stand behind the ops."""

    def setups(self, name: str) -> tuple[Setup, ...]:
        """What an op is run with."""
        pointers = {"VMXON": self.region, "VMCLEAR": self.vmcs, "VMPTRLD": self.vmcs}
        return (Setup(data=(pointers[name] << 12,)),) if name in pointers else SETUPS.get(name, USUAL)

    def registers(self, setup: Setup) -> None:
        """What an op finds in the general registers, on the stack and in memory."""
        engine, m = self.engine, self.engine.cpus[0]
        m[s.GPR : s.GPR + 16] = 0
        usual = {s.RBX: DATA, s.RSI: DATA, s.RDI: DATA + 64, s.RCX: AUX_MSR, s.RSP: STACK + 0x800}
        for register, value in (usual | dict(setup.registers)).items():
            m[s.GPR + register] = value
        for slot, value in setup.slots.items():
            m[slot] = value
        for base, words in ((STACK + 0x800, setup.stack), (DATA, setup.data)):
            for place, value in enumerate(words):
                engine.store(base + 8 * place, value)

    def seen(self) -> tuple[int, ...]:
        """What unprivileged code sees after an op."""
        engine, m = self.engine, self.engine.cpus[0]
        memory = [engine.load(at) for at in (DATA, DATA + 8, DATA + 64, STACK + 0x7F8, STACK + 0x7F0)]
        flags = int(m[s.RFLAGS]) & ARITHMETIC_FLAGS
        bases = [int(m[slot]) for slot in (s.FS_BASE, s.GS_BASE)]
        return (int(m[s.RIP]), flags, *bases, *(int(m[s.GPR + n]) for n in range(16)), *memory)

    def trapped(self) -> int | None:
        """The vector whose handler is next; INT that its gate lets through is no exception."""
        vector = self.handlers.get(int(self.engine.cpus[0][s.RIP]))
        return None if vector in (SOFTWARE, CALLED) else vector

    def called_supervisor(self) -> bool:
        """Is what comes next the entry of system calls?"""
        return int(self.engine.cpus[0][s.RIP]) == self.called
