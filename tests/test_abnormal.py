"""When the noise between engines is no noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen35.evaluation.abnormal import LEAST_SAME, MOST_NOISE, is_abnormal, noise_findings
from qwen35.evaluation.divergence import Series, compare_series
from qwen35.evaluation.measured import ModelMeasurement
from qwen35.evaluation.models import EvaluatedModel, TokenizerIdentity


def model(name: str, **changes: Any) -> EvaluatedModel:
    tokens = TokenizerIdentity("qwen35", (), ())
    base = EvaluatedModel(name, Path(name), "transformers", "BF16", True, 1, 1, tokens)
    return replace(base, **changes)


def row(kld: float, wrong: int = 0, tokens: int = 1000, **changes: Any) -> ModelMeasurement:
    nll, top = np.ones((2, tokens // 2)), np.zeros((2, tokens // 2), np.int64)
    other = top.copy()
    other.reshape(-1)[:: max(1, tokens // wrong) if wrong else tokens + 1] = 1
    if not wrong:
        other[:] = 0
    series = Series(nll, other, np.full_like(nll, kld))
    changes = {"engine": "llama.cpp", "stored": "F16", **changes}
    return ModelMeasurement(
        model("file", **changes), compare_series(Series(nll, top), series), [], []
    )


@pytest.mark.parametrize(
    ("kld", "wrong", "tokens", "abnormal"),
    [
        (1.6e-7, 0, 1000, False),
        (4e-6, 2, 1000, False),  # BF16 rounds activations more than F16
        (MOST_NOISE, 0, 1000, False),
        (MOST_NOISE * 1.01, 0, 1000, True),
        (3.1e-3, 60, 1000, True),  # YaRN left out of the file
        (1e-5, 100, 1000, True),
        (1e-5, 2, 100, False),  # 98 %, but of too few tokens
    ],
)
def test_rounding_has_bounds(kld: float, wrong: int, tokens: int, abnormal: bool) -> None:
    assert LEAST_SAME == 0.99
    assert is_abnormal(row(kld, wrong, tokens)) is abnormal


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 1),
        ({"exact": False, "stored": "Q4_K_M"}, 0),  # quantization is no noise
        (
            {"engine": "transformers", "stored": "BF16"},
            0,
        ),  # another checkpoint, such as a decoded one
    ],
)
def test_an_unquantized_file_stands_for_the_base(changes: dict[str, Any], count: int) -> None:
    assert len(list(noise_findings(model("base"), [], [row(1e-2, **changes)]))) == count
