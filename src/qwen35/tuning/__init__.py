"""Tuning: find a recipe under a budget, by measuring which weights need more bits.

Probes, fits costs, solves for the best allocation and writes it as an ordinary recipe. Must not
know the bytes of a format: plans and codecs do.
"""
