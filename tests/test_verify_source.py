"""The verifier beside a source: relative errors, and sources that are others."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import Tensors, make_checkpoint, random_tensors, write_checkpoint
from qwen35.cli.main import main
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.fp8.error_sums import ErrorSums
from qwen35.codecs.nf4.arrays import AbsmaxStatistics
from qwen35.codecs.nf4.judge import same_mean, wrong_scales
from qwen35.errors import Finding
from qwen35.tensors import TensorSpec, Weight
from qwen35.verification.bands import WORST_ERROR
from qwen35.verification.numbers_check import NumbersResult
from qwen35.verification.role_errors import by_role
from qwen35.verification.subject import HeldWeight
from running import load_all, read_config, run
from verifying import PIECE, check, rewrite

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
UP = f"{LAYER}.1.mlp.up_proj.weight"
NORM = "model.language_model.norm.weight"


def test_relative_errors_are_those_of_the_decoded_weights(nf4_artifact: Path, dense: Path) -> None:
    rows = {row.role: row for row in check(nf4_artifact, dense).errors}
    assert rows["embed_tokens"].relative == 0
    assert rows["linear_attn.in_proj_qkv"].count == 3
    assert 0.08 < rows["linear_attn.in_proj_qkv"].relative < 0.1
    from bitsandbytes.functional import QuantState, dequantize_4bit

    tensors, total, norm = load_all(nf4_artifact), 0.0, 0.0
    for i in range(3):
        name = f"{LAYER}.{i}.linear_attn.in_proj_qkv.weight"
        parts = {k: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        state.dtype = torch.float32
        original = load_all(dense)[name].double()
        total += float((dequantize_4bit(tensors[name], state).double() - original).square().sum())
        norm += float(original.square().sum())
    assert rows["linear_attn.in_proj_qkv"].relative == pytest.approx(
        (total / norm) ** 0.5, rel=1e-5
    )


def test_another_models_source_is_seen(nf4_artifact: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=7)
    checks = {finding.check for finding in check(nf4_artifact, other).findings}
    assert {"bytes", "codes"} <= checks
    larger = make_checkpoint(tmp_path / "larger", layers=8)
    [finding] = check(nf4_artifact, larger).findings
    message = f"layers 4, the source 8: is {larger} its source?"
    assert (finding.check, finding.message) == ("source", message)


def test_a_source_of_other_sizes_is_seen(dense: Path, tmp_path: Path) -> None:
    config = read_config(dense)
    config["text_config"]["intermediate_size"] *= 2
    wider = write_checkpoint(tmp_path / "wider", config, random_tensors(config))
    [finding] = check(dense, wider).findings
    assert finding.message == f"ffn 512, the source 1024: is {wider} its source?"


def test_a_source_that_is_not_finite_is_just_another(
    nf4_artifact: Path, dense: Path, tmp_path: Path
) -> None:
    tensors = load_all(dense)
    tensors[NORM][3] = float("nan")
    other = write_checkpoint(tmp_path / "other", read_config(dense), tensors)
    [finding] = check(nf4_artifact, other).findings
    assert (finding.check, finding.subject) == ("bytes", NORM)


@pytest.mark.usefixtures("small_pieces")
def test_errors_of_every_piece_are_summed(nf4_artifact: Path, dense: Path) -> None:
    small = {row.role: (row.squared, row.norm) for row in check(nf4_artifact, dense).errors}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen35.codecs.pieces.PIECE", 2**19)
        large = {row.role: (row.squared, row.norm) for row in check(nf4_artifact, dense).errors}
    assert small.keys() == large.keys()
    for role, pair in small.items():
        assert pair == pytest.approx(large[role], rel=1e-9)
    assert large["linear_attn.in_proj_qkv"][0] > 0


@pytest.mark.usefixtures("small_pieces")
def test_restored_values_of_every_piece_are_counted(
    nf4_artifact: Path, dense: Path, tmp_path: Path
) -> None:
    """bf16 made from NF4, beside the NF4: other values in the first, the second, the last piece."""
    out = run(nf4_artifact, tmp_path / "out", "bf16").out

    def change(tensors: Tensors) -> None:
        tensors[QKV].view(-1)[[0, 7, PIECE, -1]] += 1

    rewrite(out, change)
    found = {f.subject: f.message for f in check(out, nf4_artifact).findings}
    assert found == {QKV: "4 of 131072 values differ"}


def test_a_weight_quantized_once_among_others_is_named(broken_nf4: Path) -> None:
    def lose(tensors: Tensors) -> None:
        for part in ("nested_absmax", "nested_quant_map"):
            del tensors[f"{UP}.{part}"]
        tensors[f"{UP}.absmax"] = tensors[f"{UP}.absmax"].float()

    rewrite(broken_nf4, lose)
    found = {(f.check, f.subject): f.message for f in check(broken_nf4).findings}
    assert found == {
        ("quantization-config", UP): "quantized once, but bnb_4bit_use_double_quant is True"
    }


def test_errors_of_a_role_are_summed_and_the_worst_is_kept() -> None:
    rows = by_role(
        [
            ("up", "nf4", WeightComparison(squared=1.0, norm=4.0)),
            ("norm", "plain", WeightComparison(squared=0.0, norm=0.0)),
            ("up", "nf4", WeightComparison(squared=2.0, norm=32.0)),
            ("up", "plain", WeightComparison(squared=0.0, norm=9.0)),
            ("down", "nf4", WeightComparison(squared=1.0, norm=0.0)),
        ]
    )
    assert [(r.role, r.storage, r.count, r.squared, r.norm, r.worst) for r in rows] == [
        ("up", "nf4", 2, 3.0, 36.0, 0.5),
        ("norm", "plain", 1, 0.0, 0.0, 0.0),
        ("up", "plain", 1, 0.0, 9.0, 0.0),
        ("down", "nf4", 1, 1.0, 0.0, math.inf),
    ]
    assert [row.relative for row in rows] == [(3 / 36) ** 0.5, 0.0, 0.0, math.inf]


def test_what_saturates_too_much_is_too_far() -> None:
    """An error that rounding could explain, or that a code astray explains, is no more to say."""
    sound = ErrorSums(count=4, squared=4 * WORST_ERROR**2, norm=4.0, clipped=2)
    beyond = replace(sound, squared=4 * 0.07**2, clipped=3)
    fp8 = {"a": sound, "b": beyond, "c": replace(beyond, misplaced=1)}
    compared = [
        (
            HeldWeight(Weight(name, "fp8", ()), TensorSpec(name, "BF16", (2, 2)), name, "fp8"),
            WeightComparison(name, errors=asdict(errors)),
        )
        for name, errors in fp8.items()
    ]
    assert list(NumbersResult((), compared, ()).too_far()) == [
        Finding("error", "b", "relative error 0.0700, expected at most 0.0625 (3 weights saturate)")
    ]


def test_weights_that_one_side_alone_has_are_named(
    nf4_artifact: Path, dense: Path, tmp_path: Path
) -> None:
    """But for the tower and the MTP layer, which may be left out as a whole."""
    tied, own = (make_checkpoint(tmp_path / str(tied), tied=tied) for tied in (True, False))
    for artifact, source, message in (
        (tied, own, "in the source, but not here"),
        (own, tied, "the source has no such weight"),
    ):
        found = [f for f in check(artifact, source).findings if f.check == "source"]
        assert [(f.subject, f.message) for f in found] == [("lm_head.weight", message)]
    text = run(dense, tmp_path / "text", "text").out
    assert check(text, dense).findings == ()
    without = make_checkpoint(tmp_path / "without", mtp=0)
    assert not any(f.check == "source" for f in check(without, dense).findings)


def test_at_depth_structure_headers_and_settings_are_compared(
    broken_nf4: Path, dense: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    # no weight is read
    monkeypatch.setattr("qwen35.checkpoint.source.FolderReader.read_into", None)
    arguments = ["verify", str(broken_nf4), "--source", str(dense), "--depth", "structure"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "passed: headers and settings compared with the source, weights not read" in out
    rewrite(broken_nf4, lambda tensors: tensors.pop(NORM))
    config = read_config(broken_nf4)
    config["text_config"]["rope_parameters"]["rope_theta"] = 5
    (broken_nf4 / "config.json").write_text(json.dumps(config))
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert f"{NORM}: in the source, but not here [source]" in out
    assert "rope_theta is 5" in out


def test_at_depth_structure_a_published_size_has_no_settings(
    nf4_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(nf4_artifact), "--source", "Qwen3.5-0.8B", "--depth", "structure"]
    assert main(arguments) == 2
    assert "the name of a published size" in capsys.readouterr().err


@pytest.mark.parametrize("delta", [0.01, -0.01])
@pytest.mark.parametrize("degrees", [3, 1000])
def test_a_scale_that_is_off_by_one_percent_is_seen(delta: float, degrees: int) -> None:
    """As `not detected` says of FP8; the lowest bit of a bfloat16 scale is not."""
    values = np.random.default_rng(1).standard_t(degrees, (128, 128)).astype(np.float32)
    scale = np.float32(np.abs(values).max() / 448)
    codes = torch.from_numpy(values / scale).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    for off, seen in ((delta, True), (delta / 2.56, False)):
        errors = ErrorSums()
        errors.add(values, "F32", codes, np.full((1, 1), scale * (1 + off), np.float32))
        assert bool(errors.misplaced) is seen


@pytest.mark.parametrize(("off", "seen"), [(2e-5, True), (5e-6, False)])
def test_constants_of_scales_that_are_off_are_seen(off: float, seen: bool) -> None:
    """As `not detected` says of NF4."""
    absmax = np.random.default_rng(1).random(256).astype(np.float32)
    offset = float(absmax.mean(dtype=np.float64))
    stored = AbsmaxStatistics.of(absmax, offset)
    nested = (stored.nested * (1 + off)).astype(np.float32)
    assert bool(wrong_scales(stored.codes, nested, offset, absmax)) is seen
    assert same_mean(offset + off * float(absmax.max()), absmax) is not seen


def test_smallest_difference_that_is_seen_is_told(nf4_artifact: Path, dense: Path) -> None:
    (said,) = [one for one in check(nf4_artifact, dense).not_detected if one.startswith("NF4")]
    assert said.startswith("NF4: errors below")
    assert "1e-05" in said
