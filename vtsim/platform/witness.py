"""What guests saw, from a run that was asked to log it: three streams a vCPU, of applications, kernel and exceptions.

Not modelled: which of several processes on a vCPU saw a value, so that preemption changes the order of an application
stream; the order in which vCPUs of one VM see what they share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vtsim.base import memory as mem
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Program
from vtsim.cpu.kernels import digest as d
from vtsim.guest.machine_view import Space
from vtsim.vmcs import state as h

if TYPE_CHECKING:
    from vtsim.platform.machine import Machine

WORDS: Final = 3 * d.SEEN_STREAM
APPLICATION, KERNEL, EXCEPTION = STREAMS = ("application", "kernel", "exception")


@frozen(kw_only=True)
class Wanted:
    """From which value on each stream is logged; `fixed`: only as many as a log holds, else ever fewer of all."""

    application: int = 0
    kernel: int = 0
    exception: int = 0
    fixed: bool = False


@frozen(kw_only=True)
class Seen:
    """One value: what `op` read `of`, its `part`; the digest of the stream with it; where (0: not known)."""

    step: int
    digest: int
    op: int
    of: int
    part: int
    value: int
    rip: int
    cr3: int


@frozen(kw_only=True)
class Stream:
    """What was logged of a stream: `count` values were seen, of which `rows` are known, one of `every`.

    `digest` is of all values in their order, `total` in any order.
    """

    count: int
    every: int
    digest: int
    total: int
    rows: tuple[Seen, ...]


@frozen(kw_only=True)
class Witnessed:
    """What one vCPU saw, and the programs it ran: its kernel's, then those of its processes."""

    streams: Mapping[str, Stream]
    texts: tuple[Program, ...]
    spaces: tuple[Space, ...]


def attach(machine: Machine, first_word: int, wanted: Wanted) -> dict[tuple[str, int], int]:
    """Let every vCPU log what its guest sees, from an arena offset on; {(VM, vCPU): offset of its log}."""
    logs: dict[tuple[str, int], int] = {}
    a, cpus = machine.engine.arena, machine.engine.cpus
    vcpus = [] if machine.below is None else [*machine.below.vcpus]
    if machine.below is None:
        (vm,) = machine.vms
        for number in range(vm.spec.vcpus):
            logs[vm.spec.name, number] = cpus[number][s.SEEN] = first_word + number * WORDS
    numbers: dict[str, int] = {}
    for n, vcpu in enumerate(vcpus):
        at, number = first_word + n * WORDS, numbers.get(vcpu.name, 0)
        numbers[vcpu.name] = number + 1
        logs[vcpu.name, number] = at
        if machine.hypervisor is not None:
            machine.engine.contents(machine.hypervisor.vcpus[n].vmcs, mem.VMCS_REGION)[h.V_SEEN] = at
        else:
            cpus[vcpu.cpu][s.SEEN] = at
    for at in logs.values():
        for n, first in enumerate((wanted.application, wanted.kernel, wanted.exception)):
            a[at + n * d.SEEN_STREAM + d.SEEN_FIRST] = first
            a[at + n * d.SEEN_STREAM + d.SEEN_FIXED] = int(wanted.fixed)
    return logs


def read(machine: Machine, logs: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], Witnessed]:
    """What every vCPU has seen so far."""
    parts = {vm.spec.name: vm for vm in machine.vms}
    return {
        (name, number): Witnessed(
            streams={stream: _stream(machine, at + n * d.SEEN_STREAM) for n, stream in enumerate(STREAMS)},
            texts=parts[name].texts,
            spaces=parts[name].spaces,
        )
        for (name, number), at in logs.items()
    }


def _stream(machine: Machine, at: int) -> Stream:
    a = machine.engine.arena
    count, first, shift = (int(a[at + word]) for word in (d.SEEN_COUNT, d.SEEN_FIRST, d.SEEN_SHIFT))
    logged = min(max(count - first + (1 << shift) - 1, 0) >> shift, d.SEEN_ROWS)
    lines = a[at + d.SEEN_HEADER :][: logged * d.SEEN_WORDS].reshape(logged, d.SEEN_WORDS).tolist()
    rows = tuple(
        Seen(
            step=first + (n << shift), digest=line[d.SEEN_DIGEST], op=line[d.SEEN_OP], of=line[d.SEEN_OF],
            part=line[d.SEEN_PART], value=line[d.SEEN_VALUE], rip=line[d.SEEN_RIP], cr3=line[d.SEEN_CR3],
        )
        for n, line in enumerate(lines)
    )  # fmt: skip
    return Stream(
        count=count, every=1 << shift, digest=int(a[at + d.SEEN_LAST]), total=int(a[at + d.SEEN_SUM]), rows=rows
    )
