"""The tensors of a GGUF file from a checkpoint's weights: names, shapes, transforms.

Source: llama.cpp 0c1e5709, ``conversion/qwen.py``, ``qwen3vl.py`` and ``base.py``; the tests
compare whole files with those of that converter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qwen35.checkpoint.inventory import InventoryItem
from qwen35.codecs.arranged import ArrangedWeight
from qwen35.errors import TensorError
from qwen35.model.model_config import ModelConfig
from qwen35.planning.rows import Rows, WeightSlab
from qwen35.planning.transforms import (
    NegExp,
    PatchFrame,
    PlusOne,
    TileValueColumns,
    TileValueHeads,
    Transform,
)
from qwen35.tensors import TensorSpec

__all__ = [
    "UntypedTensor",
    "matrix_names",
    "mtp_tensors",
    "name_pattern",
    "text_tensors",
    "vision_tensors",
]

Storage = Literal["any", "f32", "patch"]


@dataclass(frozen=True, slots=True)
class UntypedTensor:
    """A tensor of a GGUF file, without its type.

    Args:
        name: name in the file.
        rows: the source of its values.
        storage: ``f32``: always F32; ``patch``: F16 in an F16 file, else F32; ``any``: as the file.
    """

    name: str
    rows: Rows
    storage: Storage = "any"

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost dimension first; a file lists it last."""
        return self.rows.shape

    @property
    def row(self) -> int:
        """Elements of a row."""
        return self.rows.row


@dataclass(frozen=True)
class _Row:
    """How one role is written.

    Args:
        name: name in the file, after ``blk.N.`` for roles of a layer.
        storage: see `UntypedTensor`.
        heads: the axis made of value heads, which are reordered.
        computed: transforms of its values.
    """

    name: str
    storage: Storage = "any"
    heads: Literal["", "rows", "columns"] = ""
    computed: tuple[Transform, ...] = ()


_NORM = (PlusOne(),)


_LAYER: dict[str, _Row] = {
    "input_layernorm": _Row("attn_norm.weight", "f32", computed=_NORM),
    "post_attention_layernorm": _Row("post_attention_norm.weight", "f32", computed=_NORM),
    "linear_attn.in_proj_qkv": _Row("attn_qkv.weight", heads="rows"),
    "linear_attn.in_proj_z": _Row("attn_gate.weight", heads="rows"),
    "linear_attn.in_proj_a": _Row("ssm_alpha.weight", heads="rows"),
    "linear_attn.in_proj_b": _Row("ssm_beta.weight", heads="rows"),
    "linear_attn.out_proj": _Row("ssm_out.weight", heads="columns"),
    "linear_attn.conv1d": _Row("ssm_conv1d.weight", "f32", heads="rows"),
    "linear_attn.A_log": _Row("ssm_a", "f32", heads="rows", computed=(NegExp(),)),
    "linear_attn.dt_bias": _Row("ssm_dt.bias", "f32", heads="rows"),
    "linear_attn.norm": _Row("ssm_norm.weight", "f32"),
    "self_attn.q_proj": _Row("attn_q.weight"),
    "self_attn.k_proj": _Row("attn_k.weight"),
    "self_attn.v_proj": _Row("attn_v.weight"),
    "self_attn.o_proj": _Row("attn_output.weight"),
    "self_attn.q_norm": _Row("attn_q_norm.weight", "f32", computed=_NORM),
    "self_attn.k_norm": _Row("attn_k_norm.weight", "f32", computed=_NORM),
    "mlp.gate_proj": _Row("ffn_gate.weight"),
    "mlp.up_proj": _Row("ffn_up.weight"),
    "mlp.down_proj": _Row("ffn_down.weight"),
    "mlp.gate": _Row("ffn_gate_inp.weight", "f32"),
    "mlp.shared_expert_gate": _Row("ffn_gate_inp_shexp.weight", "f32"),
    "mlp.shared_expert.gate_proj": _Row("ffn_gate_shexp.weight"),
    "mlp.shared_expert.up_proj": _Row("ffn_up_shexp.weight"),
    "mlp.shared_expert.down_proj": _Row("ffn_down_shexp.weight"),
    "mlp.experts.gate_proj": _Row("ffn_gate_exps.weight"),
    "mlp.experts.up_proj": _Row("ffn_up_exps.weight"),
    "mlp.experts.down_proj": _Row("ffn_down_exps.weight"),
}
_ROOT: dict[str, _Row] = {
    "embed_tokens": _Row("token_embd.weight"),
    "norm": _Row("output_norm.weight", "f32", computed=_NORM),
    "lm_head": _Row("output.weight"),
}
_MTP_ROOT: dict[str, _Row] = {
    "mtp.fc": _Row("nextn.eh_proj.weight"),
    "mtp.pre_fc_norm_embedding": _Row("nextn.enorm.weight", "f32", computed=_NORM),
    "mtp.pre_fc_norm_hidden": _Row("nextn.hnorm.weight", "f32", computed=_NORM),
    "mtp.norm": _Row("nextn.shared_head_norm.weight", "f32", computed=_NORM),
}
_VISION: dict[str, str] = {
    "visual.patch_embed.proj": "v.patch_embd",
    "visual.pos_embed": "v.position_embd",
    "visual.merger.norm": "v.post_ln",
    "visual.merger.linear_fc1": "mm.0",
    "visual.merger.linear_fc2": "mm.2",
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
}
_FUSED = "mlp.experts.gate_up_proj"
_EXPERTS = ("mlp.experts.down_proj", "mlp.experts.gate_proj", "mlp.experts.up_proj")


