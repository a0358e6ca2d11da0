"""Weights that serving engines join into one matrix, and so must be stored alike.

Source: `packed_modules_mapping` of vLLM 0.32 ``model_executor/models/qwen3_5.py`` and the stacked
parameters that its and SGLang's loaders name.
"""

from __future__ import annotations

from qwen35.model.roles import Role

__all__ = ["FUSED", "fused_group"]

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
"""Joined matrix to its parts, in the order in which engines stack them; all experts are one."""

_GROUP_OF = {part: group for group, parts in FUSED.items() for part in parts}


def fused_group(role: Role) -> tuple[str, int | None, str] | None:
    """Return the matrix that `role` becomes a part of: scope, layer and name.

    >>> from qwen35.model.roles import role_of
    >>> fused_group(role_of("model.layers.3.self_attn.k_proj.weight"))
    ('text', 3, 'self_attn.qkv_proj')
    """
    group = _GROUP_OF.get(role.name.removeprefix("mtp.layers."))
    return None if group is None else (role.scope, role.layer, group)
