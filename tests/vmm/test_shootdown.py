"""TLB shootdown: nobody uses a translation that was dropped everywhere, and it takes as many interrupts as it must."""

from __future__ import annotations

import pytest

from tests.vmm.shootdown import Threads, threads
from vtsim.base.memory import PAGE_BYTES
from vtsim.cpu import accounts as k
from vtsim.guest.kernel import direct_flush, smp
from vtsim.guest.kernel import layout as at
from vtsim.vmcs.reasons import REASON
from vtsim.vmm.layout import STACK_BYTES, V
from vtsim.vmm.programs import several

# Both threads fault, unmap and protect in one region; one of them shares its CPU with another process, so that it falls
# behind, and reads while the other unmaps.
ROUND = """
            - {primitive: page_fault, region: 24 KiB, iterations: 3, at: 0x100000000}
            - {primitive: stream, region: 24 KiB, accesses: 3000, at: 0x100000000}
            - {primitive: protect, region: 24 KiB, iterations: 2, at: 0x200000000}
            - {primitive: page_fault, region: 160 KiB, iterations: 1, at: 0x300000000}
            - {primitive: stream, region: 160 KiB, accesses: 3000, at: 0x300000000}
"""
ONE_REGION = f"""
machine: {{cpus: 2, memory: 256 MiB}}
vms:
  - memory: 64 MiB
    vcpus: 2
    guest:
      kernel: {{tick: 20 us}}
      processes:
        - threads: 2
          phases:{ROUND * 2}
        - {{name: other, vcpu: 1, phases: [{{primitive: syscall, iterations: 2000}}]}}
"""
SLOW = pytest.mark.compiled_only
WAYS = (
    pytest.param(("vmm.technique=native",), id="natively"),
    pytest.param(("vmm.technique=native", "vms.0.guest.kernel.kpti=true"), id="natively, KPTI", marks=SLOW),
    pytest.param(("vmm.technique=native", "vms.0.guest.kernel.pcid=false"), id="natively, no PCIDs", marks=SLOW),
    pytest.param((), id="on EPT", marks=SLOW),
    pytest.param(("vmm.personality=minimal",), id="on EPT, minimal", marks=SLOW),
    pytest.param(("vmm.paging=shadow",), id="on shadow tables", marks=SLOW),
    pytest.param(("vmm.paging=shadow", "vms.0.guest.kernel.kpti=true"), id="on shadow tables, KPTI", marks=SLOW),
    pytest.param(("vmm.paging=shadow", "vmm.personality=minimal"), id="on shadow tables, minimal", marks=SLOW),
    pytest.param(("vmm.paging=direct-pv",), id="on direct tables", marks=SLOW),
    pytest.param(("vmm.paging=direct-pv", "vmm.personality=minimal"), id="on direct tables, minimal", marks=SLOW),
    pytest.param(
        ("vmm.paging=direct-pv", "vms.0.guest.kernel.pcid=false", "vmm.pv.batch=1"), id="singly, no PCIDs", marks=SLOW
    ),
    pytest.param(("vmm.technique=paravirtual",), id="in ring 3", marks=SLOW),
)


@pytest.mark.slow
@pytest.mark.parametrize("settings", WAYS)
def test_no_cpu_uses_a_translation_that_another_has_seen_dropped(settings: tuple[str, ...]) -> None:
    ran = threads(ONE_REGION, *settings).run()

    assert ran.looked > 500


def test_a_kernel_whose_interrupt_handler_drops_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smp, "flush_as_asked", lambda a, kernel: None)

    with pytest.raises(AssertionError, match=r"^CPU [01] (has|may write)"):
        threads(ONE_REGION, "vmm.technique=native").run()


@SLOW
@pytest.mark.parametrize("way", ["vmm.paging=direct-pv", "vmm.technique=paravirtual"])
def test_a_paravirtual_kernel_that_has_no_other_vcpu_flush_is_found_out(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_flush, "flush_others", lambda a: None)

    with pytest.raises(AssertionError, match=r"^CPU [01] (has|may write)"):
        threads(ONE_REGION.replace(ROUND * 2, ROUND * 8), way).run()


# --- how often ------------------------------------------------------------------------------------------------------
PAGES, ROUNDS = 16, 6
ENABLING = 2  # writes to MSRs beside the shootdown's: each vCPU enables its APIC
APART = f"""
machine: {{cpus: 2, memory: 256 MiB}}
vms:
  - memory: 64 MiB
    vcpus: 2
    guest:
      kernel: {{tick: off}}
      processes:
        - threads: 2
          phases:
            - {{primitive: work, instructions: 20000}}
            - {{primitive: page_fault, region: {4 * PAGES} KiB, iterations: {ROUNDS}}}
            - {{primitive: work, instructions: 1000000}}
"""


