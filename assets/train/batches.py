"""Seeded batches: rows of plain text, padded conversations, conversations with pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pictures import draw, patches
from rendering import Sequence
from vocabulary import special_ids

IGNORE = -100
TEXT_TOKENS = 2048
ROW_LENGTHS = (128, 256, 128, 512)


@dataclass(frozen=True)
class Batch:
    """ids: [rows, length]; targets: the same shape, the next id or IGNORE; pictures' patches."""

    ids: Tensor
    targets: Tensor
    pixels: Tensor | None = None
    grids: Tensor | None = None


@dataclass(frozen=True)
class StepData:
    """What one optimiser step sees: every part is one forward pass."""

    text: Batch
    conversations: tuple[Batch, ...]
    pictures: Batch


def text_rows(stream: Tensor, length: int, starts: Tensor) -> Batch:
    """Rows of `length` ids cut from the token stream at `starts`."""
    index = starts[:, None] + torch.arange(length + 1)
    rows = stream[index]
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def padded(sequences: list[Sequence]) -> Batch:
    """Right-padded conversations; causal layers never see the padding before a real token."""
    length = max(len(s.ids) for s in sequences) - 1
    ids = torch.full((len(sequences), length), special_ids()["<|endoftext|>"])
    targets = torch.full((len(sequences), length), IGNORE)
    for row, sequence in enumerate(sequences):
        values = torch.tensor(sequence.ids)
        ids[row, : len(values) - 1] = values[:-1]
        targets[row, sequence.quiet - 1 : len(values) - 1] = values[sequence.quiet :]
    shown = [s.picture for s in sequences if s.picture is not None]
    if not shown:
        return Batch(ids, targets)
    pixels = torch.from_numpy(np.concatenate([patches(draw(p)) for p in shown]))
    return Batch(ids, targets, pixels, torch.tensor([p.grid for p in shown]))


def text_batches(stream: Tensor, seed: int, tokens: int = TEXT_TOKENS) -> Iterator[Batch]:
    """Rows of plain text without end: every row length in turn, the stream in shuffled blocks."""
    generator = torch.Generator().manual_seed(seed)
    block = max(ROW_LENGTHS)
    per_batch = tokens // block
    while True:
        shift = int(torch.randint(block, (1,), generator=generator))
        order = torch.randperm((len(stream) - shift - 1) // block, generator=generator)
        for turn in range(len(order) // per_batch):
            length = ROW_LENGTHS[turn % len(ROW_LENGTHS)]
            starts = order[turn * per_batch : (turn + 1) * per_batch] * block + shift
            pieces = starts[:, None] + torch.arange(0, block, length)
            yield text_rows(stream, length, pieces.reshape(-1))


@dataclass(frozen=True)
class Mix:
    """What a step is made of.

    Args:
        texts: conversations without a picture.
        pictures: conversations with one.
        text_share: the part of the rows of plain text that is used.
        parts: passes that the conversations are split into by length, which saves padding.
    """

    texts: int
    pictures: int
    text_share: float
    parts: int


def step_batches(
    stream: Tensor, conversations: list[Sequence], pictures: list[Sequence], mix: Mix, seed: int
) -> Iterator[StepData]:
    """One StepData per step."""
    for step, text in enumerate(text_batches(stream, seed)):
        rows = max(1, round(len(text.ids) * mix.text_share))
        first = step * mix.texts % (len(conversations) - mix.texts + 1)
        drawn = sorted(conversations[first : first + mix.texts], key=lambda s: len(s.ids))
        cuts = [mix.texts * part // mix.parts for part in range(mix.parts + 1)]
        at = step * mix.pictures % (len(pictures) - mix.pictures + 1)
        yield StepData(
            Batch(text.ids[:rows], text.targets[:rows]),
            tuple(padded(drawn[begin:end]) for begin, end in pairwise(cuts)),
            padded(pictures[at : at + mix.pictures]),
        )
