"""Ask a checkpoint in transformers; the questions and the judgement of answers are shared."""

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
    """A question and its right answer.

    Args:
        prompt: the user's turn.
        expect: what the answer must be or hold.
        match: ``word``: the answer is this word; ``any``: it holds one of these words; ``all``: all
            of them; ``words``: one sentence with all of these; ``contains``: it holds this text;
            ``code``: a Python function that holds this text; ``sum``: a Python function that
            returns the sum of its two arguments.
        thinking: the model must reason first, and finish its reasoning.
        image: a picture shown with the question.
        tokens: maximum length of the model's turn.
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


def is_right(question: Question, turn: str) -> bool:
    """Judge the model's turn.

    >>> is_right(Question("2 + 2?", "4"), "4."), is_right(Question("2 + 2?", "4"), "It is 5")
    (True, False)
    """
    if question.thinking:
        thought, closed, turn = turn.partition("</think>")
        if not closed or not thought.strip():
            return False
    elif "<think>" in turn:
        return False
    return _matches(question, turn.strip())


def _matches(question: Question, answer: str) -> bool:
    expect = question.expect.casefold()
    words = re.findall(r"\w+", answer.casefold())
    if question.match == "word":
        return words == [expect]
    if question.match == "any":
        return not set(expect.split()).isdisjoint(words)
    if question.match == "all":
        return set(expect.split()) <= set(words)
    if question.match == "words":
        return set(expect.split()) <= set(words) and answer.count(".") == 1
    if question.match == "contains":
        return expect in answer.casefold()
    if question.match == "code":
        block = re.fullmatch(r"```python\n(.*)\n```", answer, flags=re.DOTALL)
        return block is not None and "def " in answer and expect in answer.casefold()
    if question.match == "sum":
        return _sums(answer)
    raise UsageError(question.prompt, f"match {question.match!r}", expected="word, words, ...")


def _sums(answer: str) -> bool:
    """Return whether an answer defines a Python function that adds its two arguments."""
    # parsed, never run: a model wrote it
    block = re.search(r"```(?:python|py)?\n(.*?)```", answer, flags=re.DOTALL)
    try:
        tree = ast.parse(block[1] if block else answer)
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
        missing: weights that only the model or only the files have.
        settled: number of 4-bit layers kept off a code path that fails on this processor.

    Raises:
        UsageError: transformers, torch or, for pictures, Pillow is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.torch, transformers = torch_and_transformers("asking the model")
        loaded = TorchModel(folder)
        self.model, self.vision = loaded.model, loaded.vision
        self.missing, self.settled = loaded.missing, loaded.settled
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.images: Any = (
            transformers.AutoImageProcessor.from_pretrained(folder) if self.vision else None
        )

    def move(self, device: str, *, drop_tower: bool) -> bool:
        """Move the model to a device, optionally without its vision tower.

        Returns:
            False if it does not fit; the model is on the CPU again.
        """
        if drop_tower:
            self.model.model.visual = None
            self.vision = False
        try:
            self.model.to(device)
        except self.torch.OutOfMemoryError:
            self.model.to("cpu")
            return False
        return True

    def ask(self, question: Question, *, repetition_penalty: float = 1.0) -> str:
        """Return the model's turn, including the reasoning if it thinks."""
        torch = self.torch
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
        torch = self.torch
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
        pixels = self.images(images=drawn(question.image), return_tensors="pt")
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        # the template has one pad token per picture; the model needs one per merged patch
        tokens = int(pixels["image_grid_thw"].prod()) // self.images.merge_size**2
        at = ids.index(pad)
        row = torch.tensor([[*ids[:at], *[pad] * tokens, *ids[at + 1 :]]])
        return {
            "input_ids": row,
            "attention_mask": torch.ones_like(row),
            "mm_token_type_ids": (row == pad).int(),
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
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
