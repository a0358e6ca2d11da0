"""Seeded batches: rows of plain text, padded conversations, conversations with pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pictures import MERGE, Picture, draw, patches
from rendering import Sequence
from vocabulary import special_ids

IGNORE = -100
TEXT_TOKENS = 2048
ROW_LENGTHS = (128, 256, 128, 512)
PICTURES = 10


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


def cell_targets(picture: Picture, names: tuple[int, int]) -> Tensor:
    """[tokens]: for each cell of the picture the id that names its colour.

    Nothing is ever read from a model at these places. The loss there teaches the tower the names
    of the colours at once, where the answers alone need thousands of pictures.
    """
    _, rows, columns = picture.grid
    rows, columns = rows // MERGE, columns // MERGE
    line = torch.full((columns,), IGNORE)
    line[: columns // 2] = names[0]
    line[(columns + 1) // 2 :] = names[1]
    return line.repeat(rows)


def padded(sequences: list[Sequence]) -> Batch:
    """Right-padded conversations; causal layers never see the padding before a real token."""
    length = max(len(s.ids) for s in sequences) - 1
    ids = torch.full((len(sequences), length), special_ids()["<|endoftext|>"])
    targets = torch.full((len(sequences), length), IGNORE)
    for row, sequence in enumerate(sequences):
        values = torch.tensor(sequence.ids)
        ids[row, : len(values) - 1] = values[:-1]
        targets[row, sequence.quiet - 1 : len(values) - 1] = values[sequence.quiet :]
        if sequence.picture is not None and sequence.names is not None:
            first = sequence.ids.index(special_ids()["<|image_pad|>"])
            marks = cell_targets(sequence.picture, sequence.names)
            targets[row, first : first + len(marks)] = marks
    shown = [s.picture for s in sequences if s.picture is not None]
    if not shown:
        return Batch(ids, targets)
    pixels = torch.from_numpy(np.concatenate([patches(draw(p)) for p in shown]))
    return Batch(ids, targets, pixels, torch.tensor([p.grid for p in shown]))


def text_batches(stream: Tensor, seed: int) -> Iterator[Batch]:
    """Rows of plain text without end: every row length in turn, the stream in shuffled blocks."""
    generator = torch.Generator().manual_seed(seed)
    block = max(ROW_LENGTHS)
    per_batch = TEXT_TOKENS // block
    while True:
        shift = int(torch.randint(block, (1,), generator=generator))
        order = torch.randperm((len(stream) - shift - 1) // block, generator=generator)
        for turn in range(len(order) // per_batch):
            length = ROW_LENGTHS[turn % len(ROW_LENGTHS)]
            starts = order[turn * per_batch : (turn + 1) * per_batch] * block + shift
            pieces = starts[:, None] + torch.arange(0, block, length)
            yield text_rows(stream, length, pieces.reshape(-1))


def step_batches(
    stream: Tensor,
    conversations: list[Sequence],
    pictures: list[Sequence],
    per_step: int,
    seed: int,
) -> Iterator[StepData]:
    """One StepData per step, with `per_step` conversations and PICTURES pictures.

    The conversations are split by length into two passes, which saves padding.
    """
    texts = text_batches(stream, seed)
    for step, text in enumerate(texts):
        first = step * per_step % (len(conversations) - per_step + 1)
        drawn = sorted(conversations[first : first + per_step], key=lambda s: len(s.ids))
        half = per_step // 2
        at = step * PICTURES % (len(pictures) - PICTURES + 1)
        yield StepData(
            text,
            (padded(drawn[:half]), padded(drawn[half:])),
            padded(pictures[at : at + PICTURES]),
        )
