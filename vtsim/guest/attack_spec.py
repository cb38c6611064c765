"""Primitives that attempt what a virtual machine must not let its guest do. What became of them is measured outside."""

from __future__ import annotations

from attrs import frozen

from vtsim.base.spec import Boolean, Text, addresses, counts, setting, sizes
from vtsim.guest.spec import KIB, PAGE_SIZES, DmaBuffersSpec, Phase, primitives, repeated

CALLS = ("vmcall", "syscall")
STATES = ("cr0", "cr4", "efer", "idt", "gdt", "tr")


@primitives.register("attack_memory")
@frozen(kw_only=True)
class AttackMemorySpec(Phase):
    """The kernel maps a physical address that is not its own with tables that it writes itself; reads and writes it."""

    target: int = setting(addresses(le=2**52 - 8), "Physical address that it enters into its page tables")
    page_size: int = setting(sizes(choices=PAGE_SIZES), "Page that maps it", default=4 * KIB)
    levels: int = setting(counts(ge=4, le=5), "Levels of the tables that its kernel has", default=4)


@primitives.register("attack_linear")
@frozen(kw_only=True)
class AttackLinearSpec(Phase):
    """The kernel reads and writes a linear address that it has not mapped."""

    target: int = setting(addresses(le=2**48 - 8), "Linear address, of which bit 47 is extended")


@primitives.register("attack_native")
@frozen(kw_only=True)
class AttackNativeSpec(Phase):
    """The guest reads and writes an address of its host's by native methods, where the program that runs it has any."""

    target: int = setting(addresses(le=2**48 - 8), "Linear address of the host's, of which bit 47 is extended")


@primitives.register("attack_dma")
@frozen(kw_only=True)
class AttackDmaSpec(DmaBuffersSpec):
    """The kernel maps an address for its device that is not its own, and lets the device read and write it."""

    target: int = setting(addresses(le=2**52 - 8), "Physical address that it gives to the device")


@primitives.register("attack_update")
@frozen(kw_only=True)
class AttackUpdateSpec(Phase):
    """A paravirtual kernel asks for an entry that leads to a frame not its own, or that makes a table writable."""

    target: int = setting(addresses(le=2**52 - 8), "Host-physical address that it wants to reach")
    by: str = setting(Text(choices=("frame", "table")), "Entry that it asks for", default="frame")
    call: str = setting(Text(choices=CALLS), "Instruction by which its hypervisor is called", default="vmcall")


@primitives.register("attack_stale")
@frozen(kw_only=True)
class AttackStaleSpec(Phase):
    """A paravirtual kernel on two vCPUs: one makes a page into a table that the other has a translation to write to."""

    target: int = setting(addresses(le=2**52 - 8), "Host-physical address that it wants to reach")


@primitives.register("attack_state")
@frozen(kw_only=True)
class AttackStateSpec(Phase):
    """The kernel changes a privileged register, and leaves it so."""

    register: str = setting(Text(choices=STATES), "Register, or the register of a descriptor table", default="idt")


@primitives.register("attack_state_user")
@frozen(kw_only=True)
class AttackStateUserSpec(AttackStateSpec):
    """A process changes a privileged register."""


@primitives.register("attack_interrupts")
@frozen(kw_only=True)
class AttackInterruptsSpec(Phase):
    """The kernel sends itself interrupts without end in sight, while it takes none."""

    iterations: int = repeated(1000)
    vector: int = setting(counts(ge=32, le=255), "Vector", default=0xF3)


@primitives.register("attack_hypercalls")
@frozen(kw_only=True)
class AttackHypercallsSpec(Phase):
    """The kernel makes hypercalls with random numbers and arguments; what they give back does not matter to it."""

    iterations: int = repeated(64)
    call: str = setting(Text(choices=CALLS), "Instruction by which its hypervisor is called", default="vmcall")
    tables: bool = setting(
        Boolean(), "Most of them ask for updates of page tables, with addresses that the machine has", default=False
    )


@primitives.register("attack_time")
@frozen(kw_only=True)
class AttackTimeSpec(Phase):
    """The kernel disables interrupts and computes for ever."""
