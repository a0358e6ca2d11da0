"""Decode, and encode, weights with MLX on a CPU.

PYTHONPATH=tests python tests/oracles/decode_mlx.py WORK

Everything in an artifact is compared with what ``mx.quantize`` makes of the source, byte by byte;
norms, convolutions and stacks of experts are those that mlx-lm loads (`logits_mlx.py`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from oracles.answers import Answers, read_cases

_EXPERT = re.compile(r"(.*)experts\.(\d+)\.(.*)")
_FUSED = {"gate_proj": 0, "up_proj": 1}


def load(folder: str) -> dict[str, mx.array]:
    """Return every tensor of a checkpoint."""
    return {n: t for path in Path(folder).glob("*.safetensors") for n, t in mx.load(path).items()}


def place(name: str) -> tuple[str, int | None]:
    """Return the module of a weight in MLX, and its number in a stack."""
    module = name.removesuffix(".weight")
    for family in ("model.language_model.", "model."):
        if module.startswith(family):
            module = f"language_model.model.{module.removeprefix(family)}"
            break
    else:
        module = f"language_model.{module}"
    expert = _EXPERT.fullmatch(module)
    if expert is None:
        return module, None
    return f"{expert[1]}switch_mlp.{expert[3]}", int(expert[2])


def original(source: dict[str, mx.array], name: str) -> mx.array:
    """Return a weight of the source, where experts may be fused."""
    expert = _EXPERT.fullmatch(name.removesuffix(".weight"))
    if name in source or expert is None:
        return source[name]
    stack, number, leaf = expert[1], int(expert[2]), expert[3]
    if leaf == "down_proj":
        return source[f"{stack}experts.down_proj"][number]
    both = source[f"{stack}experts.gate_up_proj"][number]
    half = both.shape[0] // 2
    return both[half:] if _FUSED[leaf] else both[:half]


class Stored:
    """The quantized weights of an artifact.

    Args:
        folder: the artifact.
    """

    def __init__(self, folder: str) -> None:
        self._tensors = load(folder)
        self._section = json.loads(Path(folder, "config.json").read_text())["quantization"]

    def parts(self, name: str) -> list[mx.array]:
        """Return codes, scales and biases of a weight."""
        module, number = place(name)
        names = [f"{module}.{one}" for one in ("weight", "scales", "biases")]
        found = [self._tensors[n] for n in names if n in self._tensors]
        return found if number is None else [part[number] for part in found]

    def settings(self, name: str) -> dict[str, Any]:
        """Return what config.json says about a weight."""
        own = self._section.get(place(name)[0], self._section)
        return {"mode": "affine", **{k: own[k] for k in ("mode", "bits", "group_size") if k in own}}

    def decoded(self, name: str) -> Any:
        """Return a weight in float32."""
        codes, scales, *biases = self.parts(name)
        settings = self.settings(name)
        if settings["mode"] == "affine":
            scales, biases = scales.astype(mx.float32), [biases[0].astype(mx.float32)]
        weight = mx.dequantize(codes, scales, *biases, **settings)
        return np.array(weight.astype(mx.float32))


def wrong_bytes(case: dict[str, Any]) -> Iterator[str]:
    """Yield weights that ``mx.quantize`` stores otherwise."""
    stored, source = Stored(case["artifact"]), load(case["source"])
    for name in case["packed"]:
        theirs = mx.quantize(original(source, name), **stored.settings(name))
        ours = stored.parts(name)
        pairs = zip(ours, theirs, strict=False)
        same = [a.dtype == b.dtype and mx.array_equal(a, b) for a, b in pairs]
        if len(ours) != len(theirs) or not all(same):
            yield name


def main(work: Path) -> int:
    """Ask about every artifact in MLX's form; 1 if one differs."""
    mx.set_default_device(mx.cpu)
    answers = Answers(work, "mlx")
    for name, case in read_cases(work, "mlx").items():
        stored, ours = Stored(case["artifact"]), load(case["decoded"])
        theirs = {n: stored.decoded(n) for n in case["packed"]}
        answers.decoded(name, theirs)
        wrong = [n for n, w in theirs.items() if not np.array_equal(w, np.array(ours[n]))]
        answers.tell(name, f"{len(theirs)} weights decoded in float32", wrong)
        answers.tell(name, f"{len(theirs)} weights encoded, every byte", wrong_bytes(case))
    return answers.close()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
