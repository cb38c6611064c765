"""A hypervisor without VT-x for guest kernels that are built for it, as Xen runs paravirtual guests on x86-64.

It runs in ring 0, the guest's kernel and its processes in ring 3 on two roots; a system call of a process goes through
the hypervisor, which builds a frame on the kernel's stack and calls it back, and so do exceptions and events. The
kernel calls the hypervisor by SYSCALL. Its tables are the processor's own (`vtsim.vmm.programs.direct_tables`): what it
maps is user memory, what its processes have is global as well, so that a change of roots drops only the kernel's.

SDM: "Privilege Levels"; "Fast System Calls in 64-Bit Mode"; "Caching Translation Information".
Not modelled: kernels in ring 1 behind segment limits, as in 32-bit guests; page tables that a guest writes to directly
and the hypervisor emulates or validates late; grant tables; several paravirtual VMs on one CPU without VT-x, and the
scheduler that they would need; addresses that are not canonical in frames of a kernel in ring 3; devices in memory.
"""
