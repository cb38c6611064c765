"""What a difference between the model and a recording shows: the state, the code and both outcomes of its case."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Final

from attrs import define

from vtsim.base import memory as mem
from vtsim.cpu.codes import RF_TF
from vtsim.study.vmx.cases import PAGE, Case, Environment, Recorded
from vtsim.study.vmx.comparison import Difference
from vtsim.study.vmx.drivers import Outcome
from vtsim.study.vmx.shapes import number
from vtsim.vmcs import events as ev
from vtsim.vmcs.controls import CONTROL, SECONDARY

BLOCKING: Final = ev.BLOCKING_BY_STI | ev.BLOCKING_BY_MOV_SS
MSR_ENTRY: Final = 16  # bytes of an entry of an MSR area
LARGE: Final = 1 << 7
LOCAL_APIC: Final = mem.LOCAL_APIC << mem.PAGE_SHIFT
ADDRESS: Final = ((1 << 52) - 1) & -PAGE
_OPERAND: Final = re.compile(r"\[(\w+)\]|jmp (\w+)")


@define(slots=False, frozen=True)
class Seen:
    """One difference with all that is known of its case."""

    case: Case
    environment: Environment
    difference: Difference
    recorded: Recorded  # of the first run
    model: Outcome

    @property
    def path(self) -> str:
        """Which part of the outcome differs."""
        return self.difference.path

    # --- the case ------------------------------------------------------------------------------------------------
    def field(self, name: str) -> int:
        """A VMCS field as the case begins, by its name in the field table."""
        return self.environment.vmcs.get(name, 0)

    def control(self, name: str) -> bool:
        """Is a control of VM execution, entry or exit set, and its word active?"""
        control = CONTROL[name]
        if control.word is SECONDARY and not self.control("ACTIVATE_SECONDARY_CONTROLS"):
            return False
        return bool(self.field(control.word.field) & control.mask)

    @property
    def code(self) -> bytes:
        """The instruction of the case; none if it has none."""
        return self.environment.instruction.code if self.environment.instruction else b""

    @property
    def asm(self) -> str:
        return self.environment.instruction.asm if self.environment.instruction else ""

    @property
    def in_64_bit_code(self) -> bool:
        return self.environment.instruction is not None and self.environment.instruction.bits == 64

    @property
    def ring(self) -> int:
        return self.field("GUEST_SS_ACCESS_RIGHTS") >> 5 & 3

    @property
    def single_steps(self) -> bool:
        return bool(self.field("GUEST_RFLAGS") & RF_TF)

    @property
    def blocked(self) -> int:
        """Blocking by STI and by MOV SS."""
        return self.field("GUEST_INTERRUPTIBILITY_STATE") & BLOCKING

    def gpr(self, name: str) -> int:
        return self.environment.gpr.get(name, 0)

    def msr_entry(self, field: str, place: object) -> int:
        """The MSR that an entry of an area names, counted from 1; -1 where there is none."""
        if not isinstance(place, int) or place < 1:
            return -1
        return self.word(self.field(field) + (place - 1) * MSR_ENTRY) & 0xFFFF_FFFF

    def word(self, address: int) -> int:
        """Eight bytes of memory as the case begins."""
        page = self.environment.memory.get(address & -PAGE, bytes(PAGE))
        return int.from_bytes(page[address % PAGE : address % PAGE + 8], "little")

    # --- the outcomes --------------------------------------------------------------------------------------------
    @cached_property
    def changed_bits(self) -> int:
        """The bits in which the two numbers of the difference are not alike; -1 where they are no numbers."""
        try:
            return int(str(self.difference.recorded), 16) ^ int(str(self.difference.model), 16)
        except ValueError:
            return -1

    def of_recorded(self, key: str) -> int:
        """A number of the recorded outcome; 0 where there is none."""
        return number(self.recorded.get(key, 0))

    def of_model(self, key: str) -> int:
        """A number of the model's outcome; 0 where there is none."""
        return int(self.model.get(key, 0))

    def model_enters(self) -> bool:
        return self.model.get("kind") == "exit"

    def raised(self, outcome: Mapping[str, Any], vector: int) -> bool:
        """Did a fault with this vector come of the first run, in the guest or as a VM exit?"""
        information = number(outcome.get("interruption_info", 0))
        exits = outcome.get("reason") == 0 and information & ev.VALID and information & ev.VECTOR == vector
        return bool(exits) or outcome.get("guest_handler_vector") == vector

    # --- memory --------------------------------------------------------------------------------------------------
    def operand(self) -> int | None:
        """The linear address in a register that the instruction accesses or jumps to."""
        match = _OPERAND.search(self.asm)
        return self.environment.gpr.get(match[1] or match[2]) if match else None

    def physical(self) -> int | None:
        """Where the operand of the instruction is in the host's memory, by 4-level paging and EPT."""
        linear = self.operand()
        if linear is None or not self.in_64_bit_code:
            return None
        *_, guest = self.translated(self.field("GUEST_CR3"), linear)
        if guest is None or not self.control("ENABLE_EPT"):
            return guest
        return [*self.translated(self.field("EPT_POINTER"), guest)][-1]

    def translated(self, root: int, address: int) -> Iterator[int | None]:
        """The entries by which a table of 4 levels translates an address, then the address; None if it does not."""
        entry = root
        for shift in (39, 30, 21, 12):
            entry = self.word((entry & ADDRESS) + 8 * (address >> shift & 511))
            yield entry
            if not entry & 7:
                yield None
                return
            if shift == 12 or (shift < 39 and entry & LARGE):
                yield entry & ADDRESS & -(1 << shift) | address & ((1 << shift) - 1)
                return

    def beyond_the_image(self) -> bool:
        """Is the operand in memory that neither the image nor the case describes?"""
        physical = self.physical()
        return physical is not None and physical & -PAGE not in (*self.environment.memory, LOCAL_APIC)
