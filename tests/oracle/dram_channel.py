"""Channels of DDR4 memory, command by command: how many random lines a second they serve, and after how long.

Written from the standard's rules, without a look at how the project's kernels make lines wait. Timings are clocks of
DDR4-2933Y with devices of 16 Gb, four bits wide (JESD79-4, as DRAMsim3's and Ramulator 2's configurations have them).
A fixed number of lines is always on its way: through the channel, then `OUTSIDE` clocks elsewhere, then to a random place.

python -m tests.oracle.dram_channel prints what decision 0059 quotes, and with queues of 48 lines what 0058 does.
"""

from __future__ import annotations

import heapq
from random import Random
from typing import Final

from attrs import Factory, define, evolve, frozen

CLOCK_NS: Final = 0.682
PEAK: Final = 64 / (4 * CLOCK_NS)  # GB/s of one channel: a line takes the data bus for four clocks
OUTSIDE: Final = 79  # 54 ns: what of 85 ns is not the 46 clocks from activate to the end of a line
GROUPS, BANKS_OF_GROUP = 4, 4
BANKS: Final = GROUPS * BANKS_OF_GROUP  # of a rank
QUEUE: Final = 22  # lines, as the read pending queue of a Xeon E5-2600 has (its guide to uncore events)
NEVER: Final = 1 << 60


@frozen(kw_only=True)
class Timings:
    """In clocks; names are the standard's."""

    rcd: int = 21
    rp: int = 21
    cl: int = 21
    ras: int = 47
    rtp: int = 11
    burst: int = 4
    ccd_s: int = 4
    ccd_l: int = 8
    rrd_s: int = 4
    rrd_l: int = 8
    faw: int = 16
    rank_switch: int = 2
    refi: int = 11_437
    rfc: int = 806

    @property
    def rc(self) -> int:
        """From one row of a bank to the next."""
        return self.ras + self.rp


REAL: Final = Timings()
NO_REFRESH: Final = Timings(rfc=0)
# what banks alone take: nothing else between lines than the data bus
BANKS_ALONE: Final = evolve(NO_REFRESH, rank_switch=0, ccd_l=4, rrd_s=1, rrd_l=1, faw=4)


@frozen
class Line:
    """Where a line is, and when the channel got it."""

    since: int
    bank: int
    row: int


@define
class Bank:
    """Its open row (-1: none), and from when on it can be activated, read, precharged."""

    row: int = -1
    activate: int = 0
    read: int = 0
    precharge: int = 0


@define
class Rank:
    """When it was activated four times ago, ..., last; by group: activated last, read last; when it refreshes next."""

    refresh: int
    activated: list[int] = Factory(lambda: [-NEVER] * 4)
    group_activated: list[int] = Factory(lambda: [-NEVER] * GROUPS)
    group_read: list[int] = Factory(lambda: [-NEVER] * GROUPS)
    read: int = -NEVER


