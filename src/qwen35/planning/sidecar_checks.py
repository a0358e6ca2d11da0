"""Check the small files of a source before they are copied, and list those that are not copied.

Loaders read these files long after a conversion, so damage is reported here, by file name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from qwen35.checkpoint.header import strict_json
from qwen35.checkpoint.mistaken import LONGEST_HEAD, stand_in
from qwen35.checkpoint.sidecars import LEGAL, SIDECARS
from qwen35.checkpoint.source import Checkpoint, dangling_link
from qwen35.errors import ConfigError, InputError
from qwen35.planning.bounded_tokenizer import why_not_loaded

__all__ = ["check_generation", "check_sidecars", "left_behind", "sidecar_problems"]

_MAX_BYTES = 64 * 2**20
"""Size limit for a sidecar, far above real ones."""

_SHOWN = 12
_NUMBERS: dict[str, str] = {
    "temperature": "a number",
    "top_p": "a number",
    "min_p": "a number",
    "typical_p": "a number",
    "repetition_penalty": "a number",
    "length_penalty": "a number",
    "penalty_repeat": "a number",
    "xtc_probability": "a number",
    "xtc_threshold": "a number",
    "mirostat_tau": "a number",
    "mirostat_eta": "a number",
    "top_k": "an integer",
    "penalty_last_n": "an integer",
    "mirostat": "an integer",
    "max_length": "an integer",
    "max_new_tokens": "an integer",
    "bos_token_id": "an integer or a list of integers",
    "eos_token_id": "an integer or a list of integers",
    "pad_token_id": "an integer or a list of integers",
    "sequence": "text",
    "do_sample": "true or false",
}
"""Settings of generation_config.json that engines read (transformers 5.23 `GenerationConfig`,
gguf 0.19 `Metadata`), with what they must be if they are not null."""

_SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

_LARGEST = 3.4028234663852886e38
_loaded: dict[bytes, str] = {}
"""What `tokenizers` says against each tokenizer seen, by SHA-256: loading takes up to a second."""


def check_sidecars(checkpoint: Checkpoint, names: Collection[str]) -> None:
    """Check those sidecars in `names` that a local checkpoint has.

    Raises:
        InputError: one is damaged. The message names the first and counts the others.
    """
    problems = list(sidecar_problems(checkpoint, names))
    if not problems:
        return
    first = problems[0]
    if len(problems) == 1:
        raise first
    others = ", ".join(problem.subject for problem in problems[1:])
    more = f"also damaged: {others}"
    hint = f"{first.hint} ({more})" if first.hint else more
    raise type(first)(first.subject, first.found, expected=first.expected, hint=hint)


def sidecar_problems(checkpoint: Checkpoint, names: Collection[str]) -> Iterator[InputError]:
    """Yield the problems of the sidecars in `names`; missing files have none."""
    place = checkpoint.place
    for name in sorted(names):
        if name in checkpoint.dangling:
            yield dangling_link(name, checkpoint.dangling[name])
        size = checkpoint.sidecars.get(name)
        if place is None or checkpoint.root is None or size is None:
            continue
        try:
            if size > _MAX_BYTES:
                raise ConfigError(name, f"{size} bytes", expected=f"at most {_MAX_BYTES}")
            _check(name, place.read(name, 0, size))
        except InputError as error:
            yield error


def _check(name: str, content: bytes) -> None:
    known = stand_in(name, content[:LONGEST_HEAD], ConfigError)
    if known is not None:
        raise known
    if name in LEGAL:
        return
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(name, f"not UTF-8 text (byte {error.start})") from error
    if name.endswith(".json"):
        value = strict_json(content, name, ConfigError)
        if not isinstance(value, dict):
            raise ConfigError(name, "not a JSON object")
        _check_templates(name, value.get("chat_template"))
        _VALUES.get(name, _nothing)(name, value)
        if name == "tokenizer.json":
            _check_loading(name, content)
    elif name.endswith(".jinja"):
        _compile(name, text)
    elif name == "merges.txt":
        _check_merges(name, text)


def _compile(name: str, template: str) -> None:
    from qwen35.planning.safetensors_files.chat_template import compiles  # late: needs jinja2

    compiles(template, name)


def _nothing(name: str, value: Mapping[str, Any]) -> None:
    del name, value


def _check_templates(name: str, template: object) -> None:
    """Check the syntax of a template, or of a list of named ones, in a JSON file."""
    if isinstance(template, str):
        _compile(name, template)
    elif isinstance(template, list):
        for entry in template:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                _compile(name, entry["template"])
    elif isinstance(template, dict):  # named ones, as processors store them
        _check_templates(name, [{"template": value} for value in template.values()])
    elif template is not None:
        raise ConfigError(name, f"chat_template is {repr(template)[:80]}", expected="text")


def check_generation(name: str, value: Mapping[str, Any]) -> None:
    """Check the types of the settings in generation_config.json.

    Raises:
        InputError: one has another type than engines need.
    """
    for key, kind in _NUMBERS.items():
        setting = value.get(key)
        if setting is not None and not _is(setting, kind):
            raise ConfigError(name, f"{key} is {repr(setting)[:80]}", expected=kind)


def _is(value: object, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "true or false":
        return isinstance(value, bool)
    if kind == "a number":
        number = type(value) in (int, float)
        return number and math.isfinite(value) and abs(value) <= _LARGEST  # type: ignore[arg-type]
    if isinstance(value, list) and "list" in kind:
        return all(_is(item, "an integer") for item in value)
    return type(value) is int and abs(value) < 2**31


def _check_tokens(name: str, value: Mapping[str, Any]) -> None:
    for token, number in value.items():
        if type(number) is not int or number < 0:
            found = f"token {token[:40]!r} is {repr(number)[:40]}"
            raise ConfigError(name, found, expected="its number")


def _check_tokenizer(name: str, value: Mapping[str, Any]) -> None:
    model, added = value.get("model"), value.get("added_tokens") or []
    if not isinstance(model, dict):
        raise ConfigError(name, "no model in it", expected="a tokenizer of the tokenizers library")
    whole = isinstance(added, list) and all(
        isinstance(row, dict) and type(row.get("id")) is int and isinstance(row.get("content"), str)
        for row in added
    )
    if not whole:
        raise ConfigError(name, "malformed added_tokens", expected="a list of id and content")


def _check_settings(name: str, value: Mapping[str, Any]) -> None:
    """Check those tokenizer settings that transformers 5.23 fails on."""
    for key, setting in value.items():
        if setting is None:
            continue
        expected = _expected(key, setting)
        if expected:
            raise ConfigError(name, f"{key} is {repr(setting)[:80]}", expected=expected)


def _expected(key: str, setting: Any) -> str:
    """Return what a tokenizer setting must be; empty if it is that."""
    if key in _SPECIAL:
        return "" if _is_token(setting) else "a token"
    if key == "added_tokens_decoder":
        whole = isinstance(setting, dict) and all(
            number.isdecimal() and isinstance(token, dict) and _is_token(token)
            for number, token in setting.items()
        )
        return "" if whole else "tokens by their numbers"
    if key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = list(setting.values()) if isinstance(setting, dict) else setting
        whole = isinstance(tokens, list) and all(map(_is_token, tokens))
        return "" if whole else "a list of tokens, or tokens by name"
    return "text" if key == "tokenizer_class" and not isinstance(setting, str) else ""


def _is_token(value: object) -> bool:
    text = value.get("content") if isinstance(value, dict) else value
    return isinstance(text, str)


_VALUES: dict[str, Callable[[str, Mapping[str, Any]], None]] = {
    "added_tokens.json": _check_tokens,
    "generation_config.json": check_generation,
    "special_tokens_map.json": _check_settings,
    "tokenizer.json": _check_tokenizer,
    "tokenizer_config.json": _check_settings,
    "vocab.json": _check_tokens,
}
"""Content checks of JSON sidecars, by file name."""


def _check_loading(name: str, content: bytes) -> None:
    """Load a tokenizer as engines do, if the tokenizers library is installed."""
    digest = hashlib.sha256(content).digest()
    if digest not in _loaded:
        _loaded[digest] = why_not_loaded(content)
    if _loaded[digest]:
        raise ConfigError(name, f"the tokenizers library cannot load it ({_loaded[digest]})")


def _check_merges(name: str, text: str) -> None:
    for line in text.split("\n"):
        if line.strip() and not line.startswith("#version") and len(line.split()) != 2:
            raise ConfigError(name, f"line {line[:80]!r}", expected="two tokens a line")


def left_behind(
    checkpoint: Checkpoint, carried: Collection[str], *, scales: bool = False
) -> tuple[str, ...]:
    """Return notes that list the files, buffers and scales of the cache that are not copied.

    Args:
        checkpoint: the source.
        carried: files that are copied or converted.
        scales: whether the output has scales of the KV cache.
    """
    known = [row.name for row in SIDECARS if row.name in checkpoint.sidecars]
    names = sorted(name for name in (*known, *checkpoint.others) if name not in carried)
    buffers = [f"{name}, which loaders compute" for name in checkpoint.buffers[:1]]
    if len(checkpoint.buffers) > 1:
        buffers = [f"{checkpoint.buffers[0]} and others alike, which loaders compute"]
    if checkpoint.cache_scales and not scales:
        count = len(checkpoint.cache_scales)
        buffers.append(f"{count} scales of the KV cache, for which this output has no place")
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    lists = [f"{', '.join(names[:_SHOWN])}{more}"] if names else []
    return tuple(f"not copied: {one}" for one in (*lists, *buffers))
