"""A guest with direct page tables on two vCPUs that changes entries by requests at random, and what both must see.

Steps of both have one order. Each access of an address that may be stale in a vCPU is left out until that vCPU has
dropped it, by a flush of its own or by one that the other asks for. One frame becomes a table, and memory again; both
vCPUs try to store to it meanwhile, by whatever translation they have.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from attrs import define, field

from tests.oracle.walker import R, Refused, W, Walker, Words
from tests.vmm.direct_guest import FREE, READ_ONLY, WINDOW, A, DirectGuest, P, Steps
from vtsim.base import memory as mem
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Mem
from vtsim.ept import direct as d
from vtsim.ept.spec import ADDRESS, PTE_DIRTY, PTE_WRITE
from vtsim.ept.tables import KERNEL_PAGE

# fmt: off
VCPUS = 2
REGION = 0x7000_0000                    # two last-level tables from here on; behind them that of the changing frame
TABLES, PAGES = 2, 4
DATA = range(FREE, FREE + 8)
CHANGING = FREE + 16                    # the frame that is memory and a table by turns
STAMP = 0x5000
RIGHTS = (READ_ONLY, KERNEL_PAGE, P | A, P | PTE_WRITE | A | PTE_DIRTY)
# fmt: on
Act = Callable[[DirectGuest], None]


@define
class DirectPlan:
    """What both vCPUs do, in one order, and what each logs."""

    chance: random.Random
    count: int
    expected: tuple[list[int], ...] = field(factory=lambda: tuple([] for _ in range(VCPUS)))
    acts: list[tuple[int, Act]] = field(factory=list)
    stale: list[set[int]] = field(factory=lambda: [set() for _ in range(VCPUS)])
    words: Words = field(factory=lambda: Words({}))
    memory: dict[int, int] = field(factory=dict)  # first words of frames, by host-physical address
    is_table: bool = False
    guest: DirectGuest | None = None

    @property
    def steps(self) -> tuple[Steps, ...]:
        """The vCPUs' steps; those of the first make the plan."""
        return tuple(partial(self._emit, vcpu) for vcpu in range(VCPUS))

    @property
    def its(self) -> DirectGuest:
        assert self.guest is not None
        return self.guest

    @property
    def addresses(self) -> list[int]:
        tables = TABLES + self.is_table
        return [REGION + (table << 21) + (page << 12) for table in range(tables) for page in range(PAGES)]

    def _emit(self, vcpu: int, guest: DirectGuest) -> None:
        if vcpu == 0:
            self._make(guest)
        for number, (whose, act) in enumerate(self.acts):
            if whose == vcpu:
                before = sum(other == 1 - vcpu for other, _ in self.acts[:number])
                guest.wait(1 - vcpu, before)
                act(guest)
                guest.tell()

    def _make(self, guest: DirectGuest) -> None:
        self.guest = guest
        for table in range(TABLES):
            for page in range(PAGES):
                guest.table.map(REGION + (table << 21) + (page << 12), [guest.machine(DATA[page]) >> 12], KERNEL_PAGE)
        for gfn in DATA:
            guest.memory.store(gfn << 12, STAMP + gfn)
            self.memory[guest.machine(gfn)] = STAMP + gfn
        self.memory[guest.machine(CHANGING)] = 0
        self._copy(guest.table.root)
        for _ in range(self.count):
            self._step()

    def _copy(self, root: int) -> None:
        """The tables as they are, by level, down to those with pages; the window's are not writable where they are."""
        level = {root}
        for _ in range(4):
            below = set()
            for frame in level:
                words = self.its.memory.engine.contents(frame, mem.TABLE)
                self.words.frames[frame] = [int(e) & (1 << 64) - 1 for e in words]
                below |= {(int(e) & ADDRESS) >> 12 for e in words if e & P}
            level = below
        changing = self.its.machine(CHANGING) >> 12
        self.words.frames[changing] = [0] * 512

    # --- steps
    def _step(self) -> None:
        vcpu, kind = self.chance.randrange(VCPUS), self.chance.random()
        if kind < 0.3:
            self._change(vcpu)
        elif kind < 0.42:
            self._flush(vcpu)
        elif kind < 0.47:
            self._become(vcpu)
        elif kind < 0.55:
            self._store_to_changing(vcpu)
        else:
            self._access(vcpu)

    def _request(self, vcpu: int, kind: int, value: int) -> None:
        self.acts.append((vcpu, lambda guest: guest.request(kind, value)))
        self.expected[vcpu].append(1)

    def _update(self, vcpu: int, at: int, value: int, addresses: list[int]) -> None:
        """A request for an entry, which is granted; translations of the addresses may be stale."""
        if self.words[at] & P:
            for stale in self.stale:
                stale.update(addresses)
        self.words[at] = value
        self._request(vcpu, at | d.UPDATE, value)

    def _change(self, vcpu: int) -> None:
        address = self.chance.choice(self.addresses)
        rights = self.chance.choice(RIGHTS)
        value = self.its.machine(self.chance.choice(DATA)) | rights if self.chance.random() < 0.85 else 0
        self._update(vcpu, self._slot(address), value, [address])

    def _slot(self, address: int) -> int:
        """Where the last-level entry of an address stands."""
        table = self.words.frames
        at = self.its.table.root
        for level in (4, 3, 2):
            at = (table[at][address >> (3 + 9 * level) & 511] & ADDRESS) >> 12
        return at << 12 | (address >> 12 & 511) << 3

    def _link(self) -> int:
        """Where the entry stands that leads to the changing frame while it is a table."""
        return self._directory() | ((REGION >> 21) + TABLES & 511) << 3

    def _directory(self) -> int:
        table, at = self.words.frames, self.its.table.root
        for level in (4, 3):
            at = (table[at][REGION >> (3 + 9 * level) & 511] & ADDRESS) >> 12
        return at << 12

    def _flush(self, vcpu: int) -> None:
        """By itself or by the other, of an address or of all."""
        everybody = self.chance.random() < 0.6
        whose = 1 - vcpu if everybody else vcpu
        mask = (1 << 1 - vcpu) << d.VCPUS if everybody else 0
        stale = self.stale[whose]
        if stale and self.chance.random() < 0.6:
            address = self.chance.choice(sorted(stale))
            stale.discard(address)
            self._request(vcpu, d.FLUSH_PAGE | mask, address)
        else:
            stale.clear()
            self._request(vcpu, d.FLUSH_ALL | mask, 0)

    def _become(self, vcpu: int) -> None:
        """The changing frame becomes a table, with one page, or memory again."""
        its, frame = self.its, self.its.machine(CHANGING)
        window = WINDOW + (CHANGING << 12)
        if not self.is_table:
            self._update(vcpu, its.entry_of(CHANGING), frame | READ_ONLY, [])
            self._update(1 - vcpu if self.chance.random() < 0.5 else vcpu, self._link(), frame | P | PTE_WRITE | A, [])
            self.is_table = True
            return
        gone = self.addresses[-PAGES:]
        self._update(vcpu, self._link(), 0, gone)
        self.is_table = False
        self._update(vcpu, its.entry_of(CHANGING), frame | KERNEL_PAGE, [])
        for page in range(PAGES):
            self._store(vcpu, window + 8 * page, 0)
            self.words[frame | 8 * page] = 0

    def _store(self, vcpu: int, address: int, value: int) -> None:
        """A store that succeeds."""
        self.acts.append((vcpu, lambda guest: guest.attempt(lambda: _store(guest, address, value))))
        self.expected[vcpu].append(0)

    def _store_to_changing(self, vcpu: int) -> None:
        """A store to the frame, whatever it is: if it is a table, nobody has a translation that lets it."""
        window = WINDOW + (CHANGING << 12) + 0x800
        self.acts.append((vcpu, lambda guest: guest.attempt(lambda: _store(guest, window, STAMP))))
        self.expected[vcpu].append(14 if self.is_table else 0)

    def _access(self, vcpu: int) -> None:
        usable = [address for address in self.addresses if address not in self.stale[vcpu]]
        if not usable:
            return
        address, store = self.chance.choice(usable), self.chance.random() < 0.4
        walker = Walker(self.words, self.its.table.root << 12)
        value = len(self.acts) + 1
        try:
            frame = walker.translate(address, W if store else R, False)
        except Refused:
            result = [14] if store else [14, 0]
        else:
            result = [0] if store else [0, self.memory[frame]]
            if store:
                self.memory[frame] = value
        self.expected[vcpu].extend(result)
        if store:
            self.acts.append((vcpu, lambda guest: guest.attempt(lambda: _store(guest, address, value))))
        else:
            self.acts.append((vcpu, lambda guest: _load(guest, address)))


def _store(guest: DirectGuest, address: int, value: int) -> None:
    guest.a.st_value(Mem(displacement=address), value)


def _load(guest: DirectGuest, address: int) -> None:
    guest.a.mov(s.RAX, 0)
    guest.attempt(lambda: guest.load(address))
    guest.log(s.RAX)


def plans(seed: int, count: int) -> DirectPlan:
    """The random programs of a seed."""
    return DirectPlan(random.Random(seed), count)
