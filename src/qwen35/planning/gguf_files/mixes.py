"""The mixes of llama-quantize: each tensor's type, as a pure function.

Source: llama.cpp 0c1e5709, ``src/llama-quant.cpp`` (`llama_tensor_get_type_impl`,
`tensor_allows_quantization`), the version in llama-cpp-python 0.3.36. Rules for models outside the
family are omitted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qwen35.codecs.ggml.types import FLOATS, GGML_TYPES
from qwen35.errors import unknown_name

__all__ = [
    "CONVERTED",
    "DRAFTED",
    "FILE_TYPES",
    "MIX",
    "FileType",
    "MixGeometry",
    "converted_type",
    "mix_order",
    "quantizable",
    "select_types",
    "type_names",
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
        needs_imatrix: a type that needs an importance matrix in such a file, though ggml writes it
            without; empty if there is none.
    """

    name: str
    code: int
    base: str
    needs_imatrix: str = ""

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
        FileType("Q5_1", 9, "q5_1"),
        FileType("Q5_0", 8, "q5_0"),
        FileType("Q4_K_M", 15, "q4_K"),
        FileType("Q4_K_S", 14, "q4_K"),
        FileType("Q4_1", 3, "q4_1"),
        FileType("Q4_0", 2, "q4_0"),
        FileType("IQ4_NL", 25, "iq4_nl"),
        FileType("IQ4_XS", 30, "iq4_xs"),
        FileType("MXFP4_MOE", 38, "mxfp4"),
        FileType("Q3_K_L", 13, "q3_K"),
        FileType("Q3_K_M", 12, "q3_K"),
        FileType("Q3_K_S", 11, "q3_K"),
        FileType("IQ3_M", 27, "iq3_s"),
        FileType("IQ3_S", 26, "iq3_s"),
        FileType("IQ3_XS", 22, "iq3_s"),
        FileType("IQ3_XXS", 23, "iq3_xxs"),
        FileType("Q2_K", 10, "q2_K"),
        FileType("Q2_K_S", 21, "q2_K", "q2_K"),
        FileType("IQ2_M", 29, "iq2_s"),
        FileType("IQ2_S", 28, "iq2_xs"),
        FileType("IQ2_XS", 20, "iq2_xs"),
        FileType("IQ2_XXS", 19, "iq2_xxs"),
        FileType("IQ1_M", 31, "iq1_m"),
        FileType("IQ1_S", 24, "iq1_s"),
        FileType("Q2_0", 41, "q2_0"),
        FileType("TQ2_0", 37, "tq2_0"),
        FileType("TQ1_0", 36, "tq1_0"),
        FileType("Q1_0", 40, "q1_0"),
    )
}
"""The file types that llama-quantize writes (``llama.h`` `llama_ftype`), roughly largest first.

Its NVFP4 has no default type there (`llama_ftype_get_default_type`), so no tool writes it.
"""

CONVERTED = ("F32", "F16", "BF16", "Q8_0")
"""File types that llama.cpp's converter writes itself (``convert_hf_to_gguf.py --outtype``)."""

DRAFTED = (*CONVERTED, "Q4_0")
"""File types of an MTP layer's own file; Q4_0 is that of ``llama-quantize --pure``."""


def type_names(types: str | Iterable[str]) -> tuple[str, ...]:
    """Return file types as `FILE_TYPES` spells them, each once, whether known or not.

    Args:
        types: what a user wrote: names, or one text with commas or spaces.
    """
    names = types.replace(",", " ").split() if isinstance(types, str) else types
    return tuple(dict.fromkeys(name.strip().upper() for name in names if name.strip()))


def converted_type(name: str, subject: str, known: Sequence[str] = CONVERTED) -> str:
    """Return the name of one of `known`; `subject` is what the user set.

    Raises:
        UsageError: there is no such type.
    """
    if name.upper() not in known:
        raise unknown_name(subject, name, known)
    return name.upper()


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
    mix = _Chooser(file_type, geometry, names)
    types = {}
    for name, shape in sorted(tensors, key=lambda row: mix_order(row[0])):
        if not quantizable(name, shape):
            continue
        if name in named and upstream_counters:
            types[name] = named[name]
            continue
        chosen = mix.choose(name, shape)
        types[name] = named.get(name, chosen)
    return types


