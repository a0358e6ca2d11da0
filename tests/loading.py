"""Loading checkpoints in transformers on a CPU, around what fails there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers

SKIP = ["lm_head", "model.visual", "model.language_model.embed_tokens"]


def load_model(folder: Path, kind: str = "Qwen3_5ForConditionalGeneration") -> tuple[Any, Any]:
    """Return the model in evaluation mode and transformers' report of its keys."""
    model, info = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", output_loading_info=True
    )
    return settle(model), info


def settle(model: Any) -> Any:
    """Switch off the packed CPU path of bitsandbytes 0.50.

    It asserts that a layer's outputs are a multiple of 32, which in_proj_a and in_proj_b of most
    sizes are not, and it rewrites the weights on first use.
    """
    for module in packed_layers(model):
        module.support_avx512bf16_for_cpu = False
    return model.eval()


def packed_layers(model: Any) -> list[Any]:
    """Return the model's NF4 layers."""
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def quantize_with_transformers(source: Path, out: Path) -> Any:
    """Quantize as users do today: load with a bitsandbytes config, save."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=SKIP,
    )
    model = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(out)
    return settle(model)


def clean(info: Any) -> bool:
    """Whether nothing was missing, unexpected or of another shape."""
    return not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
