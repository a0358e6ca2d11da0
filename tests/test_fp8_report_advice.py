"""The advice of the FP8 report: following it improves what it speaks of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from checkpoints import tiny_config, write_checkpoint
from fp8_reports import ASTRAY, FAULTS, SEARCH, edited, errors, make_source, report_of, report_on
from qwen35.checkpoint.open import fetch
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import Finding
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.fp8_report import Fp8Report
from qwen35.writing.write import write
from running import load_all

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
UP = f"{LAYER}.3.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("report", "advice"),
    [
        (report_of("max", {UP: errors(0.02)}), []),
        (report_of("max", {}, Finding("bytes", UP, "differ")), []),
        (report_of("max", {UP: errors(0.04)}), [SEARCH]),
        (report_of("search", {UP: errors(0.02), QKV: errors(0.04, misplaced=1)}), [ASTRAY]),
        (
            report_of("rms", {UP: errors(0.02), QKV: errors(0.04, clipped=9)}),
            ["9 weights saturate: raise --rms-factor (now 3) until none does.", SEARCH],
        ),
        (
            report_of("percentile", {UP: errors(0.04, clipped=2), QKV: errors(0.02, clipped=3)}),
            [
                "5 weights saturate: raise --calib-percentile (now 99.9; 100 saturates none).",
                SEARCH,
            ],
        ),
        (report_of("mse", {UP: errors(0.04, clipped=2)}), [SEARCH]),
        (report_of("max", {UP: errors(0.02)}, Finding("bytes", QKV, "differ")), []),
        (
            report_of("search", {UP: errors(0.04), QKV: errors(0.07)}),
            [
                f"Leave the worst, {QKV}, in bf16: --keep linear_attn.in_proj_qkv "
                "--keep linear_attn.in_proj_z"
            ],
        ),
        (
            report_of("search", {UP: errors(0.061), QKV: errors(0.02, clipped=1)}),
            [f"Leave the worst, {UP}, in bf16: --keep mlp.gate_proj --keep mlp.up_proj"],
        ),
        (
            report_of("search", {UP: errors(0.065), QKV: errors(0.064)}),
            [f"Leave the worst, {UP}, in bf16: --keep mlp.gate_proj --keep mlp.up_proj"],
        ),
    ],
)
def test_advice_is_about_what_is_not_good(report: Fp8Report, advice: list[str]) -> None:
    assert list(report.recommendations()) == advice


def advice(report: Fp8Report) -> str:
    return "\n".join(report.recommendations())


def better(before: Fp8Report, after: Fp8Report, *names: str) -> None:
    """Check that every metric that was not good, or those named, is better now."""
    for metric in before.metrics:
        if metric.name in names or (not names and metric.band(before.errors.values()) != "GOOD"):
            one, two = before.value(metric), after.value(metric)
            assert two > one if metric.rises else two < one, (metric.name, one, two)


def follow(
    source: Path, folder: Path, scale_choice: ScaleChoice, *keep: str, **more: Any
) -> Fp8Report:
    recipe = load_recipe("fp8").keeping(keep)
    plan = make_plan(fetch(str(source)), recipe, scale_choice=scale_choice)
    return report_on(write(plan, folder, threads=1).out, source, scale_choice, **more)


@pytest.mark.parametrize("bands", ["derived", "documented"])
def test_advice_to_raise_the_rms_factor_is_right(
    bands: Any, fp8_tails: Path, tmp_path: Path
) -> None:
    before = follow(fp8_tails, tmp_path / "a", ScaleChoice("rms"), bands=bands)
    assert re.search(r"raise --rms-factor \(now 3\)", advice(before))
    after = follow(fp8_tails, tmp_path / "b", ScaleChoice("rms", rms_factor=6.0), bands=bands)
    better(before, after)
    best = follow(fp8_tails, tmp_path / "c", ScaleChoice("rms", rms_factor=60.0), bands=bands)
    assert "--rms-factor" not in advice(best)


@pytest.mark.parametrize("bands", ["derived", "documented"])
def test_advice_to_raise_the_percentile_is_right(
    bands: Any, fp8_tails: Path, tmp_path: Path
) -> None:
    before = follow(
        fp8_tails, tmp_path / "a", ScaleChoice("percentile", percentile=99), bands=bands
    )
    assert re.search(r"raise --calib-percentile \(now 99", advice(before))
    after = follow(fp8_tails, tmp_path / "b", ScaleChoice("percentile"), bands=bands)
    better(before, after)
    best = follow(fp8_tails, tmp_path / "c", ScaleChoice("percentile", percentile=100), bands=bands)
    assert "--calib-percentile" not in advice(best)


@pytest.mark.parametrize("bands", ["derived", "documented"])
@pytest.mark.parametrize(
    "scale_choice",
    [
        ScaleChoice("rms"),
        ScaleChoice("percentile", percentile=99),
        ScaleChoice("max"),
        ScaleChoice("mse", grid_size=10),
        ScaleChoice("rms", rms_factor=128),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["tails", "large"])
def test_advice_to_switch_to_search_is_right(
    kind: str,
    scale_choice: ScaleChoice,
    bands: Any,
    fp8_tails: Path,
    fp8_sources: dict[float, Path],
    tmp_path: Path,
) -> None:
    source = fp8_tails if kind == "tails" else fp8_sources[0.2]
    before = follow(source, tmp_path / "a", scale_choice, bands=bands)
    if before.verdict == "GOOD":
        assert advice(before) == ""
        return
    assert "--calib-mode search" in advice(before)
    after = follow(source, tmp_path / "b", ScaleChoice("search"), bands=bands)
    better(before, after, "cosine sim", "mean abs err", "relative RMSE")


@pytest.mark.parametrize(
    "where",
    [
        UP,
        QKV,
        f"{LAYER}.3.self_attn.v_proj.weight",
        f"{LAYER}.3.self_attn.o_proj.weight",
        "mtp.layers.0.self_attn.k_proj.weight",
        "mtp.layers.0.mlp.down_proj.weight",
    ],
)
def test_advice_to_keep_the_worst_can_be_followed_and_helps(where: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", 0.02)
    tensors = load_all(source)
    tensors[where] = (tensors[where].float() * 20).bfloat16()
    large = write_checkpoint(tmp_path / "large", tiny_config(layers=4), tensors)
    before = follow(large, tmp_path / "a", ScaleChoice(), bands="documented")
    assert before.verdict == "FAIL"
    assert where in advice(before)
    keep = re.findall(r"--keep (\S+)", advice(before))
    assert keep
    after = follow(large, tmp_path / "b", ScaleChoice(), *keep, bands="documented")
    assert where not in after.errors
    better(before, after, "worst MAE", "worst MaxAE")


def test_advice_to_keep_experts_can_be_followed(moe: Path, tmp_path: Path) -> None:
    tensors = load_all(moe)
    tensors[f"{LAYER}.1.mlp.experts.down_proj"] *= 20
    config = json.loads((moe / "config.json").read_text())
    large = write_checkpoint(tmp_path / "large", config, tensors)
    before = follow(large, tmp_path / "a", ScaleChoice(), bands="documented")
    keep = re.findall(r"--keep (\S+)", advice(before))
    assert keep == ["mlp.experts"]
    after = follow(large, tmp_path / "b", ScaleChoice(), *keep, bands="documented")
    better(before, after, "worst MAE", "worst MaxAE")


def test_advice_to_convert_again_is_right(
    fp8_sources: dict[float, Path], fp8_outputs: dict[tuple[float, str], Path], tmp_path: Path
) -> None:
    broken = edited(fp8_outputs[0.02, "max"], tmp_path / "broken", FAULTS["doubled scales"])
    before = report_on(broken, fp8_sources[0.02], ScaleChoice("max"))
    assert advice(before).startswith("Codes and scales do not match each other")
    assert len(list(before.recommendations())) == 1
    after = follow(fp8_sources[0.02], tmp_path / "again", ScaleChoice("max"))
    better(before, after, "relative RMSE", "mean abs err", "worst RMSE", "worst MaxAE")
    assert after.verdict == "GOOD"
