"""How long the parts of the guest kernel are that programs only stand for with WORK: instructions, and from where.

What a path does to page tables, stacks, queues, registers and MSRs is executed; these lengths are the C code around
it. Most are counts of what Linux 6.1 executes (decision 0044), or of what 4.19 does (decision 0050); the rest are
round numbers. A guest has those of one kernel: `guest.kernel.lengths`. They belong to no benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from attrs import evolve, frozen

COUNTED: Final = "counted in Linux 6.1: scripts/path_lengths/guest_paths.toml"
ESTIMATED: Final = "ESTIMATE: by reading Linux 6.1"
COUNTED_4_19: Final = "counted in Linux 4.19: scripts/path_lengths/guest_paths.toml"
TAKEN: Final = "ESTIMATE: not counted in Linux 4.19, as long as in 6.1"


@frozen
class Length:
    """Instructions of one stretch of kernel code."""

    instructions: int
    what: str
    source: str = ESTIMATED


# fmt: off
LENGTHS: Final[dict[str, Length]] = {
    "boot":           Length( 200, "the way to the first task, everything being set up"),
    "syscall_enter":  Length(   59, "do_syscall_64 up to the call, and x64_sys_call", COUNTED),
    "syscall_exit":   Length(   64, "syscall_exit_to_user_mode without work pending", COUNTED),
    "fault_enter":    Length(  438, "exc_page_fault and do_user_addr_fault around handle_mm_fault", COUNTED),
    "fault_map":      Length( 1576, "handle_mm_fault: memory cgroup, reverse map, LRU, counters", COUNTED),
    "fault_copy":     Length( 2196, "the same with wp_page_copy, translations dropped", COUNTED),
    "fault_reuse":    Length(  700, "handle_mm_fault with wp_page_reuse", COUNTED),
    "fault_exit":     Length(   44, "irqentry_exit_to_user_mode", COUNTED),
    "page_get":       Length(  351, "__alloc_pages, from the per-CPU list", COUNTED),
    "page_put":       Length(  244, "free_unref_page_list to the per-CPU list, one page", COUNTED),
    "bulk_get":       Length(  40, "rmqueue_bulk around the pages"),
    "bulk_get_page":  Length(  195, "__rmqueue_smallest, expand, check_pcp_refill: one page of rmqueue_bulk", COUNTED),
    "bulk_put":       Length(  60, "free_pcppages_bulk around the pages"),
    "bulk_put_page":  Length(  292, "__free_one_page, which looks for the page's buddy", COUNTED),
    "drain_all":      Length( 100, "__drain_all_pages around the CPUs' lists"),
    "virtualization_exception": Length(600, "exc_virtualization_exception, handle_mmio with insn_decode_mmio"),
    "kill":           Length( 2606, "force_sig_fault, the signal, and the way to do_exit", COUNTED),
    "exit":           Length( 7338, "do_exit, without freeing memory", COUNTED),
    "irq_enter":      Length(   57, "irqentry_enter, irq_enter_rcu", COUNTED),
    "irq_exit":       Length(   25, "irq_exit_rcu without softirq work", COUNTED),
    "timer":          Length(  484, "hrtimer_interrupt without the tick", COUNTED),
    "tick":           Length( 1649, "tick_sched_timer: wall time, update_process_times, scheduler_tick", COUNTED),
    "timer_program":  Length(   77, "clockevents_program_event", COUNTED),
    "wake":           Length( 1360, "try_to_wake_up", COUNTED),
    "pick":           Length( 1386, "__schedule but for the switch: dequeue, pressure stall, pick", COUNTED),
    "switch_mm":      Length(  119, "switch_mm_irqs_off without a new ASID", COUNTED),
    "switch_to":      Length(  150, "__switch_to: FPU, segment bases, per-CPU words", COUNTED),
    "yield":          Length(  250, "do_sched_yield", COUNTED),
    "sleep":          Length(  656, "hrtimer_nanosleep up to the switch", COUNTED),
    "idle":           Length(  490, "do_idle and default_idle around HLT", COUNTED),
    "fork":           Length(28820, "kernel_clone, page tables allocated but not copied", COUNTED),
    "exec":           Length(82725, "do_execveat_common and load_elf_binary, without pages", COUNTED),
    "map_file_page":  Length(  313, "filemap_map_pages, one page of the text", COUNTED),
    "mmap_file":      Length( 6027, "ksys_mmap_pgoff, do_mmap, mmap_region: an area linked", COUNTED),
    "msync":          Length(  350, "ksys_msync with MS_INVALIDATE: the area is found and is not locked", COUNTED),
    "file_fault":     Length( 1469, "handle_mm_fault, do_read_fault, filemap_map_pages around its pages", COUNTED),
    "file_write_fault": Length( 2094, "handle_mm_fault, do_shared_fault, fault_dirty_shared_page", COUNTED),
    "page_mkwrite":   Length(  994, "ext4_page_mkwrite, the block being there, in a journal handle", COUNTED),
    "fuse_mkwrite":   Length( 200, "fuse_page_mkwrite: file_update_time, the page locked, the list of writes searched"),
    "write_page":     Length( 300, "write_cache_pages, clear_page_dirty_for_io, set_page_writeback, one page"),
    "clean_page":     Length( 200, "page_mkclean_one, one mapping, the reverse map walked"),
    "disk_write":     Length( 900, "mpage_submit_page, blk_mq_submit_bio, virtio_queue_rq, one page"),
    "disk_written":   Length( 500, "virtblk_done, blk_mq_end_request, end_bio, end_page_writeback, one page"),
    "fuse_write":     Length(1100, "fuse_writepages_fill, a page and a request allocated, virtio_fs_enqueue_req"),
    "fuse_written":   Length( 900, "the worker of virtio_fs, the switch to it, fuse_request_end, fuse_writepage_end"),
    "balance_dirty":  Length( 150, "balance_dirty_pages up to what is done about it"),
    "wait":           Length( 1311, "kernel_wait4", COUNTED),
    "reap":           Length(15173, "release_task and exit_mmap, without pages", COUNTED),
    "unmap":          Length(11051, "__do_munmap, without pages", COUNTED),
    "protect":        Length( 7905, "do_mprotect_pkey: the area is split and merged, without pages", COUNTED),
    "protect_page":   Length(  151, "change_pte_range, one page", COUNTED),
    "balloon_page":   Length( 150, "fill_balloon or leak_balloon, one page"),
    "getname":        Length(  520, "getname_flags and putname: a buffer, user memory checked", COUNTED),
    "hash_name":      Length(  172, "link_path_walk and walk_component, one component of 6 characters", COUNTED),
    "permission":     Length(  139, "inode_permission and the step to the next dentry, one component", COUNTED),
    "stat":           Length( 1138, "newstat but for names and copies: vfs_statx, ext4_getattr", COUNTED),
    "open":           Length( 2132, "do_sys_openat2 to fd_install: alloc_empty_file, do_dentry_open", COUNTED),
    "close":          Length(  813, "close_fd, filp_close, __fput from task work", COUNTED),
    "read_write":     Length(  220, "ksys_read: fdget_pos, rw_verify_area, access_ok, fsnotify", COUNTED),
    "read_zero":      Length(   61, "read_iter_zero through an iov_iter", COUNTED),
    "select":         Length(  836, "core_sys_select: timeout, wait queues set up and taken down", COUNTED),
    "select_descriptor": Length(   89, "do_select, one descriptor: bits of six sets, fdget, fdput", COUNTED),
    "poll_socket":    Length(  132, "sock_poll and tcp_poll, one socket, nothing to read", COUNTED),
    "sigaction":      Length(  184, "do_sigaction under the lock of the handlers", COUNTED),
    "kill_allowed":   Length(  454, "kill_something_info, kill_pid_info up to check_kill_permission", COUNTED),
    "send_signal":    Length(  745, "do_send_sig_info; force_sig_fault for a fault", COUNTED),
    "signal_frame":   Length( 1121, "get_signal, dequeue, setup_rt_frame but for the copies", COUNTED),
    "sigreturn":      Length(  546, "restore_sigcontext, set_current_blocked", COUNTED),
    "dma_map":        Length(  183, "dma_map_page_attrs, iommu_dma_map_page around iommu_map", COUNTED),
    "dma_map_run":    Length(  654, "iommu_map_atomic, __domain_mapping, iotlb_sync_map", COUNTED),
    "dma_unmap":      Length(  288, "dma_unmap_page_attrs, iommu_dma_unmap_page around iommu_unmap", COUNTED),
    "dma_unmap_run":  Length(  577, "__iommu_unmap and domain_unmap", COUNTED),
    "object_get":     Length(  110, "kmem_cache_alloc from the per-CPU list", COUNTED),
    "object_put":     Length(   99, "kmem_cache_free to the per-CPU list", COUNTED),
    "invalidate":     Length(  700, "intel_iommu_tlb_sync, qi_submit_sync around the queue", COUNTED),
    "page_request_event": Length(700, "the handler's thread woken, the switch to it, the event masked and unmasked"),
    "page_request":   Length( 250, "prq_event_thread, iommu_report_device_fault, iommu_queue_iopf, one request"),
    "page_group":     Length( 600, "queue_work, the switch to the worker, iopf_handle_group, iommu_page_response"),
    "timer_add":      Length(  232, "mod_timer", COUNTED),
    "timer_expire":   Length( 200, "run_timer_softirq for one timer"),
    "wait_event":     Length(  282, "prepare_to_wait_event up to the switch", COUNTED),
    "device_interrupt": Length(  965, "handle_edge_irq and virtblk_done, without the block layer", COUNTED),
    "unmap_page":     Length(  790, "zap_pte_range, page_remove_rmap, release_pages, one page", COUNTED),
    "copy_shared_page": Length(127, "copy_pte_range, page_dup_rmap, one page", COUNTED),
    "unmap_shared_page": Length(248, "zap_pte_range at exit, one page that others map", COUNTED),
    "unmap_own_page": Length(725, "the same, one page that is freed", COUNTED),
    "unmap_file_page": Length(  356, "the same of a page that stays in the page cache", COUNTED),
    "call_others":    Length(  326, "smp_call_function_many_cond around the requests, one other CPU", COUNTED),
    "call_flush":     Length(  145, "flush_smp_call_function_queue and flush_tlb_func, one request", COUNTED),
}
# fmt: on

LINUX_4_19: Final[dict[str, int]] = {
    "syscall_enter": 13,
    "syscall_exit": 18,
    "fault_enter": 200,
    "fault_map": 1169,
    "fault_copy": 1740,
    "fault_reuse": 557,
    "fault_exit": 6,
    "page_get": 308,
    "page_put": 149,
    "irq_enter": 69,
    "irq_exit": 44,
    "timer": 478,
    "tick": 1693,
    "timer_program": 70,
    "wake": 973,
    "pick": 1046,
    "switch_mm": 97,
    "switch_to": 140,
    "yield": 215,
    "sleep": 649,
    "idle": 423,
    "fork": 19717,
    "exec": 53585,
    "exit": 4530,
    "wait": 953,
    "reap": 9901,
    "kill": 2463,
    "unmap": 3430,
    "unmap_page": 495,
    "copy_shared_page": 82,
    "unmap_shared_page": 140,
    "unmap_own_page": 439,
    "unmap_file_page": 276,
    "protect": 3060,
    "protect_page": 77,
    "mmap_file": 1852,
    "msync": 182,
    "file_fault": 498,
    "map_file_page": 231,
    "file_write_fault": 1155,
    "page_mkwrite": 1063,
    "getname": 409,
    "hash_name": 286,
    "permission": 71,
    "stat": 939,
    "open": 1806,
    "close": 884,
    "read_write": 394,
    "read_zero": 140,
    "select": 755,
    "select_descriptor": 76,
    "poll_socket": 116,
    "sigaction": 168,
    "kill_allowed": 313,
    "send_signal": 615,
    "signal_frame": 1150,
    "sigreturn": 408,
    "object_get": 65,
    "object_put": 55,
    "timer_add": 213,
    "wait_event": 97,
    "bulk_get_page": 148,
    "bulk_put_page": 301,
    "call_others": 315,
    "call_flush": 132,
    "device_interrupt": 1147,
    "dma_map": 142,
    "dma_map_run": 239,
    "dma_unmap": 87,
    "dma_unmap_run": 243,
    "invalidate": 195,
}

# What a length has counted and a kernel with several CPUs executes as operations, beside those taken off for all:
# locks, looks at entries under them, a list of pages in front of the zone's. So both kernels have as many instructions.
OF_SEVERAL: Final = {
    "page_get": 21, "page_put": 23, "fault_map": 80, "fault_copy": 104, "fault_reuse": 61, "file_fault": 65,
    "file_write_fault": 80, "unmap": 60, "unmap_page": 14, "protect": 44, "protect_page": 10,
}  # fmt: skip

TABLES: Final[dict[str, dict[str, Length]]] = {
    "linux-6.1": LENGTHS,
    "linux-4.19": {
        name: evolve(known, instructions=LINUX_4_19[name], source=COUNTED_4_19)
        if name in LINUX_4_19
        else evolve(known, source=TAKEN)
        for name, known in LENGTHS.items()
    },
}

_table: ContextVar[dict[str, Length]] = ContextVar("lengths of the kernel whose text is being written", default=LENGTHS)


@contextmanager
def lengths_of(kernel: str) -> Iterator[None]:
    """Within it, `length` is of this kernel."""
    token = _table.set(TABLES[kernel])
    try:
        yield
    finally:
        _table.reset(token)


def length(name: str, *, several: bool = False) -> int:
    """Return how many instructions a stretch of kernel code has, in a kernel with one CPU or with several.

    It is the kernel whose text is being written.
    """
    return _table.get()[name].instructions - (OF_SEVERAL.get(name, 0) if several else 0)
