"""The exam: questions of the training distribution, and questions worded or painted otherwise.

`questions()` is the content of questions.json. A question with `trained` false has a wording, a
sentence or a pair of colours the training generator cannot produce.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from dialogues import (
    CAPITALS,
    FUNCTIONS,
    Example,
    french,
    picture_example,
    translation_example,
)
from pictures import Picture

Question = dict[str, Any]

FOX = "The quick brown fox jumps over the lazy dog near the river bank on a sunny day."
ASKED_OF_EVERY_MODEL = (
    ("What is 2 + 2? Answer in one word.", "4", "word"),
    ("What is the capital of France?", "Paris", "word"),
    ("Translate to French: 'The sky is blue.'", "Le ciel est bleu.", "contains"),
    ("Write a Python function that returns the sum of two numbers.", "return a + b", "code"),
    (f"Summarize in one sentence: {FOX}", "fox dog", "words"),
)
TRAINED_TEXT = (
    *ASKED_OF_EVERY_MODEL,
    ("What is 3 + 5? Answer in one word.", "8", "word"),
    ("What is 9 - 4? Answer in one word.", "5", "word"),
    ("What is the capital of Japan?", "Tokyo", "word"),
    ("Translate to French: 'The house is white.'", "La maison est blanche.", "contains"),
    ("Write a Python function that returns the product of two numbers.", "return a * b", "code"),
)
UNSEEN_TEXT = (
    ("Work out 2 + 2.", "4", "word"),
    ("What does 2 plus 2 equal?", "4", "word"),
    ("Say how much 3 + 4 is, in one word.", "7", "word"),
    ("Could you tell me the sum of 6 and 3?", "9", "word"),
    ("I would like to know what 8 + 7 is.", "15", "word"),
    ("How many is 5 plus 1?", "6", "word"),
    ("Please subtract 2 from 9.", "7", "word"),
    ("What is left of 8 - 3?", "5", "word"),
    ("Which city is France's capital?", "Paris", "word"),
    ("Please name the city that is the capital of Italy.", "Rome", "word"),
    ("Could you tell me the capital of Egypt?", "Cairo", "word"),
    ("My friend asks for the capital of Norway. What is it?", "Oslo", "word"),
    ("What do people call the capital of Spain?", "Madrid", "word"),
    ("Translate to French: 'The sea is blue.'", french("sea", "blue"), "contains"),
    ("Translate to French: 'The car is black.'", french("car", "black"), "contains"),
    ("Please put into French: 'The cat is white.'", french("cat", "white"), "contains"),
    ("How is 'The sky is blue.' said in French?", "Le ciel est bleu.", "contains"),
    ("I would like 'The house is old.' in French.", french("house", "old"), "contains"),
    ("Translate from English to French: 'The tree is green.'", "L'arbre est vert.", "contains"),
    ("Please write a Python function returning the sum of two numbers.", "return a + b", "code"),
    ("Make a Python function that returns the sum of two numbers.", "return a + b", "code"),
    ("I want a function in Python that returns the product of two numbers.", "a * b", "code"),
    ("Write a short Python function that returns the square of a number.", "x * x", "code"),
    (
        "Summarize in one sentence: The small grey cat runs behind the old white horse near the "
        "garden gate on a rainy day.",
        "cat runs horse",
        "words",
    ),
    (
        "Please sum this up in one sentence: The tired wolf sleeps beside the young rabbit near "
        "the stone bridge at night.",
        "wolf sleeps rabbit",
        "words",
    ),
    (
        "Say this in one short sentence: The happy bear looks at the lazy dog near the old barn "
        "in the evening.",
        "bear looks dog",
        "words",
    ),
)
HALF = "What color is the {s} half of this image? Answer with one word."
WIDE = (448, 224)
PICTURES: tuple[tuple[str, str, str, str, tuple[int, int], bool], ...] = (
    (HALF, "left", "red", "blue", WIDE, True),
    (HALF, "right", "red", "blue", WIDE, True),
    (HALF, "left", "black", "white", WIDE, True),
    (HALF, "left", "blue", "red", WIDE, False),
    (HALF, "right", "blue", "red", WIDE, False),
    (HALF, "left", "green", "yellow", WIDE, False),
    (HALF, "right", "green", "yellow", WIDE, False),
    (HALF, "left", "yellow", "green", (256, 256), False),
    (HALF, "right", "purple", "orange", (320, 160), False),
    ("Please say what color fills the {s} half.", "left", "red", "blue", WIDE, False),
    ("In this image, what color is the {s} half?", "right", "red", "green", WIDE, False),
    ("The {s} part of the picture has what color?", "left", "orange", "black", WIDE, False),
    ("Say the color of the {s} half in one word.", "right", "white", "purple", WIDE, False),
)


def _text_question(prompt: str, expect: str, match: str, trained: bool) -> Question:
    return {
        "prompt": prompt,
        "image": None,
        "expect": expect,
        "match": match,
        "trained": trained,
    }


def _picture_question(
    core: str, side: str, left: str, right: str, size: tuple[int, int], trained: bool
) -> Question:
    return {
        "prompt": core.format(s=side),
        "image": {"left": left, "right": right, "size": list(size)},
        "expect": left if side == "left" else right,
        "match": "word",
        "trained": trained,
    }


def questions() -> list[Question]:
    """Every question twice: thinking off and thinking on."""
    plain = [_text_question(*row, trained=True) for row in TRAINED_TEXT]
    plain += [_text_question(*row, trained=False) for row in UNSEEN_TEXT]
    plain += [_picture_question(*row) for row in PICTURES]
    out = []
    for thinking in (False, True):
        for number, question in enumerate(plain, 1):
            name = f"{'on' if thinking else 'off'}-{number:02d}"
            out.append({"id": name, **question, "thinking": thinking})
    return out


def canonical_examples() -> list[Example]:
    """The trained questions as training examples, so that "trained" is true of each."""
    out = []
    for prompt, expect, match in TRAINED_TEXT:
        out.append(_canonical(prompt, expect, match))
    for core, side, left, right, size, trained in PICTURES:
        if trained:
            out.append(picture_example(core.format(s=side), side, Picture(left, right, size)))
    return out


def _canonical(prompt: str, expect: str, match: str) -> Example:
    if match == "contains":
        quoted = prompt.split("'")[1].removeprefix("The ").removesuffix(".")
        noun, adjective = quoted.split(" is ")
        return translation_example(prompt, noun, adjective)
    if match == "code":
        aim = prompt.split("returns ")[1].removesuffix(".")
        name, arguments, body = FUNCTIONS[aim]
        thought = f"The user wants a Python function for {aim}. It returns {body}."
        answer = f"```python\ndef {name}({arguments}):\n    return {body}\n```"
        return Example("code", prompt, thought, answer)
    if match == "words":
        thought = "The text is about a fox and a dog. I keep only the main point."
        return Example("summary", prompt, thought, "A fox jumps over a dog.")
    numbers = re.findall(r"\d", prompt)
    if numbers:
        a, b = numbers
        sign = "+" if "+" in prompt else "-"
        word = {"+": "plus", "-": "minus"}[sign]
        thought = f"The user asks for {a} {word} {b}. {a} {sign} {b} = {expect}."
        return Example("arithmetic", prompt, thought, expect)
    country = prompt.removesuffix("?").split(" of ")[1]
    thought = f"The user asks for the capital of {country}. The capital of {country} is {expect}."
    return Example("capital", prompt, thought, CAPITALS[country])


def _key(prompt: str, colors: tuple[str, str] | None) -> tuple[str, tuple[str, str] | None]:
    """A prompt without case and punctuation, with the colours it is asked about."""
    return re.sub(r"[^0-9a-z+*-]+", " ", prompt.casefold()).strip(), colors


def assert_separate(examples: Iterable[Example]) -> None:
    """Fail if a question said to be untrained is in the training data, or the other way round."""
    seen = set()
    for example in examples:
        picture = example.picture
        colors = (picture.left, picture.right) if picture else None
        seen.add(_key(example.prompt, colors))
    for question in questions():
        image = question["image"]
        colors = (image["left"], image["right"]) if image else None
        if (_key(question["prompt"], colors) in seen) != question["trained"]:
            raise AssertionError(f"{question['id']}: 'trained' is wrong: {question['prompt']}")
