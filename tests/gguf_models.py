"""Small checkpoints with a tokenizer, in the shapes that GGUF conversion tells apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints import (
    ASSET,
    layout_of,
    random_tensors,
    tiny_config,
    write_checkpoint,
)
from qwen35.gguf.vocabulary import PRE_TOKENIZERS

__all__ = ["VARIANTS", "make_variant", "sidecars", "tokenizer"]

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
        "README.md": "---\nlicense: apache-2.0\nbase_model: owner/Base-1B\ntags: [tiny]\n---\n# Hi\n",
        "chat_template.jinja": "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
        "generation_config.json": json.dumps(sampling),
        "preprocessor_config.json": json.dumps(pixels),
        "tokenizer.json": json.dumps(tokenizer(), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings),
    }


def _changed(config: dict[str, Any], **sizes: Any) -> dict[str, Any]:
    """Return a config with other sizes in its text part."""
    text = config.get("text_config", config)
    text |= sizes
    return config


def _config(name: str) -> dict[str, Any]:
    """Return config.json of a variant."""
    if name == "dense":
        return tiny_config()
    if name == "text":
        return tiny_config(text_only=True, tied=False, mtp=0)
    if name == "deep":
        small = {"intermediate_size": 256, "num_attention_heads": 1, "linear_value_head_dim": 64}
        return _changed(tiny_config(layers=16), **small)
    if name == "equal-heads":
        return _changed(tiny_config(), linear_num_key_heads=4)
    if name == "three-to-one":
        return _changed(tiny_config(mtp=2), linear_num_value_heads=6)
    if name == "grouped":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
        return _changed(tiny_config(layers=8), **heads)
    if name == "odd-rows":
        return _changed(tiny_config(text_only=True), hidden_size=288, intermediate_size=520)
    if name == "f16":
        return tiny_config(dtype="float16")
    moe = {"moe": True, "tied": False}
    if name in ("moe", "moe-per-expert"):
        return tiny_config(**moe)
    assert name == "moe-8"
    return _changed(tiny_config(**moe), num_experts=8, moe_intermediate_size=256)


VARIANTS = (
    "dense",
    "text",
    "deep",
    "equal-heads",
    "three-to-one",
    "grouped",
    "odd-rows",
    "f16",
    "moe",
    "moe-per-expert",
    "moe-8",
)
"""What is different: sizes, prefixes, heads, rows that do not fit k-quants, experts."""


def make_variant(folder: Path, name: str, *, extra: Mapping[str, str] | None = None) -> Path:
    """Write the checkpoint `name` into ``folder/Tiny-NAME-1B`` with random weights."""
    config = _config(name)
    layout = layout_of(config, per_expert=name == "moe-per-expert")
    tensors = random_tensors(config, layout, seed=len(name))
    files = sidecars() | dict(extra or {})
    shards = 2 if name == "three-to-one" else 1
    return write_checkpoint(
        folder / f"Tiny-{name}-1B", config, tensors, shards=shards, sidecars=files
    )
