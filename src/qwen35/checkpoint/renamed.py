"""What misfitting tensors have in common: a prefix, an adapter, a head, a size of config.json.

One cause can produce hundreds of mismatches, and the first rarely reveals it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from qwen35.errors import TensorError
from qwen35.model.dimension_keys import DIMENSION_KEYS
from qwen35.model.roles import role_of
from qwen35.tensors import TensorSpec

__all__ = ["empty_cause", "naming_cause", "size_cause"]

_WRAPPERS: dict[str, str] = {
    "base_model": "PEFT's wrapper was saved: save what its merge_and_unload() returns",
    "base_layer": "PEFT's wrapper was saved: save what its merge_and_unload() returns",
    "_orig_mod": "torch.compile's wrapper was saved: save the model inside it, `_orig_mod`",
    "_fsdp_wrapped_module": "FSDP's wrapper was saved: gather the full state dict and save that",
    "_checkpoint_wrapped_module": "a wrapper of activation checkpointing was saved: save the model",
    "_forward_module": "Lightning's wrapper was saved: save the model inside it",
    "module": "a wrapper of distributed training was saved: save the model inside it, `module`",
}
"""Name segments that wrappers add, with the fix for each."""

_ADAPTERS = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_embedding_A", "modules_to_save")
_HEADS: dict[str, str] = {
    "score": "the head of a classifier",
    "classifier": "the head of a classifier",
    "v_head": "the value head of a trainer",
    "value_head": "the value head of a trainer",
}
"""First segments of the names that other heads have (transformers ``*ForSequenceClassification``,
TRL ``AutoModelForCausalLMWithValueHead``)."""

_PREFIXES = ("model.language_model.", "model.visual.", "model.")
_RENAME = "save it with transformers, or rename the tensors"

_CONFIG_KEYS = {size: key for size, key in DIMENSION_KEYS.items() if "*" not in key}
"""Keys of config.json by the dimensions that they set directly."""


@dataclass(frozen=True)
class _Renaming:
    """How names differ from the expected ones.

    Args:
        found: what they begin with, or the segments of a wrapper within them.
        expected: what they should begin with instead.
        inside: whether `found` is within them.
    """

    found: str
    expected: str = ""
    inside: bool = False


def naming_cause(unknown: Sequence[str], missing: Collection[str]) -> TensorError | None:
    """Return the one error behind names that are unknown, or None if they share no cause.

    Args:
        unknown: names of weights that config.json has no place for.
        missing: expected names that are absent.
    """
    adapted = [name for name in unknown if not set(_ADAPTERS).isdisjoint(name.split("."))]
    if adapted:
        return TensorError(
            adapted[0],
            f"part of an adapter that is not merged, with {len(adapted) - 1} others",
            hint="merge it into the weights first (peft: merge_and_unload), then save them",
        )
    heads = [name for name in unknown if name.partition(".")[0] in _HEADS]
    if heads and len(heads) == len(unknown):
        return TensorError(
            heads[0],
            f"{_HEADS[heads[0].partition('.')[0]]}, for which there is no place here",
            expected="a language model",
            hint="leave these tensors out to convert the model below the head",
        )
    if not missing:
        return None
    expected, tails = set(missing), _tails(missing)
    most = max(name.count(".") for name in missing) + 1
    named: dict[_Renaming, list[str]] = defaultdict(list)
    for name in unknown:
        renaming = _renaming(name, expected, tails, most)
        if renaming is not None:
            named[renaming].append(name)
    if not named:
        return None
    renaming, names = max(named.items(), key=lambda row: len(row[1]))
    alike = sum(len(n) for r, n in named.items() if r.found == renaming.found)
    return _error(renaming, names[0], alike) if 2 * alike >= len(unknown) else None


def _tails(expected: Iterable[str]) -> dict[str, str]:
    """Return the prefix of each expected name by what follows it."""
    tails = {}
    for name in expected:
        prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
        if prefix:
            tails[name.removeprefix(prefix)] = prefix
    return tails


def _renaming(
    name: str, expected: Set[str], tails: Mapping[str, str], most: int
) -> _Renaming | None:
    """Return how a name differs from an expected one; these have at most `most` segments."""
    segments = name.split(".")
    for count in range(max(len(segments) - most, 0), len(segments)):
        rest, prefix = ".".join(segments[count:]), ".".join(segments[:count])
        found = f"{prefix}." if prefix else ""
        if rest in expected:
            return _Renaming(found)
        if rest in tails:
            return _Renaming(found, tails[rest])
    inner = [segment for segment in segments if segment not in _WRAPPERS]
    if ".".join(inner) in expected:
        wrappers = dict.fromkeys(segment for segment in segments if segment in _WRAPPERS)
        return _Renaming(".".join(wrappers), inside=True)
    return None


def _error(renaming: _Renaming, first: str, count: int) -> TensorError:
    wrapper = next((s for s in renaming.found.split(".") if s in _WRAPPERS), "")
    if renaming.inside:
        found, expected = f"has {renaming.found!r} in its name", "a name without it"
    elif not renaming.found:
        found, expected = "has no prefix", f"{renaming.expected!r} before it"
    else:
        found = f"begins with {renaming.found!r}"
        expected = f"{renaming.expected!r} in its place" if renaming.expected else "no such prefix"
    others = f", like {count - 1} others" if count > 1 else ""
    return TensorError(
        first, f"{found}{others}", expected=expected, hint=_WRAPPERS.get(wrapper, _RENAME)
    )


def empty_cause(misfits: Sequence[tuple[TensorSpec, tuple[int, ...]]]) -> TensorError | None:
    """Return the one error behind tensors without values, or None if there are none.

    Args:
        misfits: expected tensors, each with the shape that was found.
    """
    empty = [expected.name for expected, found in misfits if 0 in found]
    if not empty:
        return None
    others = f", like {len(empty) - 1} others" if len(empty) > 1 else ""
    return TensorError(
        empty[0],
        f"no values in it{others}",
        expected="whole weights",
        hint="DeepSpeed ZeRO-3 saves this where weights are not gathered: save with "
        "stage3_gather_16bit_weights_on_model_save, or run its zero_to_fp32.py",
    )


def size_cause(
    misfits: Sequence[tuple[TensorSpec, tuple[int, ...]]],
    dims: Mapping[str, int],
    fitting: Set[str],
) -> TensorError | None:
    """Return the key of config.json behind shapes that do not fit, or None if several differ.

    Args:
        misfits: expected tensors, each with the shape that was found.
        dims: the sizes of config.json (`ModelConfig.dims`).
        fitting: those that other tensors have.
    """
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for expected, found in misfits:
        symbols = role_of(expected.name).info.shape
        if len(symbols) != len(found):
            return None
        for symbol, size, wanted in zip(symbols, found, expected.shape, strict=True):
            if size != wanted:
                votes[symbol][size] += 1
    differing = [symbol for symbol in _CONFIG_KEYS if symbol in votes]
    direct = [symbol for symbol in differing if len(votes[symbol]) == 1 and symbol not in fitting]
    if not direct or direct != differing:
        return None
    keys = ", ".join(f"{_CONFIG_KEYS[symbol]} is {dims[symbol]}" for symbol in direct)
    sizes = ", ".join(str(next(iter(votes[symbol]))) for symbol in direct)
    return TensorError(
        "config.json",
        f"{keys}, but {len(misfits)} tensors have {sizes}",
        expected="config.json and weights of one model",
        hint=f"first of them: {misfits[0][0].name}",
    )