def converter_order(items: Sequence[InventoryItem]) -> list[InventoryItem]:
    """Return `items` in the order of llama.cpp's converter: by file, then by name.

    An MTP layer of another checkpoint, whose files are paths, comes last, as in published ones. The
    files of a split GGUF model do not count: decoded, it is one.
    """

    def place(item: InventoryItem) -> tuple[bool, str, str]:
        file = "" if isinstance(item.weight, ArrangedWeight) else item.weight.main.file
        return "/" in file, file, item.weight.name

    return sorted(items, key=place)


def name_pattern(role: str) -> str:
    """Return the names of a role's tensors in a file, with ``*`` for the layer; empty if unknown.

    >>> name_pattern("linear_attn.out_proj")
    'blk.*.ssm_out.weight'
    """
    layer = _LAYER.get(role) or _MTP_ROOT.get(role)
    root = _ROOT.get(role)
    return f"blk.*.{layer.name}" if layer else root.name if root else ""


def matrix_names() -> frozenset[str]:
    """Return the names of the matrices that llama.cpp adds products to, ``*`` for the layer."""
    gates = ("mlp.gate", "mlp.shared_expert_gate")
    roles = (role for role, row in _LAYER.items() if row.storage == "any" or role in gates)
    return frozenset((*map(name_pattern, roles), _ROOT["lm_head"].name))


def text_tensors(
    items: Sequence[InventoryItem], config: ModelConfig, *, mtp: bool
) -> list[UntypedTensor]:
    """Return the tensors of the text model's file, in the converter's order.

    Args:
        items: all weights of the checkpoint.
        config: the checkpoint's config.
        mtp: whether to include the multi-token-prediction layers.

    Raises:
        TensorError: llama.cpp does not support the geometry.
    """
    _check_heads(config)
    waiting: dict[tuple[int, str], list[InventoryItem]] = {}
    tensors: list[UntypedTensor] = []
    for item in converter_order(items):
        scope = item.role.scope
        if scope == "visual" or (scope == "mtp" and not mtp):
            continue
        if item.role.expert is None:
            tensors += _text(item, config)
        else:
            tensors += _stacked(item, config, waiting)
    return [_as_stored(tensor) for tensor in tensors]


def _as_stored(tensor: UntypedTensor) -> UntypedTensor:
    """Return a tensor of a source that has this very tensor, which is then taken as it is there."""
    rows = tensor.rows
    weight = rows.item.weight
    if not isinstance(weight, ArrangedWeight) or any(slab.item.changes for slab in rows.slabs):
        return tensor
    held = next((h.weight for h in weight.sources if h.weight.name == tensor.name), None)
    if held is None:
        return tensor
    item = InventoryItem(held, rows.item.role, TensorSpec(tensor.name, "F32", tensor.shape))
    slabs = tuple(WeightSlab(item, number * rows.count) for number in range(len(rows.slabs)))
    return UntypedTensor(tensor.name, Rows(rows.shape, slabs, restored=rows), tensor.storage)


def mtp_tensors(items: Sequence[InventoryItem], config: ModelConfig) -> list[UntypedTensor]:
    """Return the tensors of a file with the MTP layer alone: it, and what it shares.

    Arguments and errors as for `text_tensors`.
    """
    return [
        tensor
        for tensor in text_tensors(items, config, mtp=True)
        if tensor.rows.item.role.scope == "mtp" or tensor.rows.item.role.layer is None
    ]


def _check_heads(config: ModelConfig) -> None:
    keys, values = _heads(config)
    if values % keys:
        raise TensorError(
            "config.json", f"{values} value heads on {keys} key heads", expected="a multiple"
        )
    key, value = config.text_raw["linear_key_head_dim"], config.dims["linear_head"]
    if key != value:  # llama.cpp has a single ssm.state_size for both
        raise TensorError(
            "config.json",
            f"key heads of {key} and value heads of {value} in linear attention",
            expected="the same, for llama.cpp",
        )


def _heads(config: ModelConfig) -> tuple[int, int]:
    """Return the numbers of key heads and value heads in linear attention."""
    return int(config.text_raw["linear_num_key_heads"]), config.dims["linear_heads"]


def _block(item: InventoryItem, config: ModelConfig) -> int:
    layers = len(config.layer_types)
    layer = item.role.layer or 0
    return layers + layer if item.role.scope == "mtp" else layer


def _in_layer(item: InventoryItem) -> str:
    """Return the role within its layer, the same for MTP layers."""
    return item.role.name.removeprefix("mtp.layers.")


