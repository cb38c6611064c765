"""Builds a host with user-mode guests into a machine: programs, tracing threads, and what its guests have in common
with paravirtual ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from attrs import define

from vtsim.base import memory as mem
from vtsim.cpu.assembler import Assembler
from vtsim.ept import spec as e
from vtsim.ept.direct import HOST_VECTOR
from vtsim.ept.tables import USER_PAGE
from vtsim.vmm.direct import DirectHost
from vtsim.vmm.host import Host
from vtsim.vmm.monitor import layout as monitor_at
from vtsim.vmm.monitor.virtual_cpus import TSS, Monitor, VirtualCpu
from vtsim.vmm.paravirtual import calls, entry
from vtsim.vmm.paravirtual.build import Kind, ParavirtualMonitor, build_kind, ground
from vtsim.vmm.paravirtual.emulate import OPS, stepping
from vtsim.vmm.user_mode import host as program
from vtsim.vmm.user_mode import layout as at
from vtsim.vmm.user_mode.tracer import tracing_thread

STOPS: Final = ("signals", "calls", "returns")


@define(eq=False)
class UserModeMonitor(ParavirtualMonitor):
    """The host as the platform sees it while it runs."""

    offsets = at.V

    def hypercalls(self) -> dict[str, dict[str, int]]:
        """What guests asked for, over all of them, and the stops of their processes."""
        stops = {name: sum(self.word(v, "STOPS", n) for v in self.vcpus) for n, name in enumerate(STOPS)}
        return super().hypercalls() | {"stops": stops}


def build_user_mode(**machine: Any) -> ParavirtualMonitor:
    """Lay the host and its guests, at most one for each CPU, into an engine whose memory is empty.

    Raises `ConfigError` where the memory does not suffice.
    """
    kind = Kind(
        monitor=UserModeMonitor, emit=emit, prepare=thread, fill=trace, batch=1, on_host=True, keeps=False
    )  # fmt: skip
    return build_kind(kind, **machine)


def emit(
    a: Assembler, host: Host, vcpus: Sequence[VirtualCpu], tables: DirectHost, words: tuple[int, int]
) -> tuple[list[str], list[str]]:
    """The host's kernel; the labels of system calls of guest kernels by number, and none of emulators."""
    deadline = host.profile.features.tsc_deadline
    entry.boot(a, deadline)
    for vcpu in vcpus:
        program.system_call(a, vcpu.cpu, host.address(vcpu.page) + monitor_at.STACK_BYTES)
    program.host_call(a)
    entry.system_calls(a, host.address(words[0]))
    entry.leave(a)
    entry.call_back(a, stop="stop", below=program.signal_frame)
    program.stop(a)
    program.tracer_calls(a)
    entry.exceptions(a, emulates=False, to="signal")
    program.signal(a)
    entry.undefined(a)
    program.timer(a)
    stepping(a)
    handlers = calls.calls(a, program.HostGround(keeps=False, **ground(host, tables)), deadline, host.profile.clock_hz)
    return handlers, ["exception"] * OPS


def thread(host: Host) -> int:
    """A tracing thread: its tables, text, data and stack. The frame of its root."""
    process, text = host.process(), host.reserve()
    for linear in (at.TRACER_DATA, at.TRACER_STACK - mem.PAGE_BYTES):
        process.map(linear, [host.reserve()], USER_PAGE | e.PTE_NO_EXECUTE)
    process.map(at.TRACER_TEXT, [text], USER_PAGE & ~e.PTE_WRITE)
    host.engine.place(tracing_thread(), lambda page: text)
    return process.root


def trace(monitor: Monitor, vcpu: VirtualCpu, root: int) -> None:
    """Where the tracing thread of a vCPU goes on when it first runs."""
    host = monitor.host
    host.gate(HOST_VECTOR, monitor.program.labels["host_call"], ring=3)
    frame = (tracing_thread().labels["stopped"], monitor_at.GUEST_CODE, 0x202, at.TRACER_STACK, monitor_at.GUEST_DATA)
    host.store_words(monitor.address(vcpu) - at.KERNEL_STACK - at.TRACER_FRAME, frame)
    monitor.put(vcpu, {"TRACER_CR3": root << mem.PAGE_SHIFT, "RING_0_STACK": host.address(vcpu.data) + TSS + 8})
