"""A slow page walker over lists of words, written from the manual and from nothing else.

SDM: "4-Level Paging and 5-Level Paging"; "EPT Translation Mechanism"; "EPT Violations"; "EPT Misconfigurations".
"""

from __future__ import annotations

from attrs import define, field, frozen

R, W, X, USER_X = "read", "write", "fetch", "fetch from a user-mode address"


@frozen
class PageFault:
    address: int
    code: int


@frozen
class Violation:
    gpa: int
    qualification: int


@frozen
class Misconfiguration:
    gpa: int


@frozen
class NotCanonical:
    pass


class Refused(Exception):
    """The access has no translation; `args[0]` says why."""


@define
class Words:
    """Unsigned words of some frames; whatever else is read is zero."""

    frames: dict[int, list[int]]

    def __getitem__(self, hpa: int) -> int:
        return self.frames[hpa >> 12][(hpa >> 3) & 511] if hpa >> 12 in self.frames else 0

    def __setitem__(self, hpa: int, value: int) -> None:
        self.frames[hpa >> 12][(hpa >> 3) & 511] = value


def bits(value: int, high: int, low: int) -> int:
    return (value >> low) & ((1 << (high - low + 1)) - 1)


@define
class Walker:
    """Walks tables in `words`, and sets their flags."""

    words: Words
    cr3: int
    levels: int = 4
    maxphyaddr: int = 46
    wp: bool = True
    nxe: bool = True
    smep: bool = False
    eptp: int = 0
    execute_only: bool = True
    mode_based: bool = False
    smap: bool = False
    alignment_check: bool = False  # RFLAGS.AC
    pke: bool = False
    pkru: int = 0
    eptp_ad: bool = field(init=False)
    ept_levels: int = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.eptp_ad = bool(bits(self.eptp, 6, 6))
        self.ept_levels = bits(self.eptp, 5, 3) + 1

    # --- EPT
    def host(self, gpa: int, need: frozenset[str], final: bool) -> tuple[int, bool]:
        """hpa, and whether it may be written."""
        if not self.eptp:
            return gpa, True
        table = bits(self.eptp, 51, 12) << 12
        readable, writable, executable, for_user = True, True, True, self.mode_based
        for level in range(self.ept_levels, 0, -1):
            at = table + 8 * bits(gpa, 3 + 9 * level + 8, 3 + 9 * level)
            entry = self.words[at]
            r, w, x = bits(entry, 0, 0), bits(entry, 1, 1), bits(entry, 2, 2)
            u = self.mode_based and bits(entry, 10, 10)
            if not (r or w or x or u):
                raise Refused(Violation(gpa, self.qualification(need, final, 0)))
            bad = (w and not r) or ((x or u) and not r and not self.execute_only)
            bad = bad or bits(entry, 51, self.maxphyaddr) != 0
            leaf = level == 1 or (level in (2, 3) and bits(entry, 7, 7))
            if leaf:
                bad = bad or bits(entry, 5, 3) in (2, 3, 7)
                bad = bad or (level == 2 and bits(entry, 20, 12)) or (level == 3 and bits(entry, 29, 12))
            else:
                bad = bad or bits(entry, 6, 3) or (level > 3 and bits(entry, 7, 7))
            if bad:
                raise Refused(Misconfiguration(gpa))
            readable, writable, executable = readable and r, writable and w, executable and x
            for_user = for_user and u
            if leaf:
                rights = int(readable) | int(writable) << 1 | int(executable) << 2 | int(for_user) << 3
                refused = (R in need and not readable) or (W in need and not writable)
                if refused or (X in need and not executable) or (USER_X in need and not for_user):
                    raise Refused(Violation(gpa, self.qualification(need, final, rights)))
                if self.eptp_ad:
                    self.words[at] |= 1 << 8
                    if W in need:
                        self.words[at] |= 1 << 9
                low = 3 + 9 * level
                return bits(entry, 51, low) << low | bits(gpa, low - 1, 0), bool(writable)
            if self.eptp_ad:
                self.words[at] |= 1 << 8
            table = bits(entry, 51, 12) << 12
        raise AssertionError

    def qualification(self, need: frozenset[str], final: bool, rights: int) -> int:
        q = (R in need) | (W in need) << 1 | (X in need or USER_X in need) << 2 | rights << 3 | 1 << 7
        return q | 1 << 8 if final else q

    # --- linear addresses
    def translate(self, gva: int, kind: str, user: bool) -> int:
        """The host-physical address of an access of one kind by ring 3 or ring 0."""
        width = 12 + 9 * self.levels
        if gva >> (width - 1) not in (0, (1 << (65 - width)) - 1):
            raise Refused(NotCanonical())
        code = (kind == W) << 1 | user << 2 | (kind == X and (self.nxe or self.smep)) << 4
        table = bits(self.cr3, 51, 12) << 12
        may_write, may_user, no_execute = True, True, False
        look = frozenset({R, W}) if self.eptp_ad else frozenset({R})
        for level in range(self.levels, 0, -1):
            gpa = table + 8 * bits(gva, 3 + 9 * level + 8, 3 + 9 * level)
            at, storable = self.host(gpa, look, False)
            entry = self.words[at]
            if not bits(entry, 0, 0):
                raise Refused(PageFault(gva, code))
            leaf = level == 1 or (level in (2, 3) and bits(entry, 7, 7))
            bad = bits(entry, 51, self.maxphyaddr) or (bits(entry, 63, 63) and not self.nxe)
            bad = bad or (level > 3 and bits(entry, 7, 7))
            bad = bad or (leaf and level == 2 and bits(entry, 20, 13)) or (leaf and level == 3 and bits(entry, 29, 13))
            if bad:
                raise Refused(PageFault(gva, code | 8 | 1))
            may_write = may_write and bool(bits(entry, 1, 1))
            may_user = may_user and bool(bits(entry, 2, 2))
            no_execute = no_execute or bool(bits(entry, 63, 63))
            if leaf:
                # "Determination of Access Rights"
                refused = user and not may_user
                refused = refused or (kind == W and not may_write and (user or self.wp))
                refused = refused or (kind == X and no_execute)
                refused = refused or (kind == X and not user and may_user and self.smep)
                refused = refused or (kind != X and not user and may_user and self.smap and not self.alignment_check)
                # "Protection Keys": of user-mode addresses, for data only
                rights = bits(self.pkru, 2 * bits(entry, 62, 59) + 1, 2 * bits(entry, 62, 59))
                forbidden = rights & 1 or (rights & 2 and kind == W and (user or self.wp))
                if self.pke and may_user and kind != X and forbidden:
                    raise Refused(PageFault(gva, code | 1 | 1 << 5))
                if refused:
                    raise Refused(PageFault(gva, code | 1))
            flags = 1 << 5 | (1 << 6 if leaf and kind == W else 0)
            if entry & flags != flags:
                if not storable:
                    self.host(gpa, frozenset({W}), False)
                self.words[at] = entry | flags
            if leaf:
                low = 3 + 9 * level
                need = USER_X if kind == X and may_user and self.mode_based else kind
                return self.host(bits(entry, 51, low) << low | bits(gva, low - 1, 0), frozenset({need}), True)[0]
            table = bits(entry, 51, 12) << 12
        raise AssertionError
