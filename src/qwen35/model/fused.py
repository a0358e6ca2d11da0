"""Weights that serving engines fuse into one matrix and that therefore need one storage format.

Source: `packed_modules_mapping` of vLLM 0.32 ``model_executor/models/qwen3_5.py`` and the stacked
parameters in the loaders of vLLM and SGLang.
"""

from __future__ import annotations

from qwen35.model.roles import Role

__all__ = ["FUSED", "fused_group", "scale_group"]

FUSED: dict[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_attn.in_proj_qkvz": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    "linear_attn.in_proj_ba": ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.shared_expert.gate_up_proj": (
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
    ),
    "mlp.experts": (
        "mlp.experts.gate_up_proj",
        "mlp.experts.gate_proj",
        "mlp.experts.up_proj",
        "mlp.experts.down_proj",
    ),
}
"""Fused matrix to its parts, in stacking order; all experts of a layer form one group."""

_GROUP_OF = {part: group for group, parts in FUSED.items() for part in parts}


def fused_group(role: Role) -> tuple[str, int | None, str] | None:
    """Return the fused matrix that contains `role`, as (scope, layer, name); None if none does.

    >>> from qwen35.model.roles import role_of
    >>> fused_group(role_of("model.layers.3.self_attn.k_proj.weight"))
    ('text', 3, 'self_attn.qkv_proj')
    """
    # MTP layers have the modules of a full-attention decoder layer.
    group = _GROUP_OF.get(role.name.removeprefix("mtp.layers."))
    return None if group is None else (role.scope, role.layer, group)


def scale_group(role: Role) -> tuple[object, ...] | None:
    """Return a key of the weights to which engines give one scale of the whole; None if none.

    They are those of a fused matrix; of experts, the gate and the up projection of the same one.
    vLLM 0.32 takes one global scale for a fused layer, whatever its parts were stored with.

    >>> from qwen35.model.roles import role_of
    >>> scale_group(role_of("model.layers.3.mlp.experts.7.up_proj.weight"))
    ('text', 3, 'mlp.experts', 7)
    >>> scale_group(role_of("model.layers.3.mlp.experts.7.down_proj.weight"))
    """
    group = fused_group(role)
    if group is None or not group[2].endswith(".experts"):
        return group
    return None if role.name.endswith("down_proj") else (*group, role.expert)
