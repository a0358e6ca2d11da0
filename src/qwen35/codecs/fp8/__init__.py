"""Block-wise FP8 (E4M3): a scale for each tile of 128 x 128."""
