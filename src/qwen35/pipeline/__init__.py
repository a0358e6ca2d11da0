"""Run whole paths: plan a graph of steps, then run it as far as its gates allow.

Steps call planning, writing, verification, evaluation and publishing; this folder only orders them,
judges the gates and records what is up to date. It knows no format and no command-line flag.
"""
