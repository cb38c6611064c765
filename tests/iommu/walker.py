"""An independent remapping unit: recursive, without caches, over words of memory; it says what a request ends as.

It shares only the numbers of bits with the kernels' tables where those are written out below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vtsim.iommu.faults import BY_NAME

MASK = (1 << 64) - 1
PAGE_ALIGNED = MASK & ~0xFFF
ADDRESS_52 = ((1 << 52) - 1) & ~0xFFF


class Blocked(Exception):
    """The request ends with this fault reason."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.code = BY_NAME[name].code


class Page(NamedTuple):
    """Where a walk of one dimension ends."""

    address: int
    shift: int
    read: bool
    write: bool
    execute: bool
    user: bool
    snoop: bool
    kind: str | None = None  # its memory type: of the second level, or of the PAT


class Found(NamedTuple):
    """What a request that completes is told."""

    hpa: int
    rights: int
    shift: int
    snoop: bool
    kind: str | None = None


# what a second-level entry or a range says, then what the PAT says: SDM, for processors since the Pentium III
EFFECTIVE = {
    ("UC", "WC"): "WC", ("WC", "UC-"): "WC", ("WC", "WC"): "WC", ("WC", "WB"): "WC", ("WT", "WC"): "WC",
    ("WT", "WT"): "WT", ("WT", "WB"): "WT", ("WT", "WP"): "WP", ("WP", "UC-"): "WC", ("WP", "WC"): "WC",
    ("WP", "WB"): "WP", ("WP", "WP"): "WP", ("WB", "WC"): "WC", ("WB", "WT"): "WT", ("WB", "WB"): "WB",
    ("WB", "WP"): "WP",
}  # fmt: skip
ENCODED = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB"}
IN_PAT = {**ENCODED, 7: "UC-"}


