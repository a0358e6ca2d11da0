"""Load artifacts in mlx-vlm: logits as near to those of our decoded weights as float32 gives them.

Those in MLX's own form also in mlx-lm.

PYTHONPATH=tests python tests/oracles/logits_mlx.py WORK

Not asked, as mlx-vlm 0.7.10 does not load them: mixed precision of compressed-tensors, INT4 with
zero points, GPTQ; and block FP8, which it quantizes again, to MXFP8.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model as load_in_mlx_lm
from mlx_vlm.utils import load_model

from oracles.answers import Answers, divergence, read_cases

LIMIT = 1e-4
"""Largest mean KL divergence in nats; seen: 1e-5."""

SHARE = 0.25
"""The same with experts, as a share of that from the unquantized model; seen: 0.18.

Nearly all of it is in ten tokens at which a router hardly decides, and the decoded checkpoint in
mlx-vlm is almost as far from itself in transformers."""

UNREAD = ("-fp8", "-nvfp4-mixed", "-gptq", "-asym", "-asym-max")


def of_mlx_vlm(folder: Path, ids: mx.array) -> Any:
    """Return [tokens, vocabulary] logits in float32."""
    model = load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model.language_model(ids).logits[0])


def of_mlx_lm(folder: Path, ids: mx.array) -> Any:
    """Return [tokens, vocabulary] logits in float32."""
    model, _ = load_in_mlx_lm(folder)
    model.set_dtype(mx.float32)
    return np.array(model(ids)[0])


ASKED = {"mlx-vlm": of_mlx_vlm, "mlx-lm": of_mlx_lm}


def main(work: Path) -> int:
    """Ask about every artifact that it loads; 1 if one is too far."""
    answers = Answers(work, "mlx-vlm")
    for name, case in read_cases(work, None).items():
        if name.endswith(UNREAD):
            continue
        expected = np.load(Path(case["decoded"], "logits.npy"))
        limit = SHARE * case["effect"] if name.startswith("moe-") else LIMIT
        for program, logits in ASKED.items():
            if program == "mlx-lm" and not case["dialect"]:
                continue
            nats = divergence(expected, logits(Path(case["artifact"]), mx.array([case["ids"]])))
            problems = [] if nats < limit else [f"expected less than {limit:.1e}"]
            answers.tell(name, f"logits of {program}, KL {nats:.1e}", problems)
    return answers.close()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
