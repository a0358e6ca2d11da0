"""Notes on config.json for users: unknown keys, and settings that engines read differently."""

from __future__ import annotations

from collections.abc import Iterator

from qwen35.errors import ConfigError
from qwen35.model.config_keys import (
    KeyValue,
    fixed_values,
    ignored_values,
    misplaced_keys,
    unknown_keys,
)
from qwen35.model.model_config import ModelConfig
from qwen35.model.rope import RopeSettings, rope_of

__all__ = ["config_notes", "foreign_keys", "refuse_uncarried"]

_CONFIG = "config.json"
_LLAMA_ROPE = ("default", "linear", "yarn")
"""Kinds of scaling that llama.cpp computes for this family (``src/models/qwen35.cpp``)."""


def config_notes(config: ModelConfig, *, head: bool = False) -> Iterator[str]:
    """Yield the notes, one sentence each.

    Args:
        config: the model's config.
        head: whether ``lm_head.weight`` is stored.
    """
    if head and config.tied:
        yield (
            "lm_head.weight is stored although tie_word_embeddings is true: transformers and "
            "llama.cpp use it where it differs from the embedding, vLLM does not"
        )
    yield from _architecture_notes(config)
    unknown = unknown_keys(config.raw)
    if unknown:
        yield (
            f"config.json has unknown keys: {_listed(unknown)}: checkpoints keep them, GGUF files "
            "cannot, and no check covers them"
        )
    misplaced = misplaced_keys(config.raw)
    if misplaced:
        yield (
            f"config.json has {_listed(misplaced)} beside text_config, where transformers does not "
            "look for the text model's keys: they have no effect"
        )
    for one in ignored_values(config.raw):
        yield (
            f"{one.path} is {ascii(one.value)[:80]}: transformers and llama.cpp always compute "
            f"{one.row.why}, other engines may not"
        )
    yield from _tied_notes(config)
    yield from _quantization_notes(config)
    yield from _text_notes(config)
    try:
        yield from _rope_notes(config, rope_of(config.text_raw))
    except ConfigError as error:
        yield f"transformers refuses config.json: {error.message}"


def foreign_keys(config: ModelConfig) -> Iterator[KeyValue]:
    """Yield keys that transformers obeys and this package does not."""
    return (one for one in fixed_values(config.raw) if one.row.reader)


def refuse_uncarried(config: ModelConfig, *, vision: bool) -> None:
    """Refuse a config whose numbers a GGUF file cannot reproduce in llama.cpp.

    Args:
        config: the model's config.
        vision: whether the file contains the vision tower instead of the text model.

    Raises:
        ConfigError: a key has a value that llama.cpp does not compute with.
    """
    for one in fixed_values(config.raw):
        if one.section.startswith("vision_config") is vision:
            raise ConfigError(
                _CONFIG,
                f"{one.path} is {repr(one.value)[:80]}, which a GGUF file cannot express",
                expected=f"{_listed([repr(value) for value in one.row.only[:1]])}: llama.cpp "
                f"computes {one.row.why}",
                hint="convert it to a checkpoint instead",
            )
    if vision:
        return
    kind = rope_of(config.text_raw).kind
    if kind not in _LLAMA_ROPE:
        raise ConfigError(
            _CONFIG,
            f"rope_type {kind}, which llama.cpp cannot compute for this family",
            expected=", ".join(_LLAMA_ROPE),
            hint="convert it to a checkpoint instead",
        )


def _listed(names: list[str]) -> str:
    # a name from a file must not end the line, or reach the terminal as an escape sequence
    shown = [(name if name.isprintable() else ascii(name))[:80] for name in names[:8]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _architecture_notes(config: ModelConfig) -> Iterator[str]:
    """Yield a note if the classes that config.json names are not those of its model_type."""
    expected, named = config.architecture.class_name, config.raw.get("architectures")
    if named is not None and named != [expected]:
        yield (
            f"architectures is {repr(named)[:80]}, but model_type {config.model_type} is "
            f"{expected}: it is read as the latter, but some engines go by the former"
        )
    inner = config.text_raw.get("model_type", "")
    text = f"{config.model_type}_text"
    if config.architecture.vision and inner not in ("", text):
        yield (
            f"model_type is {config.model_type}, but {repr(inner)[:80]} in text_config, "
            f"expected {text}"
        )


def _tied_notes(config: ModelConfig) -> Iterator[str]:
    if not config.architecture.vision:
        return
    inner = bool(config.text_raw.get("tie_word_embeddings", False))
    if inner is not config.tied:
        root, text = (str(value).lower() for value in (config.tied, inner))
        yield (
            f"tie_word_embeddings is {root} at the root of config.json and {text} in text_config "
            "(absent means false): transformers' ForConditionalGeneration goes by the root, as "
            "here, but its ForCausalLM and vLLM by text_config; llama.cpp ties if there is no head"
        )


def _quantization_notes(config: ModelConfig) -> Iterator[str]:
    if config.quantization is not None and "quantization_config" not in config.raw:
        yield (
            "quantization_config is only in text_config: vLLM reads it there, transformers does not"
        )


def _text_notes(config: ModelConfig) -> Iterator[str]:
    text = config.text_raw
    if text.get("attn_output_gate") is False:
        yield "attn_output_gate is false: vLLM obeys, transformers and llama.cpp always gate"
    if text.get("rope_scaling") and text.get("rope_parameters"):
        yield (
            "config.json has rope_scaling and rope_parameters: transformers reads only the former"
        )


def _rope_notes(config: ModelConfig, rope: RopeSettings) -> Iterator[str]:
    text, given = config.text_raw, rope.parameters
    named = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if "rope_theta" not in text and "rope_theta" not in named:
        yield "config.json has no rope_theta: 10000 is used, as in transformers"
    if given.get("mrope_interleaved") is False:
        yield "mrope_interleaved is false: vLLM obeys, transformers and llama.cpp always interleave"
    if rope.kind != "yarn":
        return
    beside, inside = (one.get("original_max_position_embeddings") for one in (text, named))
    if beside is not None and beside != inside:
        yield (
            f"YaRN starts from original_max_position_embeddings {beside}, which is beside the "
            "rope parameters: transformers reads it there, vLLM does not"
        )
    betas = rope.number("beta_fast", 32), rope.number("beta_slow", 1)
    if betas != (32, 1):
        yield (
            f"YaRN with beta_fast {betas[0]} and beta_slow {betas[1]}: a GGUF file stores them, "
            "but llama.cpp always uses 32 and 1 for this family"
        )
    if given.get("truncate", True) is not True:
        yield "YaRN without truncate: a GGUF file cannot express that, and llama.cpp truncates"
