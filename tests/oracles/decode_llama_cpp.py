"""Decode weights with llama.cpp's converter: PYTHONPATH=tests python ... LLAMA_CPP WORK

Runs in the environment of the tests. The converter makes two GGUF files of each artifact: one of
the artifact, one of our decoded weights in float32, so that what it does to names, experts and the
order of heads is the same. Not asked: several precisions in the layout of compressed-tensors
("Can't handle multiple config groups").
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from oracles.answers import Answers, load, read_cases
from upstream_convert import run

LIMIT = 1e-6
"""Largest relative difference: the inverse of NVFP4's scale of the whole is rounded."""


def values_of(path: Path) -> dict[str, Any]:
    """Return every tensor of a GGUF file in float32, with the scale of the whole if it has one."""
    from gguf import GGUFReader, dequantize

    tensors = {t.name: t for t in GGUFReader(path).tensors}
    found = {}
    for name, tensor in tensors.items():
        if name.endswith((".scale", ".input_scale")):
            continue
        values = dequantize(np.array(tensor.data), tensor.tensor_type).astype(np.float32)
        scale = tensors.get(f"{name.removesuffix('.weight')}.scale")
        if scale is not None:
            whole = np.array(scale.data).reshape(-1, *(1 for _ in values.shape[1:]))
            values = values * (whole if values.ndim == 3 else whole[0])
        found[name] = values
    return found


def differences(
    theirs: dict[str, Any], ours: dict[str, Any], limit: float = LIMIT
) -> Iterator[str]:
    """Yield tensors that are not the same numbers."""
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in theirs or name not in ours:
            yield f"{name}: only in one"
            continue
        one, other = theirs[name], ours[name]
        if one.shape != other.shape:
            yield f"{name}: {one.shape}, expected {other.shape}"
        elif (np.abs(one - other) > limit * np.abs(other)).any():
            yield f"{name}: differs by {np.abs(one - other).max()}"


def converted(folder: str, work: Path, kind: str) -> Path:
    """Run the converter."""
    out = work / f"{kind}.gguf"
    job = {"model": folder, "out": str(out), "type": kind, "mmproj": False, "mtp": False}
    run(job)
    return out


def main(work: Path) -> int:
    """Ask about every artifact that the converter reads; 1 if one differs."""
    answers = Answers(work, "llama.cpp")
    for name, case in read_cases(work).items():
        config = json.loads(Path(case["artifact"], "config.json").read_text())
        stored = config["quantization_config"]
        if stored["quant_method"] == "compressed-tensors" and len(stored["config_groups"]) > 1:
            continue
        theirs = values_of(converted(case["artifact"], work, "f32"))
        ours = values_of(converted(case["decoded"], work, "f32"))
        answers.tell(name, f"{len(theirs)} tensors in GGUF", differences(theirs, ours))
        if not any(differences(theirs, ours, 0)):  # so its numbers are these
            decoded = load(case["decoded"])
            answers.decoded(name, {weight: decoded[weight] for weight in case["packed"]})
    return answers.close()


if __name__ == "__main__":
    sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/gguf-py"]
    logging.disable(logging.WARNING)
    sys.exit(main(Path(sys.argv[2])))
