"""Side-car files whose content changes on the way to a text-only output."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from qwen35.checkpoint.header import strict_json
from qwen35.checkpoint.place import Place
from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import InputError

__all__ = ["json_bytes", "template_notes", "text_documents"]

_MAX_BYTES = 64 * 2**20


def json_bytes(value: Any) -> bytes:
    """Render a JSON document as the files of a checkpoint are: indented, in UTF-8, newline last."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def text_documents(checkpoint: Checkpoint) -> Mapping[str, bytes]:
    """Return the side-car files that a text-only output has in another form.

    The chat template is made text-only wherever it is stored, and the tokenizer stops naming a
    processor for images.

    Raises:
        InputError: a template or a JSON file is not valid.
    """
    if checkpoint.place is None:
        return {}
    documents = {}
    for name, transform in _TRANSFORMS.items():
        if name in checkpoint.sidecars:
            documents[name] = transform(_read(checkpoint.place, name), name)
    return documents


def template_notes(documents: Mapping[str, bytes]) -> tuple[str, ...]:
    """Return a note for each document whose template still writes image or video tokens."""
    if not documents:
        return ()
    from qwen35.plan.template import writes_vision

    return tuple(
        f"{name}: its test for images or videos was not recognized, so it still writes their tokens"
        for name, content in documents.items()
        if writes_vision(_template_text(name, content))
    )


def _template_text(name: str, content: bytes) -> str:
    """Return the part of a document that is a template; token lists name image tokens rightly."""
    text = content.decode()
    return text if name.endswith(".jinja") else str(json.loads(text).get("chat_template", ""))


def _read(place: Place, name: str) -> bytes:
    size = place.sizes()[name]
    if size > _MAX_BYTES:
        raise InputError(name, f"{size} bytes", expected=f"at most {_MAX_BYTES}")
    return place.read(name, 0, size)


def _template(content: bytes, name: str) -> bytes:
    from qwen35.plan.template import text_only_template

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
    return content if settings == before else json_bytes(settings)


def _stored_template(value: Any, name: str) -> Any:
    """Transform a template, or a list of named ones, as tokenizer_config.json holds them."""
    from qwen35.plan.template import text_only_template

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


_TRANSFORMS: dict[str, Callable[[bytes, str], bytes]] = {
    "chat_template.jinja": _template,
    "chat_template.json": _settings,
    "tokenizer_config.json": _settings,
}
"""Side-car to what a text-only output does to it."""
