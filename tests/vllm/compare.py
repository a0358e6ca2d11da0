"""Load what references.py made in vLLM and compare log-probabilities: compare.py WORK

Runs in an environment of its own, which has vLLM and not this package.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

LIMIT = 0.01
"""Largest mean difference of log-probabilities, vLLM in bfloat16 to transformers in float32."""


def missing_feature() -> str:
    """Say what this processor lacks for FP8 in vLLM's CPU build, if anything."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "" if "amx_tile" in flags else "AMX"


def log_probabilities(folder: Path, passages: list[list[int]]) -> list[list[float]]:
    """Return the log-probability of each token but the first, after those before it."""
    from vllm import LLM, SamplingParams

    model = LLM(
        model=str(folder),
        dtype="bfloat16",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=1024,
        limit_mm_per_prompt={"image": 0, "video": 0},
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in passages], sampling)
    return [
        [
            found[token].logprob
            for token, found in zip(ids[1:], out.prompt_logprobs[1:], strict=True)
        ]
        for ids, out in zip(passages, outputs, strict=True)
    ]


def main(work: Path) -> int:
    """Compare every folder; 1 if one differs by more than `LIMIT`."""
    made = json.loads((work / "references.json").read_text())
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    lacks = missing_feature()
    folders = {name: work / name for name in made["references"] if name != "bf16"}
    if lacks:
        print(f"skipped: FP8 in vLLM on a CPU needs {lacks}, which this processor has not")
        folders = {}
    failed = False
    for name, folder in {"bf16": Path(made["asset"]), **folders}.items():
        ours = log_probabilities(folder, made["passages"])
        pairs = [
            pair
            for passage in zip(ours, made["references"][name], strict=True)
            for pair in zip(*passage, strict=True)
        ]
        mean = sum(abs(a - b) for a, b in pairs) / len(pairs)
        verdict = "ok" if mean < LIMIT else f"FAILED, expected less than {LIMIT}"
        print(
            f"{name}: {len(pairs)} tokens, mean difference to transformers {mean:.5f} ({verdict})"
        )
        failed |= not mean < LIMIT
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
