"""What guests saw, from a run that was asked to log it: three streams a vCPU, of applications, kernel and exceptions.

A vCPU whose kernel switches between processes has a digest of what each of them and each child saw, so that time, which
decides when it switches, does not change them.

Not modelled: the order in which vCPUs of one VM see what they share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vtsim.base import memory as mem
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Program
from vtsim.cpu.kernels import digest as d
from vtsim.guest.address_space import MAPPED_FILE
from vtsim.platform.spec import VmSpec
from vtsim.vmcs import state as h

if TYPE_CHECKING:
    from vtsim.platform.machine import Machine

EVERY_SPACE: Final = -1
APPLICATION, KERNEL, EXCEPTION = STREAMS = ("application", "kernel", "exception")


@frozen(kw_only=True)
class Wanted:
    """From which value on each stream is logged; `fixed`: only as many as a log holds, else ever fewer of all.

    `space`: the number of the only address space whose values are in the streams.
    """

    application: int = 0
    kernel: int = 0
    exception: int = 0
    fixed: bool = False
    space: int = EVERY_SPACE


@frozen(kw_only=True)
class Seen:
    """One value: what `op` read `of`, its `part`; the digest of the stream with it; where (0: not known), by whom.

    `space` is the number of an address space, 0 of none of a process.
    """

    step: int
    digest: int
    op: int
    of: int
    part: int
    value: int
    rip: int
    space: int


@frozen(kw_only=True)
class Stream:
    """What was logged of a stream: `count` values were seen, of which `rows` are known, one of `every`.

    `digest` is of all values in their order.
    """

    count: int
    every: int
    digest: int
    rows: tuple[Seen, ...]


@frozen(kw_only=True)
class Witnessed:
    """What one vCPU saw, and the programs it ran: its kernel's, then those of its processes.

    `seen`: of each stream, how many values each address space saw, and their digest; the first is of none. `processes`:
    which process each of them is of, behind that. `files`: of each process, where it may map a file.
    """

    streams: Mapping[str, Stream]
    texts: tuple[Program, ...] = ()
    seen: Mapping[str, tuple[tuple[int, int], ...]] = {}
    processes: tuple[int, ...] = ()
    files: tuple[tuple[tuple[int, int], ...], ...] = ()

    def process(self, space: int) -> int:
        """The process of an address space of the streams."""
        return self.processes[space - 1]


def words(vms: Iterable[VmSpec]) -> int:
    """Words of the logs of all vCPUs: an address space for each process, and one for its child."""
    return sum(vm.vcpus * _log_words(2 * len(vm.guest.processes)) for vm in vms)


def _log_words(spaces: int) -> int:
    return d.SEEN_TABLE + d.SEEN_TABLE_HEADER + (1 + spaces) * d.SPACE_WORDS


def attach(machine: Machine, first_word: int, wanted: Wanted) -> dict[tuple[str, int], int]:
    """Let every vCPU log what its guest sees, from an arena offset on; {(VM, vCPU): offset of its log}."""
    logs: dict[tuple[str, int], int] = {}
    a, cpus = machine.engine.arena, machine.engine.cpus
    for vm in machine.vms:
        for number in range(vm.spec.vcpus):
            at = logs[vm.spec.name, number] = first_word
            first_word += _log_words(2 * len(vm.spec.guest.processes))
            for n, first in enumerate((wanted.application, wanted.kernel, wanted.exception)):
                a[at + n * d.SEEN_STREAM + d.SEEN_FIRST] = first
                a[at + n * d.SEEN_STREAM + d.SEEN_FIXED] = int(wanted.fixed)
            table = at + d.SEEN_TABLE
            a[table + d.SEEN_ONLY], a[table + d.SEEN_SPACES] = wanted.space, 1 + len(vm.process_roots)
            for n, (_, roots) in enumerate(vm.process_roots):
                row = table + d.SEEN_TABLE_HEADER + (1 + n) * d.SPACE_WORDS
                a[row + d.SPACE_ROOT], a[row + d.SPACE_OTHER] = roots[0], roots[-1]
    if machine.below is None:
        for (_, number), at in logs.items():
            cpus[number][s.SEEN] = at
        return logs
    numbers: dict[str, int] = {}
    for n, vcpu in enumerate([*machine.below.vcpus]):
        number = numbers[vcpu.name] = numbers.get(vcpu.name, -1) + 1
        at = logs[vcpu.name, number]
        a[at + d.SEEN_TABLE + d.SEEN_ROOT] = machine.below.believed_root(n)
        if machine.hypervisor is not None:
            machine.engine.contents(machine.hypervisor.vcpus[n].vmcs, mem.VMCS_REGION)[h.V_SEEN] = at
        else:
            cpus[vcpu.cpu][s.SEEN] = at
    return logs


def read(machine: Machine, logs: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], Witnessed]:
    """What every vCPU has seen so far."""
    parts = {vm.spec.name: vm for vm in machine.vms}
    return {
        (name, number): Witnessed(
            streams={stream: _stream(machine, at + n * d.SEEN_STREAM) for n, stream in enumerate(STREAMS)},
            texts=parts[name].texts,
            seen={stream: _by_space(machine, at + d.SEEN_TABLE, n) for n, stream in enumerate(STREAMS)},
            processes=tuple(process for process, _ in parts[name].process_roots),
            files=tuple(
                tuple((start, end) for area, start, end in space.areas if area == MAPPED_FILE)
                for space in parts[name].spaces
            ),
        )
        for (name, number), at in logs.items()
    }


def _by_space(machine: Machine, table: int, stream: int) -> tuple[tuple[int, int], ...]:
    a = machine.engine.arena
    spaces = int(a[table + d.SEEN_SPACES])
    rows = a[table + d.SEEN_TABLE_HEADER :][: spaces * d.SPACE_WORDS].reshape(spaces, d.SPACE_WORDS)
    first = d.SPACE_STREAMS + 2 * stream
    return tuple((count, digest) for count, digest in rows[:, first : first + 2].tolist())


def _stream(machine: Machine, at: int) -> Stream:
    a = machine.engine.arena
    count, first, shift = (int(a[at + word]) for word in (d.SEEN_COUNT, d.SEEN_FIRST, d.SEEN_SHIFT))
    logged = min(max(count - first + (1 << shift) - 1, 0) >> shift, d.SEEN_ROWS)
    lines = a[at + d.SEEN_HEADER :][: logged * d.SEEN_WORDS].reshape(logged, d.SEEN_WORDS).tolist()
    rows = tuple(
        Seen(
            step=first + (n << shift), digest=line[d.SEEN_DIGEST], op=line[d.SEEN_OP], of=line[d.SEEN_OF],
            part=line[d.SEEN_PART], value=line[d.SEEN_VALUE], rip=line[d.SEEN_RIP], space=line[d.SEEN_SPACE],
        )
        for n, line in enumerate(lines)
    )  # fmt: skip
    return Stream(count=count, every=1 << shift, digest=int(a[at + d.SEEN_LAST]), rows=rows)
