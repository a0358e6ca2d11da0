"""Served formats at their limits: scales that a dtype cannot hold, and parts that nobody reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import Tensors
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.codecs.codec import Piece
from qwen35.codecs.foreign import foreign_packing
from qwen35.codecs.int4.arrays import QuantizedRows
from qwen35.codecs.nvfp4.arrays import decode_rows
from qwen35.codecs.registry import CODECS
from qwen35.codecs.roundtrip import RoundTrip
from qwen35.errors import TensorError
from qwen35.tensors import TensorSpec
from running import changed, load_all, statistics
from verifying import check, edited, found

Capture = pytest.CaptureFixture[str]
DOWN = "model.language_model.layers.1.mlp.down_proj"


def convert(source: Path, out: Path, *flags: str) -> int:
    return main(["convert", str(source), str(out), "--quiet", "--threads", "1", *flags])


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The dense model in both layouts of INT4."""
    folder = tmp_path_factory.mktemp("packed")
    for recipe in ("int4", "int4-gptq"):
        assert convert(dense, folder / recipe, "--recipe", recipe) == 0
    return {recipe: folder / recipe for recipe in ("int4", "int4-gptq")}


def telling(settings: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"].update(settings)


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "the first, by default": ({"checkpoint_format": None}, ""),
    "with zero points": ({"sym": False}, ""),
    "in the order of activations": ({"desc_act": True}, ""),
    "the second": ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
    "the second, by its other name": ({"format": "gptq_v2"}, "gptq_v2"),
    "permuted": ({"checkpoint_format": "marlin"}, "marlin"),
    "permuted, as AutoGPTQ said it": ({"is_marlin_format": True}, "marlin"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_gptq_that_only_config_tells(
    name: str, packed: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    settings, form = FORMS[name]
    copy = edited(packed["int4-gptq"], tmp_path / "copy", config=telling(settings))
    if not form:
        assert open_folder(copy).foreign is None
        return
    assert convert(copy, tmp_path / "out", "--recipe", "bf16") == 2
    assert f"weights packed as GPTQ in the form {form}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert [f for f in found(check(copy, depth="numbers")) if f[0] != "packing"] == []


@pytest.mark.parametrize("value", [3, True, [], {}, ["gptq_v2"], 1.5])
def test_a_form_of_another_type_is_none(value: object) -> None:
    raw = {"quantization_config": {"quant_method": "gptq", "checkpoint_format": value}}
    assert foreign_packing(raw, (), set(), ours=True) is None


def shuffle(tensors: Tensors) -> None:
    tensors[f"{DOWN}.g_idx"] = tensors[f"{DOWN}.g_idx"].flip(0)


IGNORED: dict[str, tuple[Callable[[Tensors], object], dict[str, Any]]] = {
    "groups": (shuffle, {"desc_act": True}),
    "zero points": (lambda t: t[f"{DOWN}.qzeros"].fill_(-0x77777778), {"sym": False}),
}


@pytest.mark.sentences
@pytest.mark.parametrize("name", IGNORED)
def test_parts_that_engines_ignore_are_findings(
    name: str, packed: dict[str, Path], tmp_path: Path
) -> None:
    change, told = IGNORED[name]
    silent = edited(packed["int4-gptq"], tmp_path / "silent", change)
    wrong = {("quantization-config", f"{DOWN}.weight")}
    assert found(check(silent, depth="numbers")) == wrong
    fine = edited(packed["int4-gptq"], tmp_path / "fine", change, telling(told))
    assert found(check(fine, depth="numbers")) == set()


@pytest.mark.parametrize("recipe", ["bf16", "int4"])
def test_a_stored_shape_of_others_is_refused(
    recipe: str, packed: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    name = f"{DOWN}.weight_shape"
    broken = edited(packed["int4"], tmp_path / "broken", lambda t: t[name].copy_(t[name].flip(0)))
    assert convert(broken, tmp_path / "out", "--recipe", recipe) == 2
    assert f"{name}: holds [" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert found(check(broken, depth="numbers")) == {("decode", name)}


def round_trip(codec: str, dtype: str, factor: float) -> Any:
    """Return the relative error of a weight of numbers up to `factor`."""
    whole = np.random.default_rng(5).uniform(-factor, factor, (8, 256)).astype(np.float32)
    whole[:, ::128] = factor  # the largest of each group
    values = whole.astype(np.float16 if dtype == "F16" else np.float32)
    trip = RoundTrip(CODECS[codec], TensorSpec("a.weight", dtype, values.shape))
    piece = Piece(0, values, dtype)
    trip.add(piece)
    trip.finish()
    exact = values.astype(np.float64)
    return np.linalg.norm(trip.decoded(piece) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize(("factor", "most"), [(1e-39, 1), (4e-6, 0.15), (1, 0.15), (4e5, 0.15)])
def test_scales_that_f16_holds(factor: float, most: float) -> None:
    """Weights of subnormal size become zeros, as in NVFP4."""
    assert round_trip("int4-gptq", "F32", factor) <= most


@pytest.mark.parametrize("factor", [1e-30, 1e-8, 3e-7, 1e6, 3e37])
@pytest.mark.parametrize("codec", ["int4-gptq", "int4-g32-gptq"])
def test_scales_that_f16_does_not_hold(codec: str, factor: float) -> None:
    with pytest.raises(TensorError, match=r"a\.weight: a scale of .*, which F16 cannot hold"):
        round_trip(codec, "F32", factor)
    assert round_trip(codec.removesuffix("-gptq"), "F32", factor) < 0.15


@pytest.mark.parametrize("codec", ["int4", "int4-g32", "int4-asym", "fp8-channel"])
def test_scales_of_half_precision_checkpoints(codec: str) -> None:
    assert round_trip(codec, "F16", 65000.0) < 0.15
    assert round_trip(codec, "F16", 0.01) < 0.15
    with pytest.raises(TensorError, match="which F16 cannot hold"):
        round_trip(codec, "F16", 2e-7)


def test_extremes_whose_difference_is_infinite() -> None:
    values = np.tile(np.array([3e38, -3e38], np.float32), (8, 64))
    trip = RoundTrip(CODECS["int4-asym"], TensorSpec("a.weight", "F32", values.shape))
    with pytest.raises(TensorError, match="a scale of inf, which F32 cannot hold"):
        trip.add(Piece(0, values, "F32"))


@pytest.mark.parametrize("factor", [1e7, 1e-8])
def test_weights_out_of_range_leave_nothing(
    factor: float, dense: Path, tmp_path: Path, capsys: Capture
) -> None:
    weight = load_all(dense)[f"{DOWN}.weight"] * factor
    source = changed(dense, tmp_path / "source", {f"{DOWN}.weight": weight})
    assert convert(source, tmp_path / "out", "--recipe", "int4-gptq") == 2
    error = capsys.readouterr().err
    assert f"{DOWN}.weight: a scale of" in error
    assert "--layout compressed-tensors" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_weights_of_subnormal_size_pass_the_check(layout: str, dense: Path, tmp_path: Path) -> None:
    """Their scale has no finite inverse, so they become zeros with a scale of 1."""
    weight = torch.full_like(load_all(dense)[f"{DOWN}.weight"], 1e-39)
    source = changed(dense, tmp_path / "source", {f"{DOWN}.weight": weight})
    out = tmp_path / "out"
    assert convert(source, out, "--recipe", "nvfp4", "--layout", layout) == 0
    assert check(out, source).findings == ()


def test_inputs_of_subnormal_size_are_zeros(dense: Path, tmp_path: Path, capsys: Capture) -> None:
    stats = statistics(dense, tmp_path)
    table = json.loads(stats.read_text())
    columns = table[f"{DOWN}.weight"]["input_channel_max"]
    table[f"{DOWN}.weight"]["input_channel_max"] = [1e-45] * len(columns)
    stats.write_text(json.dumps(table))
    flags = ("--recipe", "nvfp4", "--activations", "--activation-stats", str(stats))
    assert convert(dense, tmp_path / "out", *flags) == 2
    assert f"no inputs of {DOWN}.weight, or only zeros" in capsys.readouterr().err


def test_infinite_scales_warn_of_nothing() -> None:
    """Readers refuse what comes out; pytest makes an error of each warning."""
    infinite = np.full((1, 1), np.inf, np.float32)
    assert not np.isfinite(decode_rows(np.zeros((1, 8), np.uint8), infinite)).any()
    codes = np.full((1, 16), 8, np.uint8)
    assert not np.isfinite(QuantizedRows(codes, infinite, codes[:, :1]).values).any()
