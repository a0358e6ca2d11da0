"""Compare conversion on a GPU with the CPU, in one run: bytes and time.

    python -m benchmarks.cuda [--work DIR] [--sizes 0.8B 4B] [--runs 2] [--device cuda]

Measures the kernels alone, on a matrix that is on the GPU already, and refined codes of a piece of
a weight, on one core and on the GPU. Then it writes random
checkpoints with real shapes and converts them on both, without the check of FP8: wall time, input
per second, whether every file is the same. The embedded checkpoint shows the start-up time (with a
GPU: importing torch), and is written with refined codes too. Sizes after the first are converted
once, with two recipes. Only ratios within one run are meaningful; the machine is printed with them.
NF4 of bitsandbytes on the GPU is compared with ours if it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.code_costs import EVEN, curvature_of, first_row, grid_of, weights_of
from benchmarks.measuring import ASSET, QWEN35, measure
from benchmarks.models import make_checkpoint
from qwen35 import calibrate
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.codecs.fp8.triton import TritonEncoder
from qwen35.codecs.nf4.arrays import AbsmaxStatistics, encode_blocks
from qwen35.codecs.nf4.torch import TorchEncoder
from qwen35.codecs.pieces import PIECE
from qwen35.codecs.refining import refined_codes
from qwen35.codecs.refining_torch import PIECES, TorchRefining

ROUTES = {
    "nf4": ("nf4",),
    **{
        f"fp8, {mode}": ("fp8", "--calib-mode", mode, "--skip-verify")
        for mode in ("max", "rms", "percentile", "mse", "search")
    },
}
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
SIDE = 8192
"""Rows and columns of the matrix that kernels are measured on."""

LARGER = {name: ROUTES[name] for name in ("nf4", "fp8, search")}
"""Routes for the sizes after the first."""

WIDTHS = (1024, 2048, 4096)
"""Columns of a weight whose codes are refined."""


def convert(source: Path, out: Path, device: str, recipe: str, *flags: str) -> list[object]:
    """Return the command that converts on one device."""
    given = ("--quiet", "--recipe", recipe, "--device", device, *flags)
    return [*QWEN35, "convert", source, out, *given]


def hashes(folder: Path) -> dict[str, Any]:
    """Return the manifest's sizes and hashes of all files."""
    files: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    return files


def row(
    name: str, route: tuple[str, ...], source: Path, work: Path, device: str, runs: int
) -> None:
    """Print the times of one route on both devices, and whether the bytes are the same."""
    recipe, *flags = route
    size = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9
    walls = []
    for place in ("cpu", device):
        command = convert(source, work / place, place, recipe, *flags)
        seen = [measure(command, work / place).wall for _ in range(runs + 1)]
        walls.append(median(seen[1:] or seen))  # the first warms caches, and compiles
    here, there = walls
    same = hashes(work / "cpu") == hashes(work / device)
    print(
        f"{name:<16} {here:>7.2f} {size / here:>6.2f} {there:>7.2f} {size / there:>6.2f} "
        f"{there / here:>8.2f}  {'the same' if same else 'DIFFERENT'}",
        flush=True,
    )


def compare(
    source: Path, routes: Mapping[str, tuple[str, ...]], work: Path, device: str, runs: int
) -> None:
    """Print the table of one checkpoint."""
    size = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9
    print(f"\n{source.name}, {size:.2f} GB of bf16, {runs or 1} runs")
    print(
        f"{'median wall time':<16} {'CPU s':>7} {'GB/s':>6} {'GPU s':>7} {'GB/s':>6} {'x CPU':>8}"
    )
    for name, route in routes.items():
        row(name, route, source, work, device, runs)
    for place in ("cpu", device):
        shutil.rmtree(work / place, ignore_errors=True)


