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
_OTHER_ZEROS = f"{_UNPACKED}, or save it with GPTQModel as checkpoint_format gptq"
_INT8 = f"{_UNPACKED}, or save what `dequantize()` of transformers' model returns"


@dataclass(frozen=True)
class ForeignPacking:
    """How another tool packed the weights.

    Args:
        label: its name, with its variant.
        hint: what to do instead.
        tensor: the first of its tensors, where other weights can be read.
    """

    label: str
    hint: str = _UNPACKED
    tensor: str = ""


@dataclass(frozen=True)
class _KnownPacking:
    """A packing: its ``quant_method`` and the endings of names that only it writes."""

    label: str
    methods: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    variant: tuple[str, ...] = ()
    hint: str = _UNPACKED


_GPTQ = ("gptq", "gptqmodel")
_READ = ("", "gptq")
"""Forms of GPTQ that are read: if none is said, it is the first."""

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
    _KnownPacking("GPTQ", _GPTQ, (".g_idx",), ("bits",)),
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
    endings, packed, first = set[str](), False, ""
    for spec in tensors:
        packed = packed or spec.dtype not in FLOAT_DTYPES
        if spec.dtype not in FLOAT_DTYPES or spec.name.endswith(_ENDINGS):
            first = first or spec.name
        if spec.name.endswith(_ENDINGS):
            endings |= {ending for ending in _ENDINGS if spec.name.endswith(ending)}
    settings = _settings(raw)
    method = str(settings.get("quant_method", "")).lower()
    other = _other_values(settings)
    if other:
        return ForeignPacking(f"compressed-tensors with {other}")
    form = _gptq_form(settings, method)
    if form and (ours or endings or packed):
        return ForeignPacking(f"GPTQ in the form {form}", _OTHER_ZEROS)
    named = next((row for row in _ROWS if method in row.methods), None)
    if "mlx" in formats:
        named = next(row for row in _ROWS if row.label == "MLX")
    elif not (endings or (packed and named)) or (ours and not named):
        return None
    row = named or next(row for row in _ROWS if endings & set(row.endings))
    label = f"{row.label}{_variant(row, settings)}"
    return ForeignPacking(label, row.hint, first if ours else "")


def _other_values(settings: Mapping[str, Any]) -> str:
    """Return which key says that tensors of known names hold other values; empty if none does.

    Transforms leave weights in a rotated basis, sparsity leaves zeros out. compressed-tensors 0.20
    ``quantization/quant_config.py``.
    """
    transforms = settings.get("transform_config")
    groups = transforms.get("config_groups", True) if isinstance(transforms, dict) else transforms
    if transforms and groups:
        return "a transform_config"
    sparsity = settings.get("sparsity_config")
    dense = isinstance(sparsity, dict) and sparsity.get("format") == "dense"
    return "a sparsity_config" if sparsity and not dense else ""


def _gptq_form(settings: Mapping[str, Any], method: str) -> str:
    """Return which form of GPTQ codes have that are not in its first; empty if they are.

    Names and shapes are the same: gptq_v2 stores a zero point itself instead of one less, others
    permute codes. GPTQModel 7.7 ``quantization/config.py``.
    """
    if method not in _GPTQ:
        return ""
    if settings.get("is_marlin_format") is True:
        return "marlin"
    found = (settings.get(key) for key in ("checkpoint_format", "format"))
    return next((one[:40] for one in found if isinstance(one, str) and one not in _READ), "")


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
