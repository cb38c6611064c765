"""PDPTEs of a guest with PAE paging, where EPT translates and writes of CR0 or CR4 that load them exit."""

from __future__ import annotations

from typing import Final

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R8, R12, R13, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from vtsim.ept import spec as e
from vtsim.vmm.programs import mmio
from vtsim.vmm.programs.words import GENERAL_PROTECTION, zero
from vtsim.vmm.registry import Path
from vtsim.vmm.shadow import CR0_PG, CR4_PAE, EFER_LME

# changes of CR0 and of CR4 that load the PDPTEs
CR0_PDPTES: Final = 7 << 29
CR4_PDPTES: Final = CR4_PAE | 1 << 4 | 1 << 7 | 1 << 20
RESERVED: Final = 0x1E6 | -(1 << 52)  # beside what is beyond the physical-address width


def written(a: Assembler, number: int, watched: int) -> None:
    """The guest writes RAX to CR0 or CR4: if such bits change, by way of what may load the PDPTEs. Changes RCX."""
    a.vmread(RCX, f"GUEST_CR{number}")
    a.emit(ops.XOR, RCX, RAX)
    a.test(RCX, watched)
    a.jcc(ops.CC_NZ, f"cr_{number}_pdptes")
    a.label(f"cr_{number}_loaded")


def load(a: Assembler, path: Path) -> None:
    """`cr_0_pdptes`, `cr_4_pdptes`: load the PDPTEs of PAE paging; a wrong one is #GP, and nothing changes.

    SDM: "PDPTE Registers".
    """
    for number, cr0, cr4 in ((0, R12, R13), (4, R13, R12)):
        a.label(f"cr_{number}_pdptes")
        a.copy(R12, RAX)
        a.vmread(R13, f"GUEST_CR{4 - number}")
        for register, bit in ((cr0, CR0_PG), (cr4, CR4_PAE)):
            a.test(register, bit)
            a.jcc(ops.CC_Z, f"cr_{number}_loaded")
        a.vmread(RCX, "GUEST_IA32_EFER")
        a.test(RCX, EFER_LME)
        a.jcc(ops.CC_NZ, f"cr_{number}_loaded")
        a.call("load_pdptes")
        a.copy(RAX, R12)
        a.jmp(f"cr_{number}_loaded")
    a.label("load_pdptes")
    mmio.keep_pages(a, path)
    a.vmread(RSI, "GUEST_CR3")
    a.and_(RSI, e.PDPT_ADDRESS)
    a.call("guest_memory")
    pdptes = (RCX, RDX, RBX, RSI)
    a.ldm(Mem(RDI), pdptes)
    mmio.release_pages(a, path)
    a.mov(R8, RESERVED | ((1 << 52) - (1 << path.profile.physical_address_bits)))
    for n, pdpte in enumerate(pdptes):
        a.test(pdpte, e.PTE_PRESENT)
        a.jcc(ops.CC_Z, f"pdpte_{n}_right")
        a.test(pdpte, register=R8)
        a.jcc(ops.CC_NZ, "pdptes_wrong")
        a.label(f"pdpte_{n}_right")
    for n, pdpte in enumerate(pdptes):
        a.vmwrite(f"GUEST_PDPTE{n}", pdpte)
    a.ret()
    a.label("pdptes_wrong")
    a.copy(RSP, R15, comment="the stack is given up")
    a.mov(RAX, GENERAL_PROTECTION)
    zero(a, RDX)
    a.jmp("inject")
