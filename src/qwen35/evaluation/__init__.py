"""Evaluation: how far quantized models diverge from the unquantized one, token by token.

Runs models, compares their logits and computes the statistics. Must not know how artifacts are
made, nor how a report is drawn.
"""
