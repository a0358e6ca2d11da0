"""bitsandbytes NF4: 4 bits a weight, blocks of 64, doubly quantized scales."""
