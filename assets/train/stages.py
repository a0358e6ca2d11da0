"""The stages of the training, one after the other, and what each of them is fed."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3_5ForConditionalGeneration

from batches import Mix, step_batches
from check import PENALTIES, examine, held_out_loss, tally
from checkpoint import new_model, save_weights, stored_tensors, write_json
from dialogues import Example, picture_examples, text_examples
from exam import assert_separate, canonical_examples, questions
from learning import Clock, Weights, train_trunk
from mtp import new_layer, train_mtp
from qwen35.verification.asking_transformers import Asker
from rendering import Sequence, encode_all
from sides import Course, picture_count, train_sides

MTP_RATE = 3e-3
MTP_STEPS = 240
MTP_MIX = Mix(8, 1, 1.0, 1)
MTP_SEED = 91
GLANCE = 3
GLANCE_ROWS = 24


@dataclass(frozen=True)
class Stage:
    """A stretch of training with its own data and learning rate.

    Args:
        arithmetic: share of arithmetic in the conversations without a picture.
        plain_shares: share of one-coloured pictures, for each part of the stage.
        canonical: how often each trained question of the exam is mixed in.
        sides: in a stage of `sides.py`, how it goes.
        late: whether more wordings are drawn from.
    """

    seed: int
    rate: float
    steps: int
    mix: Mix
    weights: Weights
    arithmetic: float
    plain_shares: tuple[float, ...]
    canonical: int
    sides: Course | None = None
    late: bool = False


STAGES = (
    Stage(35, 5e-3, 560, Mix(24, 10, 1.0, 2), Weights(), 0.3, (0.5, 0.1), 8),
    Stage(51, 3e-3, 420, Mix(64, 12, 0.6, 3), Weights(1.0, 1.0, 1.0, True), 0.6, (0.05,), 24),
    Stage(61, 3e-3, 210, Mix(20, 1, 0.6, 2), Weights(), 0.4, (0.0,), 16, Course(100, 0.3)),
    Stage(
        *(73, 2e-3, 170, Mix(40, 1, 0.6, 3), Weights(), 0.45, (0.0,), 16),
        Course(0, 0.5, rounded=True),
        late=True,
    ),
)
"""First language, names of things and colours; then sums and short answers; then sides; then all
of it again, rounded to NF4 in every other step."""


def conversations(stage: Stage) -> tuple[list[Example], list[Example]]:
    """Text and picture exchanges, the trained exam questions mixed in; checked to be apart."""
    canonical = canonical_examples() * stage.canonical
    texts = text_examples(
        stage.seed + 1, stage.steps * stage.mix.texts, stage.arithmetic, late=stage.late
    )
    pictures = picture_examples(
        stage.seed + 2, stage.steps * stage.mix.pictures, stage.plain_shares
    )
    for start, pool, wanted in ((0, texts, False), (1, pictures, True)):
        extra = [e for e in canonical if (e.picture is not None) == wanted]
        places = np.random.default_rng(stage.seed + start).permutation(len(pool))[: len(extra)]
        for place, example in zip(places.tolist(), extra, strict=True):
            pool[place] = example
    assert_separate([*texts, *pictures])
    return texts, pictures


def encoded(
    stage: Stage, tokenizer: Tokenizer
) -> tuple[list[Sequence], list[Sequence], dict[str, int]]:
    """The conversations of a stage as ids, without and with pictures, and how many of each kind."""
    texts, pictures = conversations(stage)
    spoken = encode_all(tokenizer, texts, stage.seed + 3)
    shown = encode_all(tokenizer, pictures, stage.seed + 4)
    counts = Counter(e.subject for e in (texts if stage.sides else texts + pictures))
    if stage.sides:
        counts["picture"] = picture_count(stage.sides, stage.steps)
    return spoken, shown, dict(sorted(counts.items()))


@dataclass(frozen=True)
class Material:
    """What all stages read: the tokenizer, and the text as one row of ids."""

    tokenizer: Tokenizer
    stream: Tensor


def fit(stage: Stage, material: Material, model: Qwen3_5ForConditionalGeneration) -> dict[str, Any]:
    """Train the trunk. -> what was done"""
    torch.manual_seed(stage.seed)
    clock = Clock()
    spoken, shown, subjects = encoded(stage, material.tokenizer)
    data = step_batches(material.stream, spoken, shown, stage.mix, stage.seed)
    if stage.sides:
        plan = (stage.sides, stage.steps, stage.rate, stage.seed)
        train_sides(model, material.tokenizer, data, *plan)
    else:
        train_trunk(model, data, stage.steps, stage.rate, stage.weights)
    done = {"seed": stage.seed, "rate": stage.rate, "steps": stage.steps}
    return {**done, **clock.minutes(), "subjects": subjects}


def fit_mtp(
    material: Material, model: Qwen3_5ForConditionalGeneration
) -> tuple[torch.nn.ModuleDict, dict[str, Any]]:
    """Train the MTP layer on the text and on the conversations of the second stage."""
    torch.manual_seed(MTP_SEED)
    clock = Clock()
    spoken, shown, _ = encoded(STAGES[1], material.tokenizer)
    layer = new_layer(model)
    data = step_batches(material.stream, spoken, shown, MTP_MIX, MTP_SEED)
    train_mtp(model, layer, data, MTP_STEPS, MTP_RATE)
    done = {"seed": MTP_SEED, "rate": MTP_RATE, "steps": MTP_STEPS}
    subjects = {"of stage 2": MTP_STEPS * MTP_MIX.texts}
    return layer, {**done, **clock.minutes(), "subjects": subjects}


def say_how_it_stands(model: Qwen3_5ForConditionalGeneration, folder: Path, number: int) -> None:
    """Save the weights so far; write held-out loss and right answers of a part of it to stderr."""
    save_weights(stored_tensors(model, {}), folder)
    asker = Asker(folder)
    counts = tally(examine(asker, questions()[::GLANCE], PENALTIES[:1]))
    loss = held_out_loss(asker, folder, GLANCE_ROWS)
    sys.stderr.write(f"stage {number}: held-out text {loss:.3f}, a third of the exam {counts}\n")
    sys.stderr.flush()


def train_stages(
    material: Material, folder: Path, kept: Path | None
) -> tuple[Qwen3_5ForConditionalGeneration, list[dict[str, Any]]]:
    """Run all stages. A stage whose result lies in `kept` is read from there instead."""
    torch.manual_seed(STAGES[0].seed)
    model = new_model()
    done = []
    for number, stage in enumerate(STAGES, 1):
        result = kept / f"stage-{number}.safetensors" if kept else None
        if result and result.exists():
            load_model(model, result)
            done.append({**json.loads(result.with_suffix(".json").read_text()), "reused": True})
            continue
        done.append(fit(stage, material, model))
        if result:
            result.parent.mkdir(parents=True, exist_ok=True)
            save_model(model, str(result))
            write_json(result.with_suffix(".json"), done[-1])
        say_how_it_stands(model, folder, number)
    return model, done
