"""Make what tests/vllm/compare.py needs: an artifact of each kind, and its log-probabilities.

PYTHONPATH=tests python tests/vllm/references.py WORK

The references are transformers', in float32, with the weights as we decode them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from checkpoints import ASSET, random_tensors, tiny_config, write_checkpoint
from qwen35.cli.main import main as qwen35
from qwen35.codecs.nvfp4.arrays import encode_rows, whole_scale
from qwen35.engines.torch_model import TorchModel

LENGTH = 256
PASSAGES = 4
WINDOWS = 8
"""Of 512 tokens of the embedded text, for statistics of inputs."""

Passages = list[list[int]]


@dataclass(frozen=True)
class Artifact:
    """A checkpoint, and what vLLM on a CPU must make of it.

    Args:
        name: of its folder, and in the table.
        recipe: a built-in recipe; ``every`` and a codec, for all linear layers of the text model;
            or empty for the source itself.
        options: of the conversion.
        source: ``vision``, the embedded checkpoint; ``text``, that without its vision tower; or
            ``experts``, a random mixture of experts.
        statistics: whether the conversion needs those of inputs.
        rounds: whether servers quantize inputs as they run it; vLLM does on some CPUs.
        refused: a part of what vLLM says on CPUs where it cannot run it.
        fault: whether to untie global scales, which vLLM must answer for.
    """

    name: str
    recipe: str = ""
    options: tuple[str, ...] = ()
    source: str = "vision"
    statistics: bool = False
    rounds: bool = False
    refused: str = ""
    fault: bool = False


MODELOPT, GPTQ, W4A4 = ("--layout", "modelopt"), ("--layout", "gptq"), ("--activations",)

ARTIFACTS = (
    Artifact("bf16"),
    Artifact("fp8", "fp8", rounds=True, refused="AMX"),
    Artifact("fp8-conservative", "fp8-conservative", rounds=True, refused="AMX"),
    Artifact("fp8-channel", "fp8-channel", rounds=True),
    Artifact("int4", "int4"),
    Artifact("int4-g32", "every int4-g32"),
    Artifact("int4-asym", "every int4-asym"),
    Artifact("int4-g32-asym", "every int4-g32-asym"),
    Artifact("int4-text", "int4", source="text"),
    Artifact("int4-gptq", "int4", GPTQ),
    Artifact("int4-gptq-text", "int4", GPTQ, source="text"),
    Artifact("int4-gptq-every", "every int4-gptq"),
    Artifact("nvfp4", "nvfp4"),
    Artifact("nvfp4-modelopt", "nvfp4", MODELOPT),
    Artifact("nvfp4-text", "nvfp4", source="text"),
    Artifact("nvfp4-text-modelopt", "nvfp4", MODELOPT, source="text"),
    Artifact("nvfp4-a4", "nvfp4", W4A4, statistics=True, rounds=True),
    Artifact("nvfp4-a4-modelopt", "nvfp4", (*W4A4, *MODELOPT), statistics=True, rounds=True),
    Artifact("nvfp4-a4-text", "nvfp4", W4A4, source="text", statistics=True, rounds=True),
    Artifact("nvfp4-every", "every nvfp4"),
    Artifact("nvfp4-every-modelopt", "every nvfp4-modelopt"),
    Artifact("nvfp4-every-untied", "every nvfp4", fault=True),
    Artifact("nvfp4-mixed", "nvfp4-mixed", rounds=True),
    Artifact(
        "nvfp4-mixed-modelopt",
        "nvfp4-mixed",
        MODELOPT,
        statistics=True,
        rounds=True,
        refused="static_scaled_fp8_quant",
    ),
    Artifact("experts", source="experts"),
    Artifact("experts-int4", "int4", source="experts", refused="MoE backend"),
    Artifact("experts-fp8", "fp8", source="experts", rounds=True, refused="AMX"),
    Artifact(
        "experts-fp8-channel", "fp8-channel", source="experts", rounds=True, refused="MoE backend"
    ),
    Artifact("experts-nvfp4", "nvfp4", source="experts", refused="MoE backend"),
)

PLAIN = ("visual", "mtp", "linear_attn.in_proj_a", "linear_attn.in_proj_b")


def run(*arguments: object) -> None:
    """Run qwen35; end the program if it fails."""
    if code := qwen35([*map(str, arguments), "--quiet"]):
        sys.exit(code)


@cache
def source(kind: str, work: Path) -> Path:
    """Return the folder of a source; all but the embedded one are made."""
    if kind == "vision":
        return ASSET
    folder = work / kind
    if kind == "experts":
        config = tiny_config(moe=True, text_only=True) | {"vocab_size": 4096}  # the passages'
        return write_checkpoint(folder, config, random_tensors(config))
    run("convert", ASSET, folder, "--recipe", "text", "--overwrite")
    return folder


@cache
def statistics(kind: str, work: Path) -> Path:
    """Return the statistics of a source's inputs on the embedded text."""
    folder = work / f"{kind}-statistics"
    text = ("--text", ASSET / "eval.txt", "--chunks", WINDOWS)
    run("calibrate", source(kind, work), "--output", folder, *text, "--overwrite")
    return folder / "activation-stats.json"


