"""Names of artifacts: ``Qwen3.5-text-{size}-bnb-4bit`` and the like.

The conventions are those of the published lineage: ``Qwen3.5-{size}``, ``Qwen3.5-{size}-bnb-4bit``,
``Qwen3.5-text-{size}``, ``Qwen3.5-text-{size}-bnb-4bit``, ``Qwen3.5-{size}-FP8``,
``Qwen3.5-text-{size}-GGUF``.
"""

from __future__ import annotations

import re

from qwen35.codecs.registry import CODECS
from qwen35.errors import UsageError
from qwen35.model.model_config import ModelConfig, parse_config
from qwen35.model.sizes import PUBLISHED, published_config

__all__ = ["artifact_name", "published_size"]

_FAMILY = re.compile(r"qwen(?P<version>\d+\.\d+)-(?P<text>text-)?(?P<size>.+)\Z", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?B(?:-A\d+(?:\.\d+)?B)?)(?:-|\Z)", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_SUFFIXES = tuple(dict.fromkeys(codec.suffix for codec in CODECS.values() if codec.suffix))
"""A source may have any of them."""

_COMPARED = ("hidden", "ffn", "expert_ffn", "experts", "query", "key_value", "linear_qkv")


def published_size(config: ModelConfig) -> str | None:
    """Return the published size with this text geometry (``0.8B``), if there is one."""
    for name in PUBLISHED:
        if not name.startswith("Qwen3.5-") or name.endswith("-Base"):
            continue
        published = parse_config(published_config(name))
        if _geometry(published) == _geometry(config):
            return name.removeprefix("Qwen3.5-")
    return None


def _geometry(config: ModelConfig) -> tuple[object, ...]:
    return (*(config.dims.get(name) for name in _COMPARED), config.layer_types, config.moe)


def artifact_name(source: str, config: ModelConfig, suffix: str, *, text: bool) -> str:
    """Return what an artifact is called.

    A name of the family (``Qwen3.5-4B``, ``qwen3.5-text-tiny``) is taken apart; any other stays,
    with the same marks behind it. A folder that is only a commit is called by its geometry.

    Args:
        source: name of the source: of its folder or repository, without the owner.
        config: of the source.
        suffix: what says how the artifact holds its weights (`Container.suffix`).
        text: whether it has no vision tower.

    Raises:
        UsageError: the source is called by a published size that it does not have.
    """
    size = published_size(config)
    if _COMMIT.match(source) and size:
        source = f"Qwen3.5-{size}"
    for other in _SUFFIXES:
        source = source.removesuffix(other)
    named = _FAMILY.match(source)
    if named is None:
        return f"{source}{'-text' if text else ''}{suffix}"
    claimed = _SIZE.match(named["size"])
    if size and claimed and claimed[1].lower() != size.lower():
        raise UsageError(
            source, f"has the geometry of {size}", hint="give the artifact a name of its own"
        )
    return f"Qwen{named['version']}-{'text-' if text else ''}{named['size']}{suffix}"
