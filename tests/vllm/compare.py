"""Load what references.py made in vLLM and compare log-probabilities: compare.py WORK

Runs in an environment of its own, which has vLLM and not this package.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

LogProbabilities = list[list[float]]

EXACT = 0.0125
"""Largest mean difference where vLLM computes with the numbers of the reference.

vLLM computes in bfloat16 and transformers in float32, which makes 0.0082 of the unquantized
checkpoint; half as much more is for the luck of other weights. FP8, of which least is to be seen,
moves answers by 0.04.
"""

# Where inputs are quantized, the rounding of bfloat16 puts many on the other side of a bound
# between two codes. If vLLM's errors were independent of the simulation's, the two would be √2
# times as far apart as quantizing takes either; so far they may be.

FAULT = 0.1
"""Smallest mean difference that a planted fault must make, eight times what is allowed."""

SHOWN = 160
"""Characters of what vLLM says when it refuses."""

SETTINGS = {
    "VLLM_CPU_INT4_W4A8": "0",  # with AMX, INT4's inputs would be rounded to eight bits
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is where the kernel is
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def add_nvfp4_kernel() -> None:
    """Give vLLM a kernel for NVFP4: it has none for CPUs, but what its tests decode with.

    Modules take the function by name, so this comes before they are imported.
    """
    from torch.nn.functional import linear
    from vllm.model_executor.kernels import linear as kernels
    from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils as emulation

    class Decoding(kernels.EmulationNvFp4LinearKernel):  # type: ignore[misc]
        """Multiplies by decoded weights; by vLLM's emulation where inputs are quantized."""

        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            if hasattr(layer, "input_global_scale_inv"):
                return super().apply_weights(layer, x, bias)
            scales = (layer.weight_scale, layer.weight_global_scale)
            weight = emulation.dequantize_to_dtype(layer.weight, *scales, x.dtype, swizzle=False)
            return linear(x, weight, bias)

    def chosen(use_a16: bool = False) -> Any:
        return Decoding(kernels.NvFp4LinearLayerConfig())

    kernels.init_nvfp4_linear_kernel = chosen


def log_probabilities(folder: str, passages: list[list[int]]) -> LogProbabilities:
    """Return the log-probability of each token but the first, after those before it."""
    add_nvfp4_kernel()
    from vllm import LLM, SamplingParams

    model = LLM(
        model=folder,
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


def answered(folder: str, passages: list[list[int]]) -> LogProbabilities | str:
    """Return vLLM's log-probabilities in a process of their own; or why it gave none."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(log_probabilities, folder, passages).result()
        except Exception as error:  # noqa: BLE001 - vLLM's refusals have no class of their own
            return f"{type(error).__name__}: {error}"


def mean_difference(one: LogProbabilities, other: LogProbabilities) -> float:
    """Return the mean of absolute differences over all tokens."""
    differences = [
        abs(a - b)
        for passage in zip(one, other, strict=True)
        for a, b in zip(*passage, strict=True)
    ]
    return sum(differences) / len(differences)


def judged(artifact: Mapping[str, Any], answer: LogProbabilities | str) -> tuple[bool, str]:
    """Return whether vLLM did with an artifact what it should, and a line that says so."""
    if isinstance(answer, str):
        said = " ".join(answer.split())
        expected = bool(artifact["refused"]) and artifact["refused"] in said
        return expected, f"not run: vLLM on this CPU says {said[-SHOWN:] if expected else said!r}"
    found = mean_difference(answer, artifact["exact"])
    if artifact["fault"]:
        return found > FAULT, f"{found:.4f}, must be above {FAULT}: it is wrong on purpose"
    if found < EXACT or "rounded" not in artifact:
        return found < EXACT, f"{found:.4f}, must be below {EXACT}"
    found = mean_difference(answer, artifact["rounded"])
    limit = EXACT + math.sqrt(2) * mean_difference(artifact["rounded"], artifact["exact"])
    return found < limit, f"{found:.4f}, must be below {limit:.4f}: inputs are quantized too"


def main(work: Path) -> int:
    """Compare every artifact; 1 if one is not as it should be."""
    os.environ.update(SETTINGS)
    made = json.loads((work / "references.json").read_text())
    lines, failed = [], False
    for artifact in made["artifacts"]:
        right, line = judged(artifact, answered(artifact["folder"], made["passages"]))
        lines.append(f"{'ok    ' if right else 'FAILED'} {artifact['name']:<22} {line}")
        failed |= not right
        print(lines[-1], flush=True)
    print("\nmean difference of log-probabilities, vLLM to transformers", *lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
