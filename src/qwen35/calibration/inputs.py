"""Which input each weight reads; weights that share an input are measured once."""

from __future__ import annotations

from qwen35.forward.blocks import HEAD, MTP
from qwen35.model.model_config import ModelConfig
from qwen35.model.roles import Role

__all__ = ["CACHED", "EXPERTS_IN", "EXPERTS_OUT", "HOOKED", "SHARED_IN", "Input", "input_of"]

Input = tuple[str, str]
"""A block (``layers.3``, ``head``, ``mtp``) and the measured weight in it."""

EXPERTS_IN, EXPERTS_OUT = "mlp.experts.gate_proj", "mlp.experts.down_proj"
SHARED_IN = "mlp.shared_expert.gate_proj"

HOOKED = (
    "linear_attn.in_proj_qkv",
    "linear_attn.out_proj",
    "self_attn.q_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
    SHARED_IN,
    "mlp.shared_expert.down_proj",
)
"""The measured linear layers of a decoder layer; each layer has some of them."""

_SAME: dict[str, str] = {
    "linear_attn.in_proj_z": "linear_attn.in_proj_qkv",
    "linear_attn.in_proj_a": "linear_attn.in_proj_qkv",
    "linear_attn.in_proj_b": "linear_attn.in_proj_qkv",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.shared_expert.up_proj": SHARED_IN,
    "mlp.shared_expert_gate": SHARED_IN,
    "mlp.experts.up_proj": EXPERTS_IN,
    "mlp.experts.gate_up_proj": EXPERTS_IN,
}
"""Weight to the measured weight that reads the same input.

Source: transformers 5.23 ``models/qwen3_5*/modeling_*.py``.
"""

CACHED = {"self_attn.k_proj": "self_attn.k_cache", "self_attn.v_proj": "self_attn.v_cache"}
"""Weight to what a KV cache holds of its output, which is measured too."""


def input_of(role: Role, config: ModelConfig) -> Input | None:
    """Return the input of a weight; None if its product is not measured.

    An embedding is looked up, not multiplied, unless it is tied to the head.
    """
    if role.scope == "visual" or role.info.kind not in ("linear", "experts", "head", "embedding"):
        return None
    if role.name == "mtp.fc":
        return MTP, "fc"
    if role.layer is None:
        tied = role.info.kind == "embedding" and config.tied
        return (HEAD, "lm_head") if tied or role.info.kind == "head" else None
    path = role.name.removeprefix("mtp.layers.")
    path = _SAME.get(path, path)
    layer = f"layers.{role.layer}"
    return (MTP, f"{layer}.{path}") if role.scope == "mtp" else (layer, path)
