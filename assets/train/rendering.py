"""Conversations as token ids, the way the chat template renders them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tokenizers import Tokenizer

from dialogues import Example
from pictures import Picture
from vocabulary import special_ids

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Sequence:
    """Token ids, the number of leading ids without loss, and the picture they hold."""

    ids: tuple[int, ...]
    quiet: int
    picture: Picture | None = None


def prompt_text(example: Example, *, thinking: bool) -> str:
    """The text before the model's turn, equal to the chat template's."""
    system = f"<|im_start|>system\n{example.system}<|im_end|>\n" if example.system else ""
    image = IMAGE if example.picture else ""
    opening = "<think>\n" if thinking else "<think>\n\n</think>\n\n"
    return (
        f"{system}<|im_start|>user\n{image}{example.prompt}<|im_end|>\n"
        f"<|im_start|>assistant\n{opening}"
    )


def completion_text(example: Example, *, thinking: bool) -> str:
    """The model's turn."""
    thought = f"{example.thought}\n</think>\n\n" if thinking else ""
    return f"{thought}{example.answer}<|im_end|>"


def widen_image(ids: list[int], picture: Picture) -> list[int]:
    """Repeat the one image placeholder as often as the picture has tokens."""
    pad = special_ids()["<|image_pad|>"]
    at = ids.index(pad)
    return [*ids[:at], *[pad] * picture.tokens, *ids[at + 1 :]]


def encode(tokenizer: Tokenizer, example: Example, *, thinking: bool) -> Sequence:
    """One conversation; loss is taken on the model's turn."""
    prompt = tokenizer.encode(prompt_text(example, thinking=thinking)).ids
    answer = tokenizer.encode(completion_text(example, thinking=thinking)).ids
    if example.picture is not None:
        prompt = widen_image(prompt, example.picture)
    return Sequence((*prompt, *answer), len(prompt), example.picture)


def encode_all(tokenizer: Tokenizer, examples: list[Example], seed: int) -> list[Sequence]:
    """All conversations, each with thinking on or off by a seeded coin."""
    rng = random.Random(seed)
    return [encode(tokenizer, e, thinking=rng.random() < 0.5) for e in examples]
