"""One remapping unit as others see it: registers, requests, invalidation, messages, save and restore."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt
from attrs import define, field, frozen

from vtsim.base.errors import ModelError
from vtsim.base.jit import quiet
from vtsim.base.memory import is_memory, signed, store_word
from vtsim.ept.memory_types import NAMES
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.descriptors import descriptor
from vtsim.iommu.kernels.interrupt_remapping import remap_interrupt
from vtsim.iommu.kernels.invalidation_queue import device_answered, device_timed_out, run_queue
from vtsim.iommu.kernels.page_requests import ask_for_page
from vtsim.iommu.kernels.requests import translate_request
from vtsim.iommu.kernels.sweep import sweep_requests
from vtsim.iommu.kernels.unit_registers import read_unit_register, write_unit_register
from vtsim.iommu.state import Caches

Words = npt.NDArray[np.int64]


@frozen(kw_only=True)
class Capabilities:
    """What a unit is capable of: fields of CAP and ECAP by name; those not named are 0.

    FRO and IRO are added. The default is a server's unit of the scalable-mode generation with 48-bit addresses.
    """

    cap: dict[str, int] = field(
        factory=lambda: dict(
            ND=6, SAGAW=0b01110, MGAW=56, ZLR=1, SLLPS=3, PSI=1, NFR=7, MAMV=18, DWD=1, DRD=1, FL1GP=1, PI=1,
            FL5LP=1, PLMR=1, PHMR=1,
        )
    )  # fmt: skip
    ecap: dict[str, int] = field(
        factory=lambda: dict(
            C=1, QI=1, DT=1, IR=1, EIM=1, PT=1, SC=1, MHMV=15, NEST=1, PRS=1, ERS=1, SRS=1, PSS=19, PASID=1, SMTS=1,
            SLADS=1, SLTS=1, FLTS=1, SMPWC=1, RPS=1, ADMS=1, RPRIVS=1, EAFS=1,
        )
    )  # fmt: skip
    host_width: int = 46

    def without(self, *names: str) -> Capabilities:
        """The same unit without these."""
        return attrs.evolve(
            self,
            cap={name: value for name, value in self.cap.items() if name not in names},
            ecap={name: value for name, value in self.ecap.items() if name not in names},
        )

    def having(self, **fields: int) -> Capabilities:
        """The same unit with other values of these fields."""
        known = {each.name for each in sp.register("CAP").fields}
        return attrs.evolve(
            self,
            cap={**self.cap, **{name: value for name, value in fields.items() if name in known}},
            ecap={**self.ecap, **{name: value for name, value in fields.items() if name not in known}},
        )


@frozen(kw_only=True)
class Answer:
    """How a request ended: status of `state.STATUSES`, address, rights, page shift, fault reason, reads.

    `memory_type`: of the page, for devices within the processors' coherency domain; None where types do not count.
    """

    status: int
    hpa: int
    rights: int
    shift: int
    snoop: bool
    reason: int
    recorded: bool
    reads: dict[str, int]
    flag_writes: int
    served: tuple[str, ...]
    answer: int
    memory_type: str | None

    @property
    def translation(self) -> tuple[int, int, int, int, bool, int, str | None]:
        """What a cache may not change: all but the cost."""
        return self.status, self.hpa, self.rights, self.shift, self.snoop, self.reason, self.memory_type


@frozen(kw_only=True)
class InterruptAnswer:
    """How an interrupt request ended: status of `state.INTERRUPT_STATUSES`, and the message to send, if any.

    `message`: address and data as a local APIC takes them, with 32 bits of destination in bits 63:32 of the address.
    `merged`: the vector had been posted already.
    """

    status: int
    message: tuple[int, int] | None
    reason: int
    recorded: bool
    reads: int
    merged: bool


@frozen
class Message:
    """What a unit sends: an event's interrupt message, or to a device an invalidation or a page group response."""

    kind: int
    first: int
    second: int
    third: int


MASK: Final = (1 << 64) - 1
CACHES_BY_BIT: Final = tuple(st.CACHES.values())


