"""Prefixes of tensors that engines read beside the family's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qwen35.errors import TensorError
from qwen35.tensors import StoredTensor

__all__ = ["WITHOUT_TOWER", "ReadPrefix", "family_names"]

WITHOUT_TOWER = "text-only recipes and GGUF files of the text model need no tower"
"""The way on where something is wrong with a vision tower."""


@dataclass(frozen=True)
class ReadPrefix:
    """A prefix of tensors that is not the family's own, but that engines read.

    Args:
        found: the prefix.
        family: the family's own.
        reader: who reads it.
        tower: whether it is read together with the vision tower.
        also: other prefixes that may come with it, each with the family's own.
        part: the part of the model that has it.
        mark: a tensor of that part, without the prefix.
    """

    found: str
    family: str
    reader: str
    tower: bool = True
    also: tuple[tuple[str, str], ...] = ()
    part: str = "text"
    mark: str = "embed_tokens.weight"

    @property
    def note(self) -> str:
        """The note for the user."""
        return f"{self.part} tensors {self._shown}: read as {self.family!r}, as {self.reader} does"

    @property
    def refusal(self) -> TensorError | None:
        """The error if a vision tower is to be loaded with it; None if an engine does that."""
        if self.tower:
            return None
        return TensorError(
            "the weights",
            f"{self.part} tensors {self._shown}, which no engine loads with a vision tower",
            expected=f"{self.family!r} before them",
            hint=WITHOUT_TOWER,
        )

    @property
    def _shown(self) -> str:
        return f"begin with {self.found!r}" if self.found else "have no prefix"


_TOWER = (("visual.", "model.visual."),)
_TOWER_ALONE = ReadPrefix(*_TOWER[0], "transformers", part="vision", mark="patch_embed.proj.weight")
_READ: dict[bool, tuple[ReadPrefix, ...]] = {
    True: (
        ReadPrefix("language_model.", "model.language_model.", "transformers", also=_TOWER),
        ReadPrefix(
            "model.", "model.language_model.", "llama.cpp's converter", tower=False, also=_TOWER
        ),
        _TOWER_ALONE,
    ),
    False: (ReadPrefix("", "model.", "transformers", also=_TOWER), _TOWER_ALONE),
}
"""By whether config.json describes a vision tower.

transformers 5.23 loads what the ``save_pretrained`` of a headless model wrote (`base_model_prefix`
in ``modeling_utils.py``). llama.cpp 0c1e5709 removes ``language_model.`` from every name
(``conversion/qwen.py``); transformers takes ``model.`` only for the class without a tower.
"""


def family_names(
    tensors: Mapping[str, StoredTensor], *, vision: bool
) -> tuple[Mapping[str, StoredTensor], ReadPrefix | None]:
    """Return the tensors under the family's names, and the prefix that was replaced, if any.

    Args:
        tensors: by the name in their file.
        vision: whether config.json describes a vision tower.
    """
    row = next((row for row in _READ[vision] if _has(tensors, row)), None)
    if row is None:
        return tensors, None
    named = {}
    for name, stored in tensors.items():
        family = _family_name(name, row)
        if family in named or (family != name and family in tensors):  # in doubt, as it is
            return tensors, None
        named[family] = replace(stored, spec=replace(stored.spec, name=family))
    return named, row


def _has(tensors: Mapping[str, StoredTensor], row: ReadPrefix) -> bool:
    return row.found + row.mark in tensors and row.family + row.mark not in tensors


def _family_name(name: str, row: ReadPrefix) -> str:
    for prefix, family in ((row.found, row.family), *row.also):
        rest = name.removeprefix(prefix)
        # `model.` is also how the tower's names begin.
        if name.startswith(prefix) and rest.split(".")[0] in _TOP.get(prefix, _TEXT):
            return family + rest
    return name


_TEXT = ("embed_tokens", "layers", "norm")
_TOP = {"visual.": ("blocks", "merger", "patch_embed", "pos_embed")}
"""What follows a prefix."""
