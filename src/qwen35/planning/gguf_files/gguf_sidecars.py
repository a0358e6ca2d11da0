"""The small files of a checkpoint, made of the keys of GGUF files: the inverse of `vocabulary`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gguf.constants import TokenType

from qwen35.checkpoint.gguf_header import GgufHeader
from qwen35.checkpoint.header import json_bytes
from qwen35.errors import ConfigError
from qwen35.planning.gguf_files.gguf_config import short_number, token_id
from qwen35.planning.gguf_files.vocabulary import PRE_TOKENIZERS

__all__ = ["sidecars_of"]

_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED)
_ORDINARY = (
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
"""Added tokens that the family does not hold to be special, though files call them control tokens:
the converter goes by their form."""

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
_ROLES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Settings of generation_config.json by the last part of their key, as the `gguf` library reads
them."""

_PIXELS = {"longest_edge": 16_777_216, "shortest_edge": 65_536}
_VIDEO_PIXELS = {"longest_edge": 25_165_824, "shortest_edge": 4_096}
"""Pixels of an image or a video; the family's, since no key says them."""


def sidecars_of(text: GgufHeader, vision: GgufHeader | None) -> dict[str, bytes]:
    """Return the small files by name.

    Args:
        text: the language model's file.
        vision: the projector's file, if there is one.

    Raises:
        ConfigError: the vocabulary is malformed.
        ValueError: it is not of the family (`qwen35.planning.gguf_files.gguf_config.sensible`).
    """
    tokens, types, merges = _lists(text)
    keys = text.keys
    added = list(_added(tokens, types))
    files = {
        "generation_config.json": json_bytes(_generation(keys)),
        "tokenizer.json": json_bytes(_tokenizer(keys, tokens, types, merges, added)),
        "tokenizer_config.json": json_bytes(_settings(keys, tokens, added)),
    }
    template = keys.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    if vision is not None:
        files |= {name: json_bytes(value) for name, value in _processors(vision).items()}
    return files


def _lists(container: GgufHeader) -> tuple[list[str], list[int], list[str]]:
    name = container.path.name
    tokens: list[str] = _list(container, "tokens", str)
    types: list[int] = _list(container, "token_type", int)
    merges: list[str] = _list(container, "merges", str)
    if len(types) != len(tokens):
        raise ConfigError(name, f"{len(types)} token types", expected=f"{len(tokens)} as tokens")
    if len(set(tokens)) != len(tokens):
        raise ConfigError(name, "a token occurs twice", hint="the tokenizer is damaged")
    return tokens, types, merges


def _list(container: GgufHeader, end: str, kind: type) -> Any:
    values = container.keys.get(f"tokenizer.ggml.{end}")
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        noun = "strings" if kind is str else "numbers"
        found = f"tokenizer.ggml.{end} is missing, or not a list of {noun}"
        hint = "the tokenizer is needed, and it is not whole"
        raise ConfigError(container.path.name, found, hint=hint)
    return values


def _added(tokens: list[str], types: list[int]) -> Iterator[dict[str, Any]]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in _ADDED:
            special = kind == TokenType.CONTROL and token not in _ORDINARY
            yield {"id": i, "content": token, **plain, "special": special}


def _tokenizer(
    keys: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    merges: list[str],
    added: list[dict[str, Any]],
) -> dict[str, Any]:
    model, pre = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.pre")
    regex = next((regex for regex, name in PRE_TOKENIZERS.items() if name == pre), None)
    if model != "gpt2" or regex is None:
        raise ValueError(f"tokenizer {model!r:.80} with pre-tokenizer {pre!r:.80}")
    pairs = [merge.partition(" ")[::2] for merge in merges]
    kept = zip(tokens, types, strict=True)
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    first = {**_BYTE_LEVEL, "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, first]},
        "post_processor": {**_BYTE_LEVEL, "trim_offsets": False},
        "decoder": {**_BYTE_LEVEL, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {t: i for i, (t, kind) in enumerate(kept) if kind == TokenType.NORMAL},
            "merges": pairs,
        },
    }


def _settings(
    keys: Mapping[str, Any], tokens: list[str], added: list[dict[str, Any]]
) -> dict[str, Any]:
    held = {token["content"] for token in added}
    length = keys.get(f"{keys.get('general.architecture')}.context_length")
    return {
        "add_bos_token": keys.get("tokenizer.ggml.add_bos_token") is True,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added
        },
        "bos_token": _token(keys, tokens, "bos"),
        "clean_up_tokenization_spaces": False,
        "eos_token": _token(keys, tokens, "eos"),
        "errors": "replace",
        **{role: token for role, token in _ROLES.items() if token in held},
        "model_max_length": length,
        "pad_token": _token(keys, tokens, "padding"),
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _token(keys: Mapping[str, Any], tokens: list[str], role: str) -> str | None:
    number = keys.get(f"tokenizer.ggml.{role}_token_id")
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise ValueError(f"tokenizer.ggml.{role}_token_id is {number!r:.80} of {len(tokens)}")
    return tokens[number]


def _generation(keys: Mapping[str, Any]) -> dict[str, Any]:
    end, pad = (keys.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "padding"))
    text_end = token_id(keys, "<|endoftext|>")
    ends = list(dict.fromkeys(i for i in (end, text_end) if i is not None))
    sampled = {
        name: short_number(keys, f"general.sampling.{key}")
        for key, name in _SAMPLING.items()
        if f"general.sampling.{key}" in keys
    }
    named = {"eos_token_id": ends, "pad_token_id": pad}
    settings = {"do_sample": bool(sampled), **{k: v for k, v in named.items() if v is not None}}
    return settings | sampled


def _processors(vision: GgufHeader) -> dict[str, dict[str, Any]]:
    keys = {key.removeprefix("clip.vision."): value for key, value in vision.keys.items()}
    common = {
        "patch_size": keys.get("patch_size"),
        "temporal_patch_size": 2,
        "merge_size": keys.get("spatial_merge_size"),
        "image_mean": keys.get("image_mean"),
        "image_std": keys.get("image_std"),
        "processor_class": "Qwen3VLProcessor",
    }
    return {
        "preprocessor_config.json": {
            "size": _PIXELS,
            **common,
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        "video_preprocessor_config.json": {
            "size": _VIDEO_PIXELS,
            **common,
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    }
