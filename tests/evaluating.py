"""The embedded checkpoint in every format, and evaluations of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import ASSET
from qwen35.checkpoint.source import open_folder
from qwen35.evaluation.evaluation_report import EvaluationReport
from qwen35.evaluation.evaluation_run import evaluate
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write
from running import run

__all__ = ["CHUNKS", "Interrupting", "gguf", "make_formats", "measure"]

CHUNKS = 2
TYPES = ("F16", "Q8_0", "Q4_K_M")


def make_formats(folder: Path) -> Path:
    """Write ``nf4``, ``fp8``, ``text``, a folder of GGUF files, and text to measure on."""
    for recipe in ("nf4", "fp8", "text"):
        run(ASSET, folder / recipe, recipe)
    plan = make_plan(open_folder(ASSET), load_recipe("mix", "gguf"), types=TYPES)
    write(plan, folder / "gguf")
    text = (ASSET / "eval.txt").read_text()
    (folder / "text.txt").write_text(text[:30_000])
    return folder


def gguf(formats: Path, kind: str) -> str:
    """Return the path of a GGUF file of `make_formats`."""
    return str(formats / "gguf" / f"{ASSET.name}-{kind}.gguf")


def measure(formats: Path, base: str, *candidates: str, **options: Any) -> EvaluationReport:
    """Evaluate over a few chunks, on one thread."""
    options = {"threads": 1, "chunks": CHUNKS, "device": "cpu", **options}
    return evaluate(base, candidates, formats / "text.txt", **options)


class Interrupting:
    """Progress that counts chunks and stops after some of them, as Ctrl-C does."""

    def __init__(self, after: int = 1_000_000) -> None:
        self.after = after
        self.run: list[str] = []

    def begin(self, title: str, nbytes: int) -> None:
        """Count nothing yet."""

    def advance(self, nbytes: int, item: str) -> None:
        """Count a chunk."""
        if item.startswith("chunk"):
            self.run.append(item)
            if len(self.run) == self.after:
                raise KeyboardInterrupt

    def end(self) -> None:
        """Nothing."""
