"""Single accesses to memory by an op or by the CPU itself: translated, timed, across pages if need be."""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Tags, kernel
from vtsim.base.memory import contents, is_memory, load, store
from vtsim.cpu import accounts as k
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import OUT_OF_MEMORY
from vtsim.cpu.kernels.data_pages import FRAME, all_hit, place_of, stamp_now
from vtsim.cpu.kernels.ledger import charge
from vtsim.cpu.kernels.lines import data_line, data_uncached
from vtsim.cpu.kernels.rights import EXECUTE, READ, WRITE
from vtsim.cpu.kernels.translate import translate
from vtsim.vmcs import slots as v


@kernel
def decoded_address(m: Record, packed: int, offset: int) -> int:
    """The linear address of a decoded row's operand, from base, index and displacement; no check is made."""
    if packed & 31 == o.RIP_BASE:
        offset += m[s.RIP] + m[s.OP_LENGTH]
    size = (packed >> o.MEM_ADDRESS_SIZE) & 3
    if size < 2:
        offset &= 0xFFFFFFFF if size else 0xFFFF
    segment = (packed >> o.MEM_SEGMENT) & 7
    if segment == o.SEGMENT_FS:
        offset += m[s.FS_BASE]
    elif segment == o.SEGMENT_GS:
        offset += m[s.GS_BASE]
    elif m[s.MODE]:
        offset += m[s.STATE + v.GUEST_ES_BASE - v.GUEST_START + segment - o.SEGMENT_ES]
    return offset & 0xFFFFFFFF if m[s.MODE] else offset


@kernel
def effective(m: Record, a: Arena, r: int) -> int:
    """The linear address of a row's memory operand."""
    packed = a[r + o.ROW_MEM]
    gva = a[r + o.ROW_DISP]
    base = packed & 31
    if base < 16:
        gva += m[s.GPR + base]
    index = (packed >> o.MEM_INDEX) & 31
    if index < 16:
        gva += m[s.GPR + index] << ((packed >> o.MEM_SCALE) & 3)
    segment = packed >> o.MEM_SEGMENT
    if segment:
        if segment > o.SEGMENT_GS:
            return decoded_address(m, packed, gva)
        gva += m[s.FS_BASE] if segment == 1 else m[s.GS_BASE]
    return gva


@kernel
def touch_physical(m: Record, a: Arena, t: Tags, hpa: int, access: int) -> None:
    """Charge an access to a host-physical address of memory."""
    line = hpa >> 6
    stall = data_uncached(m, a, line, access) if m[s.UNCACHED] else data_line(m, a, t, line, access)
    if stall:
        charge(m, a, o.DATA_STALL, stall)


@kernel
def timed_access(m: Record, a: Arena, t: Tags, gva: int, access: int) -> int:
    """Translate and access memory as ring 0, charging walk and stall; the host-physical address or a fault."""
    return access_as(m, a, t, gva, access, 0)


@kernel
def access_as(m: Record, a: Arena, t: Tags, gva: int, access: int, user: int) -> int:
    """Translate and access memory as a ring, charging walk and stall; the host-physical address or a fault."""
    m[s.STALL] = 0
    at = place_of(gva >> 12)
    if access != EXECUTE and all_hit(m, a, t, at, gva, 1, access, stamp_now(m, user)):
        a[m[s.OWNER] + k.ACCESSES] += 1
        return m[at + FRAME] << 12 | gva & 0xFFF
    hpa = translate(m, a, t, gva, access, user)
    if m[s.STALL]:
        charge(m, a, o.PAGE_WALK, m[s.STALL])
        m[s.STALL] = 0
    if hpa < 0:
        return hpa
    if is_memory(a, hpa):
        a[m[s.OWNER] + k.ACCESSES] += 1
        touch_physical(m, a, t, hpa, access)
    return hpa


@kernel
def read64(m: Record, a: Arena, t: Tags, gva: int) -> int:
    """Load 8 bytes as ring 0. FAULT_KIND is 0 if it worked."""
    return read_as(m, a, t, gva, 0)


@kernel
def read_as(m: Record, a: Arena, t: Tags, gva: int, user: int) -> int:
    """Load 8 bytes as a ring, across pages if need be. FAULT_KIND is 0 if it worked."""
    m[s.FAULT_KIND] = 0
    hpa = access_as(m, a, t, gva, READ, user)
    if hpa < 0:
        return 0
    if gva & 0xFFF > 4088:
        return load_across(m, a, t, gva, 8, hpa, user)
    return load(a, hpa, 8) if is_memory(a, hpa) else -1


@kernel
def load_across(m: Record, a: Arena, t: Tags, gva: int, size: int, hpa: int, user: int) -> int:
    """Load `size` bytes from two pages, the first of which is at `hpa`. FAULT_KIND is 0 if it worked."""
    m[s.FAULT_KIND] = 0
    first = 4096 - (gva & 0xFFF)
    second = access_as(m, a, t, gva + first, READ, user)
    if second < 0:
        m[s.FAULT_KIND] = second
        return 0
    if not is_memory(a, hpa) or not is_memory(a, second):
        return -1
    value = 0
    for n in range(size):
        value |= load(a, hpa + n if n < first else second + n - first, 1) << (8 * n)
    return value


@kernel
def write64(m: Record, a: Arena, t: Tags, gva: int, value: int) -> int:
    """Store 8 bytes as ring 0: 0, or a fault."""
    return write_as(m, a, t, gva, value, 0)


@kernel
def write_as(m: Record, a: Arena, t: Tags, gva: int, value: int, user: int) -> int:
    """Store 8 bytes as a ring, across pages if need be: 0, or a fault."""
    hpa = access_as(m, a, t, gva, WRITE, user)
    if hpa < 0:
        return hpa
    if gva & 0xFFF > 4088:
        return store_across(m, a, t, gva, 8, value, hpa, user)
    if is_memory(a, hpa) and store(a, hpa, 8, value) < 0:
        m[s.STOP] = OUT_OF_MEMORY
        m[s.LIMIT] = 0
    return 0


@kernel
def store_across(m: Record, a: Arena, t: Tags, gva: int, size: int, value: int, hpa: int, user: int) -> int:
    """Store `size` bytes in two pages, the first of which is at `hpa`: 0, or a fault with nothing stored."""
    first = 4096 - (gva & 0xFFF)
    second = access_as(m, a, t, gva + first, WRITE, user)
    if second < 0:
        return second
    if is_memory(a, hpa) and is_memory(a, second):
        for n in range(size):
            if store(a, hpa + n if n < first else second + n - first, 1, value >> (8 * n)) < 0:
                m[s.STOP] = OUT_OF_MEMORY
                m[s.LIMIT] = 0
    return 0


@kernel
def bitmap_bit(a: Arena, address: int, bit: int) -> bool:
    """Bit `bit` of a bitmap page in memory; a page without contents reads as zero, what is not memory as ones."""
    if not is_memory(a, address):
        return True
    at = contents(a, (address >> 12) + (bit >> 15))
    if at == 0:
        return False
    bit &= 0x7FFF
    return (a[at + (bit >> 6)] >> (bit & 63)) & 1 != 0
