"""Outputs on disk: a staging folder that becomes the output in one rename, its files, its journal.

It must not know how tensors are encoded, nor which threads, processes or machines write them.
"""
