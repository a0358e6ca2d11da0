"""The multi-token-prediction layer: one decoder layer that predicts the token after the next.

transformers does not build it, so this is a forward of our own, with the arrangement vLLM uses:
the trunk's state after the final norm and the embedding of the next token are normed,
concatenated (embedding first), projected by `fc`, and run through a full-attention layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

from batches import Batch, StepData
from learning import (
    REPORT_EVERY,
    Progress,
    hidden_states,
    optimisers,
    rate_factor,
    set_rates,
    token_loss,
)


def new_layer(model: Qwen3_5ForConditionalGeneration) -> nn.ModuleDict:
    """Modules named as in the official files, without the `mtp.` prefix.

    It starts as the trunk's last layer behind a projection that passes the trunk's state on.
    """
    text = model.model.language_model
    settings = text.config
    size, eps = settings.hidden_size, settings.rms_norm_eps
    decoder = Qwen3_5DecoderLayer(settings, settings.layer_types.index("full_attention"))
    decoder.load_state_dict(text.layers[-1].state_dict())
    project = nn.Linear(2 * size, size, bias=False)
    with torch.no_grad():
        project.weight.normal_(0.0, 0.02)
        project.weight[:, size:] += torch.eye(size)
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    return nn.ModuleDict(
        {
            "fc": project,
            "layers": nn.ModuleList([decoder]),
            **{name: Qwen3_5RMSNorm(size, eps=eps) for name in norms},
        }
    )


def layer_states(
    layer: nn.ModuleDict, states: Tensor, embedded: Tensor, rotary: nn.Module
) -> Tensor:
    """states, embedded: [rows, length, hidden] of position t and t + 1 -> the same shape."""
    joined = torch.cat(
        [layer["pre_fc_norm_embedding"](embedded), layer["pre_fc_norm_hidden"](states)], dim=-1
    )
    mixed = layer["fc"](joined)
    positions = torch.arange(mixed.shape[1]).expand(3, mixed.shape[0], -1)
    out = layer["layers"][0](
        mixed, position_embeddings=rotary(mixed, positions), attention_mask=None
    )
    return layer["norm"](out)


def mtp_states(
    model: Qwen3_5ForConditionalGeneration, layer: nn.ModuleDict, batch: Batch
) -> Tensor:
    """[rows, length - 1, hidden]: row position t predicts `batch.targets[:, t + 1]`."""
    text = model.model.language_model
    with torch.no_grad():
        states = hidden_states(model, batch)[:, :-1]
        embedded = text.embed_tokens(batch.ids[:, 1:])
    return layer_states(layer, states, embedded, text.rotary_emb)


def train_mtp(
    model: Qwen3_5ForConditionalGeneration,
    layer: nn.ModuleDict,
    data: Iterable[StepData],
    steps: int,
    rate: float,
) -> None:
    """Train the layer on text and conversations; the trunk is frozen."""
    model.requires_grad_(False)
    tools = optimisers(layer, rate)
    note = Progress()
    for step, (parts, _) in enumerate(zip(data, range(steps), strict=False)):
        set_rates(tools, rate_factor(step, steps))
        talk = parts.conversations[step % len(parts.conversations)]
        for name, batch in (("text", parts.text), ("answers", talk)):
            with torch.autocast("cpu", torch.bfloat16):
                states = mtp_states(model, layer, batch)
                plain, loss = token_loss(states, model.lm_head.weight, batch.targets[:, 1:])
            loss.backward()
            note.add(f"mtp {name}", plain.item())
        for tool in tools:
            tool.step()
            tool.zero_grad()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            note.line(step + 1, steps)


def mtp_loss(
    model: Qwen3_5ForConditionalGeneration, layer: nn.ModuleDict, rows: Batch
) -> tuple[float, float]:
    """Mean nats per token and the share of right first guesses for the token after the next."""
    nats, right = 0.0, 0
    head = model.lm_head.weight
    with torch.no_grad():
        for ids, targets in zip(rows.ids.split(8), rows.targets.split(8), strict=True):
            states = mtp_states(model, layer, Batch(ids, targets))
            wanted = targets[:, 1:]
            nats += float(token_loss(states, head, wanted)[0]) * wanted.numel()
            right += int(((states @ head.T).argmax(-1) == wanted).sum())
    count = rows.targets[:, 1:].numel()
    return nats / count, right / count