def seconds(call: Callable[[], Any], device: str, runs: int = 10) -> float:
    """Return the median time of a call, including the work that it starts on the device."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    found = []
    for _ in range(runs + 2):
        wait()
        started = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - started)
    return sorted(found[2:])[runs // 2]


def kernels(device: str, side: int) -> None:
    """Print the times of the kernels alone."""
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.randn(side, side, generator=generator) * 0.02).bfloat16().to(device)
    columns = torch.ones(side, device=device)
    size = tensor.numel() * tensor.element_size() / 1e9
    print(f"\nkernels alone, [{side}, {side}] bf16 on the device\n{'':<16} {'ms':>8} {'GB/s':>8}")
    nf4, fp8 = TorchEncoder(device), TritonEncoder(device)
    calls: dict[str, Callable[[], Any]] = {"nf4": lambda: nf4.encode(tensor.reshape(-1))}
    for name, (_, *flags) in list(ROUTES.items())[1:]:
        scale_choice = ScaleChoice(flags[1])  # type: ignore[arg-type]
        calls[name] = lambda c=scale_choice: fp8.encode(tensor, c, columns)  # type: ignore[misc]
    for name, call in calls.items():
        taken = seconds(call, device)
        print(f"{name:<16} {taken * 1e3:>8.2f} {size / taken:>8.1f}", flush=True)


def refining(device: str, widths: Sequence[int] = WIDTHS, numbers: int = PIECES * PIECE) -> None:
    """Print the times of refining one piece of a weight to 16 levels, and if codes are the same."""
    print(f"\nrefined codes of {numbers} weights\n{'columns':<16} {'CPU ns':>8} {'GPU ns':>8}")
    own = TorchRefining(device)
    for columns in widths:
        curvature, weights = curvature_of(columns), weights_of(numbers // columns, columns)
        grid = grid_of(weights, EVEN, 32)
        found, times = [], []
        for function in (refined_codes, own.refined_codes):
            function(weights[:1], first_row(grid), curvature)  # compiles, and sends the curvature
            started = time.perf_counter()
            found.append(function(weights, grid, curvature))
            times.append((time.perf_counter() - started) / weights.size * 1e9)
        same = "the same" if np.array_equal(found[0], found[1]) else "DIFFERENT"
        print(f"{columns:<16} {times[0]:>8.0f} {times[1]:>8.0f}  {same}", flush=True)


def with_refined_codes(work: Path) -> dict[str, tuple[str, ...]]:
    """Return routes for the embedded checkpoint; calibrates it on some of its text."""
    statistics, text = work / "statistics", work / "text"
    text.write_bytes((ASSET / "eval.txt").read_bytes()[:100_000])
    calibrate(ASSET, text=text, output=statistics, hessian=True, device="cpu", overwrite=True)
    flags = ("--codes", "refined", "--hessian", str(statistics))
    return {**LARGER, **{f"{name}, refined": (name, *flags) for name in ("nf4", "int4")}}


def random_weights(kind: str) -> torch.Tensor:
    """Return [4096, 4096] float32."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4096, 4096, generator=generator) * 0.02
    if kind == "tails":
        weights /= (torch.randn(4, 4096, 4096, generator=generator).square().sum(0) / 4).sqrt()
    if kind == "zeros":
        weights[:2048] = 0
    return weights * 1e-38 if kind == "subnormal" else weights


def against_bitsandbytes(device: str) -> None:
    """Print how many bytes of NF4 differ from those of bitsandbytes on the device."""
    from bitsandbytes.functional import quantize_4bit

    print(f"\nNF4 and bitsandbytes {version('bitsandbytes')}: bytes that differ")
    print(f"{'':<16} {'packed':>9} of 8388608 {'scales':>9} of 262144")
    for kind in ("normal", "tails", "zeros", "subnormal"):
        for dtype, name in DTYPES.items():
            weights = random_weights(kind).to(dtype)
            values = weights.view(torch.uint16) if dtype == torch.bfloat16 else weights
            absmax, packed = np.empty(2**18, np.float32), np.empty(2**23, np.uint8)
            assert encode_blocks(values.numpy().reshape(-1), name, absmax, packed)
            theirs, state = quantize_4bit(
                weights.to(device), blocksize=64, quant_type="nf4", compress_statistics=True
            )
            scales = AbsmaxStatistics.of(absmax, float(state.offset)).codes
            codes = int((theirs.cpu().numpy().reshape(-1) != packed).sum())
            others = int((state.absmax.cpu().numpy() != scales).sum())
            print(f"{kind + ', ' + name:<16} {codes:>9} {'':<10} {others:>9}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--sizes", nargs="*", default=["0.8B", "4B"])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--side", type=int, default=SIDE)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    if args.device.startswith("cuda"):
        print(f"{torch.cuda.get_device_name(args.device)}, CUDA {torch.version.cuda}")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "numba", "numpy")))
    kernels(args.device, args.side)
    refining(args.device)
    if find_spec("bitsandbytes"):
        against_bitsandbytes(args.device)
    compare(ASSET, with_refined_codes(args.work), args.work, args.device, args.runs)
    for i, size in enumerate(args.sizes):
        source = make_checkpoint(size, args.work)
        routes, runs = (LARGER, 0) if i else (ROUTES, args.runs)
        compare(source, routes, args.work, args.device, runs)


if __name__ == "__main__":
    main()
