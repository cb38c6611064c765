"""What the manual says about the VMCS, and the record that holds one."""
