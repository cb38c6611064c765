"""The local APIC of a logical CPU: pending and in-service vectors, priorities, the timer.

SDM: "Advanced Programmable Interrupt Controller (APIC)"; "APIC Timer"; "Interrupt, Task, and Processor Priority".
Not modelled: logical destination mode; focus processor; error reporting; lowest-priority delivery; performance and
thermal LVT entries; SMIs to other CPUs.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.codes import FOREVER
from vtsim.cpu.kernels.cursor import set_limit

# fmt: off
ONE_SHOT, PERIODIC, TSC_DEADLINE = range(3)
# registers by x2APIC MSR number, less 0x800
(REG_ID, REG_VERSION, REG_TPR, REG_PPR, REG_EOI, REG_LDR, REG_SVR, REG_ISR, REG_IRR, REG_ICR, REG_LVT_TIMER,
 REG_INITIAL, REG_CURRENT, REG_DIVIDE, REG_SELF_IPI) = (
    0x02, 0x03, 0x08, 0x0A, 0x0B, 0x0D, 0x0F, 0x10, 0x20, 0x30, 0x32, 0x38, 0x39, 0x3E, 0x3F)
MASKED = 1 << 16
SMI_DELIVERY, NMI_DELIVERY, INIT_DELIVERY, STARTUP_DELIVERY = 2, 4, 5, 6
VALID_SIPI, INIT_DEASSERT = 1 << 8, 1 << 15
# fmt: on


@kernel
def highest(m: Record, base: int) -> int:
    """The highest vector set in a 256-bit register, or -1."""
    for word in range(3, -1, -1):
        bits = m[base + word]
        if bits != 0:
            for n in range(63, -1, -1):
                if (bits >> n) & 1:
                    return word * 64 + n
    return -1


@kernel
def evaluate(m: Record, a: Arena) -> None:
    """Is there a pending vector whose priority class is above the processor's? Keeps APIC_PENDING (vector + 1) true."""
    vector = highest(m, s.APIC_IRR)
    m[s.APIC_PENDING] = 0
    if vector >= 0:
        serving = highest(m, s.APIC_ISR)
        floor = max(m[s.APIC_TPR] >> 4, serving >> 4 if serving >= 0 else 0)
        if vector >> 4 > floor:
            m[s.APIC_PENDING] = vector + 1
    set_limit(m, a)


@kernel
def request(m: Record, a: Arena, vector: int) -> None:
    """An interrupt arrives at this APIC."""
    m[s.APIC_IRR + (vector >> 6)] |= 1 << (vector & 63)
    evaluate(m, a)


@kernel
def accept(m: Record, a: Arena, command: int) -> None:
    """What an interrupt command names arrives at this CPU: an interrupt, an NMI, an INIT signal or a start-up IPI.

    SDM: "Interrupt Command Register (ICR)".
    """
    delivery = (command >> 8) & 7
    if delivery == NMI_DELIVERY:
        m[s.NMI_PENDING] = 1
    elif delivery == INIT_DELIVERY:
        if command & INIT_DEASSERT == 0:
            m[s.INIT_PENDING] = 1
    elif delivery == STARTUP_DELIVERY:
        m[s.SIPI_PENDING] = VALID_SIPI | (command & 0xFF)
    elif delivery != SMI_DELIVERY:
        request(m, a, command & 0xFF)
        return
    m[s.PENDING] = 1
    m[s.LIMIT] = 0


@kernel
def acknowledge(m: Record, a: Arena) -> int:
    """Take the pending vector into service."""
    vector = m[s.APIC_PENDING] - 1
    m[s.APIC_IRR + (vector >> 6)] &= ~(1 << (vector & 63))
    m[s.APIC_ISR + (vector >> 6)] |= 1 << (vector & 63)
    evaluate(m, a)
    return vector


@kernel
def timer_fires(m: Record, a: Arena) -> None:
    """The timer's deadline has passed: request its vector and arm the next period."""
    if m[s.APIC_TIMER_MODE] == PERIODIC and m[s.APIC_PERIOD] > 0:
        m[s.APIC_DEADLINE] += m[s.APIC_PERIOD]
    else:
        m[s.APIC_DEADLINE] = FOREVER
        m[s.MSR_TSC_DEADLINE] = 0
    if m[s.APIC_TIMER_VECTOR] & MASKED == 0:
        request(m, a, m[s.APIC_TIMER_VECTOR] & 0xFF)
    set_limit(m, a)


