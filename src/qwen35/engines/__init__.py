"""Engines that run models in this process: llama.cpp and transformers.

They load a model and return logits or tokens. They must not know what these are compared with.
"""
