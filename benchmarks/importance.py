"""The benefit of calibration, on the embedded checkpoint.

    python -m benchmarks.importance [--work DIR] [--llama-imatrix PATH] [--windows N]

Its held-out text is split in two, one part for calibration and one for evaluation. Q4_K_M files
without an importance matrix, with ours, and with one from upstream's llama-imatrix on the same text
(if that program is given) are compared with the F32 file by Kullback-Leibler divergence, all in
llama.cpp; FP8 by `search` without statistics, with largest magnitudes and with mean squares, in
transformers. Differences are paired, token by token, with the standard error of their mean.
benchmarks/calibrate.py measures the cost.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measuring import ASSET
from qwen35.calibration.calibration_plan import CalibrationRequest, make_plan
from qwen35.calibration.calibration_run import calibrate
from qwen35.calibration.text_windows import TextWindows, read_text
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.source import Reader, open_folder
from qwen35.codecs.registry import codec_of
from qwen35.engines.llama import Llama
from qwen35.planning.activations import load_activations
from qwen35.planning.gguf_files.imatrix import Imatrix, read_imatrix
from qwen35.planning.output_plan import make_plan as make_artifact_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write

CONTEXT = 512
SHARE = 0.4
"""Share of the held-out text used for calibration."""

F64 = npt.NDArray[np.float64]


def divergence(base: npt.NDArray[Any], other: npt.NDArray[Any]) -> F64:
    """Return KL(base || other) at each position, in nats; logits are [tokens, vocabulary]."""

    def log_softmax(logits: npt.NDArray[Any]) -> F64:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        result: F64 = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return result

    p, q = log_softmax(base), log_softmax(other)
    result: F64 = (np.exp(p) * (p - q)).sum(-1)
    return result


@dataclass(frozen=True)
class Halves:
    """The two parts of the held-out text: a file to calibrate on, token windows to evaluate on."""

    calibration: Path
    evaluation: TextWindows


def halves(work: Path, windows: int | None) -> Halves:
    """Split the held-out text at the end of a line."""
    text = (ASSET / "eval.txt").read_text()
    cut = text.index("\n", int(len(text) * SHARE)) + 1
    paths = work / "calibration.txt", work / "evaluation.txt"
    for path, part in zip(paths, (text[:cut], text[cut:]), strict=True):
        path.write_text(part)
    evaluation = read_text(open_folder(ASSET), [paths[1]], context=CONTEXT, windows=windows)
    return Halves(paths[0], evaluation)


def quantized(work: Path, name: str, imatrix: Imatrix | None, *types: str) -> dict[str, Path]:
    """Write GGUF files of the embedded checkpoint; return them by type."""
    out = work / f"gguf-{name}"
    recipe = load_recipe("mix", "gguf")
    plan = make_artifact_plan(open_folder(ASSET), recipe, types=types, imatrix=imatrix)
    write(plan, out, overwrite=True)
    return {kind: out / file.name for kind, file in zip(types, plan.files, strict=True)}


def logits_of(path: Path, text: TextWindows) -> list[npt.NDArray[np.float32]]:
    """Return llama.cpp's logits on every window."""
    with Llama(path, context=text.context, threads=os.cpu_count() or 1) as model:
        return [model.logits(window.tolist()) for window in text.windows]


def upstream(program: Path, base: Path, text: Path, out: Path) -> Path:
    """Run llama-imatrix over a text, without kernels that fail on some processors."""
    command = [program, "-m", base, "-f", text, "-o", out, "-c", str(CONTEXT)]
    more = ["--no-ppl", "--no-repack", "-ngl", "0", "-t", str(os.cpu_count() or 1)]
    subprocess.run([*map(str, command), *more], check=True, capture_output=True)
    return out


def read_by_upstream(program: Path, base: Path, files: Path, work: Path) -> None:
    """Have llama-imatrix load and save both forms of our file, and check the values."""
    ours = read_imatrix(files / "imatrix.gguf")
    for form in ("gguf", "dat"):
        out = work / f"resaved-{form}.gguf"
        command = [program, "-m", base, "--in-file", files / f"imatrix.{form}", "-o", out]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        again = read_imatrix(out)
        assert again.entries.keys() == ours.entries.keys()
        same = [np.allclose(e.values, again.entries[n].values) for n, e in ours.entries.items()]
        assert all(same)
        print(f"llama-imatrix reads our imatrix.{form}: {len(same)} of {len(same)} entries alike")


