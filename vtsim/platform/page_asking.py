"""Devices that ask for pages: what they may have outstanding, responses, and one that asks for what it never got.

A device that finds a page missing sends page requests, a group for each descriptor, and holds the operation until the
group is answered. It has no more requests outstanding than it was allowed; others wait. A success lets it try again,
whether the page is there or the unit's queue had no room; anything else ends the operation.

PCIe: "Page Request Interface": groups by index, of which the last request is marked; responses by group.
VT-d: "Page Request Queue".
Not modelled: a device that stops asking after a Response Failure; what a page request takes of the link.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final

import simpy
from attrs import define, field, frozen

from vtsim.base.errors import ModelError
from vtsim.iommu import descriptors as d
from vtsim.iommu import spec as sp
from vtsim.platform.outcome import PageRequestOutcome

GROUPS: Final = 512  # indexes of page request groups
FLOOD_GROUP: Final = GROUPS - 1
PAGE: Final = 4096
FLOOD_FIRST, FLOOD_END = 1 << 32, 1 << 47  # no driver allows addresses beyond 4 GiB


@define
class Group:
    """A group that waits for its response: how many requests it has, since when, and what it ended as."""

    requests: int
    since: int
    answered: simpy.Event


@frozen(kw_only=True)
class Way:
    """What is between a device and the unit, in cycles; `send`: address, access, PASID, group, is it the last?"""

    up: int
    down: int
    send: Callable[[int, int, int, int, bool], None]


@define(eq=False)
class PageRequests:
    """The page requests of one device."""

    clock: simpy.Environment
    allowed: int  # outstanding at most
    way: Way
    outstanding: int = field(default=0, init=False)
    free: deque[int] = field(factory=lambda: deque(range(FLOOD_GROUP)), init=False)
    groups: dict[int, Group] = field(factory=dict, init=False)
    room: simpy.Event = field(init=False)
    flood: Flood | None = field(default=None, init=False)
    requests: int = field(default=0, init=False)
    group_count: int = field(default=0, init=False)
    succeeded: int = field(default=0, init=False)
    refused: int = field(default=0, init=False)
    unexpected: int = field(default=0, init=False)  # responses to no group
    most: int = field(default=0, init=False)  # that were outstanding
    wait_sum: int = field(default=0, init=False)  # cycles from the first request of a group to its response
    wait_most: int = field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.room = self.clock.event()

    def ask(self, addresses: Sequence[int], access: int) -> Generator[simpy.Event, Any, bool]:
        """Ask for pages, as a group, as many as there is room for; was the answer a success?"""
        while self.outstanding >= self.allowed:
            if self.room.triggered:
                self.room = self.clock.event()
            yield self.room
        pages = addresses[: self.allowed - self.outstanding]
        index = self.free.popleft()
        group = self.groups[index] = Group(len(pages), int(self.clock.now), self.clock.event())
        self.outstanding += len(pages)
        self.most = max(self.most, self.outstanding)
        self.requests += len(pages)
        self.group_count += 1
        yield self.clock.timeout(self.way.up)
        for number, address in enumerate(pages, 1):
            self.way.send(address, access, sp.NO_PASID, index, number == len(pages))
        code = yield group.answered
        return bool(code == d.RESPONSE_SUCCESS)

    def answer(self, index: int, code: int) -> Generator[simpy.Event, Any, None]:
        """A response goes down to the device."""
        yield self.clock.timeout(self.way.down)
        if index == FLOOD_GROUP and self.flood is not None:
            self.flood.answers[code] = self.flood.answers.get(code, 0) + 1
            return
        group = self.groups.pop(index, None)
        if group is None:
            self.unexpected += 1
            return
        waited = int(self.clock.now) - group.since
        self.wait_sum += waited
        self.wait_most = max(self.wait_most, waited)
        if code == d.RESPONSE_SUCCESS:
            self.succeeded += 1
        else:
            self.refused += 1
        self.free.append(index)
        self.outstanding -= group.requests
        group.answered.succeed(code)
        if not self.room.triggered:
            self.room.succeed()

    def outcome(self, held: int, failed: int) -> PageRequestOutcome:
        """What was asked, after the law of groups was checked. `held`, `failed`: operations of the device."""
        if self.group_count != self.succeeded + self.refused + len(self.groups):
            raise ModelError("a page request group was answered more than once", {"groups": self.group_count})
        flood = self.flood
        answers = {} if flood is None else flood.answers
        granted = answers.get(d.RESPONSE_SUCCESS, 0)
        return PageRequestOutcome(
            requests=self.requests,
            groups=self.group_count,
            succeeded=self.succeeded,
            refused=self.refused,
            waiting=len(self.groups),
            unexpected=self.unexpected,
            most=self.most,
            held=held,
            failed=failed,
            wait_sum=self.wait_sum,
            wait_most=self.wait_most,
            flood=flood.sent if flood else 0,
            flood_owed=flood.owed if flood else 0,
            flood_succeeded=granted,
            flood_refused=sum(answers.values()) - granted,
        )


@define(eq=False)
class Flood:
    """Page requests for addresses that nobody allowed, again and again, all of one group; `answers`: by code."""

    pages: PageRequests
    burst: int
    every: int  # cycles between two bursts
    random: random.Random
    sent: int = field(default=0, init=False)
    owed: int = field(default=0, init=False)  # of these, that are to be answered
    answers: dict[int, int] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.pages.clock.process(self.process())

    def process(self) -> Generator[simpy.Event, Any, None]:
        """The SimPy process: of four requests one has a PASID, and one is not the last of its group."""
        while True:
            yield self.pages.clock.timeout(self.every)
            for _ in range(self.burst):
                kind = self.sent % 4
                address = self.random.randrange(FLOOD_FIRST, FLOOD_END, PAGE)
                self.sent += 1
                self.owed += kind != 3
                pasid = self.random.randrange(1, 64) if kind == 2 else sp.NO_PASID
                self.pages.way.send(address, self.random.choice((sp.READ, sp.WRITE)), pasid, FLOOD_GROUP, kind != 3)
