"""The Qwen3.5 family: geometry, tensor names, roles, published sizes.

Pure knowledge, derived from config.json alone: no files, weight formats or outputs.
"""
