"""Native methods: a guest's program calls functions of the program that runs it, with addresses of its own choice.

A process virtual machine offers them so that its guest reaches what it does not emulate: the Java Native Interface and
the methods of `sun.misc.Unsafe`, which load and store at any address of the process. A guest asks by VMCALL.

Not modelled: a process of its own for each software CPU, so that a native method reaches what the host's kernel
would keep from it; native methods other than a load and a store.
"""

from __future__ import annotations

from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import RAX, RBX, RCX, RSI
from vtsim.guest.kernel.layout import NATIVE_LOAD, NATIVE_STORE
from vtsim.vmm.monitor.layout import saved


def native_method(a: Assembler) -> None:
    """VMCALL: the method in RAX, the host's address in RBX, a value in RCX; another number is an invalid opcode."""
    a.ld(RAX, saved(RAX))
    a.ld(RSI, saved(RBX))
    a.cmp(RAX, NATIVE_LOAD)
    a.jcc(ops.CC_NZ, "native_not_load")
    a.ld(RAX, Mem(RSI))
    a.st(saved(RAX), RAX)
    a.jmp("skip")
    a.label("native_not_load")
    a.cmp(RAX, NATIVE_STORE)
    a.jcc(ops.CC_NZ, "undefined")
    a.ld(RCX, saved(RCX))
    a.st(Mem(RSI), RCX)
    a.jmp("skip")
