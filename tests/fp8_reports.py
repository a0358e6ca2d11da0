"""FP8 artifacts to report on, faults to plant in them, and reports made of errors by hand."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoints import Tensors, random_tensors, tiny_config, write_checkpoint
from qwen35.checkpoint.open import describe, fetch
from qwen35.codecs.fp8.error_sums import ErrorSums
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import Finding
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.fp8_report import Fp8Report, check_fp8
from qwen35.writing.write import write
from running import load_all

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
UP = f"{LAYER}.3.mlp.up_proj.weight"
DEVIATIONS = (0.002, 0.02, 0.2)
MODES = ("max", "search", "mse")


def make_source(folder: Path, deviation: float, *, tails: bool = False) -> Path:
    """Write a small checkpoint whose linear layers have this standard deviation."""
    config = tiny_config(layers=4)
    tensors = random_tensors(config)
    generator = torch.Generator().manual_seed(9)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and min(tensor.shape) >= 128 and "visual" not in name:
            values = torch.randn(tensor.shape, generator=generator)
            if tails:
                chi = torch.randn(4, *tensor.shape, generator=generator).square().sum(0)
                values = values / (chi / 4).sqrt()
            tensors[name] = (values * deviation).bfloat16()
    return write_checkpoint(folder, config, tensors, shards=2)


def packed(source: Path, out: Path, scale_choice: ScaleChoice) -> Path:
    plan = make_plan(fetch(str(source)), load_recipe("fp8"), scale_choice=scale_choice)
    return write(plan, out, threads=1).out


def report_on(
    out: Path, source: Path, scale_choice: ScaleChoice | None = None, **more: Any
) -> Fp8Report:
    artifact = describe(str(out), lenient=True)
    return check_fp8(artifact, fetch(str(source)), scale_choice or ScaleChoice(), threads=1, **more)


def edited(out: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    """Return a copy of an artifact with other tensors."""
    copy = Path(shutil.copytree(out, folder))
    tensors = load_all(copy)
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "qwen35.json").unlink()
    return copy


def scales(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        key = f"{QKV}_scale_inv"
        tensors[key] = change(tensors[key]).contiguous()

    return apply


def shuffle(tensors: Tensors) -> None:
    codes = tensors[QKV].view(torch.uint8).flatten()
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    tensors[QKV] = codes[order].reshape(tensors[QKV].shape).view(torch.float8_e4m3fn)


def transpose_codes(tensors: Tensors) -> None:
    tile = tensors[QKV].view(torch.uint8)[:128, :128].clone()
    tensors[QKV].view(torch.uint8)[:128, :128] = tile.T


def swap_tensors(tensors: Tensors) -> None:
    gate = UP.replace("up_proj", "gate_proj")
    for suffix in ("", "_scale_inv"):
        tensors[UP + suffix], tensors[gate + suffix] = tensors[gate + suffix], tensors[UP + suffix]


def one_code(tensors: Tensors) -> None:
    codes = tensors[QKV].view(torch.uint8)
    codes[77, 33] ^= 0x80 if codes[77, 33] & 0x70 else 0x40


FAULTS: dict[str, Callable[[Tensors], None]] = {
    "doubled scales": scales(lambda s: s * 2),
    "halved scales": scales(lambda s: s / 2),
    "one doubled scale": scales(lambda s: s * torch.tensor([[1, 1], [1, 1], [1, 2], [1, 1]])),
    "transposed scales": scales(lambda s: s.T.reshape(s.shape)),
    "scales shifted by a row": scales(lambda s: s.roll(1, 0)),
    "scales shifted by a column": scales(lambda s: s.roll(1, 1)),
    "zeroed scales": scales(torch.zeros_like),
    "scales of one": scales(torch.ones_like),
    "negated scales": scales(torch.neg),
    "scales that are inverses": scales(lambda s: 1 / s),
    "a scale that is NaN": scales(lambda s: s.index_fill(0, torch.tensor([1]), math.nan)),
    "a scale that is infinite": scales(lambda s: s.index_fill(0, torch.tensor([1]), math.inf)),
    "shuffled codes": shuffle,
    "codes of a tile transposed": transpose_codes,
    "two tensors swapped": swap_tensors,
    "one code": one_code,
}


def errors(relative: float, *, clipped: int = 0, misplaced: int = 0) -> ErrorSums:
    """Return errors at right angles to four weights of one."""
    return ErrorSums(
        count=4,
        squared=4 * relative**2,
        norm=4.0,
        decoded_norm=4.0 + 4 * relative**2,
        product=4.0,
        absolute=4 * relative,
        magnitude=4.0,
        worst=relative,
        largest=1.0,
        clipped=clipped,
        misplaced=misplaced,
    )


def report_of(mode: Any, found: dict[str, ErrorSums], *findings: Finding, **more: Any) -> Fp8Report:
    return Fp8Report(
        scale_choice=ScaleChoice(mode, **more),
        bands="derived",
        shards=3,
        packed=5,
        passthrough=7,
        identical=6,
        errors=found,
        findings=findings,
    )


SEARCH = "Switch to --calib-mode search: it never saturates and has the least error."
ASTRAY = "Codes and scales do not match each other or this source: convert again from the original."
