"""Find keys of a GGUF file that contradict each other or its tensors; needs no source."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gguf.constants import LlamaFileType, TokenType

from qwen35.checkpoint.gguf_header import GgufHeader
from qwen35.codecs.ggml.types import GGML_TYPES, GgmlType
from qwen35.errors import Finding, InputError
from qwen35.planning.gguf_files.vocabulary import PRE_TOKENIZERS
from qwen35.verification.chat_prompts import ChatPrompts

__all__ = ["TEMPLATE", "sense_findings", "token_texts", "vocabulary_findings"]

TEMPLATE = "tokenizer.chat_template"
"""The key with the chat template."""

_TOKENS = "tokenizer.ggml.tokens"
_TYPES = "tokenizer.ggml.token_type"
_MERGES = "tokenizer.ggml.merges"
_LISTS: dict[str, type] = {_TOKENS: str, _TYPES: int, _MERGES: str}
_NOUNS: dict[type, str] = {str: "strings", int: "numbers"}
_END = "eos_token_id"
_IDS = (_END, "padding_token_id", "bos_token_id")
_FLAGS = ("add_bos_token", "add_eos_token")
_QUANTIZATION = 2
"""``GGML_QNT_VERSION``."""

_SIZE = re.compile(r"(\d+x)?(\d+(?:\.\d+)?)([KMBTQ])(-A.*)?\Z")
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "Q": 1e15}
_NEAR = 1.6
"""How far a file type may be from its tensors: rows that do not fit have other types."""

_CLOSE = 1.3
"""Labels are rounded to one or two digits."""

_NEWER = {41: "q2_0"}
"""File types of ``llama.h`` that `gguf` 0.19 does not know."""

_BESIDE = {"mxfp4": "q8_0"}
"""MXFP4_MOE is of MXFP4 in experts alone, and of Q8_0 elsewhere."""

_NUMBERS: dict[str, tuple[float, float]] = {
    "context_length": (1, 2**31),
    "rope.freq_base": (1, 1e12),
    "attention.layer_norm_rms_epsilon": (1e-12, 0.1),
    "expert_used_count": (1, 2**16),
}
"""Keys that no tensor contradicts, with their bounds."""


def sense_findings(container: GgufHeader, matrices: Sequence[str]) -> Iterator[Finding]:
    """Yield keys that contradict each other, the tensors, or what an engine takes.

    Args:
        container: a file with all keys that it needs.
        matrices: the tensors whose types the writer chose freely.
    """
    name = container.path.name
    keys = container.keys
    for message in (
        *_general(container),
        *_size_label(container),
        *_file_type(container, matrices),
        *_text_keys(keys, container.architecture),
    ):
        yield Finding("metadata", name, message)


def _general(container: GgufHeader) -> Iterator[str]:
    keys = container.keys
    expected = "mmproj" if container.architecture == "clip" else "model"
    kind = keys.get("general.type")
    if kind != expected:
        yield f"general.type is {kind!r}, expected {expected!r}"
    version = keys.get("general.quantization_version", _QUANTIZATION)
    if version != _QUANTIZATION:
        yield f"general.quantization_version is {version!r}, expected {_QUANTIZATION}"
    if not isinstance(keys.get("general.name"), str) or not keys["general.name"].strip():
        yield f"general.name is {keys.get('general.name')!r}, expected a name"


def _size_label(container: GgufHeader) -> Iterator[str]:
    """Check the label against the parameters; of experts it counts those of one."""
    label = container.keys.get("general.size_label")
    if label is None:
        return
    match = _SIZE.match(label) if isinstance(label, str) else None
    if match is None:
        yield f"general.size_label is {label!r}, expected a size such as 0.8B"
        return
    total = sum(math.prod(tensor.shape) for tensor in container.tensors.values())
    said = float(match[2]) * _UNITS[match[3]]
    if match[1]:
        return  # tools define the size of an expert differently
    if not total / _CLOSE <= said <= total * _CLOSE:
        yield f"general.size_label is {label!r}, but the tensors have {total} weights"


def _bits(kind: GgmlType) -> float:
    return 8 * kind.nbytes / kind.block


def _base(code: Any) -> str | None:
    """Return the type that a file type is named after; None if there is no such file type."""
    try:
        name = LlamaFileType(code).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return _NEWER.get(code)
    lower = {kind.lower(): kind for kind in GGML_TYPES}
    for candidate in (name, name.rpartition("_")[0]):
        if candidate.lower() in lower:
            return lower[candidate.lower()]
    return ""


def _file_type(container: GgufHeader, matrices: Sequence[str]) -> Iterator[str]:
    """Check the file type against the types of the tensors: it must lie among them."""
    code = container.keys.get("general.file_type")
    base = _base(code) if type(code) is int else None
    if base is None:
        yield f"general.file_type is {code!r}, expected a number of llama.cpp's list"
        return
    held = {container.tensors[n].kind for n in matrices if n in container.tensors}
    if not base or not held or {base, _BESIDE.get(base)} & {kind.name for kind in held}:
        return
    bits = sorted(map(_bits, held))
    if not bits[0] / _NEAR < _bits(GGML_TYPES[base]) < bits[-1] * _NEAR:
        names = ", ".join(sorted(kind.name for kind in held))
        yield f"general.file_type is {code}, of {base}, but the tensors are {names}"


def _text_keys(keys: Mapping[str, Any], architecture: str) -> Iterator[str]:
    for key, (low, high) in _NUMBERS.items():
        name = f"{architecture}.{key}"
        value = keys.get(name, low)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            yield f"{name} is {value!r}, expected {low:g} to {high:g}"
    width, values = (keys.get(f"{architecture}.attention.{n}_length") for n in ("key", "value"))
    if width != values:
        yield f"attention.key_length is {width!r} and value_length {values!r}, expected the same"
    yield from _rotary(keys, architecture)
    yield from _layers(keys, architecture)


def _rotary(keys: Mapping[str, Any], architecture: str) -> Iterator[str]:
    """Check the rotary dimensions: sections count pairs of them."""
    width = keys.get(f"{architecture}.rope.dimension_count")
    sections = keys.get(f"{architecture}.rope.dimension_sections")
    head = keys.get(f"{architecture}.attention.key_length")
    if width is None and sections is None:
        return
    if type(width) is not int or type(head) is not int or width % 2 or not 0 < width <= head:
        yield f"rope.dimension_count is {width!r}, expected an even number, {head} at most"
        return
    fits = isinstance(sections, list) and all(type(size) is int for size in sections)
    if not fits or 2 * sum(sections) != width:  # type: ignore[arg-type]
        yield f"rope.dimension_sections is {sections!r}, expected a sum of {width // 2}"


def _layers(keys: Mapping[str, Any], architecture: str) -> Iterator[str]:
    """Check that two ways of naming the layers of full attention agree: engines read either."""
    interval = keys.get(f"{architecture}.full_attention_interval")
    recurrent = keys.get(f"{architecture}.attention.recurrent_layers")
    if interval is None or not isinstance(recurrent, list):
        return
    if type(interval) is not int or interval < 1:
        yield f"full_attention_interval is {interval!r}, expected a positive number"
        return
    mtp = keys.get(f"{architecture}.nextn_predict_layers", 0)
    layers = recurrent[: len(recurrent) - mtp] if type(mtp) is int else recurrent
    if layers != [bool((i + 1) % interval) for i in range(len(layers))]:
        yield f"full_attention_interval is {interval}, but recurrent_layers says otherwise"


def vocabulary_findings(container: GgufHeader) -> Iterator[Finding]:
    """Yield what is wrong with the tokenizer's keys."""
    name, keys = container.path.name, container.keys
    malformed = list(_malformed(keys))
    for message in malformed or (*_tokens(keys), *_merged(keys), *_settings(keys)):
        yield Finding("metadata", name, message)


