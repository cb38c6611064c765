"""The program behind an exit, as a reader follows it: stage by stage, along the path that is usually taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Final

import attrs
from attrs import frozen

import vtsim.vmm.personalities
from vtsim.base.registry import import_all
from vtsim.cpu import ops
from vtsim.cpu.assembler import Assembler, Instruction, Program
from vtsim.cpu.profile import Profile
from vtsim.vmcs import reasons as x
from vtsim.vmcs.generations import GENERATIONS
from vtsim.vmm import layout as at
from vtsim.vmm.excuses import EXCUSED
from vtsim.vmm.programs.common import OF_PAGING, OF_VIEWS, handler_label
from vtsim.vmm.programs.words import cpu
from vtsim.vmm.registry import Path, Processor, personalities
from vtsim.vmm.settings import resolve_parameters
from vtsim.vmm.spec import VmmSpec

ENDS: Final = (ops.VMRESUME, ops.JMP_MEM, ops.SYSRET, ops.SYSCALL, ops.UD)
BACK: Final = ("skip", "skip_decoded", "reenter", "go_on", "die", "schedule", "to_user")
# jumps that are usually taken, by exit reason
TAKEN: Final[Mapping[int, frozenset[str]]] = {
    x.CPUID: frozenset({"cpuid_found"}),
    x.IO_INSTRUCTION: frozenset({"user_port", "port_in", "user_port_in"}),
    x.EXCEPTION_NMI: frozenset({"shadow_fault", "slot_found", "find_page", "synchronize_entry_done"}),
    x.EPT_VIOLATION: frozenset({"slot_found", "find_page", "make_page"}),
    x.MSR_WRITE: frozenset({"msr_write_apic", "apic_eoi"}),
}


@frozen
class ExitStage:
    """A stretch of an exit path in one privilege state."""

    privilege: int
    title: str
    instructions: tuple[Instruction, ...]


PAGINGS: Final = ("ept", "shadow", "agile", "direct-pv")


def usual_paging(reason: int, profile: Profile) -> str:
    """How memory is translated where an exit occurs: by EPT if it can and the processor has it."""
    able = OF_PAGING.get(reason, PAGINGS)
    has_ept = GENERATIONS[profile.vmx.generation].capabilities().supports("ENABLE_EPT")
    return able[0] if has_ept or "shadow" not in able else "shadow"


def exit_stages(vmm: VmmSpec, reason: int, profile: Profile) -> list[ExitStage]:
    """The stages of a hypervisor's path for an exit reason, on a machine with this profile; `auto` is as usual."""
    import_all(vtsim.vmm.personalities)
    personality, capabilities = vmm.personality, GENERATIONS[profile.vmx.generation].capabilities()
    logs = reason == x.PML_FULL
    flags = logs or _given(vmm.ept.accessed_dirty, capabilities.supports("EPT_ACCESSED_DIRTY"))
    vmm = attrs.evolve(
        vmm,
        paging=usual_paging(reason, profile) if vmm.paging == "auto" else vmm.paging,
        vpid=_given(vmm.vpid, capabilities.supports("ENABLE_VPID")),
        tpr_shadow=_given(vmm.tpr_shadow, capabilities.supports("USE_TPR_SHADOW")),
        ept=attrs.evolve(vmm.ept, accessed_dirty=flags),
        dirty_log=attrs.evolve(vmm.dirty_log, method="pml") if logs else vmm.dirty_log,
        views=2 if reason in OF_VIEWS and vmm.views == 1 else vmm.views,
    )
    addresses = defaultdict[str, int](lambda: at.HOST_DIRECT)
    path = Path(
        vmm=vmm,
        profile=Processor.of(profile),
        capabilities=capabilities,
        parameters=resolve_parameters(vmm),
        addresses=addresses,
    )
    kernel, user = Assembler("kernel", at.HOST_TEXT), Assembler("user", at.USER_TEXT)
    personalities[personality].kernel(kernel, path)
    personalities[personality].user(user, path)
    program, process = kernel.assemble(), user.assemble()
    handler = handler_label(program.labels, reason)
    excuse = EXCUSED[personality].get(reason, "")
    taken = TAKEN.get(reason, frozenset())
    stages = [ExitStage(ops.R0, "VM exit to handler", follow(program, "exit", ()))]
    title = f"handler: none, {excuse}; the VM ends" if handler == "unexpected" else "handler"
    stretch = follow(program, handler, BACK, taken)
    stages.append(ExitStage(ops.R0, title, stretch))
    end = _label_behind(program, stretch)
    if end == "to_user":
        stages.append(ExitStage(ops.R0, "back to user space", follow(program, "to_user", ())))
        stages.append(ExitStage(ops.R3, "device process", follow(process, "user", (), frozenset({"user_absent"}))))
        completion = follow(program, "system_call", BACK, frozenset({"port_completed"}))
        stages.append(ExitStage(ops.R0, "system call, completion", completion))
        end = "skip"
    if end not in ("die", "schedule"):
        unsafe = any(i.op == ops.ST and i.mem == cpu("L1D_UNSAFE") for stage in stages for i in stage.instructions)
        stays = frozenset() if unsafe else frozenset({"enter_l1d_stays"})
        stages.append(ExitStage(ops.R0, "return to the guest", follow(program, end or "reenter", (), stays)))
    return stages


def _given(value: bool | None, usual: bool) -> bool:
    return usual if value is None else value


def follow(
    program: Program, start: str, ends: tuple[str, ...], taken: frozenset[str] = frozenset()
) -> tuple[Instruction, ...]:
    """The instructions from a label on: jumps and calls followed, conditional jumps only to `taken`, each once.

    Where a jump leads back into a loop, the stretch ends.
    """
    by_address = {i.at: i for i in program.instructions}
    stops = {program.labels[name] for name in ends if name in program.labels and name != start}
    usual = {program.labels[name] for name in taken if name in program.labels}
    found: list[Instruction] = []
    calls: list[int] = []
    been: set[tuple[int, ...]] = set()
    at_ = program.labels[start]
    while at_ in by_address and (at_, *calls) not in been:
        been.add((at_, *calls))
        i = by_address[at_]
        found.append(i)
        target = i.target if isinstance(i.target, int) else 0
        at_ = i.end
        if i.op in ENDS:
            break
        if i.op == ops.CALL:
            if i.end in calls:
                break  # a stack was given up on the way
            calls.append(i.end)
            at_ = target
        elif i.op == ops.RET:
            at_ = calls.pop()
        elif i.op == ops.JMP or (i.op == ops.JCC and target in usual):
            usual.discard(target)
            at_ = target
        if at_ in stops and not calls:
            break
    return tuple(found)


def _label_behind(program: Program, stretch: tuple[Instruction, ...]) -> str:
    """Where a stretch that was followed went."""
    last = stretch[-1]
    target = last.target if last.op in (ops.JMP, ops.JCC) else last.end
    return next((name for name in BACK if program.labels.get(name) == target), "")
