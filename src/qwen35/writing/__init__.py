"""Write planned outputs: one loop for any number of outputs of one source, whole or in slices.

It must not know formats (codecs and containers do) or how the work is shared out
(`qwen35.execution`).
"""
