"""Popek and Goldberg's analysis of VMX non-root operation, by execution: what ops do in N0 and N3 without a VM exit.

The trap that a monitor relies on is here the VM exit; an exception that the guest's own kernel gets is none. What VM
entry loads and VM exit saves is the guest's own copy of a resource. What is left is the processor's: an op is
control-sensitive where, without an exit, it changes that or keeps the monitor from running again, and
behaviour-sensitive where what it shows follows from it or from being in non-root operation. A monitor itself saves and
loads debug registers, XCR0 and the MSRs of system calls between exit and entry, as it does general registers, so these
are left out.

Every op runs with no control that makes it exit, with all of them, and, where that makes a difference, with each alone.

Not modelled: in the analysis of non-root operation, memory (no EPT), and interrupts that arrive meanwhile.

SDM: "Instructions That Cause VM Exits Conditionally"; "Changes to Instruction Behavior in VMX Non-Root Operation".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import evolve, frozen

from vtsim.base import memory as mem
from vtsim.base.errors import ModelError
from vtsim.base.jit import quiet
from vtsim.cpu import ops as o
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler
from vtsim.cpu.kernels.ports import PORT_LATCH, PORTS
from vtsim.guest.machine_view import Start
from vtsim.platform.isa import run
from vtsim.platform.isa_bench import (
    CR4_VMXE,
    CS0,
    CS3,
    IDT,
    IF,
    PORT,
    SS0,
    SS3,
    STACK,
    TASK,
    TSS,
    VECTORS,
    Bench,
    Setup,
)
from vtsim.vmcs.controls import CONTROL
from vtsim.vmcs.fields import SLOT
from vtsim.vmm import vmcs

LEAVE, LEFT = "leave", 99
ALL_ONES: Final = -1
PLAIN: Final = "as it is"
SELECTORS: Final = tuple(f"GUEST_{name}_SELECTOR" for name in ("CS", "SS", "TR", "LDTR"))
MASKS: Final = ("CR0_GUEST_HOST_MASK", "CR4_GUEST_HOST_MASK")
MSR_EXITS: Final = "without USE_MSR_BITMAPS"

# fmt: off
EXITING: Final = (  # controls and fields that make ops exit
    "HLT_EXITING", "INVLPG_EXITING", "MWAIT_EXITING", "RDPMC_EXITING", "RDTSC_EXITING", "CR3_LOAD_EXITING",
    "CR3_STORE_EXITING", "CR8_LOAD_EXITING", "CR8_STORE_EXITING", "MOV_DR_EXITING", "UNCONDITIONAL_IO_EXITING",
    "MONITOR_EXITING", "PAUSE_EXITING", "DESCRIPTOR_TABLE_EXITING", "WBINVD_EXITING", "RDRAND_EXITING",
    "RDSEED_EXITING", *MASKS, MSR_EXITS,
)
ENABLED: Final = (
    "ENABLE_RDTSCP", "ENABLE_INVPCID", "ENABLE_XSAVES_XRSTORS", "ENABLE_USER_WAIT_AND_PAUSE",
    "EXIT_SAVE_IA32_EFER", "EXIT_LOAD_IA32_EFER", "ENTRY_LOAD_IA32_EFER",
)
FIXED: Final = ("EXIT_HOST_ADDRESS_SPACE_SIZE", "ENTRY_IA32E_MODE_GUEST")
RANDOM: Final = (o.RDRAND, o.RDSEED)  # what they show is random on any machine
STATES: Final[Mapping[str, tuple[tuple[int, int], ...]]] = {  # of the processor, which no VM entry loads
    PLAIN:                   (),
    "another time":          ((s.CYCLE, 1 << 24),),
    "another task priority": ((s.CR8, 7), (s.APIC_TPR, 0x70)),
    "another device":        (),
}
OWNED: Final[Mapping[str, int]] = {  # what is the processor's, as the monitor finds it after the next exit
    "CR8": s.CR8, "APIC_TPR": s.APIC_TPR, "TSC_ADJUST": s.MSR_TSC_ADJUST, "APIC_BASE": s.MSR_APIC_BASE,
    "MISC_ENABLE": s.MSR_MISC_ENABLE, "SPEC_CTRL": s.MSR_SPEC_CTRL,
}
# fmt: on


@frozen(kw_only=True)
class Execution:
    """One execution in non-root operation.

    `exit`: the exit reason, or None. `seen`: what the guest saw. `changed`: what of the processor's own the monitor
    finds changed.
    """

    exit: int | None
    seen: tuple[int, ...]
    changed: tuple[str, ...]


@frozen(kw_only=True)
class Sensitivity:
    """What an op changes, and what its results depend on, when it does not exit. `exits`: it does, in every state."""

    exits: bool
    changes: tuple[str, ...]
    depends: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.changes or self.depends)


@frozen(kw_only=True)
class JudgedNonRoot:
    """An op in N0 or N3, under no control that makes it exit (`free`) and under all of them (`held`).

    `exits` is `always`, `never` or names what makes it exit, alone.
    """

    op: str
    ring: str
    exits: str
    free: Sensitivity
    held: Sensitivity


@frozen(kw_only=True)
class NonRootAnalysis:
    """All ops in both rings of non-root operation, and what follows. `controls`: what was set where all were."""

    profile: str
    controls: tuple[str, ...]
    ops: tuple[JudgedNonRoot, ...]

    @property
    def offenders(self) -> tuple[str, ...]:
        """Ops that are sensitive whatever the controls say."""
        return tuple(dict.fromkeys(each.op for each in self.ops if each.held))

    @property
    def offenders_without_controls(self) -> tuple[str, ...]:
        """Ops that are sensitive unless a control says otherwise."""
        return tuple(dict.fromkeys(each.op for each in self.ops if each.free))


class GuestBench(Bench):
    """The bench with a VMCS: one op runs in non-root operation under any choice of controls."""

    def __init__(self, profile: str) -> None:
        super().__init__(profile)
        self.bare = Bench(profile)  # on which the same ops run without VMX
        engine, m = self.engine, self.engine.cpus[0]
        self.bare.engine.port(PORT, PORT_LATCH, 1)
        self.bare.engine.cpus[0][s.CR4] &= ~CR4_VMXE
        self.bare.start = self.bare.engine.save()
        bare = self.bare.engine.cpus[0]
        self.guest = Start(
            rip=0, rsp=STACK + 0x800, rflags=IF | 2, cpl=0, cr0=int(bare[s.CR0]), cr3=int(bare[s.CR3]),
            cr4=int(bare[s.CR4]), efer=int(bare[s.EFER]), idtr_base=IDT, idtr_limit=16 * VECTORS - 1,
            gdtr_base=int(bare[s.GDTR_BASE]), gdtr_limit=int(bare[s.GDTR_LIMIT]), tr_base=TSS, tr_selector=TASK,
            msrs={}, gs_base=0, fs_base=0,
        )  # fmt: skip
        bitmap, apic = (engine.allocate() for _ in range(2))
        root = int(m[s.CR3]) >> 12
        self.fields = {
            **vmcs.host_state(
                root=root, stack=STACK + 0x400, exit_address=self.program.labels["left"], cpu_page=TSS, idt=IDT
            ),
            "GUEST_IA32_SYSENTER_CS": CS0, "GUEST_IA32_SYSENTER_EIP": self.called,
            "GUEST_IA32_SYSENTER_ESP": STACK + 0xC00, "HOST_TR_BASE": TSS, "HOST_CS_SELECTOR": CS0, "HOST_CR4": 0x2020,
            "MSR_BITMAPS": bitmap << 12, "VIRTUAL_APIC_ADDRESS": apic << 12,
        }  # fmt: skip
        self.started = engine.save()

    def _more(self, a: Assembler) -> None:
        a.label("launch")
        a.op(o.VMLAUNCH)
        a.op(o.STOP_OP, imm=VECTORS)
        a.label("left")
        a.op(o.STOP_OP, imm=LEFT)
        a.label(LEAVE)
        a.op(o.VMCALL)

    def setups(self, name: str) -> tuple[Setup, ...]:
        """What an op is run with: of CR4 what VMX operation allows."""
        allowed = self.capabilities.cr4_fixed()[1]
        return tuple(
            evolve(
                each, slots={slot: value & allowed if slot == s.CR4 else value for slot, value in each.slots.items()}
            )
            for each in super().setups(name)
        )

    def known(self) -> tuple[str, ...]:
        """What can make ops exit on this processor."""
        return tuple(name for name in EXITING if name not in CONTROL or self.capabilities.supports(name))

    def run_guest(self, name: str, ring: int, state: str, exiting: tuple[str, ...], setup: Setup) -> Execution:
        """Execute one op once in N0 or N3, then leave the guest."""
        engine, m = self.engine, self.engine.cpus[0]
        engine.restore(self.started)
        self._enter(name, ring, exiting, setup)
        for slot, value in STATES[state]:
            m[slot] = value
        engine.port(PORT, PORT_LATCH, 2 if state == "another device" else 1)
        before = {owned: int(m[slot]) for owned, slot in OWNED.items()}
        device = self._device()
        m[s.RIP] = self.program.labels["launch"]
        engine.sync()
        engine.run(ops=1)
        if not m[s.NONROOT]:
            raise ModelError("VM entry of the analysis failed", {"exit reason": self._field("EXIT_REASON")})
        engine.run(ops=1)
        if not m[s.NONROOT]:
            return Execution(exit=self._field("EXIT_REASON"), seen=(), changed=())
        seen = self.seen()
        if m[s.HALTED]:
            return Execution(exit=None, seen=seen, changed=("the processor stops",))
        m[s.RIP], m[s.PRIVILEGE] = self.program.labels[LEAVE], o.N0
        engine.sync()
        engine.run(ops=1)
        changed = [owned for owned, slot in OWNED.items() if int(m[slot]) != before[owned]]
        if self._device() != device:
            changed.append("device")
        return Execution(exit=None, seen=seen, changed=tuple(changed))

    def _field(self, name: str) -> int:
        return int(self.engine.contents(self.vmcs, mem.VMCS_REGION)[SLOT[name]])

    def _device(self) -> int:
        return int(self.engine.arena[int(self.engine.arena[mem.A_PORTS]) + PORTS + PORT])

    def _enter(self, name: str, ring: int, exiting: tuple[str, ...], setup: Setup) -> None:
        cr4 = setup.slots.get(s.CR4, self.guest.cr4)
        start = evolve(self.guest, rip=self.program.labels[name], cpl=3 if ring == o.N3 else 0, cr4=cr4)
        used = [*ENABLED, *(each for each in exiting if each in CONTROL)]
        if MSR_EXITS not in exiting:
            used.append("USE_MSR_BITMAPS")
        wanted = vmcs.Wanted(
            needed=FIXED, used=tuple(used), exceptions=(), cr0_mask=0, cr4_mask=0, passed_msrs={}
        )  # fmt: skip
        masks = {mask: ALL_ONES if mask in exiting else 0 for mask in MASKS}
        chosen = vmcs.controls(wanted, self.capabilities, self.engine.profile.name)
        words = self.engine.contents(self.vmcs, mem.VMCS_REGION)
        selectors = dict(zip(SELECTORS, (CS3, SS3, TASK, 0) if ring == o.N3 else (CS0, SS0, TASK, 0), strict=True))
        vmcs.write(words, {**vmcs.guest_state(start), **self.fields, **selectors, **masks, **chosen})
        self.registers(setup)


def analyze_nonroot(profile: str) -> NonRootAnalysis:
    """Run every op in N0 and N3 of a processor of this name, and judge it. Raises `ConfigError`: no such profile."""
    with quiet():
        bench = GuestBench(profile)
        judged = tuple(_judge(bench, op, ring) for op in bench.rows for ring in (o.N0, o.N3))
    return NonRootAnalysis(profile=profile, controls=bench.known(), ops=judged)


def _judge(bench: GuestBench, op: str, ring: int) -> JudgedNonRoot:
    known = bench.known()
    free, held = (_sensitivity(bench, op, ring, exiting) for exiting in ((), known))
    exits = "always" if free.exits else "never"
    if held.exits and not free.exits:
        first = bench.setups(op)[0]
        exits = ", ".join(each for each in known if bench.run_guest(op, ring, PLAIN, (each,), first).exit is not None)
    return JudgedNonRoot(op=op, ring="N3" if ring == o.N3 else "N0", exits=exits, free=free, held=held)


def _sensitivity(bench: GuestBench, op: str, ring: int, exiting: tuple[str, ...]) -> Sensitivity:
    exits, changes, depends = True, list[str](), list[str]()
    for setup in bench.setups(op):
        runs = {state: bench.run_guest(op, ring, state, exiting, setup) for state in STATES}
        plain, stayed = runs[PLAIN], {state: each for state, each in runs.items() if each.exit is None}
        differing = [state for state, each in stayed.items() if plain.exit is None and each.seen != plain.seen]
        native = run(bench.bare, op, ring - o.N0, (), setup)
        if not differing and plain.exit is None and native.trap is None and native.seen != plain.seen:
            differing.append("non-root operation")
        exits = exits and not stayed
        changes += [name for each in stayed.values() for name in each.changed]
        depends += differing
    return Sensitivity(
        exits=exits,
        changes=tuple(dict.fromkeys(changes)),
        depends=() if bench.rows[op] in RANDOM else tuple(dict.fromkeys(depends)),
    )
