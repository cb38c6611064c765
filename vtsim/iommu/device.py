"""A device with ATS and PRI in front of a remapping unit: a well-behaved one, for drivers and tests to use."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from attrs import define, field

from vtsim.base.jit import quiet
from vtsim.base.memory import signed
from vtsim.iommu import spec as sp
from vtsim.iommu import state as st
from vtsim.iommu.kernels.device_tlb import ANY_PASID, device_access, device_forget
from vtsim.iommu.state import Cache
from vtsim.iommu.unit import Message, RemappingUnit


@define(eq=False)
class AtsDevice:
    """One requester with a device-TLB of its own; `answers` off makes it one that completes no invalidation."""

    unit: RemappingUnit
    sid: int
    tlb: Cache = field(factory=lambda: Cache(8, 4))
    pri: bool = True
    answers: bool = True
    responses: list[int] = field(factory=list, init=False)
    t: npt.NDArray[np.int64] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.t = st.build_device(sid=self.sid, tlb=self.tlb, pri=self.pri)

    def access(self, address: int, access: int = sp.READ, *, size: int = 4, pasid: int = sp.NO_PASID) -> int:
        """One access: DONE, REFUSED_THERE, WITHOUT_RIGHT or PAGE_ASKED of `kernels.device_tlb`."""
        with quiet():
            return int(device_access(self.t, self.unit.u, self.unit.arena, pasid, signed(address), size, access))

    @property
    def hpa(self) -> int:
        """Where the last access that was done led."""
        return int(self.unit.u[st.HPA])

    def receive(self, message: Message) -> None:
        """Obey a message of the unit that is for this device, and complete it; others are ignored."""
        if message.kind == st.DEVICE_INVALIDATION and message.first == self.sid:
            if not self.answers:
                return
            # an invalidation without PASID reaches everything that this device has translated
            pasid = ANY_PASID if message.third == sp.NO_PASID else message.third
            with quiet():
                device_forget(self.t, message.second, pasid)
            self.unit.device_completed(self.sid)
        elif message.kind == st.PAGE_RESPONSE and message.first & 0xFFFF == self.sid:
            self.responses.append(message.third)
