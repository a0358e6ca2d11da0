"""A GPU writes what the CPU writes; skipped without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from checkpoints import ASSET, make_checkpoint
from hessian_folders import write_hessians
from qwen35 import calibrate, convert, evaluate, verify
from qwen35.codecs.fp8.layout import ScaleMode
from qwen35.codecs.nf4.arrays import encode_blocks
from qwen35.codecs.nf4.torch import TorchEncoder
from qwen35.planning.gguf_files.imatrix import read_imatrix
from running import tree

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0, 1e-44, 1e-40, 1e-38, 1e-36, 1e-4, 0.02, 1e3, 1e37])
def test_torch_encodes_blocks_as_the_cpu_kernel_does(
    device: str, dtype: torch.dtype, scale: float
) -> None:
    """Zeros, subnormal numbers, which bitsandbytes on CUDA flushes to zero, and heavy tails."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2**16, generator=generator)
    weight[2**15 :] /= torch.rand(2**15, generator=generator) + 0.05
    weight = (weight * scale).to(dtype)
    weight[:64] = 0
    weight[~weight.isfinite()] = 0
    values = (weight.view(torch.uint16) if dtype == torch.bfloat16 else weight).numpy()
    found = []
    for encode in (encode_blocks, TorchEncoder(device)):
        absmax, packed = np.empty(2**10, np.float32), np.empty(2**15, np.uint8)
        assert encode(values, DTYPES[dtype], absmax, packed)
        found.append((absmax, packed))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


@needs_gpu
@pytest.mark.parametrize("recipe", ["nf4", "text-nf4", "fp8", "fp8-conservative", "text-fp8"])
@pytest.mark.parametrize("kind", ["embedded", "dense", "moe"])
def test_every_file_is_the_same(
    kind: str, recipe: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = ASSET if kind == "embedded" else request.getfixturevalue(kind)
    convert(source, tmp_path / "cpu", recipe=recipe, device="cpu")
    convert(source, tmp_path / "gpu", recipe=recipe, device="cuda")
    assert tree(tmp_path / "gpu") == tree(tmp_path / "cpu")


@needs_gpu
@pytest.mark.parametrize("mode", get_args(ScaleMode))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_scale_mode_gives_the_same_files(mode: ScaleMode, dtype: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", dtype=dtype)
    for device in ("cpu", "cuda:0"):
        convert(source, tmp_path / device, recipe="fp8", calib_mode=mode, device=device)
    assert tree(tmp_path / "cuda:0") == tree(tmp_path / "cpu")


@needs_gpu
@pytest.mark.parametrize("recipe", ["nf4", "fp8"])
def test_processes_with_a_gpu_give_the_same_files(recipe: str, tmp_path: Path) -> None:
    convert(ASSET, tmp_path / "cpu", recipe=recipe)
    convert(ASSET, tmp_path / "gpu", recipe=recipe, device="cuda", workers=2, threads=2)
    assert tree(tmp_path / "gpu") == tree(tmp_path / "cpu")


@needs_gpu
@pytest.mark.parametrize("recipe", ["fp8", "int4", "nf4", "nvfp4"])
@pytest.mark.parametrize("codes", ["refined", "refined+scales"])
def test_refined_codes_are_the_same(recipe: str, codes: str, tmp_path: Path) -> None:
    """Choosing them too is left to the GPU (`test_refined_torch.py` compares codes)."""
    source = make_checkpoint(tmp_path / "in")
    hessian = write_hessians(source, tmp_path / "statistics")
    for device in ("cpu", "cuda"):
        options: Any = {"recipe": recipe, "codes": codes, "hessian": hessian}
        convert(source, tmp_path / device, device=device, **options)
    assert tree(tmp_path / "cuda") == tree(tmp_path / "cpu")


@needs_gpu
def test_statistics_weigh_columns_on_a_gpu_too(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes((ASSET / "eval.txt").read_bytes()[:20_000])
    calibrate(ASSET, text=text, output=tmp_path / "statistics", chunks=4, device="cpu")
    statistics = tmp_path / "statistics" / "activation-stats.json"
    for mode in ("rms", "mse", "search"):
        options: dict[str, Any] = {"calib_mode": mode, "activation_stats": statistics}
        convert(ASSET, tmp_path / f"{mode}-cpu", recipe="fp8", **options)
        convert(ASSET, tmp_path / f"{mode}-gpu", recipe="fp8", device="cuda", **options)
        assert tree(tmp_path / f"{mode}-gpu") == tree(tmp_path / f"{mode}-cpu")


@needs_gpu
def test_a_gpu_measures_nearly_the_same_importance(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes((ASSET / "eval.txt").read_bytes()[:40_000])
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        calibrate(ASSET, text=text, output=out, chunks=8, device=device, dtype="float32")
        found.append(read_imatrix(out / "imatrix.gguf"))
    cpu, gpu = (matrix.entries for matrix in found)
    assert cpu.keys() == gpu.keys()
    for name, entry in cpu.items():
        there, here = entry.slice(0, entry.width), gpu[name].slice(0, entry.width)
        assert np.allclose(here, there, rtol=1e-3, atol=1e-4 * float(there.max())), name


@needs_gpu
def test_a_gpu_measures_nearly_the_same_divergence(tmp_path: Path) -> None:
    """FP8 is decoded as on a CPU: activations are not rounded, and no kernel is downloaded."""
    for recipe in ("nf4", "fp8"):
        convert(ASSET, tmp_path / recipe, recipe=recipe)
    candidates = [tmp_path / "nf4", tmp_path / "fp8"]
    reports = [
        evaluate(ASSET, candidates, text=ASSET / "eval.txt", chunks=2, device=device)
        for device in ("cpu", "cuda")
    ]
    for cpu, gpu in zip(reports[0].candidates, reports[1].candidates, strict=True):
        there, here = cpu.comparison.kld.value, gpu.comparison.kld.value
        assert abs(here - there) < 0.02 * there, (here, there)


@needs_gpu
@pytest.mark.parametrize("recipe", ["nf4", "fp8"])
def test_an_artifact_answers_where_there_is_a_gpu(recipe: str, tmp_path: Path) -> None:
    convert(ASSET, tmp_path / "out", recipe=recipe)
    report = verify(tmp_path / "out", source=ASSET, depth="behaviour")
    assert report.passed, report.findings
