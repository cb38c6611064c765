"""What a guest sees of its virtual CPU: CPUID leaves and MSRs.

Not modelled: CPUID leaves of power management, performance monitoring and processor trace.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np
import numpy.typing as npt

from vtsim.base import memory as mem
from vtsim.cpu.engine import Engine
from vtsim.ept.direct import FEATURE_LEAF

HYPERVISOR_LEAF: Final = 0x40000000
HYPERVISOR_PRESENT, VMX = 1 << 31, 1 << 5  # bits of leaf 1, ECX
SIGNATURE: Final = tuple(int.from_bytes(part, "little") for part in (b"vtsi", b"mvts", b"imvt"))
APIC_BASE, BOOTSTRAP = 0x1B, 1 << 8
PLAIN_LEAF: Final = (1, 0x000306A9, 0x00010800, 0x80202001, 0x0F8BFBFF)

# fmt: off
STORED_MSRS: Final = (  # MSRs that a guest may read and write, and that do nothing here: index, first value
    (0x1B,  0xFEE00D00), (0x3A,  0x1),         (0x48,  0), (0x8B,  0x100000000), (0xCE,  0), (0xFE,  0x508),
    (0x17A, 0x1000000), (0x186, 0),            (0x1A0, 1), (0x1D9, 0),           (0x140, 0), (0x34,  0),
    (0x179, 0x20),      (0xC0000103, 0),       (0xC0000083, 0), (0xDA0, 0),      (0x2FF, 0xC06),
    (0x174, 0), (0x175, 0), (0x176, 0), (0xC0000100, 0), (0xC0000101, 0), (0xC0000102, 0),
    *((index, 0) for index in (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270))),  # memory types
)
# fmt: on


def cpuid_entries(engine: Engine, features: int = 0) -> npt.NDArray[np.int64]:
    """Rows of leaf, subleaves (-1 where they say nothing), EAX, ECX, EDX, EBX: the host's, as a guest may see them.

    `features` is EAX of the leaf in which the hypervisor says what it offers to paravirtual guests; 0 leaves it out.
    """
    at, count = int(engine.arena[mem.A_CPUID]), int(engine.arena[mem.A_CPUID_COUNT])
    host = [tuple(int(v) for v in engine.arena[at + 6 * n : at + 6 * n + 6]) for n in range(count)]
    if not any(row[0] == 1 for row in host):
        host.append((PLAIN_LEAF[0], -1, *PLAIN_LEAF[1:]))
    subleaves = Counter(row[0] for row in host if row[1] >= 0)
    rows = []
    for leaf, subleaf, *registers in sorted(host):
        if leaf == 1:
            registers[2] = registers[2] & ~VMX | HYPERVISOR_PRESENT
        eax, ebx, ecx, edx = registers
        rows.append((leaf, -1 if subleaf < 0 else subleaves[leaf], eax, ecx, edx, ebx))
    ebx, ecx, edx = SIGNATURE
    rows.append((HYPERVISOR_LEAF, -1, FEATURE_LEAF if features else HYPERVISOR_LEAF, ecx, edx, ebx))
    if features:
        rows.append((FEATURE_LEAF, -1, features, 0, 0, 0))
    return np.array(rows, np.int64)


def msr_entries(vcpu: int) -> npt.NDArray[np.int64]:
    """Rows of index and value: the MSRs of a virtual CPU, by its number in its VM, that are plain storage."""
    table = np.array(STORED_MSRS, np.int64)
    if vcpu:  # not the bootstrap processor
        table[table[:, 0] == APIC_BASE, 1] &= ~BOOTSTRAP
    return table
