"""Path lengths of the kvm personality: how many ordinary instructions its C code executes where no op stands for it.

They are estimates from the shape of Linux 6.1's functions. Those of every exit are set so that a VMCALL on Skylake-SP
takes what was measured (row KVM-SKX-VMCALL), the hardware's part apart. None is set from a row that validates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vtsim.vmm.registry import Parameter
from vtsim.vmm.shadow import KVM_PARAMETERS

SHAPE: Final = "ESTIMATE: shape of the function in Linux 6.1"
CALIBRATED: Final = "KVM-SKX-VMCALL: 1529 to 1559 cycles on Skylake-SP, less VM exit, VM entry and the ops of the path"
ERRATUM: Final = "KVM: nx_huge_pages=auto is on where the processor has the iTLB multihit erratum"
LOCKLESS: Final = "KVM: fast page fault, Linux 3.6 on"
RELOAD: Final = "KVM: load_fixmap_gdt in vmx_prepare_switch_to_host"
FAST_MMIO: Final = "KVM: KVM_FAST_MMIO_BUS, Linux 3.15 and later"
IGNORE: Final = "KVM: module parameter ignore_msrs, off by default"
SIZE: Final = "ESTIMATE: order of magnitude of the subsystem's code"


def _length(value: int, meaning: str, source: str = SHAPE, confidence: str = "estimated") -> Parameter:
    return Parameter(value=value, unit="instructions", source=source, confidence=confidence, meaning=meaning)


def _switch(value: int, meaning: str, source: str) -> Parameter:
    return Parameter(value=value, unit="flag, 0 or 1", source=source, confidence="vendor", meaning=meaning)


# fmt: off
PARAMETERS: Final[Mapping[str, Parameter]] = {
    # every exit
    "exit_common":         _length(400, "vmx_vcpu_run and vcpu_enter_guest after the exit", CALIBRATED, "paper"),
    "entry_common":        _length(364, "vcpu_enter_guest up to VMRESUME", CALIBRATED, "paper"),
    "skip":                _length(20, "kvm_skip_emulated_instruction"),
    "rsb_fill":            _length(0, "return-stack stuffing after an exit, a mitigation; 0 off, 32 on"),
    # emulation
    "cpuid":               _length(60, "kvm_emulate_cpuid, kvm_cpuid, look-up apart"),
    "msr":                 _length(60, "kvm_emulate_rdmsr, kvm_emulate_wrmsr, kvm_get_msr, kvm_set_msr"),
    "control_register":    _length(80, "handle_cr"),
    "hypercall":           _length(50, "kvm_emulate_hypercall"),
    "ignored_instruction": _length(20, "handlers that do nothing"),
    "set_xcr0":            _length(80, "kvm_emulate_xsetbv"),
    "debug_registers":     _length(60, "handle_dr, loading the debug registers"),
    "halt":                _length(120, "kvm_emulate_halt, kvm_vcpu_block up to schedule"),
    "queue_exception":     _length(40, "kvm_queue_exception"),
    "evaluate_events":     _length(90, "kvm_check_and_inject_events"),
    "apic_write":          _length(60, "kvm_lapic_reg_write"),
    "apic_read":           _length(50, "kvm_lapic_reg_read"),
    "start_timer":         _length(150, "start_apic_timer, hrtimer_start", SIZE),
    "program_timer":       _length(80, "hrtimer_reprogram, lapic_next_deadline"),
    "expire_timer":        _length(200, "hrtimer_interrupt for one timer, apic_timer_fn"),
    "pause":               _length(200, "kvm_vcpu_on_spin"),
    "send_interrupt":      _length(100, "kvm_irq_delivery_to_apic, __apic_accept_irq, kvm_vcpu_kick"),
    "ask_others":          _length(120, "kvm_flush_remote_tlbs, kvm_make_vcpus_request_mask, smp_call_function_many"),
    # memory
    "ept_violation":       _length(150, "handle_ept_violation, kvm_mmu_page_fault, kvm_tdp_page_fault"),
    "get_user_page":       _length(120, "hva_to_pfn, get_user_pages_fast, look-up apart"),
    "map_page":            _length(150, "kvm_tdp_mmu_map, make_spte"),
    "host_page_fault":     _length(600, "get_user_pages, handle_mm_fault, allocation of a page", SIZE),
    "unmap_notifier":      _length(300, "mmu_notifier_invalidate_range, kvm_unmap_gfn_range", SIZE),
    "set_memory":          _length(2000, "kvm_set_memory_region, kvm_mmu_zap_all_fast, synchronize_srcu apart", SIZE),
    "mark_dirty":          _length(30, "mark_page_dirty_in_slot, the bit apart"),
    "fast_page_fault":     _length(120, "fast_page_fault, look-up apart"),
    "start_dirty_log":     _length(2000, "kvm_mmu_slot_apply_flags, walking apart", SIZE),
    "collect_dirty_log":   _length(1500, "kvm_vm_ioctl_get_dirty_log, walking apart", SIZE),
    "stop_dirty_log":      _length(2000, "kvm_mmu_zap_collapsible_sptes, walking apart", SIZE),
    "balloon_page":        _length(1200, "virtio_balloon_handle_output, madvise(MADV_DONTNEED) of one page", SIZE),
    "reclaim_scan":        _length(80, "folio_check_references, kvm_mmu_notifier_clear_young, look-ups apart", SIZE),
    "reclaim_page":        _length(900, "shrink_folio_list, add_to_swap, try_to_unmap, pageout, for one page", SIZE),
    "disk_completion":     _length(700, "nvme_irq, blk_mq_end_request, end_swap_bio_read or _write", SIZE),
    "collapse_scan":       _length(300, "hpage_collapse_scan_pmd, entries apart", SIZE),
    "collapse":            _length(3000, "collapse_huge_page, copying apart", SIZE),
    "share_scan":          _length(150, "scan_get_next_rmap_item, cmp_and_merge_page, reading of pages apart", SIZE),
    "share_merge":         _length(800, "try_to_merge_one_page, stable_tree_append, comparing apart", SIZE),
    "make_mmio_entry":     _length(100, "handle_abnormal_pfn, make_mmio_spte"),
    "misconfiguration":    _length(80, "handle_ept_misconfig, handle_mmio_page_fault"),
    "emulate":             _length(500, "x86_emulate_instruction: decode, execute, write back; fetch apart", SIZE),
    "retry":               _length(150, "x86_decode_instruction and retry_instruction", SIZE),
    "map_dma":             _length(600, "vfio_iommu_type1 for one page: its tree of mappings, iommu_map"),
    "in_kernel_device":    _length(60, "kvm_io_bus_read, kvm_io_bus_write, and a device behind it"),
    "eventfd":             _length(60, "ioeventfd_write, eventfd_signal with nobody asleep"),
    "wake_server":         _length(250, "a server that waits for the event: try_to_wake_up, an IPI"),
    "port":                _length(60, "handle_io, kvm_fast_pio"),
    "string_port":         _length(400, "emulator for INS and OUTS", SIZE),
    "coalesced":           _length(40, "coalesced_mmio_write"),
    # shadow paging
    "shadow_fault":        _length(200, "handle_exception_nmi, kvm_handle_page_fault, kvm_mmu_page_fault"),
    "guest_walk":          _length(120, "paging64_walk_addr_generic, accesses to tables apart"),
    "map_shadow":          _length(250, "paging64_page_fault, paging64_fetch, mmu_set_spte, accesses to tables apart"),
    "table_written":       _length(150, "kvm_mmu_pte_write, accesses to tables apart"),
    "load_root":           _length(150, "kvm_set_cr3, kvm_mmu_new_pgd, kvm_mmu_load, look-up apart"),
    "synchronize":         _length(80, "kvm_mmu_sync_roots, accesses to tables apart"),
    "synchronize_entry":   _length(180, "sync_page, one entry: kvm_vcpu_read_guest_atomic, checks, make_spte"),
    "prefetch_entry":      _length(250, "prefetch_gpte, one entry: slot, get_user_page_fast_only, mmu_set_spte"),
    "invlpg":              _length(120, "handle_invlpg, kvm_mmu_invlpg, accesses to tables apart"),
    # direct tables
    "update_entry":        _length(60, "Xen's do_mmu_update and mod_l1_entry, accesses to tables and frames apart"),
    "validate_table":      _length(80, "Xen's _get_page_type, alloc_l1_table, free_l1_table, a table's entries apart"),
    "pin_table":           _length(80, "Xen's do_mmuext_op, get_page_and_type"),
    "load_cr3":            _length(80, "Xen's new_guest_cr3"),
    # to user space and back
    "leave_guest":         _length(40, "vmx_prepare_switch_to_host"),
    "load_guest":          _length(60, "vmx_prepare_switch_to_guest"),
    "ioctl_return":        _length(250, "vcpu_run, kvm_arch_vcpu_ioctl_run, kvm_vcpu_ioctl, exit to user mode", SIZE),
    "ioctl_enter":         _length(300, "entry_SYSCALL_64, ksys_ioctl, kvm_vcpu_ioctl, vcpu_load", SIZE),
    "complete":            _length(60, "complete_fast_pio_in, complete_emulated_mmio"),
    "user_dispatch":       _length(400, "kvm_cpu_exec, address_space_rw, flat view look-up, locks apart", SIZE),
    "user_device":         _length(100, "a device's register", SIZE),
    "user_again":          _length(300, "kvm_arch_post_run, kvm_arch_pre_run, ioctl of the C library", SIZE),
    # host
    "interrupt_entry":     _length(120, "asm_sysvec, irq_enter"),
    "interrupt_exit":      _length(120, "irq_exit, softirq check"),
    "scheduler_tick":      _length(600, "tick_sched_timer, scheduler_tick", SIZE),
    "schedule":            _length(300, "__schedule: pick_next_task", SIZE),
    "context_switch":      _length(400, "context_switch, kvm_sched_out, kvm_sched_in, vmx_vcpu_load", SIZE),
    "wake_up":             _length(300, "kvm_vcpu_wake_up, try_to_wake_up", SIZE),
    # switches and sizes
    **KVM_PARAMETERS,
    "nx_huge_pages":       _switch(1, "no executable 2 MiB mappings: code splits them", ERRATUM),
    "lockless_faults":     _switch(1, "pages protected by dirty logging are fixed without mmu_lock", LOCKLESS),
    "fast_mmio":           _switch(1, "a write that only raises an event is not decoded", FAST_MMIO),
    "reload_gdt":          _switch(1, "reload the GDT when leaving the guest", RELOAD),
    "ignore_msrs":         _switch(0, "unknown MSRs read as 0 and are written in vain", IGNORE),
}
# fmt: on
