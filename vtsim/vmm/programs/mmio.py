"""Memory without a slot: misconfigured entries, and the emulator that executes the instruction instead.

An entry for device memory is misconfigured on purpose, so that later accesses exit with EPT_MISCONFIG and need no
search; a shadow entry has a reserved bit set instead, which the page fault's error code tells. The local
APIC's page is a slot of its own that is never mapped.

SDM: "EPT Misconfigurations"; "EPT Translation Mechanism".
Not modelled: instructions other than loads and stores; operands across pages; generations of MMIO entries.
"""

from __future__ import annotations

from vtsim.base.memory import LOCAL_APIC
from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.cpu.kernels import hooks
from vtsim.cpu.kernels.shadow_hooks import SHADOW_MAP_DEVICE, SHADOW_WALK
from vtsim.cpu.slots import R8, R9, R10, R12, R13, R14, R15, RAX, RBX, RCX, RDI, RDX, RSI
from vtsim.ept import spec as e
from vtsim.ept.shadow import NARROW, POOL
from vtsim.vmm import layout as at
from vtsim.vmm.memory import GIB
from vtsim.vmm.programs import several, shadow_shared, viommu
from vtsim.vmm.programs.ept import MMIO_ENTRY
from vtsim.vmm.programs.ept_leaf import LARGE
from vtsim.vmm.programs.ports import DEVICE_WORDS, wake_server
from vtsim.vmm.programs.words import LOW, vcpu, work, zero
from vtsim.vmm.registry import Path

IO_APIC = 0xFEC00  # a page number
CR0_PG, CR4_LA57 = 1 << 31, 1 << 12


def misconfiguration(a: Assembler, path: Path) -> None:
    """An access to memory that is known to be a device's."""
    a.activity = ops.DEVICE_EMULATION
    a.vmread(R13, "GUEST_PHYSICAL_ADDRESS")
    if path.parameters.get("fast_mmio", 0):
        find_event(a, "slow_mmio")
        work(a, path, "in_kernel_device")
        work(a, path, "eventfd")
        wake_server(a, path)
        a.jmp("skip")
        a.label("slow_mmio")
    work(a, path, "misconfiguration")
    a.jmp("emulate")


def find_event(a: Assembler, otherwise: str) -> None:
    """On where a write to R13 only raises an event, else to a label. Clobbers RAX RCX RDX RSI RDI."""
    a.ld(RDX, vcpu("EVENT_ENTRIES"))
    a.test(RDX, register=RDX)
    a.jcc(ops.CC_Z, otherwise)
    a.copy(RSI, R13)
    a.ld(RDI, vcpu("EVENTS"))
    a.mov(RCX, DEVICE_WORDS)
    a.hook(hooks.FIND)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, otherwise)