def _more_bits(i: int, n: int) -> bool:
    """Return whether the _M mixes give the `i`-th of `n` layers more bits.

    Those are the first and last eighth, and every third layer between (`use_more_bits`).
    """
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


_CATEGORIES = (
    ("attn_qkv.weight", "value"),
    ("attn_v.weight", "value"),
    ("attn_k.weight", "key"),
    ("attn_q.weight", "query"),
    ("attn_output.weight", "mixed"),
    ("ffn_up", "up"),
    ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)
"""Part of a name to category; the first that matches counts. "mixed" is attn_output."""


def _category(name: str, *, tied: bool = False) -> str:
    # A tied embedding is the output head, whose error goes straight into the logits.
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "head"
    if name == "token_embd.weight":
        return "embedding"
    return next((kind for part, kind in _CATEGORIES if part in name), "")


@dataclass(frozen=True)
class _Place:
    """A tensor among the others of its category.

    Args:
        geometry: the model's geometry.
        seen: how many of its category came before it.
        values: how many of the category "value" there are.
        block: number of its block; -1 outside of blocks.
        stacked: whether it holds the matrices of several experts.
    """

    geometry: MixGeometry
    seen: int
    values: int
    block: int
    stacked: bool

    @property
    def layer(self) -> int:
        """Its layer, as upstream counts."""
        # Mixtures have several of a category per block, so upstream takes the block's number.
        return self.block if self.geometry.experts > 1 else self.seen

    @property
    def early(self) -> bool:
        """Whether it is in the first eighth of layers."""
        return self.layer < self.geometry.layers // 8

    @property
    def raised(self) -> bool:
        """Whether its layer is among those that the _M mixes give more bits."""
        return _more_bits(self.layer, self.geometry.layers)

    @property
    def grouped(self) -> bool:
        """Whether its value heads serve so many query heads that more bits for them cost little."""
        return self.geometry.gqa >= 4


_Choice = str | Callable[[_Place], str]
"""A type, or a rule that returns one; an empty text is the file's base type."""

_Mix = Mapping[str, _Choice]
"""Category to choice; categories that are absent get the base type, the head q6_K."""


def _raised_value(at: _Place) -> str:
    return "q6_K" if _more_bits(at.seen, at.values) else ""


def _raised_down(at: _Place) -> str:
    return "q6_K" if at.raised else ""


def _grouped_q4(at: _Place) -> str:
    return "q4_K" if at.grouped else ""


def _middle_iq3(at: _Place) -> str:
    geometry = at.geometry
    return "iq3_xxs" if not at.early and at.layer < 7 * geometry.layers // 8 else ""


def _iq3_value(at: _Place) -> str:
    if at.grouped:
        return "q4_K"
    return "" if at.geometry.imatrix else "iq3_s"


def _iq3_down(at: _Place) -> str:
    if at.geometry.imatrix:
        return ""
    return "q4_K" if at.early else "q3_K"


def _iq3_m_down(at: _Place) -> str:
    return "q4_K" if at.early or (at.geometry.experts == 8 and at.raised) else ""


def _legacy(more: str) -> _Mix:
    """Return the mix of Q4_0 and Q5_0: with an importance matrix they fail on early layers."""
    return {"down": lambda at: more if at.early and at.geometry.imatrix else ""}


def _low(more: str, embedding: str, mixed: str = "") -> _Mix:
    """Return a mix of less than three bits; `more` is the type where the base would be too coarse.

    Its down projections are counted one by one, even in a mixture with two per block.
    """
    return {
        "head": "q5_K",
        "embedding": embedding,
        "value": lambda at: "q4_K" if at.grouped or at.geometry.experts >= 4 else more,
        "down": lambda at: more if at.seen < at.geometry.layers // 8 else "",
        "mixed": mixed,
    }


_IQ4: _Mix = {
    "value": lambda at: "q5_K" if at.grouped else "",
    "down": lambda at: "q5_K" if at.early and not at.geometry.imatrix else "",
}
_TERNARY: _Mix = {"embedding": "q4_K"}
_IQ2_XS = _low("q2_K", "q2_K")
_IQ2_S = _low("iq3_s", "iq3_s", "iq3_s")
_IQ1 = _low("q2_K", "q2_K", "iq2_xxs")

