"""Compare the keys of a GGUF file with those its source implies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qwen35.checkpoint.gguf_header import GgufHeader
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.ggml.codec import BlockSpec
from qwen35.errors import Finding, InputError
from qwen35.model.config_keys import fixed_values
from qwen35.model.model_config import ModelConfig
from qwen35.model.rope import rope_of
from qwen35.planning.gguf_files.metadata import SourceDocuments, keys_of, model_name
from qwen35.planning.gguf_files.mixes import FILE_TYPES
from qwen35.planning.gguf_files.vocabulary import read_vocabulary
from qwen35.verification.config_meaning import text_meaning
from qwen35.verification.gguf_sense import TEMPLATE, token_texts
from qwen35.verification.settings_comparison import (
    ABSENT,
    SettingsComparison,
    same_value,
    shown,
)
from qwen35.verification.template_comparison import compare_template

__all__ = ["compare_keys"]

_CHECKED_ALONE = frozenset(
    {
        "general.alignment",
        "general.file_type",
        "general.name",
        "general.quantization_version",
        "general.size_label",
        TEMPLATE,
    }
)
"""Keys that are checked in another way."""

_ENGINE = ("qwen35", "clip.", "tokenizer.", "general.sampling.", "general.architecture")
"""Beginnings of the keys that an engine computes with; the others are labels."""

_DEFAULTS: dict[str, Any] = {
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_eos_token": False,
    "tokenizer.ggml.add_sep_token": False,
    "tokenizer.ggml.add_space_prefix": False,
    "full_attention_interval": 4,
    "nextn_predict_layers": 0,
    "rope.scaling.type": "none",
}
"""What llama.cpp takes for an absent key (``src/llama-vocab.cpp``, ``src/llama-model.cpp``)."""

_UNSCALED = ("default", "none")


def compare_keys(container: GgufHeader, source: Checkpoint, result: SettingsComparison) -> None:
    """Compare every key of a file with what the source gives.

    Raises:
        InputError: the source's small files are damaged.
    """
    file, architecture = container.path.name, container.architecture
    with SourceDocuments.of(source) as documents:
        vocabulary, template = None, None
        vision = architecture == "clip"
        if not vision:
            try:
                vocabulary = read_vocabulary(documents.folder, source.config.dims["vocab"])
            except InputError as error:
                result.skipped.append(f"{file}: its tokenizer: of the source, {error}")
        code = container.keys.get("general.file_type")
        file_type = next((t for t in FILE_TYPES.values() if t.code == code), FILE_TYPES["F16"])
        mtp = container.keys.get(f"{architecture}.nextn_predict_layers", 0)
        expected = keys_of(
            source.config,
            documents,
            file_type,
            [BlockSpec(t.name, t.kind.name, t.shape) for t in container.tensors.values()],
            vocabulary=vocabulary,
            mtp_layers=mtp if type(mtp) is int else 0,
            vision=vision,
        )
        template = expected.get(TEMPLATE)
    _compare(container, expected, tokenizer=vocabulary is not None, result=result)
    _compare_name(container, expected, source, result)
    if not vision:
        found = {finding.message.partition(" ")[0] for finding in result.findings}
        for key, message in _against_config(container, source):
            if key not in found:
                result.findings.append(Finding("metadata", file, message))
        _compare_template(container, template, result)


def _compare(
    container: GgufHeader,
    expected: Mapping[str, Any],
    *,
    tokenizer: bool,
    result: SettingsComparison,
) -> None:
    file, labels = container.path.name, []
    for key in dict.fromkeys((*expected, *container.keys)):
        if key in _CHECKED_ALONE or (key.startswith("tokenizer.") and not tokenizer):
            continue
        default = _DEFAULTS.get(key, _DEFAULTS.get(key.partition(".")[2], ABSENT))
        ours = container.keys.get(key, default)
        theirs = expected.get(key, default)
        if same_value(_stored(ours), _stored(theirs)):
            continue
        message = f"{key} is {shown(ours, theirs)}, the source gives {shown(theirs, ours)}"
        if key.startswith(_ENGINE) and not (key.startswith("general.sampling") and ours is ABSENT):
            result.findings.append(Finding("metadata", file, message))
        elif key in expected or not key.startswith(("quantize.", "split.")):
            labels.append(message)
    result.notes += [f"{file}: {message}" for message in labels]


def _stored(value: Any) -> Any:
    """Return floats as a GGUF file holds them."""
    if isinstance(value, float):
        return float(np.float32(value))
    return [_stored(one) for one in value] if isinstance(value, list | tuple) else value


def _letters(text: Any) -> str:
    return re.sub(r"[\W_]", "", str(text)).lower()


def _compare_name(
    container: GgufHeader,
    expected: Mapping[str, Any],
    source: Checkpoint,
    result: SettingsComparison,
) -> None:
    """Compare the model's name with the source's and the file's; spelling does not count."""
    name = container.keys.get("general.name", "")
    file = _letters(container.path.name.removeprefix("mmproj-").removeprefix("mtp-"))
    known = {_letters(expected.get("general.name")), _letters(model_name(source))}
    if _letters(name) in known or (_letters(name) and file.startswith(_letters(name))):
        return
    message = f"general.name is {shown(name)}, the source gives {shown(expected['general.name'])}"
    result.findings.append(Finding("metadata", container.path.name, message))


def _compare_template(container: GgufHeader, template: Any, result: SettingsComparison) -> None:
    file, ours = container.path.name, container.keys.get(TEMPLATE)
    if not isinstance(ours, str):  # without a source, too, that is a finding
        return
    if not isinstance(template, str):
        result.skipped.append(f"{file}: its chat template: the source has none")
        return
    tokens = token_texts(container.keys)
    compare_template(file, ours, template, tokens, vision=False, told=True, result=result)


def _against_config(container: GgufHeader, source: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield keys that contradict config.json, read here apart from what the writer makes of it."""
    config, architecture = source.config, container.architecture
    for one in fixed_values(config.raw):
        if not one.section.startswith("vision"):
            message = f"{one.path} is {shown(one.value)} in the source, llama.cpp has {one.row.why}"
            yield one.path, message
    for key, value in _carried(config).items():
        name = f"{architecture}.{key}"
        ours = container.keys.get(name, _DEFAULTS.get(key, ABSENT))
        if not same_value(_stored(ours), _stored(value)):
            yield name, f"{name} is {shown(ours)}, config.json of the source says {shown(value)}"


def _carried(config: ModelConfig) -> dict[str, Any]:
    """Return keys of GGUF, without the architecture, and their values by a config."""
    meaning, rope = text_meaning(config), rope_of(config.text_raw)
    carried = {
        "attention.head_count": meaning["num_attention_heads"],
        "attention.head_count_kv": meaning["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": meaning["rms_norm_eps"],
        "context_length": meaning["max_position_embeddings"],
        "rope.dimension_count": int(config.dims["head"] * rope.partial),
        "rope.freq_base": rope.theta,
    }
    if config.moe:  # a dense model may have the key all the same
        carried["expert_used_count"] = meaning["num_experts_per_tok"]
    if rope.kind not in _UNSCALED:
        carried |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": rope.factor}
    if "original_max_position_embeddings" in rope.parameters:
        carried["rope.scaling.original_context_length"] = rope.length
    return carried
