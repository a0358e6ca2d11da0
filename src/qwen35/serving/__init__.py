"""Servers of models: requests with bounds, and their answers as plain values.

Everything that a server sends is untrusted. This package must not know what answers are used for.
"""
