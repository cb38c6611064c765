"""What the physical machine says about itself: CPUID leaves and VMX capability MSRs, from the profile.

SDM: "CPUID—CPU Identification"; "VMX Capability Reporting Facility".
Not modelled: leaves about topology, caches, power and performance monitoring.
"""

from __future__ import annotations

from typing import Final

from vtsim.cpu.engine import Engine
from vtsim.cpu.profile import Profile
from vtsim.vmcs.capabilities import Capabilities

ANY: Final = -1
GENUINE, INEI, NTEL = 0x756E6547, 0x49656E69, 0x6C65746E
# features that every modelled CPU has: FPU … SSE2 in EDX; SSE3, CX16, SSE4 in ECX
LEAF1_EDX: Final = 0x078BFBFF
LEAF1_ECX: Final = 1 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23


def cpuid_leaves(profile: Profile, *, vmx: bool = True) -> list[tuple[int, int, int, int, int, int]]:
    """Rows of leaf, subleaf (-1 any), EAX, EBX, ECX, EDX."""
    f = profile.features
    ecx = LEAF1_ECX | (1 << 5 if vmx else 0) | f.pcid << 17 | f.tsc_deadline << 24 | 1 << 21
    ebx7 = f.fsgsbase | f.tsc_adjust << 1 | f.smep << 7 | f.invpcid << 10 | f.smap << 20
    extended = 1 << 11 | f.nx << 20 | f.pages_1g << 26 | f.rdtscp << 27 | 1 << 29
    linear = 57 if f.la57 else 48
    name = profile.name.encode().ljust(48, b"\0")[:48]
    b = [int.from_bytes(name[n : n + 4], "little") for n in range(0, 48, 4)]
    return [
        (0, ANY, 0xD, GENUINE, NTEL, INEI),
        (1, ANY, 0x50654, 0x00010800, ecx, LEAF1_EDX),
        (7, 0, 0, ebx7, f.la57 << 16, 0),
        (0xD, 0, 7, 832, 832, 0),
        (0xD, 1, 0, 832, 0, 0),
        (0x80000000, ANY, 0x80000008, 0, 0, 0),
        (0x80000001, ANY, 0, 0, 1, extended),
        *((0x80000002 + n, ANY, b[4 * n], b[4 * n + 1], b[4 * n + 2], b[4 * n + 3]) for n in range(3)),
        (0x80000007, ANY, 0, 0, 0, f.invariant_tsc << 8),
        (0x80000008, ANY, profile.physical_address_bits | linear << 8, 0, 0, 0),
    ]


def identify(engine: Engine, capabilities: Capabilities) -> None:
    """Give the machine its CPUID table and VMX capabilities, which every check and the guests read."""
    engine.cpuid_table(cpuid_leaves(engine.profile))
    engine.vmx(capabilities)
