"""A guest kernel that is a program of the host's user space, as user-mode Linux with its tracing thread.

The host's kernel runs in ring 0, and in ring 3 the guest's kernel, its processes and the tracing thread, a process of
the host on tables of its own. A system call or an exception of a guest process stops it; the host's scheduler switches
to the tracing thread, which asks for registers, changes them and lets the process go on in its kernel: by ptrace, a
system call of the host each. So does the way back. The kernel that was built for a hypervisor in ring 3 is the guest's:
what was a hypercall there is a system call of the host here, what was one request of many there is a mapping by itself.

Dike, "A user-mode port of the Linux kernel", ALS 2000: "Virtualizing system calls", "Eliminating the tracing thread".
Not modelled: guest processes that reach their kernel's memory, as those of a tracing thread without its jail do (each
has a root without it, which costs nothing beside the switch); faults of the host on what it has mapped (it populates);
system calls that block signals where a frame holds the mask; what the tracing thread does at fork and exec; INT 80H;
ticks of the host.
"""
