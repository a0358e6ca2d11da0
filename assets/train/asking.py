"""Asking a loaded checkpoint the questions of questions.json, and judging what it says."""

from __future__ import annotations

import re
from typing import Any

import torch

from pictures import Picture, draw, patches
from rendering import widen_image

MAX_NEW_TOKENS = 80


def model_inputs(tokenizer: Any, question: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What `generate` needs for one question: the rendered chat, and the patches of a picture."""
    content: list[dict[str, Any]] = [{"type": "text", "text": question["prompt"]}]
    image = question["image"]
    if image:
        content.insert(0, {"type": "image"})
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=question["thinking"],
    )
    ids = tokenizer(text)["input_ids"]
    if not image:
        return {"input_ids": torch.tensor([ids])}
    picture = Picture(image["left"], image["right"], (image["size"][0], image["size"][1]))
    row = torch.tensor([widen_image(ids, picture)])
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return {
        "input_ids": row,
        "mm_token_type_ids": (row == pad).int(),
        "pixel_values": torch.from_numpy(patches(draw(picture))),
        "image_grid_thw": torch.tensor([picture.grid]),
    }


def ask(
    model: Any, tokenizer: Any, question: dict[str, Any], repetition_penalty: float = 1.0
) -> str:
    """The model's turn, greedily decoded; with thinking on it holds the reasoning as well."""
    inputs = model_inputs(tokenizer, question)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    out = model.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        repetition_penalty=repetition_penalty,
    )
    text: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def is_right(question: dict[str, Any], said: str) -> bool:
    """Judge the final answer; with thinking on, the reasoning must have been closed."""
    if question["thinking"]:
        thought, closed, said = said.partition("</think>")
        if not closed or not thought.strip():
            return False
    said, expect = said.strip(), question["expect"]
    words = re.findall(r"[\w]+", said.casefold())
    match question["match"]:
        case "word":
            return words == [expect.casefold()]
        case "words":
            return all(w in words for w in expect.casefold().split()) and said.count(".") == 1
        case "contains":
            return expect.casefold() in said.casefold()
        case "code":
            block = re.fullmatch(r"```python\n(.*)\n```", said, flags=re.DOTALL)
            return block is not None and "def " in said and expect in said
        case other:
            raise ValueError(f"{question['id']}: unknown match {other!r}")
