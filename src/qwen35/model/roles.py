"""The role of every tensor of the family: the single source of names and shapes.

A role is a tensor's name without prefix, layer number, expert number and ``.weight``:
``model.language_model.layers.7.linear_attn.in_proj_a.weight`` has the role
``linear_attn.in_proj_a``. Roles of the vision tower start with ``visual.``, those of the
multi-token-prediction layer with ``mtp.``. Recipes and ``--keep`` select roles, or groups of roles
by their leading segments (``linear_attn``, ``mtp``, ``visual``).

Names and shapes come from transformers 5.23 ``models/qwen3_5*/modeling_*.py`` and the headers of
the published checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from qwen35.errors import TensorError
from qwen35.model.model_config import ModelConfig
from qwen35.record_class import record
from qwen35.tensors import TensorSpec

__all__ = [
    "MTP",
    "ROLES",
    "TOWER",
    "CheckpointNaming",
    "Role",
    "RoleInfo",
    "expected_tensors",
    "in_group",
    "mtp_tensors",
    "role_of",
    "tower_tensors",
]

MTP, TOWER = "mtp.", "model.visual."
"""Prefixes of multi-token prediction and of the vision tower."""

Kind = Literal["linear", "embedding", "head", "router", "experts", "conv", "vector"]
Place = Literal["root", "layer", "linear", "full", "dense", "moe", "fused", "expert"]


@dataclass(frozen=True)
class RoleInfo:
    """One row of the role table.

    Args:
        path: the tensor's name within its layer, including the suffix.
        kind: ``linear`` is a matrix that transformers puts in an ``nn.Linear``.
        place: where it occurs: once at the root, in every layer, in linear-attention or
            full-attention layers, in dense or MoE layers, with fused or per-expert weights.
        shape: keys of `ModelConfig.dims`.
        meaning: one-line description for ``plan --roles``.
        dtype: dtype in the published checkpoints.
    """

    path: str
    kind: Kind
    place: Place
    shape: tuple[str, ...]
    meaning: str
    dtype: str = "BF16"

    @property
    def name(self) -> str:
        """The role's name: `path` without ``.weight``."""
        return self.path.removesuffix(".weight")


def _row(path: str, kind: Kind, place: Place, shape: str, meaning: str) -> RoleInfo:
    return RoleInfo(path, kind, place, tuple(shape.split()), meaning)


_DECODER = (
    _row("input_layernorm.weight", "vector", "layer", "hidden", "norm before attention (1 + w)"),
    RoleInfo(
        "linear_attn.A_log",
        "vector",
        "linear",
        ("linear_heads",),
        "log of the state's decay rate, per value head",
        "F32",
    ),
    _row(
        "linear_attn.conv1d.weight",
        "conv",
        "linear",
        "linear_qkv one conv",
        "short causal convolution over q, k and v",
    ),
    _row("linear_attn.dt_bias", "vector", "linear", "linear_heads", "bias of the decay gate"),
    _row(
        "linear_attn.in_proj_a.weight",
        "linear",
        "linear",
        "linear_heads hidden",
        "decay gate of each value head",
    ),
    _row(
        "linear_attn.in_proj_b.weight",
        "linear",
        "linear",
        "linear_heads hidden",
        "write gate of each value head",
    ),
    _row(
        "linear_attn.in_proj_qkv.weight",
        "linear",
        "linear",
        "linear_qkv hidden",
        "query, key and value of linear attention",
    ),
    _row(
        "linear_attn.in_proj_z.weight",
        "linear",
        "linear",
        "linear_value hidden",
        "output gate of linear attention",
    ),
    RoleInfo(
        "linear_attn.norm.weight",
        "vector",
        "linear",
        ("linear_head",),
        "norm of the gated output (w, not 1 + w)",
        "F32",
    ),
    _row(
        "linear_attn.out_proj.weight",
        "linear",
        "linear",
        "hidden linear_value",
        "output projection of linear attention",
    ),
    _row("self_attn.k_norm.weight", "vector", "full", "head", "norm of each key head (1 + w)"),
    _row("self_attn.k_proj.weight", "linear", "full", "key_value hidden", "keys"),
    _row("self_attn.o_proj.weight", "linear", "full", "hidden attention", "output projection"),
    _row("self_attn.q_norm.weight", "vector", "full", "head", "norm of each query head (1 + w)"),
    _row("self_attn.q_proj.weight", "linear", "full", "query hidden", "queries and output gate"),
    _row("self_attn.v_proj.weight", "linear", "full", "key_value hidden", "values"),
    _row("mlp.down_proj.weight", "linear", "dense", "hidden ffn", "feed-forward, down"),
    _row("mlp.gate_proj.weight", "linear", "dense", "ffn hidden", "feed-forward, gate"),
    _row("mlp.up_proj.weight", "linear", "dense", "ffn hidden", "feed-forward, up"),
    _row("mlp.gate.weight", "router", "moe", "experts hidden", "expert router"),
    _row(
        "mlp.shared_expert.down_proj.weight",
        "linear",
        "moe",
        "hidden shared_ffn",
        "shared expert, down",
    ),
    _row(
        "mlp.shared_expert.gate_proj.weight",
        "linear",
        "moe",
        "shared_ffn hidden",
        "shared expert, gate",
    ),
    _row(
        "mlp.shared_expert.up_proj.weight",
        "linear",
        "moe",
        "shared_ffn hidden",
        "shared expert, up",
    ),
    _row(
        "mlp.shared_expert_gate.weight", "linear", "moe", "one hidden", "gate of the shared expert"
    ),
    _row(
        "mlp.experts.down_proj",
        "experts",
        "fused",
        "experts hidden expert_ffn",
        "all experts in one stack, down",
    ),
    _row(
        "mlp.experts.gate_up_proj",
        "experts",
        "fused",
        "experts expert_gate_up hidden",
        "all experts in one stack, gate then up",
    ),
    _row(
        "mlp.experts.down_proj.weight", "experts", "expert", "hidden expert_ffn", "an expert, down"
    ),
    _row(
        "mlp.experts.gate_proj.weight", "experts", "expert", "expert_ffn hidden", "an expert, gate"
    ),
    _row("mlp.experts.up_proj.weight", "experts", "expert", "expert_ffn hidden", "an expert, up"),
    _row(
        "post_attention_layernorm.weight",
        "vector",
        "layer",
        "hidden",
        "norm before feed-forward (1 + w)",
    ),
)

