"""VT-d: DMA and interrupt remapping."""
