"""Builds software CPUs into a machine: the program, a virtual CPU for each guest, its memory and caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from attrs import define, field, frozen

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.base.memory import gfn_ranges
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Program
from vtsim.cpu.engine import Engine
from vtsim.cpu.profile import Profile
from vtsim.cpu.translation import COUNTED
from vtsim.ept import spec as e
from vtsim.ept.tables import KERNEL_PAGE
from vtsim.guest.machine_view import Start
from vtsim.vmm.host import TEXT_FRAME, Host
from vtsim.vmm.hypervisor import Guest
from vtsim.vmm.monitor import layout as at
from vtsim.vmm.monitor.virtual_cpus import (
    KERNEL_GS_BASE,
    Monitor,
    VirtualCpu,
    believed,
    boot,
    descriptor_tables,
    fill,
    gates,
    switch_off,
    windows,
)
from vtsim.vmm.needs import CODE_PAGES, ROWS
from vtsim.vmm.software import events, instructions, mmu, streams, system, tables
from vtsim.vmm.software import layout as w
from vtsim.vmm.software.platform import Forward, Row, operands, row_at
from vtsim.vmm.software.translator import Translator
from vtsim.vmm.spec import VmmSpec

LISTS: Final = 64  # frames for lists of registers
DECODED_PAGES: Final = w.ENTRIES * w.ENTRY_BYTES // mem.PAGE_BYTES
LIST_WORDS: Final = 17
RECORDS: Final = 64  # frames for entries of what a translator leaves to the program
CODE_SPACING: Final = 1 << 21


@frozen(kw_only=True)
class Vcpu(VirtualCpu):
    """A virtual CPU of software: the first frames of its TLBs, decoded instructions, marks, lists and stream."""

    tlb: int
    decoded: int
    marks: int
    lists: int
    stream: int
    code: int = 0  # of a translator: its code, the bytes that it writes, entries of what it leaves to the program
    image: int = 0
    records: int = 0


@define(eq=False)
class SoftwareCpus(Monitor):
    """The program in a machine, as the platform sees it while it runs."""

    handlers: dict[tuple[int, str], int] = field(factory=dict)  # address of what executes an operation in a form
    guest_hooks: dict[int, int] = field(factory=dict)
    forward: Forward = field(init=False)
    lists_used: dict[str, int] = field(factory=dict)
    work_scale: int = 1
    translators: dict[int, Translator] = field(factory=dict)  # by CPU
    records_used: dict[int, int] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.forward = Forward(self.engine)

    def in_guest(self, cpu: int) -> bool:
        """Did the guest's program end, and not yet this one?"""
        return self.word(self.current(cpu), "DEATH") == 0

    def settle(self) -> None:
        """Hand what was counted to the statistics of the guests' owners; registers hold what is not in memory yet."""
        for vcpu in self.vcpus:
            m = self.engine.cpus[vcpu.cpu]
            if self.word(vcpu, "DEATH") == 0:
                ring = self.word(vcpu, "KERNEL")
                self._add(vcpu, "EMULATED", int(m[s.GPR + s.R14]), ring)
                self._add(vcpu, "LOOKUPS", int(m[s.GPR + s.R11]))
                m[s.GPR + s.R14] = m[s.GPR + s.R11] = 0
        super().settle()

    def _add(self, vcpu: VirtualCpu, name: str, count: int, word: int = 0) -> None:
        address = self.address(vcpu) + at.V[name] + 8 * word
        self.host.store(address, self.host.load(address) + count)

    def software(self) -> dict[str, int] | None:
        """What the software MMU and the decoder counted, over all guests."""
        names = {
            "lookups": "LOOKUPS", "misses": "MISSES", "fills": "FILLS", "flushes": "TLB_FLUSHES", "decodes": "DECODES",
        }  # fmt: skip
        return {name: sum(self.word(vcpu, field) for vcpu in self.vcpus) for name, field in names.items()}

    def translations(self) -> dict[str, int] | None:
        """What the translator counted, over all guests; None of an interpreter."""
        if not self.translators:
            return None
        found = {name.lower(): 0 for name in COUNTED}
        for translator in self.translators.values():
            made = {**translator.counts, "flushes": translator.flushes, "evicted": translator.evicted}
            for name, number in made.items():
                found[name] += number
        words = {"chained": "CHAINED", "lookups": "BLOCK_LOOKUPS", "misses": "DECODES"}
        for name, word in words.items():
            found[name] += sum(self.word(vcpu, word) for vcpu in self.vcpus)
        return found

    # --- hooks ---------------------------------------------------------------------------------------------------
    def hook(self, cpu: int, number: int) -> None:
        """Run a hook that the program asked for."""
        vcpu = self.current(cpu)
        assert isinstance(vcpu, Vcpu)
        if number == w.DECODE_ROW:
            self._decode(cpu, vcpu)
        elif number == w.STREAM_BATCH:
            self._stream(cpu, vcpu)
        elif number == w.FORWARD:
            self._forward(cpu, vcpu)
        elif number == w.TRANSLATE_BLOCK:
            self._translate(cpu)
        elif number == w.CHAIN_BLOCK:
            m = self.engine.cpus[cpu]
            self.translators[cpu].chain(int(m[s.GPR + s.RDX]), int(m[s.GPR + s.RAX]))
        else:
            raise ModelError("no such hook", {"number": number})

    def _register(self, vcpu: Vcpu, number: int) -> int:
        return self.word(vcpu, "REGISTERS", number)

    def _host_physical(self, vcpu: Vcpu, linear: int) -> int:
        gpa = linear - at.RAM
        return vcpu.memory.frame(gpa >> mem.PAGE_SHIFT) << mem.PAGE_SHIFT | gpa % mem.PAGE_BYTES

    def _decode(self, cpu: int, vcpu: Vcpu) -> None:
        m = self.engine.cpus[cpu]
        row = row_at(self.engine, self._host_physical(vcpu, int(m[s.GPR + s.RSI])))
        handler = self.handler(row.op, row.form, row.imm) if row is not None else 0
        a, b, c, base, index = self._entry(vcpu, row) if row is not None else (0,) * 5
        found = {s.RAX: handler, s.RCX: row.length if row else 0, s.RDX: a, s.R8: b, s.R9: c, s.R10: base | index << 32}
        for register, value in found.items():
            m[s.GPR + register] = mem.signed(value)

    def _entry(self, vcpu: Vcpu, row: Row) -> tuple[int, int, int, int, int]:
        """The words A, B, C, BASE and INDEX of an operation's entry; A is the operation where nothing executes it."""
        if self.handler(row.op, row.form, row.imm) == self.handlers[o.HOOK, ""]:
            return row.op, 0, 0, 0, 0
        return operands(row, self._list(vcpu, row.imm) if row.op in (o.LDM, o.STM) else 0, self.work_scale)

    def handler(self, op: int, form: str, number: int) -> int:
        """The address of what executes an operation; of one that nothing does, what ends the VM."""
        if op == o.HOOK:
            return self.guest_hooks.get(number, self.handlers[o.HOOK, ""])
        return self.handlers.get((op, form), self.handlers[o.HOOK, ""])

    def _list(self, vcpu: Vcpu, mask: int) -> int:
        """Where the offsets of the registers of a mask stand in memory."""
        key = f"{vcpu.name} {mask}"
        if key not in self.lists_used:
            n = sum(name.startswith(f"{vcpu.name} ") for name in self.lists_used)
            where = self.host.address(vcpu.lists) + 8 * LIST_WORDS * n
            offsets = [w.register_offset(number) for number in range(16) if mask >> number & 1]
            for at_word, value in enumerate((*offsets, w.LIST_END)):
                self.host.store(where + 8 * at_word, value)
            self.lists_used[key] = where
        return self.lists_used[key]

    def _stream(self, cpu: int, vcpu: Vcpu) -> None:
        m = self.engine.cpus[cpu]
        packed = self.host.load(int(m[s.GPR + s.RDI]) + w.E["C"])
        first = (at.STACK_BYTES + at.V["REGISTERS"]) // 8
        registers = dict(enumerate(self.host.words(vcpu.page)[first : first + 16].tolist()))
        rows = streams.batch(self.engine.arena, packed, registers, self.work_scale)
        words = np.array(rows, np.int64).ravel()
        self.host.words(vcpu.stream)[: len(words)] = words
        m[s.GPR + s.R9] = max(len(rows) - 1, 0)

    def _forward(self, cpu: int, vcpu: Vcpu) -> None:
        left = self._register(vcpu, s.RCX)
        parts = self.forward.run(cpu, left)
        done = parts * instructions.CHUNK
        self._add(vcpu, "REGISTERS", -done, s.RCX)
        self.engine.cpus[cpu][s.GPR + s.R14] += done * self.work_scale
        if cpu in self.translators:  # a part goes through the look-up of its block
            self._add(vcpu, "BLOCK_LOOKUPS", parts)

    # --- translation -----------------------------------------------------------------------------------------------
    def _translate(self, cpu: int) -> None:
        m, translator = self.engine.cpus[cpu], self.translators[cpu]
        made = translator.translate(int(m[s.GPR + s.RBX]), int(m[s.GPR + s.RSI]))
        if made is None:
            translator.empty()
            self.records_used[cpu] = 0
            m[s.GPR + s.RAX] = 0
            return
        m[s.GPR + s.RAX] = made.body
        m[s.GPR + s.RCX] = -(-(made.end - made.at) // 8)
        m[s.GPR + s.R8] = made.taken

    def record(self, vcpu: Vcpu, row: Row) -> int:
        """Place an entry for an operation that a translation leaves to the program; its address."""
        n = self.records_used.get(vcpu.cpu, 0)
        if n >= RECORDS * mem.PAGE_BYTES // w.ENTRY_BYTES:
            raise ModelError("a translator has more records than room", {"records": n})
        self.records_used[vcpu.cpu] = n + 1
        where = self.host.address(vcpu.records) + n * w.ENTRY_BYTES
        values = self._entry(vcpu, row)
        for field_name, value in zip(("A", "B", "C", "BASE", "INDEX"), values, strict=True):
            self.host.store(where + w.E[field_name], value)
        self.host.store(where + w.E["LENGTH"], row.length)
        return where

    def start_translator(self, vcpu: Vcpu, base: int) -> None:
        """Give a virtual CPU a translator whose code stands at `base`."""

        def read(linear: int) -> Row | None:
            return row_at(self.engine, self._host_physical(vcpu, linear))

        self.translators[vcpu.cpu] = Translator(
            engine=self.engine, cpu=vcpu.cpu, base=base, frames=tuple(range(vcpu.code, vcpu.code + CODE_PAGES)),
            rows=ROWS, labels=self.program.labels, row_at=read, record=lambda row: self.record(vcpu, row),
            handler=lambda row: self.handler(row.op, row.form, row.imm), work_scale=self.work_scale,
        )  # fmt: skip
        self.host.store(self.address(vcpu) + at.V["IMAGE"], self.host.address(vcpu.image) - base)


def build_software(
    *,
    vmm: VmmSpec,
    profile: Profile,
    engine: Engine,
    guests: Sequence[Guest],
    seed: int = 1,
    shuffled: bool = True,
    translates: bool = False,
) -> SoftwareCpus:
    """Lay software CPUs and their guests, at most one for each CPU, into an engine whose memory is empty.

    The frame allocator of the engine is set up here. Raises `ConfigError` where the memory does not suffice.
    """
    host = Host(engine, profile, direct=at.DIRECT, text=at.TEXT)
    parts: list[dict[str, int]] = []
    for guest in guests:
        marks = -(-gfn_ranges(guest.memory)[-1][1] // mem.PAGE_WORDS)
        frames = {
            "page": host.reserve(), "data": host.reserve(), "tlb": host.reserve(2 * w.TLB_PAGES),
            "decoded": host.reserve(DECODED_PAGES), "marks": host.reserve(marks), "lists": host.reserve(LISTS),
            "stream": host.reserve(),
        }  # fmt: skip
        if translates:
            frames |= {
                "code": host.reserve(CODE_PAGES), "image": host.reserve(CODE_PAGES), "records": host.reserve(RECORDS),
            }  # fmt: skip
            code = range(frames["code"], frames["code"] + CODE_PAGES)
            host.kernel.map(code_base(len(parts)), list(code), KERNEL_PAGE | e.PTE_GLOBAL)
        parts.append(frames)
    roots = [host.process() for _ in guests]
    memories = windows(host, guests, roots, shuffled=shuffled, seed=seed)
    vcpus = [
        Vcpu(name=guest.name, cpu=guest.cpu, memory=ram, devices=guest.devices, **frames)
        for guest, ram, frames in zip(guests, memories, parts, strict=True)
    ]
    program, handlers, guest_hooks = _place(host, translates, vmm.native_methods)
    cpus = SoftwareCpus(
        engine, host, vmm, program, tuple(vcpus), handlers=handlers, guest_hooks=guest_hooks,
        work_scale=int(engine.cpus[0][s.WORK_SCALE]),
    )  # fmt: skip
    gates(host, program)
    for vcpu, guest in zip(vcpus, guests, strict=True):
        start = guest.build(vcpu.memory)
        _fill(cpus, vcpu, start)
        boot(cpus, vcpu, {})
    for n, vcpu in enumerate(vcpus if translates else ()):
        cpus.start_translator(vcpu, code_base(n))
    switch_off(engine, vcpus)
    return cpus


def code_base(number: int) -> int:
    """Where the translations of a virtual CPU stand."""
    return at.TEXT + (number + 1) * CODE_SPACING


def _place(
    host: Host, translates: bool, native_methods: bool
) -> tuple[Program, dict[tuple[int, str], int], dict[int, int]]:
    """The program, the addresses of what executes an operation in a form, and of what executes a guest's hooks."""
    a = Assembler("software CPU", at.TEXT)
    instructions.loop(a, translates=translates)
    instructions.work(a, translates=translates)
    names: dict[tuple[int, str], str] = {}
    for number, ((op, form), execute) in enumerate(instructions.handlers(translates).items()):
        a.activity = o.EXIT_HANDLER
        names[op, form] = a.label(f"execute_{number}")
        execute(a)
    names |= {(op, ""): name for op, name in system.emit(a, native_methods=native_methods).items()}
    a.activity = o.EXIT_HANDLER
    hook_names = tables.emit(a, translates=translates)
    streams.emit(a, translates=translates)
    names[o.STREAM, ""] = "stream"
    names[o.HOOK, ""] = a.label("not_executed")
    a.ld(s.RAX, w.entry("A"))
    a.jmp("illegal")
    mmu.subroutines(a)
    events.flags(a)
    events.deliver(a)
    events.interrupt(a)
    events.boot(a)
    program = a.assemble()
    host.engine.place(program, lambda page: TEXT_FRAME + (page - at.TEXT) // mem.PAGE_BYTES)
    labels = program.labels
    return program, {form: labels[name] for form, name in names.items()}, {n: labels[x] for n, x in hook_names.items()}


def _fill(cpus: SoftwareCpus, vcpu: Vcpu, start: Start) -> None:
    """The structure of a vCPU and its MSRs."""
    host, here = cpus.host, cpus.address(vcpu)
    fill(cpus, vcpu, start, 2)
    ranges = gfn_ranges(vcpu.memory.size)
    values = believed(start) | {
        "FS_BASE": start.fs_base, "GS_BASE": start.gs_base, "KERNEL_GS_BASE": start.msrs.get(KERNEL_GS_BASE, 0),
        "DECODED": host.address(vcpu.decoded), "CODE_PAGES": host.address(vcpu.marks),
        "STREAM": host.address(vcpu.stream), "LOW_END": ranges[0][1] << 12,
        "HIGH_END": ranges[-1][1] << 12 if len(ranges) > 1 else 0, "WORK_BODY": cpus.program.labels.get("work_body", 0),
    }  # fmt: skip
    cpus.put(vcpu, values)
    descriptor_tables(cpus, vcpu, start)
    tlb = host.address(vcpu.tlb)
    host.store_words(here + at.V["SOFT_TLB"], [tlb + ring * w.TLB_PAGES * mem.PAGE_BYTES for ring in range(2)])
