"""Names of artifacts follow the conventions, and do not lie about the size."""

from __future__ import annotations

import pytest

from checkpoints import tiny_config
from qwen35.errors import UsageError
from qwen35.model.model_config import ModelConfig, parse_config
from qwen35.model.sizes import PUBLISHED, published_config
from qwen35.planning.artifact_names import artifact_name, published_release

TINY = parse_config(tiny_config())

KINDS = {"plain": "", "nf4": "-bnb-4bit", "fp8": "-FP8", "gguf": "-GGUF"}
"""How an artifact holds its weights, to what its name ends with."""


def named(source: str, config: ModelConfig, kind: str, *, text: bool) -> str:
    return artifact_name(source, config, KINDS[kind], text=text)


def published(name: str) -> ModelConfig:
    return parse_config(published_config(name))


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n.startswith("Qwen3.5-")])
def test_size_comes_from_the_geometry(name: str) -> None:
    assert published_release(published(name)) == name.removesuffix("-Base")


def test_other_geometry_has_no_size() -> None:
    assert published_release(TINY) is None


@pytest.mark.parametrize(
    ("source", "kind", "text", "expected"),
    [
        ("Qwen3.5-0.8B", "nf4", False, "Qwen3.5-0.8B-bnb-4bit"),
        ("Qwen3.5-0.8B", "nf4", True, "Qwen3.5-text-0.8B-bnb-4bit"),
        ("Qwen3.5-0.8B", "plain", True, "Qwen3.5-text-0.8B"),
        ("Qwen3.5-0.8B", "fp8", False, "Qwen3.5-0.8B-FP8"),
        ("Qwen3.5-0.8B", "gguf", True, "Qwen3.5-text-0.8B-GGUF"),
        ("Qwen3.5-text-0.8B", "gguf", True, "Qwen3.5-text-0.8B-GGUF"),
        ("Qwen3.5-0.8B-bnb-4bit", "nf4", True, "Qwen3.5-text-0.8B-bnb-4bit"),
        ("Qwen3.5-0.8B-FP8", "gguf", True, "Qwen3.5-text-0.8B-GGUF"),
        ("Qwen3.5-0.8B-Base", "nf4", True, "Qwen3.5-text-0.8B-Base-bnb-4bit"),
        ("qwen3.5-0.8b", "nf4", True, "Qwen3.5-text-0.8b-bnb-4bit"),
        ("my-tune", "nf4", True, "my-tune-text-bnb-4bit"),
        ("my-tune", "fp8", False, "my-tune-FP8"),
        ("0123456789abcdef" * 2 + "01234567", "fp8", False, "Qwen3.5-0.8B-FP8"),
    ],
)
def test_names(source: str, kind: str, text: bool, expected: str) -> None:
    assert named(source, published("Qwen3.5-0.8B"), kind, text=text) == expected


def test_later_release_keeps_its_version() -> None:
    config = published("Qwen3.6-35B-A3B")
    name = named("Qwen3.6-35B-A3B", config, "fp8", text=True)
    assert name == "Qwen3.6-text-35B-A3B-FP8"


def test_commit_of_the_largest_takes_the_name_of_its_release() -> None:
    config = published("Qwen3.8-2.4T-A95B")
    assert named("0" * 40, config, "fp8", text=True) == "Qwen3.8-text-2.4T-A95B-FP8"
    with pytest.raises(UsageError, match="has the geometry of 2.4T-A95B"):
        named("Qwen3.8-1.2T", config, "fp8", text=True)


def test_name_of_no_published_size_is_left_alone() -> None:
    name = named("qwen3.5-tiny", TINY, "nf4", text=True)
    assert name == "Qwen3.5-text-tiny-bnb-4bit"


def test_wrong_size_in_the_name_is_refused() -> None:
    with pytest.raises(UsageError, match="Qwen3.5-4B: has the geometry of 0.8B"):
        named("Qwen3.5-4B", published("Qwen3.5-0.8B"), "nf4", text=False)
