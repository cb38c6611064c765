"""Fills the VMCS of a vCPU: controls as the processor allows them, host state, guest state.

SDM: "VM-Execution Control Fields"; "VM-Exit Control Fields"; "VM-Entry Control Fields".
SDM: "Host-State Area"; "Guest-State Area".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.base.memory import signed
from vtsim.guest.machine_view import Start
from vtsim.vmcs.capabilities import Capabilities
from vtsim.vmcs.controls import CONTROL, ENTRY, EXIT, PIN, PRIMARY, SECONDARY, TERTIARY, ControlWord
from vtsim.vmcs.fields import SLOT
from vtsim.vmcs.state import V_CHECKED
from vtsim.vmm import layout as at

WORDS: Final = (PIN, PRIMARY, SECONDARY, EXIT, ENTRY)
EXCEPTIONS: Final = {"DB": 1, "UD": 6, "PF": 14, "AC": 17, "MC": 18}
PASS_READ, PASS_WRITE = 1, 2
CS_L, CS_D = 1 << 13, 1 << 14
SYSENTER: Final = {0x174: "SYSENTER_CS", 0x175: "SYSENTER_ESP", 0x176: "SYSENTER_EIP"}


@frozen(kw_only=True)
class Wanted:
    """What a personality asks of a VMCS: controls it cannot do without, and those it uses where they are."""

    needed: tuple[str, ...]
    used: tuple[str, ...]
    exceptions: tuple[str, ...]
    cr0_mask: int
    cr4_mask: int
    passed_msrs: Mapping[int, int]  # index: PASS_READ | PASS_WRITE


def controls(wanted: Wanted, capabilities: Capabilities, profile: str) -> dict[str, int]:
    """The five control words; a control that is needed and missing is the user's mistake."""
    missing = capabilities.missing(wanted.needed)
    if missing:
        raise ConfigError(
            f"this needs {missing[0]}, which profile {profile!r} does not have",
            field="vmm.personality",
            help="personality can be minimal, which needs less; or choose another machine.profile",
        )
    names = [*wanted.needed, *(name for name in wanted.used if capabilities.supports(name))]
    if any(CONTROL[name].word is SECONDARY for name in names):
        names.append("ACTIVATE_SECONDARY_CONTROLS")
    words = [*WORDS]
    if any(CONTROL[name].word is TERTIARY for name in names):
        names.append("ACTIVATE_TERTIARY_CONTROLS")
        words.append(TERTIARY)
    return {word.field: capabilities.adjust(word, _bits(word, names)) for word in words}


def _bits(word: ControlWord, names: Iterable[str]) -> int:
    value = 0
    for name in names:
        control = CONTROL[name]
        if control.word is word:
            value |= control.mask
    return value


def host_state(
    *, root: int, stack: int, exit_address: int, cpu_page: int, idt: int, cr4: int = at.HOST_CR4
) -> dict[str, int]:
    """What a VM exit loads: the thread of this vCPU in the hypervisor."""
    return {
        "HOST_CR0": 0x80050033, "HOST_CR3": root << 12, "HOST_CR4": cr4,
        "HOST_CS_SELECTOR": at.KERNEL_CODE, "HOST_SS_SELECTOR": at.KERNEL_DATA, "HOST_TR_SELECTOR": at.TASK,
        "HOST_GS_BASE": cpu_page, "HOST_TR_BASE": cpu_page + at.C["TSS"], "HOST_IDTR_BASE": idt,
        "HOST_RSP": stack, "HOST_RIP": exit_address, "HOST_IA32_EFER": 0xD01,
        "HOST_IA32_PAT": 0x0007040600070406,
    }  # fmt: skip


def guest_state(start: Start) -> dict[str, int]:
    """What the first VM entry loads: a vCPU as its guest's builder left it."""
    code, data = (0xA09B, 0xC093) if start.cpl == 0 else (0xA0FB, 0xC0F3)
    others = data
    if start.protected:  # ring 3 may use the data segments of a flat kernel
        code, others = code ^ CS_L ^ CS_D, 0xC0F3
    state = {
        "GUEST_RIP": start.rip, "GUEST_RSP": start.rsp, "GUEST_RFLAGS": start.rflags | 2,
        "GUEST_CR0": start.cr0, "GUEST_CR3": start.cr3, "GUEST_CR4": start.cr4 | 1 << 13,
        "GUEST_IA32_EFER": start.efer, "GUEST_IA32_PAT": 0x0007040600070406,
        "GUEST_IDTR_BASE": start.idtr_base, "GUEST_IDTR_LIMIT": start.idtr_limit,
        "GUEST_GDTR_BASE": start.gdtr_base, "GUEST_GDTR_LIMIT": start.gdtr_limit,
        "GUEST_TR_BASE": start.tr_base, "GUEST_TR_LIMIT": 0x67, "GUEST_TR_ACCESS_RIGHTS": 0x8B,
        "GUEST_TR_SELECTOR": start.tr_selector, "GUEST_LDTR_ACCESS_RIGHTS": 0x10000,
        "GUEST_CS_SELECTOR": 0x10 | start.cpl, "GUEST_SS_SELECTOR": 0x18 | start.cpl,
        "GUEST_CS_ACCESS_RIGHTS": code, "GUEST_SS_ACCESS_RIGHTS": data,
        "GUEST_CS_LIMIT": 0xFFFF_FFFF, "GUEST_SS_LIMIT": 0xFFFF_FFFF,
        "GUEST_GS_BASE": start.gs_base, "GUEST_FS_BASE": start.fs_base, "GUEST_DR7": 0x400,
        "VMCS_LINK_POINTER": -1, "CR0_READ_SHADOW": start.cr0, "CR4_READ_SHADOW": start.cr4,
    }  # fmt: skip
    for segment in ("DS", "ES", "FS", "GS"):
        state[f"GUEST_{segment}_ACCESS_RIGHTS"] = others
        state[f"GUEST_{segment}_LIMIT"] = 0xFFFF_FFFF
    for index, name in SYSENTER.items():
        state[f"GUEST_IA32_{name}"] = start.msrs.get(index, 0)
    return state | {f"GUEST_PDPTE{n}": pdpte for n, pdpte in enumerate(start.pdptes)}


def msr_bitmap(passed: Mapping[int, int]) -> list[int]:
    """The 512 words of an MSR bitmap in which all accesses exit but those that are passed.

    SDM: "MSR-Bitmap Address".
    """
    words = [-1] * 512
    for index, how in passed.items():
        for flag, quarter in ((PASS_READ, 0), (PASS_WRITE, 2)):
            if how & flag:
                bit = (index & 0x1FFF) + 8192 * (quarter + (1 if index >= 0xC0000000 else 0))
                words[bit >> 6] &= ~(1 << (bit & 63))
    return [signed(word) for word in words]


def write(words: npt.NDArray[np.int64], values: Mapping[str, int]) -> None:
    """Store fields by name in the words of a VMCS: all checks of VM entry are due."""
    for name, value in values.items():
        words[SLOT[name]] = signed(value)
    words[V_CHECKED] = 0
