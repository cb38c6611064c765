"""Path lengths of the kvm personality: how many ordinary instructions its C code executes where no op stands for it.

Most are counted: what Debian's Linux 6.1 executed between VM exit and VM entry for one event, in a traced machine
(scripts/path_lengths; decision 0043), or what Linux 4.19 did (decision 0052): a host has those of one kernel,
`vmm.lengths`. The others are estimates from the shape of Linux 6.1's functions. Those of every
exit are set so that a VMCALL on Skylake-SP takes what was measured (row KVM-SKX-VMCALL), the hardware's part and the
counted lengths apart, in the proportion in which they were counted. None is set from a row that validates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import evolve

from vtsim.vmm.registry import Parameter
from vtsim.vmm.shadow import KVM_PARAMETERS

COUNTED: Final = "counted: Debian Linux 6.1.176"
COUNTED_4_19: Final = "counted: Linux 4.19.222"
TAKEN: Final = "ESTIMATE: not counted in Linux 4.19, as long as in 6.1"
QEMU: Final = "counted: Debian QEMU 7.2"
SHAPE: Final = "ESTIMATE: shape of the function in Linux 6.1"
CALIBRATED: Final = "KVM-SKX-VMCALL: 1529 to 1559 cycles on Skylake-SP, less VM exit, VM entry and the ops of the path"
ERRATUM: Final = "KVM: nx_huge_pages=auto is on where the processor has the iTLB multihit erratum"
LOCKLESS: Final = "KVM: fast page fault, Linux 3.6 on"
RELOAD: Final = "KVM: load_fixmap_gdt in vmx_prepare_switch_to_host"
FAST_IPI: Final = "KVM: handle_fastpath_set_x2apic_icr_irqoff in vmx_vcpu_run, Linux 5.8 on"
FAST_MMIO: Final = "KVM: KVM_FAST_MMIO_BUS, Linux 3.15 and later"
FAST_IN: Final = "KVM: kvm_fast_pio_in in handle_io, Linux 4.17 and later (commit 432baf60eee3)"
TYPES: Final = "KVM: vmx_get_mt_mask without noncoherent DMA, Linux 4.19 and 6.1 (kvm_arch_has_noncoherent_dma)"
IGNORE: Final = "KVM: module parameter ignore_msrs, off by default"
ALTP2M: Final = "ESTIMATE: shape of the function in Xen 4.17"
SIZE: Final = "ESTIMATE: order of magnitude of the subsystem's code"


def _length(value: int, meaning: str, source: str = SHAPE, confidence: str = "estimated") -> Parameter:
    return Parameter(value=value, unit="instructions", source=source, confidence=confidence, meaning=meaning)


def _counted(value: int, functions: str) -> Parameter:
    return _length(value, functions, f"{COUNTED}, {functions}", "measured")


def _switch(value: int, meaning: str, source: str) -> Parameter:
    return Parameter(value=value, unit="flag, 0 or 1", source=source, confidence="vendor", meaning=meaning)


# fmt: off
PARAMETERS: Final[Mapping[str, Parameter]] = {
    # every exit
    "exit_common":         _length(223, "vmx_vcpu_run and vcpu_enter_guest after the exit", CALIBRATED, "paper"),
    "entry_common":        _length(332, "vcpu_enter_guest up to VMRESUME", CALIBRATED, "paper"),
    "skip":                _counted(135, "kvm_skip_emulated_instruction"),
    # emulation
    "cpuid":               _counted(111, "kvm_emulate_cpuid"),
    "msr":                 _counted(244, "kvm_emulate_rdmsr, kvm_emulate_wrmsr: the mean"),
    "control_register":    _counted(128, "handle_cr; what sets the register apart"),
    "hypercall":           _counted(144, "kvm_emulate_hypercall"),
    "ignored_instruction": _counted(5, "kvm_emulate_wbinvd"),
    "set_xcr0":            _counted(90, "kvm_emulate_xsetbv"),
    "debug_registers":     _counted(101, "handle_dr"),
    "halt":                _counted(574, "kvm_emulate_halt, kvm_vcpu_halt; schedule apart"),
    "queue_exception":     _counted(87, "kvm_inject_emulated_page_fault"),
    "evaluate_events":     _counted(780, "kvm_check_and_inject_events with an interrupt to inject"),
    "apic_write":          _counted(88, "kvm_x2apic_msr_write"),
    "apic_read":           _counted(138, "kvm_x2apic_msr_read"),
    "start_timer":         _counted(487, "start_apic_timer; hrtimer_reprogram apart"),
    "program_timer":       _counted(149, "hrtimer_reprogram"),
    "expire_timer":        _counted(506, "hrtimer_interrupt for one apic_timer_fn; tick_program_event, waking apart"),
    "pause":               _counted(571, "handle_pause of a VM with one vCPU"),
    "send_interrupt":      _counted(387, "kvm_x2apic_icr_write; waking apart"),
    "fast_path":           _counted(44, "handle_fastpath_set_msr_irqoff; send_interrupt, skip apart"),
    "ask_others":          _length(120, "kvm_flush_remote_tlbs, kvm_make_vcpus_request_mask, smp_call_function_many"),
    # memory
    "ept_violation":       _counted(484, "handle_ept_violation; get_user_page, map_page apart"),
    "get_user_page":       _counted(654, "__gfn_to_pfn_memslot, kvm_release_pfn_clean"),
    "map_page":            _counted(815, "kvm_tdp_mmu_map"),
    "host_page_fault":     _counted(2092, "get_user_pages_unlocked; follow_page_mask, clearing the page apart"),
    "unmap_notifier":      _counted(1946, "__mmu_notifier_invalidate_range_start and _end for one page"),
    "set_memory":          _length(2000, "kvm_set_memory_region, kvm_mmu_zap_all_fast, synchronize_srcu apart", SIZE),
    "mark_dirty":          _counted(23, "mark_page_dirty_in_slot"),
    "fast_page_fault":     _counted(214, "handle_ept_violation with fast_page_fault, less ept_violation"),
    "start_dirty_log":     _length(2000, "kvm_mmu_slot_apply_flags, walking apart", SIZE),
    "collect_dirty_log":   _length(1500, "kvm_vm_ioctl_get_dirty_log, walking apart", SIZE),
    "stop_dirty_log":      _length(2000, "kvm_mmu_zap_collapsible_sptes, walking apart", SIZE),
    "balloon_page":        _length(1200, "virtio_balloon_handle_output, madvise(MADV_DONTNEED) of one page", SIZE),
    "reclaim_scan":        _counted(995, "shrink_folio_list for a page that stays; reclaim_page apart"),
    "reclaim_page":        _counted(5454, "add_to_swap, try_to_unmap, pageout, freeing it; the disk apart"),
    "disk_completion":     _length(700, "nvme_irq, blk_mq_end_request, end_swap_bio_read or _write", SIZE),
    "collapse_scan":       _counted(5381, "hpage_collapse_scan_pmd of 512 entries without a page"),
    "collapse_look":       _counted(158, "hpage_collapse_scan_pmd, one page"),
    "collapse":            _counted(37390, "collapse_huge_page of 512 entries without a page"),
    "collapse_page":       _counted(1823, "collapse_huge_page, one page; copying apart"),
    "share_scan":          _counted(873, "ksm_scan_thread, one page; reading it and looking for another apart"),
    "share_merge":         _counted(1921, "try_to_merge_with_ksm_page, stable_tree_append; comparing apart"),
    "make_mmio_entry":     _counted(654, "handle_ept_violation; emulate apart, less ept_violation"),
    "misconfiguration":    _counted(233, "handle_ept_misconfig; emulate apart"),
    "emulate":             _counted(2616, "x86_emulate_instruction; kvm_io_bus_write apart"),
    "retry":               _counted(2086, "x86_emulate_instruction up to retry_instruction"),
    "map_dma":             _length(600, "vfio_iommu_type1 for one page: its tree of mappings, iommu_map"),
    "in_kernel_device":    _counted(287, "kvm_io_bus_read and a PIC behind it"),
    "eventfd":             _counted(86, "ioeventfd_write"),
    "wake_server":         _counted(1069, "eventfd_signal with a thread that waits; an IPI apart"),
    "decode_refused":      _counted(1685, "handle_ud; kvm_multiple_exception apart"),
    "port":                _counted(107, "handle_io; kvm_io_bus_read apart"),
    "emulate_in":          _counted(2215, "x86_emulate_instruction of an IN; port, skip, kvm_io_bus_read apart"),
    "string_port":         _counted(3969, "handle_io with the emulator; port apart"),
    "coalesced":           _counted(111, "coalesced_mmio_write"),
    # views of memory, which KVM does not have
    "switch_view":         _length(100, "p2m_switch_vcpu_altp2m_by_id, do_altp2m_op apart", ALTP2M),
    "protect_in_view":     _length(600, "do_altp2m_op, p2m_set_altp2m_mem_access, ept_set_entry, one page", ALTP2M),
    "notify_of_views":     _length(300, "altp2m_vcpu_enable_ve, vmx_vcpu_update_vmfunc_ve", ALTP2M),
    "watched_write":       _length(400, "hvm_hap_nested_page_fault, p2m_mem_access_check, nobody being told", ALTP2M),
    "write_watched":       _length(100, "hvm_monitor_debug and the way back from a single step", ALTP2M),
    # shadow paging
    "shadow_fault":        _counted(201, "handle_exception_nmi; paging64_page_fault apart"),
    "guest_walk":          _counted(677, "paging64_walk_addr_generic, four levels"),
    "map_shadow":          _counted(2136, "paging64_page_fault; guest_walk, get_user_page, prefetch_entry apart"),
    "tracked_write":       _counted(329, "paging64_page_fault for a write to a tracked table; guest_walk apart"),
    "emulate_paged":       _counted(313, "x86_emulate_instruction of such a write, less emulate and guest_walk"),
    "table_written":       _counted(421, "kvm_page_track_write"),
    "load_root":           _counted(177, "kvm_set_cr3, vmx_load_mmu_pgd; a root that is kept"),
    "synchronize":         _counted(35, "kvm_mmu_sync_roots with nothing out of sync"),
    "synchronize_page":    _counted(6600, "mmu_sync_children, paging64_sync_page; entries in use apart"),
    "synchronize_entry":   _counted(507, "paging64_sync_page, one entry in use"),
    "prefetch_entry":      _counted(1176, "paging64_prefetch_gpte, one entry"),
    "invlpg":              _counted(1348, "handle_invlpg for an entry that is dropped; prefetch_entry apart"),
    # direct tables
    "update_entry":        _length(60, "Xen's do_mmu_update and mod_l1_entry, accesses to tables and frames apart"),
    "validate_table":      _length(80, "Xen's _get_page_type, alloc_l1_table, free_l1_table, a table's entries apart"),
    "pin_table":           _length(80, "Xen's do_mmuext_op, get_page_and_type"),
    "load_cr3":            _length(80, "Xen's new_guest_cr3"),
    # to user space and back
    "leave_guest":         _counted(232, "vmx_vcpu_put"),
    "load_guest":          _counted(172, "vmx_prepare_switch_to_guest"),
    "ioctl_return":        _counted(372, "from vmx_handle_exit to SYSRET; vmx_vcpu_put apart"),
    "ioctl_enter":         _counted(734, "from SYSCALL to VM entry; entry_common, load_guest, complete apart"),
    "complete":            _counted(107, "complete_fast_pio_in"),
    "user_dispatch":       _length(747, "kvm_handle_io, address_space_rw", f"{QEMU}, kvm_handle_io", "measured"),
    "user_device":         _length(893, "a register of a device", f"{QEMU}, of the CMOS memory", "measured"),
    "user_again":          _length(1116, "kvm_arch_post_run, _pre_run, ioctl", f"{QEMU}, kvm_cpu_exec", "measured"),
    # host
    "interrupt_entry":     _counted(122, "asm_sysvec_apic_timer_interrupt; the handler and interrupt_exit apart"),
    "interrupt_exit":      _counted(60, "irq_exit_rcu, irqentry_exit, error_return"),
    "scheduler_tick":      _counted(1925, "tick_sched_timer"),
    "schedule":            _counted(1713, "schedule; context_switch apart"),
    "context_switch":      _counted(517, "kvm_sched_out, __switch_to_asm, finish_task_switch; vmx_vcpu_put apart"),
    "wake_up":             _counted(1371, "wake_up_process"),
    # switches and sizes
    **KVM_PARAMETERS,
    "nx_huge_pages":       _switch(1, "no executable 2 MiB mappings: code splits them", ERRATUM),
    "lockless_faults":     _switch(1, "pages protected by dirty logging are fixed without mmu_lock", LOCKLESS),
    "fast_ipi":            _switch(1, "an interrupt command for one CPU is sent before interrupts are on", FAST_IPI),
    "fast_mmio":           _switch(1, "a write that only raises an event is not decoded", FAST_MMIO),
    "fast_pio_in":         _switch(1, "IN is not decoded", FAST_IN),
    "reload_gdt":          _switch(1, "reload the GDT when leaving the guest", RELOAD),
    "ignore_pat":          _switch(1, "EPT maps memory as write-back whatever the guest's PAT says", TYPES),
    "ignore_msrs":         _switch(0, "unknown MSRs read as 0 and are written in vain", IGNORE),
}
# fmt: on

LINUX_4_19: Final[Mapping[str, int]] = {  # scripts/path_lengths/lengths_4.19.toml
    "skip": 88,
    "cpuid": 121,
    "msr": 151,
    "control_register": 114,
    "hypercall": 158,
    "ignored_instruction": 13,
    "set_xcr0": 116,
    "debug_registers": 99,
    "halt": 948,
    "queue_exception": 31,
    "evaluate_events": 808,
    "apic_write": 78,
    "apic_read": 138,
    "start_timer": 411,
    "program_timer": 142,
    "expire_timer": 508,
    "pause": 155,
    "send_interrupt": 420,
    "ept_violation": 442,
    "get_user_page": 864,
    "map_page": 1082,
    "host_page_fault": 1554,
    "unmap_notifier": 1285,
    "mark_dirty": 35,
    "fast_page_fault": 160,
    "reclaim_scan": 415,
    "reclaim_page": 5276,
    "share_scan": 570,
    "make_mmio_entry": 1120,
    "misconfiguration": 228,
    "emulate": 2446,
    "retry": 1879,
    "in_kernel_device": 269,
    "eventfd": 78,
    "wake_server": 688,
    "decode_refused": 1580,
    "port": 185,
    "emulate_in": 2078,
    "string_port": 3680,
    "coalesced": 98,
    "shadow_fault": 135,
    "guest_walk": 739,
    "map_shadow": 2021,
    "tracked_write": 336,
    "emulate_paged": 318,
    "table_written": 444,
    "load_root": 299,
    "synchronize": 29,
    "synchronize_page": 4290,
    "synchronize_entry": 473,
    "prefetch_entry": 1011,
    "invlpg": 1114,
    "leave_guest": 109,
    "load_guest": 271,
    "ioctl_return": 508,
    "ioctl_enter": 427,
    "complete": 133,
    "interrupt_entry": 103,
    "interrupt_exit": 72,
    "scheduler_tick": 1879,
    "schedule": 1217,
    "context_switch": 557,
    "wake_up": 983,
}


def _of_4_19(name: str, known: Parameter) -> Parameter:
    if name in LINUX_4_19:
        return evolve(known, value=LINUX_4_19[name], source=f"{COUNTED_4_19}, lengths_4.19.toml")
    return evolve(known, source=TAKEN, confidence="estimated") if known.source.startswith(COUNTED) else known


TABLES: Final[Mapping[str, Mapping[str, Parameter]]] = {
    "linux-6.1": PARAMETERS,
    "linux-4.19": {name: _of_4_19(name, known) for name, known in PARAMETERS.items()},
}
