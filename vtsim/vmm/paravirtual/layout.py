"""The words of a paravirtual vCPU: those of a monitor's, and more."""

from __future__ import annotations

from typing import Final

from vtsim.base.words import byte_offsets
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.slots import R15, RAX
from vtsim.ept import direct as d
from vtsim.vmm.monitor import layout as monitor
from vtsim.vmm.monitor.crossing import VECTORS

Row = tuple[str, int, str]
# fmt: off
FIRST_OWN: Final = 256                          # entries of every root that are the hypervisor's, as Xen has them
LAST_OWN: Final  = 271
GUEST_KERNEL: Final = monitor.GUEST_CODE & ~3   # code segment of the kernel in frames: it believes in ring 0

INVALIDATE_VECTOR: Final = 0xFD                 # another CPU wants translations dropped; as Xen's, and the next
EVENT_VECTOR: Final = 0xFC                      # an event is pending that another CPU sent
ASKED_ALL, ASKED_PAGE = 1, 2                    # of ASKED

OF_SEVERAL: Final[tuple[Row, ...]] = (
    ("INDEX",             1, "which vCPU of its VM"),
    ("PEER",              1, "linear address of the next vCPU of the VM; behind the last comes the first"),
    ("VM",                1, "that of the first one, which has the VM's words"),
    ("CPU",               1, "the physical CPU"),
    ("ASKED",             1, "what another vCPU wants dropped: all, or an address with ASKED_PAGE; 0 nothing"),
    ("TABLES_TICKET",     1, "of the VM: the lock of its tables"),
    ("TABLES_SERVING",    1, ""),
    ("LOOSE",             1, "of the VM: has a frame lost its type since all vCPUs dropped translations?"),
    ("LOCK_WAITS",        1, "looks in vain at that lock"),
    ("REMOTE_FLUSHES",    1, "times that translations were dropped for another vCPU"),
    ("KICKS",             1, "interrupts sent to other CPUs"),
    ("TIMER_PORT",        1, "port of the timer; 0 where it has none"),
    ("SPARE",             4, ""),
)
UNUSED: Final = "COPY"                          # of a software CPU, whose place these take
MONITORS: Final[tuple[Row, ...]] = monitor.VCPU_WORDS
WORDS: Final = (
    *(row for old in MONITORS for row in (OF_SEVERAL if old[0] == UNUSED else (old,))),
    # field           words  meaning
    ("NUMBER",            1, "which VM of the scenario"),
    ("KERNEL_ROOT",       1, "host-physical address of a root whose kernel half is that of all roots"),
    ("SHARED_PAGE",       1, "linear address of the page shared with the guest"),
    ("REFUSALS",          1, "requests that were refused"),
    ("KERNEL_CR3",        1, "what CR3 holds while the kernel runs"),
    ("USER_CR3",          1, "while a process runs; 0 none yet"),
    ("KERNEL_STACK",      1, "where the kernel's stack begins when a process is left"),
    ("BY_SYSCALL",        1, "the guest came by SYSCALL, so SYSRET leads back"),
    ("CALL_HANDLER",      1, "where the kernel takes system calls; 0 none yet"),
    ("EVENT_HANDLER",     1, "where it takes events"),
    ("TRAP_HANDLERS", VECTORS, "where it takes exceptions"),
    ("TIMER_BIT",         1, "bit of the timer's port; 0 where it has none"),
    ("NEXT_PORT",         1, "first port that is free"),
    ("FEATURES",          1, "EAX of the CPUID leaf that says what the hypervisor offers"),
    ("HYPERCALLS", len(d.CALLS), "hypercalls by number"),
    ("REQUESTS", len(d.REQUESTS), "requests by kind"),
    ("UPCALLS",           1, "events that the kernel was called back for"),
    ("EVENTS_SENT",       1, "events that became pending"),
    ("BLOCKS",            1, "times that the kernel waited for an event"),
)
# fmt: on
V: Final = byte_offsets(WORDS)


def vcpu(field: str, word: int = 0) -> Mem:
    """A word of the vCPU that runs on this CPU."""
    return Mem(R15, V[field] + 8 * word)


def count(a: Assembler, field: str) -> None:
    """One more, in a statistic. Changes RAX."""
    a.ld(RAX, vcpu(field))
    a.add(RAX, 1)
    a.st(vcpu(field), RAX)


def count_one_of(a: Assembler, field: str, index: int, other: int) -> None:
    """One more of the kind that a register names. Changes the other register."""
    at = Mem(R15, V[field], index=index, scale=8)
    a.ld(other, at)
    a.add(other, 1)
    a.st(at, other)
