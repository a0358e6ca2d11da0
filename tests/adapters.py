"""Adapters of the embedded checkpoint, and their merges, as peft 0.21 makes them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from checkpoints import ASSET

__all__ = ["ALL", "KINDS", "OF_EXPERTS", "make_adapter", "peft_merge"]

ALL = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
]
"""The twelve projections of a dense model."""

_SOME = {"r": 2, "lora_alpha": 3}
_CLASSES = {
    "text": "Qwen3_5ForCausalLM",
    "whole": "Qwen3_5ForConditionalGeneration",
    "experts": "Qwen3_5MoeForCausalLM",
}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "queries": ("text", {**_SOME, "target_modules": ["q_proj"]}),
    "out_proj": ("text", {**_SOME, "target_modules": ["out_proj"]}),
    "all": ("text", {"r": 5, "lora_alpha": 8, "target_modules": ALL}),
    "rslora": ("text", {"r": 3, "use_rslora": True, "target_modules": ["v_proj", "down_proj"]}),
    "patterns": (
        "text",
        {
            **_SOME,
            "target_modules": r"model\.layers\.[0-5]\..*(up_proj|in_proj_z|k_proj)",
            "exclude_modules": ["layers.1.mlp.up_proj"],
            "rank_pattern": {"up_proj": 4, r"layers\.3\..*k_proj": 3},
            "alpha_pattern": {"layers.0.mlp.up_proj": 7},
        },
    ),
    "layers": (
        "text",
        {**_SOME, "target_modules": ["gate_proj"], "layers_to_transform": [1, 4]},
    ),
    "vision": ("whole", {**_SOME, "target_modules": "all-linear"}),
    "dora": ("text", {**_SOME, "use_dora": True, "target_modules": ["q_proj", "out_proj"]}),
    "norms": ("text", {**_SOME, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "embedding": ("text", {**_SOME, "target_modules": ["q_proj", "embed_tokens"]}),
    "saved embedding": (
        "text",
        {**_SOME, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "saved head": (
        "text",
        {**_SOME, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "tokens": (
        "text",
        {
            **_SOME,
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [9, 5]},
        },
    ),
    "biases": ("whole", {**_SOME, "target_modules": ["qkv", "q_proj"], "bias": "all"}),
}
"""Class of the model and settings of each adapter."""


OF_EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "stacks": (
        "experts",
        {
            **_SOME,
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.down_proj", "experts.gate_up_proj", "mlp.gate.weight"],
            "rank_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 3},
        },
    ),
    "one stack": ("experts", {**_SOME, "target_parameters": ["mlp.experts.down_proj"]}),
}
"""The same of a mixture of experts."""


@lru_cache(maxsize=3)
def _base(kind: str, folder: Path = ASSET) -> Any:
    made = getattr(transformers, _CLASSES[kind])
    return made.from_pretrained(folder, dtype=torch.float32)


def make_adapter(kind: str, out: Path, *, seed: int = 0, base: Path = ASSET) -> Path:
    """Save an adapter of random changes, as after training."""
    class_name, settings = (KINDS | OF_EXPERTS)[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about tied weights
        model = get_peft_model(copy.deepcopy(_base(class_name, base)), LoraConfig(**settings))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                spread = 0.01 if "lora_" not in name or "magnitude" in name else 0.1
                parameter.data += spread * noise
        model.save_pretrained(out)
    return out


def peft_merge(kind: str, *adapters: Path, base: Path = ASSET) -> dict[str, torch.Tensor]:
    """Return the weights that peft merges in float32, by the names of the whole model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        class_name, _ = (KINDS | OF_EXPERTS)[kind]
        model: Any = copy.deepcopy(_base(class_name, base))
        for folder in adapters:
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    inner = "model.language_model." if class_name == "whole" else "model."
    return {
        name.replace(inner, "model.language_model.", 1): value
        for name, value in model.state_dict().items()
    }


Maker = Callable[[str], Path]
