"""Formats of weights: layouts known before any data, and the arithmetic on arrays."""
