"""Compare tuned GGUF recipes with hand-made ones of the same size, on unseen text.

    python -m benchmarks.tune [--work DIR] [--chunks N] [--types T,...] [--output docs/tune.json]

The embedded checkpoint's held-out text is split into three parts: for the importance matrix, for
tuning and for measuring. The importance matrix is the same everywhere. For the sizes of plain
Q4_K_M and of the recipe q8-gates at Q4_K_M, Q5_K_M and Q6_K the tuned file has at most as many
bytes; mean divergence and its 99.9th percentile are against F16, in llama.cpp. All of
docs/tune.json is written, with the CPU seconds of the first `qwen35 tune`, and
`python docs/generate.py` builds the table from it. Figures of 126 probes, measured by this script
before prices replaced them, are constants below.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import ASSET, ROOT
from qwen35.cli.main import main as qwen35
from qwen35.tuning.measurements import load_measurements

TYPES = "Q4_K_M,Q5_K_M,Q6_K"
CASES = (("mix", "Q4_K_M"), ("q8-gates", "Q4_K_M"), ("q8-gates", "Q5_K_M"), ("q8-gates", "Q6_K"))

PROBES = {
    "count": 126,
    "chunks": 8,
    "cpu_seconds": 319,
    "mean_kld": {
        "mix, Q4_K_M": 0.009828,
        "q8-gates, Q4_K_M": 0.003979,
        "q8-gates, Q5_K_M": 0.002364,
        "q8-gates, Q6_K": 0.001094,
    },
}
"""What this script measured at the same sizes while `qwen35 tune` fitted costs to probes."""


@dataclass(frozen=True)
class TunedFile:
    """A tuned file, its predicted divergence, and what it took.

    Args:
        path: the file.
        predicted: mean divergence by the prices, in nats.
        inputs: what of that is rounding of inputs.
        cpu_seconds: of the command that found the recipe.
    """

    path: Path
    predicted: float
    inputs: float
    cpu_seconds: float


def command(*arguments: object) -> Any:
    """Run a command and return its JSON output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = qwen35([*map(str, arguments), "--json", "--quiet"])
    if code:
        raise SystemExit(f"{arguments[0]}: exit {code}: {out.getvalue()}")
    return json.loads(out.getvalue())


def cut_text(work: Path) -> tuple[Path, Path, Path]:
    """Write the three parts of the held-out text."""
    text = (ASSET / "eval.txt").read_text()
    third = len(text) // 3
    paths = []
    for i, name in enumerate(("calibrate", "tune", "measure")):
        paths.append(work / f"{name}.txt")
        paths[-1].write_text(text[i * third : (i + 1) * third])
    return paths[0], paths[1], paths[2]


def file_of(folder: Path, kind: str) -> Path:
    [found] = folder.glob(f"*-{kind}.gguf")
    return found


def make_hand_made(work: Path, imatrix: Path) -> dict[tuple[str, str], Path]:
    """Write the files to compare with, and F16."""
    made: dict[tuple[str, str], Path] = {}
    for recipe in ("mix", "q8-gates"):
        out = work / recipe
        command("gguf", ASSET, out, "--types", TYPES, "--recipe", recipe, "--imatrix", imatrix)
        made |= {(recipe, kind): file_of(out, kind) for kind in TYPES.split(",")}
    command("gguf", ASSET, work / "f16", "--types", "F16")
    return made


def tune(
    work: Path, budget: tuple[str, object], name: str, imatrix: Path, text: Path, args: Any
) -> TunedFile:
    """Tune for a budget and write the file. All share measurements."""
    recipe = work / f"{name}.toml"
    types = ("--types", args.types) if args.types else ()
    measured, begun = work / "measured.json", cpu_seconds()
    found = command(
        "tune", ASSET, "--format", "gguf", *budget, "--text", text, "--imatrix", imatrix,
        "--output", recipe, "--measurements", measured,
        "--chunks", args.chunks, *types, "--report", work / f"report-{name}",
    )  # fmt: skip
    seconds = cpu_seconds() - begun
    print(
        f"{name}: {' '.join(map(str, budget))}: {found['bytes']} bytes, "
        f"{found['predicted_kld']:.6f} nats predicted"
    )
    out = work / name
    asked = ("--types", "Q4_K_M", "--recipe", recipe, "--imatrix", imatrix)
    command("gguf", ASSET, out, *asked)
    path = out / f"{name}.gguf"
    file_of(out, "Q4_K_M").rename(path)
    prices = load_measurements(measured).prices.inputs
    inputs = sum(prices[unit][choice] for unit, choice in found["chosen"].items())
    return TunedFile(path, found["predicted_kld"], inputs, seconds)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process so far, and of those that it waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work" / "tune")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--types", default="")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "tune.json")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    calibrate, tuning, measure = cut_text(args.work)
    command("calibrate", ASSET, "--text", calibrate, "--output", args.work / "statistics")
    imatrix = args.work / "statistics" / "imatrix.gguf"
    made = make_hand_made(args.work, imatrix)
    base = file_of(args.work / "f16", "F16")
    tuned = {
        case: tune(
            args.work,
            ("--size", made[case].stat().st_size),
            f"tuned-{'-'.join(case)}",
            imatrix,
            tuning,
            args,
        )
        for case in CASES
    }
    paths = {case: one.path for case, one in tuned.items()}
    made_so = [made[case] for case in CASES]
    files = list(dict.fromkeys([*made_so, *paths.values()]))
    # file names may repeat: give each a folder
    links = args.work / "files"
    links.mkdir()
    names: dict[Path, str] = {path: f"{path.parent.name}-{path.stem}" for path in files}
    for path, name in names.items():
        (links / f"{name}.gguf").hardlink_to(path)
    report = command(
        "evaluate", base, *sorted(links.glob("*.gguf")), "--text", measure,
        "--report", args.work / "report",
    )  # fmt: skip
    figures = {row["name"]: row["figures"] for row in report["candidates"]}
    routes = {"hand_made": made, "tuned": paths}
    results = {
        "made_by": "benchmarks/tune.py",
        "chunks": args.chunks,
        "cpu_seconds": round(tuned[CASES[0]].cpu_seconds),  # the others use its measurements
        "probes": PROBES,
        "rows": [
            {
                "recipe": case[0],
                "type": case[1],
                "predicted": round(tuned[case].predicted, 6),
                "inputs": round(tuned[case].inputs, 6),
                **{
                    name: outcome(of[case], figures[names[of[case]]]) for name, of in routes.items()
                },
            }
            for case in CASES
        ],
    }
    args.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(f"written: {args.output}; `python docs/generate.py` builds the tables from it")


def outcome(path: Path, figures: Any) -> dict[str, Any]:
    """Return the size of a file and its divergence on unseen text."""
    mean, tail = figures["kld"]["value"], figures["percentiles"]["99.9"]
    return {"bytes": path.stat().st_size, "mean_kld": round(mean, 6), "kld_99.9": round(tail, 6)}


if __name__ == "__main__":
    main()
