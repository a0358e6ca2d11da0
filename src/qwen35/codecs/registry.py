"""All codecs by name, and the grouping of stored tensors into weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from types import MappingProxyType

from qwen35.codecs.arranged import Arranged, ArrangedWeight
from qwen35.codecs.codec import Codec
from qwen35.codecs.dialect import Dialect
from qwen35.codecs.fp8.codec import Fp8
from qwen35.codecs.fp8_channel.codec import Fp8Channel, Fp8Tensor
from qwen35.codecs.ggml.codec import GGML
from qwen35.codecs.int4.codec import INT4
from qwen35.codecs.mlx.codec import MLX
from qwen35.codecs.mlx.mlx_files import MlxFiles
from qwen35.codecs.nf4.codec import Nf4
from qwen35.codecs.nvfp4.codec import NVFP4
from qwen35.codecs.plain.codec import Plain
from qwen35.errors import TensorError
from qwen35.tensors import StoredTensor, Weight

__all__ = [
    "CODECS",
    "DIALECTS",
    "LAYOUTS",
    "TRAINED_ON",
    "codec_of",
    "dialect_of",
    "group",
    "is_lossy",
    "is_packed",
    "packings",
    "quantized_weights",
]

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Plain(),
        Nf4(),
        *NVFP4,
        *INT4,
        Fp8Channel(),
        Fp8Tensor(),
        Fp8(),
        *MLX,
        *GGML,
    )
}
"""Codecs by name. The first codec that finds companions for a stored tensor claims it."""

TRAINED_ON = tuple(n for n, codec in CODECS.items() if codec.packed and codec.trains)
"""Codecs whose weights peft trains adapters on; each has a built-in recipe of its name."""

LAYOUTS = sorted({name for codec in CODECS.values() for name in codec.layouts})
"""The tools in whose layouts weights can be written."""

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (MlxFiles(),)}
"""Dialects by name."""


def codec_of(weight: Weight) -> Codec:
    """Return the codec that holds a weight."""
    codec = CODECS[weight.storage]
    return Arranged(codec) if isinstance(weight, ArrangedWeight) else codec


def dialect_of(
    tensors: Mapping[str, StoredTensor], formats: Set[str] = frozenset()
) -> Dialect | None:
    """Return the dialect of files; None if their tensors have the family's names.

    Args:
        tensors: by their names in the files.
        formats: values of ``format`` in the files' metadata.
    """
    return next((d for d in DIALECTS.values() if d.reads(tensors, formats)), None)


def is_packed(weight: Weight) -> bool:
    """Return whether a weight has to be decoded."""
    return isinstance(weight, ArrangedWeight) or CODECS[weight.storage].packed


def is_lossy(weight: Weight) -> bool:
    """Return whether a weight is quantized."""
    return CODECS[weight.storage].packed


def quantized_weights(weights: Iterable[Weight]) -> dict[str, int]:
    """Return the number of quantized weights by the label of their format."""
    return dict(Counter(codec_of(weight).label for weight in weights if is_lossy(weight)))


def packings(container: str) -> dict[str, Codec]:
    """Return the quantizing codecs of a container, by name."""
    codecs = CODECS.items()
    return {name: codec for name, codec in codecs if codec.packed and codec.container == container}


def group(
    tensors: Mapping[str, StoredTensor], held: Mapping[str, str] = MappingProxyType({})
) -> tuple[tuple[Weight, ...], list[TensorError]]:
    """Group the stored tensors of a safetensors checkpoint into weights, in stored order.

    Args:
        tensors: by name.
        held: weight to its codec, where something else than its tensors tells it.

    Returns:
        The weights, and the problems: companions without a weight, and packed data without
        companions, which is also returned as a plain weight.
    """
    known = packings("safetensors").values()
    last = {name.rpartition(".")[2] for name in tensors}
    codecs = [codec for codec in known if any(segment.endswith(codec.marks) for segment in last)]
    weights: list[Weight] = []
    problems: list[TensorError] = []
    claimed: set[str] = set()
    for name in tensors:
        for codec in (CODECS[held[name]],) if name in held else codecs:
            companions = codec.companions(tensors, name)
            if companions is not None:
                claimed.update(companions, (name,))
                weights.append(_weight(tensors, name, codec, companions, problems))
                break
    endings = tuple({ending for codec in known for ending in codec.endings})
    # A second pass: a companion may be stored before its weight.
    for name, stored in tensors.items():
        if name in claimed:
            continue
        if name.endswith(endings):
            problems.append(_orphan(name, "the weight it belongs to is missing"))
            continue
        if stored.spec.dtype in ("U8", "F8_E4M3"):
            found = f"{stored.spec.dtype} data without the tensors that give it meaning"
            problems.append(_orphan(name, found))
        weights.append(Weight(name, held.get(name, Plain.name), (stored,)))
    return tuple(weights), problems


def _weight(
    tensors: Mapping[str, StoredTensor],
    name: str,
    codec: Codec,
    companions: list[str],
    problems: list[TensorError],
) -> Weight:
    """Return a weight with its companions, or a plain weight if they have a problem."""
    problem = codec.problem(tensors, name)
    if problem is not None:
        problems.append(problem)
        return Weight(name, Plain.name, (tensors[name],))
    whole = codec.weight_name(name)
    return Weight(whole, codec.name, tuple(tensors[part] for part in (name, *companions)))


def _orphan(name: str, found: str) -> TensorError:
    hint = "the checkpoint was saved incompletely: start from the original"
    return TensorError(name, found, hint=hint)
