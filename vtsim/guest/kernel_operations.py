"""One operation of the guest's kernel in a loop: what a nanobenchmark of a virtual machine monitor times.

The set is that of Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization" (ASPLOS
2006), where others of `vtsim.guest.spec` do not serve already.
"""

from __future__ import annotations

from attrs import frozen

from vtsim.guest.spec import KIB, Phase, primitives, repeated


@primitives.register("empty")
@frozen(kw_only=True)
class EmptySpec(Phase):
    """A loop with nothing in it, by the guest kernel: what the loop around another operation takes."""

    iterations: int = repeated()


@primitives.register("call_return")
@frozen(kw_only=True)
class CallReturnSpec(Phase):
    """CALL of a subroutine that returns at once, in a loop, by the guest kernel."""

    iterations: int = repeated()


@primitives.register("divide_error")
@frozen(kw_only=True)
class DivideErrorSpec(Phase):
    """DIV by zero in a loop, by the guest kernel, whose #DE handler goes on behind the instruction."""

    iterations: int = repeated(10_000)


@primitives.register("invalid_opcode")
@frozen(kw_only=True)
class InvalidOpcodeSpec(Phase):
    """UD2 in a loop, by the guest kernel, whose #UD handler goes on behind the instruction."""

    iterations: int = repeated(1000)


@primitives.register("kernel_fault")
@frozen(kw_only=True)
class KernelFaultSpec(Phase):
    """Loads where nothing is mapped, by the guest kernel, whose #PF handler goes on behind the instruction."""

    iterations: int = repeated(10_000)


@primitives.register("config_read")
@frozen(kw_only=True)
class ConfigReadSpec(Phase):
    """Reads of PCI configuration space by the guest kernel: an address by OUT, the register by IN, in a loop."""

    iterations: int = repeated(1000)


@primitives.register("pte_write")
@frozen(kw_only=True)
class PteWriteSpec(Phase):
    """Stores to the page-table entry of a page that is in use, in a loop, by the guest kernel."""

    iterations: int = repeated(10_000)

    @property
    def region_bytes(self) -> int:
        return 4 * KIB
