"""Ask a checkpoint in transformers, with prompts that a bounded child renders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen35.display import cut
from qwen35.engines.torch_model import NO_CODE, TorchModel, torch_and_transformers
from qwen35.errors import InputError, Qwen35Error, UsageError, extra_hint
from qwen35.planning.bounded_tokenizer import check_tokenizer
from qwen35.verification.asking_prompts import ModelTurn
from qwen35.verification.chat_prompts import ChatPrompts
from qwen35.verification.questions import Halves, Question

__all__ = ["COLORS", "UNSEEN", "Asker", "as_sentence", "drawn", "prompts_of"]

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
UNSEEN = "not shown a picture: the chat template has no place for one"
_TOKENIZERS = ("tokenizer.json", "vocab.json")
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


class Asker:
    """A loaded model that answers questions, greedily.

    Args:
        folder: the artifact.

    Attributes:
        vision: whether it can be shown pictures.
        decoded: whether transformers was given a decoded copy, as it does not load the format.
        missing: weights that only the model or only the files have.
        settled: number of 4-bit layers kept off a code path that fails on this processor.
        thinking: whether questions can be asked without thinking, and with.
        notes: what is special about asking it.

    Raises:
        InputError: there is no tokenizer, the chat template refuses questions, or transformers
            cannot load it.
        UsageError: transformers, torch or, for pictures, Pillow is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.torch, transformers = torch_and_transformers("asking the model")
        self.tokenizer, self.prompts = prompts_of(folder, transformers)
        with as_sentence(folder.name, "transformers cannot load it"):
            loaded = TorchModel(folder)
        self.model, self.vision, self.decoded = loaded.model, loaded.vision, loaded.decoded
        self.missing, self.settled = loaded.missing, loaded.settled
        self.defaults = self.prompts.defaults
        self.thinking, notes = self.prompts.thinking, list(self.prompts.notes)
        self.images: Any = None
        if self.vision:
            unseen = self._unseen(folder)
            self.vision = not unseen
            notes += unseen
        if self.vision:
            with as_sentence(folder.name, "transformers cannot load its image preprocessor"):
                self.images = transformers.AutoImageProcessor.from_pretrained(folder, **NO_CODE)
        self.notes = tuple(notes)
        _end_turns(self.model, self.tokenizer)

    def _unseen(self, folder: Path) -> list[str]:
        """Return a note on why no picture can be shown; none if one can."""
        if not any((folder / name).is_file() for name in _PREPROCESSORS):
            return [f"not shown a picture: no {_PREPROCESSORS[0]}"]
        return [] if self.prompts.sees else [UNSEEN]

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
        """Return the model's turn, including the reasoning if it thinks.

        Raises:
            InputError: the chat template refuses the question, or transformers cannot answer it.
        """
        torch = self.torch
        with as_sentence(question.prompt, "transformers cannot answer it"), torch.no_grad():
            turn = self._generated(
                self._inputs(question), question.tokens, repetition_penalty=repetition_penalty
            )
        return self.prompts.answer(question, turn.text)

    def turn(self, prompt: str, tokens: int) -> ModelTurn:
        """Return what the model writes after a prompt, greedily.

        Raises:
            InputError: transformers cannot continue it.
        """
        with as_sentence(cut(prompt, 60), "transformers cannot answer it"), self.torch.no_grad():
            return self._generated(self._row(prompt), tokens)

    def _generated(self, inputs: dict[str, Any], tokens: int, **options: Any) -> ModelTurn:
        inputs = {name: part.to(self.model.device) for name, part in inputs.items()}
        out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)
        turn = out[0, inputs["input_ids"].shape[1] :]
        text: str = self.tokenizer.decode(turn, skip_special_tokens=True)
        return ModelTurn(text, len(turn) < tokens)

    def _row(self, text: str) -> dict[str, Any]:
        # As in transformers' own chat: the template writes the special tokens.
        row = self.torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])
        return {"input_ids": row, "attention_mask": self.torch.ones_like(row)}

    def _inputs(self, question: Question) -> dict[str, Any]:
        torch = self.torch
        written = self._row(self.prompts.write(question))
        if question.image is None:
            return written
        ids = written["input_ids"][0].tolist()
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


@contextmanager
def as_sentence(subject: str, what: str) -> Iterator[None]:
    """Turn whatever a library raises for a stranger's files into a sentence.

    Raises:
        InputError: what the library raised.
    """
    try:
        yield
    except (Qwen35Error, MemoryError):
        raise
    except Exception as error:
        text = cut(" ".join(str(error).split()), 200)
        raise InputError(subject, f"{what} ({type(error).__name__}: {text})") from error


def prompts_of(folder: Path, transformers: Any) -> tuple[Any, ChatPrompts]:
    """Return a checkpoint's tokenizer and the prompts of its chat template.

    Raises:
        InputError: there is no tokenizer, it cannot be loaded, or its template refuses questions.
    """
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        hint = f"add the {_TOKENIZERS[0]} of its source"
        raise InputError(folder.name, "no tokenizer, so nothing can be asked", hint=hint)
    with as_sentence(folder.name, "transformers cannot load its tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
        template, named = tokenizer.chat_template, tokenizer.special_tokens_map
    template = template.get("default") if isinstance(template, dict) else template
    tokens = {name: text for name, text in named.items() if isinstance(text, str)}
    prompts = ChatPrompts("chat template", template, tokens)
    check_tokenizer(folder, prompts.texts)
    return tokenizer, prompts


def _end_turns(model: Any, tokenizer: Any) -> None:
    """Let the tokenizer's own last token end a turn, as in vLLM and llama.cpp."""
    config, end = model.generation_config, tokenizer.eos_token_id
    ends = config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end is not None and end not in ends:
        config.eos_token_id = [*ends, end]


def drawn(halves: Halves) -> Any:
    """Return the picture as a Pillow image.

    Raises:
        UsageError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        found = "Pillow is not installed"
        raise UsageError("showing a picture", found, hint=extra_hint("nf4")) from error
    image = Image.new("RGB", (halves.width, halves.height), COLORS[halves.left])
    middle = halves.width // 2
    right = Image.new("RGB", (halves.width - middle, halves.height), COLORS[halves.right])
    image.paste(right, (middle, 0))
    return image
