"""Compare what the oracles decoded with the golden hashes: golden.py WORK [--write]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from oracles.answers import read_cases
from served_artifacts import GOLDEN


def given(work: Path) -> dict[str, dict[str, str]]:
    """Return the hashes of every artifact's weights, from all oracles.

    Raises:
        ValueError: two do not agree, or none decoded a weight.
    """
    merged: dict[str, dict[str, str]] = {}
    for path in sorted((work / "given").glob("*.json")):
        for artifact, hashes in json.loads(path.read_text()).items():
            known = merged.setdefault(artifact, {})
            for weight, found in hashes.items():
                if known.setdefault(weight, found) != found:
                    raise ValueError(f"{path.stem} decodes {weight} of {artifact} differently")
    for artifact, case in read_cases(work, None).items():
        if len(merged.get(artifact, {})) != len(case["packed"]):
            raise ValueError(f"no oracle decoded all weights of {artifact}")
    return merged


def main(work: Path, *, write: bool) -> int:
    """Write the golden file, or return 1 if it says something else."""
    found = given(work)
    if write:
        GOLDEN.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
    if json.loads(GOLDEN.read_text()) == found:
        return 0
    print(f"{GOLDEN.name} is not what the oracles gave: read why, then run make golden-served")
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), write=sys.argv[2:] == ["--write"]))
