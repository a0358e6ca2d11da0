"""What the benchmarks share: processes measured in turn, ratios, results as JSON.

A machine that others use too has good minutes and bad ones. So a round measures every route once,
one after the other, and a ratio is taken within a round; medians are kept with their ranges over
the rounds. Nothing large is imported here: Linux gives a process at least the peak memory of the
one that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ASSET = ROOT / "assets" / "qwen3.5-tiny"
QWEN35 = (sys.executable, "-m", "qwen35.cli.main")
FIGURES = {"wall": "wall time", "cpu": "CPU time", "memory": "peak memory"}
LIBRARIES = ("bitsandbytes", "llama_cpp_python", "numba", "numpy", "torch", "transformers")


@dataclass(frozen=True)
class Cost:
    """The cost of processes: seconds of wall and CPU time, and peak memory in MB."""

    wall: float
    cpu: float
    memory: float

    def then(self, other: Cost) -> Cost:
        """Return the cost of one process after another."""
        larger = max(self.memory, other.memory)
        return Cost(self.wall + other.wall, self.cpu + other.cpu, larger)

    def beyond(self, start: Cost) -> Cost:
        """Return the cost less that of the start-up."""
        return Cost(self.wall - start.wall, self.cpu - start.cpu, self.memory - start.memory)

    def repeated(self, count: int, start: Cost) -> Cost:
        """Return the cost of `count` times the work after one start-up."""
        wall, cpu = (self.wall - start.wall) * count, (self.cpu - start.cpu) * count
        return Cost(start.wall + wall, start.cpu + cpu, self.memory)


@dataclass(frozen=True)
class Comparison:
    """Two routes to compare: how many times our cost the alternative takes.

    Args:
        ours: a route's name.
        alternative: another route's name.
        figures: what to compare, of `FIGURES`.
        headline: whether the README shows it.
    """

    ours: str
    alternative: str
    figures: Sequence[str] = tuple(FIGURES)
    headline: bool = False

    def row(self, rounds: Sequence[Mapping[str, Cost]]) -> dict[str, Any]:
        """Return the medians and ranges of the ratios, without figures that are lost in noise."""
        found = {
            "ours": self.ours,
            "alternative": self.alternative,
            "headline": self.headline,
            "rounds": len(rounds),
        }
        for figure in self.figures:
            ours = [getattr(costs[self.ours], figure) for costs in rounds]
            theirs = [getattr(costs[self.alternative], figure) for costs in rounds]
            if min(*ours, *theirs) > 0:
                ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
                spread = {"median": median(ratios), "low": min(ratios), "high": max(ratios)}
                found[figure] = {name: round(value, 4) for name, value in spread.items()}
        return found


def measure(
    command: Sequence[object], out: Path | None = None, environment: Mapping[str, str] | None = None
) -> Cost:
    """Remove `out`, run a command that may write it, and return the process's cost."""
    if out is not None:
        remove(out)
    os.sync()
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**inherited, **(environment or {})},
        cwd=ROOT,
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))[:300]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3)


def remove(path: Path) -> None:
    """Remove a folder or file, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def made(kind: str, *arguments: object) -> Path:
    """Have a process of its own make an input (benchmarks/models.py); return its path."""
    command = [sys.executable, "-m", "benchmarks.models", kind, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip())


def weights(folder: Path) -> list[Path]:
    """Return a checkpoint's weight files."""
    return sorted(folder.glob("*.safetensors"))


def arguments(description: str | None, **more: Mapping[str, Any]) -> argparse.Namespace:
    """Parse the command line: the options of every benchmark, and `more` of this one."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work")
    parser.add_argument("--size", default="0.8B", help="or tiny: the embedded checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the result there")
    for name, options in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def report(
    args: argparse.Namespace,
    title: str,
    once: Callable[[], Mapping[str, Cost]],
    comparisons: Sequence[Comparison],
) -> None:
    """Measure the rounds, print costs and ratios, and write the result if asked to."""
    began, rounds = time.perf_counter(), []
    for number in range(1, args.rounds + 1):
        rounds.append(once())
        taken = time.perf_counter() - began
        print(f"{title}: round {number} of {args.rounds}, {taken:.0f} s", file=sys.stderr)
    result = summary(title, rounds, comparisons)
    result["settings"] = {"size": args.size, "rounds": args.rounds}
    result["seconds"] = round(time.perf_counter() - began)
    print("\n".join([*cost_lines(result), *ratio_lines([result])]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def summary(
    title: str, rounds: Sequence[Mapping[str, Cost]], comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """Return a benchmark's result as plain JSON values: every cost of each round, and the ratios.

    A comparison with a route that was not measured is left out.
    """
    costs = {
        name: {
            figure: [round(getattr(one[name], figure), 3) for one in rounds] for figure in FIGURES
        }
        for name in rounds[0]
    }
    complete = [c for c in comparisons if {c.ours, c.alternative} <= rounds[0].keys()]
    return {
        "title": title,
        "date": datetime.now(UTC).date().isoformat(),
        "environment": environment(),
        "costs": costs,
        "ratios": [comparison.row(rounds) for comparison in complete],
    }


def environment() -> dict[str, str]:
    """Return what may change the figures: the machine, and the versions of libraries."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    found = {
        "machine": platform.machine(),
        "processor": models[0] if models else "",
        "processors": str(os.cpu_count()),
        "python": platform.python_version(),
        "qwen35": version("qwen35"),
    }
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def cost_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the table of a benchmark's costs as text."""
    found = [f"\n{result['title']}, median of {result['settings']['rounds']} rounds"]
    found.append(f"{'':<64} {'wall s':>8} {'CPU s':>8} {'peak MB':>8}")
    for name, cost in result["costs"].items():
        wall, cpu, memory = (median(cost[figure]) for figure in FIGURES)
        found.append(f"{_plain(name):<64} {wall:>8.2f} {cpu:>8.2f} {memory:>8.0f}")
    return found


def ratio_lines(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the table of the ratios of several benchmarks as text."""
    found = ["\ntimes our cost that an alternative takes: median (range over the rounds)"]
    for row in (row for result in results for row in result["ratios"]):
        found.append(_plain(f"{row['ours']} : {row['alternative']}"))
        for figure, label in FIGURES.items():
            if ratio := row.get(figure):
                spread = f"({ratio['low']:.2f} to {ratio['high']:.2f})"
                found.append(f"    {label:<12} {ratio['median']:>8.2f}  {spread}")
    return found


def _plain(name: str) -> str:
    """Return a route's name, which is markdown, as text."""
    return name.replace("`", "")