def recipe_of(artifact: Artifact, work: Path) -> str:
    """Return a built-in recipe, or the file of one with a codec for every linear layer."""
    if not artifact.recipe.startswith("every "):
        return artifact.recipe
    codec = artifact.recipe.removeprefix("every ")
    rules = [*((role, "plain") for role in PLAIN), ("kind:linear", codec), ("*", "plain")]
    text = "".join(f'[[rules]]\nmatch = "{match}"\naction = "{do}"\n' for match, do in rules)
    path = work / f"every-{codec}.toml"
    path.write_text(f'format = "{codec}"\ndescription = "every linear layer"\n{text}')
    return str(path)


def make(artifact: Artifact, work: Path) -> Path:
    """Return the folder of an artifact, made."""
    origin, folder = source(artifact.source, work), work / artifact.name
    if not artifact.recipe:
        return origin
    options: list[object] = [*artifact.options]
    if artifact.statistics:
        options += ["--activation-stats", statistics(artifact.source, work)]
    recipe = recipe_of(artifact, work)
    run("convert", origin, folder, "--recipe", recipe, *options, "--overwrite")
    if artifact.fault:
        untie(folder)
    return folder


def untie(folder: Path) -> None:
    """Give in_proj_qkv and in_proj_z of each layer global scales of their own: the fault."""
    [path], [original] = folder.glob("*.safetensors"), ASSET.glob("*.safetensors")
    tensors, weights = load_file(path), load_file(original)
    for packed in [name for name in tensors if name.endswith("weight_packed")]:
        name = packed.removesuffix("_packed")
        if not name.endswith(("in_proj_qkv.weight", "in_proj_z.weight")):
            continue
        whole = whole_scale(float(weights[name].abs().max()))
        values = weights[name].view(torch.uint16).numpy()
        codes, scales = encode_rows(values, "BF16", whole, None, search=True)
        tensors[packed] = torch.from_numpy(codes)
        tensors[f"{name}_scale"] = torch.from_numpy(scales).view(torch.float8_e4m3fn)
        tensors[f"{name}_global_scale"] = torch.tensor([whole])
    save_file(tensors, path, metadata={"format": "pt"})


def log_probabilities(folder: Path, passages: Passages, *, inputs: bool) -> list[list[float]]:
    """Return the log-probability of each token but the first, after those before it.

    In float32, so that the difference is what vLLM's bfloat16 arithmetic leaves, and not that of
    two engines; if `inputs`, with the inputs of packed layers quantized.
    """
    model = TorchModel(folder, exact=True)
    result = []
    for ids in passages:
        logits = model.simulated_logits(ids) if inputs else model.logits(ids)
        logs = torch.from_numpy(logits).log_softmax(-1)
        result.append(logs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return result


def described(artifact: Artifact, passages: Passages, work: Path) -> dict[str, Any]:
    """Make an artifact; return what compare.py needs of it."""
    print(artifact.name, flush=True)
    folder = make(artifact, work)
    found: dict[str, Any] = {"name": artifact.name, "folder": str(folder)}
    found |= {"refused": artifact.refused, "fault": artifact.fault}
    found |= {"exact": log_probabilities(folder, passages, inputs=False)}
    if artifact.rounds:
        found |= {"rounded": log_probabilities(folder, passages, inputs=True)}
    return found


def main(work: Path) -> int:
    """Write all artifacts, and references.json."""
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    ids = tokenizer((ASSET / "eval.txt").read_text())["input_ids"]
    passages = [ids[i * 4096 : i * 4096 + LENGTH] for i in range(PASSAGES)]
    found = [described(artifact, passages, work) for artifact in ARTIFACTS]
    (work / "references.json").write_text(json.dumps({"passages": passages, "artifacts": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
