"""Unquantized weights in BF16, F16 or F32.

Copies and exact comparison; also the target of every decoding.
"""
