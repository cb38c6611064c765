"""Hostile drivers and devices: random registers, queues, tables and requests end in answers, never in an exception."""

from __future__ import annotations

import random

import pytest

from tests.iommu.worlds import RW_PAGE, SID, World
from vtsim.base import jit
from vtsim.base import memory as mem
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.state import Cache, Caches
from vtsim.iommu.unit import Capabilities

ROUNDS = 60 if jit.DISABLED else 400
SMALL = Caches(iotlb_4k=Cache(1, 2), context=Cache(1, 1), pasid=Cache(1, 2), second_2=Cache(1, 1))
UNITS = (Capabilities(), Capabilities().having(MTS=1, DIT=1, VCS=1), Capabilities().having(CM=1, RWBF=1, ESRTPS=1))
KINDS = ("legacy", "second-level", "first-level", "nested", "pass-through")


def word(dice: random.Random, world: World) -> int:
    """A word that may mean something: a pointer, a descriptor, flags, or noise."""
    page = dice.choice([dice.randrange(64), 0x3FFFF, dice.randrange(1 << 40)]) << 12
    return dice.choice([
        page | dice.randrange(1 << 12), page | 1, page | 3, page | 7, dice.getrandbits(64), -1, 0,
        dice.randrange(1, 10) | dice.getrandbits(2) << 4 | dice.getrandbits(32) << 16, 1 << dice.randrange(64),
    ])  # fmt: skip


def checked(world: World) -> None:
    unit = world.unit
    unit.check_laws()
    assert int(unit.u[st.PENDING_COUNT]) < st.MOST_PENDING
    assert 0 <= int(unit.u[st.DEVICE_PENDING]) <= st.MOST_DEVICE_PENDING
    assert int(unit.u[st.MESSAGE_COUNT]) - int(unit.u[st.MESSAGES_TAKEN]) <= st.RING_ENTRIES
    assert 0 <= int(unit.u[st.FAULT_NEXT]) < int(unit.u[st.FAULT_REGISTERS])


@pytest.mark.parametrize("kind", KINDS)
def test_random_programming_ends_in_answers(kind: str) -> None:
    dice = random.Random(KINDS.index(kind))
    for _ in range(ROUNDS // 4):
        world = World(kind, dice.choice(UNITS), caches=dice.choice([Caches(), SMALL, Caches.none()]))
        unit, memory = world.unit, world.memory
        queue = memory.allocate() << 12
        unit.write("IQA", queue | dice.choice([0, sp.IQA_WIDE]))
        unit.write("PQA", memory.allocate() << 12)
        for _ in range(24):
            action = dice.randrange(8)
            if action == 0:
                row = dice.choice(sp.REGISTERS)
                unit.write_at(row.offset, dice.choice([4, 8]), dice.getrandbits(64))
            elif action == 1:
                memory.store(dice.randrange(1, 48) << 12 | dice.randrange(512) << 3, mem.signed(word(dice, world)))
            elif action == 2:
                for place in range(0, 64, 8):
                    memory.store(queue + place, mem.signed(word(dice, world)))
                unit.write("IQT", dice.randrange(0, 128, 16))
            elif action == 3:
                unit.write("GCMD", dice.getrandbits(32) | sp.TE)
                unit.write("FSTS", 0xFF)
            elif action == 4:
                dice.choice([unit.device_completed, unit.device_timed_out])(dice.getrandbits(16))
                list(unit.messages())
            elif action == 5:
                unit.page_request(
                    dice.choice([SID, 3]), dice.getrandbits(64), dice.getrandbits(4), pasid=dice.choice([-1, 67])
                )
            elif action == 6:
                unit.interrupt(dice.getrandbits(16), 0xFEE0_0000 | dice.getrandbits(20), dice.getrandbits(32))
            for _ in range(3):
                unit.translate(
                    dice.choice([SID, SID, dice.getrandbits(16)]),
                    dice.choice([RW_PAGE, dice.getrandbits(64), 0xFEE0_0000, dice.randrange(1 << 22)]),
                    dice.getrandbits(5),
                    size=dice.choice([0, 1, 4, 64, 4096, -1]),
                    pasid=dice.choice([sp.NO_PASID, 67, 0, 1 << 20, dice.getrandbits(20)]),
                    at=dice.choice([0, 0, 0, 1, 2, 3]),
                )
                list(unit.messages())
            checked(world)


def test_a_device_cannot_reach_outside_its_domain_by_any_address_it_may_name() -> None:
    """Whatever address it asks for, with whatever right, a page outside its domain is never the answer."""
    world = World("legacy")
    dice = random.Random(1)
    domain = {leaf.frame for page in (0x20_1000, 0x20_2000, 0x20_3000) if (leaf := world.second.find(page))}
    huge = world.second.find(2 << 30)
    assert huge is not None
    domain |= set(range(huge.frame, huge.frame + 512))
    for _ in range(ROUNDS):
        address = dice.choice([dice.getrandbits(64), dice.randrange(1 << 23), (2 << 30) + dice.randrange(1 << 22)])
        answer = world.ask(address & ~7, dice.choice([1, 2, 3]))
        assert answer.status != st.COMPLETED or answer.hpa >> 12 in domain


def test_a_spoofed_requester_reaches_what_the_other_may_and_its_own_fault_names_the_other() -> None:
    """A remapping unit believes the requester-id: that is contained only by who may send which (ACS), not here."""
    world = World("legacy")
    thief = SID + 8
    assert world.unit.translate(thief, RW_PAGE).status == st.BLOCKED
    assert world.unit.translate(SID, RW_PAGE).status == st.COMPLETED  # the same wire, with another name
    assert world.unit.read_at(sp.FAULT_OFFSET + 8, 8) & 0xFFFF == thief


def test_translated_requests_reach_all_memory_where_a_device_is_trusted_and_nothing_where_it_is_not() -> None:
    trusted = World("legacy")
    secret = 0x1000
    assert trusted.ask(secret, sp.WRITE, at=sp.TRANSLATED).hpa == secret
    trusted.structures.context(SID)[0] = int(trusted.structures.context(SID)[0]) & ~(3 << 2)
    trusted.invalidate_all()
    assert trusted.ask(secret, sp.WRITE, at=sp.TRANSLATED).status == st.BLOCKED
