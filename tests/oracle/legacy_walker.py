"""A slow page walker of 32-bit and PAE paging over lists of words, written from the manual and from nothing else.

SDM: "32-Bit Paging"; "PAE Paging".
"""

from __future__ import annotations

from attrs import define

from tests.oracle.walker import USER_X, PageFault, R, Refused, W, Walker, X, bits


@define
class LegacyWalker(Walker):
    """Walks tables of 4-byte entries, or with PAE of 8-byte ones from the PDPTE registers on."""

    pae: bool = False
    pse: bool = True
    pdptes: tuple[int, int, int, int] = (0, 0, 0, 0)

    def entry(self, at: int) -> int:
        word = self.words[at & ~7]
        return word if self.pae else bits(word, 63, 32) if at & 4 else bits(word, 31, 0)

    def set_entry(self, at: int, value: int) -> None:
        word = self.words[at & ~7]
        if not self.pae:
            value = word & 0xFFFF_FFFF | value << 32 if at & 4 else word & ~0xFFFF_FFFF | value
        self.words[at & ~7] = value

    def translate(self, gva: int, kind: str, user: bool) -> int:
        code = (kind == W) << 1 | user << 2 | (kind == X and ((self.pae and self.nxe) or self.smep)) << 4
        may_write, may_user, no_execute = True, True, False
        if self.pae:
            pdpte = self.pdptes[bits(gva, 31, 30)]
            if not bits(pdpte, 0, 0):
                raise Refused(PageFault(gva, code))
            table, size, widths = bits(pdpte, 51, 12) << 12, 8, {2: (29, 21), 1: (20, 12)}
        else:
            table, size, widths = bits(self.cr3, 31, 12) << 12, 4, {2: (31, 22), 1: (21, 12)}
        look = frozenset({R, W}) if self.eptp_ad else frozenset({R})
        for level, (high, low) in widths.items():
            gpa = table + size * bits(gva, high, low)
            at, storable = self.host(gpa, look, False)
            entry = self.entry(at)
            if not bits(entry, 0, 0):
                raise Refused(PageFault(gva, code))
            leaf = level == 1 or (bits(entry, 7, 7) and (self.pae or self.pse))
            if self.pae:
                bad = bits(entry, 62, 52) or bits(entry, 51, self.maxphyaddr) or (bits(entry, 63, 63) and not self.nxe)
                bad = bad or (leaf and level == 2 and bits(entry, 20, 13))
            else:
                bad = leaf and level == 2 and bits(entry, 21, 21)  # bits 20:13 are 39:32 of the page
            if bad:
                raise Refused(PageFault(gva, code | 8 | 1))
            may_write, may_user = may_write and bool(bits(entry, 1, 1)), may_user and bool(bits(entry, 2, 2))
            no_execute = no_execute or bool(self.pae and bits(entry, 63, 63))
            if leaf:
                refused = user and not may_user
                refused = refused or (kind == W and not may_write and (user or self.wp))
                refused = refused or (kind == X and (no_execute or (not user and may_user and self.smep)))
                refused = refused or (kind != X and not user and may_user and self.smap and not self.alignment_check)
                if refused:
                    raise Refused(PageFault(gva, code | 1))
            flags = 1 << 5 | (1 << 6 if leaf and kind == W else 0)
            if entry & flags != flags:
                if not storable:
                    self.host(gpa, frozenset({W}), False)
                self.set_entry(at, entry | flags)
            if leaf:
                need = USER_X if kind == X and may_user and self.mode_based else kind
                page = bits(entry, 51 if self.pae else 31, low) << low
                if level == 2 and not self.pae:
                    page |= bits(entry, 20, 13) << 32
                return self.host(page | bits(gva, low - 1, 0), frozenset({need}), True)[0]
            table = bits(entry, 51 if self.pae else 31, 12) << 12
        raise AssertionError
