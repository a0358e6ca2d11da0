"""NVFP4: E2M1 codes in blocks of 16, an E4M3 scale per block and a scale of the whole."""