_TEXT_ROOT = (
    _row("embed_tokens.weight", "embedding", "root", "vocab hidden", "token embedding"),
    _row("norm.weight", "vector", "root", "hidden", "norm before the head (1 + w)"),
)

_HEAD = _row("lm_head.weight", "head", "root", "vocab hidden", "output head, absent when tied")

_MTP_ROOT = (
    _row("fc.weight", "linear", "root", "hidden two_hidden", "joins embedding and hidden state"),
    _row("norm.weight", "vector", "root", "hidden", "norm before the head (1 + w)"),
    _row(
        "pre_fc_norm_embedding.weight", "vector", "root", "hidden", "norm of the embedding (1 + w)"
    ),
    _row(
        "pre_fc_norm_hidden.weight", "vector", "root", "hidden", "norm of the hidden state (1 + w)"
    ),
)


def _with_bias(path: str, shape: str, meaning: str) -> tuple[RoleInfo, RoleInfo]:
    kind: Kind = "linear" if len(shape.split()) == 2 else "vector"
    bias = shape.split()[0]
    return (
        _row(f"{path}.weight", kind, "layer", shape, meaning),
        _row(f"{path}.bias", "vector", "layer", bias, f"bias of {path}"),
    )


_VISION_BLOCK = (
    *_with_bias("attn.proj", "vision_hidden vision_hidden", "attention output"),
    *_with_bias("attn.qkv", "vision_qkv vision_hidden", "query, key and value"),
    *_with_bias("mlp.linear_fc1", "vision_ffn vision_hidden", "feed-forward, in"),
    *_with_bias("mlp.linear_fc2", "vision_hidden vision_ffn", "feed-forward, out"),
    *_with_bias("norm1", "vision_hidden", "layer norm before attention"),
    *_with_bias("norm2", "vision_hidden", "layer norm before feed-forward"),
)

_VISION_ROOT = (
    *_with_bias("merger.linear_fc1", "vision_merged vision_merged", "patch merger, in"),
    *_with_bias("merger.linear_fc2", "vision_out vision_merged", "patch merger, out"),
    *_with_bias("merger.norm", "vision_hidden", "layer norm before merging"),
    _row("patch_embed.proj.bias", "vector", "root", "vision_hidden", "bias of the patch embedding"),
    _row(
        "patch_embed.proj.weight",
        "conv",
        "root",
        "vision_hidden vision_channels vision_frames vision_patch vision_patch",
        "patch embedding",
    ),
    _row(
        "pos_embed.weight",
        "embedding",
        "root",
        "vision_positions vision_hidden",
        "learned positions, interpolated",
    ),
)


@dataclass(frozen=True)
class _Scope:
    """A part of the model: its name prefix, its layer stack and its roles."""

    group: str
    stack: str
    root: tuple[RoleInfo, ...]
    block: tuple[RoleInfo, ...]


