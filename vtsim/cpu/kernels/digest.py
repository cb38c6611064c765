"""Digests of what a guest saw that does not depend on time, and a log of it where somebody wants to know.

What an operation shows is the guest's if the guest executes it. Where a hypervisor executes it in the guest's place,
the value is what the guest's registers hold at the VM entry that ends the exit, or in memory where an exit cluster goes
on; a monitor without VT-x says what it shows.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.jit import Arena, Record, kernel
from vtsim.base.memory import A_PORTS, contents
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.codes import PF
from vtsim.cpu.kernels.modes import LOW32
from vtsim.cpu.visible import EXCEPTION, MASKS, RULES
from vtsim.vmcs import reasons as x
from vtsim.vmcs import slots as v
from vtsim.vmcs import state as h

# fmt: off
# A log is three streams, of applications, of the kernel and of exceptions: header words, then rows.
# values seen; first one logged; of 2**SHIFT one is logged; does a full log stay as it is?; digest of all
(SEEN_COUNT, SEEN_FIRST, SEEN_SHIFT, SEEN_FIXED, SEEN_LAST) = range(5)
SEEN_HEADER: Final = 8
SEEN_ROWS: Final = 4096
(SEEN_DIGEST, SEEN_OP, SEEN_OF, SEEN_PART, SEEN_VALUE, SEEN_RIP, SEEN_SPACE) = range(7)
SEEN_WORDS: Final = 8
SEEN_STREAM: Final = SEEN_HEADER + SEEN_ROWS * SEEN_WORDS
# Behind the streams, what each address space saw: arena offset of the word that says what CR3 holds, as the guest
# believes (0: CR3 itself); the only space whose values are in the streams (-1: all are); how many there are. Then a row
# for each, the first of which is of none: two values of CR3; number of values and digest of each stream.
SEEN_TABLE: Final = 3 * SEEN_STREAM
(SEEN_ROOT, SEEN_ONLY, SEEN_SPACES, SEEN_TABLE_HEADER) = range(4)
(SPACE_ROOT, SPACE_OTHER, SPACE_STREAMS) = range(3)
SPACE_WORDS: Final = SPACE_STREAMS + 2 * 3
ROOT_BITS: Final = 0xFFFFFFFFFF000
CONFIG_PORT: Final = 0xCF8
BY_APPLICATIONS, BY_KERNELS, BY_EXCEPTIONS = range(3)   # streams
# fmt: on


@kernel
def mix(digest: int, value: int) -> int:
    """Roll a value into a digest (wraps); a zero that comes first counts, too."""
    digest = (digest ^ value) * 0x100000001B3 + 1
    return digest ^ ((digest >> 29) & 0x7FFFFFFFF)


@kernel
def left_out(op: int, of: int, part: int) -> int:
    """The bits of a value that may differ."""
    for n in range(RULES[op, 0], RULES[op, 1]):
        if MASKS[n, 1] <= of & 0xFFFFFFFF <= MASKS[n, 2] and MASKS[n, 3] in (part, -1):
            return MASKS[n, 4]
    return 0


@kernel
def space_now(m: Record, a: Arena, table: int) -> int:
    """The number of the address space that the guest believes is loaded; 0 where it is none of a process."""
    root = a[a[table + SEEN_ROOT]] if a[table + SEEN_ROOT] else m[s.CR3]
    for space in range(1, a[table + SEEN_SPACES]):
        row = table + SEEN_TABLE_HEADER + space * SPACE_WORDS
        if (a[row + SPACE_ROOT] ^ root) & ROOT_BITS == 0 or (a[row + SPACE_OTHER] ^ root) & ROOT_BITS == 0:
            return space
    return 0


@kernel
def log_seen(m: Record, a: Arena, stream: int, op: int, of: int, part: int, value: int, rip: int) -> None:
    """Log a value; a full log that is not fixed to its values keeps every second one."""
    at = m[s.SEEN] + stream * SEEN_STREAM
    table = m[s.SEEN] + SEEN_TABLE
    space = space_now(m, a, table)
    digest = m[s.DIGEST_APPLICATION + stream]
    mine = table + SEEN_TABLE_HEADER + space * SPACE_WORDS + SPACE_STREAMS + 2 * stream
    a[mine] += 1
    a[mine + 1] = mix(a[mine + 1], value)
    if a[table + SEEN_ONLY] >= 0:
        if a[table + SEEN_ONLY] != space:
            return
        digest = a[mine + 1]
    n = a[at + SEEN_COUNT] - a[at + SEEN_FIRST]
    a[at + SEEN_COUNT] += 1
    a[at + SEEN_LAST] = digest
    if n < 0 or n & ((1 << a[at + SEEN_SHIFT]) - 1):
        return
    row = n >> a[at + SEEN_SHIFT]
    if row >= SEEN_ROWS:
        if a[at + SEEN_FIXED]:
            return
        for kept in range(SEEN_ROWS // 2):
            for word in range(SEEN_WORDS):
                here = at + SEEN_HEADER + word
                a[here + kept * SEEN_WORDS] = a[here + 2 * kept * SEEN_WORDS]
        a[at + SEEN_SHIFT] += 1
        row >>= 1
    line = at + SEEN_HEADER + row * SEEN_WORDS
    a[line + SEEN_DIGEST] = digest
    a[line + SEEN_OP] = op
    a[line + SEEN_OF] = of
    a[line + SEEN_PART] = part
    a[line + SEEN_VALUE] = value
    a[line + SEEN_RIP] = rip
    a[line + SEEN_SPACE] = space


@kernel
def any_left_out(op: int, of: int) -> bool:
    """May anything differ of what an operation shows `of` this?"""
    found = False
    for n in range(RULES[op, 0], RULES[op, 1]):
        found |= MASKS[n, 1] <= of & 0xFFFFFFFF <= MASKS[n, 2]
    return found


@kernel
def roll(m: Record, a: Arena, stream: int, op: int, of: int, part: int, value: int, rip: int) -> None:
    """Roll a value into the digest of applications, of kernels, or of exceptions, without what may differ."""
    if op != o.SYSRET:
        bits = left_out(op, of, part)
        if bits == -1:
            return
        value &= ~bits
    m[s.DIGEST_APPLICATION + stream] = mix(m[s.DIGEST_APPLICATION + stream], value)
    if m[s.SEEN]:
        log_seen(m, a, stream, op, of, part, value, rip)


@kernel
def hypervisor_sees(m: Record) -> bool:
    """Is the program a hypervisor: in VMX root operation, or a monitor without VT-x?"""
    return (m[s.NONROOT] == 0 and m[s.VMXON] != 0) or (m[s.MONITORED] != 0 and m[s.PRIVILEGE] & 1 == 0)


@kernel
def stream_now(m: Record) -> int:
    """Whose values the program's are."""
    return BY_APPLICATIONS if m[s.PRIVILEGE] & 1 and m[s.BELIEVED] == 0 else BY_KERNELS


