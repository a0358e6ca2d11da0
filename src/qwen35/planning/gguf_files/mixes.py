"""The mixes of llama-quantize: each tensor's type, as a pure function.

Source: llama.cpp 0c1e5709, ``src/llama-quant.cpp`` (`llama_tensor_get_type_impl`,
`tensor_allows_quantization`), the version in llama-cpp-python 0.3.36. Rules for models outside the
family are omitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qwen35.codecs.ggml.types import FLOATS, GGML_TYPES

__all__ = [
    "FILE_TYPES",
    "MIX",
    "FileType",
    "MixGeometry",
    "mix_order",
    "quantizable",
    "select_types",
]

MIX = "mix"
"""The action that gives a tensor the type of its file's mix."""


@dataclass(frozen=True)
class FileType:
    """The type of a GGUF file as a whole.

    Args:
        name: name in file names and on the command line.
        code: ``general.file_type``.
        base: the type of most of its tensors.
    """

    name: str
    code: int
    base: str

    @property
    def quantized(self) -> bool:
        """Whether llama-quantize writes it, rather than the converter."""
        return self.base not in FLOATS


FILE_TYPES: dict[str, FileType] = {
    row.name: row
    for row in (
        FileType("F32", 0, "f32"),
        FileType("F16", 1, "f16"),
        FileType("BF16", 32, "bf16"),
        FileType("Q8_0", 7, "q8_0"),
        FileType("Q6_K", 18, "q6_K"),
        FileType("Q5_K_M", 17, "q5_K"),
        FileType("Q5_K_S", 16, "q5_K"),
        FileType("Q4_K_M", 15, "q4_K"),
        FileType("Q4_K_S", 14, "q4_K"),
        FileType("Q3_K_M", 12, "q3_K"),
        FileType("IQ4_XS", 30, "iq4_xs"),
        FileType("IQ4_NL", 25, "iq4_nl"),
    )
}
"""Supported file types (``llama.h`` `llama_ftype`)."""


@dataclass(frozen=True)
class MixGeometry:
    """What the mixes need to know of a model.

    Args:
        layers: number of blocks, including MTP layers.
        experts: experts per block; 0 in a dense model.
        gqa: query heads per key-value head.
        imatrix: whether there is an importance matrix.
    """

    layers: int
    experts: int
    gqa: int
    imatrix: bool


def quantizable(name: str, shape: Sequence[int]) -> bool:
    """Return whether llama-quantize quantizes the tensor; `shape` is outermost first."""
    return (
        any(size > 1 for size in shape[:-1])
        and name.endswith("weight")
        and "_norm.weight" not in name
        and "ffn_gate_inp.weight" not in name
        and "ssm_conv1d" not in name
    )


def mix_order(name: str) -> tuple[int, str]:
    """Return llama-quantize's sort key for visiting and writing tensors: block, then name."""
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    block = int(number) if first == "blk" and number.isdecimal() else -1
    return block, name


def select_types(
    file_type: FileType,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    geometry: MixGeometry,
    named: Mapping[str, str],
    *,
    upstream_counters: bool = False,
) -> dict[str, str]:
    """Choose the type of every tensor that llama-quantize would quantize.

    Args:
        file_type: a quantized file type.
        tensors: name and shape (outermost first) of every tensor of the file.
        geometry: the model's geometry.
        named: types set by rules, by tensor name.
        upstream_counters: skip named tensors when counting layers, as llama-quantize does; that
            shifts which of the others get more bits.

    Returns:
        Name to type, before fallbacks for rows that do not fit.
    """
    names = [name for name, _ in tensors]
    # attn_qkv counts as a value projection upstream, so there is one per layer, of either kind.
    values = sum(_category(name) == "value" for name in names)
    mix = _Mix(file_type, geometry, tied="output.weight" not in names, values=values)
    types = {}
    for name, shape in sorted(tensors, key=lambda row: mix_order(row[0])):
        if not quantizable(name, shape):
            continue
        if name in named and upstream_counters:
            types[name] = named[name]
            continue
        chosen = mix.choose(name, shape[-1])
        types[name] = named.get(name, chosen)
    return types


