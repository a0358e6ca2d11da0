"""Scales of a KV cache in FP8: their names, their values, and how tools write them.

A full-attention layer has two, of its keys and of its values: an engine divides by them what enters
the cache as E4M3, and multiplies what leaves it. Keys enter after their norm and the rotary
embedding. They are no part of a weight. Sources: llm-compressor and compressed-tensors 0.20
(``initialize_attn_qparams``), Model-Optimizer (``export/quant_utils.py``, which names them after
``k_proj`` and ``v_proj``); vLLM reads both (``QuantizationConfig.get_cache_scale_mapper``).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen35.errors import TensorError
from qwen35.tensors import FLOAT_DTYPES, TensorSpec

__all__ = [
    "CACHE_ENDINGS",
    "LARGEST_CODE",
    "SMALLEST_SCALE",
    "CacheForm",
    "attention_of",
    "cache_problems",
    "cache_scale",
    "check_cache_scale",
]

CACHE_ENDINGS = (".k_scale", ".v_scale")
"""Ends of the names of scales, that of the keys first."""

LARGEST_CODE = 448.0
"""The largest E4M3 number: a scale is the largest magnitude over it."""

SMALLEST_SCALE = 2.0**-126
"""The smallest normal float32 number: the inverse of a smaller one may be infinite."""

_EACH = "one scale of k and one of v for each full-attention layer"


@dataclass(frozen=True)
class CacheForm:
    """How a tool writes the scales; they are float32.

    Args:
        names: what follows the name of the attention module, of keys and of values.
        shape: of a scale.
        scheme: ``kv_cache_scheme`` in ``quantization_config``.
    """

    names: tuple[str, str]
    shape: tuple[int, ...]
    scheme: Mapping[str, Any]

    def specs(self, attention: str) -> tuple[TensorSpec, TensorSpec]:
        """Return the scales of keys and of values of an attention module."""
        of_keys, of_values = (TensorSpec(attention + end, "F32", self.shape) for end in self.names)
        return of_keys, of_values


def attention_of(name: str) -> tuple[str, int]:
    """Return whose scale a tensor is: the attention module, and 0 for its keys, 1 for its values.

    >>> attention_of("model.layers.3.self_attn.v_proj.v_scale")
    ('model.layers.3.self_attn', 1)
    """
    ending = next(end for end in CACHE_ENDINGS if name.endswith(end))
    module = name.removesuffix(ending)
    return module.removesuffix(f".{ending[1]}_proj"), CACHE_ENDINGS.index(ending)


def cache_problems(
    scales: Sequence[TensorSpec], modules: Mapping[str, bool]
) -> Iterator[TensorError]:
    """Yield what is wrong with the scales of a checkpoint, by their headers.

    Args:
        scales: all of them.
        modules: the attention modules with a KV cache, and whether each is of a layer for
            multi-token prediction, which may be without scales.
    """
    found: dict[tuple[str, int], str] = {}
    for spec in scales:
        module, kind = key = attention_of(spec.name)
        if module not in modules:
            text = "a scale of the KV cache, which the module does not have"
            yield TensorError(spec.name, text, expected=_EACH)
        elif key in found:
            yield TensorError(spec.name, f"the same scale as {found[key]}", expected=_EACH)
        elif spec.numel != 1:
            yield TensorError(
                spec.name, f"shape {list(spec.shape)}", expected="one number, [] or [1]"
            )
        elif spec.dtype not in FLOAT_DTYPES:
            expected = " or ".join(FLOAT_DTYPES)
            yield TensorError(spec.name, f"dtype {spec.dtype}", expected=expected)
        found.setdefault((module, kind), spec.name)
    yield from _missing(found.keys(), modules)


def _missing(
    found: Collection[tuple[str, int]], modules: Mapping[str, bool]
) -> Iterator[TensorError]:
    held = {module for module, _ in found}
    some = any(module in held for module, mtp in modules.items() if not mtp)
    wanted = (one for one, mtp in modules.items() if one in held or (some and not mtp))
    for module in wanted:
        for kind, ending in enumerate(CACHE_ENDINGS):
            if (module, kind) not in found:
                yield TensorError(module, f"no {ending[1:]} of its KV cache", expected=_EACH)


def cache_scale(data: bytes, dtype: str) -> float:
    """Return the value of a scale.

    >>> cache_scale(bytes([0, 63]), "BF16")
    0.5
    """
    if dtype == "BF16":
        data, dtype = bytes(2) + data, "F32"
    value: float = struct.unpack({"F32": "<f", "F16": "<e"}[dtype], data)[0]
    return value


def check_cache_scale(name: str, value: float) -> None:
    """Check that a cache can be scaled by a value.

    Raises:
        TensorError: it cannot.
    """
    if not (math.isfinite(value) and value > 0):
        raise TensorError(name, f"a scale of {value:g}", expected="a finite number above 0")
    if value < SMALLEST_SCALE:
        found = f"a scale of {value:g}, whose inverse is not finite"
        raise TensorError(name, found, expected=f"{SMALLEST_SCALE:.3g} or more")