@kernel
def saw_leaf(m: Record, a: Arena, leaf: int) -> None:
    """The program saw the four registers that CPUID wrote."""
    if not hypervisor_sees(m):
        g = s.GPR
        roll_leaf(m, a, stream_now(m), leaf, m[g + s.RAX], m[g + s.RBX], m[g + s.RCX], m[g + s.RDX], m[s.RIP])


@kernel
def roll_leaf(m: Record, a: Arena, stream: int, leaf: int, rax: int, rbx: int, rcx: int, rdx: int, rip: int) -> None:
    """Roll in what CPUID shows, most leaves whole."""
    if m[s.SEEN] == 0 and not any_left_out(o.CPUID, leaf):
        digest = mix(mix(m[s.DIGEST_APPLICATION + stream], rax & LOW32), rbx & LOW32)
        m[s.DIGEST_APPLICATION + stream] = mix(mix(digest, rcx & LOW32), rdx & LOW32)
        return
    roll(m, a, stream, o.CPUID, leaf, 0, rax & LOW32, rip)
    roll(m, a, stream, o.CPUID, leaf, 1, rbx & LOW32, rip)
    roll(m, a, stream, o.CPUID, leaf, 2, rcx & LOW32, rip)
    roll(m, a, stream, o.CPUID, leaf, 3, rdx & LOW32, rip)


@kernel
def saw(m: Record, a: Arena, op: int, of: int, part: int, value: int) -> None:
    """The program saw a value: what `op` reads `of`, its `part`. What a hypervisor sees is nobody's."""
    if not hypervisor_sees(m):
        roll(m, a, stream_now(m), op, of, part, value, m[s.RIP])


@kernel
def shown(m: Record, a: Arena, op: int, of: int, value: int) -> None:
    """A monitor shows its guest a value: as the guest would have seen it, in the ring it believes in."""
    if m[s.MONITORED] == 0:
        shown_in_cluster(m, a, op, of, value)
        return
    application = a[m[s.BELIEVED_AT]] == 0
    stream = BY_APPLICATIONS if application else BY_KERNELS
    if op & 0xFF == EXCEPTION:
        stream = BY_EXCEPTIONS
    roll(m, a, stream, op & 0xFF, of, op >> 8, value, 0)


