"""How long the parts of the guest kernel are that programs only stand for with WORK: instructions, and from where.

What a path does to page tables, stacks, queues, registers and MSRs is executed; these lengths are the C code around
it. They are round numbers for a Linux 6.1 kernel built with common options, and belong to no benchmark.
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

ESTIMATED: Final = "estimated by reading Linux 6.1"


@frozen
class Length:
    """Instructions of one stretch of kernel code."""

    instructions: int
    what: str
    source: str = ESTIMATED


# fmt: off
LENGTHS: Final[dict[str, Length]] = {
    "boot":           Length( 200, "the way to the first task, everything being set up"),
    "syscall_enter":  Length(  20, "do_syscall_64 up to the call: context tracking, number check, speculation mask"),
    "syscall_exit":   Length(  30, "syscall_exit_to_user_mode without work pending"),
    "fault_enter":    Length(  60, "exc_page_fault and do_user_addr_fault up to the search of the area"),
    "fault_map":      Length( 350, "handle_mm_fault and do_anonymous_page: memory cgroup, reverse map, LRU, counters"),
    "fault_copy":     Length( 400, "do_wp_page: the same for a copied page"),
    "fault_reuse":    Length( 120, "do_wp_page where nobody else has the page"),
    "fault_exit":     Length(  40, "irqentry_exit_to_user_mode"),
    "page_get":       Length(  60, "rmqueue from the per-CPU list"),
    "page_put":       Length(  50, "free_unref_page to the per-CPU list"),
    "bulk_get":       Length(  40, "rmqueue_bulk around the pages"),
    "bulk_get_page":  Length(  60, "__rmqueue_smallest, expand, check_pcp_refill: one page of rmqueue_bulk"),
    "bulk_put":       Length(  60, "free_pcppages_bulk around the pages"),
    "bulk_put_page":  Length(  80, "__free_one_page, which looks for the page's buddy: one page of free_pcppages_bulk"),
    "drain_all":      Length( 100, "__drain_all_pages around the CPUs' lists"),
    "kill":           Length(4000, "force_sig_fault, the signal, and the way to do_exit"),
    "exit":           Length(6000, "do_exit, without freeing memory"),
    "irq_enter":      Length(  60, "irqentry_enter, irq_enter_rcu"),
    "irq_exit":       Length(  80, "irq_exit_rcu without softirq work"),
    "timer":          Length( 400, "hrtimer_interrupt and tick_sched_handle"),
    "tick":           Length( 500, "update_process_times and scheduler_tick"),
    "timer_program":  Length(  80, "clockevents_program_event"),
    "wake":           Length( 250, "try_to_wake_up"),
    "pick":           Length( 250, "__schedule: dequeue and pick the next task"),
    "switch_mm":      Length(  60, "switch_mm_irqs_off without a new ASID"),
    "switch_to":      Length(  80, "__switch_to: FPU, segment bases, per-CPU words"),
    "yield":          Length( 100, "do_sched_yield"),
    "sleep":          Length( 400, "hrtimer_nanosleep up to the switch"),
    "idle":           Length( 150, "do_idle and default_idle around HLT"),
    "fork":           Length(9000, "copy_process, without page tables"),
    "exec":           Length(12000, "do_execveat_common and load_elf_binary, without page tables"),
    "map_file_page":  Length(  60, "filemap_map_pages, one page of the text"),
    "mmap_file":      Length(1200, "ksys_mmap_pgoff, do_mmap, mmap_region: an area allocated, filled in and linked"),
    "msync":          Length( 100, "ksys_msync with MS_INVALIDATE: the area is found and is not locked"),
    "file_fault":     Length( 150, "handle_mm_fault, do_read_fault, filemap_map_pages around its pages"),
    "file_write_fault": Length( 350, "handle_mm_fault, do_shared_fault, filemap_fault, fault_dirty_shared_page"),
    "page_mkwrite":   Length( 900, "ext4_page_mkwrite, the block being there: a journal handle, file_update_time"),
    "fuse_mkwrite":   Length( 200, "fuse_page_mkwrite: file_update_time, the page locked, the list of writes searched"),
    "write_page":     Length( 300, "write_cache_pages, clear_page_dirty_for_io, set_page_writeback, one page"),
    "clean_page":     Length( 200, "page_mkclean_one, one mapping, the reverse map walked"),
    "disk_write":     Length( 900, "mpage_submit_page, blk_mq_submit_bio, virtio_queue_rq, one page"),
    "disk_written":   Length( 500, "virtblk_done, blk_mq_end_request, end_bio, end_page_writeback, one page"),
    "fuse_write":     Length(1100, "fuse_writepages_fill, a page and a request allocated, virtio_fs_enqueue_req"),
    "fuse_written":   Length( 900, "the worker of virtio_fs, the switch to it, fuse_request_end, fuse_writepage_end"),
    "balance_dirty":  Length( 150, "balance_dirty_pages up to what is done about it"),
    "wait":           Length( 600, "kernel_wait4"),
    "reap":           Length(1500, "release_task and exit_mmap, without pages"),
    "unmap":          Length( 400, "__do_munmap, without pages"),
    "protect":        Length( 900, "do_mprotect_pkey: the area is split and merged, without pages"),
    "protect_page":   Length(  30, "change_pte_range, one page"),
    "balloon_page":   Length( 150, "fill_balloon or leak_balloon, one page"),
    "getname":        Length(  60, "getname_flags: a name buffer taken and given back"),
    "hash_name":      Length(  40, "link_path_walk and hash_name, one component of 6 characters"),
    "permission":     Length(  40, "inode_permission and the step to the next dentry, one component"),
    "stat":           Length( 120, "vfs_statx, generic_fillattr, cp_new_stat but for the copies"),
    "open":           Length( 350, "do_sys_openat2 to fd_install: flags, security, alloc_empty_file, do_dentry_open"),
    "close":          Length( 150, "close_fd, filp_close, __fput"),
    "read_write":     Length(  70, "ksys_read: fdget_pos, rw_verify_area, access_ok, fsnotify"),
    "read_zero":      Length(  40, "read_iter_zero through an iov_iter"),
    "select":         Length( 250, "core_sys_select: timeout, wait queues set up and taken down"),
    "select_descriptor": Length(25, "do_select, one descriptor: bits of six sets, fdget, fdput"),
    "poll_socket":    Length(  35, "sock_poll and tcp_poll, one socket, nothing to read"),
    "sigaction":      Length( 150, "do_sigaction under the lock of the handlers"),
    "kill_allowed":   Length( 120, "kill_something_info, kill_pid_info up to check_kill_permission"),
    "send_signal":    Length( 380, "__send_signal_locked, a queue entry allocated; force_sig_fault for a fault"),
    "signal_frame":   Length( 600, "get_signal, dequeue, setup_rt_frame but for the copies"),
    "sigreturn":      Length( 250, "restore_sigcontext, set_current_blocked"),
    "dma_map":        Length( 120, "dma_map_page_attrs, iommu_dma_map_page: checks, domain, protection bits"),
    "dma_map_run":    Length( 150, "iommu_map and __domain_mapping up to the entries of one table"),
    "dma_unmap":      Length( 100, "dma_unmap_page_attrs, iommu_dma_unmap_page: the way to __iommu_dma_unmap"),
    "dma_unmap_run":  Length( 150, "iommu_unmap and domain_unmap up to the entries of one table"),
    "object_get":     Length(  40, "kmem_cache_alloc from the per-CPU list"),
    "object_put":     Length(  40, "kmem_cache_free to the per-CPU list"),
    "invalidate":     Length(  60, "iommu_flush_iotlb_psi and qi_submit_sync around the queue"),
    "page_request_event": Length(700, "the handler's thread woken, the switch to it, the event masked and unmasked"),
    "page_request":   Length( 250, "prq_event_thread, iommu_report_device_fault, iommu_queue_iopf, one request"),
    "page_group":     Length( 600, "queue_work, the switch to the worker, iopf_handle_group, iommu_page_response"),
    "timer_add":      Length( 150, "mod_timer"),
    "timer_expire":   Length( 200, "run_timer_softirq for one timer"),
    "wait_event":     Length( 200, "prepare_to_wait_event up to the switch"),
    "device_interrupt": Length( 300, "handle_edge_irq and the driver's handler"),
    "unmap_page":     Length(  40, "zap_pte_range, one page"),
    "call_others":    Length( 150, "flush_tlb_mm_range and smp_call_function_many_cond around the requests"),
    "call_flush":     Length(  80, "flush_smp_call_function_queue and flush_tlb_func, one request"),
}
# fmt: on


def length(name: str) -> int:
    """Return how many instructions a stretch of kernel code has."""
    return LENGTHS[name].instructions
