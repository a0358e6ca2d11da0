"""Run the benchmarks, print one table, and write the figures that README and documentation show.

    python -m benchmarks [--work DIR] [--size 0.8B|tiny] [--rounds 3] [--only SCRIPT ...]
                         [--output docs/benchmarks.json]

Each script is a process of its own, so that the memory of one does not count in another. Its result
is kept in DIR/results as soon as it ends: the same command after an interruption goes on with the
next one, unless the machine or a library has changed (after a change to our own code, remove that
folder first). Once all are done, OUTPUT is written and the kept results are removed. `python
docs/generate.py` builds the tables from it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROOT, environment, ratio_lines

SCRIPTS = ("nf4", "fp8", "gguf", "served", "verify", "evaluate", "calibrate", "forward", "headers")


def kept(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of an earlier, interrupted run on the same machine, if there is one."""
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    same = found["environment"] == environment() and found["settings"] == settings
    return found if same else None


def measured(script: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return a script's result; run it unless that is kept."""
    path, settings = folder / f"{script}.json", {"size": args.size, "rounds": args.rounds}
    if found := kept(path, settings):
        print(f"{script}: kept from the interrupted run")
        return found
    command = [sys.executable, "-m", f"benchmarks.{script}", "--json", path, "--work", args.work]
    command += ["--size", args.size, "--rounds", args.rounds]
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work")
    parser.add_argument("--size", default="0.8B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, help="the others keep their figures")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks.json")
    args = parser.parse_args()
    args.work = args.work.resolve()
    folder = args.work / "results"
    folder.mkdir(parents=True, exist_ok=True)
    known = json.loads(args.output.read_text("utf-8")) if args.output.exists() else {}
    for script in args.only or SCRIPTS:
        known[script] = measured(script, folder, args)
    results = {script: known[script] for script in SCRIPTS if script in known}
    args.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    shutil.rmtree(folder)
    print("\n".join(ratio_lines(results.values())))


if __name__ == "__main__":
    main()