_SCOPES = (
    _Scope("", "layers", (*_TEXT_ROOT, _HEAD), _DECODER),
    _Scope("visual.", "blocks", _VISION_ROOT, _VISION_BLOCK),
    # MTP layers use full attention only.
    _Scope("mtp.", "layers", _MTP_ROOT, tuple(row for row in _DECODER if row.place != "linear")),
)


def _table() -> dict[str, RoleInfo]:
    table = {}
    for scope in _SCOPES:
        for info in scope.root:
            table[f"{scope.group}{info.path}"] = info
        stack = f"{scope.group}{scope.stack}." if scope.group else ""
        for info in scope.block:
            table[f"{stack}{info.path}"] = info
    return table


ROLES: dict[str, RoleInfo] = _table()
"""Roles by path without numbers (``mtp.layers.mlp.up_proj.weight``)."""


@record
class Role:
    """The role of one tensor.

    Args:
        name: its name in recipes (``linear_attn.in_proj_qkv``, ``mtp.layers.mlp.up_proj``).
        info: its row in the role table.
        layer: layer or block number, if any.
        expert: expert number of a per-expert tensor.
    """

    name: str
    info: RoleInfo
    layer: int | None = None
    expert: int | None = None

    @property
    def scope(self) -> str:
        """``visual``, ``mtp`` or ``text``."""
        first = self.name.split(".", 1)[0]
        return first if first in ("visual", "mtp") else "text"


# Numbers have no leading zeros and at most six digits: each tensor has exactly one spelling, and a
# hostile name cannot make int() slow.
_NAME = re.compile(
    r"(?P<prefix>model\.language_model\.|model\.|(?=mtp\.|lm_head\.))"
    r"(?P<head>(?:visual\.|mtp\.)?)"
    r"(?:(?P<stack>layers|blocks)\.(?P<layer>0|[1-9]\d{0,5})\.)?"
    r"(?P<path>[A-Za-z_][\w.]*)\Z",
    re.ASCII,
)
_PREFIXES = {
    "": ("model.language_model.", "model."),
    "visual.": ("model.",),
    "mtp.": ("",),
    "lm_head.": ("",),
}
_EXPERT = re.compile(r"mlp\.experts\.(0|[1-9]\d{0,5})\.", re.ASCII)


def role_of(name: str) -> Role:
    """Return the role of the tensor called `name`.

    Raises:
        TensorError: the family has no such tensor.

    >>> role_of("model.language_model.layers.7.linear_attn.in_proj_a.weight").name
    'linear_attn.in_proj_a'
    """
    match = _EXPERT.search(name)
    if match is None:
        return _parsed(name)
    # Large models have 100,000 expert tensors, but each expert has the roles of the first.
    first = _of_first(f"{name[: match.start()]}mlp.experts.0.{name[match.end() :]}")
    if first is None:
        return _parsed(name)
    return Role(first.name, first.info, first.layer, int(match[1]))


@lru_cache(maxsize=4096)
def _of_first(name: str) -> Role | None:
    """Return the role of a tensor of a first expert; None if the family has none of this name."""
    try:
        return _parsed(name)
    except TensorError:
        return None


def _parsed(name: str) -> Role:
    match = _NAME.match(name)
    if match is None:
        raise _unknown(name)
    path, expert = match["path"], None
    expert_match = _EXPERT.match(path)
    if expert_match:
        expert = int(expert_match[1])
        path = "mlp.experts." + path[expert_match.end() :]
    stack = match["stack"] or ""
    head = match["head"]
    key = f"{head}{stack}.{path}" if stack and head else f"{head}{path}"
    info = ROLES.get(key)
    if info is None or not _numbers_fit(info, head, stack, expert):
        raise _unknown(name)
    if match["prefix"] not in _PREFIXES[head if path != _HEAD.path else "lm_head."]:
        raise _unknown(name)
    layer = int(match["layer"]) if stack else None
    return Role(key.removesuffix(".weight"), info, layer, expert)


_BLOCK_ROWS = {"blocks": frozenset(_VISION_BLOCK), "layers": frozenset(_DECODER)}
"""Rows of numbered blocks or layers, by the name of their list."""


def _numbers_fit(info: RoleInfo, head: str, stack: str, expert: int | None) -> bool:
    """Return whether a name has a layer and an expert number exactly where its row requires."""
    name = "blocks" if head == "visual." else "layers"
    expected = name if info in _BLOCK_ROWS[name] else ""
    return stack == expected and (info.place == "expert") == (expert is not None)


def _unknown(name: str) -> TensorError:
    return TensorError(
        name,
        "not a tensor of Qwen3.5",
        hint="if another tool renamed or packed it, start from the original checkpoint",
    )


def in_group(role: str, group: str) -> bool:
    """Return whether `role` equals `group` or starts with its segments.

    >>> in_group("mlp.gate_proj", "mlp"), in_group("mlp.gate_proj", "mlp.gate")
    (True, False)
    """
    return role == group or role.startswith(f"{group}.")


