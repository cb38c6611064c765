"""Base states and the memory image of recorded VMX cases."""
