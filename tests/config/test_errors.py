"""What users see when a scenario is wrong: whole texts."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from vtsim.base.errors import ConfigError
from vtsim.config import load_scenario, parse_scenario

CPUID = "vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]\n"
PRIMITIVES = (
    "work, mix, stream, fill, cpuid, rdtsc, rdmsr, wrmsr, vmcall, sensitive, sensitive_user, hlt, pause, ipi, port_in, port_out, mmio_read, "
    "mmio_write, mov_from_cr8, mov_to_cr8, mov_to_cr3, syscall, fork, exec, page_fault, protect, context_switch, balloon, idle, replay, "
    "memory_trace, dma_buffers, map_file, empty, call_return, divide_error, invalid_opcode, kernel_fault, config_read, pte_write, "
    "null_io, stat, open_close, select, "
    "signal_install, signal_handle, protection_fault, process, "
    "updates, btree, netlist_swaps, cross_sections, graph_gather, key_values, watched_stores, "
    "attack_memory, attack_linear, attack_native, attack_dma, attack_update, attack_stale, attack_state, attack_state_user, attack_interrupts, "
    "attack_hypercalls, attack_time"
)


def phase(text: str) -> str:
    return f"vms:\n- guest:\n    processes:\n    - phases:\n      - {text}\n"


def error(text: str, *sets: str) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_scenario(text, sets, label="s.yaml")
    return str(raised.value)


def at(line: int, column: int, source: str) -> str:
    return f"\n{line:>5} | {source}\n      | {' ' * column}^\n"


CASES = {
    "an unknown key": (
        CPUID + "nmae: x\n",
        "s.yaml:2: unknown key 'nmae'" + at(2, 0, "nmae: x") + " help: did you mean 'name'?",
    ),
    "an unknown nested key": (
        CPUID + "run:\n  baselin: true\n",
        "s.yaml:3: run: unknown key 'baselin'" + at(3, 2, "  baselin: true") + " help: did you mean 'baseline'?",
    ),
    "a key that is like no other": (
        CPUID + "run: {x: 1}\n",
        "s.yaml:2: run: unknown key 'x'" + at(2, 6, "run: {x: 1}") + " help: keys here are limit, work_scale, baseline",
    ),
    "a wrong type": (
        CPUID + "run: {baseline: yes}\n",
        "s.yaml:2: run.baseline: 'yes' is neither true nor false"
        + at(2, 16, "run: {baseline: yes}")
        + " help: it can be true, false",
    ),
    "a balloon that leaves processes too little": (
        "vmm: {balloon: {size: 15 MiB}}\n"
        "vms: [{memory: 16 MiB, guest: {processes: [{phases: [{primitive: page_fault, region: 2 MiB}, {primitive: balloon}]}]}}]\n",
        "s.yaml:1: vmm.balloon.size: a balloon of 15 MiB and the 2 MiB that processes touch are more than the 16 MiB of vms.0"
        + at(1, 22, "vmm: {balloon: {size: 15 MiB}}")
        + " help: size can be at most 14 MiB, less what the guest's kernel needs; or raise vms.0.memory",
    ),
    "a key without a space behind its colon": (
        CPUID + "run: {limit:1 s}\n",
        "s.yaml:2: run: unknown key 'limit:1 s'"
        + at(2, 6, "run: {limit:1 s}")
        + " help: write 'limit: 1 s', with a space after the colon",
    ),
    "a primitive without a space behind its colon": (
        phase("{primitive:cpuid, iterations: 1}"),
        "s.yaml:5: vms.0.guest.processes.0.phases.0: missing key 'primitive'"
        + at(5, 8, "      - {primitive:cpuid, iterations: 1}")
        + " help: write 'primitive: cpuid', with a space after the colon",
    ),
    "a list where a value is expected": (
        CPUID + "seed: [1]\n",
        "s.yaml:2: seed: a list is not possible here" + at(2, 6, "seed: [1]") + " help: write count, 0 to 4294967295",
    ),
    "a value where a mapping is expected": (
        CPUID + "run: 5\n",
        "s.yaml:2: run: 5 is not a mapping" + at(2, 5, "run: 5") + " help: keys here are limit, work_scale, baseline",
    ),
    "a wrong unit": (
        CPUID + "run: {limit: 1 sec}\n",
        "s.yaml:2: run.limit: '1 sec' is not a duration: unknown unit 'sec'"
        + at(2, 13, "run: {limit: 1 sec}")
        + " help: a duration is written like '250 us' (ns, us, ms, s, µs), from 1 us",
    ),
    "a choice that does not exist": (
        CPUID + "vmm: {personality: kmv}\n",
        "s.yaml:2: vmm.personality: 'kmv' is not possible here"
        + at(2, 19, "vmm: {personality: kmv}")
        + " help: did you mean 'kvm'?",
    ),
    "a huge number": (
        CPUID + f"seed: {'9' * 5000}\n",
        "s.yaml:2: seed: '"
        + "9" * 56
        + "... is not a count"
        + at(2, 6, ("seed: " + "9" * 5000)[:100])
        + " help: a count is written like '10 M' (k, M, G, T), from 0 to 4294967295",
    ),
    "an impossible page size": (
        CPUID + "vmm: {ept: {page_size: 8 KiB}}\n",
        "s.yaml:2: vmm.ept.page_size: '8 KiB' is not possible here"
        + at(2, 23, "vmm: {ept: {page_size: 8 KiB}}")
        + " help: it can be 4 KiB, 2 MiB, 1 GiB",
    ),
    "a duplicate key": (
        "seed: 1\nseed: 2\n" + CPUID,
        "s.yaml:2: key 'seed' is given twice" + at(2, 0, "seed: 2") + " help: the first is in line 1",
    ),
    "a key that is not text": (
        CPUID + "1: 2\n",
        "s.yaml:2: key '1' is not text" + at(2, 0, "1: 2") + " help: put it in quotes",
    ),
    "a missing key": (
        "name: x\n",
        "s.yaml:1: nothing runs on this machine"
        + at(1, 0, "name: x")
        + " help: give it a VM under vms, or a device under dma",
    ),
    "an empty list": (
        "vms: []\n",
        "s.yaml:1: nothing runs on this machine"
        + at(1, 0, "vms: []")
        + " help: give it a VM under vms, or a device under dma",
    ),
    "a syntax error": (
        "vms: [\nname: x\n",
        "s.yaml:2: this is not YAML: expected ',' or ']', but got '<stream end>'"
        + at(2, 7, "name: x")
        + " help: look at the indentation, quotes and brackets here and just before",
    ),
    "an unknown primitive": (
        phase("primitive: cupid"),
        "s.yaml:5: vms.0.guest.processes.0.phases.0.primitive: unknown primitive 'cupid'"
        + at(5, 19, "      - primitive: cupid")
        + " help: did you mean 'cpuid'?",
    ),
    "a phase without a primitive": (
        phase("iterations: 5"),
        "s.yaml:5: vms.0.guest.processes.0.phases.0: missing key 'primitive'"
        + at(5, 8, "      - iterations: 5")
        + f" help: primitive can be {PRIMITIVES}",
    ),
    "a region larger than the VM": (
        phase("{primitive: stream, region: 10 GiB}"),
        "s.yaml:5: vms.0.guest.processes.0.phases.0.region: the processes touch 10 GiB, but the VM has 1 GiB"
        + at(5, 36, "      - {primitive: stream, region: 10 GiB}")
        + " help: make the region smaller or raise vms.0.memory",
    ),
    "a table without a line": (
        phase("{primitive: updates, table: 63 B}"),
        "s.yaml:5: vms.0.guest.processes.0.phases.0.table: '63 B' is less than 64 B"
        + at(5, 36, "      - {primitive: updates, table: 63 B}")
        + " help: a size is written like '2 MiB' (B, KiB, MiB, GiB, TiB, kB, MB, GB), from 64 B",
    ),
    "a division that does not end": (
        phase("{primitive: updates, division: 1001}"),
        "s.yaml:5: vms.0.guest.processes.0.phases.0.division: 1001 is more than 1 k"
        + at(5, 39, "      - {primitive: updates, division: 1001}")
        + " help: a count is written like '10 M' (k, M, G, T), from 0 to 1 k",
    ),
    "a guest larger than the machine": (
        CPUID + "machine: {memory: 512 MiB}\n",
        "s.yaml:1: vms.0.memory: 1 GiB is more than the 512 MiB of memory of the machine"
        + at(1, 6, CPUID.rstrip())
        + " help: memory can be at most 512 MiB; or raise machine.memory",
    ),
    "overlapping regions": (
        phase("{primitive: stream, region: 8 KiB, at: 0x1000}")
        + "      - {primitive: stream, region: 8 KiB, at: 0x2000}\n",
        "s.yaml:6: vms.0.guest.processes.0.phases.1.at: the region 0x2000 to 0x3fff overlaps that of phase 0, "
        "0x1000 to 0x2fff"
        + at(6, 47, "      - {primitive: stream, region: 8 KiB, at: 0x2000}")
        + " help: give both phases the same address and size to share a region",
    ),
    "a region that begins within a page": (
        phase("{primitive: stream, at: 0x1234}"),
        "s.yaml:5: vms.0.guest.processes.0.phases.0.at: 0x1234 is not where a page begins"
        + at(5, 32, "      - {primitive: stream, at: 0x1234}")
        + " help: the page begins at 0x1000",
    ),
    "a CPU that does not exist": (
        "vms:\n- cpu: 2\n  guest: {processes: [{phases: [{primitive: cpuid}]}]}\nmachine: {cpus: 2}\n",
        "s.yaml:2: vms.0.cpu: there is no CPU 2 on a machine whose number of CPUs is 2"
        + at(2, 7, "- cpu: 2")
        + " help: cpu can be 0, 1; or raise machine.cpus",
    ),
    "an unknown profile": (
        CPUID + "machine:\n  profile: skx-4141\n",
        "s.yaml:3: machine.profile: unknown profile 'skx-4141'"
        + at(3, 11, "  profile: skx-4141")
        + " help: did you mean 'skx-4114'?",
    ),
    "an unknown profile value": (
        CPUID + "machine:\n  cpu:\n    pwc.pde.entriess: 0\n",
        "s.yaml:4: machine.cpu.pwc.pde.entriess: unknown profile value 'pwc.pde.entriess'"
        + at(4, 22, "    pwc.pde.entriess: 0")
        + " help: did you mean 'pwc.pde.entries'?",
    ),
    "a time for cycles": (
        CPUID + "machine:\n  cpu:\n    transitions.vm_exit_cycles: 2ns\n",
        "s.yaml:4: machine.cpu.transitions.vm_exit_cycles: '2ns' is not a count: unknown unit 'ns'"
        + at(4, 32, "    transitions.vm_exit_cycles: 2ns")
        + " help: write a whole number of cycles, 0 to 1099511627776",
    ),
    "a size for nanoseconds": (
        CPUID + "machine:\n  cpu: {dram: {local_ns: 4 KiB}}\n",
        "s.yaml:3: machine.cpu.dram.local_ns: '4 KiB' is not a duration: unknown unit 'KiB'"
        + at(3, 25, "  cpu: {dram: {local_ns: 4 KiB}}")
        + " help: write a whole number of ns, 1 to 100000, or a duration like '250 us'",
    ),
    "a time for a capacity": (
        CPUID + "machine:\n  cpu: {cache.l2.bytes: 2 ms}\n",
        "s.yaml:3: machine.cpu.cache.l2.bytes: '2 ms' is not a size: unknown unit 'ms'"
        + at(3, 24, "  cpu: {cache.l2.bytes: 2 ms}")
        + " help: write a whole number of bytes, 0 to 17179869184, or a size like '2 MiB'",
    ),
    "a profile value that is too large for any": (
        CPUID + "machine:\n  cpu: {walkers: 1e30}\n",
        "s.yaml:3: machine.cpu.walkers: 1e+30 is more than any profile value can be"
        + at(3, 17, "  cpu: {walkers: 1e30}")
        + " help: write a whole number of walkers, 1 to 8",
    ),
    "nothing for a feature": (
        CPUID + "machine:\n  cpu: {features.nx: }\n",
        "s.yaml:3: machine.cpu.features.nx: nothing is not a profile value"
        + at(3, 20, "  cpu: {features.nx: }")
        + " help: write true or false",
    ),
    "a time for a path length": (
        CPUID + "vmm:\n  parameters: {cpuid: 2ns}\n",
        "s.yaml:3: vmm.parameters.cpuid: '2ns' is not a count: unknown unit 'ns'"
        + at(3, 22, "  parameters: {cpuid: 2ns}")
        + " help: write a whole number, 0 to 4,611,686,018,427,387,904",
    ),
    "VM exits of no cycles": (
        CPUID + "machine:\n  cpu: {transitions.vm_exit_cycles: -0}\n",
        "s.yaml:3: machine.cpu.transitions.vm_exit_cycles: 0 cycles for a VM exit is a processor without VMX, "
        "which technique 'hardware' needs"
        + at(3, 36, "  cpu: {transitions.vm_exit_cycles: -0}")
        + " help: write 1 or more; or vmm.technique can be binary-translation, dynamic-translation, interpreter, "
        "native, paravirtual, trap-and-emulate, user-mode",
    ),
    "the former key of paging modes": (
        "vms:\n- guest:\n    kernel: {paging_levels: 5}\n    processes: [{phases: [{primitive: cpuid}]}]\n",
        "s.yaml:3: vms.0.guest.kernel: unknown key 'paging_levels'"
        + at(3, 13, "    kernel: {paging_levels: 5}")
        + " help: this is paging now: write 'paging: 5-level'",
    ),
    "the former key of paging modes with a value that never was": (
        "vms:\n- guest:\n    kernel: {paging_levels: 3}\n    processes: [{phases: [{primitive: cpuid}]}]\n",
        "s.yaml:3: vms.0.guest.kernel: unknown key 'paging_levels'"
        + at(3, 13, "    kernel: {paging_levels: 3}")
        + " help: this is paging now: write 'paging: 4-level' or 'paging: 5-level'",
    ),
    "an impossible TLB": (
        CPUID + "machine:\n  cpu: {tlb: {stlb: {ways: 7}}}\n",
        "s.yaml:3: machine.cpu.tlb.stlb.ways: 1536 entries in 7 ways is 219.429 sets, "
        "and the set index needs a power of two"
        + at(3, 27, "  cpu: {tlb: {stlb: {ways: 7}}}")
        + " help: ways can be 3, 6, 12, 24, 48",
    ),
    "a way of paging that the processor does not have": (
        CPUID + "vmm:\n  paging: ept\nmachine: {profile: p4-672}\n",
        "s.yaml:3: vmm.paging: this needs EPT (ENABLE_EPT), which profile 'p4-672' does not have"
        + at(3, 10, "  paging: ept")
        + " help: profiles that have it: clx-6252, clx-8269cy, nehalem-ep, skx-4114, snb-e5-2450; "
        "or vmm.paging 'shadow', which can do without",
    ),
    "a missing trace": (
        phase("{primitive: replay, trace: no.npz}"),
        "s.yaml:5: vms.0.guest.processes.0.phases.0.trace: there is no file 'no.npz'"
        + at(5, 35, "      - {primitive: replay, trace: no.npz}")
        + " help: the name is relative to the scenario's folder",
    ),
    "a HLT that nothing ends": (
        "vms:\n- guest:\n    kernel: {tick: off}\n    processes: [{phases: [{primitive: hlt}]}]\n",
        "s.yaml:3: vms.0.guest.kernel.tick: without a timer tick nothing ends a HLT of primitive 'hlt'"
        + at(3, 19, "    kernel: {tick: off}")
        + " help: give the kernel a tick, like '4 ms'",
    ),
    "an alias inside what it stands for": (
        "vms: &v [*v]\n",
        "s.yaml:1: an alias inside what it stands for" + at(1, 5, "vms: &v [*v]").rstrip("\n"),
    ),
    "walks of a program where the processor walks": (
        CPUID + "vmm: {paging: software}\n",
        "s.yaml:2: vmm.paging: technique 'hardware' lets the processor walk tables, and no program"
        + at(2, 14, "vmm: {paging: software}")
        + " help: paging can be auto, ept, shadow, agile, direct-pv",
    ),
    "exit clusters where tables hold the host's addresses": (
        CPUID + "vmm: {paging: direct-pv, features: {exit_clustering: true}}\n",
        "s.yaml:2: vmm.features.exit_clustering: an exit cluster follows a guest's tables to its code, and direct ones hold "
        "the host's addresses"
        + at(2, 53, "vmm: {paging: direct-pv, features: {exit_clustering: true}}")
        + " help: exit_clustering can be false; or choose paging ept, shadow",
    ),
    "a remapping unit in front of no device": (
        "vms:\n- viommu: caching\n  guest: {processes: [{phases: [{primitive: cpuid}]}]}\n",
        "s.yaml:2: vms.0.viommu: a VM that drives no device has none that its remapping unit could be in front of"
        + at(2, 10, "- viommu: caching")
        + " help: viommu can be none; or let a process of it drive a device with primitive dma_buffers",
    ),
    "no translation for a program that walks": (
        CPUID + "vmm: {technique: interpreter, paging: none}\n",
        "s.yaml:2: vmm.paging: technique 'interpreter' needs its guests' memory translated"
        + at(2, 38, "vmm: {technique: interpreter, paging: none}")
        + " help: paging can be auto, software; none with technique native",
    ),
    "what is wrong is left out": (
        CPUID + "vmm:\n  technique: interpreter\n  sharing: {on: true}\n",
        "s.yaml:2: vmm.paging: memory is taken back from VMs on EPT only"
        + at(2, 0, "vmm:")
        + " help: paging can be ept; or leave out sharing, collapse, swap, balloon",
    ),
    "a kernel whose lengths were not counted": (
        CPUID + "vmm: {lengths: linux-5.4}\n",
        "s.yaml:2: vmm.lengths: 'linux-5.4' is not possible here"
        + at(2, 15, "vmm: {lengths: linux-5.4}")
        + " help: did you mean 'linux-6.1' or 'linux-4.19'?",
    ),
    "a processor without VMX and its mitigations": (
        CPUID + "machine:\n  profile: xeon-2003\nvmm:\n  mitigations:\n    mds: full\n",
        "s.yaml:3: machine.profile: technique 'hardware' needs VMX, which profile 'xeon-2003' does not have"
        + at(3, 11, "  profile: xeon-2003")
        + " help: profiles that have it: clx-6252, clx-8269cy, nehalem-ep, p4-672, skx-4114, snb-e5-2450; "
        "or vmm.technique can be binary-translation, dynamic-translation, interpreter, native, paravirtual, "
        "trap-and-emulate, user-mode\n\n"
        "s.yaml:6: vmm.mitigations.mds: xeon-2003 has no microcode for it"
        + at(6, 9, "    mds: full")
        + " help: leave it out; or choose machine.profile clx-6252, clx-8269cy, nehalem-ep, skx-4114, snb-e5-2450",
    ),
    "no view of memory": (
        CPUID + "vmm: {views: 0}\n",
        "s.yaml:2: vmm.views: 0 is less than 1"
        + at(2, 13, "vmm: {views: 0}")
        + " help: a count is written like '10 M' (k, M, G, T), from 1 to 512",
    ),
    "more views than a list has room for": (
        CPUID + "vmm: {views: 600}\n",
        "s.yaml:2: vmm.views: 600 is more than 512"
        + at(2, 13, "vmm: {views: 600}")
        + " help: a count is written like '10 M' (k, M, G, T), from 1 to 512",
    ),
    "views on a processor without VM functions": (
        CPUID + "machine: {profile: nehalem-ep}\nvmm: {views: 2}\n",
        "s.yaml:3: vmm.views: this needs EPTP switching by VMFUNC (EPTP_SWITCHING), which profile 'nehalem-ep' does not have"
        + at(3, 13, "vmm: {views: 2}")
        + " help: profiles that have it: clx-6252, clx-8269cy, skx-4114",
    ),
    "views on shadow tables": (
        CPUID + "vmm: {views: 2, paging: shadow}\n",
        "s.yaml:2: vmm.views: views of memory are tables of EPT, and paging 'shadow' has none of a guest's own"
        + at(2, 13, "vmm: {views: 2, paging: shadow}")
        + " help: views can be 1; or choose technique hardware with paging ept",
    ),
    "views of large pages": (
        CPUID + "vmm: {views: 2, ept: {page_size: 2 MiB}}\n",
        "s.yaml:2: vmm.ept.page_size: views differ in rights of single pages"
        + at(2, 33, "vmm: {views: 2, ept: {page_size: 2 MiB}}")
        + " help: page_size can be 4 KiB; or views 1",
    ),
    "views of memory that is taken back": (
        CPUID + "vmm: {views: 2, sharing: {on: true}}\n",
        "s.yaml:2: vmm.sharing.on: memory would be taken back in one view only"
        + at(2, 30, "vmm: {views: 2, sharing: {on: true}}")
        + " help: leave it out; or views 1",
    ),
    "views of a VM with several vCPUs": (
        "machine: {cpus: 2}\nvmm: {views: 2}\nvms:\n- vcpus: 2\n  guest: {processes: [{phases: [{primitive: cpuid}]}]}\n",
        "s.yaml:4: vms.0.vcpus: views of memory are built for VMs of one vCPU"
        + at(4, 9, "- vcpus: 2")
        + " help: vcpus can be 1; or vmm.views 1",
    ),
    "a switch between views where there is one": (
        phase("{primitive: watched_stores, by: vmfunc}"),
        "s.yaml:5: vms.0.guest.processes.0.phases.0.by: this VM has one view of its memory, in which nothing is protected"
        + at(5, 40, "      - {primitive: watched_stores, by: vmfunc}")
        + " help: by can be nobody; or give it more: vmm.views 2",
    ),
    "virtualization exceptions of a processor without": (
        phase("{primitive: watched_stores, by: exception}")
        + "vmm: {views: 2}\nmachine: {cpu: {vmx.generation: haswell}}\n",
        "s.yaml:5: vms.0.guest.processes.0.phases.0.by: this needs virtualization exceptions (EPT_VIOLATION_VE), which "
        "profile 'skx-4114' does not have"
        + at(5, 40, "      - {primitive: watched_stores, by: exception}")
        + " help: by can be nobody, exit, vmfunc, vmcall",
    ),
    "pages beside those that are watched, more than memory": (
        phase("{primitive: watched_stores, pages: 512, region: 15 MiB}") + "  memory: 16 MiB\n",
        "s.yaml:5: vms.0.guest.processes.0.phases.0.region: the processes touch 17 MiB, but the VM has 16 MiB"
        + at(5, 56, "      - {primitive: watched_stores, pages: 512, region: 15 MiB}")
        + " help: make the region smaller or raise vms.0.memory",
    ),
    "an empty file": (
        "# nothing\n",
        "s.yaml:1: there is nothing in it"
        + at(1, 0, "# nothing")
        + " help: the smallest scenario is 'vms: [{guest: {processes: [{phases: [{primitive: cpuid}]}]}}]'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_error_shows_where_what_and_what_would_be_accepted(case: str) -> None:
    text, expected = CASES[case]

    assert error(text) == expected


def test_all_errors_of_a_file_are_reported_at_once_in_line_order() -> None:
    text = "seed: x\nrun: {limit: 1, nope: 2}\n" + phase("{primitive: cpuid, leaf: y}") + "vmm: {vpid: 1}\n"

    found = [line.split(": ")[0] for line in error(text).splitlines() if line.startswith("s.yaml")]
    assert found == ["s.yaml:1", "s.yaml:2", "s.yaml:2", "s.yaml:7", "s.yaml:8"]


def test_an_alias_bomb_is_refused() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20))

    assert error(bomb + CPUID).startswith("s.yaml:1: more than 100000 values once aliases are expanded")


def test_a_shared_alias_is_what_it_stands_for() -> None:
    text = "vms:\n- guest: &g {processes: [{phases: [{primitive: cpuid}]}]}\n- guest: *g\n"

    scenario = parse_scenario(text)
    assert scenario.vms[0].guest == scenario.vms[1].guest
    assert [vm.name for vm in scenario.vms] == ["vm0", "vm1"]


def test_deep_nesting_is_refused() -> None:
    assert "nested more than 40 levels deep" in error("[" * 5000)
    assert "nested more than 40 levels deep" in error("vms: " + "[" * 50 + "]" * 50)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "missing.yaml",
            None,
            "cannot be read: No such file or directory\n help: give the path of a scenario file",
        ),
        (
            "b.yaml",
            b"\xff\xfe\x00",
            "this is not a text file: byte 0xff at 0\n help: a scenario is YAML in UTF-8",
        ),
        ("c.yaml", b"x" * 300_000, "this is too large for a scenario\n help: the limit is 262144 bytes"),
    ],
)
def test_what_is_not_a_scenario_file_is_refused(
    tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigError) as raised:
        load_scenario(path)
    assert str(raised.value) == f"{path}: {expected}"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no device that never ends")
def test_a_file_without_end_is_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        load_scenario("/dev/zero")
    assert str(raised.value) == "/dev/zero: this is too large for a scenario\n help: the limit is 262144 bytes"


def test_every_unknown_parameter_of_the_personality_is_shown_with_its_line() -> None:
    text = CPUID + "vmm:\n  parameters:\n    exit_comon: 1\n    cpuid: -1\n"

    assert error(text) == (
        "s.yaml:4: vmm.parameters.exit_comon: unknown parameter 'exit_comon'"
        + at(4, 16, "    exit_comon: 1")
        + " help: did you mean 'exit_common'?\n\n"
        "s.yaml:5: vmm.parameters.cpuid: -1 is not a whole number, 0 or more"
        + at(5, 11, "    cpuid: -1")
        + " help: cpuid is a number of instructions, 0 to 4,611,686,018,427,387,904"
    )


def test_control_characters_are_refused_with_their_line() -> None:
    assert error("name: x\nseed: \x00\n").startswith("s.yaml:2: a character that no text file has")


@given(st.text(max_size=200))
@example("%YAML 1.1\n---\na: 1:30\n")
@example("!!python/object:os.system x")
@example("? - a\n: b")
@example("&a a: *b")
@example("<<: *a")
@example("a: !!int x")
@example("--- |\n  x\n...\n--- b")
@example("vms: [{guest: {processes: [{phases: [{primitive: [cpuid]}]}]}}]")
def test_nonsense_gives_a_config_error_and_nothing_else(text: str) -> None:
    try:
        parse_scenario(text)
    except ConfigError as error:
        assert str(error)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "off", "4 KiB", "cpuid", "stream", "0x10"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "vms",
                    "guest",
                    "processes",
                    "phases",
                    "primitive",
                    "kernel",
                    "run",
                    "machine",
                    "cpu",
                    "vmm",
                    "ept",
                    "at",
                ]
            )
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
)


@given(VALUES)
def test_a_document_of_any_shape_gives_a_config_error_and_nothing_else(value: object) -> None:
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump({"vms": [{"guest": value}], "run": value, "machine": value}, text)
    try:
        parse_scenario(text.getvalue())
    except ConfigError as error:
        assert str(error)


@given(st.text(max_size=60), st.text(max_size=20))
@example("vms.0", "[")
@example("vms.00000000", "1")
@example("vms.²", "1")
@example("machine.cpu.x.y", "{a: [1]}")
@example("seed", "&a [*a]")
def test_nonsense_after_set_gives_a_config_error_and_nothing_else(path: str, value: str) -> None:
    try:
        parse_scenario(CPUID, [f"{path}={value}"])
    except ConfigError as error:
        assert str(error)


def test_what_is_left_out_is_shown_where_the_settings_around_it_are_written() -> None:
    sets = ["vmm.sharing.on=true", "vmm.technique=interpreter"]

    assert error(CPUID + "vmm:\n  lengths: linux-6.1\n", *sets).startswith("s.yaml:2: vmm.paging: ")
    assert error(CPUID, *sets).startswith("--set vmm.sharing.on=true: vmm.paging: ")


def test_what_only_the_answer_to_auto_rules_out_has_its_place() -> None:
    text = """\