@kernel
def divisor(code: int) -> int:
    """What the divide configuration register's three bits divide the timer clock by."""
    return 1 if code == 7 else 2 << code


@kernel
def read_register(m: Record, register: int) -> int:
    """The value of an APIC register."""
    if register == REG_ID:
        return m[s.CPU]
    if register == REG_VERSION:
        return 0x50014
    if register == REG_TPR:
        return m[s.APIC_TPR]
    if register == REG_SVR:
        return m[s.APIC_SPURIOUS]
    if register == REG_LVT_TIMER:
        return m[s.APIC_TIMER_VECTOR] | m[s.APIC_TIMER_MODE] << 17
    if register == REG_INITIAL:
        return m[s.APIC_INITIAL]
    if register == REG_CURRENT:
        if m[s.APIC_DEADLINE] == FOREVER:
            return 0
        return max(m[s.APIC_DEADLINE] - m[s.CYCLE], 0) // max(m[s.APIC_DIVIDE], 1)
    if register == REG_DIVIDE:
        for code in range(8):
            if divisor(code) == m[s.APIC_DIVIDE]:
                return (code & 3) | (code & 4) << 1
    if REG_ISR <= register < REG_ISR + 8 or REG_IRR <= register < REG_IRR + 8:
        base = s.APIC_ISR if register < REG_ISR + 8 else s.APIC_IRR
        word = register & 7
        return (m[base + (word >> 1)] >> (32 * (word & 1))) & 0xFFFFFFFF
    return 0


@kernel
def to_itself(m: Record, command: int) -> bool:
    """Does an interrupt command name the CPU that writes it, by shorthand or by its identifier?"""
    shorthand = (command >> 18) & 3
    return shorthand == 1 or (shorthand == 0 and (command >> 32) & 0xFFFFFFFF == m[s.CPU])


@kernel
def write_register(m: Record, a: Arena, register: int, value: int) -> None:
    """Write an APIC register, with its effect."""
    if register == REG_EOI:
        vector = highest(m, s.APIC_ISR)
        if vector >= 0:
            m[s.APIC_ISR + (vector >> 6)] &= ~(1 << (vector & 63))
        evaluate(m, a)
    elif register == REG_TPR:
        m[s.APIC_TPR] = value & 0xFF
        m[s.CR8] = (value >> 4) & 15
        evaluate(m, a)
    elif register == REG_SVR:
        m[s.APIC_SPURIOUS] = value
    elif register == REG_LVT_TIMER:
        m[s.APIC_TIMER_VECTOR] = value & (0xFF | MASKED)
        mode = (value >> 17) & 3
        if (mode == TSC_DEADLINE) != (m[s.APIC_TIMER_MODE] == TSC_DEADLINE):
            m[s.APIC_DEADLINE] = FOREVER
            m[s.MSR_TSC_DEADLINE] = 0
        m[s.APIC_TIMER_MODE] = mode
        set_limit(m, a)
    elif register == REG_DIVIDE:
        m[s.APIC_DIVIDE] = divisor((value & 3) | (value >> 1 & 4))
    elif register == REG_INITIAL and m[s.APIC_TIMER_MODE] != TSC_DEADLINE:
        m[s.APIC_INITIAL] = value
        cycles = value * max(m[s.APIC_DIVIDE], 1)
        m[s.APIC_PERIOD] = cycles
        m[s.APIC_DEADLINE] = m[s.CYCLE] + cycles if value else FOREVER
        set_limit(m, a)
    elif register == REG_ICR and (value >> 8) & 7 == NMI_DELIVERY and to_itself(m, value):
        m[s.NMI_PENDING] = 1
        m[s.PENDING] = 1
        m[s.LIMIT] = 0
    elif register == REG_SELF_IPI or (register == REG_ICR and (value >> 18) & 3 == 1):
        request(m, a, value & 0xFF)
    elif register == REG_ICR:
        m[s.PENDING_DRAIN] = value  # to another CPU: the machine routes it
        m[s.LIMIT] = 0
