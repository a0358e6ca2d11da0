"""Behaviour: load an artifact in transformers, ask it something, and judge the answer."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qwen35.engines.torch_model import TorchModel, torch_and_transformers
from qwen35.errors import UsageError

__all__ = ["COLORS", "Asker", "Halves", "Question", "drawn", "is_right"]

MAX_NEW_TOKENS = 96
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "blue": (0, 0, 255),
    "green": (0, 128, 0),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "orange": (255, 140, 0),
    "purple": (128, 0, 128),
}


@dataclass(frozen=True)
class Halves:
    """A picture: its left half of one colour, its right half of another."""

    left: str
    right: str
    width: int = 448
    height: int = 224


@dataclass(frozen=True)
class Question:
    """A question and what a right answer is.

    Args:
        prompt: the user's words.
        expect: what the answer must be or hold.
        match: ``word``: the answer is this word; ``any``: it holds one of these words; ``all``: all
            of them; ``words``: one sentence with all of these; ``contains``: it holds this text;
            ``code``: a Python function that holds this text; ``sum``: a Python function that
            returns the sum of its two arguments.
        thinking: whether the model may reason first; if so it must, and must finish.
        image: a picture shown with the question.
        tokens: how long its turn may be.
    """

    prompt: str
    expect: str
    match: str = "word"
    thinking: bool = False
    image: Halves | None = None
    tokens: int = MAX_NEW_TOKENS

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Read a row of a questions.json."""
        shown = row.get("image")
        image = Halves(shown["left"], shown["right"], *shown["size"]) if shown else None
        return cls(row["prompt"], row["expect"], row["match"], bool(row["thinking"]), image)


def is_right(question: Question, said: str) -> bool:
    """Judge the model's turn.

    >>> is_right(Question("2 + 2?", "4"), "4."), is_right(Question("2 + 2?", "4"), "It is 5")
    (True, False)
    """
    if question.thinking:
        thought, closed, said = said.partition("</think>")
        if not closed or not thought.strip():
            return False
    elif "<think>" in said:
        return False
    return _matches(question, said.strip())


def _matches(question: Question, said: str) -> bool:
    expect = question.expect.casefold()
    words = re.findall(r"\w+", said.casefold())
    if question.match == "word":
        return words == [expect]
    if question.match == "any":
        return not set(expect.split()).isdisjoint(words)
    if question.match == "all":
        return set(expect.split()) <= set(words)
    if question.match == "words":
        return set(expect.split()) <= set(words) and said.count(".") == 1
    if question.match == "contains":
        return expect in said.casefold()
    if question.match == "code":
        block = re.fullmatch(r"```python\n(.*)\n```", said, flags=re.DOTALL)
        return block is not None and "def " in said and expect in said.casefold()
    if question.match == "sum":
        return _sums(said)
    raise UsageError(question.prompt, f"match {question.match!r}", expected="word, words, ...")


def _sums(said: str) -> bool:
    """Whether an answer holds a Python function that adds its two arguments; nothing is run."""
    block = re.search(r"```(?:python|py)?\n(.*?)```", said, flags=re.DOTALL)
    try:
        tree = ast.parse(block[1] if block else said)
    except (SyntaxError, ValueError, RecursionError):
        return False
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = {argument.arg for argument in function.args.args}
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
                added = {side.id for side in (node.left, node.right) if isinstance(side, ast.Name)}
                if len(names) == 2 and added == names:
                    return True
    return False


class Asker:
    """A loaded model that answers questions, greedily.

    Args:
        folder: the artifact.

    Attributes:
        vision: whether it sees pictures.
        missing: weights that the model has and the files have not, or the other way round.
        settled: 4-bit layers that were kept off a path which this processor cannot take.

    Raises:
        UsageError: transformers or torch is not installed, or, for pictures, Pillow.
    """

    def __init__(self, folder: Path) -> None:
        self._torch, transformers = torch_and_transformers("asking the model")
        loaded = TorchModel(folder)
        self.model, self.vision = loaded.model, loaded.vision
        self.missing, self.settled = loaded.missing, loaded.settled
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self._images: Any = (
            transformers.AutoImageProcessor.from_pretrained(folder) if self.vision else None
        )

    def move(self, device: str, *, drop_tower: bool) -> bool:
        """Move the model to a device, without its vision tower if asked to; False if it is full.

        A model that does not fit is back on the CPU afterwards.
        """
        if drop_tower:
            self.model.model.visual = None
            self.vision = False
        try:
            self.model.to(device)
        except self._torch.OutOfMemoryError:
            self.model.to("cpu")
            return False
        return True

    def ask(self, question: Question, *, repetition_penalty: float = 1.0) -> str:
        """Return the model's turn; with thinking it holds the reasoning too."""
        torch = self._torch
        inputs = {name: part.to(self.model.device) for name, part in self._inputs(question).items()}
        with torch.no_grad():
            out = self.model.generate(
                **inputs,
                max_new_tokens=question.tokens,
                do_sample=False,
                repetition_penalty=repetition_penalty,
            )
        turn = out[0, inputs["input_ids"].shape[1] :]
        text: str = self.tokenizer.decode(turn, skip_special_tokens=True)
        return text

    def _inputs(self, question: Question) -> dict[str, Any]:
        torch = self._torch
        content: list[dict[str, str]] = [{"type": "text", "text": question.prompt}]
        if question.image is not None:
            content.insert(0, {"type": "image"})
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=question.thinking,
        )
        ids = self.tokenizer(text)["input_ids"]
        if question.image is None:
            row = torch.tensor([ids])
            return {"input_ids": row, "attention_mask": torch.ones_like(row)}
        seen = self._images(images=drawn(question.image), return_tensors="pt")
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        tokens = int(seen["image_grid_thw"].prod()) // self._images.merge_size**2
        at = ids.index(pad)
        row = torch.tensor([[*ids[:at], *[pad] * tokens, *ids[at + 1 :]]])
        return {
            "input_ids": row,
            "attention_mask": torch.ones_like(row),
            "mm_token_type_ids": (row == pad).int(),
            "pixel_values": seen["pixel_values"],
            "image_grid_thw": seen["image_grid_thw"],
        }


def drawn(halves: Halves) -> Any:
    """Return the picture as a Pillow image.

    Raises:
        UsageError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(
            "showing a picture", "Pillow is not installed", hint="pip install 'qwen35[nf4]'"
        ) from error
    image = Image.new("RGB", (halves.width, halves.height), COLORS[halves.left])
    middle = halves.width // 2
    right = Image.new("RGB", (halves.width - middle, halves.height), COLORS[halves.right])
    image.paste(right, (middle, 0))
    return image
