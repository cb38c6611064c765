"""EPT and guest paging structures, and the walkers that read them."""
