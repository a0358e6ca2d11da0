"""Plan safetensors checkpoints: shards, index, config.json, and sidecar files.

Weight values and packing belong to `codecs`: this folder knows a codec only by its layout, its
checks and its config section.
"""
