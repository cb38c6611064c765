"""A guest kernel that is a program of the host's user space, as user-mode Linux with its tracing thread.

The host's kernel runs in ring 0, and in ring 3 the guest's kernel, its processes and the tracing thread, a process of
the host on tables of its own. A system call or an exception of a guest process stops it; the host's scheduler switches
to the tracing thread, which reads its registers, has the host do nothing for it and passes a signal on, whose handler
is the guest's kernel: by ptrace, a system call of the host each. The handler signals itself before it returns, and
stops once more when it has. The kernel that was built for a hypervisor in ring 3 is the guest's: what was a hypercall
there is a system call of the host here, by INT 80H, what was one request of many there is a mapping by itself; and it
makes the calls that only its host is in need of, to return, to switch, and to empty the space of a new process.

Dike, "A user-mode port of the Linux kernel", ALS 2000: "Virtualizing system calls", "Eliminating the tracing thread".
The port in Linux 2.6.11 with a tracing thread ("tt"): which system calls it makes where.
Not modelled: guest processes that reach their kernel's memory, as those of a tracing thread without its jail do (each
has a root without it, which costs nothing beside the switch); faults of the host on what it has mapped (it populates);
areas of the host (a page of a guest is one), which searches among many take longer for; the host's own copy of a
process's tables at fork; what the tracing thread does at fork and exec; the walk of a space for what the host does not
have yet, at each switch; signals blocked by a call around each lock; INT 80H of guest processes; ticks of the host.
"""
