"""What a host does against transient-execution attacks, by the names of Linux's kernel parameters."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
from attrs import frozen

from vtsim.base.spec import Boolean, Text, setting


@frozen(kw_only=True)
class MitigationsSpec:
    """Mitigations of the host's kernel and of its KVM; guests have their own."""

    pti: bool = setting(
        Boolean(),
        "Page-table isolation: user space runs on tables that lack the kernel; CR3 is loaded on the way in and out",
        default=False,
    )
    spectre_v2: str = setting(
        Text(choices=("off", "retpoline", "ibrs")),
        "Either stuffs the return stack after every VM exit; retpoline sends the kernel's indirect branches through "
        "thunks, ibrs sets IA32_SPEC_CTRL.IBRS while the kernel runs and clears it for guests and user space",
        default="off",
    )
    spectre_v2_user: str = setting(
        Text(choices=("off", "prctl", "on")),
        "Indirect branch prediction barrier when another vCPU's VMCS is loaded (prctl), and also when the tables of "
        "another process are (on)",
        default="off",
    )
    vmentry_l1d_flush: str = setting(
        Text(choices=("never", "cond", "always")),
        "kvm-intel's answer to L1TF: flush L1D before VM entry, on condition that something sensitive may be in it",
        default="never",
    )
    mds: str = setting(
        Text(choices=("off", "full")),
        "Overwrite the CPU's buffers by VERW before VM entry and before user space runs; TAA, MMIO stale data and RFDS "
        "are answered by the same",
        default="off",
    )

    @property
    def chosen(self) -> Iterator[str]:
        """The settings that are not what they are when left out."""
        return (field.name for field in attrs.fields(type(self)) if getattr(self, field.name) != field.default)

    @property
    def stuffs_return_stack(self) -> bool:
        """Is the return stack stuffed behind a VM exit (X86_FEATURE_RSB_VMEXIT)?"""
        return self.spectre_v2 != "off"

    @property
    def ibrs(self) -> bool:
        """Does the kernel run with indirect branches restricted (X86_FEATURE_KERNEL_IBRS)?"""
        return self.spectre_v2 == "ibrs"