class Channel:
    """One channel: a command a clock, to the oldest line that is ready, reads first; or every line after the one before."""

    def __init__(self, ranks: int, t: Timings, *, queue: int, open_page: bool, first_ready: bool, phase: int) -> None:
        self.t, self.room, self.open_page, self.first_ready = t, queue, open_page, first_ready
        first = [t.refi * number // ranks + phase for number in range(ranks)] if t.rfc else [NEVER] * ranks
        self.ranks = [Rank(refresh=each) for each in first]
        self.banks = [Bank() for _ in range(ranks * BANKS)]
        self.now, self.bus, self.bus_rank = 0, -NEVER, -1
        self.queue: list[Line] = []
        self.waiting: list[Line] = []

    def add(self, line: Line) -> None:
        """Take a line, at the channel's time or later."""
        if not self.queue:
            self.now = max(self.now, line.since)
        (self.queue if len(self.queue) < self.room else self.waiting).append(line)

    def _next_command(self, line: Line) -> tuple[str, int]:
        """What a line is in need of next, and the first clock for it; a rank whose turn to refresh it is only reads."""
        t, bank, rank = self.t, self.banks[line.bank], self.ranks[line.bank // BANKS]
        group = line.bank % BANKS // BANKS_OF_GROUP
        if bank.row == line.row:
            switch = t.rank_switch if self.bus_rank not in (-1, line.bank // BANKS) else 0
            free = max(rank.read + t.ccd_s, rank.group_read[group] + t.ccd_l, self.bus + t.burst + switch)
            return "read", max(bank.read, free)
        if rank.refresh <= self.now:
            return "activate", NEVER
        if bank.row < 0:
            free = max(rank.activated[-1] + t.rrd_s, rank.group_activated[group] + t.rrd_l, rank.activated[0] + t.faw)
            return "activate", max(bank.activate, free)
        return "precharge", bank.precharge

    def _refresh(self, number: int) -> None:
        """Lines whose row is open are read, all rows are closed, then nothing is done until the rank has refreshed."""
        t, banks = self.t, self.banks[number * BANKS : (number + 1) * BANKS]
        if any(self.banks[line.bank].row == line.row for line in self.queue if line.bank // BANKS == number):
            return
        begins = self.ranks[number].refresh
        for bank in banks:
            begins = max(begins, bank.activate if bank.row < 0 else bank.precharge + t.rp)
        for bank in banks:
            bank.row, bank.activate = -1, begins + t.rfc
        self.ranks[number].refresh += t.refi

    def _choose(self) -> tuple[int, str, Line] | int:
        """The command for this clock, or the clock of the next one."""
        soon, best, best_key = NEVER, None, (3, 0)
        spoken_for: set[int] = set()
        hits = {line.bank for line in self.queue if self.open_page and self.banks[line.bank].row == line.row}
        for place, line in enumerate(self.queue if self.first_ready else self.queue[:1]):
            command, at = self._next_command(line)
            if command != "read" and (line.bank in spoken_for or (command == "precharge" and line.bank in hits)):
                continue
            spoken_for.add(line.bank)
            soon = min(soon, at)
            key = (("read", "activate", "precharge").index(command), place)
            if at <= self.now and key < best_key:
                best, best_key = (place, command, line), key
        return best or soon

    def step(self, until: int) -> tuple[Line, int] | None:
        """Issue commands up to a clock until a line was read; return it and when it is there."""
        while self.queue and self.now < until:
            for number, rank in enumerate(self.ranks):
                if rank.refresh <= self.now:
                    self._refresh(number)
            chosen = self._choose()
            if isinstance(chosen, int):
                self.now = max(self.now + 1, min(chosen, until, *(rank.refresh for rank in self.ranks)))
                continue
            place, command, line = chosen
            if self._issue(command, line):
                del self.queue[place]
                if self.waiting:
                    self.queue.append(self.waiting.pop(0))
                others = any((one.bank, one.row) == (line.bank, line.row) for one in self.queue)
                if not self.open_page and not others:
                    bank = self.banks[line.bank]
                    bank.row, bank.activate = -1, max(bank.activate, bank.precharge + self.t.rp)
                return line, self.now - 1 + self.t.cl + self.t.burst
        self.now = max(self.now, until)
        return None

    def _issue(self, command: str, line: Line) -> bool:
        """Do it in this clock; was it the read?"""
        t, now, bank, rank = self.t, self.now, self.banks[line.bank], self.ranks[line.bank // BANKS]
        group = line.bank % BANKS // BANKS_OF_GROUP
        self.now += 1
        if command == "precharge":
            bank.row, bank.activate = -1, max(bank.activate, now + t.rp)
        elif command == "activate":
            bank.row, bank.read, bank.precharge, bank.activate = line.row, now + t.rcd, now + t.ras, now + t.rc
            rank.activated = [*rank.activated[1:], now]
            rank.group_activated[group] = now
        else:
            rank.read = rank.group_read[group] = self.bus = now
            self.bus_rank = line.bank // BANKS
            bank.precharge = max(bank.precharge, now + t.rtp)
        return command == "read"


def served(
    on_their_way: int, lines: int, *, channels: int = 6, ranks: int = 2, t: Timings = REAL, queue: int = QUEUE,
    open_page: bool = False, first_ready: bool = True,
) -> tuple[float, float]:  # fmt: skip
    """Return the share of the channels' bandwidth that so many lines get that are always on their way, and a line's ns."""
    random = Random(1)
    of = [
        Channel(
            ranks, t, queue=queue, open_page=open_page, first_ready=first_ready, phase=t.refi * n // (ranks * channels)
        )
        for n in range(channels)
    ]
    coming = [random.randrange(200) for _ in range(on_their_way)]
    heapq.heapify(coming)
    done = waited = begun = ended = 0
    while done < lines:
        next_one = coming[0] if coming else NEVER
        busy = min((each for each in of if each.queue), key=lambda each: each.now, default=None)
        if busy is None or busy.now >= next_one:
            since = heapq.heappop(coming)
            of[random.randrange(channels)].add(Line(since, random.randrange(ranks * BANKS), random.randrange(1 << 17)))
            continue
        if read := busy.step(next_one):
            line, ended = read
            heapq.heappush(coming, ended + OUTSIDE)
            done += 1
            if done == lines // 5:
                begun = ended
            elif done > lines // 5:
                waited += ended - line.since
    counted = lines - lines // 5
    return counted * t.burst / (ended - begun) / channels, CLOCK_NS * waited / counted


def main() -> None:
    """Print the tables of decision 0058."""
    print(f"one channel, 64 lines on their way, {QUEUE} of them in its queue")
    for ranks in (1, 2, 4):
        for policy, open_page, first_ready in (
            ("in order, closed page", False, False), ("in order, open page", True, False),
            ("first ready, closed page", False, True), ("first ready, open page", True, True),
        ):  # fmt: skip
            share, ns = served(64, 16_000, channels=1, ranks=ranks, open_page=open_page, first_ready=first_ready)
            print(f"  {ranks} ranks, {policy}: {100 * share:.0f} %, {ns:.0f} ns")
    for name, ranks, t in (
        ("banks alone", 2, BANKS_ALONE), ("no refresh", 2, NO_REFRESH), ("all", 2, REAL), ("all", 1, REAL), ("all", 4, REAL),
    ):  # fmt: skip
        print(f"six channels of {ranks} ranks, {name}")
        for lines in (24, 96, 144, 192, 240, 288, 432):
            share, ns = served(lines, 30_000, ranks=ranks, t=t)
            print(f"  {lines} lines on their way: {100 * share:.0f} %, {ns:.0f} ns")


if __name__ == "__main__":
    main()
