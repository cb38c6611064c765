"""No hypervisor."""

from __future__ import annotations

from vtsim.vmm.techniques import Technique, techniques

techniques.register("native")(
    Technique(meaning="The guest runs in root mode in place of a hypervisor.", build=None, paging=("none",))
)
