"""Refined codes beside the calibrated codes of other tools, in files of the same layout.

    python -m benchmarks.codes_peers [--work DIR] [--model DIR] [--text FILE] [--chunks N]
                                     [--only NAME ...] [--json FILE]

As in `benchmarks.codes`, a part of the text calibrates and the rest measures; all tools get the
same windows. llm-compressor runs GPTQ with its own defaults, AutoRound its learned rounding, with
few steps: each takes seconds here. They quantize the same layers as ours. Each has an environment
of its own, WORK/peers/NAME, which is made if it is missing (benchmarks/peers; 1.5 GB each); one
that cannot be made is left out. All artifacts are read by our reader and measured as `qwen35
evaluate --streamed` does: weights alone, in float32. CPU time is that of whole processes on one
thread; ours includes the calibration.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.codes import measured, parser_of, row, run, split
from benchmarks.measuring import QWEN35, ROOT, environment, measure
from benchmarks.served import IGNORED, ONE_THREAD, TOOLS
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.source import open_folder

PROGRAMS = {
    "llm-compressor": ROOT / "benchmarks" / "peers" / "llm_compressor_gptq.py",
    "auto-round": ROOT / "benchmarks" / "peers" / "auto_round_tuned.py",
}
AUTO_ROUND_ENVIRONMENT = {"AR_DISABLE_DATASET_SUBPROCESS": "1"}
STEPS = "50"
"""As AutoRound's own light setting; its default is 200."""


@dataclass(frozen=True)
class Layout:
    """A layout, how we write it, and what other tools are told to write it.

    Args:
        ours: arguments of `qwen35`.
        peers: tool to its scheme and further arguments.
        needs: what plain codes are written with.
    """

    ours: tuple[str, ...]
    peers: Mapping[str, tuple[str, ...]]
    needs: tuple[str, ...] = field(default=())


STATISTICS = ("--activation-stats", "{calibrated}/activation-stats.json")
LAYOUTS = {
    "INT4": Layout(
        ("convert", "--recipe", "int4"),
        {"llm-compressor": ("W4A16", *IGNORED)},
        STATISTICS,
    ),
    "NVFP4": Layout(
        ("convert", "--recipe", "nvfp4"),
        {"llm-compressor": ("NVFP4A16", *IGNORED, "linear_attn")},
        STATISTICS,
    ),
    "Q4_K_M": Layout(
        ("gguf", "--types", "Q4_K_M", "--mtp", "drop"),
        {"auto-round": ("gguf:q4_k_m", "gguf:q4_k_m", STEPS)},
        ("--imatrix", "{calibrated}"),
    ),
}


@dataclass(frozen=True)
class Artifact:
    """A written artifact: the folder or GGUF file, its bytes, and seconds of CPU time."""

    path: Path
    seconds: float

    @property
    def nbytes(self) -> int:
        """Bytes of its weights' files."""
        files = self.path.glob("*.safetensors") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)


def artifact(out: Path, seconds: float) -> Artifact:
    """Return what was written to a folder: the GGUF file somewhere in it, or the folder."""
    found = [*out.rglob("*.gguf")]
    return Artifact(found[0] if found else out, seconds)


def ours(name: str, args: argparse.Namespace, calibration: float) -> Iterator[tuple[str, Artifact]]:
    """Write a layout with plain and with refined codes."""
    layout, calibrated = LAYOUTS[name], args.work / "calibrated"
    verb, *options = layout.ours
    options += [one.format(calibrated=calibrated) for one in layout.needs]
    for codes in ("plain", "refined"):
        out = args.work / f"{name}-{codes}"
        command = [*QWEN35, verb, args.model, out, *options, "--threads", "1", "--quiet"]
        if codes == "refined":
            command += ["--codes", "refined", "--hessian", calibrated]
        yield f"qwen35, {codes}", artifact(out, calibration + measure(command, out).cpu)


def theirs(name: str, args: argparse.Namespace) -> Iterator[tuple[str, Artifact]]:
    """Write a layout with the tools that can be installed."""
    for tool in TOOLS:
        if tool.name not in LAYOUTS[name].peers or not tool.ready(args.work):
            continue
        scheme, *more = LAYOUTS[name].peers[tool.name]
        python = args.work / "peers" / tool.name / "bin" / "python"
        out = args.work / f"{name}-{tool.name}"
        given = (args.model.resolve(), args.work / "windows.npy", out, scheme, *more)
        command = [python, "-I", PROGRAMS[tool.name], *given]
        cost = measure(command, out, ONE_THREAD | AUTO_ROUND_ENVIRONMENT)
        for tokenizer in args.model.glob("tokenizer*.json"):  # not all tools write one
            shutil.copy(tokenizer, out)
        yield f"{tool.name} {tool.version}", artifact(out, cost.cpu)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, write and measure everything."""
    calibration, evaluation = split(args.text, args.work)
    windows = read_text(open_folder(args.model), [calibration]).windows
    np.save(args.work / "windows.npy", windows)
    command = [*QWEN35, "calibrate", args.model, "--text", calibration]
    command += ["--output", args.work / "calibrated", "--hessian", "--dtype", "float32", "--quiet"]
    seconds = measure(command, args.work / "calibrated", {"OMP_NUM_THREADS": "1"}).cpu
    found = {name: dict([*ours(name, args, seconds), *theirs(name, args)]) for name in args.only}
    paths = [one.path for each in found.values() for one in each.values()]
    base, series = measured(args.model, paths, evaluation, args.chunks)
    rows = []
    for name, each in found.items():
        plain = series[str(each["qwen35, plain"].path), False]
        for title, one in each.items():
            figures = row(f"{name}: {title}", base, (plain, series[str(one.path), False]))
            rows.append(figures | {"bytes": one.nbytes, "cpu_seconds": one.seconds})
    print("\n".join(lines(rows)))
    return {"environment": environment(), "model": args.model.name, "rows": rows}


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table; changes are those against our plain codes."""
    heads = ("mean KLD", "change", "99.9 %", "same top", "bytes", "CPU s")
    yield f"{'':<36}{heads[0]:>10}{heads[1]:>18}{heads[2]:>10}{heads[3]:>10}" + (
        f"{heads[4]:>12}{heads[5]:>8}"
    )
    for one in rows:
        figures, (change, error) = one["refined"], one["change"]
        yield (
            f"{one['name']:<36}{figures['kld']:>10.6f}{change:>+10.1%} +-{error:>5.1%}"
            f"{figures['tail']:>10.4f}{figures['same_top']:>10.2%}"
            f"{one['bytes']:>12,}{one['cpu_seconds']:>8.0f}"
        )


def main() -> None:
    """Parse the command line and measure."""
    parser = parser_of(__doc__, "codes_peers")
    parser.add_argument("--only", nargs="+", choices=[*LAYOUTS], default=[*LAYOUTS])
    args = parser.parse_args()
    args.work = args.work.resolve()
    run(args, benchmark, afresh=False)  # environments in it are kept


if __name__ == "__main__":
    main()