def _malformed(keys: Mapping[str, Any]) -> Iterator[str]:
    for key, kind in _LISTS.items():
        values = keys[key]
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            yield f"{key} is not a list of {_NOUNS[kind]}"
    for name in _IDS:
        value = keys.get(f"tokenizer.ggml.{name}", 0)
        if type(value) is not int:
            yield f"{name} is {value!r}, expected a number"
    for name in _FLAGS:
        value = keys.get(f"tokenizer.ggml.{name}", False)
        if type(value) is not bool:
            yield f"{name} is {value!r}, expected true or false"
    template = keys.get(TEMPLATE, "")
    if not isinstance(template, str):
        yield f"{TEMPLATE} is {template!r:.80}, expected a string"


def _tokens(keys: Mapping[str, Any]) -> Iterator[str]:
    tokens, types = keys[_TOKENS], keys[_TYPES]
    if len(tokens) != len(types):
        yield f"{len(tokens)} tokens, but {len(types)} token types"
    if len(set(tokens)) != len(tokens):
        yield "a token occurs twice"
    known = set(TokenType)
    wrong = next((value for value in types if value not in known), None)
    if wrong is not None:
        yield f"a token type is {wrong}, expected 1 to 6"
    for name in _IDS:
        value = keys.get(f"tokenizer.ggml.{name}")
        if value is None:
            continue
        if not 0 <= value < len(tokens):
            yield f"{name} is {value}, beyond the {len(tokens)} tokens"
        elif name == _END and value < len(types) and types[value] == TokenType.NORMAL:
            yield f"{name} is {value}, {tokens[value][:40]!r}, expected a special token"


def _merged(keys: Mapping[str, Any]) -> Iterator[str]:
    """Check that merges join tokens to tokens."""
    tokens, merges = set(keys[_TOKENS]), keys[_MERGES]
    if len(set(merges)) != len(merges):
        yield "a merge occurs twice"
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= tokens:
            yield f"merge {merge[:40]!r} does not join two tokens to a token"
            return


def _settings(keys: Mapping[str, Any]) -> Iterator[str]:
    model, pre = keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]
    if model != "gpt2":
        yield f"tokenizer.ggml.model is {model!r:.80}, expected 'gpt2'"
    if pre not in PRE_TOKENIZERS.values():
        known = " or ".join(sorted(PRE_TOKENIZERS.values(), reverse=True))
        yield f"tokenizer.ggml.pre is {pre!r:.80}, expected {known}"
    for name in ("bos", "eos"):
        if keys.get(f"tokenizer.ggml.add_{name}_token") and (
            f"tokenizer.ggml.{name}_token_id" not in keys
        ):
            yield f"add_{name}_token is true, but there is no {name}_token_id"
    if TEMPLATE not in keys:
        yield "no chat template: chat programs will guess one"
        return
    from qwen35.planning.safetensors_files.chat_template import compiles

    try:
        compiles(keys[TEMPLATE], TEMPLATE)
        ChatPrompts(TEMPLATE, keys[TEMPLATE], token_texts(keys))
    except InputError as error:
        yield f"{error.subject}: {error.found}"


def token_texts(keys: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that llama.cpp gives to a chat template, by name."""
    tokens = keys.get(_TOKENS)
    tokens = tokens if isinstance(tokens, list) else []
    ids = {name: keys.get(f"tokenizer.ggml.{name}_id") for name in ("bos_token", "eos_token")}
    return {
        name: str(tokens[i]) if type(i) is int and 0 <= i < len(tokens) else ""
        for name, i in ids.items()
    }
