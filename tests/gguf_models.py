"""Small checkpoints with a tokenizer, in the shapes that GGUF conversion tells apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.constants import GGUFValueType

from checkpoints import (
    ASSET,
    TORCH_DTYPES,
    Tensors,
    layout_of,
    tiny_config,
    write_checkpoint,
)
from qwen35.model.model_config import parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors, role_of
from qwen35.planning.gguf_files.vocabulary import PRE_TOKENIZERS

__all__ = [
    "VARIANTS",
    "exact_tensors",
    "make_variant",
    "rewrite_gguf",
    "sidecars",
    "tokenizer",
    "variant_config",
]

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>", "<think>", "</think>")


def tokenizer() -> dict[str, Any]:
    """Return a tokenizer.json of 256 bytes, five merges and a few added tokens."""
    asset = json.loads((ASSET / "tokenizer.json").read_text())
    letters = [token for token in asset["model"]["vocab"] if len(token) == 1]
    merges = [["t", "h"], ["i", "n"], ["Ġ", "a"], ["th", "e"], ["Ġ", "the"]]
    tokens = letters + ["".join(pair) for pair in merges]
    asset["model"] |= {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}
    asset["added_tokens"] = [
        {
            "id": len(tokens) + i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token.startswith("<|") and "fim" not in token,
        }
        for i, token in enumerate(_SPECIAL)
    ]
    pattern = asset["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    assert PRE_TOKENIZERS[pattern["Regex"]] == "qwen35"
    return asset  # type: ignore[no-any-return]


def sidecars() -> dict[str, str]:
    """Return the small files that a GGUF file is made of, name to text."""
    settings = {
        "add_bos_token": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    pixels = {"image_mean": [0.5, 0.25, 0.5], "image_std": [0.5, 0.5, 0.75]}
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    return {
        "README.md": "---\nlicense: apache-2.0\nbase_model: owner/Base-1B\n---\n# Hello\n",
        "chat_template.jinja": "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
        "generation_config.json": json.dumps(sampling),
        "preprocessor_config.json": json.dumps(pixels),
        "tokenizer.json": json.dumps(tokenizer(), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings),
    }


_MOE = {"moe": True, "tied": False}
_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {}),
    "text": ({"text_only": True, "tied": False, "mtp": 0}, {}),
    "deep": ({"layers": 16}, {"intermediate_size": 256, "num_attention_heads": 1}),
    "equal-heads": ({}, {"linear_num_key_heads": 4}),
    "three-to-one": ({}, {"linear_num_value_heads": 6}),
    "grouped": (
        {"layers": 8},
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64},
    ),
    "odd-rows": ({"text_only": True}, {"hidden_size": 288, "intermediate_size": 520}),
    "f16": ({"dtype": "float16"}, {}),
    "moe": (_MOE, {}),
    "moe-per-expert": (_MOE, {}),
    "moe-8": (_MOE, {"num_experts": 8, "moe_intermediate_size": 256}),
}
"""Name to options of `tiny_config` and to sizes of its text part."""

VARIANTS = tuple(_CONFIGS)
"""What is different: sizes, prefixes, heads, rows that do not fit k-quants, experts."""


def variant_config(name: str) -> dict[str, Any]:
    """Return config.json of a variant."""
    options, sizes = _CONFIGS[name]
    config = tiny_config(**options)
    config.get("text_config", config).update(sizes)
    return config


def exact_tensors(config: dict[str, Any], layout: CheckpointNaming, seed: int) -> Tensors:
    """Return weights that are the same on every machine: sums of small whole numbers, scaled.

    The caller may change them.
    """
    made = _exact_tensors(json.dumps(config), layout, seed)
    return {name: tensor.clone() for name, tensor in made.items()}


@lru_cache(maxsize=16)
def _exact_tensors(config: str, layout: CheckpointNaming, seed: int) -> Tensors:
    generator = np.random.default_rng(seed)
    tensors = {}
    for spec in expected_tensors(parse_config(json.loads(config)), layout):
        whole = generator.integers(0, 256, (4, *spec.shape)).sum(axis=0) - 510
        scale, shift = (2.0**-13, 0.0)
        role = role_of(spec.name).name
        if role.endswith("A_log"):
            scale, shift = 2.0**-10, 0.5
        elif role.endswith(("linear_attn.norm", "dt_bias", "norm1", "norm2", "merger.norm")):
            shift = 1.0
        values = torch.from_numpy(whole.astype(np.float32)) * scale + shift
        tensors[spec.name] = values.to(TORCH_DTYPES[spec.dtype])
    return tensors


def make_variant(folder: Path, name: str) -> Path:
    """Write the checkpoint `name` into ``folder/Tiny-NAME-1B``."""
    config = variant_config(name)
    layout = layout_of(config, per_expert=name == "moe-per-expert")
    tensors = exact_tensors(config, layout, seed=len(name))
    shards = 2 if name == "three-to-one" else 1
    return write_checkpoint(
        folder / f"Tiny-{name}-1B", config, tensors, shards=shards, sidecars=sidecars()
    )


def rewrite_gguf(
    source: Path, target: Path, architecture: str, change: Callable[[GGUFWriter], object]
) -> None:
    """Write a file again, by llama.cpp's library, with other keys or tensors."""
    reader, writer = GGUFReader(source), GGUFWriter(target, architecture)
    writer.kv_data[0].clear()
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), GGUFValueType(field.types[0]), sub)
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        writer.add_tensor(tensor.name, data, raw_dtype=GGMLQuantizationType(tensor.tensor_type))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
