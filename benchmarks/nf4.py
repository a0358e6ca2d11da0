"""Compare NF4 conversion with today's usual route, in one run.

    python benchmarks/nf4.py [--work DIR] [--sizes 0.8B 4B] [--runs 3]

Writes random checkpoints with real shapes and prints a table: `qwen35 convert`, the route through
transformers and bitsandbytes (load with a config, save), and `cp` of the same file. CPU time and
peak memory are the operating system's figures for the whole process. The table uses kernels from
Numba's cache; compiling them is measured before, with an empty cache.
Only ratios within one run are meaningful; the machine is printed with them.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen35.checkpoint.header import file_layout
from qwen35.model.model_config import parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors
from qwen35.model.sizes import published_config

TRANSFORMERS = """
import sys, torch
from transformers import BitsAndBytesConfig, Qwen3_5ForConditionalGeneration
config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
    llm_int8_skip_modules=["lm_head", "model.visual", "model.language_model.embed_tokens"],
)
model = Qwen3_5ForConditionalGeneration.from_pretrained(
    sys.argv[1], quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
)
model.save_pretrained(sys.argv[2])
"""
PIECE = 2**22
SHARD = "model.safetensors-00001-of-00001.safetensors"
EMBEDDED = Path(__file__).parent.parent / "assets" / "qwen3.5-tiny"


@dataclass(frozen=True)
class Cost:
    """The cost of one process: seconds of wall and CPU time, and peak memory in MB."""

    wall: float
    cpu: float
    memory: float


def make_checkpoint(size: str, folder: Path) -> Path:
    """Write random bf16 weights with the shapes of a published size, once."""
    folder = folder / f"Qwen3.5-{size}"
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    raw = published_config(f"Qwen3.5-{size}")
    config = parse_config(raw)
    specs = list(expected_tensors(config, CheckpointNaming.published(config)))
    head, offsets = file_layout(specs)
    generator = np.random.default_rng(0)
    pool = (generator.standard_normal(PIECE + 4096, dtype=np.float32) * np.float32(0.02)).view(
        np.uint32
    )
    bf16 = (pool >> np.uint32(16)).astype(np.uint16)
    with (folder / SHARD).open("wb") as file:
        file.write(head)
        for spec in specs:
            file.seek(offsets[spec.name])
            for start in range(0, spec.numel, PIECE):
                count = min(PIECE, spec.numel - start)
                shift = int(generator.integers(0, 4096))
                values = bf16[shift : shift + count]
                file.write(
                    values.tobytes()
                    if spec.dtype == "BF16"
                    else (values.astype(np.uint32) << np.uint32(16)).tobytes()
                )
    index = {"metadata": {}, "weight_map": dict.fromkeys(offsets, SHARD)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def measure(command: list[str], out: Path, environment: dict[str, str] | None = None) -> Cost:
    """Remove `out`, run a command that writes it, and return the cost."""
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**_environment(), **(environment or {})},
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)[:200]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3)


def _environment() -> dict[str, str]:
    """Return the environment, with Python's cache of compiled modules enabled."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def median(costs: list[Cost]) -> Cost:
    """Return the median of each figure."""
    return Cost(
        *(sorted(getattr(c, f) for c in costs)[len(costs) // 2] for f in ("wall", "cpu", "memory"))
    )


def convert_command(source: Path, out: Path) -> list[str]:
    """Return the command that converts `source`."""
    convert = [sys.executable, "-m", "qwen35.cli.main", "convert", "--quiet"]
    return [*convert, str(source), str(out)]


def compilation(work: Path, runs: int) -> tuple[Cost, Cost]:
    """Convert the embedded checkpoint with an empty kernel cache, and again; return both costs."""
    cache, out = work / "kernels", work / "tiny"
    command, environment = convert_command(EMBEDDED, out), {"NUMBA_CACHE_DIR": str(cache)}
    first: list[Cost] = []
    second: list[Cost] = []
    for _ in range(runs):
        shutil.rmtree(cache, ignore_errors=True)
        first.append(measure(command, out, environment))
        second.append(measure(command, out, environment))
    return median(first), median(second)


def row(name: str, cost: Cost, base: Cost) -> str:
    """Render one line of the table, with wall time as a multiple of `base`."""
    return (
        f"{name:<44} {cost.wall:>8.2f} {cost.cpu:>8.2f} {cost.memory:>9.0f} "
        f"{cost.wall / base.wall:>8.1f}"
    )


def commands(source: Path, work: Path) -> dict[str, tuple[list[str], Path, dict[str, str]]]:
    """Return the routes to compare: command, output and environment."""
    ours = work / "ours"
    convert = convert_command(source, ours)
    theirs = [sys.executable, "-c", TRANSFORMERS, str(source), str(work / "theirs")]
    torch = [sys.executable, "-c", "import torch"]
    copy = ["cp", str(source / SHARD), str(work / "copy")]
    return {
        "cp of the source": (copy, work / "copy", {}),
        "import torch, which `qwen35 convert` avoids": (torch, work / "nothing", {}),
        "qwen35 convert": (convert, ours, {}),
        "qwen35 convert --threads 1": ([*convert, "--threads", "1"], ours, {}),
        "transformers + bitsandbytes, default threads": (theirs, work / "theirs", {}),
        "transformers + bitsandbytes, 1 thread": (
            theirs,
            work / "theirs",
            {"OMP_NUM_THREADS": "1"},
        ),
    }


def compare(size: str, work: Path, runs: int, theirs: bool) -> dict[str, Cost]:
    """Measure all routes on one size, in turn, and print the table."""
    source = make_checkpoint(size, work)
    routes = {
        name: route
        for name, route in commands(source, work).items()
        if theirs or "bitsandbytes" not in name
    }
    costs: dict[str, list[Cost]] = {name: [] for name in routes}
    for i in range(runs + 1):
        for name, (command, out, environment) in routes.items():
            if i == 0 and "bitsandbytes" in name:
                continue  # the first round warms the page cache and the kernel's cache
            cost = measure(command, out, environment)
            if i:
                costs[name].append(cost)
    result = {name: median(found) for name, found in costs.items()}
    print(f"\nQwen3.5-{size}, {(source / SHARD).stat().st_size / 1e9:.3f} GB of bf16, {runs} runs")
    print(f"{'median of the runs':<44} {'wall s':>8} {'CPU s':>8} {'peak MB':>9} {'x cp':>8}")
    base = result["cp of the source"]
    for name, cost in result.items():
        print(row(name, cost, base))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--sizes", nargs="+", default=["0.8B", "4B"])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    first, second = compilation(args.work, args.runs)
    print(
        f"kernels compiled once: {first.wall - second.wall:.2f} s of wall time, "
        f"{first.cpu - second.cpu:.2f} s of CPU time (embedded checkpoint, "
        f"{first.wall:.2f} s with an empty cache, {second.wall:.2f} s again)"
    )
    ours = {}
    for i, size in enumerate(args.sizes):
        costs = compare(size, args.work, args.runs, theirs=i == 0)
        ours[size] = costs["qwen35 convert"]
        if i == 0:
            for name, cost in costs.items():
                if "bitsandbytes" in name:
                    ratio = cost.cpu / ours[size].cpu
                    print(f"CPU time of {name} / ours: {ratio:.1f}")
    if len(ours) > 1:
        memory = [cost.memory for cost in ours.values()]
        print(f"peak memory, largest / smallest of the sizes: {max(memory) / min(memory):.2f}")


if __name__ == "__main__":
    main()