@dataclass(frozen=True)
class CheckpointNaming:
    """How a checkpoint names and groups its tensors, derived from tensor names alone.

    Args:
        prefix: prefix of text tensors (``model.language_model.`` or ``model.``).
        per_expert: blocks (``layers.3``, ``mtp.layers.0``) with one 2-D matrix per expert.
        mtp: whether the multi-token-prediction layer is present.
        head: whether ``lm_head.weight`` is stored.
    """

    prefix: str = "model.language_model."
    per_expert: frozenset[str] = frozenset()
    mtp: bool = True
    head: bool = False

    @classmethod
    def of(cls, names: Iterable[str]) -> CheckpointNaming:
        """Derive the naming from the tensor names of a checkpoint."""
        prefix, head, mtp = "", False, False
        per_expert = set()
        for name in names:
            head = head or name == "lm_head.weight"
            mtp = mtp or name.startswith("mtp.")
            # Every model has exactly one token embedding, so it reveals the prefix.
            if not prefix and name.endswith("embed_tokens.weight"):
                prefix = name.removesuffix("embed_tokens.weight")
            block, separator, rest = name.partition(".mlp.experts.")
            if separator and rest[:1].isdigit():
                per_expert.add(block[block.find("layers.") :] if "mtp." not in block else block)
        return cls(prefix or "model.language_model.", frozenset(per_expert), mtp, head)

    @classmethod
    def published(cls, config: ModelConfig) -> CheckpointNaming:
        """Return the naming that official releases of this configuration use."""
        vision = config.architecture.vision
        mtp_blocks = frozenset(f"mtp.layers.{i}" for i in range(config.mtp_layers))
        return cls(
            prefix="model.language_model." if vision else "model.",
            per_expert=mtp_blocks if config.moe else frozenset(),
            mtp=config.mtp_layers > 0,
            head=not config.tied,
        )


def expected_tensors(config: ModelConfig, layout: CheckpointNaming) -> Iterator[TensorSpec]:
    """Yield every tensor that a checkpoint of `config` must contain, in model order.

    The vision tower and an untied head follow from `config` alone: a checkpoint without them is
    incomplete, not laid out differently.
    """
    prefix = "model.language_model." if config.architecture.vision else layout.prefix
    if layout.head or not config.tied:
        yield _spec(config, "", _HEAD)
    yield from (_spec(config, prefix, info) for info in _TEXT_ROOT)
    for i, kind in enumerate(config.layer_types):
        yield from _block(config, layout, f"{prefix}layers.{i}", f"layers.{i}", kind)
    yield from tower_tensors(config)
    if layout.mtp:
        yield from mtp_tensors(config, layout)


def mtp_tensors(config: ModelConfig, layout: CheckpointNaming) -> Iterator[TensorSpec]:
    """Yield the tensors of multi-token prediction, first those outside its layers."""
    yield from (_spec(config, "mtp.", info) for info in _MTP_ROOT)
    for i in range(config.mtp_layers):
        block = f"mtp.layers.{i}"
        yield from _block(config, layout, block, block, "full_attention")


def tower_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Yield the tensors of the vision tower; none for a text-only config."""
    if not config.architecture.vision:
        return
    yield from (_spec(config, "model.visual.", info) for info in _VISION_ROOT)
    for i in range(config.vision_depth):
        for info in _VISION_BLOCK:
            yield _spec(config, f"model.visual.blocks.{i}.", info)


def _spec(config: ModelConfig, prefix: str, info: RoleInfo) -> TensorSpec:
    shape = tuple(config.dims[size] for size in info.shape)
    # Rows marked F32 stay F32 whatever the checkpoint's dtype.
    dtype = config.dtype if info.dtype == "BF16" else info.dtype
    return TensorSpec(f"{prefix}{info.path}", dtype, shape)


def _block(
    config: ModelConfig, layout: CheckpointNaming, prefix: str, key: str, kind: str
) -> Iterator[TensorSpec]:
    experts: Place = "expert" if key in layout.per_expert else "fused"
    places: set[Place] = {"layer", "linear" if kind == "linear_attention" else "full"}
    places |= {"moe", experts} if config.moe else {"dense"}
    for info in _DECODER:
        if info.place not in places:
            continue
        if info.place != "expert":
            yield _spec(config, f"{prefix}.", info)
            continue
        leaf = info.path.removeprefix("mlp.experts.")
        spec = _spec(config, "", info)
        for expert in range(config.dims["experts"]):
            yield TensorSpec(f"{prefix}.mlp.experts.{expert}.{leaf}", spec.dtype, spec.shape)
