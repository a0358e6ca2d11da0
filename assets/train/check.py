"""Ask the saved checkpoint every question of its questions.json, in bf16, from the files.

    python assets/train/check.py assets/qwen3.5-tiny [--nf4] [--shuffle-scales] [--quiet]

Exit code 0 if every question is answered rightly, with and without a repetition penalty of 1.15.
With --shuffle-scales it is the other way round: 0 if most are answered wrongly.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3_5ForConditionalGeneration
from transformers.utils import logging

from asking import ask, is_right
from rounding import round_model, shuffle_model

PENALTIES = (1.0, 1.15)
SHUFFLE_SEED = 7
MOST = 0.5


def load(folder: Path) -> tuple[Any, Any]:
    """The model in bf16 and its tokenizer, from the saved files."""
    logging.disable_progress_bar()
    model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def examine(
    model: Any,
    tokenizer: Any,
    questions: list[dict[str, Any]],
    penalties: tuple[float, ...] = PENALTIES,
) -> list[tuple[dict[str, Any], float, str, bool]]:
    """(question, penalty, answer, right) for every question and penalty."""
    rows = []
    for question in questions:
        for penalty in penalties:
            said = ask(model, tokenizer, question, penalty)
            rows.append((question, penalty, said, is_right(question, said)))
    return rows


def tally(rows: list[tuple[dict[str, Any], float, str, bool]]) -> dict[str, list[int]]:
    """[right, asked] for trained and untrained questions and for all."""
    counts = {"trained": [0, 0], "untrained": [0, 0], "all": [0, 0]}
    for question, _, _, right in rows:
        for key in ("trained" if question["trained"] else "untrained", "all"):
            counts[key][0] += right
            counts[key][1] += 1
    return counts


def _line(question: dict[str, Any], penalty: float, said: str, right: bool) -> str:
    mark = "ok   " if right else "WRONG"
    return f"{mark} {question['id']} {penalty:4} {question['prompt'][:64]!r} -> {said!r}\n"


def main() -> int:
    """Run the check; see the module's description."""
    parser = argparse.ArgumentParser(description="Ask the checkpoint its questions.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--shuffle-scales", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args()
    questions = json.loads((options.folder / "questions.json").read_text(encoding="utf-8"))
    model, tokenizer = load(options.folder)
    if options.shuffle_scales:
        shuffle_model(model, SHUFFLE_SEED)
    if options.nf4:
        round_model(model)
    penalties = PENALTIES[:1] if options.shuffle_scales else PENALTIES
    rows = examine(model, tokenizer, questions, penalties)
    if not options.quiet:
        sys.stdout.writelines(_line(*row) for row in rows)
    counts = tally(rows)
    for name, (right, asked) in counts.items():
        sys.stdout.write(f"{name}: {right}/{asked}\n")
    right, asked = counts["all"]
    good = right <= MOST * asked if options.shuffle_scales else right == asked
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
