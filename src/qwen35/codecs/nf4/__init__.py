"""bitsandbytes NF4: 4 bits per weight, blocks of 64, doubly quantized scales."""
