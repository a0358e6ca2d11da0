"""FP8 with a scale for each output channel: E4M3 codes, as compressed-tensors stores them."""
