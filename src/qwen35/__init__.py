"""Ship Qwen3.5 checkpoints: quantized, verified, measured, published."""

from qwen35.version import __version__

__all__ = ["__version__"]