_MIXES: Mapping[str, _Mix] = {
    "Q8_0": {"head": "q8_0"},
    "Q5_K_M": {"value": _raised_value, "down": _raised_down},
    "Q5_0": _legacy("q5_1"),
    "Q4_K_M": {"value": _raised_value, "down": _raised_down},
    "Q4_K_S": {
        "value": lambda at: "q5_K" if at.seen < 4 else "",
        "down": lambda at: "q5_K" if at.early else "",
    },
    "Q4_0": _legacy("q4_1"),
    "IQ4_NL": _IQ4,
    "IQ4_XS": _IQ4,
    "MXFP4_MOE": dict.fromkeys(
        ("head", "embedding", "", *(kind for _, kind in _CATEGORIES)),
        lambda at: "" if at.stacked else "q8_0",
    ),
    "Q3_K_L": {"value": "q5_K", "down": "q5_K", "mixed": "q5_K"},
    "Q3_K_M": {
        "value": lambda at: "q5_K" if at.seen < 2 else "q4_K",
        "down": lambda at: "q5_K" if at.layer < at.geometry.layers // 16 else "q4_K",
        "mixed": "q4_K",
    },
    "IQ3_M": {"value": "q4_K", "down": _iq3_m_down, "mixed": "q4_K"},
    "IQ3_S": {"value": _grouped_q4},
    "IQ3_XS": {
        "value": _grouped_q4,
        "key": "iq3_xxs",
        "query": "iq3_xxs",
        "gate": _middle_iq3,
        "up": _middle_iq3,
    },
    "IQ3_XXS": {
        "head": "q5_K",
        "embedding": "iq3_s",
        "value": _iq3_value,
        "key": "iq2_s",
        "query": "iq2_s",
        "down": _iq3_down,
        "mixed": "iq3_s",
    },
    "Q2_K": {
        "value": lambda at: "q4_K" if at.grouped else "q3_K",
        "down": "q3_K",
        "mixed": "q3_K",
    },
    "Q2_K_S": {"value": _grouped_q4, "down": lambda at: "q4_K" if at.early else ""},
    "IQ2_M": _IQ2_S,
    "IQ2_S": _IQ2_S,
    "IQ2_XS": _IQ2_XS,
    "IQ2_XXS": _IQ2_XS,
    "IQ1_M": _IQ1,
    "IQ1_S": _IQ1,
    "Q2_0": _TERNARY,
    "TQ2_0": _TERNARY,
    "TQ1_0": _TERNARY,
}
"""The mix of every file type; those that are absent have their base type throughout."""

_EIGHT: _Mix = {"value": "q8_0", "key": "q8_0", "mixed": ""}
_EIGHT_Q5: _Mix = {**_EIGHT, "mixed": "q5_K"}
_EIGHT_LOW: _Mix = {"key": "q4_K", "mixed": "q5_K"}

_EIGHT_EXPERTS: Mapping[str, _Mix] = {
    **dict.fromkeys(("Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q3_K_M", "Q3_K_S"), _EIGHT_Q5),
    **dict.fromkeys(("IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K"), _EIGHT_Q5),
    **dict.fromkeys(("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), _EIGHT_LOW),
    "MXFP4_MOE": {},
}
"""What differs with eight experts, as in Mixtral 8x7B; `_EIGHT` for types that are absent."""


class _Chooser:
    """One pass over the tensors of a file, with counts of those seen in each category."""

    def __init__(self, file_type: FileType, geometry: MixGeometry, names: Sequence[str]) -> None:
        mix = _MIXES.get(file_type.name, {})
        if geometry.experts == 8:
            mix = {**mix, **_EIGHT_EXPERTS.get(file_type.name, _EIGHT)}
        self._base = file_type.base
        self._mix = mix
        self._geometry = geometry
        self._tied = "output.weight" not in names
        # attn_qkv counts as a value projection upstream, so there is one per layer, of either kind.
        self._values = sum(_category(name) == "value" for name in names)
        self._seen: Counter[str] = Counter()

    def choose(self, name: str, shape: tuple[int, ...]) -> str:
        """Return the type for the next tensor; calls come in `mix_order`."""
        category = _category(name, tied=self._tied)
        block, stacked = mix_order(name)[0], len(shape) > 2 and shape[0] > 1
        at = _Place(self._geometry, self._seen[category], self._values, block, stacked)
        self._seen[category] += 1
        if category == "head" and shape[-1] % GGML_TYPES[self._base].block:
            return "q8_0"
        choice = self._mix.get(category, "q6_K" if category == "head" else "")
        return (choice if isinstance(choice, str) else choice(at)) or self._base
