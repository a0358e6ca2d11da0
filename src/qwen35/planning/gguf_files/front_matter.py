"""The front matter of a model card, checked before the `gguf` library reads it.

The library stores what it finds under some keys as text, and crashes on another type, perhaps as
late as the file is written. Scalars become the text that the card has; other types are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

from qwen35.errors import ConfigError

__all__ = ["checked_card", "without_folders"]

_NAME = "README.md"
_MAX_CHARACTERS = 2**18
"""Bound on front matter: PyYAML takes seconds for that much already."""

_HINT = "mend or remove it"
_PLAIN = ("name", "author", "version", "organization", "description", "finetune", "basename")
_TEXTS = (
    *_PLAIN,
    *(f"model_{key}" for key in (*_PLAIN, "size_label", "url", "doi", "uuid", "repo_url")),
    "model_creator",
    "model_type",
    "size_label",
    "url",
    "doi",
    "uuid",
    "repo_url",
    "license_name",
    "license_link",
)
_LISTS = ("tags", "pipeline_tag", "languages", "language", "license")
_MODELS = (
    "base_model",
    "base_models",
    "base_model_sources",
    "datasets",
    "dataset",
    "dataset_sources",
)
"""Keys that the library reads: text, a list of texts, a list of texts or of descriptions (gguf 0.19
``Metadata.apply_metadata_heuristic``)."""


def checked_card(content: bytes) -> bytes:
    """Return a model card whose front matter the library can read; unchanged if it is valid.

    Raises:
        ConfigError: the front matter is not YAML, or a value in it cannot become text.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(_NAME, f"not UTF-8 text (byte {error.start})", hint=_HINT) from error
    lines = text.splitlines()
    if not lines or lines[0] != "---":
        return content
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    matter = "\n".join(lines[1:end]) + "\n"
    if len(matter) > _MAX_CHARACTERS:
        raise _refused(f"front matter of {len(matter)} characters", f"at most {_MAX_CHARACTERS}")
    # As the library: "no" in a list is a language, and tabs are two spaces.
    matter = matter.replace("- no\n", '- "no"\n').replace("\t", "  ")
    typed, written = _parsed(matter, yaml.SafeLoader), _parsed(matter, yaml.BaseLoader)
    if not isinstance(typed, dict):
        return content  # the library ignores it
    checked = dict(_checked(typed, written))
    if checked == {key: typed[key] for key in _READERS if typed.get(key) is not None}:
        return content
    return f"---\n{yaml.safe_dump(checked, allow_unicode=True)}---\n".encode()


def without_folders(content: bytes) -> bytes:
    """Return a `checked_card` whose front matter names no base by its folder, as peft's may.

    The library would make an address of it.
    """
    lines = content.decode(errors="replace").splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return content
    typed = _parsed("\n".join(lines[1 : lines.index("---", 1)]), yaml.SafeLoader)
    if not isinstance(typed, dict):
        return content
    kept = {key: value for key, value in typed.items() if key != "base_model" or _on_hub(value)}
    if isinstance(typed.get("tags"), list):
        kept["tags"] = [tag for tag in typed["tags"] if _is_kept(str(tag))]
    if kept == typed:
        return content
    return f"---\n{yaml.safe_dump(kept, allow_unicode=True)}---\n".encode()


_BASE_TAG = "base_model:adapter:"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


def _is_kept(tag: str) -> bool:
    return not tag.startswith(_BASE_TAG) or _on_hub(tag.removeprefix(_BASE_TAG))


def _on_hub(base: object) -> bool:
    """Return whether a base is named by its Hub id; several are as they are."""
    return not isinstance(base, str) or _HUB_ID.fullmatch(base) is not None


def _refused(found: str, expected: str = "") -> ConfigError:
    return ConfigError(_NAME, found, expected=expected, hint=_HINT)


def _parsed(matter: str, loader: type[yaml.SafeLoader | yaml.BaseLoader]) -> Any:
    try:
        return yaml.load(matter, loader)  # noqa: S506 - both build plain values alone
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _refused(f"front matter that cannot be read ({reason[:200]})") from error


def _checked(typed: Mapping[Any, Any], written: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys that the library reads, with values that it can store."""
    length = 0
    for key, read in _READERS.items():
        if typed.get(key) is None:
            continue
        value = read(key, typed[key], written.get(key))
        length += _length(value)
        if length > _MAX_CHARACTERS:  # aliases can repeat a long text many times
            raise _refused("front matter that repeats itself", f"at most {_MAX_CHARACTERS} letters")
        if value != []:  # the library crashes on an empty list
            yield key, value


def _length(value: str | list[Any]) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(len(v) for one in value for v in (one.values() if isinstance(one, dict) else [one]))


def _text(key: str, typed: Any, written: Any) -> str:
    """Return a scalar as the card writes it: `typed` may be a number, a date or true."""
    value = typed if isinstance(typed, str) else written
    if not isinstance(value, str):
        kind = "a list" if isinstance(typed, list) else "a mapping"
        raise _refused(f"front matter: {key} is {kind}", "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _refused(f"front matter: {key} is not valid Unicode") from error
    return value


def _each(
    key: str, typed: list[Any], written: Any, read: Callable[[str, Any, Any], Any]
) -> list[Any]:
    """Return the items of a list, without empty ones."""
    rows = zip(typed, written, strict=True)
    return [read(f"an item of {key}", one, text) for one, text in rows if one is not None]


def _texts(key: str, typed: Any, written: Any) -> str | list[Any]:
    if isinstance(typed, list):
        return _each(key, typed, written, _text)
    return _text(key, typed, written)


def _models(key: str, typed: Any, written: Any) -> str | list[Any]:
    if isinstance(typed, list):
        return _each(key, typed, written, _model)
    return _text(key, typed, written)


def _model(key: str, typed: Any, written: Any) -> Any:
    """Return a base model or a data set: its address, or a mapping of texts."""
    if not isinstance(typed, dict):
        return _text(key, typed, written)
    if not all(isinstance(name, str) for name in typed):
        raise _refused(f"front matter: {key} has keys that are not text")
    return {
        name: _text(f"{name} in {key}", value, written.get(name))
        for name, value in typed.items()
        if value is not None
    }


_READERS: dict[str, Callable[[str, Any, Any], Any]] = {
    **dict.fromkeys(_TEXTS, _text),
    **dict.fromkeys(_LISTS, _texts),
    **dict.fromkeys(_MODELS, _models),
}
