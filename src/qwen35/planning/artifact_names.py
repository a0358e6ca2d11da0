"""Names of artifacts: ``Qwen3.5-text-{size}-bnb-4bit`` and the like.

The conventions are those of the published lineage: ``Qwen3.5-{size}``, ``Qwen3.5-{size}-bnb-4bit``,
``Qwen3.5-text-{size}``, ``Qwen3.5-text-{size}-bnb-4bit``, ``Qwen3.5-{size}-FP8``,
``Qwen3.5-text-{size}-GGUF``.
"""

from __future__ import annotations

import re

from qwen35.checkpoint.hub import COMMIT
from qwen35.codecs.registry import CODECS
from qwen35.errors import UsageError
from qwen35.model.model_config import ModelConfig, parse_config
from qwen35.model.sizes import PUBLISHED, published_config

__all__ = ["artifact_name", "published_release"]

_FAMILY = re.compile(r"qwen(?P<version>\d+\.\d+)-(?P<text>text-)?(?P<size>.+)\Z", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?[BT](?:-A\d+(?:\.\d+)?B)?)(?:-|\Z)", re.IGNORECASE)
_SUFFIXES = tuple(dict.fromkeys(codec.suffix for codec in CODECS.values() if codec.suffix))
"""Removed from a source's name before the output's own suffix is added."""

_COMPARED = ("hidden", "ffn", "expert_ffn", "experts", "query", "key_value", "linear_qkv")


def published_release(config: ModelConfig) -> str | None:
    """Return the first release with this text geometry (``Qwen3.5-0.8B``), or None."""
    for name in PUBLISHED:
        published = parse_config(published_config(name))
        if _geometry(published) == _geometry(config):
            return name
    return None


def _geometry(config: ModelConfig) -> tuple[object, ...]:
    return (*(config.dims.get(name) for name in _COMPARED), config.layer_types, config.moe)


def artifact_name(source: str, config: ModelConfig, suffix: str, *, text: bool) -> str:
    """Return an artifact's name.

    A family name (``Qwen3.5-4B``, ``qwen3.5-text-tiny``) is rebuilt from its parts; any other name
    is kept, with the same marks appended. A folder named by a commit takes its name from the
    geometry.

    Args:
        source: name of the source folder or repository, without the owner.
        config: the source's config.
        suffix: marks how the artifact holds its weights (`Container.suffix`).
        text: whether the artifact lacks the vision tower.

    Raises:
        UsageError: the source's name claims a published size that it does not have.
    """
    release = published_release(config)
    if COMMIT.fullmatch(source) and release:  # the Hub cache names a snapshot by its commit
        source = release
    for known in _SUFFIXES:
        source = source.removesuffix(known)
    match = _FAMILY.match(source)
    if match is None:
        return f"{source}{'-text' if text else ''}{suffix}"
    claimed = _SIZE.match(match["size"])
    size = release.partition("-")[2] if release else None
    # A 4B model published as "9B" would mislead whoever downloads it.
    if size and claimed and claimed[1].lower() != size.lower():
        raise UsageError(
            source, f"has the geometry of {size}", hint="give the artifact another name"
        )
    return f"Qwen{match['version']}-{'text-' if text else ''}{match['size']}{suffix}"
