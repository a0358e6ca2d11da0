"""Compare FP8 conversion in all modes with `cp` and with plain PyTorch.

    python -m benchmarks.fp8 [--work DIR] [--size 0.8B|tiny] [--rounds 3]

Makes a random checkpoint with real shapes and measures processes, in turn: the conversion in each
mode, by one thread, and with the check of every tensor; `cp` and fsync of the output; the same
arithmetic written plainly in PyTorch. PyTorch searches scales for a sixteenth of the weights only:
all of them take minutes. The rest is estimated.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.measuring import (
    ASSET,
    QWEN35,
    Comparison,
    Cost,
    arguments,
    made,
    measure,
    report,
)

MODES = ("max", "rms", "search", "mse")
SHARE = 16
PLAIN = """
import sys, pathlib, torch
from safetensors import safe_open
from safetensors.torch import save_file
from qwen35.checkpoint.open import describe
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe

source, out, mode, share = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
steps = make_plan(describe(source), load_recipe("fp8")).steps
fp8 = [s.weight for s in steps if s.op == "fp8"]
chosen = {weight.name for i, weight in enumerate(fp8) if share and i % share == 0}

def tiles_of(tensor):
    rows, columns = tensor.shape
    whole = torch.nn.functional.pad(tensor.float(), (0, -columns % 128, 0, -rows % 128))
    return whole.reshape(whole.shape[0] // 128, 128, whole.shape[1] // 128, 128)

def scales(tiles, mode):
    largest = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-12)
    if mode == "max":
        return (largest / 448).bfloat16()
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
        if name in chosen:
            tensor = file.get_tensor(name)
            rows, columns = tensor.shape
            tiles = tiles_of(tensor)
            scale = scales(tiles, mode)
            q = (tiles / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            flat = q.reshape(-1, tiles.shape[2] * 128)
            tensors[name] = flat[:rows, :columns].contiguous()
            tensors[name + "_scale_inv"] = scale.reshape(scale.shape[0], scale.shape[2])
        elif share == 1:
            tensors[name] = file.get_tensor(name)
save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
"""
LABELS = {mode: f"`convert --recipe fp8 --calib-mode {mode}`" for mode in MODES}
ONE, CHECKED = f"{LABELS['search']}, one thread", f"{LABELS['search']}, every tensor checked"
COPY, PYTORCH, ESTIMATE, STARTED = (
    "`cp` and fsync of the FP8 output",
    "`max` in plain PyTorch",
    f"`mse` in plain PyTorch (from 1/{SHARE} of the weights)",
    "start-up of plain PyTorch",
)
COMPARISONS = (
    Comparison(LABELS["max"], PYTORCH, headline=True),
    Comparison(LABELS["mse"], ESTIMATE, ("wall", "cpu")),
    Comparison(LABELS["search"], ONE, ("wall",)),
    Comparison(LABELS["max"], COPY, ("wall", "cpu")),
    Comparison(CHECKED, LABELS["search"], ("wall", "cpu")),
)


def convert(source: Path, out: Path, mode: str, *flags: str) -> list[object]:
    """Return the command that converts with one mode."""
    given = ("--recipe", "fp8", "--calib-mode", mode, "--quiet", *flags)
    return [*QWEN35, "convert", source, out, *given]


def once(source: Path, work: Path) -> dict[str, Cost]:
    """Measure every route once."""
    ours, theirs, copy = work / "ours", work / "theirs", work / "copy"
    kept, unchecked = work / "fp8-kept" / "model.safetensors", "--skip-verify"

    def plain(mode: str, share: int) -> Cost:
        return measure([sys.executable, "-c", PLAIN, source, theirs, mode, share], theirs)

    costs = {
        "`convert` of the embedded checkpoint": measure(
            convert(ASSET, ours, "max", unchecked), ours
        ),
        COPY: measure(["sh", "-c", f"cp '{kept}' '{copy}' && sync '{copy}'"], copy),
    }
    for mode, label in LABELS.items():
        costs[label] = measure(convert(source, ours, mode, unchecked), ours)
    one = convert(source, ours, "search", unchecked, "--threads", "1")
    costs[ONE] = measure(one, ours)
    costs[CHECKED] = measure(convert(source, ours, "search"), ours)
    costs[PYTORCH] = plain("max", 1)
    costs[STARTED] = plain("mse", 0)
    costs[ESTIMATE] = plain("mse", SHARE).repeated(SHARE, costs[STARTED])
    for folder in (ours, theirs):
        shutil.rmtree(folder)
    copy.unlink()
    return costs


def main() -> None:
    args = arguments(__doc__)
    source, kept = made("checkpoint", args.size, args.work), args.work / "fp8-kept"
    measure(convert(source, kept, "max", "--skip-verify"), kept)  # warms all caches, too
    title = f"FP8, {source.name}"
    report(args, title, lambda: once(source, args.work), COMPARISONS)
    shutil.rmtree(kept)


if __name__ == "__main__":
    main()
