"""A monitor in ring 0 of root operation that runs guest kernels in ring 3, without VT-x.

A guest has two address spaces: shadow tables of its kernel, in which all that it maps is accessible in ring 3, and of
its processes. The monitor is mapped in both, where the guest cannot reach it, and switches between them at every system
call, exception, interrupt and return.

SDM: "Privilege Levels"; "Memory Virtualization".
Not modelled: deprivileged kernels in ring 1 (32-bit guests, segment limits); PCIDs that tag the two address spaces
of a deprivileged guest; SMEP and SMAP of its kernel once a page is mapped; several deprivileged VMs on one CPU; devices
in memory under a monitor, which end the VM; exceptions of a deprivileged guest whose stack is not mapped, which end it.
"""
