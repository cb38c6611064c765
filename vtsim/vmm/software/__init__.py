"""A virtual CPU that is a program: no instruction of the guest is executed by the processor itself.

The program runs in ring 0 of root operation and uses nothing of VT-x. It keeps the guest's registers in memory,
translates every address of the guest by a software TLB and walks of its own, and executes one instruction after the
other (`interpreter`) or blocks that it has translated (`dynamic-translation`).

Not modelled: PCIDs and global pages in a software TLB, which every load of CR3 empties; SMEP, SMAP, reserved bits and
canonical addresses in its walks; accesses of one instruction that cross a page, which end the VM; the last page of the
linear address space; a guest that stores into its own code; recorded streams and look-ups in recorded structures;
devices of the guest, in memory and behind ports; single steps and debug registers beyond their values.
"""
