"""Folders of Hessians of made-up inputs, as `qwen35 calibrate --hessian` writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from qwen35.array_types import F32
from qwen35.calibration.hessian_inputs import PlannedInput, file_of, planned_inputs
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.source import open_folder
from qwen35.planning.hessians import HESSIANS, MeasuredInput, hessian_head, triangle_rows


def inputs(columns: int, tokens: int, *, seed: int, spectrum: float = 1.0) -> tuple[F32, F32]:
    """Return [K, K] sums of x x^T over tokens to fit to and over others.

    Args:
        columns: K.
        tokens: to fit to; half as many are held out.
        seed: of the order of columns.
        spectrum: how fast their principal components shrink; 0 for white inputs.
    """
    order = np.random.default_rng(seed).permutation(columns)
    fit, held_out = _sums(columns, tokens, spectrum)
    return fit[np.ix_(order, order)], held_out[np.ix_(order, order)]


@lru_cache(maxsize=32)
def _sums(columns: int, tokens: int, spectrum: float) -> tuple[F32, F32]:
    generator = np.random.default_rng(0)
    axes, _ = np.linalg.qr(generator.standard_normal((columns, columns)))
    shape = axes * np.arange(1, columns + 1) ** (-spectrum / 2)
    x = (generator.standard_normal((tokens + tokens // 2, columns)) @ shape.T).astype(np.float32)
    fit, held_out = x[:tokens], x[tokens:]
    return fit.T @ fit, held_out.T @ held_out


def write_hessians(
    model: Path,
    out: Path,
    *,
    tokens: int = 600,
    spectrum: float = 1.0,
    source: Mapping[str, object] | None = None,
    about: Mapping[str, object] | None = None,
) -> Path:
    """Write Hessians of all inputs of a checkpoint; experts of a layer share each of theirs.

    `source` is what they say of the model that they are of, `about` what else they say.
    """
    checkpoint = open_folder(model)
    blocks = planned_inputs(inventory(checkpoint), checkpoint.config)
    files: dict[str, dict[str, PlannedInput]] = {}
    for block, planned in blocks.items():
        for name, one in planned.items():
            file, inner = file_of(block, name)
            files.setdefault(file, {})[inner] = one
    provenance: dict[str, object] = {"geometry": checkpoint.config.geometry, "files": sorted(files)}
    provenance |= dict(about or {}) | ({} if source is None else {"source": source})
    (out / HESSIANS).mkdir(parents=True)
    for seed, (file, planned) in enumerate(files.items()):
        _write(out / HESSIANS / file, planned, provenance, seed, tokens, spectrum)
    return out


def _write(
    path: Path,
    planned: dict[str, PlannedInput],
    provenance: Mapping[str, object],
    seed: int,
    tokens: int,
    spectrum: float,
) -> None:
    sums = {
        name: inputs(one.columns, tokens, seed=1000 * seed + i, spectrum=spectrum)
        for i, (name, one) in enumerate(planned.items())
    }
    about = {
        name: MeasuredInput(one.columns, tokens, tokens // 2, (*one.weights, *_experts(one)))
        for name, one in planned.items()
    }
    hashes = {name: [_hash(matrix) for matrix in both] for name, both in sums.items()}
    with path.open("wb") as file:
        file.write(hessian_head(about, hashes, provenance))
        for both in sums.values():
            for matrix in both:
                file.writelines(row.tobytes() for row in triangle_rows(matrix))


def _experts(planned: PlannedInput) -> list[str | tuple[str, int]]:
    return [weight for readers in planned.experts.values() for weight in readers]


def _hash(matrix: F32) -> str:
    return hashlib.sha256(matrix[np.triu_indices(len(matrix))].tobytes()).hexdigest()
