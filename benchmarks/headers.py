"""Measure what works on headers alone, on the largest checkpoints: planning, structural checks.

    python -m benchmarks.headers [--work DIR] [--size 0.8B|tiny] [--rounds 3]

Writes headers, indexes and configs of published sizes as sparse files without weights, which take
hardly any disk space, and measures `qwen35 plan` and `qwen35 verify` on them, in turn; also the
start-up of some verbs. 397B in FP8 has 189,042 tensors, 9B with 188 layers in NF4 about 10,000.
With `--size tiny` only the smallest are measured.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from benchmarks.measuring import ASSET, QWEN35, Cost, arguments, made, measure, report

PLANNED = {
    ("9B", "text"): "nf4",
    ("397B-A17B", "text"): "fp8",
    ("397B-A17B", "fp8"): "bf16",
}
"""Size and stored form to the recipe to plan."""
VERIFIED = (("9B", "nf4"), ("deep", "nf4"), ("397B-A17B", "fp8"))
AT_ONCE = 4


def label(size: str, stored: str) -> str:
    """Return what a hollow checkpoint is called."""
    name = "Qwen3.5-9B with 188 layers" if size == "deep" else f"Qwen3.5-{size}"
    return f"{name} in {'bf16' if stored == 'text' else stored}"


def plan(folder: Path, recipe: str) -> list[object]:
    """Return the command that plans."""
    return [*QWEN35, "plan", folder, "--recipe", recipe, "--quiet"]


def together(command: list[object], count: int) -> Cost:
    """Measure several processes of one command at once; the memory is one process's."""
    words = shlex.join(map(str, command))
    waiting = "for job in $(jobs -p); do wait $job || exit 1; done"
    return measure(["bash", "-c", f"{f'{words} & ' * count} {waiting}"])


def once(folders: dict[tuple[str, str], Path], few: bool) -> dict[str, Cost]:
    """Measure every route once."""
    costs = {
        "`qwen35 --help`": measure([*QWEN35, "--help"]),
        "`plan` of the embedded checkpoint": measure(plan(ASSET, "nf4")),
    }
    for (size, stored), recipe in PLANNED.items():
        if folder := folders.get((size, stored)):
            costs[f"`plan` of {label(size, stored)} to {recipe}"] = measure(plan(folder, recipe))
    for size, stored in VERIFIED:
        if folder := folders.get((size, stored)):
            command = [*QWEN35, "verify", folder, "--quiet"]
            costs[f"`verify` of {label(size, stored)}"] = measure(command)
    if not few:
        largest = plan(folders["397B-A17B", "fp8"], "bf16")
        name = f"{AT_ONCE} times the last plan, at once"
        costs[name] = together(largest, AT_ONCE)
    return costs


def main() -> None:
    args = arguments(__doc__)
    few = args.size == "tiny"
    wanted = [pair for pair in (*PLANNED, *VERIFIED) if not few or pair[0] == "9B"]
    folders = {pair: made("hollow", *pair, args.work) for pair in dict.fromkeys(wanted)}
    report(args, "Headers alone", lambda: once(folders, few), ())
    for folder in folders.values():
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
