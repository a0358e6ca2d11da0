"""The last stages: which side of a picture a question is about.

A net this small finds that out only when nothing else is asked of it for a while: one wording and
pictures of two cells first, then all wordings and sizes. Every picture comes with its mirror image
under the same question, so that only the sides tell the answers apart. Steps on pictures take turns
with steps on text and conversations, each with optimisers of their own, so nothing is forgotten.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product

from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen3_5ForConditionalGeneration

from batches import Batch, StepData, padded
from dialogues import PICTURE_CORES, SHORT_CLOSINGS, UNSEEN_COLORS, ask_with, picture_example
from learning import CLIP, Progress, accumulate, optimisers, set_rates
from pictures import Picture
from qwen35.verification.asking_transformers import COLORS
from rendering import Sequence, encode
from rounding import rounded

SIMPLE_CORE = "What color is the {s} half of this image?"
SIMPLE_PAIRS = 20
SMALLEST_UNTIL = 0.75
PAIRS = 12
JITTERED = 0.6
LANGUAGE_RATE = 0.6
WARM = 10
SMALLEST: tuple[tuple[int, int], ...] = ((64, 32),)
SMALL: tuple[tuple[int, int], ...] = ((64, 32), (64, 64), (128, 64))
SIZES: tuple[tuple[int, int], ...] = (
    *((64, 32),) * 3,
    *((64, 64),) * 3,
    *((128, 64),) * 4,
    *((192, 96),) * 3,
    *((128, 128),) * 2,
    *((256, 128),) * 2,
    (320, 160),
    *((448, 224),) * 2,
)


@dataclass(frozen=True)
class Course:
    """How a stage of sides goes.

    Args:
        simple: how many of the steps have simple pictures.
        thinking: share of the varied pictures that are reasoned about.
        text: weight of the plain text.
        rounded: whether every other step sees the weights as NF4 would leave them.
    """

    simple: int
    thinking: float
    text: float = 0.8
    rounded: bool = False


def color_pairs() -> list[tuple[str, str]]:
    """Pairs of colours that may be shown in both orders."""
    apart = UNSEEN_COLORS | {pair[::-1] for pair in UNSEEN_COLORS}
    return [pair for pair in product(COLORS, COLORS) if pair[0] < pair[1] and pair not in apart]


def mirrored(
    rng: random.Random, tokenizer: Tokenizer, phase: float, thinking_share: float
) -> list[Sequence]:
    """One question about a picture and about its mirror image; `phase` 1 ends the simple steps."""
    simple = phase < 1
    left, right = rng.choice(color_pairs())
    side = rng.choice(("left", "right"))
    sizes = SMALLEST if phase < SMALLEST_UNTIL else SMALL if simple else SIZES
    size = rng.choice(sizes)
    core = SIMPLE_CORE if simple else rng.choice(PICTURE_CORES)
    prompt = core.format(s=side)
    if not simple:
        prompt = ask_with(rng, prompt, SHORT_CLOSINGS)
    thinking = not simple and rng.random() < thinking_share
    out = []
    for first, second in ((left, right), (right, left)):
        jitter = 0 if simple or rng.random() > JITTERED else rng.randrange(1, 1 << 30)
        example = picture_example(prompt, side, Picture(first, second, size, jitter))
        out.append(encode(tokenizer, example, thinking=thinking))
    return out


def picture_batches(
    rng: random.Random, tokenizer: Tokenizer, phase: float, thinking_share: float
) -> tuple[Batch, ...]:
    """The pictures of one step, in passes of like length."""
    count = SIMPLE_PAIRS if phase < 1 else PAIRS
    rows = [row for _ in range(count) for row in mirrored(rng, tokenizer, phase, thinking_share)]
    rows.sort(key=lambda s: len(s.ids))
    if phase < SMALLEST_UNTIL:
        return (padded(rows),)
    return padded(rows[: len(rows) // 2]), padded(rows[len(rows) // 2 :])


def factor(step: int, steps: int, simple: int) -> float:
    """Warm-up, a plateau, and linear to nearly zero over the last 70 % of the varied steps."""
    varied = steps - simple
    if step < simple + 0.3 * varied:
        return min(1.0, (step + 1) / WARM)
    return max(0.02, (steps - step) / (0.7 * varied))


def picture_count(course: Course, steps: int) -> int:
    """How many pictures a stage shows."""
    return 2 * (SIMPLE_PAIRS * course.simple + PAIRS * (steps - course.simple))


def train_sides(
    model: Qwen3_5ForConditionalGeneration,
    tokenizer: Tokenizer,
    data: Iterator[StepData],
    course: Course,
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Train on pictures and, in turn, on the text and conversations of `data`."""
    rng = random.Random(seed)
    language, sight = optimisers(model, rate * LANGUAGE_RATE), optimisers(model, rate)
    note = Progress()
    model.train()
    for step in range(steps):
        for tools in (language, sight):
            set_rates(tools, factor(step, steps, course.simple))
        phase = step / course.simple if course.simple else 1.0
        for tools in (sight, language):
            with rounded(model) if course.rounded and step % 2 else nullcontext():
                if tools is sight:
                    shown = picture_batches(rng, tokenizer, phase, course.thinking)
                    accumulate(model, "pictures", shown, note, 1.0, equal=True)
                else:
                    parts = next(data)
                    accumulate(model, "text", [parts.text], note, course.text)
                    accumulate(model, "answers", parts.conversations, note, 1.0, equal=True)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for tool in tools:
                tool.step()
            model.zero_grad()
        if (step + 1) % 10 == 0 or step + 1 == steps:
            note.line(step + 1, steps)
    model.eval()