@define(eq=False)
class RemappingUnit:
    """A remapping unit beside the memory that it translates to: `u` is its whole state, `arena` is shared."""

    arena: Words
    capabilities: Capabilities = field(factory=Capabilities)
    caches: Caches = field(factory=Caches)
    u: Words = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.u = self._fresh()

    def _fresh(self) -> Words:
        places = {"FRO": sp.FAULT_OFFSET // 16, "IRO": sp.IOTLB_OFFSET // 16}
        return st.build(
            capability=sp.capability_value("CAP", **self.capabilities.cap, FRO=places["FRO"]),
            extended=sp.capability_value("ECAP", **self.capabilities.ecap, IRO=places["IRO"]),
            host_width=self.capabilities.host_width,
            caches=self.caches,
        )

    def reset(self) -> None:
        """A reset that keeps power: what is sticky stays, fault status and fault records; all else is as at first.

        VT-d: "Software Access to Registers".
        """
        old, self.u[:] = self.save(), self._fresh()
        places = [*sp.STICKY, *range(sp.FAULT_OFFSET, sp.FAULT_OFFSET + 16 * int(old[st.FAULT_REGISTERS]), 8)]
        for slot in (st.FAULT_NEXT, *(st.REGISTERS + offset // 8 for offset in places)):
            self.u[slot] = old[slot]

    # --- registers ---------------------------------------------------------------------------------------------
    def read(self, name: str) -> int:
        """A register by name, unsigned."""
        row = sp.register(name)
        return self.read_at(row.offset, row.width)

    def write(self, name: str, value: int) -> None:
        """Write a register by name, as software would."""
        row = sp.register(name)
        self.write_at(row.offset, row.width, value)

    def read_at(self, offset: int, size: int) -> int:
        """What a read at an offset of the register file returns, unsigned."""
        with quiet():
            return int(read_unit_register(self.u, offset, size)) & ((1 << 8 * size) - 1)

    def write_at(self, offset: int, size: int, value: int) -> None:
        """Write 4 or 8 bytes at an offset of the register file."""
        with quiet():
            write_unit_register(self.u, self.arena, offset, size, signed(value))

    def command(self, *, set: int = 0, clear: int = 0) -> None:
        """Write the global command register as drivers do: what is on stays on, one-shot bits are set once."""
        stay = self.read("GSTS") & (sp.TE | sp.QIE | sp.IRE | sp.CFI)
        self.write("GCMD", (stay | set) & ~clear)

    def enable(self, rtaddr: int) -> None:
        """Set the root table and turn DMA remapping on."""
        self.write("RTADDR", rtaddr)
        self.command(set=sp.SRTP)
        self.command(set=sp.TE)

    # --- requests ----------------------------------------------------------------------------------------------
    def translate(
        self,
        sid: int,
        address: int,
        access: int = sp.READ,
        *,
        size: int = 4,
        pasid: int = sp.NO_PASID,
        at: int = sp.UNTRANSLATED,
    ) -> Answer:
        """Translate one request; see `translate_request`."""
        with quiet():
            translate_request(self.u, self.arena, sid, pasid, signed(address), size, access, at)
        return self.answer()

    def sweep(self, sid: int, *, pages: int, count: int, base: int = 0, seed: int = 0, pasid: int = sp.NO_PASID) -> int:
        """`count` reads of 64 bytes in a window of pages, uniform by `seed` or in order (0); memory reads it took."""
        with quiet():
            return int(sweep_requests(self.u, self.arena, sid, pasid, base, pages, count, seed, sp.READ))

    def answer(self) -> Answer:
        """The answer to the last request."""
        u = [int(word) for word in self.u[: st.ANSWER + 1]]
        return Answer(
            status=u[st.STATUS],
            hpa=u[st.HPA],
            rights=u[st.RIGHTS],
            shift=u[st.SHIFT] & st.SHIFT_ALONE,
            snoop=bool(u[st.SNOOP]),
            reason=u[st.REASON],
            recorded=bool(u[st.RECORDED]),
            reads={name: u[slot] for name, slot in st.READS.items()},
            flag_writes=u[st.FLAG_WRITES],
            served=tuple(st.CACHE_TITLES[cache] for bit, cache in enumerate(CACHES_BY_BIT) if u[st.SERVED] >> bit & 1),
            answer=u[st.ANSWER],
            memory_type=NAMES.get((u[st.SHIFT] >> st.TYPE_SHIFT) - 1),
        )

    def page_request(
        self, sid: int, address: int, access: int, *, pasid: int = sp.NO_PASID, group: int = 0, last: bool = True
    ) -> int:
        """A device's page request; TAKEN, ANSWERED or REFUSED of `kernels.page_requests`."""
        with quiet():
            return int(ask_for_page(self.u, self.arena, sid, pasid, signed(address), access, group, last))

    def interrupt(self, sid: int, address: int, data: int, *, pasid: int = sp.NO_PASID) -> InterruptAnswer:
        """Remap one interrupt request; see `remap_interrupt`."""
        with quiet():
            status = int(remap_interrupt(self.u, self.arena, sid, pasid, signed(address), data))
        u = self.u
        sends = status in (st.INTERRUPT_REMAPPED, st.INTERRUPT_COMPATIBLE) or bool(u[st.INTERRUPT_NOTIFIES])
        message = (int(u[st.INTERRUPT_MESSAGE]) & MASK, int(u[st.INTERRUPT_DATA])) if sends else None
        return InterruptAnswer(
            status=status,
            message=message,
            reason=int(u[st.REASON]),
            recorded=bool(u[st.RECORDED]),
            reads=int(u[st.INTERRUPT_READS]),
            merged=bool(u[st.INTERRUPT_MERGED]),
        )

    # --- invalidation ------------------------------------------------------------------------------------------
    def submit(self, name: str, **fields: int) -> None:
        """Store one invalidation descriptor at the tail of the queue, and move the tail on."""
        self.submit_words(*descriptor(name, **fields))

    def submit_words(self, *words: int) -> None:
        """Store the words of a descriptor at the tail of the queue, and move the tail on.

        ModelError where the queue is not in memory.
        """
        queue = self.read("IQA")
        step = 32 if queue & sp.IQA_WIDE else 16
        tail = self.read("IQT")
        where = signed((queue & ~0xFFF) + tail & MASK)
        if not is_memory(self.arena, where):
            raise ModelError("an invalidation queue is outside memory", {"queue": queue, "tail": tail})
        for place in range(step // 8):
            word = words[place] if place < len(words) else 0
            store_word(self.arena, where + 8 * place, word)
        self.write("IQT", (tail + step) % (0x1000 << (queue & sp.IQA_SIZE)))

    def device_completed(self, sid: int) -> None:
        """A device has completed a device-TLB invalidation."""
        with quiet():
            device_answered(self.u, self.arena, sid)

    def device_timed_out(self, sid: int) -> None:
        """A device has not completed a device-TLB invalidation in time."""
        with quiet():
            device_timed_out(self.u, self.arena, sid)

    def messages(self) -> Iterator[Message]:
        """Take the messages that were sent, in order. ModelError if the ring was too small."""
        taken, count = int(self.u[st.MESSAGES_TAKEN]), int(self.u[st.MESSAGE_COUNT])
        if count - taken > st.RING_ENTRIES:
            raise ModelError("messages of a remapping unit were lost", {"sent": count, "taken": taken})
        found = []
        for number in range(taken, count):
            at = st.RING + number % st.RING_ENTRIES * st.RING_WORDS
            found.append(Message(*(int(word) for word in self.u[at : at + st.RING_WORDS])))
        self.u[st.MESSAGES_TAKEN] = count
        with quiet():
            run_queue(self.u, self.arena)
        yield from found

    # --- statistics and state ------------------------------------------------------------------------------------
    def statistics(self) -> dict[str, int]:
        """Every counter by name."""
        return {name: int(self.u[slot]) for name, slot in st.STATISTICS.items()}

    def check_laws(self) -> None:
        """ModelError if a law between counters is broken."""
        counted = self.statistics()
        for law, (left, right) in st.LAWS.items():
            if sum(counted[name] for name in left) != sum(counted[name] for name in right):
                raise ModelError(law, {name: counted[name] for name in (*left, *right)})

    def save(self) -> Words:
        """The whole state, to be put back by `restore`."""
        return self.u.copy()

    def restore(self, saved: Words) -> None:
        """Put a saved state back."""
        self.u[:] = saved
