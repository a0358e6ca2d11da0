"""Packings of other tools, recognized by config.json and tensor names, so that errors name them.

Their weights cannot be decoded here. Names as the tools wrote them in late 2026: AutoGPTQ and
GPTQModel, AutoAWQ, compressed-tensors 0.20, Model-Optimizer (``unified_export_hf.py``),
bitsandbytes 0.50, mlx-lm 0.32, HQQ, torchao, optimum-quanto, AQLM, ExLlama.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from qwen35.tensors import FLOAT_DTYPES, TensorSpec

__all__ = ["ForeignPacking", "foreign_packing"]

_UNPACKED = "start from the unquantized checkpoint"
_MLX = "MLX also stores norms and convolutions in another form: start from the original checkpoint"
_INT8 = f"{_UNPACKED}, or save what `dequantize()` of transformers' model returns"


@dataclass(frozen=True)
class ForeignPacking:
    """How another tool packed the weights.

    Args:
        label: its name, with its variant.
        hint: what to do instead.
    """

    label: str
    hint: str = _UNPACKED


@dataclass(frozen=True)
class _KnownPacking:
    """A packing: its ``quant_method`` and the endings of names that only it writes."""

    label: str
    methods: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    variant: tuple[str, ...] = ()
    hint: str = _UNPACKED


_ROWS = (
    _KnownPacking("ModelOpt", ("modelopt", "modelopt_fp4"), (".weight_scale_2",), ("quant_algo",)),
    _KnownPacking(
        "compressed-tensors",
        ("compressed-tensors", "compressed_tensors"),
        (
            ".weight_packed",
            ".weight_shape",
            ".weight_global_scale",
            ".weight_zero_point",
            "_proj_packed",
        ),
        ("format",),
    ),
    _KnownPacking("GPTQ", ("gptq", "gptqmodel"), (".g_idx",), ("bits",)),
    _KnownPacking("AWQ", ("awq",), (), ("bits", "w_bit")),
    _KnownPacking("AutoRound", ("auto-round", "auto_round", "intel/auto-round"), (), ("bits",)),
    _KnownPacking("GPTQ or AWQ", (), (".qweight", ".qzeros")),
    _KnownPacking("bitsandbytes 8-bit", (), (".SCB", ".weight_format"), hint=_INT8),
    _KnownPacking("bitsandbytes FP4", (), (".quant_state.bitsandbytes__fp4",)),
    _KnownPacking("MLX", ("mlx",), (".biases",), ("bits",), _MLX),
    _KnownPacking("HQQ", ("hqq",), (".W_q",)),
    _KnownPacking("torchao", ("torchao",), ("_qdata", ".qdata", ":tensor_impl"), ("quant_type",)),
    _KnownPacking("quanto", ("quanto",), (".weight._data", ".weight._scale")),
    _KnownPacking("MXFP4", ("mxfp4",), ("_proj_blocks",)),
    _KnownPacking("AQLM", ("aqlm",), (".codebooks",)),
    _KnownPacking("EETQ", ("eetq",), (".weight_scales",)),
    _KnownPacking("ExLlamaV3", ("exl3",), (".trellis",)),
    _KnownPacking("ExLlamaV2", ("exl2",), (".q_weight",)),
    _KnownPacking("FBGEMM FP8", ("fbgemm_fp8",)),
    _KnownPacking("FP8 with a scale per tensor or channel", (), (".weight_scale", ".input_scale")),
)
"""The first row with an ending of a tensor's name applies, unless a method names another one."""

_ENDINGS = tuple(ending for row in _ROWS for ending in row.endings)


def foreign_packing(
    raw: Mapping[str, Any], tensors: Iterable[TensorSpec], formats: Set[str], *, ours: bool
) -> ForeignPacking | None:
    """Return how another tool packed the weights, or None if none did.

    Args:
        raw: config.json.
        tensors: the tensors that no codec of this package holds.
        formats: values of ``format`` in the ``__metadata__`` of the files.
        ours: whether codecs of this package hold other weights. Then names alone prove nothing:
            a tensor of theirs may be misnamed.
    """
    endings, packed = set[str](), False
    for spec in tensors:
        packed = packed or spec.dtype not in FLOAT_DTYPES
        if spec.name.endswith(_ENDINGS):
            endings |= {ending for ending in _ENDINGS if spec.name.endswith(ending)}
    settings = _settings(raw)
    method = str(settings.get("quant_method", "")).lower()
    named = next((row for row in _ROWS if method in row.methods), None)
    if "mlx" in formats:
        named = next(row for row in _ROWS if row.label == "MLX")
    elif not (endings or (packed and named)) or (ours and not named):
        return None
    row = named or next(row for row in _ROWS if endings & set(row.endings))
    return ForeignPacking(f"{row.label}{_variant(row, settings)}", row.hint)


def _settings(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the section of config.json that describes a packing; its method may be implied."""
    text = raw.get("text_config")
    for section in (raw, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(section.get(key), dict):
                implied = {"quant_method": "compressed-tensors"} if key[0] == "c" else {}
                return {**implied, **section[key]}
    mlx = raw.get("quantization")  # mlx-lm before it copied the section
    return {"quant_method": "mlx", **mlx} if isinstance(mlx, dict) else {}


def _variant(row: _KnownPacking, settings: Mapping[str, Any]) -> str:
    for key in row.variant:
        value = settings.get(key)
        if type(value) is int:
            return f" ({value} bits)"
        if isinstance(value, str) and value:
            return f" ({value[:40]})"
    return ""