def show(title: str, found: Mapping[str, F64], first: str) -> None:
    """Print mean divergences, and each row's difference from the row `first`."""
    print(f"\n{title}")
    print(f"{'':<44} {'mean KLD':>10} {'+-':>9} {'99.9 %':>8} {'difference':>11} {'+-':>9}")
    for name, values in found.items():
        paired = values - found[first]
        error, apart = (float(v.std() / np.sqrt(len(v))) for v in (values, paired))
        print(
            f"{name:<44} {values.mean():>10.6f} {error:>9.6f} "
            f"{np.quantile(values, 0.999):>8.4f} {paired.mean():>+11.6f} {apart:>9.6f}"
        )


def k_quants(work: Path, parts: Halves, program: Path | None, files: Path) -> None:
    """Compare importance matrices by the divergence of Q4_K_M."""
    base = quantized(work, "base", None, "F32")["F32"]
    ours = read_imatrix(files / "imatrix.gguf")
    trunk = {n: e for n, e in ours.entries.items() if n != "token_embd.weight"}
    matrices: dict[str, Imatrix | None] = {
        "without an importance matrix": None,
        "ours": ours,
        "ours, but for the tied head": replace(ours, entries=trunk),
    }
    if program is not None:
        theirs = upstream(program, base, parts.calibration, work / "upstream.gguf")
        matrices["llama-imatrix's"] = read_imatrix(theirs)
        read_by_upstream(program, base, files, work)
    reference = logits_of(base, parts.evaluation)
    found = {}
    for i, (name, matrix) in enumerate(matrices.items()):
        path = quantized(work, str(i), matrix, "Q4_K_M")["Q4_K_M"]
        pairs = zip(reference, logits_of(path, parts.evaluation), strict=True)
        found[name] = np.concatenate([divergence(a, b) for a, b in pairs])
    show(f"Q4_K_M against F32, {parts.evaluation.tokens} tokens", found, "ours")


def fp8(work: Path, parts: Halves, files: Path) -> None:
    """Compare statistics by the divergence of FP8, decoded exactly."""
    import torch
    import transformers

    kind = transformers.AutoModelForImageTextToText
    model = kind.from_pretrained(ASSET, dtype=torch.float32).eval()
    original = {name: value.clone() for name, value in model.state_dict().items()}
    windows = torch.from_numpy(parts.evaluation.windows).long()

    def logits() -> list[npt.NDArray[np.float32]]:
        with torch.inference_mode():
            return [model(input_ids=window[None]).logits[0].numpy() for window in windows]

    statistics = load_activations(files / "activation-stats.json")
    choices = {
        "search, columns alike": None,
        "search, weighed by largest magnitudes": replace(statistics, squares={}),
        "search, weighed by mean squares": statistics,
    }
    reference, found = logits(), {}
    for i, (name, activations) in enumerate(choices.items()):
        out = work / f"fp8-{i}"
        plan = make_artifact_plan(open_folder(ASSET), load_recipe("fp8"), activations=activations)
        write(plan, out, overwrite=True)
        checkpoint = open_folder(out)
        with Reader(checkpoint) as reader:
            for item in inventory(checkpoint):
                if item.weight.storage == "fp8" and item.role.scope != "mtp":
                    spec = replace(item.spec, dtype="F32")
                    values = np.empty(spec.numel, np.float32)
                    codec_of(item.weight).open(reader, item.weight, spec).read_into(0, values)
                    target = model.get_parameter(item.spec.name)
                    target.data.copy_(torch.from_numpy(values).view(target.shape))
        pairs = zip(reference, logits(), strict=True)
        found[name] = np.concatenate([divergence(a, b) for a, b in pairs])
        model.load_state_dict(original)
    show(f"FP8 against bf16, {parts.evaluation.tokens} tokens", found, "search, columns alike")


def quality(work: Path, program: Path | None, windows: int | None) -> None:
    """Calibrate the embedded checkpoint and measure the gain."""
    parts = halves(work, windows)
    checkpoint = open_folder(ASSET)
    text = read_text(checkpoint, [parts.calibration], context=CONTEXT)
    plan = make_plan(checkpoint, text, CalibrationRequest(dtype="float32", legacy=True))
    files = calibrate(plan, work / "calibrated", overwrite=True).result.out
    print(f"calibrated on {text.tokens} tokens, evaluated on {parts.evaluation.tokens} others")
    k_quants(work, parts, program, files)
    fp8(work, parts, files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--llama-imatrix", type=Path, metavar="PATH")
    parser.add_argument("--windows", type=int, help="to evaluate on (default: all)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    quality(args.work, args.llama_imatrix, args.windows)


if __name__ == "__main__":
    main()
