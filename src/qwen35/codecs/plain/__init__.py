"""Weights that are not quantized: as they were trained, in BF16, F16 or F32."""
