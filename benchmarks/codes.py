"""Refined codes against plain ones in files of the same size.

    python -m benchmarks.codes [--work DIR] [--model DIR] [--text FILE] [--windows N]
                               [--chunks N] [--only NAME ...] [--json FILE]

A part of the text calibrates (importance matrix, statistics, Hessians), the rest measures. Each
format is written twice, with nearest codes and with refined ones, and all artifacts are compared
with the original layer by layer in float32: weights alone, and with inputs as engines round them.
Differences are paired, chunk by chunk; their errors are those of the jackknife over
chunks. The CPU time is that of writing, less that of plain codes.

The embedded checkpoint is measured by default. `python assets/train/larger.py --out DIR` trains a
larger one: then --model DIR --text DIR/eval.txt.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import qwen35
from benchmarks.measuring import ASSET, environment
from qwen35.array_types import F64
from qwen35.evaluation.chunk_sweep import sweep
from qwen35.evaluation.divergence import Series
from qwen35.evaluation.evaluation_job import EvaluationRequest, prepare
from qwen35.planning.refinement import refined_targets

SHARE = 0.4
"""The part of the text that calibrates."""

GGUF = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
PACKED = {"NF4": "nf4", "FP8": "fp8", "NVFP4": "nvfp4", "INT4": "int4"}
WITH_STATISTICS = ("FP8", "NVFP4", "INT4")


@dataclass(frozen=True)
class Written:
    """An artifact.

    Args:
        path: of the folder or GGUF file.
        nbytes: of its weights' files.
        seconds: of CPU time that writing it took.
        weights: number of weights with refined codes.
    """

    path: Path
    nbytes: int
    seconds: float
    weights: int


def split(text: Path, work: Path) -> tuple[Path, Path]:
    """Split a text at the end of a line into one to calibrate on and one to measure on."""
    content = text.read_text("utf-8")
    cut = content.index("\n", int(len(content) * SHARE)) + 1
    paths = work / "calibration.txt", work / "evaluation.txt"
    for path, part in zip(paths, (content[:cut], content[cut:]), strict=True):
        path.write_text(part, "utf-8")
    return paths


def written(name: str, model: Path, work: Path, calibrated: Path, codes: str) -> Written:
    """Write a format with one kind of codes."""
    out = work / f"{name}-{codes}"
    hessian = calibrated if codes != "plain" else None
    how: dict[str, Any] = {"codes": codes, "hessian": hessian, "overwrite": True}
    started = time.process_time()
    if name in GGUF:
        result = qwen35.gguf(model, out, types=name, imatrix=calibrated, mtp="drop", **how)
    else:
        statistics = calibrated / "activation-stats.json" if name in WITH_STATISTICS else None
        how |= {"activation_stats": statistics, "skip_verify": name == "FP8"}
        result = qwen35.convert(model, out, recipe=PACKED[name], **how)
    seconds = time.process_time() - started
    names = [file.name for file in result.plan.files]
    pairs = refined_targets(result.plan)
    weights = sum(len(s.rows.slabs) * s.rows.count * s.rows.row for s, _ in pairs)
    path = out / names[0] if name in GGUF else out
    return Written(path, sum((out / n).stat().st_size for n in names), seconds, weights)


def measured(
    model: Path, paths: Sequence[Path], text: Path, chunks: int
) -> tuple[Series, dict[tuple[str, bool], Series]]:
    """Run the original and artifacts; return their values by path, and if inputs are rounded."""
    gguf = any(path.suffix == ".gguf" for path in paths)
    request = EvaluationRequest(
        str(model),
        tuple(map(str, paths)),
        text,
        chunks=chunks,
        streamed=True,
        llama_inputs=gguf,
    )
    job = prepare(request)
    models = (*job.candidates, *job.simulations)
    base, series = sweep(job, models, device="cpu")
    keys = [(str(one.path), one.simulated) for one in models]
    return base, dict(zip(keys, series, strict=True))


def jackknife(statistic: Callable[[F64], float], values: F64) -> tuple[float, float]:
    """Return a statistic of [chunks, ...] values, and its standard error over chunks."""
    count = len(values)
    left = np.array([statistic(np.delete(values, i, axis=0)) for i in range(count)])
    spread = (count - 1) / count * ((left - left.mean()) ** 2).sum()
    return statistic(values), float(np.sqrt(spread))


def compared(base: Series, plain: Series, refined: Series) -> dict[str, tuple[float, float]]:
    """Return what refined codes change, each figure with its paired error."""
    assert plain.kld is not None
    assert refined.kld is not None
    klds = np.stack([plain.kld, refined.kld], axis=1)
    tops = np.stack([plain.top == base.top, refined.top == base.top], axis=1)

    def change(values: F64) -> float:
        return float(values[:, 1].mean() / values[:, 0].mean() - 1)

    def tail(values: F64) -> float:
        first, second = (np.quantile(values[:, i], 0.999) for i in range(2))
        return float(second - first)

    def top(values: F64) -> float:
        return float(values[:, 1].mean() - values[:, 0].mean())

    return {
        "change": jackknife(change, klds),
        "tail": jackknife(tail, klds),
        "same_top": jackknife(top, tops.astype(np.float64)),
    }


def row(name: str, base: Series, pair: tuple[Series, Series]) -> dict[str, Any]:
    """Return the figures of one format."""
    figures: dict[str, Any] = {"name": name}
    for kind, series in zip(("plain", "refined"), pair, strict=True):
        assert series.kld is not None
        figures[kind] = {
            "kld": float(series.kld.mean()),
            "tail": float(np.quantile(series.kld, 0.999)),
            "same_top": float((series.top == base.top).mean()),
        }
    return figures | compared(base, *pair)


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table."""
    yield f"{'':<34}{'plain':>10}{'refined':>10}{'change':>16}{'99.9 %':>20}{'same top':>17}"
    for one in rows:
        (change, error), (tail, apart), (top, off) = (
            one[key] for key in ("change", "tail", "same_top")
        )
        yield (
            f"{one['name']:<34}{one['plain']['kld']:>10.6f}{one['refined']['kld']:>10.6f}"
            f"{change:>+9.1%} +-{error:>5.1%}{tail:>+11.5f} +-{apart:>7.5f}"
            f"{top:>+9.2%} +-{off:>6.2%}"
        )


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, write and measure everything."""
    calibration, evaluation = split(args.text, args.work)
    calibrated = args.work / "calibrated"
    qwen35.calibrate(
        args.model,
        text=calibration,
        output=calibrated,
        chunks=args.windows,
        hessian=True,
        overwrite=True,
        dtype="float32",
    )
    names = args.only or [*GGUF, *PACKED]
    artifacts = {}
    for name in names:
        for codes in ("plain", "refined"):
            for _ in range(2):  # the first time compiles
                made = written(name, args.model, args.work, calibrated, codes)
            artifacts[name, codes] = made
    paths = [artifact.path for artifact in artifacts.values()]
    base, series = measured(args.model, paths, evaluation, args.chunks)
    rows = []
    for name in names:
        plain, refined = artifacts[name, "plain"], artifacts[name, "refined"]
        assert plain.nbytes == refined.nbytes, name
        for simulated in (False, True):
            keys = (str(plain.path), simulated), (str(refined.path), simulated)
            if keys[0] in series:
                title = f"{name}, inputs rounded" if simulated else name
                found = row(title, base, (series[keys[0]], series[keys[1]]))
                nanoseconds = (refined.seconds - plain.seconds) / refined.weights * 1e9
                rows.append(found | {"bytes": plain.nbytes, "ns_per_weight": nanoseconds})
    print("\n".join(lines(rows)))
    for one in rows:
        print(f"{one['name']}: {one['bytes']:,} bytes, {one['ns_per_weight']:.0f} ns a weight")
    return {"environment": environment(), "model": args.model.name, "rows": rows}


def parser_of(description: str | None, name: str) -> argparse.ArgumentParser:
    """Return a parser of what all benchmarks of codes are asked."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work" / name)
    parser.add_argument("--model", type=Path, default=ASSET)
    parser.add_argument("--text", type=Path, default=ASSET / "eval.txt")
    parser.add_argument("--chunks", type=int, default=0, help="to measure on (default: all)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser


def run(
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Mapping[str, Any]],
    *,
    afresh: bool = True,
) -> None:
    """Measure, in an empty folder if `afresh`, and write the figures."""
    if afresh:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    found = measure(args)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def main() -> None:
    """Parse the command line and measure."""
    parser = parser_of(__doc__, "codes")
    parser.add_argument("--windows", type=int, help="to calibrate on (default: all)")
    parser.add_argument("--only", nargs="+", choices=[*GGUF, *PACKED])
    run(parser.parse_args(), benchmark)


if __name__ == "__main__":
    main()