def emulator(a: Assembler, path: Path) -> None:
    """`no_slot`, `emulate_or_retry`, `emulate` (address in R13); `load_completed` (value in RAX), `skip_decoded`."""
    a.activity = ops.DEVICE_EMULATION
    a.label("no_slot")
    work(a, path, "make_mmio_entry")
    if path.vmm.on_shadow:
        shadow_shared.begin(a, path, at.FOR_SHADOWING)
        if path.several:
            a.call("shadow_verify")
            a.jcc(ops.CC_NZ, "reenter_unlocked")
        a.ld(RDI, vcpu("SHADOW"))
        a.hook(SHADOW_MAP_DEVICE)
        a.call("shadow_settle")
        shadow_shared.end(a, path)
    elif path.vmm.paging == "ept":
        several.lock_tables(a, path)
        a.copy(RDX, R13)
        a.and_(RDX, e.ADDRESS)
        a.or_(RDX, MMIO_ENTRY)
        a.mov(RCX, 1)
        a.call("write_ept")
        several.unlock_tables(a, path)
    a.jmp("emulate")

    a.label("emulate_or_retry")  # a load is first tried again: KVM hopes that the mapping came back meanwhile
    a.test(R12, e.Q_WRITE)
    a.jcc(ops.CC_NZ, "emulate")
    a.vmread(R14, "GUEST_RIP")
    a.ld(RAX, vcpu("RETRY_RIP"))
    a.cmp(RAX, register=R14)
    a.jcc(ops.CC_NZ, "retry")
    a.ld(RAX, vcpu("RETRY_GPA"))
    a.cmp(RAX, register=R13)
    a.jcc(ops.CC_Z, "emulate")
    a.label("retry")
    work(a, path, "retry")
    keep_pages(a, path)
    a.call("fetch_at")
    release_pages(a, path)
    a.st(vcpu("RETRY_RIP"), R14)
    a.st(vcpu("RETRY_GPA"), R13)
    a.jmp("reenter")

    a.label("emulate")
    zero(a, RAX)
    a.st(vcpu("RETRY_RIP"), RAX)
    work(a, path, "emulate")
    keep_pages(a, path)
    a.call("fetch_instruction")
    a.copy(RSI, R14)
    a.hook(hooks.DECODE)
    release_pages(a, path)
    a.st(vcpu("DECODED", 0), RCX)
    a.st(vcpu("DECODED", 1), RDX)
    decoded_at(a)
    zero(a, R12)
    a.cmp(RAX, ops.LD)
    a.jcc(ops.CC_Z, "emulate_address")
    a.cmp(RAX, ops.ST)
    a.jcc(ops.CC_NZ, "unexpected")
    a.mov(R12, 1)
    a.cmp(RCX, 16)
    a.jcc(ops.CC_Z, "emulate_address")
    a.ld(RBX, Mem(R15, at.V["REGISTERS"], index=RCX, scale=8))
    a.label("emulate_address")
    a.copy(RAX, RBX)
    a.copy(RCX, R13)
    a.shr(RCX, 12)
    a.cmp(RCX, LOCAL_APIC)
    a.jcc(ops.CC_Z, "local_apic")
    if "viommu" in path.addresses:
        a.cmp(RCX, at.UNIT_FRAME)
        a.jcc(ops.CC_Z, "viommu")
    a.cmp(RCX, IO_APIC)
    a.jcc(ops.CC_NZ, "memory_request")
    a.ld(RDI, vcpu("IO_APIC_PAGE"))
    a.jmp("kernel_registers")
    a.label("local_apic")
    a.ld(RDI, vcpu("APIC_PAGE"))
    a.test(R12, register=R12)
    a.jcc(ops.CC_Z, "kernel_registers")
    a.copy(RCX, R13)
    a.and_(RCX, 0xFF0)
    a.st(Mem(RDI, 0, index=RCX, size=4), RAX)
    a.shr(RCX, 4)
    a.call("apic_write")
    a.jmp("skip_decoded")
    a.label("kernel_registers")
    work(a, path, "in_kernel_device")
    a.copy(RCX, R13)
    a.and_(RCX, 0xFFC)
    a.test(R12, register=R12)
    a.jcc(ops.CC_NZ, "kernel_store")
    a.ld(RAX, Mem(RDI, 0, index=RCX, size=4))
    a.jmp("load_completed")
    a.label("kernel_store")
    a.st(Mem(RDI, 0, index=RCX, size=4), RAX)

    a.label("skip_decoded")
    _step_over_decoded(a, path)

    a.label("load_completed")
    a.ld(RDX, vcpu("DECODED", 1))
    for size, mask in ((1, 0xFF), (2, 0xFFFF), (4, LOW)):
        a.cmp(RDX, size)
        a.jcc(ops.CC_NZ, f"load_not_{size}")
        a.and_(RAX, mask)
        a.label(f"load_not_{size}")
    a.ld(RCX, vcpu("DECODED", 0))
    a.st(Mem(R15, at.V["REGISTERS"], index=RCX, scale=8), RAX)
    a.jmp("skip_decoded")
    if "viommu" in path.addresses:
        viommu.registers(a, path)
    fetch(a, path)


def decoded_at(a: Assembler) -> None:
    """The guest goes on behind the instruction at R14, of which R9 bytes were decoded. Changes R9."""
    a.add(R9, register=R14)
    a.st(vcpu("DECODED", 2), R9)


def _step_over_decoded(a: Assembler, path: Path) -> None:
    """GUEST_RIP behind the instruction that was decoded, and on to the guest; RDX changes."""
    a.ld(RDX, vcpu("DECODED", 2))
    if path.vmm.features.exit_clustering:
        a.jmp("cluster")
        return
    a.vmwrite("GUEST_RIP", RDX)
    a.jmp("reenter")


