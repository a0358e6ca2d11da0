"""Activation statistics: a forward pass over a text with one decoder layer in memory at a time.

Collects the statistics and writes them as JSON and importance matrices. Must not know how codecs
use them, nor the command line.
"""
