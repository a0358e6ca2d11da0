"""Measurements in a file, reused by other budgets and engines, and by fine-tunes of the model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen35.checkpoint.header import strict_json
from qwen35.checkpoint.locations import read_bounded
from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import InputError
from qwen35.sinks.files import hash_file, replace_file
from qwen35.sinks.staging import os_errors
from qwen35.tuning.prices import MOST, ExpertPrices, Prices, RefinedShares
from qwen35.version import __version__

__all__ = ["MeasurementKey", "Measurements", "Probe", "load_measurements", "model_digest"]

_VERSION, _BY_PROBES = 3, 2
_MAX_BYTES = 2**28
"""Bound on the file's bytes, far above any real one: users pass files of others."""


@dataclass(frozen=True)
class MeasurementKey:
    """Everything the measurements depend on.

    Args:
        format: of the artifacts.
        model: digest of the weights.
        text: SHA-256 of the text.
        context: tokens per chunk.
        chunks: most chunks measured.
        imatrix: digest of the importance matrix, if any.
        sample: every how many rows candidates were compared.
        tool: version of this package.
        weights: number of weights whose type is chosen.
    """

    format: str
    model: str
    text: str
    context: int
    chunks: int
    imatrix: str = ""
    sample: int = 1
    tool: str = __version__
    weights: int = 0


@dataclass(frozen=True)
class Probe:
    """A model that was written and measured in its engine, to check prices.

    Args:
        name: of the group that was as chosen, all else exact; empty for a whole recipe.
        digest: of the allocation.
        kld: measured mean divergence, in nats.
    """

    name: str
    digest: str
    kld: float


@dataclass
class Measurements:
    """All measurements of one model in one format.

    Args:
        key: everything they depend on.
        name: display name of the model.
        prices: of every unit; none before they are measured.
        origin: the model whose prices these are, if this one was fine-tuned from it.
        probes: measured divergences.
        refined: what refined codes leave of the prices, if it was compared.
    """

    key: MeasurementKey
    name: str
    prices: Prices = field(default_factory=Prices)
    origin: str = ""
    probes: list[Probe] = field(default_factory=list)
    refined: RefinedShares | None = None

    def save(self, path: Path) -> None:
        """Write the file, replacing an old one atomically."""
        content = {"version": _VERSION, **asdict(self)}
        with os_errors(path):
            replace_file(path, json.dumps(content, indent=1, sort_keys=True).encode())


def load_measurements(path: Path) -> Measurements:
    """Read a file written by `Measurements.save`.

    Raises:
        InputError: the file cannot be read, or has another format.
    """
    content = strict_json(read_bounded(path, _MAX_BYTES), str(path))
    version = content.pop("version", None) if isinstance(content, dict) else None
    if version == _BY_PROBES:
        raise InputError(
            str(path),
            "measured by probes, with an earlier qwen35",
            expected="prices",
            hint="give another --measurements, or move it away: prices take a fraction of the time",
        )
    if version != _VERSION:
        raise InputError(str(path), "no measurements of `qwen35 tune` in it")
    try:
        return _parsed(content)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(str(path), f"malformed measurements ({str(error)[:200]})") from error


def _parsed(content: Mapping[str, Any]) -> Measurements:
    key = MeasurementKey(**content["key"])
    for name, value in vars(key).items():
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise ValueError(f"{name} is {repr(value)[:80]}")
    found = content["prices"]
    weights, inputs = _table(found["weights"]), _table(found["inputs"])
    if {unit: set(row) for unit, row in weights.items()} != {u: set(r) for u, r in inputs.items()}:
        raise ValueError("weights and inputs of other units or types")
    experts = {unit: _experts(one) for unit, one in found["experts"].items()}
    for unit, one in experts.items():
        if set(one.prices) != set(weights.get(unit, {})):
            raise ValueError(f"experts of {unit[:80]!r} in other types")
    return Measurements(
        key,
        _text(content["name"]),
        Prices(weights, inputs, experts),
        _text(content["origin"]),
        [Probe(_text(p["name"]), _text(p["digest"]), _number(p["kld"])) for p in content["probes"]],
        _refined(content.get("refined")),
    )


def _refined(found: Mapping[str, Any] | None) -> RefinedShares | None:
    if found is None:
        return None
    shares = _table(found["shares"])
    if any(share > 1 for row in shares.values() for share in row.values()):
        raise ValueError("a share above 1")
    return RefinedShares(_text(found["hessians"]), shares)


def _table(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        _text(unit): {_text(choice): _price(value) for choice, value in row.items()}
        for unit, row in rows.items()
    }


def _experts(one: Mapping[str, Any]) -> ExpertPrices:
    tokens = [int(_price(count)) for count in one["tokens"]]
    prices = {choice: list(map(_price, row)) for choice, row in one["prices"].items()}
    if any(len(row) != len(tokens) for row in prices.values()):
        raise ValueError("prices of other experts than tokens")
    return ExpertPrices(tokens, prices)


def _price(value: Any) -> float:
    if not 0 <= _number(value) < MOST:
        raise ValueError(f"{repr(value)[:80]} is no price")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{repr(value)[:80]} is not a text")
    value.encode()  # half of a surrogate pair, which JSON can hold, could not be written again
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise ValueError(f"{repr(value)[:80]} is not a number")
    return value


def model_digest(checkpoint: Checkpoint) -> str:
    """Return an identifier of the weights: the commit on the Hub, or a SHA-256 over all files.

    Adapters that change them follow.
    """
    effects = [adapter.effect_json() for adapter in checkpoint.adapters]
    added = hashlib.sha256(json.dumps(effects).encode()).hexdigest() if effects else ""
    return f"{_stored_digest(checkpoint)}+{added}" if effects else _stored_digest(checkpoint)


def _stored_digest(checkpoint: Checkpoint) -> str:
    if checkpoint.revision:
        return f"{checkpoint.repo}@{checkpoint.revision}"
    digest = hashlib.sha256()
    for name in sorted(checkpoint.file_sizes):
        digest.update(f"{name} {hash_file(checkpoint.folder() / name)}\n".encode())
    return digest.hexdigest()
