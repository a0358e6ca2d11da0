"""What every oracle gets and gives; for environments that do not have this package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Answers", "divergence", "fingerprints", "load", "read_cases"]


def read_cases(work: Path, dialect: str | None = "") -> dict[str, dict[str, Any]]:
    """Return what `artifacts.py` wrote about artifacts in a dialect, or about all, by name.

    ``source``, ``artifact`` and ``decoded`` are folders, ``packed`` names of weights, ``ids``
    tokens; ``by_largest`` says whether scales are those of the largest magnitudes, ``effect`` how
    far the logits of ``decoded`` are from those of ``source``.
    """
    cases: dict[str, dict[str, Any]] = json.loads((work / "cases.json").read_text())
    return {n: case for n, case in cases.items() if dialect is None or case["dialect"] == dialect}


def divergence(expected: Any, found: Any) -> float:
    """Return the mean KL divergence of two [tokens, vocabulary] logits, in nats."""
    import numpy as np

    both = (np.asarray(x, np.float64) for x in (expected, found))
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in both)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def load(folder: str) -> dict[str, Any]:
    """Return every tensor of a checkpoint."""
    from safetensors.torch import load_file

    return {n: t for path in Path(folder).glob("*.safetensors") for n, t in load_file(path).items()}


def fingerprints(weights: Mapping[str, Any]) -> dict[str, str]:
    """Return the first digits of the SHA-256 of each weight in bfloat16, by a short name.

    `weights` are torch's tensors of any float dtype, or NumPy's in float32, by full names. Zeros
    have no sign here: ModelOpt decodes them all to the positive one.
    """
    import numpy as np

    found = {}
    for name, tensor in sorted(weights.items()):
        array = tensor if isinstance(tensor, np.ndarray) else tensor.float().numpy()
        bits = np.ascontiguousarray(array).view(np.uint32)
        nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # ties to even
        data = np.where(nearest == 0x8000, 0, nearest).astype(np.uint16).tobytes()
        short = name.removesuffix(".weight").partition("layers.")[2] or name
        found[short] = hashlib.sha256(data).hexdigest()[:12]
    return found


class Answers:
    """Collects what an oracle says.

    Args:
        work: the folder of `artifacts.py`.
        oracle: its name, with the version.
    """

    def __init__(self, work: Path, oracle: str) -> None:
        self._path = work / "given" / f"{oracle}.json"
        self._oracle = oracle
        self._given: dict[str, dict[str, str]] = {}
        self._failed = 0

    def decoded(self, artifact: str, weights: Mapping[str, Any]) -> None:
        """Keep the hashes of the weights that it decoded."""
        self._given.setdefault(artifact, {}).update(fingerprints(weights))

    def tell(self, artifact: str, what: str, problems: Iterable[str]) -> None:
        """Print a line for an artifact."""
        found = list(problems)
        self._failed += bool(found)
        verdict = f"FAILED: {len(found)}, first {found[0]}" if found else "ok"
        print(f"{self._oracle}: {artifact}: {what}: {verdict}", flush=True)

    def close(self) -> int:
        """Write the hashes; return the exit code."""
        self._path.parent.mkdir(exist_ok=True)
        self._path.write_text(json.dumps(self._given))
        return int(self._failed > 0)