def fetch(a: Assembler, path: Path) -> None:
    """`fetch_instruction`: R14 <- the guest's RIP, RDI <- where the host sees its bytes, by the guest's own tables.

    A recorded guest has no instruction bytes: RDI is 0 then. `fetch_at`: the same with the guest's RIP in R14;
    `linear_memory`: for the linear address R14.
    """
    a.label("fetch_instruction")
    a.vmread(R14, "GUEST_RIP")
    a.label("fetch_at")
    zero(a, RDI)
    a.copy(RAX, R14)
    a.shr(RAX, 40)
    a.cmp(RAX, ops.REPLAY_BASE >> 40)
    a.jcc(ops.CC_Z, "fetched")
    a.label("linear_memory")
    a.copy(RSI, R14)
    a.vmread(RAX, "CR0_READ_SHADOW" if path.vmm.on_shadow else "GUEST_CR0")
    a.test(RAX, CR0_PG)
    a.jcc(ops.CC_Z, "fetch_bytes")
    if path.vmm.on_shadow:
        a.ld(RDI, vcpu("SHADOW"))
        a.ld(RAX, Mem(RDI, POOL["MODE"]))
        a.test(RAX, NARROW)
        a.jcc(ops.CC_NZ, "fetch_narrow")
        a.ld(RBX, vcpu("SHADOW_CR3"))
    else:
        a.vmread(RBX, "GUEST_CR3")
    if path.profile.features.la57:
        a.vmread(RCX, "CR4_READ_SHADOW" if path.vmm.on_shadow else "GUEST_CR4")
        a.test(RCX, CR4_LA57)
        a.jcc(ops.CC_Z, "fetch_level_4")
    for level in (5, 4, 3, 2, 1) if path.profile.features.la57 else (4, 3, 2, 1):
        shift = 3 + 9 * level
        if level == 4:
            a.label("fetch_level_4")
        a.copy(RSI, R14)
        a.shr(RSI, shift)
        a.and_(RSI, 511)
        a.shl(RSI, 3)
        a.and_(RBX, e.ADDRESS)
        a.or_(RSI, register=RBX)
        _reach(a, path)
        a.ld(RBX, Mem(RDI))
        a.test(RBX, e.PTE_PRESENT)
        a.jcc(ops.CC_Z, "fetch_failed")
        if level in (3, 2):
            a.test(RBX, e.PTE_LARGE)
            a.jcc(ops.CC_Z, f"fetch_table_{level}")
        if level < 4:
            within = (1 << shift) - 1
            a.and_(RBX, e.ADDRESS & ~within)
            a.copy(RSI, R14)
            a.and_(RSI, within)
            a.or_(RSI, register=RBX)
            a.jmp("fetch_bytes")
        if level in (3, 2):
            a.label(f"fetch_table_{level}")
    if path.vmm.on_shadow:
        a.jmp("fetch_bytes")
        a.label("fetch_narrow")  # PAE or 32-bit paging: as for a fault
        zero(a, RDX)
        a.hook(SHADOW_WALK)
        a.test(RAX, register=RAX)
        a.jcc(ops.CC_NZ, "fetch_failed")
        a.copy(RSI, RCX)
    a.label("fetch_bytes")
    _reach(a, path)
    a.label("fetched")
    a.ret()

    a.label("guest_memory")  # RDI <- the host's address of guest-physical RSI; RAX RCX RDX R8 R10 change
    a.mov(RAX, at.USER_RAM)
    a.add(RSI, register=RAX)
    a.ld(RDI, vcpu("HOST_ROOT"))
    a.mov(R8, at.HOST_DIRECT)
    a.mov(R10, e.PTE_PRESENT)
    a.hook(hooks.TABLE_LOOKUP)
    a.test(RAX, register=RAX)
    a.jcc(ops.CC_Z, "fetch_failed")
    a.and_(RAX, e.ADDRESS)
    a.copy(RDI, RSI)
    a.cmp(RDX, 2)
    a.jcc(ops.CC_Z, "guest_memory_large")
    if path.vmm.largest_page > LARGE:
        a.jcc(ops.CC_A, "guest_memory_larger")
    a.and_(RDI, 0xFFF)
    a.jmp("guest_memory_found")
    if path.vmm.largest_page > LARGE:
        a.label("guest_memory_larger")
        a.and_(RAX, ~(GIB - 1))
        a.and_(RDI, GIB - 1)
        a.jmp("guest_memory_found")
    a.label("guest_memory_large")
    a.and_(RAX, ~(LARGE - 1))
    a.and_(RDI, LARGE - 1)
    a.label("guest_memory_found")
    a.add(RDI, register=RAX)
    a.add(RDI, register=R8)
    a.ret()
    a.label("fetch_failed")
    a.copy(4, R15, comment="the stack is given up")
    a.jmp("reenter_unlocked" if _pages_go(path) else "unexpected")  # the guest finds it again, or what is wrong


def _reach(a: Assembler, path: Path) -> None:
    """RDI <- the host's address of what a guest's table says, RSI: a frame of the host where tables are direct."""
    if path.vmm.paging != "direct-pv":
        a.call("guest_memory")
        return
    a.mov(RDI, at.HOST_DIRECT)
    a.add(RDI, register=RSI)


def _pages_go(path: Path) -> bool:
    """May another vCPU take a page away while the hypervisor reads it?"""
    return path.several and path.vmm.takes_back


def keep_pages(a: Assembler, path: Path) -> None:
    """While the hypervisor reads the guest's memory, no other vCPU takes it away. Changes RAX, RCX and RDI."""
    if _pages_go(path):
        several.lock_tables(a, path)


def release_pages(a: Assembler, path: Path) -> None:
    """It has read what it wanted. Changes RDI."""
    if _pages_go(path):
        a.push(RAX)
        several.unlock_tables(a, path)
        a.pop(RAX)
