"""What the program of a software CPU keeps in memory: decoded instructions, the software TLB, its own registers."""

from __future__ import annotations

from typing import Final

from vtsim.base.words import byte_offsets
from vtsim.cpu.assembler import Mem
from vtsim.cpu.slots import RDI
from vtsim.vmm.monitor.layout import V

# fmt: off
# --- a decoded instruction, or the beginning of a translated block: a line of the cache -----------------------------
ENTRY_WORDS: Final = (
    ("TAG",      1, "linear address, in the program's view, of the instruction's bytes"),
    ("HANDLER",  1, "address of what executes it"),
    ("LENGTH",   1, "bytes of the instruction"),
    ("A",        1, "register: its offset in the virtual CPU, or its number; or a value to store"),
    ("B",        1, "second register's offset; of a memory operand, how far its index is shifted"),
    ("C",        1, "immediate, displacement or target"),
    ("BASE",     1, "offset of the memory operand's base register in the virtual CPU"),
    ("INDEX",    1, "the same of its index register, or of a segment's base"),
)
E: Final = byte_offsets(ENTRY_WORDS)
ENTRY_BYTES: Final = 64
ENTRIES: Final = 1 << 14                     # one for each byte of four pages: an address has one place
LIST_END: Final = -1                         # behind the registers of LDM and STM

# --- the software TLB: 256 entries for the guest's kernel, 256 for its processes ------------------------------------
T_READ, T_WRITE, T_FETCH, T_ADDEND = 0, 8, 16, 24   # page number + 1 for each kind of access, 0 none; what is added
TLB_ENTRIES: Final = 256
TLB_ENTRY_BYTES: Final = 32
TLB_PAGES: Final = TLB_ENTRIES * TLB_ENTRY_BYTES // 4096

# --- accesses of a stream that is about to be executed --------------------------------------------------------------
STREAM_ROW: Final = ("ADDRESS", "STORES", "WORK", "RCX", "RDI", "RBX", "R8", "RDX")
S: Final = {name: 8 * n for n, name in enumerate(STREAM_ROW)}
STREAM_ROW_BYTES: Final = 64
STREAM_ROWS: Final = 63                      # and one for the registers behind the last

# --- hooks that the platform runs: what only the simulator can see --------------------------------------------------
(DECODE_ROW, STREAM_BATCH, FORWARD, TRANSLATE_BLOCK, CHAIN_BLOCK) = range(128, 133)
# fmt: on


def entry(field: str) -> Mem:
    """A word of the entry at RDI."""
    return Mem(RDI, E[field])


def register_offset(number: int) -> int:
    """Where a general register of the guest stands in the virtual CPU; where there is none, a word that is 0."""
    return V["REGISTERS"] + 8 * number if number < 16 else V["ZERO"]
