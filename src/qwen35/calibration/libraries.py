"""Late import of torch and transformers, which most commands do without."""

from __future__ import annotations

from typing import Any

from qwen35.engines.torch_model import refuse_hub_kernels
from qwen35.errors import UsageError

__all__ = ["libraries"]


def libraries() -> tuple[Any, Any]:
    """Return torch and transformers.

    Raises:
        UsageError: one of them is not installed.
    """
    refuse_hub_kernels()
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UsageError(
            "calibrate", f"{error.name} is not installed", hint="pip install 'qwen35[nf4]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers
