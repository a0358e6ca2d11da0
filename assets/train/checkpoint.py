"""The checkpoint on disk: geometry, official key layout, tensor names and file names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from vocabulary import PADDED_VOCABULARY, special_ids

WEIGHTS = "model.safetensors-00001-of-00001.safetensors"
FLOAT32_SUFFIXES = (".linear_attn.A_log", ".linear_attn.norm.weight")
LAYERS = 8
TEMPLATE = Path(__file__).with_name("chat_template.jinja")

TEXT_GEOMETRY: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": special_ids()["<|endoftext|>"],
    "full_attention_interval": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "layer_types": ["linear_attention" if (i + 1) % 4 else "full_attention" for i in range(LAYERS)],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 64,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": PADDED_VOCABULARY,
    "mamba_ssm_dtype": "float32",
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
    },
}
VISION_GEOMETRY: dict[str, Any] = {
    "deepstack_visual_indexes": [],
    "depth": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "model_type": "qwen3_5",
    "num_heads": 2,
    "num_position_embeddings": 256,
    "out_hidden_size": 256,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
IMAGE_SETTINGS: dict[str, Any] = {
    "size": {"longest_edge": 262144, "shortest_edge": 4096},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
VIDEO_SETTINGS: dict[str, Any] = {
    **{k: v for k, v in IMAGE_SETTINGS.items() if k != "image_processor_type"},
    "video_processor_type": "Qwen3VLVideoProcessor",
}


def config() -> dict[str, Any]:
    """The content of config.json, with the keys and the key order of the official releases."""
    ids = special_ids()
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": ids["<|image_pad|>"],
        "model_type": "qwen3_5",
        "text_config": TEXT_GEOMETRY,
        "tie_word_embeddings": True,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": VISION_GEOMETRY,
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }


def generation_config() -> dict[str, Any]:
    """The content of generation_config.json: greedy, ending at either end token."""
    ids = special_ids()
    return {
        "do_sample": False,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
    }


def new_model() -> Qwen3_5ForConditionalGeneration:
    """An untrained float32 model of the asset's geometry."""
    settings = json.loads(json.dumps(config()))
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config.from_dict(settings)).float()


def stored_dtype(name: str) -> torch.dtype:
    """The dtype a tensor has in the official files."""
    return torch.float32 if name.endswith(FLOAT32_SUFFIXES) else torch.bfloat16


def stored_tensors(
    model: Qwen3_5ForConditionalGeneration, mtp: dict[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors under their official names and dtypes; the tied head is not stored."""
    named = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    named.update({f"mtp.{k}": v for k, v in mtp.items()})
    return {
        name: named[name].detach().to(stored_dtype(name)).contiguous().clone()
        for name in sorted(named)
    }


def write_json(path: Path, value: object) -> None:
    """Write a value as indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the one weight file and its index."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {
            "metadata": {"total_size": total},
            "weight_map": dict.fromkeys(sorted(tensors), WEIGHTS),
        },
    )


def save_settings(folder: Path) -> None:
    """Write the configuration files and the chat template."""
    write_json(folder / "config.json", config())
    write_json(folder / "generation_config.json", generation_config())
    write_json(folder / "preprocessor_config.json", IMAGE_SETTINGS)
    write_json(folder / "video_preprocessor_config.json", VIDEO_SETTINGS)
    shutil.copyfile(TEMPLATE, folder / "chat_template.jinja")
