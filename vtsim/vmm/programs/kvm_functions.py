"""What is known of KVM's functions beside how long they are, by the path length that stands for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vtsim.vmcs import reasons as x

# those that say that L1D may hold something sensitive, and which function does (l1tf_flush_l1d of a vCPU or a CPU)
L1D_UNSAFE: Final[Mapping[str, str]] = {
    **dict.fromkeys(("emulate", "retry", "emulate_in", "string_port", "decode_refused"), "x86_emulate_instruction"),
    "shadow_fault": "kvm_handle_page_fault", "ioctl_enter": "vcpu_run", "context_switch": "kvm_arch_sched_in",
    "interrupt_entry": "kvm_set_cpu_l1tf_flush_l1d",
}  # fmt: skip

# indirect branches in them, which are retpolines where those are built in: counted with the lengths, in traces of the
# same kernel (scripts/path_lengths/indirect.py); static calls are direct. Lengths that are not here have none, or were
# not counted.
INDIRECT_BRANCHES: Final[Mapping[str, int]] = {
    "emulate": 12, "retry": 5, "emulate_in": 13, "string_port": 19, "decode_refused": 3, "misconfiguration": 1,
    "in_kernel_device": 4, "wake_server": 3, "ioctl_enter": 4, "schedule": 2, "context_switch": 1, "wake_up": 2,
    "halt": 2, "start_timer": 2, "program_timer": 3, "expire_timer": 2, "unmap_notifier": 3,
    "queue_exception": 1, "shadow_fault": 1, "table_written": 1, "synchronize_page": 1, "invlpg": 1,
    "interrupt_entry": 2, "scheduler_tick": 4,
}  # fmt: skip

# handlers of exits that vmx_handle_exit does not call through its table where retpolines are built in
CALLED_DIRECTLY: Final = (
    x.MSR_WRITE, x.INTERRUPT_WINDOW, x.EXTERNAL_INTERRUPT, x.HLT, x.EPT_MISCONFIG,
)  # fmt: skip
