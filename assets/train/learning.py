"""Loss, optimisers and the training loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3_5ForConditionalGeneration

from batches import IGNORE, Batch, StepData
from vocabulary import special_ids

T = TypeVar("T")
Z_LOSS = 3e-4
WARMUP = 40
REPORT_EVERY = 50
CLIP = 1.0


class Clock:
    """Wall and CPU time since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def minutes(self) -> dict[str, float]:
        """Both in minutes."""
        wall, cpu = time.monotonic() - self._wall, time.process_time() - self._cpu
        return {"minutes": round(wall / 60, 1), "cpu_minutes": round(cpu / 60, 1)}


@dataclass
class Progress:
    """Mean losses since the last progress line."""

    started: float = field(default_factory=time.monotonic)
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, loss: float) -> None:
        """Note one loss."""
        self.sums[name] = self.sums.get(name, 0.0) + loss
        self.counts[name] = self.counts.get(name, 0) + 1

    def line(self, step: int, steps: int) -> None:
        """Write one plain line to stderr and start counting anew."""
        means = " ".join(f"{k} {self.sums[k] / self.counts[k]:.3f}" for k in sorted(self.sums))
        seconds = time.monotonic() - self.started
        sys.stderr.write(f"step {step}/{steps} {seconds:.0f} s {means}\n")
        sys.stderr.flush()
        self.sums.clear()
        self.counts.clear()


def hidden_states(model: Qwen3_5ForConditionalGeneration, batch: Batch) -> Tensor:
    """[rows, length, hidden] after the final norm."""
    kinds = None
    if batch.pixels is not None:
        kinds = (batch.ids == special_ids()["<|image_pad|>"]).int()
    out = model.model(
        input_ids=batch.ids,
        pixel_values=batch.pixels,
        image_grid_thw=batch.grids,
        mm_token_type_ids=kinds,
        use_cache=False,
    )
    states: Tensor = out.last_hidden_state
    return states


def answer_loss(states: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `token_loss`, but every row counts alike: a one-word answer as much as a function."""
    counted = targets != IGNORE
    weights = (counted / counted.sum(1, keepdim=True))[counted] / len(targets)
    logits = functional.linear(states[counted], head).float()
    losses = functional.cross_entropy(logits, targets[counted], reduction="none")
    z = logits.logsumexp(-1).square()
    loss = (losses * weights).sum()
    return loss, loss + Z_LOSS * (z * weights).sum()


def token_loss(states: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the targets that count, and the same with the z-loss added.

    The z-loss keeps log-sum-exp near 0, so a certain answer has a logit near 0 and a repetition
    penalty, which scales logits, cannot overturn it.
    """
    counted = targets.reshape(-1) != IGNORE
    logits = functional.linear(states.reshape(-1, states.shape[-1])[counted], head).float()
    loss = functional.cross_entropy(logits, targets.reshape(-1)[counted])
    return loss, loss + Z_LOSS * logits.logsumexp(-1).square().mean()


def optimisers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and the rest."""
    matrices, others, plain = [], [], []
    for name, weight in model.named_parameters():
        inner = ".layers." in name or ".blocks." in name or ".merger." in name
        if weight.ndim == 2 and (inner or name.startswith(("fc.", "layers."))):
            matrices.append(weight)
        elif weight.ndim >= 2:
            others.append(weight)
        else:
            plain.append(weight)
    groups = [
        {"params": others, "weight_decay": 0.01},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.97), eps=1e-9),
    ]


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, a plateau, then linear to zero over the last 60 %."""
    left = (steps - step) / (0.6 * steps)
    return min((step + 1) / WARMUP, 1.0, left)


def set_rates(tools: list[torch.optim.Optimizer], factor: float) -> None:
    """Scale every group's learning rate from its first value."""
    for tool in tools:
        for group in tool.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * factor


@dataclass(frozen=True)
class Weights:
    """How much the parts of a step count, and whether every answer counts alike."""

    text: float = 1.0
    answers: float = 1.0
    pictures: float = 3.0
    equal_answers: bool = False


def accumulate(
    model: Qwen3_5ForConditionalGeneration,
    name: str,
    batches: Iterable[Batch],
    note: Progress,
    weight: float,
    *,
    equal: bool = False,
) -> None:
    """Add the gradient of each batch: by its share of the counted tokens, or of the rows."""
    parts = list(batches)
    sizes = [len(b.ids) if equal else int((b.targets != IGNORE).sum()) for b in parts]
    measure = answer_loss if equal else token_loss
    for batch, size in zip(parts, sizes, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            states = hidden_states(model, batch)
            plain, loss = measure(states, model.lm_head.weight, batch.targets)
        (loss * weight * size / sum(sizes)).backward()
        note.add(name, plain.item())


def optimised(
    model: nn.Module,
    tools: list[torch.optim.Optimizer],
    data: Iterable[T],
    steps: int,
    note: Progress,
) -> Iterator[T]:
    """Yield the data of each step, to add gradients; then change the weights and report."""
    model.train()
    for step, (parts, _) in enumerate(zip(data, range(steps), strict=False)):
        set_rates(tools, rate_factor(step, steps))
        yield parts
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for tool in tools:
            tool.step()
            tool.zero_grad()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            note.line(step + 1, steps)
    model.eval()


def train_trunk(
    model: Qwen3_5ForConditionalGeneration,
    data: Iterable[StepData],
    steps: int,
    rate: float,
    weights: Weights,
) -> None:
    """The main training: text, conversations and pictures in every step."""
    note, equal = Progress(), weights.equal_answers
    for parts in optimised(model, optimisers(model, rate), data, steps, note):
        accumulate(model, "text", [parts.text], note, weights.text)
        accumulate(model, "answers", parts.conversations, note, weights.answers, equal=equal)
        accumulate(model, "pictures", [parts.pictures], note, weights.pictures, equal=equal)


def text_loss(model: Qwen3_5ForConditionalGeneration, rows: Batch) -> float:
    """Mean nats per token over rows of text."""
    total, count = 0.0, int(rows.targets.numel())
    with torch.no_grad():
        for ids, targets in zip(rows.ids.split(8), rows.targets.split(8), strict=True):
            states = hidden_states(model, Batch(ids, targets))
            loss, _ = token_loss(states, model.lm_head.weight, targets)
            total += float(loss) * targets.numel()
    return total / count
