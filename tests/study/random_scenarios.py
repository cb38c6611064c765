"""Random scenarios: machines, hypervisors and guests of settings that nobody put together before."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

Phase = dict[str, Any]
REGIONS = ("4 KiB", "64 KiB", "200 KiB", "1 MiB", "2 MiB", "3 MiB")
PATTERNS = ("uniform", "sequential", "strided", "zipf", "chase")
COUNTED = (  # primitives that only say how often
    "rdtsc", "pause", "mov_from_cr8", "mov_to_cr8", "mov_to_cr3", "syscall", "empty", "call_return", "divide_error",
    "invalid_opcode", "kernel_fault", "pte_write", "null_io", "stat", "open_close", "select", "signal_install",
    "signal_handle", "protection_fault", "hlt",
)  # fmt: skip
TECHNIQUES = (
    *(["hardware"] * 6), "binary-translation", "dynamic-translation", "interpreter", "paravirtual",
    "trap-and-emulate", "user-mode",
)  # fmt: skip


def _percent(r: Random) -> str:
    return f"{r.randint(0, 100)} %"


def _accesses(r: Random) -> Phase:
    return {"region": r.choice(REGIONS), "write": _percent(r), "pattern": r.choice(PATTERNS)}


def _copies(r: Random) -> Phase:
    return {"iterations": r.randint(1, 3), "pages": r.randint(1, 40)}


def _process(r: Random) -> Phase:
    pages = r.randint(8, 30)
    return {
        "iterations": r.randint(1, 3), "pages": pages, "written": r.randint(0, pages // 2), "images": r.randint(0, 2),
        "fresh": r.randint(0, 20),
    }  # fmt: skip


PHASES: dict[str, Callable[[Random], Phase]] = {
    **{name: lambda r: {"iterations": r.randint(1, 9)} for name in COUNTED},
    "work": lambda r: {"instructions": r.randint(1, 20_000)},
    "mix": lambda r: {"instructions": r.randint(1, 20_000), **_accesses(r)},
    "stream": lambda r: {"accesses": r.randint(1, 4000), "work": r.randint(0, 20), **_accesses(r)},
    "fill": lambda r: {"iterations": r.randint(1, 2), "region": r.choice(REGIONS), "distinct": r.randint(1, 40)},
    "cpuid": lambda r: {"iterations": r.randint(1, 20), "leaf": r.choice([0, 1, 7, 13])},
    "rdmsr": lambda r: {"iterations": r.randint(1, 9), "msr": r.choice([0x1B, 0x277, 0x174, 0xC0000080])},
    "fork": _copies,
    "exec": _copies,
    "process": _process,
    "page_fault": lambda r: {"iterations": r.randint(1, 3), "region": r.choice(REGIONS)},
    "protect": lambda r: {"iterations": r.randint(1, 3), "region": r.choice(REGIONS[:3])},
    "context_switch": lambda r: {"iterations": r.randint(1, 20), "region": r.choice(["0 B", "16 KiB"])},
    "idle": lambda r: {"duration": f"{r.randint(1, 400)} us"},
    "map_file": lambda r: {
        "iterations": r.randint(1, 3), "region": r.choice(["4 KiB", "64 KiB", "1 MiB"]), "write": _percent(r),
        "order": r.choice(["permutation", "strided", "none"]), "invalidate": r.choice([True, False]),
    },
    "btree": lambda r: {"records": r.randint(1, 5000), "accesses": r.randint(1, 2000)},
    "key_values": lambda r: {"keys": r.randint(1, 3000), "accesses": r.randint(1, 1000)},
    "graph_gather": lambda r: {"vertices": r.randint(1, 9000), "accesses": r.randint(1, 1000)},
    "watched_stores": lambda r: {
        "pages": r.randint(1, 20), "stores": r.randint(1, 9), "loads": r.randint(0, 30), "iterations": r.randint(1, 60),
        "region": f"{r.randint(1, 64)} KiB", "by": r.choice(["nobody", "nobody", "nobody", "exit", "exception", "vmfunc", "vmcall"]),
    },
}  # fmt: skip


def _some(r: Random, share: float, settings: dict[str, Any]) -> dict[str, Any]:
    return settings if r.random() < share else {}


def _vmm(r: Random) -> dict[str, Any]:
    technique = r.choice(TECHNIQUES)
    paging = {"paging": r.choice(["ept", "ept", "shadow", "agile", "direct-pv"])} if technique == "hardware" else {}
    return {
        "technique": technique,
        "personality": r.choice(["kvm", "kvm", "minimal"]),
        **paging,
        **_some(r, 0.3, {"vpid": r.choice([True, False])}),
        **_some(r, 0.5, {"ept": {
            "page_size": r.choice(["4 KiB", "2 MiB", "1 GiB"]), "populate": r.choice(["demand", "prebuilt"]),
        }}),
        **_some(r, 0.15, {"dirty_log": {
            "method": r.choice(["auto", "write-protect", "pml"]), "start": f"{r.randint(0, 200)} us",
            "period": f"{r.randint(20, 400)} us",
        }}),
        **_some(r, 0.15, {"huge_pages": "never"}),
        **_some(r, 0.2, {"memory": {"allocator": "buddy", "fragmentation": r.choice(["0 %", "30 %", "100 %"])}}),
        **_some(r, 0.1, {"collapse": {"on": True, "period": f"{r.randint(50, 900)} us"}}),
        **_some(r, 0.1, {"sharing": {"on": True, "period": f"{r.randint(50, 900)} us", "pages": r.randint(20, 400)}}),
        **_some(r, 0.1, {"swap": {"on": True, "memory": r.choice(["8 MiB", "16 MiB", "all"])}}),
        **_some(r, 0.15, {"features": {"exit_clustering": True}}),
        **_some(r, 0.2, {"apicv": True}),
        **_some(r, 0.1, {"hosted": True}),
        **_some(r, 0.1, {"views": r.choice([2, 3, 17])}),
        **_some(r, 0.2, {"pv": {"batch": r.randint(1, 60)}}),
    }  # fmt: skip


def _supposed(r: Random) -> dict[str, Any]:
    """What agile paging wants of a processor, and what it can use."""
    return {"agile_paging": True, "agile_cr3": r.random() < 0.5}


def _kernel(r: Random) -> dict[str, Any]:
    return {
        **_some(r, 0.3, {"kpti": True}),
        **_some(r, 0.3, {"pcid": r.choice([True, False])}),
        **_some(r, 0.3, {"page_size": "2 MiB"}),
        **_some(r, 0.3, {"tick": r.choice(["off", "100 us", "1 ms"])}),
        **_some(r, 0.3, {"populate": "prebuilt"}),
    }


def _phase(r: Random) -> Phase:
    name = r.choice(list(PHASES))
    return {"primitive": name, **PHASES[name](r)}


def _vm(r: Random) -> dict[str, Any]:
    processes = [
        {"name": f"p{n}", "phases": [_phase(r) for _ in range(r.randint(1, 4))], **_some(r, 0.15, {"threads": 2})}
        for n in range(r.choice([1, 1, 2, 3]))
    ]
    vcpus = {"vcpus": r.choice([2, 2, 3])} if any("threads" in each for each in processes) or r.random() < 0.1 else {}
    memory = r.choice(["16 MiB", "32 MiB", "48 MiB"])
    return {"memory": memory, **vcpus, "guest": {"kernel": _kernel(r), "processes": processes}}


def scenario(r: Random) -> dict[str, Any]:
    """A scenario as YAML would give it; what no machine can be is refused later."""
    vmm = _vmm(r)
    return {
        "seed": r.randint(1, 99),
        "machine": {
            "memory": "1 GiB", "cpus": 8,
            "isa": "virtualizable" if vmm["technique"] == "trap-and-emulate" else "x86",
            **_some(r, 0.3, {"profile": r.choice(["snb-e5-2450", "nehalem-ep", "clx-6252", "p4-672"])}),
            **({"cpu": {"features": _supposed(r)}} if vmm.get("paging") == "agile" else {}),
        },
        "vmm": vmm,
        "vms": [_vm(r) for _ in range(r.choice([1, 1, 2]))],
        "run": {"limit": "10 s"},
    }  # fmt: skip
