"""Files of a base with those of an adapter in place of its own: tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from qwen35.checkpoint.locations import FileLocation

__all__ = ["OverlaidFiles"]


class OverlaidFiles:
    """Named files in two places.

    Args:
        base: holds all others.
        added: where the files of these names are, in place of the base's.
        hidden: files of the base that are left out.
    """

    def __init__(
        self, base: FileLocation, added: Mapping[str, FileLocation], hidden: Set[str]
    ) -> None:
        self._base, self._added, self._hidden = base, added, hidden

    def __str__(self) -> str:
        return str(self._base)

    def sizes(self) -> Mapping[str, int]:
        """Return the size in bytes of each file."""
        sizes = {n: size for n, size in self._base.sizes().items() if n not in self._hidden}
        return sizes | {name: place.sizes()[name] for name, place in self._added.items()}

    def folders(self) -> Sequence[str]:
        """Return the names of the folders in the base."""
        return self._base.folders()

    def dangling(self) -> Mapping[str, str]:
        """Return the entries that cannot be read, with what they are."""
        replaced = {*self._added, *self._hidden}
        return {n: what for n, what in self._base.dangling().items() if n not in replaced}

    def read(self, name: str, start: int, count: int) -> bytes:
        """Return `count` bytes of a file, starting at `start`."""
        return self._added.get(name, self._base).read(name, start, count)
