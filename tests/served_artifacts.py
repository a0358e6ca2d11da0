"""The embedded checkpoint and small experts in every format of servers and MLX, and their decoding.

`make test-oracles` asks other people's programs about these folders (tests/oracles). What they
decoded is golden: tests/golden/served.json, a hash of each weight.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from checkpoints import ASSET, Tensors
from gguf_models import make_variant
from qwen35.checkpoint.inventory import InventoryItem, inventory
from qwen35.checkpoint.source import Reader, open_folder
from qwen35.cli.main import main
from qwen35.codecs.registry import CODECS, codec_of, is_packed
from qwen35.tensors import TensorSpec

__all__ = ["BY_LARGEST", "GOLDEN", "SERVED", "Served", "decoded_weights", "make_source"]

GOLDEN = Path(__file__).parent / "golden" / "served.json"
_VARIANTS = {"moe": "moe", "head": "text"}
_KEPT = ("in_proj_a", "in_proj_b", "shared_expert_gate")


@dataclass(frozen=True)
class Served:
    """An artifact.

    Args:
        source: ``asset``, the embedded checkpoint; ``text``, that without its vision tower; with
            weights that are the same on every machine, ``moe``, a mixture of experts, and ``head``,
            a dense text model with an output head of its own.
        kind: a codec of the family's own files, for all linear layers and experts of the text
            model; else a recipe.
        options: of the conversion.
        inputs: whether the conversion takes statistics of inputs.
    """

    source: str
    kind: str
    options: tuple[str, ...] = ()
    inputs: bool = False

    @property
    def name(self) -> str:
        """Its name, also of its folder."""
        options = [option for option in self.options if not option.startswith("--")]
        return "-".join((self.source, self.kind, *options))

    def make(self, work: Path) -> Path:
        """Convert into ``WORK/NAME``."""
        source, out = make_source(self.source, work), work / self.name
        recipe = self.kind
        if self.kind in CODECS and not CODECS[self.kind].dialect:
            recipe = str(_recipe(self.kind, source, work))
        stats = ["--activation-stats", str(_statistics(source, work))] if self.inputs else []
        command = ["convert", str(source), str(out), "--recipe", recipe, "--quiet"]
        assert main([*command, *self.options, *stats, "--threads", "1"]) == 0
        return out


_LARGEST = ("--calib-mode", "max")
_MODELOPT = ("--layout", "modelopt")
SERVED = {
    one.name: one
    for one in (
        Served("asset", "nvfp4"),
        Served("asset", "nvfp4-a4", inputs=True),
        Served("asset", "nvfp4-mixed"),
        Served("asset", "int4"),
        Served("asset", "int4-g32"),
        Served("asset", "int4-asym"),
        Served("asset", "int4-g32-asym"),
        Served("asset", "nvfp4", _LARGEST),
        Served("asset", "int4", _LARGEST),
        Served("asset", "int4-g32-asym", _LARGEST),
        Served("asset", "fp8-channel"),
        Served("asset", "fp8"),
        Served("asset", "nvfp4-modelopt"),
        Served("asset", "nvfp4-modelopt", _LARGEST),
        Served("asset", "nvfp4-a4-modelopt", inputs=True),
        Served("asset", "nvfp4-mixed", _MODELOPT, inputs=True),
        Served("asset", "int4-gptq"),
        Served("asset", "int4-g32-gptq"),
        Served("text", "nvfp4"),
        Served("text", "nvfp4-modelopt"),
        Served("text", "int4"),
        Served("moe", "nvfp4"),
        Served("moe", "nvfp4-mixed"),
        Served("moe", "nvfp4-experts"),
        Served("moe", "int4"),
        Served("moe", "fp8-channel"),
        Served("moe", "nvfp4-modelopt"),
        Served("moe", "nvfp4-mixed", _MODELOPT, inputs=True),
        Served("moe", "int4-gptq"),
        Served("head", "nvfp4-mixed"),
        Served("head", "nvfp4-mixed", _MODELOPT, inputs=True),
        Served("asset", "mlx-4bit"),
        Served("asset", "mlx-8bit"),
        Served("asset", "mlx-mxfp4"),
        Served("asset", "mlx-nvfp4"),
        Served("text", "mlx-4bit"),
        Served("moe", "mlx-4bit"),
        Served("head", "mlx-nvfp4"),
    )
}
"""By name."""

BY_LARGEST = {name for name in SERVED if name.endswith("-max")} | {"asset-fp8-channel"}
"""Those whose scales are those of the largest magnitudes, as libraries choose them."""


def make_source(source: str, work: Path) -> Path:
    """Return the folder of a source, which is made in `work` once."""
    if source == "asset":
        return ASSET
    if source in _VARIANTS:
        variant = _VARIANTS[source]
        folder = work / f"Tiny-{variant}-1B"
        return folder if folder.exists() else make_variant(work, variant)
    folder = work / "text"
    if not folder.exists():
        assert main(["convert", str(ASSET), str(folder), "--recipe", "text", "--quiet"]) == 0
    return folder


def _layers(source: Path) -> list[InventoryItem]:
    """Return the linear layers and experts of the text model."""
    return [
        item
        for item in inventory(open_folder(source))
        if item.role.info.kind in ("linear", "experts")
        and item.role.scope == "text"
        and not item.role.name.endswith(_KEPT)
    ]


def _recipe(kind: str, source: Path, work: Path) -> Path:
    """Write a recipe that packs all layers in one format."""
    rows = [(role, kind) for role in sorted({item.role.name for item in _layers(source)})]
    rules = [f'[[rules]]\nmatch = "{m}"\naction = "{a}"\n' for m, a in (*rows, ("*", "plain"))]
    path = work / f"{source.name}-{kind}.toml"
    path.write_text(f'format = "{kind}"\n' + "".join(rules))
    return path


def _statistics(source: Path, work: Path) -> Path:
    """Write statistics in which all inputs are as large, so that they weigh nothing."""
    layers = _layers(source)
    table = {i.spec.name: {"input_channel_max": [2.0] * i.spec.shape[-1]} for i in layers}
    path = work / f"{source.name}-stats.json"
    path.write_text(json.dumps(table))
    return path


def decoded_weights(artifact: Path) -> Tensors:
    """Return the packed weights of an artifact as we decode them, in float32."""
    checkpoint = open_folder(artifact)
    found = {}
    with Reader(checkpoint) as reader:
        for item in inventory(checkpoint):
            if is_packed(item.weight):
                spec = TensorSpec(item.spec.name, "F32", item.spec.shape)
                values = np.empty(spec.numel, np.float32)
                codec_of(item.weight).open(reader, item.weight, spec).read_into(0, values)
                found[spec.name] = torch.from_numpy(values).reshape(spec.shape)
    return found
