"""Short ways to make a run of the tiny dense model, and to look at what it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from checkpoints import layout_of, write_checkpoint
from gguf_models import exact_tensors, sidecars, variant_config
from qwen35.cli.main import main
from qwen35.pipeline.make import make_artifacts

Capture = pytest.CaptureFixture[str]
STEM = "Tiny-dense-1B"
NF4, TEXT, GGUF, FP8 = f"{STEM}-text-bnb-4bit", f"{STEM}-text", f"{STEM}-text-GGUF", f"{STEM}-FP8"


class Said:
    """What a run said.

    Args:
        code: exit code.
        report: parsed output.
    """

    def __init__(self, code: int, report: dict[str, Any]) -> None:
        self.code = code
        self.steps = {row["step"]: row for row in report["steps"]}

    def states(self, kind: str) -> dict[str, str]:
        """Return the state of each step of a kind, by artifact."""
        return {
            name.partition(" ")[2]: row["state"]
            for name, row in self.steps.items()
            if name.split()[0] == kind
        }


def go(capsys: Capture, source: Path, out: Path, *more: object, paths: str = "AB") -> Said:
    flags = [flag for path in paths for flag in ("--path", {"F": "fp8"}.get(path, path))]
    if "B" in paths and "--types" not in more:
        flags += ["--types", "Q8_0"]
    if "--depth" not in more:
        flags += ["--depth", "numbers"]
    capsys.readouterr()
    code = main(["run", *flags, str(source), str(out), "--json", *map(str, more)])
    return Said(code, json.loads(capsys.readouterr().out))


def refused(capsys: Capture, source: Path, out: Path, *more: str) -> str:
    flags = ["--path", "A", "--path", "B", "--types", "Q8_0", "--depth", "numbers"]
    capsys.readouterr()
    assert main(["run", *flags, str(source), str(out), *more]) == 2
    return capsys.readouterr().err


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that names every artifact that is made from now on."""
    made: list[str] = []

    def counting(artifacts: Sequence[Any], **options: Any) -> Any:
        made.extend(artifact.name for artifact in artifacts)
        return make_artifacts(artifacts, **options)

    monkeypatch.setattr("qwen35.pipeline.pipeline_run.make_artifacts", counting)
    return made


def manifest(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "qwen35.json").read_text())
    return parsed


def write_source(folder: Path, **changes: float) -> Path:
    """Write the checkpoint with the first weight of some tensors changed."""
    config = variant_config("dense")
    tensors = exact_tensors(config, layout_of(config), seed=5)
    for name, value in changes.items():
        tensors[name].view(-1)[0] = value
    return write_checkpoint(folder / STEM, config, tensors, sidecars=sidecars())


EMBEDDING = "model.language_model.embed_tokens.weight"
GATE_PROJ = "model.language_model.layers.0.mlp.gate_proj.weight"
