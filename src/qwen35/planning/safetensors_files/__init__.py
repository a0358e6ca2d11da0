"""Checkpoints in safetensors: shards with their index, config.json, and what lies beside them."""
