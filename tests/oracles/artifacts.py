"""Make what the oracles are asked about: python tests/oracles/artifacts.py WORK

Each artifact of `served_artifacts` in ``WORK/NAME``; ``WORK/decoded/NAME`` is the same checkpoint
with the packed weights as we decode them, in float32, and the logits of that in float32.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from checkpoints import ASSET
from oracles.answers import divergence
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.codecs.registry import is_packed
from running import load_all, read_config
from served_artifacts import BY_LARGEST, SERVED, decoded_weights, make_source

LENGTH = 192


def write_decoded(artifact: Path, out: Path) -> list[str]:
    """Write a checkpoint with our decoded weights; return their names."""
    weights = decoded_weights(artifact)
    if open_folder(artifact).dialect:  # names and shapes as transformers has them
        plain = out.parent / f"{out.name}-bf16"
        assert main(["convert", str(artifact), str(plain), "--recipe", "bf16", "--quiet"]) == 0
        artifact = plain
    items = [item for item in inventory(open_folder(artifact)) if is_packed(item.weight)]
    parts = {part.name for item in items for part in item.parts}
    tensors = {name: t for name, t in load_all(artifact).items() if name not in parts}
    out.mkdir(parents=True)
    save_file({**tensors, **weights}, out / "model.safetensors", metadata={"format": "pt"})
    config = read_config(artifact)
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config))
    others = {"config.json", "hf_quant_config.json", "model.safetensors.index.json", "qwen35.json"}
    for path in artifact.iterdir():
        if path.name not in others and path.suffix != ".safetensors":
            shutil.copy(path, out)
    return sorted(weights)


def logits(folder: Path, ids: list[int]) -> Any:
    """Return [tokens, vocabulary] logits of transformers in float32."""
    text = "vision_config" not in read_config(folder)
    kind = AutoModelForCausalLM if text else AutoModelForImageTextToText
    model = kind.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def make_all(work: Path) -> int:
    """Write all of them, and ``cases.json``."""
    ids = AutoTokenizer.from_pretrained(ASSET)((ASSET / "eval.txt").read_text())["input_ids"]
    cases = {}
    originals: dict[Path, Any] = {}
    for name, served in SERVED.items():
        artifact, decoded = served.make(work), work / "decoded" / name
        packed = write_decoded(artifact, decoded)
        vocabulary = 4096 if served.source in ("asset", "text") else 500
        tokens = [i % vocabulary for i in ids[:LENGTH]]
        source, found = make_source(served.source, work), logits(decoded, tokens)
        np.save(decoded / "logits.npy", found)
        if source not in originals:
            originals[source] = logits(source, tokens)
        cases[name] = {
            "source": str(source),
            "artifact": str(artifact),
            "dialect": open_folder(artifact).dialect,
            "decoded": str(decoded),
            "packed": packed,
            "by_largest": name in BY_LARGEST,
            "effect": divergence(originals[source], found),
            "ids": tokens,
        }
    (work / "cases.json").write_text(json.dumps(cases))
    return 0


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    Path(sys.argv[1]).mkdir(parents=True)
    sys.exit(make_all(Path(sys.argv[1])))
