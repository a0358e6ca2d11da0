"""Fine-tunes of the embedded checkpoint as transformers and peft save them."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from checkpoints import ASSET

__all__ = ["FINE_TUNES", "save_fine_tune"]

_TEXT = ("tokenizer.json", "tokenizer_config.json")


def _load(kind: str) -> Any:
    return getattr(transformers, kind).from_pretrained(ASSET, dtype=torch.bfloat16)


def _whole(out: Path) -> None:
    """The whole model, with its processor and generation config."""
    _load("Qwen3_5ForConditionalGeneration").save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(ASSET).save_pretrained(out)
    transformers.AutoImageProcessor.from_pretrained(ASSET).save_pretrained(out)


def _text(out: Path) -> None:
    """The text model alone, by trainers of text; without a generation config."""
    _load("Qwen3_5ForCausalLM").save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(ASSET).save_pretrained(out)
    (out / "generation_config.json").unlink()


def _merged(out: Path) -> None:
    """A LoRA merged into the whole model, in small shards; no preprocessor was saved."""
    model = _load("Qwen3_5ForConditionalGeneration")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    adapted.merge_and_unload().save_pretrained(out, max_shard_size="4MB")
    transformers.AutoTokenizer.from_pretrained(ASSET).save_pretrained(out)


def _trained_head(out: Path) -> None:
    """A LoRA with a trained embedding merged into the text model; of the tokenizer, its base's."""
    model = _load("Qwen3_5ForCausalLM")
    config = LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["embed_tokens"])
    get_peft_model(model, config).merge_and_unload().save_pretrained(out)
    for name in _TEXT:
        shutil.copy(ASSET / name, out)


FINE_TUNES: dict[str, Callable[[Path], None]] = {
    "whole": _whole,
    "text": _text,
    "merged": _merged,
    "trained head": _trained_head,
}
"""Ways of saving a fine-tune; only the first is complete."""


def save_fine_tune(name: str, out: Path) -> Path:
    """Save a fine-tune: the embedded checkpoint after no training."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about tied weights
        FINE_TUNES[name](out)
    return out
