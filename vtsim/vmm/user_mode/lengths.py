"""How many ordinary instructions host kernel, tracing thread and C library execute where no op stands for it.

All are estimates from the shape of functions of Linux 2.4 and its user-mode port; none is set from a measurement.
"""

from __future__ import annotations

from typing import Final

# fmt: off
LENGTHS: Final[dict[str, int]] = {
    # the host's kernel, between the process and the tracing thread
    "stop":           250,  # syscall_trace or do_signal: notify_parent, send_sig_info, wake_up_process
    "schedule":       300,  # schedule, switch_mm and __switch_to, CR3 apart
    "wait":           200,  # sys_wait4 up to schedule
    "wait_return":    150,  # sys_wait4 behind it: the children once more, the status
    "ptrace":         120,  # sys_ptrace: locks, find_task_by_pid, ptrace_check_attach
    "registers":      250,  # getreg, putreg for every register, accesses apart
    "continue":       250,  # PTRACE_CONT, PTRACE_SYSCALL, wake_up_process
    "poke":            60,  # putreg of the register that holds the call's number
    "kill":           300,  # sys_kill, send_sig_info
    "getpid":          10,  # sys_getpid
    "sigprocmask":     80,  # sys_rt_sigprocmask, recalc_sigpending
    "sigpending":      40,  # sys_rt_sigpending
    "fcntl":          150,  # sys_fcntl, fget, f_setown
    "munmap":         120,  # sys_munmap, do_munmap where nothing is mapped: the semaphore, find_vma
    "bad_area":       250,  # do_page_fault without an area, or do_trap: force_sig_info
    "setup_frame":    450,  # do_signal, handle_signal, setup_frame, save_i387, stores apart
    "sigreturn":      350,  # sys_sigreturn, restore_sigcontext, loads apart
    # the host's kernel, for system calls of the guest's kernel
    "map":            900,  # sys_mmap2 or sys_mprotect of a page: do_munmap of what was there, areas, the entry apart
    "space":         2500,  # half of do_fork with copy_mm, or half of exit_mmap: a space has two roots here
    "write_pipe":     500,  # of the switch to another process: write to its pipe, wake_up
    "read_pipe":      700,  # read from the own, schedule and switch_to
    "set_stack":      100,  # sys_sigaltstack
    "schedule_idle":  500,  # sys_pause, schedule, cpu_idle, and the same back
    "set_timer":      400,  # sys_setitimer
    "interrupt":      300,  # do_IRQ, timer_interrupt, it_real_fn
    # user space
    "tracer":         400,  # one turn of the tracing thread's loop: pid to task, what stopped it, what to do
    "tracer_call":     60,  # C library around a system call
}
# fmt: on