def _text(item: InventoryItem, config: ModelConfig) -> Iterator[UntypedTensor]:
    role, shape = _in_layer(item), item.spec.shape
    if item.role.layer is None:
        row = _ROOT.get(role) or _MTP_ROOT[role]
        prefix = f"blk.{len(config.layer_types)}." if role in _MTP_ROOT else ""
        yield _tensor(prefix, row, shape, (WeightSlab(item),), config)
        return
    prefix = f"blk.{_block(item, config)}."
    if role == _FUSED:  # gate rows, then up rows, of each expert: two tensors read with a stride
        experts, both, width = shape
        half = both // 2
        for i, name in enumerate(("mlp.experts.gate_proj", "mlp.experts.up_proj")):
            slabs = tuple(WeightSlab(item, e * both + i * half) for e in range(experts))
            yield _tensor(prefix, _LAYER[name], (experts, half, width), slabs, config)
        return
    if role == "mlp.experts.down_proj":
        slabs = tuple(WeightSlab(item, e * shape[1]) for e in range(shape[0]))
        yield _tensor(prefix, _LAYER[role], shape, slabs, config)
        return
    if role == "linear_attn.conv1d":  # [channels, 1, kernel]: the converter squeezes it
        shape = (shape[0], shape[2])
    yield _tensor(prefix, _LAYER[role], shape, (WeightSlab(item),), config)


def _tensor(
    prefix: str,
    row: _Row,
    shape: tuple[int, ...],
    slabs: tuple[WeightSlab, ...],
    config: ModelConfig,
) -> UntypedTensor:
    transforms = (*_moves(row, shape, config), *row.computed)
    return UntypedTensor(prefix + row.name, Rows(shape, slabs, transforms), row.storage)


def _moves(row: _Row, shape: tuple[int, ...], config: ModelConfig) -> Iterator[Transform]:
    """Yield the reordering of value heads; none if there are as many as key heads."""
    keys, values = _heads(config)
    if keys == values or not row.heads:
        return
    qkv = row.name in ("attn_qkv.weight", "ssm_conv1d.weight")
    first = config.dims["linear_qkv"] - config.dims["linear_value"] if qkv else 0
    # The others have one row per head: in_proj_a, in_proj_b, A_log and dt_bias.
    wide = qkv or row.name in ("attn_gate.weight", "ssm_out.weight")
    head = config.dims["linear_head"] if wide else 1
    if row.heads == "columns" or len(shape) == 1:
        yield TileValueColumns(head, keys)
    else:
        yield TileValueHeads(first, head, keys, shape[0])


def _stacked(
    item: InventoryItem, config: ModelConfig, waiting: dict[tuple[int, str], list[InventoryItem]]
) -> Iterator[UntypedTensor]:
    """Collect the experts of a block; yield the three stacks once all have arrived.

    That is the position at which the converter writes them.
    """
    block = _block(item, config)
    waiting.setdefault((block, _in_layer(item)), []).append(item)
    stacks = [waiting.get((block, role), []) for role in _EXPERTS]
    experts = config.dims["experts"]
    if any(len(stack) < experts for stack in stacks):
        return
    for role, stack in zip(_EXPERTS, stacks, strict=True):
        ordered = sorted(stack, key=lambda item: item.role.expert or 0)
        shape = (experts, *item_shape(ordered))
        slabs = tuple(WeightSlab(expert) for expert in ordered)
        yield _tensor(f"blk.{block}.", _LAYER[role], shape, slabs, config)


def item_shape(stack: Sequence[InventoryItem]) -> tuple[int, ...]:
    """Return the shape shared by all weights of a stack."""
    return stack[0].spec.shape


def vision_tensors(items: Sequence[InventoryItem]) -> list[UntypedTensor]:
    """Return the tensors of the multimodal projector's file, in the converter's order."""
    tensors: list[UntypedTensor] = []
    for item in converter_order(items):
        if item.role.scope == "visual":
            tensors += _vision(item)
    return [_as_stored(tensor) for tensor in tensors]


def _vision(item: InventoryItem) -> Iterator[UntypedTensor]:
    role, suffix = re.fullmatch(r"(.*?)(\.bias)?", item.role.name).groups()  # type: ignore[union-attr]
    suffix = suffix or ".weight"
    shape, slabs = item.spec.shape, (WeightSlab(item),)
    if role == "visual.patch_embed.proj" and suffix == ".weight":
        channels, colours, frames, height, width = shape
        if frames != 2:
            raise TensorError(item.spec.name, f"{frames} frames", expected="2, for llama.cpp")
        for frame, name in enumerate(("v.patch_embd.weight", "v.patch_embd.weight.1")):
            flat = (channels, colours, height, width)
            yield UntypedTensor(name, Rows(flat, slabs, (PatchFrame(shape, frame),)), "patch")
        return
    if item.role.layer is None:
        name = _VISION[role] + suffix
    else:
        name = f"v.blk.{item.role.layer}.{_VISION[role.removeprefix('visual.blocks.')]}{suffix}"
    plain = len(shape) <= 1 or suffix == ".bias" or role == "visual.pos_embed"
    yield UntypedTensor(name, Rows(shape, slabs), "f32" if plain else "any")