def _more_bits(i: int, n: int) -> bool:
    """Return whether the _M mixes give the `i`-th of `n` layers more bits.

    Those are the first and last eighth, and every third layer between (`use_more_bits`).
    """
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@dataclass
class _Mix:
    """State of one pass over the tensors of a file: the layer counters."""

    file_type: FileType
    geometry: MixGeometry
    tied: bool
    values: int
    values_seen: int = 0
    downs_seen: int = 0

    def choose(self, name: str, row: int) -> str:
        """Return the type for the next tensor; calls come in `mix_order`."""
        base = self.file_type.base
        # A tied embedding is the output head, whose error goes straight into the logits.
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            fits = row % GGML_TYPES[base].block == 0
            return "q6_K" if fits and base != "q8_0" else "q8_0"
        category = _category(name)
        if category == "value":
            kind = _value_type(self, self.values_seen)
            self.values_seen += 1
            return kind
        if category == "down":
            # Mixtures have several down projections per block, so upstream takes the block number.
            layer = mix_order(name)[0] if self.geometry.experts > 1 else self.downs_seen
            self.downs_seen += 1
            return _DOWN.get(self.file_type.name, _plain)(self, layer)
        if category == "key" and self.geometry.experts == 8:
            return "q8_0"
        if category == "output":
            return _output_type(self)
        return base


_CATEGORIES = (
    ("attn_qkv.weight", "value"),
    ("attn_v.weight", "value"),
    ("attn_k.weight", "key"),
    ("attn_output.weight", "output"),
    ("ffn_down", "down"),
)


def _category(name: str) -> str:
    return next((kind for part, kind in _CATEGORIES if part in name), "")


def _value_type(mix: _Mix, i: int) -> str:
    """Return the type of the `i`-th attn_v or attn_qkv."""
    if mix.geometry.experts == 8:  # upstream's special case for Mixtral-like models
        return "q8_0"
    name, base = mix.file_type.name, mix.file_type.base
    if name == "Q3_K_M":
        return "q5_K" if i < 2 else "q4_K"
    if name in ("IQ4_NL", "IQ4_XS") and mix.geometry.gqa >= 4:
        return "q5_K"
    if name in ("Q4_K_M", "Q5_K_M") and _more_bits(i, mix.values):
        return "q6_K"
    return "q5_K" if name == "Q4_K_S" and i < 4 else base


def _output_type(mix: _Mix) -> str:
    """Return the type of an attn_output."""
    name, base = mix.file_type.name, mix.file_type.base
    if mix.geometry.experts == 8:
        return "q5_K" if name in ("Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS") else base
    return "q4_K" if name == "Q3_K_M" else base


def _plain(mix: _Mix, layer: int) -> str:
    del layer
    return mix.file_type.base


def _iq4_down(mix: _Mix, layer: int) -> str:
    early = layer < mix.geometry.layers // 8 and not mix.geometry.imatrix
    return "q5_K" if early else mix.file_type.base


_DOWN: Mapping[str, Callable[[_Mix, int], str]] = {
    "Q3_K_M": lambda mix, i: "q5_K" if i < mix.geometry.layers // 16 else "q4_K",
    "Q4_K_M": lambda mix, i: "q6_K" if _more_bits(i, mix.geometry.layers) else "q4_K",
    "Q5_K_M": lambda mix, i: "q6_K" if _more_bits(i, mix.geometry.layers) else "q5_K",
    "Q4_K_S": lambda mix, i: "q5_K" if i < mix.geometry.layers // 8 else "q4_K",
    "IQ4_XS": _iq4_down,
    "IQ4_NL": _iq4_down,
}
"""Rules for the down projections of the feed-forward by file type: (mix, layer) to type."""
