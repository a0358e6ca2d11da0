"""Tuning: find a recipe under a budget, by measuring which weights need more bits.

Prices every weight in every type, solves for the best allocation and writes it as an ordinary
recipe. Must not know the bytes of a format: plans and codecs do.
"""
