"""Compare FP8 conversion in all modes with `cp` and with plain PyTorch, in one run.

    python benchmarks/fp8.py [--work DIR] [--sizes 0.8B 9B] [--runs 3]

Makes random checkpoints with real shapes and prints a table for the first size: `cp` and fsync of
the output, the conversion in each mode, the check afterwards, and the same arithmetic written
plainly in PyTorch as a baseline. Start-up is measured on the embedded checkpoint and subtracted
from the wall times where the table says so. Further sizes are converted once in each of two modes,
to measure memory. Only ratios within one run are meaningful.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.path[0] != str(ROOT):  # files in this folder would shadow libraries
    sys.path[0] = str(ROOT)

from benchmarks.nf4 import Cost, make_checkpoint, measure, median

TINY = ROOT / "assets" / "qwen3.5-tiny"
MODES = ("max", "rms", "search", "mse")
SHARE = 16
"""Plain PyTorch searches only one weight in this many: all of them take many minutes."""

PLAIN = """
import sys, pathlib, torch
from safetensors import safe_open
from safetensors.torch import save_file
from qwen35.checkpoint.open import describe
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe

source, out, mode, share = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
steps = make_plan(describe(source), load_recipe("fp8")).steps
chosen = {s.weight.name for i, s in enumerate(s for s in steps if s.op == "fp8") if i % share == 0}

def scales(tiles, mode):
    largest = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-12)
    if mode == "max":
        return (largest / 448).bfloat16()
    if mode == "rms":
        return (tiles.pow(2).mean(dim=(1, 3), keepdim=True).sqrt() * 3 / 448).bfloat16()
    best = torch.full_like(largest, float("inf"))
    chosen = (largest / 448).bfloat16()
    for alpha in torch.linspace(1, 0.5, 50):
        scale = (largest * alpha / 448).bfloat16()
        q = (tiles / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        loss = (q * scale.float() - tiles).pow(2).mean(dim=(1, 3), keepdim=True)
        chosen = torch.where(loss < best, scale, chosen)
        best = torch.minimum(loss, best)
    return chosen

out.mkdir()
tensors = {}
with safe_open(next(pathlib.Path(source).glob("*.safetensors")), "pt") as file:
    for name in file.keys():
        tensor = file.get_tensor(name)
        if name in chosen:
            rows, columns = tensor.shape
            tiles = tensor.float().reshape(rows // 128, 128, columns // 128, 128)
            scale = scales(tiles, mode)
            q = (tiles / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[name] = q.reshape(rows, columns)
            tensors[name + "_scale_inv"] = scale.reshape(rows // 128, columns // 128)
        elif share == 1:
            tensors[name] = tensor
save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
"""


def convert(source: Path, out: Path, mode: str, *flags: str) -> list[str]:
    """Return the command that converts with one mode."""
    return [
        *(sys.executable, "-m", "qwen35.cli.main", "convert", str(source), str(out)),
        *("--recipe", "fp8", "--calib-mode", mode, "--quiet", *flags),
    ]


def routes(source: Path, work: Path) -> dict[str, tuple[list[str], Path]]:
    """Return the routes to measure: command and output."""
    ours, copy = work / "fp8", work / "copy"
    model = ours / "model.safetensors"
    kept = work / "fp8-kept"
    plain = [sys.executable, "-c", PLAIN, str(source), str(work / "plain")]
    skip = "--skip-verify"
    return {
        "start-up (the embedded checkpoint)": (
            convert(TINY, work / "tiny", "max", skip),
            work / "tiny",
        ),
        **{mode: (convert(source, ours, mode, skip), ours) for mode in MODES},
        "search, one thread": (convert(source, ours, "search", skip, "--threads", "1"), ours),
        "search, every tensor checked": (convert(source, ours, "search"), ours),
        "cp and fsync of the output": (
            ["sh", "-c", f"cp {kept / model.name} {copy} && sync {copy}"],
            copy,
        ),
        "PyTorch max": ([*plain, "max", "1"], work / "plain"),
        "PyTorch rms": ([*plain, "rms", "1"], work / "plain"),
        f"PyTorch mse, 1/{SHARE} of the weights": ([*plain, "mse", str(SHARE)], work / "plain"),
    }


def compare(source: Path, work: Path, runs: int) -> dict[str, Cost]:
    """Measure all routes in turn, discard the first round, and return the medians."""
    kept = work / "fp8-kept"
    measure(convert(source, kept, "max", "--skip-verify"), kept)
    found = routes(source, work)
    costs: dict[str, list[Cost]] = {name: [] for name in found}
    for i in range(runs + 1):
        for name, (command, out) in found.items():
            if i == 0 and name.startswith("PyTorch"):
                continue  # the first round warms the page cache and the kernels' cache
            cost = measure(command, out)
            if i:
                costs[name].append(cost)
    return {name: median(seen) for name, seen in costs.items()}


def show(source: Path, costs: dict[str, Cost], runs: int) -> None:
    """Print the table and the ratios."""
    start = costs["start-up (the embedded checkpoint)"]
    copy, largest = costs["cp and fsync of the output"], costs["max"]
    print(f"\n{source.name}, median of {runs} runs; net: less start-up")
    print(
        f"{'':<40} {'wall s':>7} {'CPU s':>7} {'peak MB':>8} {'net s':>7} {'x cp':>6} {'x max':>6}"
    )
    for name, cost in costs.items():
        net = cost.wall - (0 if name.startswith(("cp", "start")) else start.wall)
        print(
            f"{name:<40} {cost.wall:>7.2f} {cost.cpu:>7.2f} {cost.memory:>8.0f} {net:>7.2f} "
            f"{net / copy.wall:>6.1f} {net / (largest.wall - start.wall):>6.1f}"
        )
    ours, theirs = costs["mse"].cpu - start.cpu, costs[f"PyTorch mse, 1/{SHARE} of the weights"].cpu
    print(f"CPU time of mse, PyTorch x {SHARE} / ours: {theirs * SHARE / ours:.0f}")
    print(f"CPU time of max, PyTorch / ours: {costs['PyTorch max'].cpu / largest.cpu:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--sizes", nargs="+", default=["0.8B", "9B"])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    source = make_checkpoint(args.sizes[0], args.work)
    costs = compare(source, args.work, args.runs)
    show(source, costs, args.runs)
    for size in args.sizes[1:]:
        source = make_checkpoint(size, args.work)
        for mode in ("search", "mse"):
            cost = measure(
                convert(source, args.work / "fp8", mode, "--skip-verify"), args.work / "fp8"
            )
            print(
                f"{source.name} {mode}: {cost.wall:.1f} s, {cost.memory:.0f} MB, "
                f"{cost.memory / costs[mode].memory:.2f} x the memory of {args.sizes[0]}"
            )
    for name in ("fp8", "fp8-kept", "plain", "tiny"):
        shutil.rmtree(args.work / name, ignore_errors=True)
    (args.work / "copy").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
