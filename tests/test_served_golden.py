"""Formats that servers run, decoded to what other people's programs made of the same files.

They gave the hashes in tests/golden/served.json (`make test-oracles`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import Tensors
from oracles.answers import fingerprints
from served_artifacts import GOLDEN, SERVED, decoded_weights
from verifying import check, rewrite

RECORDED: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


def test_every_artifact_was_decoded_by_an_oracle() -> None:
    assert RECORDED.keys() == SERVED.keys()


@pytest.mark.parametrize("name", SERVED)
def test_decoded_as_the_oracles_did(name: str, work: Path) -> None:
    artifact = SERVED[name].make(work)
    assert check(artifact).findings == ()
    assert fingerprints(decoded_weights(artifact)) == RECORDED[name]


def swap_nibbles(codes: torch.Tensor) -> torch.Tensor:
    both = codes.contiguous().view(torch.uint8)
    return (both >> 4 | both << 4).view(codes.dtype)


def one_step(scales: torch.Tensor) -> torch.Tensor:
    """Return scales that are one step of their format smaller."""
    kind = torch.uint8 if scales.dtype == torch.float8_e4m3fn else torch.int16
    return (scales.view(kind) - 1).view(scales.dtype)


@pytest.mark.parametrize(
    ("name", "part", "change"),
    [
        ("asset-nvfp4", "weight_packed", swap_nibbles),
        ("asset-nvfp4", "weight_scale", one_step),
        ("asset-nvfp4-modelopt", "weight", swap_nibbles),
        ("asset-int4-g32-asym", "weight_zero_point", swap_nibbles),
        ("asset-int4-gptq", "qweight", swap_nibbles),
        ("asset-fp8-channel", "weight_scale", one_step),
    ],
)
def test_other_numbers_have_other_hashes(
    name: str, part: str, change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    module = "7.mlp.down_proj"

    def spoil(tensors: Tensors) -> None:
        full = f"model.language_model.layers.{module}.{part}"
        tensors[full] = change(tensors[full])

    made = SERVED[name].make(tmp_path)
    rewrite(made, spoil)
    found = fingerprints(decoded_weights(made))
    assert {key for key in found if found[key] != RECORDED[name][key]} == {module}
