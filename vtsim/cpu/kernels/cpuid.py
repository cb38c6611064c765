"""CPUID.

SDM: "CPUID—CPU Identification".
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import A_CPUID, A_CPUID_COUNT
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.kernels.digest import saw_leaf


@kernel
def cpuid(m: Record, a: Arena) -> None:
    """CPUID from the machine's table; an unknown leaf reads as zero."""
    leaf = m[s.GPR + s.RAX] & 0xFFFFFFFF
    sub = m[s.GPR + s.RCX] & 0xFFFFFFFF
    line = a[A_CPUID]
    found = -1
    if leaf:
        m[s.CYCLE] += m[s.P_CPUID_1] - m[s.PRICE + o.CPUID]
    for n in range(a[A_CPUID_COUNT]):
        if a[line + 6 * n] == leaf and (a[line + 6 * n + 1] == -1 or a[line + 6 * n + 1] == sub):
            found = line + 6 * n
            break
    for n in range(4):
        value = a[found + 2 + n] if found >= 0 else 0
        register = s.RAX
        if n == 1:
            register = s.RBX
        elif n == 2:
            register = s.RCX
        elif n == 3:
            register = s.RDX
        m[s.GPR + register] = value
    saw_leaf(m, a, leaf)
