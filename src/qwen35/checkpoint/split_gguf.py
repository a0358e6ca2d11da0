"""Names of the files of a split GGUF model, ``NAME-00001-of-0000N.gguf``, as llama.cpp has them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "SPLIT_COUNT",
    "SPLIT_NUMBER",
    "SPLIT_TENSORS",
    "SplitName",
    "by_model",
    "is_tower_name",
    "title_of",
]

SPLIT_NUMBER, SPLIT_COUNT = "split.no", "split.count"
SPLIT_TENSORS = "split.tensors.count"
"""Keys of every file: its number from 0, how many files there are, and the tensors in all of them.

Source: https://github.com/ggml-org/llama.cpp/blob/b5734/src/llama-arch.cpp
"""

_SUFFIX = ".gguf"
_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf\Z", re.DOTALL)


@dataclass(frozen=True, order=True, slots=True)
class SplitName:
    """The name of one of several files.

    Args:
        stem: what all files of the model begin with.
        count: how many files there are, 2 at least.
        number: of this file, from 1.
    """

    stem: str
    count: int
    number: int

    @classmethod
    def parse(cls, name: str) -> SplitName | None:
        """Parse a file name; None if it is that of a model in one file."""
        match = _NAME.match(name)
        if match is None:
            return None
        number, count = int(match[2]), int(match[3])
        return cls(match[1], count, number) if 1 <= number <= count > 1 else None

    def file(self, number: int) -> str:
        """Return the name of a file of the same model."""
        return f"{self.stem}-{number:05d}-of-{self.count:05d}{_SUFFIX}"


def by_model(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Group file names by model, in the order of the first of each; split files by number.

    >>> by_model(["b-00002-of-00002.gguf", "a.gguf", "b-00001-of-00002.gguf"])
    [('b-00001-of-00002.gguf', 'b-00002-of-00002.gguf'), ('a.gguf',)]
    """
    models: dict[tuple[str, int], list[str]] = {}
    for name in names:
        split = SplitName.parse(name)
        key = (split.stem, split.count) if split else (name, 1)
        models.setdefault(key, []).append(name)
    return [tuple(sorted(model)) for model in models.values()]


def is_tower_name(name: str) -> bool:
    """Return whether a file is called like one with a vision tower.

    >>> is_tower_name("mmproj-F16.gguf"), is_tower_name("Qwen3.5-0.8B-F16.gguf")
    (True, False)
    """
    return "mmproj" in name.lower() and name.endswith(_SUFFIX)


def title_of(model: Sequence[str]) -> str:
    """Return the name of a model by its files: without the ending, and without a number.

    >>> title_of(["b-00001-of-00002.gguf"]), title_of(["a-Q8_0.gguf"])
    ('b', 'a-Q8_0')
    """
    split = SplitName.parse(model[0])
    return split.stem if split else model[0].removesuffix(_SUFFIX)
