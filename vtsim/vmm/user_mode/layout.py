"""The words of a vCPU of user-mode Linux: those of a paravirtual one, and the contexts between which the host switches.

The page's stack is that of the host's kernel for the guest's process in its upper half, for the tracing thread below.
"""

from __future__ import annotations

from typing import Final

from vtsim.base.words import byte_offsets
from vtsim.cpu.assembler import Mem
from vtsim.cpu.slots import R15
from vtsim.vmm.paravirtual import layout as paravirtual

# fmt: off
TRACER_TEXT: Final  = 0x0000_7E80_0040_0000     # of the tracing thread: its code
TRACER_DATA: Final  = 0x0000_7E80_0070_0000     # its buffer of registers
TRACER_STACK: Final = 0x0000_7E80_0080_0000     # grows down from here
KERNEL_STACK: Final = 1024                      # its stack in the host's kernel ends so far below the vCPU's structure
TRACER_FRAME: Final = 40                        # bytes of its frame there, by which it returns
# from the structure, at the far ends of both stacks: registers where the kernel left the process; those of the thread
CONTEXT: Final      = -KERNEL_STACK
TRACER: Final       = -2 * KERNEL_STACK

SIGNAL, CALL, RETURN = 0, 1, 2                  # why a process stopped
GET_REGISTERS, POKE, CONTINUE, WAIT = range(4)  # what the tracing thread asks for
SIGNAL_FRAME: Final = 640                       # bytes: struct sigframe, with the state that FXSAVE writes

WORDS: Final = (
    *paravirtual.WORDS,
    # field               words  meaning
    ("STOPPED_BY",            1, "why the process stops next"),
    ("DELIVERS",              1, "why it stopped last"),
    ("BELIEVED",              1, "KERNEL, while the tracing thread runs"),
    ("TRACER_CR3",            1, "root of its tables"),
    ("RING_0_STACK",          1, "linear address of the TSS's stack pointer"),
    ("STOPS",                 3, "stops, by reason"),
)
# fmt: on
V: Final = byte_offsets(WORDS)


def vcpu(field: str, word: int = 0) -> Mem:
    """A word of the vCPU that runs on this CPU."""
    return Mem(R15, V[field] + 8 * word)
