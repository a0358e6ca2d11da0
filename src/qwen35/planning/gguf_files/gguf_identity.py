"""What a GGUF file is: its release by sizes, its mix of types, and its maker by its keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from qwen35.checkpoint.gguf_header import GgufHeader
from qwen35.errors import InputError
from qwen35.model.model_config import ModelConfig, parse_config
from qwen35.model.sizes import PUBLISHED, published_config
from qwen35.planning.gguf_files.expected_tensors import KEYS, expected, missing_keys
from qwen35.planning.gguf_files.gguf_config import sensible, text_config
from qwen35.planning.gguf_files.mixes import FILE_TYPES, MixGeometry
from qwen35.planning.gguf_files.type_choice import TypeChooser
from qwen35.planning.recipe import load_recipe

__all__ = ["maker_of", "mix_of", "release_of", "vision_release_of"]

_TOWER = "clip"
_CREATORS = ("general.quantized_by", "general.organization", "general.author")
_BASE = "general.base_model.0."
_IMATRIX = "quantize.imatrix."
_LONGEST = 120


def _config(container: GgufHeader) -> ModelConfig:
    with sensible(container):
        return parse_config(text_config(container))


@cache
def _geometries() -> dict[str, dict[str, int]]:
    configs = {name: parse_config(published_config(name)) for name in PUBLISHED}
    return {name: config.geometry for name, config in configs.items()}


def release_of(container: GgufHeader) -> str:
    """Return the releases that have a file's sizes; empty if none has, or keys are missing.

    The release that its name speaks of comes first.
    """
    if container.architecture == _TOWER:
        return vision_release_of(container)
    if container.architecture not in KEYS or missing_keys(container):
        return ""
    try:
        sizes = _config(container).geometry
    except InputError:  # `verify` says what is wrong with its keys
        return ""
    alike = {n: there for n, there in _geometries().items() if _same(sizes, there, "vocab")}
    exact = [name for name, there in alike.items() if there["vocab"] == sizes["vocab"]]
    names = _named_first(container, exact or list(alike))
    return names + f", with a vocabulary of {sizes['vocab']}" * bool(names and not exact)


def _same(sizes: Mapping[str, int], there: Mapping[str, int], but: str) -> bool:
    return all(there.get(key) == size for key, size in sizes.items() if key != but)


def vision_release_of(container: GgufHeader) -> str:
    """Return the releases that have a vision tower of a file's sizes; empty if none has."""
    keys = container.keys
    ours = {
        "depth": keys.get("clip.vision.block_count"),
        "hidden_size": keys.get("clip.vision.embedding_length"),
        "out_hidden_size": keys.get("clip.vision.projection_dim"),
    }
    found = []
    for name in PUBLISHED:
        vision = published_config(name).get("vision_config", {})
        if all(vision.get(key) == size for key, size in ours.items()):
            found.append(name)
    return _named_first(container, found)


def _named_first(container: GgufHeader, releases: list[str]) -> str:
    """Return names, first the one that the file's own names speak of."""
    keys = (container.keys.get(k) for k in (f"{_BASE}name", "general.name", "general.basename"))
    said = [_plain(text) for text in (*keys, container.path.name) if isinstance(text, str)]
    by_length = sorted(releases, key=len, reverse=True)  # Qwen3.5-4B-Base before Qwen3.5-4B
    first = next((one for text in said for one in by_length if _plain(one) in text), None)
    if first is None:
        return " or ".join(releases)
    others = [name for name in releases if name != first]
    return first + f" (the sizes of {', '.join(others)} too)" * bool(others)


def _plain(text: str) -> str:
    return text.lower().replace(" ", "-").replace("_", "-")


def mix_of(container: GgufHeader) -> str:
    """Return how the types of its tensors compare with those that llama-quantize chooses.

    Empty for files that are not quantized, or whose keys make no sense.
    """
    code = container.keys.get("general.file_type")
    file_type = next((row for row in FILE_TYPES.values() if row.code == code), None)
    if file_type is None or not file_type.quantized or missing_keys(container):
        return ""
    if container.architecture == _TOWER or container.mtp_alone:
        return ""
    try:
        config, tensors = _config(container), tuple(expected(container).values())
    except InputError:  # `verify` says what is wrong with its keys
        return ""
    text = config.text_raw
    geometry = MixGeometry(
        layers=len(config.layer_types) + config.mtp_layers,
        experts=config.dims.get("experts", 0),
        gqa=text["num_attention_heads"] // text["num_key_value_heads"],
        imatrix=any(key.startswith(_IMATRIX) for key in container.keys),
    )
    chooser = TypeChooser(tensors, geometry, load_recipe("mix", "gguf"), None, False)
    usual, _ = chooser.kinds(file_type, checked=False)
    held = {name: entry.kind.name for name, entry in container.tensors.items() if name in usual}
    others = [name for name, kind in held.items() if kind != usual[name]]
    if not others:
        return "as llama-quantize mixes it"
    return (
        f"of its own: {len(others)} of {len(held)} tensors have other types than llama-quantize "
        f"gives them ({others[0]} is {held[others[0]]})"
    )


def maker_of(container: GgufHeader) -> str:
    """Return who made a file, and of what, as far as its keys say."""
    return ", ".join(_made(container.keys))


def _made(keys: Mapping[str, Any]) -> Iterator[str]:
    creators = [_text(keys, key) for key in _CREATORS]
    named = list(dict.fromkeys(name for name in creators if name))
    if named:
        yield f"by {' / '.join(named)}"
    base = [_text(keys, f"{_BASE}{end}") for end in ("organization", "name")]
    if base[1]:
        yield f"of {'/'.join(part for part in base if part)}"
    if url := _text(keys, "general.repo_url"):
        yield url
    if any(key.startswith(_IMATRIX) for key in keys):
        data = _text(keys, f"{_IMATRIX}dataset")
        yield "with an importance matrix" + f" ({data})" * bool(data)


def _text(keys: Mapping[str, Any], key: str) -> str:
    value = keys.get(key)
    if not isinstance(value, str):
        return ""
    return " ".join(value.split())[:_LONGEST]
