"""The files that a plan generates: config.json, the index, and text-only versions of sidecars."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.header import json_bytes, strict_json
from qwen35.checkpoint.locations import FileLocation
from qwen35.checkpoint.source import INDEX_NAME, SINGLE_NAME, Checkpoint
from qwen35.codecs.registry import CODECS
from qwen35.errors import InputError
from qwen35.planning.safetensors_files.config_json import output_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qwen35.codecs.dialect import Dialect
    from qwen35.planning.output_plan import PlannedFile
    from qwen35.planning.safetensors_files.safetensors_steps import DraftStep

__all__ = ["DOCUMENTS", "DraftedOutput", "documents", "template_notes"]

MAX_BYTES = 64 * 2**20
"""Bound on a sidecar that is held in memory, far above real ones."""


@dataclass(frozen=True)
class DraftedOutput:
    """A planned output, before its documents.

    Args:
        checkpoint: the source.
        drafts: the steps of its weights.
        files: the files that hold tensors.
        text_only: whether the vision tower of a vision-language source is dropped.
        prefix: prefix of text tensors in the output.
        cached: whether it has scales of a KV cache.
        dialect: of its files, if it is not the family's own.
    """

    checkpoint: Checkpoint
    drafts: Sequence[DraftStep]
    files: Sequence[PlannedFile]
    text_only: bool
    prefix: str
    cached: bool
    dialect: Dialect | None = None


def documents(output: DraftedOutput) -> dict[str, bytes]:
    """Return the generated files of an output, by name.

    Raises:
        InputError: a template or a JSON file of the source is invalid.
        UsageError: no loader could read the output.
    """
    contents = {name: make(output, name) for name, make in DOCUMENTS.items()}
    made = {name: content for name, content in contents.items() if content is not None}
    quantization = json.loads(made["config.json"]).get("quantization_config")
    for codec in {draft.codec for draft in output.drafts if draft.outputs}:
        beside = CODECS[codec].documents(quantization or {})
        made |= {name: json_bytes(content) for name, content in beside.items()}
    return made


def _config(output: DraftedOutput, name: str) -> bytes:
    del name
    return json_bytes(
        output_config(
            output.checkpoint.config,
            output.drafts,
            text_only=output.text_only,
            prefix=output.prefix,
            cached=output.cached,
            dialect=output.dialect,
        )
    )


def _index(output: DraftedOutput, name: str) -> bytes | None:
    """Return the index, which only a single file of the usual name does without."""
    del name
    if [file.name for file in output.files] == [SINGLE_NAME]:
        return None
    total = sum(file.nbytes - len(file.head) for file in output.files)
    total += sum(one.spec.nbytes for file in output.files for one in file.constants)
    weight_map = {tensor.name: file.name for file in output.files for tensor in file.head_tensors}
    in_order = {name: weight_map[name] for name in sorted(weight_map)}
    return json_bytes({"metadata": {"total_size": total}, "weight_map": in_order})


def _text_only(transform: Callable[[bytes, str], bytes]) -> _Make:
    """Return a function that applies `transform` to a sidecar of text-only outputs."""

    def make(output: DraftedOutput, name: str) -> bytes | None:
        place = output.checkpoint.place
        if not output.text_only or place is None or name not in output.checkpoint.sidecars:
            return None
        return transform(_read(place, name), name)

    return make


def template_notes(documents: Mapping[str, bytes]) -> tuple[str, ...]:
    """Return a note for each document whose template still writes image or video tokens.

    Args:
        documents: the documents of a text-only output.
    """
    templates = {name: content for name, content in documents.items() if name in _TEMPLATES}
    if not templates:
        return ()
    from qwen35.planning.safetensors_files.chat_template import writes_vision  # late: needs jinja2

    return tuple(
        f"{name}: its test for images or videos was not recognized, so it still writes their tokens"
        for name, content in templates.items()
        if writes_vision(_template_text(name, content))
    )


def _template_text(name: str, content: bytes) -> str:
    """Return a document's template alone: token lists may name image tokens."""
    text = content.decode()
    return text if name.endswith(".jinja") else str(json.loads(text).get("chat_template", ""))


def _read(place: FileLocation, name: str) -> bytes:
    size = place.sizes()[name]
    if size > MAX_BYTES:
        raise InputError(name, f"{size} bytes", expected=f"at most {MAX_BYTES}")
    return place.read(name, 0, size)


def _template(content: bytes, name: str) -> bytes:
    from qwen35.planning.safetensors_files.chat_template import text_only_template

    try:
        source = content.decode()
    except UnicodeDecodeError as error:
        raise InputError(name, "not UTF-8 text") from error
    return text_only_template(source, name).encode()


def _settings(content: bytes, name: str) -> bytes:
    before = strict_json(content, name)
    if not isinstance(before, dict):
        raise InputError(name, "not a JSON object")
    settings = {key: value for key, value in before.items() if key != "processor_class"}
    if "chat_template" in settings:
        settings["chat_template"] = _stored_template(settings["chat_template"], name)
    # Unchanged settings keep their bytes, formatting included.
    return content if settings == before else json_bytes(settings)


def _stored_template(value: Any, name: str) -> Any:
    """Transform a template, or a list of named ones, as stored in tokenizer_config.json."""
    from qwen35.planning.safetensors_files.chat_template import text_only_template

    if isinstance(value, str):
        return text_only_template(value, name)
    if isinstance(value, list):
        return [
            {**entry, "template": _stored_template(entry["template"], name)}
            if isinstance(entry, dict) and "template" in entry
            else entry
            for entry in value
        ]
    return value


_TEMPLATES: dict[str, Callable[[bytes, str], bytes]] = {
    "chat_template.jinja": _template,
    "chat_template.json": _settings,
    "tokenizer_config.json": _settings,
}
"""Sidecars that change in text-only outputs: the chat template becomes text-only wherever it is
stored, and the tokenizer no longer names an image processor."""

_Make = Callable[[DraftedOutput, str], bytes | None]

DOCUMENTS: dict[str, _Make] = {
    "config.json": _config,
    **{name: _text_only(transform) for name, transform in _TEMPLATES.items()},
    INDEX_NAME: _index,
}
"""Generated files with their functions; a function returns None if an output lacks the file."""
