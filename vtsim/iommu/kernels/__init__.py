"""What a remapping unit does, as compiled functions of its vector and of simulated memory."""