def calls_of(ran: Threads, word: int) -> int:
    return sum(ran.cpu_word(cpu, word) for cpu in range(len(ran.machine.engine.cpus)))


def exits(ran: Threads, reason: str) -> int:
    engine = ran.machine.engine
    number = next(r.number for r in REASON.values() if r.name == reason)
    return int(engine.arena[engine.owners["vm0"] + k.OWN_EXITS + number * k.EXIT_WORDS + k.EXIT_COUNT])


@pytest.mark.parametrize("gathered", [PAGES, PAGES // 4])
def test_each_unmapping_interrupts_the_other_cpu_once_for_all_frames_that_fit_in_a_list(
    gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smp, "GATHERED", gathered)
    ran = threads(APART, "vmm.technique=native").run()

    assert calls_of(ran, at.CALLS_SENT) == calls_of(ran, at.TLB_CALLS) == 2 * ROUNDS * (PAGES // gathered)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [pytest.param(1, marks=SLOW), 64])
def test_a_paravirtual_kernel_interrupts_nobody_and_asks_once_for_each_unmapping(batch: int) -> None:
    ran = threads(APART, "vmm.paging=direct-pv", "vmm.personality=minimal", f"vmm.pv.batch={batch}").run()

    assert calls_of(ran, at.CALLS_SENT) == calls_of(ran, at.TLB_CALLS) == 0
    assert exits(ran, "MSR_WRITE") == ENABLING
    hypervisor = ran.machine.hypervisor
    assert hypervisor is not None
    assert hypervisor.memory_statistics(hypervisor.vcpus[0])["flushes_for_guest"] == 2 * ROUNDS


def test_a_process_with_one_thread_interrupts_nobody() -> None:
    ran = threads(APART, "vmm.technique=native", "vms.0.guest.processes.0.threads=1").run()

    assert calls_of(ran, at.CALLS_SENT) == 0


APICV = ("vmm.apicv=true",)
IPIV = (*APICV, "vmm.ipi_virtualization=true", "machine.cpu.vmx.generation=sapphire-rapids")


@pytest.mark.slow
@pytest.mark.parametrize("personality", [pytest.param("kvm", marks=SLOW), "minimal"])
def test_a_shootdown_exits_for_the_command_the_interrupt_and_its_end(personality: str) -> None:
    ran = threads(APART, f"vmm.personality={personality}").run()

    sent = 2 * ROUNDS
    assert calls_of(ran, at.CALLS_SENT) == calls_of(ran, at.TLB_CALLS) == sent
    assert exits(ran, "MSR_WRITE") == ENABLING + 2 * sent
    assert (
        0 < exits(ran, "EXTERNAL_INTERRUPT") <= sent
    )  # fewer: a vCPU that is out of its guest need not be interrupted


@pytest.mark.slow
@pytest.mark.parametrize("personality", [pytest.param("kvm", marks=SLOW), "minimal"])
@pytest.mark.parametrize(("settings", "commands"), [(APICV, 1), (IPIV, 0)], ids=["apicv", "ipi_virtualization"])
def test_with_a_local_apic_in_the_processor_at_most_the_command_exits(
    settings: tuple[str, ...], commands: int, personality: str
) -> None:
    ran = threads(APART, f"vmm.personality={personality}", *settings).run()

    sent = 2 * ROUNDS
    assert calls_of(ran, at.CALLS_SENT) == calls_of(ran, at.TLB_CALLS) == sent
    assert exits(ran, "MSR_WRITE") == ENABLING + commands * sent
    assert exits(ran, "EXTERNAL_INTERRUPT") == exits(ran, "APIC_WRITE") == exits(ran, "INTERRUPT_WINDOW") == 0


HALTING = """
machine: {cpus: 2, memory: 256 MiB}
vms:
  - memory: 64 MiB
    vcpus: 2
    guest:
      kernel: {tick: 10 ms}
      processes:
        - threads: 2
          phases:
            - {primitive: page_fault, region: 64 KiB, iterations: 3, at: 0x100000000}
            - {primitive: hlt, iterations: 1}
            - {primitive: page_fault, region: 64 KiB, iterations: 9, at: 0x100000000}
            - {primitive: idle, duration: 10 us}
            - {primitive: page_fault, region: 64 KiB, iterations: 3, at: 0x100000000}
"""


@pytest.mark.slow
@pytest.mark.parametrize("personality", [pytest.param("kvm", marks=SLOW), "minimal"])
@pytest.mark.parametrize("settings", [(), APICV, IPIV], ids=["plain", "apicv", "ipi_virtualization"])
def test_an_interrupt_of_another_vcpu_ends_a_halt(settings: tuple[str, ...], personality: str) -> None:
    """Both halt for some time, and not a tick comes: a round takes longer than the way to HLT, so one is left who asks."""
    ran = threads(HALTING, f"vmm.personality={personality}", *settings).run(longest=30_000)

    assert calls_of(ran, at.CALLS_SENT) == calls_of(ran, at.TLB_CALLS) > 0
    assert calls_of(ran, at.JIFFIES) == 0


def test_a_posted_interrupt_descriptor_is_where_the_processor_takes_it() -> None:
    assert (STACK_BYTES + V["POSTED"]) % 64 == 0
    assert STACK_BYTES + V["POSTED"] + 64 <= PAGE_BYTES
    assert max(offset for name, offset in V.items() if name != "POSTED") < V["POSTED"]


@SLOW
def test_a_run_of_several_vcpus_is_the_same_every_time() -> None:
    first, second = (threads(APART).run(seed=seed).machine.engine for seed in (1, 1))

    assert first.cpus.tolist() == second.cpus.tolist()
    assert first.owners == second.owners


# --- EPT ------------------------------------------------------------------------------------------------------------
READ_FIRST = """
vmm: {huge_pages: never}
machine: {cpus: 2, memory: 256 MiB}
vms:
  - memory: 32 MiB
    vcpus: 2
    guest:
      kernel: {tick: off, populate: prebuilt}
      processes:
        - threads: 2
          phases:
            - {primitive: stream, region: 256 KiB, accesses: 3000}
            - {primitive: stream, region: 256 KiB, accesses: 3000, write: 0.02, work: 100}
"""


@pytest.mark.slow
@pytest.mark.parametrize("personality", [pytest.param("kvm", marks=SLOW), "minimal"])
def test_no_vcpu_uses_a_translation_of_ept_that_another_has_changed(personality: str) -> None:
    ran = threads(READ_FIRST, f"vmm.personality={personality}").run()

    assert ran.looked > 100
    assert ran.machine.hypervisor is not None
    first = ran.machine.hypervisor.vcpus[0]
    assert 0 < ran.machine.hypervisor.memory_statistics(first)["remote_flushes"] <= 64  # pages that were the zero page


def test_a_hypervisor_that_asks_no_other_cpu_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "flush_as_asked", lambda a, path: None)

    with pytest.raises(AssertionError, match=r"^CPU [01] has an old translation"):
        threads(READ_FIRST).run()


IPI = """
machine: {cpus: 2, memory: 256 MiB}
vms:
  - memory: 64 MiB
    vcpus: 2
    guest:
      kernel: {tick: off}
      processes: [{threads: 2, phases: [{primitive: ipi, iterations: 7}, {primitive: ipi, iterations: 4}]}]
"""


@pytest.mark.parametrize(
    ("settings", "for_each"), [((), 2), (APICV, 1), (IPIV, 0)], ids=["plain", "apicv", "ipi_virtualization"]
)
def test_each_interrupt_from_one_vcpu_to_another_arrives(settings: tuple[str, ...], for_each: int) -> None:
    ran = threads(IPI, *settings).run()

    assert (ran.cpu_word(0, at.IPIS), ran.cpu_word(1, at.IPIS)) == (0, 7 + 4)
    assert exits(ran, "MSR_WRITE") == ENABLING + for_each * (7 + 4)


@pytest.mark.parametrize("way", ["vmm.paging=direct-pv", "vmm.technique=paravirtual"])
def test_what_a_hypervisor_keeps_of_a_vcpu_is_no_memory_of_a_vm(way: str) -> None:
    machine = threads(APART, way).machine
    hypervisor = machine.hypervisor or machine.monitor
    assert hypervisor is not None and len(hypervisor.vcpus) == 2
    kept = {
        getattr(vcpu, frame) for vcpu in hypervisor.vcpus for frame in ("page", "data", "vmcs") if hasattr(vcpu, frame)
    }

    assert len(kept) == 4
    assert not kept & set(hypervisor.vcpus[0].memory.frames.tolist())
