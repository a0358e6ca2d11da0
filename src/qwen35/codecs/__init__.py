"""Formats of weights: `layout` says what is written before any data is seen, `encode` writes it."""