class Walker:
    """Translates over `word(hpa)`; `cap` and `ecap` map names of fields to values; flags to be set collect in `flags`."""

    def __init__(
        self,
        word: Callable[[int], int],
        is_memory: Callable[[int], bool],
        read_only: Callable[[int], bool],
        cap: dict[str, int],
        ecap: dict[str, int],
        width: int,
        rtaddr: int,
        ranges: dict[range, str] | None = None,
        default: str = "UC",
    ) -> None:
        self.word, self.is_memory, self.read_only = lambda hpa: word(hpa) & MASK, is_memory, read_only
        self.cap = lambda name: cap.get(name, 0)
        self.ecap = lambda name: ecap.get(name, 0)
        self.width, self.rtaddr = width, rtaddr
        self.flags: dict[int, int] = {}
        self.ranges, self.default = ranges or {}, default

    def range_type(self, address: int) -> str:
        """What the MTRRs say of an address; the first of the ranges that holds it counts."""
        return next((kind for each, kind in self.ranges.items() if address in each), self.default)

    def high(self, pointer: int) -> bool:
        """Does a pointer use bits beyond the host address width?"""
        return pointer >> self.width != 0

    def get(self, where: int, error: str) -> int:
        if not self.is_memory(where):
            raise Blocked(error)
        return self.word(where)

    # --- entries -------------------------------------------------------------------------------------------------
    def translate(self, sid: int, pasid: int | None, address: int, access: set[str], at: int) -> Found:
        mode = self.rtaddr >> 10 & 3
        if mode == 0:
            if pasid is not None:
                raise Blocked("LEGACY_PASID")
            return self.legacy(sid, address & MASK, access, at)
        if mode == 1 and self.ecap("SMTS"):
            return self.scalable(sid, pasid, address & MASK, access, at)
        raise Blocked("ABORT_MODE" if mode == 3 and self.ecap("ADMS") else "INVALID_ROOT_TABLE")

    def plain(self, address: int, beyond: str, interrupt: str, disabled: bool | None = None) -> Found:
        if self.high(address):
            raise Blocked(beyond)
        if address >> 20 == 0xFEE:
            raise Blocked(interrupt)
        typed = self.ecap("MTS") and disabled is not None
        kind = ("UC" if disabled else self.range_type(address)) if typed else None
        return Found(address, 3, 12, False, kind)

    def legacy(self, sid: int, address: int, access: set[str], at: int) -> Found:
        place = (self.rtaddr & PAGE_ALIGNED) + 16 * (sid >> 8)
        root = self.get(place, "ROOT_ACCESS")
        if not root & 1:
            raise Blocked("ROOT_NOT_PRESENT")
        if root & 0xFFE or self.high(root & PAGE_ALIGNED) or self.word(place + 8):
            raise Blocked("ROOT_RESERVED")
        place = (root & PAGE_ALIGNED) + 16 * (sid & 0xFF)
        low = self.get(place, "CONTEXT_ACCESS")
        high = self.word(place + 8)
        kind, width, domain = low >> 2 & 3, high & 7, high >> 8 & 0xFFFF
        if not low & 1:
            raise Blocked("CONTEXT_NOT_PRESENT")
        if low & 0xFF0 or (kind != 2 and self.high(low & PAGE_ALIGNED)) or high >> 24 or high & 0x80:
            raise Blocked("CONTEXT_RESERVED")
        if domain >= 1 << (4 + 2 * self.cap("ND")):
            raise Blocked("CONTEXT_RESERVED")
        widths = [w for w in (1, 2, 3) if self.cap("SAGAW") >> w & 1]
        if kind == 3 or (kind == 1 and not self.ecap("DT")) or (kind == 2 and not self.ecap("PT")):
            raise Blocked("CONTEXT_INVALID")
        if width not in widths or (kind == 2 and width != max(widths)):
            raise Blocked("CONTEXT_INVALID")
        if at and kind != 1:
            raise Blocked("TYPE_BLOCKED")
        if at == 2 or kind == 2:
            return self.plain(address, "BEYOND_MGAW", "INTERRUPT_ADDRESS")
        if address >> min(30 + 9 * width, self.cap("MGAW") + 1):
            raise Blocked("BEYOND_MGAW")
        if at == 1 and address >> 20 == 0xFEE:
            raise Blocked("INTERRUPT_ADDRESS")
        rules = Rules("SECOND_LEVEL_ACCESS", "SECOND_LEVEL_ACCESS", "SECOND_LEVEL_RESERVED", False, False, False)
        page = self.second(low & PAGE_ALIGNED, 2 + width, address, "write" in access, rules)
        if page is None:
            raise Blocked("NO_WRITE" if "write" in access else "NO_READ")
        return self.finish(page, access, at, legacy=True)

    def scalable(self, sid: int, pasid: int | None, address: int, access: set[str], at: int) -> Found:
        place = (self.rtaddr & PAGE_ALIGNED) + 16 * (sid >> 8)
        self.get(place, "SCALABLE_ROOT_ACCESS")
        root = self.word(place + (8 if sid & 0x80 else 0))
        if not root & 1:
            raise Blocked("SCALABLE_ROOT_NOT_PRESENT")
        if root & 0xFFE or self.high(root & PAGE_ALIGNED):
            raise Blocked("SCALABLE_ROOT_RESERVED")
        place = (root & PAGE_ALIGNED) + 32 * (sid & 0x7F)
        low = self.get(place, "SCALABLE_CONTEXT_ACCESS")
        high, *rest = (self.word(place + 8 * n) for n in (1, 2, 3))
        if not low & 1:
            raise Blocked("SCALABLE_CONTEXT_NOT_PRESENT")
        if low & 0x1E0 or self.high(low & PAGE_ALIGNED) or high >> 21 or any(rest):
            raise Blocked("SCALABLE_CONTEXT_RESERVED")
        if low & 16 and not low & 4:
            raise Blocked("SCALABLE_CONTEXT_INVALID")
        if at and not low & 4:
            raise Blocked("DEVICE_TLB_DISABLED")
        if pasid is not None and not low & 8:
            raise Blocked("PASID_DISABLED")
        if at == 2:
            return self.plain(address, "SCALABLE_BEYOND_MGAW", "SCALABLE_INTERRUPT_ADDRESS", False)
        room = 1 << ((low >> 9 & 7) + 7 + 6)
        if pasid is None:
            access = access - {"execute", "privileged"} | ({"privileged"} if high >> 20 & 1 else set())
        number = high & 0xFFFFF if pasid is None else pasid
        if number >= room:
            raise Blocked("RID_PASID_BEYOND_DIRECTORY" if pasid is None else "PASID_BEYOND_DIRECTORY")
        directory = self.get((low & PAGE_ALIGNED) + 8 * (number >> 6), "DIRECTORY_ACCESS")
        if not directory & 1:
            raise Blocked("DIRECTORY_NOT_PRESENT")
        if directory & 0xFFC or self.high(directory & PAGE_ALIGNED):
            raise Blocked("DIRECTORY_RESERVED")
        place = (directory & PAGE_ALIGNED) + 64 * (number & 63)
        self.get(place, "PASID_ACCESS")
        words = [self.word(place + 8 * n) for n in range(8)]
        return self.by_pasid(words, address, access, at, pasid is None and at == 1)

    def by_pasid(self, words: list[int], address: int, access: set[str], at: int, asks: bool) -> Found:
        low, middle, high, *rest = words
        kind, width = low >> 6 & 7, low >> 2 & 7
        if not low & 1:
            raise Blocked("PASID_NOT_PRESENT")
        if low & 0xC00 or middle & 0x7F0000 or high & 0xF00 or any(rest):
            raise Blocked("PASID_RESERVED")
        if middle >> 25 and not self.ecap("MTS"):
            raise Blocked("PASID_RESERVED")
        if (middle >> 24 & 1 and not self.ecap("SC")) or middle & 0xFFFF >= 1 << (4 + 2 * self.cap("ND")):
            raise Blocked("PASID_RESERVED")
        if (kind in (2, 3) and self.high(low & PAGE_ALIGNED)) or (kind == 1 and self.high(high & PAGE_ALIGNED)):
            raise Blocked("PASID_RESERVED")
        first, second = kind in (1, 3), kind in (2, 3)
        if not 1 <= kind <= 4 or (first and high >> 2 & 3 > 1) or (second and not self.cap("SAGAW") >> width & 1):
            raise Blocked("PASID_INVALID")
        if second and width not in (1, 2, 3):
            raise Blocked("PASID_INVALID")
        pat = [middle >> 32 + 4 * n & 15 for n in range(8)]
        outer_typed = second and bool(middle >> 26 & 1)
        if (first and not set(pat) <= set(IN_PAT)) or (outer_typed and middle >> 27 & 7 not in ENCODED):
            raise Blocked("PASID_INVALID")
        self.pat, self.cache_disabled = [IN_PAT.get(each, "") for each in pat], bool(middle >> 25 & 1)
        if "execute" in access and not high & 2:
            raise Blocked("EXECUTE_DISABLED")
        if "privileged" in access and not high & 1:
            raise Blocked("SUPERVISOR_DISABLED")
        if kind == 4:
            return self.plain(address, "SCALABLE_BEYOND_MGAW", "SCALABLE_INTERRUPT_ADDRESS", self.cache_disabled)
        if asks and address >> 20 == 0xFEE:
            raise Blocked("SCALABLE_INTERRUPT_ADDRESS")
        snooped = bool(middle >> 23 & 1)
        rules = Rules(
            "SCALABLE_SECOND_TOP_ACCESS", "SCALABLE_SECOND_ACCESS", "SCALABLE_SECOND_RESERVED",
            bool(low >> 9 & 1), bool(low >> 5 & 1), snooped, outer_typed,
        )  # fmt: skip
        table, levels = low & PAGE_ALIGNED, 2 + width
        if kind == 2:
            if address >> min(12 + 9 * levels, self.cap("MGAW") + 1):
                raise Blocked("SCALABLE_BEYOND_MGAW")
            page = self.second(table, levels, address, "write" in access, rules)
            if page is None:
                raise Blocked("SCALABLE_SECOND_NOT_PRESENT")
            return self.finish(page, access, at, legacy=False)
        dimension = Second(self, table, levels, rules) if kind == 3 else None
        page, outer = self.first(high, 4 + (high >> 2 & 3), address, access, snooped, dimension)
        page = page._replace(snoop=page.snoop or bool(middle >> 24 & 1))
        return self.finish(page, access, at, legacy=False, outer=outer, protects=bool(high & 16), smep=bool(high & 64))

    # --- paging --------------------------------------------------------------------------------------------------
    def want(self, where: int, entry: int, bits: int, snooped: bool, which: str) -> None:
        if entry & bits == bits:
            return
        if not snooped:
            raise Blocked(f"{which}_FLAGS_NOT_SNOOPED")
        if self.read_only(where):
            raise Blocked(f"{which}_FLAGS_FAILED")
        self.flags[where] = self.flags.get(where, 0) | bits

    def second(self, table: int, levels: int, address: int, writes: bool, rules: Rules) -> Page | None:
        """The page of an address, or None where an entry permits nothing."""
        return self.second_below(table, levels, levels, address, writes, rules, (True, True, True))

    def second_below(
        self, table: int, level: int, levels: int, address: int, writes: bool, rules: Rules, so_far: tuple[bool, ...]
    ) -> Page | None:
        shift = 12 + 9 * (level - 1)
        where = table + 8 * (address >> shift & 511)
        entry = self.get(where, rules.top_error if level == levels else rules.error)
        read, write = bool(entry & 1), bool(entry & 2)
        execute = bool(entry & 4) if rules.executes else read
        if not (read or write or (rules.executes and execute)):
            return None
        large = bool(entry >> 7 & 1) and level > 1
        leaf = large or level == 1
        bad = self.high(entry & ADDRESS_52) or bool(entry >> 62 & 1)
        bad |= leaf and rules.typed and entry >> 3 & 7 not in ENCODED
        bad |= large and (
            level > 3 or not self.cap("SLLPS") >> (level - 2) & 1 or bool(entry & ADDRESS_52 & ((1 << shift) - 1))
        )
        bad |= bool(entry >> 11 & 1) and (not leaf or not self.ecap("SC"))
        if bad:
            raise Blocked(rules.reserved)
        rights = tuple(a and b for a, b in zip(so_far, (read, write, execute), strict=True))
        if rules.flags:
            dirty = leaf and writes and rights[1]
            self.want(where, entry, 0x300 if dirty else 0x100, rules.snooped, "SECOND")
        target = entry & ADDRESS_52
        if leaf:
            self.last = (where, entry)
            kind = ENCODED[entry >> 3 & 7] + ("!" if entry >> 6 & 1 else "") if rules.typed else None
            return Page(target | address % (1 << shift), shift, *rights, True, bool(entry >> 11 & 1), kind)
        return self.second_below(target, level - 1, levels, address, writes, rules, rights)

    def first(
        self, root: int, levels: int, address: int, access: set[str], snooped: bool, outer: Second | None
    ) -> tuple[Page, Page | None]:
        """The page of an address, translated, and what the second level says of it (nested)."""
        top = address >> (11 + 9 * levels)
        if top not in (0, MASK >> (11 + 9 * levels)):
            raise Blocked("NOT_CANONICAL")
        user = "privileged" not in access
        write = execute = for_user = True
        table = root & PAGE_ALIGNED
        for level in range(levels, 0, -1):
            shift = 12 + 9 * (level - 1)
            host, holder = table, None
            if outer is not None:
                holder = outer.table(table, top=level == levels)
                host = holder.address
                holder_leaf = self.last
            where = host + 8 * (address >> shift & 511)
            entry = self.get(where, "FIRST_LEVEL_TOP_ACCESS" if level == levels else "FIRST_LEVEL_ACCESS")
            if not entry & 1:
                raise Blocked("FIRST_LEVEL_NOT_PRESENT")
            large = bool(entry >> 7 & 1) and level > 1
            bad = outer is None and self.high(entry & ADDRESS_52)
            bad |= bool(entry >> 63) and not root & 32
            bad |= large and (level > 3 or (level == 3 and not self.cap("FL1GP")))
            bad |= large and bool(entry & ADDRESS_52 & ((1 << shift) - 1) & ~0x1000)
            if bad:
                raise Blocked("FIRST_LEVEL_RESERVED")
            write, for_user = write and bool(entry & 2), for_user and bool(entry & 4)
            execute = execute and not entry >> 63
            accessed = 0x20 | (0x400 if root & 128 else 0)
            may_write = write and for_user if user else write or not root & 16
            dirties = (large or level == 1) and "write" in access and may_write

            def mark(bits: int) -> None:
                if entry & bits == bits:  # noqa: B023
                    return
                if outer is not None:
                    if not snooped:
                        raise Blocked("FIRST_FLAGS_NOT_SNOOPED")
                    if not holder.write:  # noqa: B023
                        raise Blocked("NESTED_NO_WRITE")
                    if outer.rules.flags:
                        self.want(*holder_leaf, 0x200, snooped, "SECOND")  # noqa: B023
                self.want(where, entry, bits, snooped, "FIRST")  # noqa: B023

            if large or level == 1:
                mark(accessed | (0x40 if dirties and outer is None else 0))
                break
            mark(accessed)
            table = entry & ADDRESS_52
        guest = entry & ADDRESS_52 & ~((1 << shift) - 1) | address % (1 << shift)
        index = (entry >> 3 & 3) + 4 * (entry >> (7 if level == 1 else 12) & 1)
        page = Page(guest, shift, True, write, execute, for_user, False, self.pat[index])
        if outer is None:
            return page, None
        if outer.beyond(guest):
            raise Blocked("NESTED_BEYOND")
        host_page = self.second(outer.root, outer.levels, guest, dirties, outer.rules)
        if host_page is None:
            raise Blocked("SCALABLE_SECOND_NOT_PRESENT")
        if dirties and host_page.write:
            mark(0x40)
        shift = min(shift, host_page.shift)
        return page._replace(address=host_page.address, shift=shift, snoop=host_page.snoop), host_page

    def finish(
        self,
        page: Page,
        access: set[str],
        at: int,
        *,
        legacy: bool,
        outer: Page | None = None,
        protects: bool | None = None,
        smep: bool = False,
    ) -> Found:
        """The rights of this request, and whether they are enough; `protects` is None without a first level."""
        if self.high(page.address):
            raise Blocked("BEYOND_MGAW" if legacy else "SCALABLE_BEYOND_MGAW")
        if page.address >> 20 == 0xFEE:
            raise Blocked("INTERRUPT_ADDRESS" if legacy else "SCALABLE_INTERRUPT_ADDRESS")
        allowed = {name for name in ("read", "write", "execute") if getattr(page, name)}
        user = "privileged" not in access
        if protects is not None:
            if user and not page.user:
                allowed = set()
            elif not user:
                allowed |= set() if protects else {"write"}
                allowed -= {"execute"} if smep and page.user else set()
            if outer is not None:
                allowed &= {name for name in ("read", "write", "execute") if getattr(outer, name)}
        wanted = access & {"read", "write", "execute"}
        lacking = wanted - allowed
        if lacking and (not at or not allowed):
            if protects is not None and user and not page.user:
                raise Blocked("SUPERVISOR_PAGE")
            if "write" in lacking:
                raise Blocked("NO_WRITE" if legacy else "SCALABLE_NO_WRITE")
            if "read" in lacking or legacy:
                raise Blocked("NO_READ" if legacy else "SCALABLE_NO_READ")
            raise Blocked("NO_EXECUTE")
        rights = sum({"read": 1, "write": 2, "execute": 4}[name] for name in allowed)
        kind = None if legacy or not self.ecap("MTS") else self.kind(page, outer, first=protects is not None)
        return Found(page.address, rights, page.shift, page.snoop, kind)

    def kind(self, page: Page, outer: Page | None, *, first: bool) -> str:
        """The memory type of a page: of the second level alone, of the first alone, or of both."""
        if self.cache_disabled:
            return "UC"
        below = (outer.kind if outer is not None else None if first else page.kind) or self.range_type(page.address)
        if below.endswith("!") or not first:
            return below.removesuffix("!")
        return EFFECTIVE.get((below, page.kind or ""), "UC")


class Rules(NamedTuple):
    """What differs between the second levels of legacy and of scalable mode."""

    top_error: str
    error: str
    reserved: str
    flags: bool
    executes: bool
    snooped: bool
    typed: bool = False


class Second(NamedTuple):
    """The second level of a nested translation."""

    walker: Walker
    root: int
    levels: int
    rules: Rules

    def beyond(self, guest: int) -> bool:
        return guest >> (12 + 9 * self.levels) != 0

    def table(self, guest: int, *, top: bool) -> Page:
        """Where a table of the guest lies."""
        if self.beyond(guest):
            raise Blocked("FIRST_LEVEL_BEYOND")
        page = self.walker.second(self.root, self.levels, guest, False, self.rules)
        if page is None or not page.read:
            raise Blocked("NESTED_NO_READ_TOP" if top else "NESTED_NO_READ")
        return page
