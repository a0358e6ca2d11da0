"""Load what compressed-tensors stores in transformers: logits equal those of our decoded weights.

PYTHONPATH=tests python tests/oracles/logits_transformers.py WORK

Inputs are left as they are, so that weights alone are compared. Not asked:

- experts in NVFP4, which transformers 5.23 makes too large by the scale of the whole, silently
  (its integration decodes each expert without it);
- INT4 with zero points by the plain route, whose shapes the library does not expect; and mixed
  precision by the other, which decodes every module by the first group.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CompressedTensorsConfig,
)
from transformers.utils import logging

from oracles.answers import Answers, read_cases


def weights_only(artifact: Path, folder: Path) -> Path:
    """Copy an artifact with no inputs quantized."""
    copy = Path(shutil.copytree(artifact, folder, dirs_exist_ok=True))
    config = json.loads((copy / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def logits(folder: Path, ids: list[int], **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the logits in bfloat16, and what was said about loading."""
    text = "vision_config" not in json.loads((folder / "config.json").read_text())
    kind = AutoModelForCausalLM if text else AutoModelForImageTextToText
    model, told = kind.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, **options
    )
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float(), told


def differences(case: dict[str, Any], work: Path, **options: Any) -> Iterator[str]:
    """Yield what is missing, and the difference of logits, if any."""
    expected, _ = logits(Path(case["decoded"]), case["ids"])
    with_experts = weights_only(Path(case["artifact"]), work / "weights-only")
    found, told = logits(with_experts, case["ids"], **options)
    shutil.rmtree(with_experts)
    for keys in ("missing_keys", "mismatched_keys"):
        yield from (f"{keys}: {key}" for key in sorted(map(str, told[keys])))
    if not torch.equal(found, expected):
        yield f"logits differ by {(found - expected).abs().max().item()}"


def main(work: Path) -> int:
    """Ask about every artifact that transformers loads; 1 if one differs."""
    logging.set_verbosity_error()
    answers = Answers(work, "transformers")
    for name, case in read_cases(work).items():
        config = json.loads(Path(case["artifact"], "config.json").read_text())
        stored = config["quantization_config"]
        experts = "-nvfp4" in name and any(".experts." in weight for weight in case["packed"])
        if stored["quant_method"] != "compressed-tensors" or experts:
            continue
        mixed, zeros = len(stored["config_groups"]) > 1, "-asym" in name
        if not zeros:
            answers.tell(name, "logits", differences(case, work))
        if not mixed:
            options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
            answers.tell(name, "logits, dequantized", differences(case, work, **options))
    return answers.close()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
