"""Compare one sweep with llama-perplexity's runs, and with one candidate at a time.

    python -m benchmarks.evaluate [--work DIR] [--size 0.8B|tiny] [--rounds 3]
                                  [--llama-perplexity PATH]

Writes F16 and four quantized GGUF files of a random checkpoint with real shapes and measures
processes, in turn: our sweep of a pair; llama-perplexity's two runs on the same pair (base, then
compare), if its binary, of the same llama.cpp, is there (`make bench` builds it); our sweep of four
candidates; four sweeps of one. llama-perplexity runs with --no-repack, as our engine does, and
decodes four chunks at a time, which is its default. The pair is measured on four chunks of 512
tokens, the sweeps of four candidates on one.
"""

from __future__ import annotations

import shutil
from functools import reduce
from pathlib import Path

from benchmarks.gguf import ours
from benchmarks.measuring import (
    ASSET,
    QWEN35,
    ROOT,
    Comparison,
    Cost,
    arguments,
    made,
    measure,
    report,
)

BASE = "F16"
CANDIDATES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
TEXT = ASSET / "eval.txt"
PROGRAM = ROOT / ".venv" / "llama.cpp-programs" / "build" / "bin" / "llama-perplexity"
CHUNKS = 4
PAIR, PROGRAMS = "`evaluate`, a GGUF pair", "llama-perplexity's two runs"
FOUR, SINGLY = "`evaluate`, four candidates at once", "one at a time"
COMPARISONS = (Comparison(PAIR, PROGRAMS, headline=True), Comparison(FOUR, SINGLY))


def once(files: dict[str, Path], program: Path, work: Path, threads: int) -> dict[str, Cost]:
    """Measure every route once."""

    def sweep(kinds: tuple[str, ...], chunks: int, *more: str) -> Cost:
        models = [files[kind] for kind in (BASE, *kinds)]
        given = ("--text", TEXT, "--chunks", chunks, "--threads", threads, "--quiet", *more)
        return measure([*QWEN35, "evaluate", *models, *given])

    def perplexity(kind: str, *more: str) -> Cost:
        command = [program, "-m", files[kind], "-f", TEXT, "--no-repack", "-t", threads]
        return measure([*command, "--chunks", CHUNKS, "--kl-divergence-base", kept, *more])

    kept = work / "base.kld"
    costs = {
        "`evaluate --dry-run`": sweep(CANDIDATES, 1, "--dry-run"),
        PAIR: sweep(("Q4_K_M",), CHUNKS),
    }
    if program.exists():
        costs[PROGRAMS] = perplexity(BASE).then(perplexity("Q4_K_M", "--kl-divergence"))
        kept.unlink()
    costs[FOUR] = sweep(CANDIDATES, 1)
    costs[SINGLY] = reduce(Cost.then, [sweep((kind,), 1) for kind in CANDIDATES])
    return costs


def main() -> None:
    args = arguments(__doc__, llama_perplexity={"type": Path, "default": PROGRAM})
    source, out = made("checkpoint", args.size, args.work), args.work / "evaluated"
    measure(ours(source, out, ",".join((BASE, *CANDIDATES)), args.threads), out)
    files = {kind: next(out.glob(f"*-{kind}.gguf")) for kind in (BASE, *CANDIDATES)}
    title = f"Evaluation, {source.name}, {args.threads} threads"
    program = args.llama_perplexity.resolve()
    report(args, title, lambda: once(files, program, args.work, args.threads), COMPARISONS)
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
