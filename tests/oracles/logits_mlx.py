"""Load artifacts in mlx-vlm: logits as near to those of our decoded weights as float32 gives them.

PYTHONPATH=tests python tests/oracles/logits_mlx.py WORK

Not asked, as mlx-vlm 0.7.10 does not load them: mixed precision of compressed-tensors, INT4 with
zero points, GPTQ; and block FP8, which it quantizes again, to MXFP8.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_vlm.utils import load_model

from oracles.answers import Answers, divergence, read_cases

LIMIT = 1e-4
"""Largest mean KL divergence in nats; seen: 1e-5."""

SHARE = 0.25
"""The same with experts, as a share of that from the unquantized model; seen: 0.18.

Nearly all of it is in ten tokens at which a router hardly decides, and the decoded checkpoint in
mlx-vlm is almost as far from itself in transformers."""

UNREAD = ("-fp8", "-nvfp4-mixed", "-gptq", "-asym", "-asym-max")


def main(work: Path) -> int:
    """Ask about every artifact that it loads; 1 if one is too far."""
    answers = Answers(work, "mlx-vlm")
    for name, case in read_cases(work).items():
        if name.endswith(UNREAD):
            continue
        model = load_model(Path(case["artifact"]))
        model.set_dtype(mx.float32)
        found = np.array(model.language_model(mx.array([case["ids"]])).logits[0])
        nats = divergence(np.load(Path(case["decoded"], "logits.npy")), found)
        limit = SHARE * case["effect"] if name.startswith("moe-") else LIMIT
        problems = [] if nats < limit else [f"expected less than {limit:.1e}"]
        answers.tell(name, f"logits, KL {nats:.1e}", problems)
    return answers.close()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
