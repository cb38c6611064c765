"""Inter-processor interrupts on their way: they arrive at another CPU `latency.ipi_ns` after the ICR was written.

A CPU keeps what is on its way to it, in any order, and the earliest arrival. It runs to that, takes what has arrived,
and goes on. So an interrupt is late only where its receiver was further than a latency ahead of its sender: never with
a quantum of at most the latency.

SDM: "Issuing Interprocessor Interrupts"; "Interrupt Command Register (ICR)".
Not modelled: more than 32 interrupts on their way to one CPU, of which the next arrives at once.
"""

from __future__ import annotations

from vtsim.base.jit import Arena, Record, Records, kernel
from vtsim.cpu import slots as s
from vtsim.cpu.codes import FOREVER
from vtsim.cpu.kernels.apic import accept

FLIGHTS: int = 32  # on their way to one CPU; two words each: arrival, command
TO_ONE, TO_ITSELF, TO_ALL, TO_OTHERS = 0, 1, 2, 3


@kernel
def send_interrupts(cpus: Records, a: Arena, sender: int) -> None:
    """Send what a CPU wrote into its ICR to each CPU that it names; its own arrives at once."""
    command = cpus[sender, s.PENDING_DRAIN]
    cpus[sender, s.PENDING_DRAIN] = 0
    shorthand = (command >> 18) & 3
    target = (command >> 32) & 0xFFFFFFFF
    for n in range(cpus.shape[0]):
        if shorthand == TO_ALL or (shorthand == TO_OTHERS and n != sender) or (shorthand == TO_ONE and n == target):
            m = cpus[n]
            if n == sender or m[s.IPI_COUNT] == FLIGHTS:
                accept(m, a, command)
            else:
                arrival = cpus[sender, s.CYCLE] + m[s.IPI_CYCLES]
                at = m[s.IPI_FLIGHTS] + 2 * m[s.IPI_COUNT]
                a[at] = arrival
                a[at + 1] = command
                m[s.IPI_COUNT] += 1
                m[s.IPI_AT] = min(m[s.IPI_AT], arrival)


@kernel
def land_interrupts(m: Record, a: Arena) -> None:
    """Take every interrupt whose arrival has passed; the others stay on their way."""
    kept = 0
    earliest = FOREVER
    first = m[s.IPI_FLIGHTS]
    for n in range(m[s.IPI_COUNT]):
        arrival = a[first + 2 * n]
        command = a[first + 2 * n + 1]
        if arrival <= m[s.CYCLE]:
            accept(m, a, command)
        else:
            a[first + 2 * kept] = arrival
            a[first + 2 * kept + 1] = command
            kept += 1
            earliest = min(earliest, arrival)
    m[s.IPI_COUNT] = kept
    m[s.IPI_AT] = earliest
