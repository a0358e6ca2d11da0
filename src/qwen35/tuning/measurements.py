"""Measurements in a file, reused by resumed runs, other budgets, and fine-tunes of the model."""

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
from qwen35.tuning.fit import Probe
from qwen35.version import __version__

__all__ = ["MeasuredTrial", "MeasurementKey", "Measurements", "load_measurements", "model_digest"]

_VERSION = 2
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
        tool: version of this package.
    """

    format: str
    model: str
    text: str
    context: int
    chunks: int
    imatrix: str = ""
    tool: str = __version__


@dataclass(frozen=True)
class MeasuredTrial:
    """A whole allocation that was written and measured.

    Args:
        digest: of the allocation.
        nbytes: of its weight files.
        predicted: mean divergence predicted by the fit, in nats.
        kld: measured mean divergence, in nats.
    """

    digest: str
    nbytes: int
    predicted: float
    kld: float


@dataclass
class Measurements:
    """All measurements of one model in one format.

    Args:
        key: everything they depend on.
        name: display name of the model.
        errors: unit to choice to relative squared error.
        groups: probed group to its units.
        probes: measured divergences of groups.
        trials: measured divergences of whole allocations.
    """

    key: MeasurementKey
    name: str
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)
    trials: list[MeasuredTrial] = field(default_factory=list)

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
    if not isinstance(content, dict) or content.pop("version", None) != _VERSION:
        raise InputError(str(path), "no measurements of `qwen35 tune` in it")
    try:
        return _parsed(content)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(str(path), f"malformed measurements ({error})") from error


def _parsed(content: Mapping[str, Any]) -> Measurements:
    errors = {
        unit: {choice: _number(value) for choice, value in row.items()}
        for unit, row in content["errors"].items()
    }
    groups = {name: list(map(str, units)) for name, units in content["groups"].items()}
    probes = [
        Probe(str(p["group"]), str(p["choice"]), _number(p["kld"])) for p in content["probes"]
    ]
    if strange := [probe.group for probe in probes if probe.group not in groups]:
        raise ValueError(f"a probe of the group {strange[0][:80]!r}, which is not listed")
    return Measurements(
        MeasurementKey(**content["key"]),
        str(content["name"]),
        errors,
        groups,
        probes,
        [_trial(**row) for row in content["trials"]],
    )


def _trial(digest: str, nbytes: int, predicted: float, kld: float) -> MeasuredTrial:
    return MeasuredTrial(str(digest), int(_number(nbytes)), _number(predicted), _number(kld))


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
