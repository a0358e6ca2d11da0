"""Run a path through its gates, twice: the second run has nothing to do.

python examples/pipeline.py [MODEL OUT]
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import qwen35

TINY = Path(__file__).parent.parent / "assets" / "qwen3.5-tiny"


def main(model: str, out: str) -> None:
    """Run path A twice."""
    for attempt in ("first", "again"):
        result = qwen35.run(model, out, path="A", depth="numbers")
        states = ", ".join(f"{row.step.kind} {row.state}" for row in result.outcomes)
        print(f"{attempt}: {states}; passed: {result.passed}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        with TemporaryDirectory() as folder:
            main(str(TINY), f"{folder}/made")
