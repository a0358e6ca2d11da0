"""A checkpoint with the MTP layer of another one: of the original, which a fine-tune has lost.

transformers has no class for the layer, so fine-tunes are saved without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from qwen35.checkpoint.reconciled import reconciled
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.registry import is_packed
from qwen35.errors import UsageError
from qwen35.model.roles import MTP
from qwen35.tensors import StoredTensor, Weight

__all__ = ["check_grafted", "grafted_notes", "with_mtp_of"]

_FLAG = "--mtp-from"
_CARD, _MAX_CARD_BYTES = "README.md", 2**18
_BASES = re.compile(r"^base_model:[ \t]*(\S*)[ \t]*$((?:\n[ \t]*-[ \t]+\S+[ \t]*$)*)", re.MULTILINE)


def with_mtp_of(checkpoint: Checkpoint, donor: Checkpoint | None) -> Checkpoint:
    """Return the checkpoint with the MTP layer of `donor`; unchanged if there is none.

    Raises:
        UsageError: it has one of its own, the donor has none, or one of other sizes.
    """
    if donor is None:
        return checkpoint
    own, other = reconciled(checkpoint), reconciled(donor)
    if own.config.mtp_layers:
        found = f"{checkpoint.name} has an MTP layer of its own"
        raise UsageError(_FLAG, found, hint="leave it out")
    weights = [weight for weight in other.weights if weight.name.startswith(MTP)]
    if not other.config.mtp_layers:
        found = f"{donor.name} has no whole MTP layer"
        raise UsageError(_FLAG, found, hint="give the original checkpoint")
    packed = next((weight for weight in weights if is_packed(weight)), None)
    if packed is not None:
        found = f"{donor.name} holds {packed.name} as {packed.storage}"
        raise UsageError(_FLAG, found, hint="give the unquantized original")
    _check_sizes(own, other)
    kept = [weight for weight in own.weights if not weight.name.startswith(MTP)]
    of_mtp = frozenset(block for block in other.layout.per_expert if block.startswith(MTP))
    layout = replace(own.layout, mtp=True, per_expert=own.layout.per_expert | of_mtp)
    located = (_located(weight, donor) for weight in weights)
    return replace(checkpoint, weights=(*kept, *located), layout=layout, donor=donor)


def _check_sizes(own: Checkpoint, other: Checkpoint) -> None:
    here, there = own.config.geometry, other.config.geometry
    # the layer has no rows of tokens, so vocabularies may differ
    unlike = [key for key in here if key != "vocab" and here[key] != there.get(key)]
    if unlike or here.keys() != there.keys():
        shown = ", ".join(f"{key} {here[key]} and {there.get(key)}" for key in unlike[:3])
        found = f"{own.name} and {other.name} differ: {shown or 'one is a mixture of experts'}"
        raise UsageError(_FLAG, found, expected="sizes of one model", hint="give the original")


def _located(weight: Weight, donor: Checkpoint) -> Weight:
    """Return a weight whose files are named by their paths."""
    parts = (StoredTensor(p.spec, donor.path_of(p.file), p.begin) for p in weight.parts)
    return Weight(weight.name, weight.storage, tuple(parts))


def check_grafted(checkpoint: Checkpoint, *, taken: bool) -> None:
    """Refuse a donor whose layer the output does not take.

    Raises:
        UsageError: there is one.
    """
    if checkpoint.donor is not None and not taken:
        raise UsageError(
            _FLAG, "the output leaves the MTP layer out", hint="keep it, or leave this out"
        )


def grafted_notes(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield whose MTP layer it is, and whether that is the model that it was trained from."""
    donor = checkpoint.donor
    if donor is None:
        return
    origin = f"{donor.repo}@{donor.revision}" if donor.repo else donor.title
    yield f"the MTP layer is that of {origin}"
    bases = _named_bases(checkpoint)
    if donor.repo and bases and donor.repo not in bases:
        yield (
            f"the model card of {checkpoint.title} names another base, {', '.join(bases)}: a layer "
            "that was not trained with a model drafts worse for it"
        )


def _named_bases(checkpoint: Checkpoint) -> list[str]:
    """Return the bases that a model card names by their Hub ids."""
    place = checkpoint.place
    size = place.sizes().get(_CARD, 0) if place is not None else 0
    if place is None or not 0 < size <= _MAX_CARD_BYTES:
        return []
    text = place.read(_CARD, 0, size).decode(errors="replace")
    matter = text[3:].partition("\n---")[0] if text.startswith("---") else ""
    found = _BASES.search(matter)
    words = [found[1], *re.findall(r"-[ \t]+(\S+)", found[2])] if found else []
    names = (word.strip("\"'") for word in words)
    return [name for name in names if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name, re.ASCII)][:4]