vmm: {technique: binary-translation, dirty_log: {method: pml}}
vms: [{guest: {processes: [{phases: [{primitive: process, pages: 1}]}]}}]
"""
    with pytest.raises(ConfigError) as raised:
        parse_scenario(text, ["vms.0.guest.processes.0.phases.0.written=1"])
    with pytest.raises(ConfigError) as too_many:
        parse_scenario(text)

    assert [(each.path, each.line) for each in raised.value.problems] == [("vmm.dirty_log.method", 1)]
    assert [each.path for each in too_many.value.problems] == ["vms.0.guest.processes.0.phases.0.written"]


@pytest.mark.parametrize(
    ("paging", "sets", "expected"),
    [
        (
            "PAE", ("vmm.technique=paravirtual",),
            "--set vmm.technique=paravirtual: vmm.technique: a guest with PAE paging has ring 0, or VT-x below it\n"
            " help: technique can be native, hardware; or guest.kernel.paging '4-level'",
        ),
        (
            "32-bit", ("vmm.paging=direct-pv",),
            "--set vmm.paging=direct-pv: vmm.paging: a guest with 32-bit paging has tables of its own, which it writes itself\n"
            " help: paging can be auto, ept, shadow, agile; or guest.kernel.paging '4-level'",
        ),
        (
            "5-level", ("vmm.technique=binary-translation",),
            "--set vms.0.guest.kernel.paging=5-level: vms.0.guest.kernel.paging: technique 'binary-translation' has shadow "
            "tables of four levels\n help: paging can be 4-level",
        ),
        (
            "5-level", ("vmm.paging=direct-pv",),
            "--set vms.0.guest.kernel.paging=5-level: vms.0.guest.kernel.paging: a paravirtual kernel has tables of four levels\n"
            " help: paging can be 4-level; or choose vmm.paging 'ept', 'shadow'",
        ),
    ],
)  # fmt: skip
def test_a_paging_mode_that_cannot_be_is_one_problem(paging: str, sets: tuple[str, ...], expected: str) -> None:
    assert error(CPUID, f"vms.0.guest.kernel.paging={paging}", "vms.0.memory=64 MiB", *sets) == expected


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("vmm.parameters.cpuid", "1e30", "1e+30 is more than any parameter can be"),
        ("vmm.parameters.cpuid", "-1e30", "-1e+30 is less than any parameter can be"),
        ("vmm.parameters.cpuid", "[1]", "a list is not a parameter"),
    ],
)
def test_a_parameter_that_is_too_large_is_told_how_large_it_can_be(setting: str, value: str, message: str) -> None:
    assert error(CPUID, f"{setting}={value}") == (
        f"--set {setting}={value}: {setting}: {message}\n help: write a whole number, 0 to 4,611,686,018,427,387,904"
    )


def test_a_whole_number_may_be_written_as_a_power_of_ten() -> None:
    assert dict(parse_scenario(CPUID, ["vmm.parameters.cpuid=1e3"]).vmm.parameters) == {"cpuid": 1000.0}
