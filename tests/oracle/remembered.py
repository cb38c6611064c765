"""What a processor may still use of tables that changed: every answer that no invalidation has forbidden since.

Written from the manual and from nothing else. Every value that an entry ever had is kept. A translation may be made of
values that were current at the last invalidation that reached it, or later; faults are never cached, so the entry that
causes one holds it now; but an entry that is kept may have rights of another time, which refuse what is allowed now. The
flags of all entries are set. A page that is global may have been kept under any PCID.

SDM: "Caching Translation Information"; "Invalidation of TLBs and Paging-Structure Caches"; "Details of TLB Use";
"Operations that Invalidate TLBs and Paging-Structure Caches"; "Operations that Invalidate Cached Mappings".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import product

from attrs import define, field, frozen

FAULT, VIOLATION = "page fault", "EPT violation"
Outcome = int | str  # a host-physical page, or why there is none
Context = tuple[int, int, int]  # VPID, PCID, EPT pointer (its frame)
PRESENT, WRITABLE, USER, LARGE, GLOBAL, NO_EXECUTE, ANY_RIGHT = 1, 2, 4, 1 << 7, 1 << 8, 1 << 63, 7
READ, WRITE, FETCH = 1, 2, 4  # what is allowed to ring 3, as EPT has it
ADDRESS = (1 << 52) - 4096
VPIDS, PCIDS = (0, 1, 2), (0, 1)
# fmt: off
INVLPG, MOV_CR3, PGE, ENTER_0, PAGE_FAULT = "INVLPG", "MOV to CR3", "CR4.PGE", "a transition with VPID 0", "page fault"
OF_TABLE, OF_PAGE = "EPT violation of a table", "EPT violation of a page"
INVPCID, INVVPID, INVEPT = "INVPCID {}".format, "INVVPID {}".format, "INVEPT {}".format
# fmt: on


@frozen
class Order:
    """Something that invalidates, and for what it is told to; what a kind is not told does not matter."""

    kind: str
    vpid: int = 0
    pcid: int = 0
    root: int = 0
    gva: int = 0
    gpa: int = 0


@define
class History:
    """The values that a word had, each with the moment from which on."""

    values: list[tuple[int, int]] = field(factory=lambda: [(-1, 0)])

    def since(self, moment: int) -> set[int]:
        """What the word held at a moment or after it."""
        first = bisect_right(self.values, moment, key=lambda each: each[0])
        return {value for _, value in self.values[max(first - 1, 0) :]}

    @property
    def now(self) -> int:
        return self.values[-1][1]


@define
class Moments:
    """When something was invalidated."""

    at: list[int] = field(factory=lambda: [0])

    def by(self, moment: int) -> int:
        """The last time up to a moment."""
        return self.at[bisect_right(self.at, moment) - 1]


@define
class Remembered:
    """Tables with their history, and what was invalidated when."""

    roots: tuple[int, ...]  # of EPT
    levels: int = 4
    ept_levels: int = 4
    words: dict[int, History] = field(factory=dict)
    cr3: dict[Context, History] = field(factory=dict)
    now: int = 0
    _last: dict[object, Moments] = field(factory=dict)
    _hosts: dict[tuple[int, ...], frozenset[Outcome]] = field(factory=dict)  # answers, until the books change
    _ways: dict[tuple[Context, int, int], list[tuple[int, Outcome, int]]] = field(factory=dict)

    # --- the books
    def _changed(self) -> None:
        self._hosts.clear()
        self._ways.clear()

    def write(self, at: int, entry: int) -> None:
        self._changed()
        self.words.setdefault(at, History([])).values.append((self.now, entry))

    def load(self, context: Context, root: int) -> None:
        """CR3 has this root in a context."""
        self._changed()
        self.cr3.setdefault(context, History([])).values.append((self.now, root))

    def _forget(self, *what: object) -> None:
        for each in what:
            self._last.setdefault(each, Moments()).at.append(self.now)

    def _when(self, what: object, moment: int) -> int:
        known = self._last.get(what)
        return known.by(moment) if known else 0

    def forget(
        self, vpids: Iterable[int], pcids: Iterable[int] = PCIDS, roots: Iterable[int] | None = None, *,
        gva: int | None = None, pieces: bool = True, global_pages: bool,
    ) -> None:  # fmt: skip
        """Mappings of these, all or of an address: with `pieces` all of the page around it, whatever its size."""
        parts = ["all"] if gva is None else [(size, gva >> 12 + 9 * size) for size in range(3 if pieces else 1)]
        for vpid, root in product(vpids, self.roots if roots is None else roots):
            for part in parts:
                self._forget(*((vpid, pcid, root, part) for pcid in pcids))
                if global_pages:
                    self._forget((vpid, "any PCID", root, part))

    def note(self, order: Order, current: Context) -> None:
        """What the manual says that an operation invalidates."""
        self._changed()
        self.now += 1
        vpid, pcid, root = current
        match order.kind:
            case "INVLPG":
                self.forget([vpid], [pcid], gva=order.gva, global_pages=True)
                self._forget(*((vpid, pcid, each, "tables") for each in self.roots))
            case "page fault":
                self.forget([vpid], [pcid], [root], gva=order.gva, pieces=False, global_pages=False)
            case "EPT violation of a table" | "EPT violation of a page":
                self._forget(("guest-physical", root, order.gpa >> 12))
                if order.kind == OF_PAGE:
                    self.forget([vpid], [pcid], [root], gva=order.gva, pieces=False, global_pages=False)
            case "MOV to CR3":
                self.forget([vpid], [order.pcid], global_pages=False)
            case "CR4.PGE" | "INVPCID 2":
                self.forget([vpid], global_pages=True)
            case "INVPCID 0":
                self.forget([vpid], [order.pcid], gva=order.gva, global_pages=False)
            case "INVPCID 1":
                self.forget([vpid], [order.pcid], global_pages=False)
            case "INVPCID 3":
                self.forget([vpid], global_pages=False)
            case "INVVPID 0":
                self.forget([order.vpid], gva=order.gva, global_pages=True)
            case "INVVPID 1":
                self.forget([order.vpid], global_pages=True)
            case "INVVPID 2":
                self.forget([each for each in VPIDS if each], global_pages=True)
            case "INVVPID 3":
                self.forget([order.vpid], global_pages=False)
            case "a transition with VPID 0":
                self.forget([0], global_pages=True)
            case "INVEPT 1" | "INVEPT 2":
                hit = [order.root] if order.kind == "INVEPT 1" else list(self.roots)
                self.forget(VPIDS, roots=hit, global_pages=True)
                self._forget(*(("guest-physical", each) for each in hit))
            case _:
                raise AssertionError(order)

    # --- what may come of an access
    def _host(self, gpa: int, root: int, need: int = READ, *, walked: int = 0) -> frozenset[Outcome]:
        """Where a guest-physical page may be for an access that needs these rights.

        `walked`: a walk found it at that moment or later, without the help of a combined mapping.
        """
        key = (gpa >> 12, root, need, walked)
        if key not in self._hosts:
            self._hosts[key] = frozenset(self._found(gpa, root, need, walked))
        return self._hosts[key]

    def _found(self, gpa: int, root: int, need: int, walked: int) -> Iterator[Outcome]:
        moment = self._when(("guest-physical", root), self.now)
        moment = max(moment, self._when(("guest-physical", root, gpa >> 12), walked))
        tables = {(root << 12, ANY_RIGHT)}
        for level in range(self.ept_levels, 0, -1):
            below = set()
            for table, rights in tables:
                word = self.words.get(table | (gpa >> 3 + 9 * level & 511) << 3, NOTHING)
                if not word.now & ANY_RIGHT:
                    yield VIOLATION
                for entry in word.since(moment):
                    if entry & ANY_RIGHT and (level == 1 or entry & LARGE):
                        within = (1 << 3 + 9 * level) - 1
                        page = entry & ADDRESS & ~within | gpa & within & ~0xFFF
                        yield VIOLATION if need & ~(rights & entry) else page
                    elif entry & ANY_RIGHT:
                        below.add((entry & ADDRESS, rights & entry))
            tables = below

    def _tables(self, context: Context, gva: int, moment: int) -> list[tuple[int, Outcome, int]]:
        """Where the tables may be on the way to an address, by level, with entries as they were since a moment.

        The rights are what the entries allow that lead there.
        """
        key = (context, gva >> 12, moment)
        if key not in self._ways:
            self._ways[key] = list(self._way(context, gva, moment))
        return self._ways[key]

    def _way(self, context: Context, gva: int, moment: int) -> Iterator[tuple[int, Outcome, int]]:
        root = context[2]
        first = self.cr3[context].since(moment) if context in self.cr3 else set()
        tables = {(table, ANY_RIGHT) for table in first}
        for level in range(self.levels, 0, -1):
            places = {(each, rights) for table, rights in tables for each in self._host(table, root)}
            yield from ((level, *each) for each in places)
            tables = {
                (entry & ADDRESS, rights & permits(entry))
                for at, rights in places
                if level > 1 and not isinstance(at, str)
                for entry in self.entry(at, gva, level).since(moment)
                if entry & PRESENT and not entry & LARGE
            }

    def tables(self, context: Context, gva: int) -> list[tuple[int, int]]:
        """Tables in memory on the way to an address as entries are now, with their levels."""
        found = {(level, at) for level, at, _ in self._tables(context, gva, self.now) if not isinstance(at, str)}
        return sorted(each for each in found if each[1] | (gva >> 3 + 9 * each[0] & 511) << 3 in self.words)

    def entry(self, table: int, gva: int, level: int) -> History:
        return self.words.get(table | (gva >> 3 + 9 * level & 511) << 3, NOTHING)

    def _pages(
        self, context: Context, gva: int, level: int, entries: Iterable[int], rights: int, need: int,
        walked: int,
    ) -> Iterator[Outcome]:  # fmt: skip
        """Where the page of an address is if one of these entries maps it, for an access that needs these rights."""
        within = (1 << 3 + 9 * level) - 1
        for entry in entries:
            if not faults(entry, level) and (level == 1 or entry & LARGE):
                if need & ~(rights & permits(entry)):
                    yield FAULT
                else:
                    page = entry & ADDRESS & ~within | gva & within & ~0xFFF
                    yield from self._host(page, context[2], need, walked=walked)

    def _walk(self, context: Context, gva: int, moment: int, need: int) -> Iterator[Outcome]:
        """What a walk finds that begins now, with entries of upper levels as they were since a moment."""
        for level, at, rights in self._tables(context, gva, moment):
            if isinstance(at, str):
                yield at
                continue
            entry = self.entry(at, gva, level).now
            if faults(entry, level):
                yield FAULT
            yield from self._pages(context, gva, level, [entry], rights, need, self.now)

    def _kept(self, context: Context, gva: int, size: int, moment: int, wanted: int, need: int) -> Iterator[Outcome]:
        """Pages of a size that walks may have found at a moment or later, whose entries have the bits that are wanted."""
        before = self._since(context, gva, moment)
        tables = {(at, rights) for level, at, rights in self._tables(context, gva, before) if level == size + 1}
        for at, rights in tables:
            if not isinstance(at, str):
                entries = (e for e in self.entry(at, gva, size + 1).since(moment) if e & wanted == wanted)
                yield from self._pages(context, gva, size + 1, entries, rights, need, moment)

    def _since(self, context: Context, gva: int, moment: int) -> int:
        """Since when no entry of an upper level that a walk uses at a moment can be out of date."""
        return max(self._when((*context, each), moment) for each in ("all", "tables", (0, gva >> 12)))

    def allowed(self, context: Context, gva: int, need: int) -> set[Outcome]:
        """Every outcome of an access that the manual allows."""
        vpid, _, root = context
        found = set(self._walk(context, gva, self._since(context, gva, self.now), need))
        for size in range(3):
            parts = ("all", (0, gva >> 12), (size, gva >> 12 + 9 * size))
            moment = max(self._when((*context, each), self.now) for each in parts)
            found |= set(self._kept(context, gva, size, moment, PRESENT, need))
            moment = max(self._when((vpid, "any PCID", root, each), self.now) for each in parts)
            for pcid in PCIDS:
                found |= set(self._kept((vpid, pcid, root), gva, size, moment, PRESENT | GLOBAL, need))
        return found

    def fresh(self, context: Context, gva: int, need: int) -> Outcome:
        """The outcome without anything cached."""
        table: Outcome = self.cr3[context].now
        rights = ANY_RIGHT
        for level in range(self.levels, 0, -1):
            table = self._fresh_host(int(table), context[2])
            if isinstance(table, str):
                return table
            entry = self.entry(table, gva, level).now
            if faults(entry, level):
                return FAULT
            rights &= permits(entry)
            if level == 1 or entry & LARGE:
                within = (1 << 3 + 9 * level) - 1
                if need & ~rights:
                    return FAULT
                return self._fresh_host(entry & ADDRESS & ~within | gva & within & ~0xFFF, context[2], need)
            table = entry & ADDRESS
        raise AssertionError

    def _fresh_host(self, gpa: int, root: int, need: int = READ) -> Outcome:
        table, rights = root << 12, ANY_RIGHT
        for level in range(self.ept_levels, 0, -1):
            entry = self.words.get(table | (gpa >> 3 + 9 * level & 511) << 3, NOTHING).now
            if not entry & ANY_RIGHT:
                return VIOLATION
            rights &= entry
            if level == 1 or entry & LARGE:
                within = (1 << 3 + 9 * level) - 1
                return VIOLATION if need & ~rights else entry & ADDRESS & ~within | gpa & within & ~0xFFF
            table = entry & ADDRESS
        raise AssertionError


NOTHING = History()


def faults(entry: int, level: int) -> bool:
    """Does an entry of a level cause a page fault: not present, or a reserved bit is set?"""
    if not entry & PRESENT:
        return True
    return bool(level > 1 and entry & LARGE and (level > 3 or entry & (1 << 3 + 9 * level) - 1 & ~0x1FFF))


def permits(entry: int) -> int:
    """What an entry of the guest's tables allows to ring 3."""
    if not entry & USER:
        return 0
    return ANY_RIGHT & ~(0 if entry & WRITABLE else WRITE) & ~(FETCH if entry & NO_EXECUTE else 0)
