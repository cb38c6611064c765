"""lmbench on the server of the first Xen paper, and what it says of memory and signals elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from vtsim.study.binding import PHASE, Figure, Run, bind, quotient

LMBENCH: Final = "workloads/lmbench"
COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "L-UP": ("vmm.technique=native", "vmm.paging=none"), "VMW": ("vmm.hosted=true",),
    "Xen": ("vmm.technique=paravirtual",), "UML": ("vmm.technique=user-mode",),
}  # fmt: skip
OPERATIONS: Final = {  # benchmark: iterations of the shorter run, published operations in one of them
    "null_call": (500, 1), "null_io": (500, 2), "stat": (500, 1), "open_close": (300, 1), "slct_tcp": (50, 1),
    "sig_inst": (500, 1), "sig_hndl": (300, 1), "fork": (10, 1), "exec": (4, 1), "sh": (2, 1),
}  # fmt: skip


def _sized(scenario: str, iterations: int, *sets: str) -> tuple[Run, ...]:
    """Two runs, the second with three times as many iterations."""
    return tuple(
        Run(scenario=f"{LMBENCH}/{scenario}.yaml", sets=(*sets, f"{PHASE}.iterations={n}"), baseline=False)
        for n in (iterations, 3 * iterations)
    )


def _microseconds(operations: float) -> Callable[[Sequence[Any]], float]:
    """Microseconds of one of so many operations that the second run has more than the first."""

    def compute(results: Sequence[Any]) -> float:
        short, long = results
        return float(long.cycles.elapsed - short.cycles.elapsed) / operations * 1e6 / float(long.clock_hz)

    return compute


def _times_native(operations: float) -> Callable[[Sequence[Any]], float]:
    return quotient(_microseconds(operations), 2)


def _operation(name: str, column: str) -> Figure:
    iterations, operations = OPERATIONS[name]
    key = f"{column}.{name}"
    runs, each = _sized(name, iterations, *COLUMNS[column]), _microseconds(2 * iterations * operations)
    if name == "sig_hndl":  # lat_sig deducts what sending takes, of signal 0, which is none
        runs += _sized(name, iterations, *COLUMNS[column], f"{PHASE}.null=true")
    return Figure(
        key=key,
        published=key,
        runs=runs,
        compute=lambda results: each(results[:2]) - (each(results[2:]) if len(results) > 2 else 0.0),
        unit="us",
    )


def _slowdown(name: str) -> Figure:
    iterations, operations = OPERATIONS[name]
    return Figure(
        key=f"{name}, VMW / L-UP",
        published=lambda row: row.value(f"VMW.{name}") / row.value(f"L-UP.{name}"),
        runs=(*_sized(name, iterations, *COLUMNS["VMW"]), *_sized(name, iterations, *COLUMNS["L-UP"])),
        compute=_times_native(2 * iterations * operations),
        unit="ratio",
    )


bind(
    "XEN-LMBENCH-PROC",
    *(_operation(name, column) for column in COLUMNS for name in OPERATIONS),
    *(_slowdown(name) for name in ("null_call", "fork", "exec", "sh")),
    deviates=(
        "Linux 2.4 is entered by INT 80H, as the model's kernel never is, and its paths are of Linux 4.19: with "
        "SYSCALL and SYSRET at 440 cycles null_call takes 0.51 us. stat, open_close and slct_tcp are longer by what "
        "4.19 does more for a name, a file and a socket (a socket is 116 instructions, a descriptor 76). fork, exec "
        "and sh are their pages copied on write, faults and instructions, and those numbers are remembered. Under "
        "translation, hosted or not, for nothing here needs a device, a system call loads CR3 twice and has three "
        "call-outs by SYSCALL, as AA06-NANO says: null_call takes 1.49 us with CR3 for nothing, 0.79 if SYSCALL and "
        "SYSRET are free, too. In user mode a system call stops twice, which is four switches of context, six system "
        "calls of the tracing thread and five of the guest's kernel: with INT and IRET at 540 cycles each, which is "
        "what a null call of the host took, UML.null_call takes 10.9 us. UML.fork has the host unmap a new space "
        "entry by entry, 2,811 calls (a table of 32 bits has twice as many entries), and map 120 pages, which the "
        "host then takes no faults for; without the former it takes 0.58 ms. Missing is the host's own copy of the "
        "process, with an area for each page of it, and the walk of a space at each switch. A paravirtual kernel is "
        "64-bit and in ring 3 here, so that each system call loads CR3 twice, where Xen had a gate straight into ring "
        "1: with CR3 for nothing Xen.null_call takes 0.65 us and Xen.stat 2.19; a signal returns by a hypercall and "
        "IRET, too"
    ),
    unbound="L-SMP needs the locks of a kernel for several processors",
)

# --- context switches -----------------------------------------------------------------------------------------------
SWITCHES: Final = ((2, 0), (2, 16), (2, 64), (8, 16), (8, 64), (16, 16), (16, 64))  # processes, KiB: the row's columns
TURNS: Final = 40


def _processes(count: int, kib: int, turns: int) -> str:
    phase = f"{{primitive: context_switch, region: {kib << 10} B, iterations: {turns}}}"
    return "vms.0.guest.processes=[" + ", ".join(f"{{name: p{n}, phases: [{phase}]}}" for n in range(count)) + "]"


def _turns(count: int, kib: int, column: str) -> tuple[Run, ...]:
    return tuple(
        Run(
            scenario=f"{LMBENCH}/ctx_2p16k.yaml",
            sets=(*COLUMNS[column], _processes(count, kib, turns)),
            baseline=False,
        )
        for turns in (TURNS, 3 * TURNS)
    )


def _switch(count: int) -> Callable[[Sequence[Any]], float]:
    """What a turn among others takes more than a turn without them, as lat_ctx deducts it."""
    return lambda results: _microseconds(2 * TURNS * count)(results[:2]) - _microseconds(2 * TURNS)(results[2:])


def _context_switch(number: int, column: str) -> Figure:
    count, kib = SWITCHES[number]
    return Figure(
        key=f"{column}.{count}p{kib}K",
        published=f"{column}.{number}",
        runs=(*_turns(count, kib, column), *_turns(1, kib, column)),
        compute=_switch(count),
        unit="us",
    )


bind(
    "XEN-LMBENCH-CTX",
    *(_context_switch(number, column) for column in COLUMNS for number in range(len(SWITCHES))),
    deviates=(
        "64K: the array is read with four misses in flight, as Intel's manual has it (with eight, an estimate until "
        "then, 8p64K took 6.6 and 16p64K 10.3 us natively); with 3, 8p64K takes 19.3 and 16p64K 34.3. 2p: the price "
        "of MOV to CR3 is an estimate; with 2000 cycles 2p0K takes 1.04 and 2p64K 1.14. Under translation a "
        "process's shadow tables are found again when it runs again; what Workstation 3.2 did for 17 us at each "
        "switch is unknown: with CR3 for nothing VMW.2p0K takes 0.86 us, and no device, interrupt or idling leads to "
        "the host's world here; a monitor with 64 shadow pages in place of its 327 (no setting) evicts at each "
        "switch, 8p16K then takes 26.2 and 16p16K 27.9 us, and 2p16K still 1.3. UML: a switch is 17 system calls of "
        "the host, of which two wake the next process and put this one to sleep, the others move signals from one to "
        "the other. INT and IRET at 1,037 cycles each are estimates and too dear: a null call of the host, both "
        "ways, took 1,080 in all, and with 540 each UML.2p0K takes 11.0 us"
    ),
    unbound="as for XEN-LMBENCH-PROC: L-SMP",
)
