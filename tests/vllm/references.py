"""Make what tests/vllm/compare.py needs: FP8 of the embedded checkpoint, and its log-probabilities.

python tests/vllm/references.py WORK
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from qwen35.cli.main import main as qwen35

ASSET = Path(__file__).parents[2] / "assets" / "qwen3.5-tiny"
LENGTH = 256
PASSAGES = 4


def log_probabilities(folder: Path, passages: list[list[int]]) -> list[list[float]]:
    """Return the log-probability of each token but the first, after those before it.

    In float32, so that the difference is what vLLM's bfloat16 arithmetic leaves, and not that of
    two engines.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).float()
    result = []
    for ids in passages:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].float()
        chosen = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
        result.append(chosen[:, 0].tolist())
    return result


def main(work: Path) -> int:
    """Write both folders' references."""
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    ids = tokenizer((ASSET / "eval.txt").read_text())["input_ids"]
    passages = [ids[i * 4096 : i * 4096 + LENGTH] for i in range(PASSAGES)]
    references = {}
    for recipe in ("fp8", "fp8-conservative"):
        folder = work / recipe
        code = qwen35(["convert", str(ASSET), str(folder), "--recipe", recipe, "--overwrite"])
        if code:
            return code
        references[recipe] = log_probabilities(folder, passages)
    references["bf16"] = log_probabilities(ASSET, passages)
    found = {"asset": str(ASSET), "passages": passages, "references": references}
    (work / "references.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
