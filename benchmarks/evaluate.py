"""Compare one sweep with llama-perplexity's runs, and with one candidate at a time.

    python benchmarks/evaluate.py [--llama-perplexity PATH] [--size 0.8B|tiny] [--chunks 4]

Writes F16 and four quantized GGUF files of a random checkpoint with real shapes (`tiny`: of the
embedded checkpoint) and measures processes, in turn: our sweep of a pair; llama-perplexity's two
runs on the same pair (base, then compare), if a binary of the same llama.cpp is given; our sweep of
four candidates; four sweeps of one. Start-up of Python is measured separately. llama-perplexity
runs with --no-repack, as our engine does, and decodes four chunks at a time, which is its default.
Only ratios within one run are meaningful.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.path[0] != str(ROOT):  # files in this folder would shadow libraries
    sys.path[0] = str(ROOT)

from benchmarks.gguf import ASSET, ours, prepare, total
from benchmarks.nf4 import Cost, measure, median

BASE = "F16"
CANDIDATES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
TEXT = ASSET / "eval.txt"


def make_files(size: str, work: Path, threads: int) -> dict[str, Path]:
    """Write the GGUF files once; return type to file."""
    source = ASSET if size == "tiny" else prepare(size, work)[0]
    out = work / f"evaluate-{size}"
    if not out.exists():
        measure(ours(source, out, ",".join((BASE, *CANDIDATES)), threads), out)
    return {kind: next(out.glob(f"*-{kind}.gguf")) for kind in (BASE, *CANDIDATES)}


def sweep(files: dict[str, Path], kinds: tuple[str, ...], args: argparse.Namespace) -> list[str]:
    """Return the command of one sweep."""
    models = [str(files[kind]) for kind in (BASE, *kinds)]
    shared = ["--text", str(TEXT), "--chunks", str(args.chunks), "--threads", str(args.threads)]
    return [sys.executable, "-m", "qwen35.cli.main", "evaluate", "--quiet", *models, *shared]


def theirs(files: dict[str, Path], kind: str, kept: Path, args: argparse.Namespace) -> list[str]:
    """Return the command of one run of llama-perplexity."""
    command = [args.llama_perplexity, "-m", str(files[kind]), "-f", str(TEXT), "--no-repack"]
    command += ["-t", str(args.threads), "--chunks", str(args.chunks)]
    return [*command, "--kl-divergence-base", str(kept)]


def once(files: dict[str, Path], args: argparse.Namespace) -> dict[str, Cost]:
    """Measure every route once."""
    nothing = args.work / "none"
    costs = {"one sweep of the pair": measure(sweep(files, ("Q4_K_M",), args), nothing)}
    if args.llama_perplexity:
        kept = args.work / "base.kld"
        base = measure(theirs(files, BASE, kept, args), kept)
        compare = [*theirs(files, "Q4_K_M", kept, args), "--kl-divergence"]
        compared = measure(compare, nothing)
        costs["llama-perplexity, base"] = base
        costs["llama-perplexity, compare"] = compared
        costs["llama-perplexity, both"] = total([base, compared])
        kept.unlink()
    costs["one sweep of four candidates"] = measure(sweep(files, CANDIDATES, args), nothing)
    singly = [measure(sweep(files, (kind,), args), nothing) for kind in CANDIDATES]
    costs["four sweeps of one candidate"] = total(singly)
    idle = [*sweep(files, CANDIDATES, args), "--dry-run"]
    costs["start-up of qwen35 evaluate"] = measure(idle, nothing)
    return costs


def ratios(costs: dict[str, Cost]) -> dict[str, float]:
    """Return the published figures."""
    four, singly = costs["one sweep of four candidates"], costs["four sweeps of one candidate"]
    start = costs["start-up of qwen35 evaluate"].wall
    found = {
        "wall, four at once / one at a time": four.wall / singly.wall,
        "the same beyond start-up": (four.wall - start) / (singly.wall - 4 * start),
    }
    if "llama-perplexity, both" in costs:
        pair, both = costs["one sweep of the pair"], costs["llama-perplexity, both"]
        found["wall, one sweep / llama-perplexity's two runs"] = pair.wall / both.wall
        found["the same, our start-up taken off"] = (pair.wall - start) / both.wall
        found["CPU, one sweep / llama-perplexity's two runs"] = pair.cpu / both.cpu
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--size", default="0.8B")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-perplexity", default="")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    files = make_files(args.size, args.work, args.threads)
    rounds = [once(files, args) for _ in range(args.runs)]
    costs = {name: median([one[name] for one in rounds]) for name in rounds[0]}
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    print(f"{args.size}, {args.chunks} chunks of 512, {args.threads} threads, {args.runs} runs")
    print(f"{'median of the runs':<40} {'wall s':>8} {'CPU s':>8} {'peak MB':>9}")
    for name, cost in costs.items():
        print(f"{name:<40} {cost.wall:>8.2f} {cost.cpu:>8.2f} {cost.memory:>9.0f}")
    for name, value in ratios(costs).items():
        print(f"{name:<56} {value:>8.3f}")
    (args.work / "evaluate.json").write_text(json.dumps({n: vars(c) for n, c in costs.items()}))


if __name__ == "__main__":
    main()
