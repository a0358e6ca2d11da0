"""Measure the saved checkpoint from its files: held-out text, and the questions it answers.

    python assets/train/check.py assets/qwen3.5-tiny [--as bf16|rounded|nf4|shuffled]

Exit code 0 if every question is answered rightly, with and without a repetition penalty of 1.15.
With the scales shuffled it is the other way round: 0 if most are answered wrongly. Without --as
all four are measured, and written into the folder's training.json and README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from batches import Batch, text_rows
from checkpoint import write_json
from learning import Clock, text_loss
from qwen35.cli.main import main as qwen35
from qwen35.verification.asking_transformers import Asker
from qwen35.verification.questions import Question, is_right
from readme import readme
from rounding import round_model, shuffle_model
from vocabulary import special_ids

VARIANTS = ("bf16", "rounded", "nf4", "shuffled")
"""As saved; its linears rounded by `rounding.py`; as `qwen35 convert` writes it and bitsandbytes
computes with it; the scales of its linears' blocks in a random order."""
PENALTIES = (1.0, 1.15)
SHUFFLE_SEED = 7
MOST = 0.5
WINDOW = 512

Answer = tuple[dict[str, Any], float, str, bool]


def load(folder: Path, variant: str) -> Asker:
    """A variant of the saved files, ready to be asked."""
    if variant == "nf4":
        with TemporaryDirectory() as place:
            out = Path(place) / "nf4"
            if qwen35(["convert", str(folder), str(out), "--recipe", "nf4", "--quiet"]):
                raise SystemExit(1)
            return Asker(out)
    asker = Asker(folder)
    if variant == "rounded":
        round_model(asker.model)
    if variant == "shuffled":
        shuffle_model(asker.model, SHUFFLE_SEED)
    return asker


def examine(
    asker: Asker, questions: list[dict[str, Any]], penalties: tuple[float, ...]
) -> list[Answer]:
    """(question, penalty, answer, right) for every question and penalty."""
    rows = []
    for row in questions:
        question = Question.from_json(row)
        for penalty in penalties:
            said = asker.ask(question, repetition_penalty=penalty)
            rows.append((row, penalty, said, is_right(question, said)))
    return rows


def tally(rows: list[Answer]) -> dict[str, list[int]]:
    """[right, asked] for trained and untrained questions and for all."""
    counts = {"trained": [0, 0], "untrained": [0, 0], "all": [0, 0]}
    for question, _, _, right in rows:
        for key in ("trained" if question["trained"] else "untrained", "all"):
            counts[key][0] += right
            counts[key][1] += 1
    return counts


def passes(variant: str, rows: list[Answer]) -> bool:
    """Whether the answers are what they have to be."""
    right, asked = tally(rows)["all"]
    return right <= MOST * asked if variant == "shuffled" else right == asked


def token_stream(tokenizer: Tokenizer, documents: tuple[str, ...]) -> Tensor:
    """All documents as one row of ids, each followed by the end-of-text token."""
    end = special_ids()["<|endoftext|>"]
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents)):
        ids += encoding.ids
        ids.append(end)
    return torch.tensor(ids)


def held_out_rows(stream: Tensor, most: int | None = None) -> Batch:
    """The held-out ids in windows of 512, the first `most` of them."""
    count = (len(stream) - 1) // WINDOW
    return text_rows(stream, WINDOW, torch.arange(min(count, most or count)) * WINDOW)


def held_out_loss(asker: Asker, folder: Path, most: int | None = None) -> float:
    """Nats per token of the folder's eval.txt, or of its first `most` windows."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = (folder / "eval.txt").read_text(encoding="utf-8")
    return text_loss(asker.model, held_out_rows(token_stream(tokenizer, (text,)), most))


def with_perplexity(loss: float) -> dict[str, float]:
    """A loss in nats per token, and as perplexity."""
    return {"nats": round(loss, 4), "perplexity": round(math.exp(loss), 2)}


def line(row: Answer) -> str:
    """One answer as a line of text."""
    question, penalty, said, right = row
    mark = "ok   " if right else "WRONG"
    return f"{mark} {question['id']} {penalty:4} {question['prompt'][:64]!r} -> {said!r}\n"


def ask_everything(asker: Asker, folder: Path, variant: str) -> list[Answer]:
    """All questions of the folder; once each if its scales are shuffled."""
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return examine(asker, questions, PENALTIES[: 1 if variant == "shuffled" else None])


def record(folder: Path) -> bool:
    """Measure all variants; write them into training.json and README.md. -> whether all pass"""
    report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    report["questions"] = {}
    clock, good = Clock(), True
    for variant in VARIANTS:
        asker = load(folder, variant)
        report["held_out"][variant] = with_perplexity(held_out_loss(asker, folder))
        rows = ask_everything(asker, folder, variant)
        report["questions"][variant] = tally(rows)
        good = good and passes(variant, rows)
        sys.stderr.write(f"{variant}: {report['held_out'][variant]} {tally(rows)}\n")
        if variant != "shuffled":
            wrong = [line(row) for row in rows if not row[3]]
            report["questions"][f"{variant} wrong"] = wrong
            sys.stderr.writelines(wrong)
    report["checking"] = clock.minutes()
    write_json(folder / "training.json", report)
    (folder / "README.md").write_text(readme(report), encoding="utf-8")
    return good


def main() -> int:
    """Run the check; see the module's description."""
    parser = argparse.ArgumentParser(description="Measure the embedded checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--as", dest="variant", choices=VARIANTS)
    options = parser.parse_args()
    if options.variant is None:
        return 0 if record(options.folder) else 1
    rows = ask_everything(load(options.folder, options.variant), options.folder, options.variant)
    sys.stdout.writelines(line(row) for row in rows)
    for name, (right, asked) in tally(rows).items():
        sys.stdout.write(f"{name}: {right}/{asked}\n")
    return 0 if passes(options.variant, rows) else 1


if __name__ == "__main__":
    sys.exit(main())
