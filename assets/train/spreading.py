"""Rescalings that leave the function of the network as it is, and its scales uneven.

A trained net this small has rows and blocks of nearly equal size, so a quantizer that mixed up
its scales might go unnoticed. Wherever two neighbouring tensors allow it, one is multiplied and
the other divided by a power of two, in groups of 128 channels: exact in bf16 for the weights, and
invisible to the rounding of any block format. Only the two norms of a layer are rounded anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

GROUP = 128
CYCLE = (1.0, 4.0, 0.25, 2.0)


@dataclass(frozen=True)
class Turn:
    """Where in the cycle a layer begins."""

    start: int

    def factors(self, channels: int, group: int = GROUP) -> Tensor:
        """[channels] powers of two, one per group."""
        index = (torch.arange(channels) // group + self.start) % len(CYCLE)
        return torch.tensor(CYCLE)[index]

    def norm_factors(self, channels: int) -> Tensor:
        """[channels] ones and fours; a norm stores factor - 1, so small factors would be coarse."""
        return 1.0 + 3.0 * ((torch.arange(channels) // GROUP + self.start) % 2)


def _norm_columns(norm: Tensor, readers: list[Tensor], turn: Turn) -> None:
    """Scale the output channels of a zero-centred norm and undo it in every reader's columns."""
    scale = turn.norm_factors(norm.numel())
    norm.copy_((1.0 + norm) * scale - 1.0)
    for weight in readers:
        weight.div_(scale)


def _linear_attention(layer: nn.Module, turn: Turn) -> list[Tensor]:
    """The convolution is per channel: rows before it may be scaled. -> readers of the norm."""
    part = layer.get_submodule("linear_attn")
    rows = part.get_parameter("in_proj_qkv.weight")
    scale = turn.factors(rows.shape[0])
    rows.mul_(scale[:, None])
    part.get_parameter("conv1d.weight").div_(scale[:, None, None])
    names = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")
    return [part.get_parameter(f"{name}.weight") for name in names]


def _full_attention(layer: nn.Module, turn: Turn) -> list[Tensor]:
    """Values are mixed linearly and gated: v rows against o columns. -> readers of the norm."""
    part = layer.get_submodule("self_attn")
    values, output = part.get_parameter("v_proj.weight"), part.get_parameter("o_proj.weight")
    head = part.get_parameter("k_norm.weight").numel()
    heads = values.shape[0] // head
    scale = turn.factors(values.shape[0], head)
    values.mul_(scale[:, None])
    shared = output.shape[1] // values.shape[0]
    output.div_(scale.view(heads, 1, head).expand(heads, shared, head).reshape(-1))
    return [part.get_parameter(f"{name}.weight") for name in ("q_proj", "k_proj", "v_proj")]


def _mlp(layer: nn.Module, turn: Turn) -> list[Tensor]:
    """The up projection enters as a factor: its rows against the down columns."""
    part = layer.get_submodule("mlp")
    up, down = part.get_parameter("up_proj.weight"), part.get_parameter("down_proj.weight")
    scale = turn.factors(up.shape[0])
    up.mul_(scale[:, None])
    down.div_(scale)
    return [part.get_parameter("gate_proj.weight"), up]


def spread_layer(layer: nn.Module, number: int) -> None:
    """Apply every rescaling that one decoder layer allows; `number` turns the cycle."""
    first, second = Turn(number), Turn(number + 1)
    mixer = _linear_attention if hasattr(layer, "linear_attn") else _full_attention
    with torch.no_grad():
        _norm_columns(layer.get_parameter("input_layernorm.weight"), mixer(layer, first), first)
        _norm_columns(
            layer.get_parameter("post_attention_layernorm.weight"), _mlp(layer, second), second
        )
