"""Block-wise FP8 (E4M3): one scale per tile of 128 x 128."""