@kernel
def saw_exception(m: Record, a: Arena, vector: int, error: int) -> None:
    """An exception is delivered through the guest's own table: vector, error code (-1 none), the address of a #PF.

    What a monitor without VT-x gets is nobody's.
    """
    if m[s.MONITORED]:
        return
    roll(m, a, BY_EXCEPTIONS, EXCEPTION, vector, 0, error, m[s.RIP])
    if vector == PF:
        roll(m, a, BY_EXCEPTIONS, EXCEPTION, vector, 1, m[s.CR2], m[s.RIP])


@kernel
def port_named(a: Arena, port: int) -> int:
    """What an IN reads of: the port, and for the window to configuration space also the address in it, from bit 32."""
    if 0xCFC <= port <= 0xCFF:
        return port | (a[a[A_PORTS] + 65536 + CONFIG_PORT] & 0xFFFFFFFF) << 32
    return port


@kernel
def await_result(m: Record, a: Arena, at: int, reason: int, qualification: int) -> None:
    """A VM exit of an operation that shows something: the VM entry behind it will tell what."""
    op = 0
    of = 0
    if reason == x.CPUID:
        op = o.CPUID
        of = m[s.GPR + s.RAX] & 0xFFFFFFFF
    elif reason == x.MSR_READ:
        op = o.RDMSR
        of = m[s.GPR + s.RCX] & 0xFFFFFFFF
    elif reason == x.IO_INSTRUCTION and (qualification & 0x18) == 8:  # IN, and no string
        op = o.IN
        of = (qualification >> 16) & 0xFFFF | (qualification & 7) << 32
    a[at + h.V_AWAITED] = op
    a[at + h.V_AWAITED_OF] = of
    a[at + h.V_AWAITED_AT] = m[s.RIP]


@kernel
def see_values(m: Record, a: Arena, at: int, kernels: int, rax: int, rbx: int, rcx: int, rdx: int) -> None:
    """The guest sees in these registers what it waits for."""
    op = a[at + h.V_AWAITED]
    of = a[at + h.V_AWAITED_OF]
    rip = a[at + h.V_AWAITED_AT]
    a[at + h.V_AWAITED] = 0
    if op == o.CPUID:
        roll_leaf(m, a, kernels, of, rax, rbx, rcx, rdx, rip)
    elif op == o.RDMSR:
        roll(m, a, kernels, op, of, 0, (rax & 0xFFFFFFFF) | (rdx & 0xFFFFFFFF) << 32, rip)
    elif op == o.IN:
        size = (of >> 32) + 1
        roll(m, a, kernels, op, of & 0xFFFF, 0, rax & ((1 << (8 * size)) - 1), rip)


@kernel
def see_result(m: Record, a: Arena, at: int) -> None:
    """At a VM entry whose guest state is loaded: the guest sees what the hypervisor did in its place."""
    if a[at + v.GUEST_RIP] == a[at + h.V_AWAITED_AT]:
        a[at + h.V_AWAITED] = 0
    if a[at + h.V_AWAITED]:
        see_values(
            m, a, at, 1 - (m[s.PRIVILEGE] & 1),
            m[s.GPR + s.RAX], m[s.GPR + s.RBX], m[s.GPR + s.RCX], m[s.GPR + s.RDX],
        )  # fmt: skip


@kernel
def shown_in_cluster(m: Record, a: Arena, op: int, of: int, rip: int) -> None:
    """Before VM entry, the guest of the current VMCS sees what it waits for; next that is `of` by `op` (0 nothing)."""
    at = m[s.VMCS]
    kept = contents(a, a[at + h.V_REGISTERS] >> 12) + ((a[at + h.V_REGISTERS] & 0xFFF) >> 3)
    if a[at + h.V_AWAITED]:
        host_cr3 = m[s.CR3]
        m[s.CR3] = a[at + v.GUEST_CR3]
        m[s.SEEN] = a[at + h.V_SEEN]
        m[s.DIGEST_APPLICATION] = a[at + h.V_DIGEST_APPLICATION]
        m[s.DIGEST_KERNEL] = a[at + h.V_DIGEST_KERNEL]
        kernels = 0 if (a[at + v.GUEST_SS_ACCESS_RIGHTS] >> 5) & 3 else 1
        see_values(m, a, at, kernels, a[kept + s.RAX], a[kept + s.RBX], a[kept + s.RCX], a[kept + s.RDX])
        a[at + h.V_DIGEST_APPLICATION] = m[s.DIGEST_APPLICATION]
        a[at + h.V_DIGEST_KERNEL] = m[s.DIGEST_KERNEL]
        m[s.SEEN] = 0
        m[s.CR3] = host_cr3
    a[at + h.V_AWAITED] = op
    a[at + h.V_AWAITED_OF] = of
    a[at + h.V_AWAITED_AT] = rip
