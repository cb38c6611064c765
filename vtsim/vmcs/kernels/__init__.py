"""What VM entry checks, one module per list of the manual; each kernel returns the number of the first failed check."""
