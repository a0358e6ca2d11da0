"""The verifier is silent on good FP8 artifacts, and names faults in most of config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import make_checkpoint, random_tensors, tiny_config, write_checkpoint
from qwen35.checkpoint.source import open_folder
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write
from running import load_all, plan_of, read_config, run
from verifying import check, edited

pytestmark = pytest.mark.sentences

TEXT = "model.language_model"
LAYER = f"{TEXT}.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"


# --- good artifacts


@pytest.mark.parametrize("recipe", ["fp8", "fp8-conservative", "text-fp8", "text-fp8-conservative"])
@pytest.mark.parametrize("source", ["dense", "moe", "moe_per_expert"])
def test_good_artifacts_pass_at_every_depth(
    recipe: str, source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(source)
    out = run(folder, tmp_path / "out", recipe).out
    for verdict in (check(out), check(out, folder), check(out, tensor_parallel=1)):
        assert verdict.findings == ()
        assert verdict.kind == "fp8"
    (out / "qwen35.json").unlink()
    assert check(out).findings == ()


@pytest.mark.parametrize(
    "scale_choice",
    [
        ScaleChoice("max"),
        ScaleChoice("rms"),
        ScaleChoice("percentile"),
        ScaleChoice("mse", grid_size=5),
    ],
    ids=str,
)
def test_every_mode_passes_on_bell_shaped_weights(
    scale_choice: ScaleChoice, dense: Path, tmp_path: Path
) -> None:
    plan = make_plan(open_folder(dense), load_recipe("fp8"), scale_choice=scale_choice)
    assert check(write(plan, tmp_path / "out").out, dense).findings == ()


@pytest.mark.parametrize("keep", [("mlp",), ("self_attn.o_proj", "mtp"), ("linear_attn",)])
def test_kept_roles_pass(keep: tuple[str, ...], dense: Path, tmp_path: Path) -> None:
    out = write(plan_of(dense, "fp8", keep=keep), tmp_path / "out").out
    assert check(out, dense).findings == ()


@pytest.mark.parametrize("source", ["moe", "moe_per_expert"])
def test_kept_experts_pass(source: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(source)
    keep = ("mlp.experts", "mtp.layers.mlp.experts")
    out = write(plan_of(folder, "fp8", keep=keep), tmp_path / "out").out
    assert check(out, folder).findings == ()


def test_a_text_only_source_and_other_float_formats_pass(tmp_path: Path) -> None:
    for number, options in enumerate(
        ({"text_only": True, "tied": False}, {"dtype": "float16"}, {"mtp": 0})
    ):
        source = make_checkpoint(tmp_path / f"in{number}", **options)  # type: ignore[arg-type]
        out = run(source, tmp_path / f"out{number}", "fp8").out
        assert check(out, source).findings == ()


def test_weights_that_tiles_do_not_fit_pass(tmp_path: Path) -> None:
    config = tiny_config()
    config["text_config"]["intermediate_size"] = 192
    source = write_checkpoint(tmp_path / "in", config, random_tensors(config))
    assert check(run(source, tmp_path / "out", "fp8").out, source).findings == ()


def test_the_official_config_without_fmt_passes(fp8_artifact: Path, tmp_path: Path) -> None:
    def without(config: dict[str, Any]) -> None:
        del config["quantization_config"]["fmt"]

    assert check(edited(fp8_artifact, tmp_path / "copy", config=without)).findings == ()


def test_what_other_tools_write_passes(dense: Path, tmp_path: Path) -> None:
    """F32 scales, and bf16 ones that were rounded after the codes were made."""
    source = load_all(dense)
    config = read_config(run(dense, tmp_path / "ours", "fp8").out)
    ours = load_all(tmp_path / "ours")
    for scale_dtype in (torch.float32, torch.bfloat16):
        tensors = dict(source)
        for name in source:
            if f"{name}_scale_inv" not in ours:
                continue
            rows, columns = (size // 128 for size in source[name].shape)
            weight = source[name].float().reshape(rows, 128, columns, 128)
            scale = weight.abs().amax((1, 3)) / 448
            codes = weight / scale[:, None, :, None]
            tensors[name] = codes.reshape(source[name].shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.to(scale_dtype)
        other = write_checkpoint(tmp_path / str(scale_dtype), config, tensors)
        assert check(other, dense).findings == ()


# --- the rest of the config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight_block_size", [64, 64]),
        ("weight_block_size", [128]),
        ("weight_block_size", None),
        ("weight_block_size", "128"),
        ("activation_scheme", "static"),
        ("quant_method", "compressed-tensors"),
        ("quant_method", None),
    ],
)
def test_a_wrong_setting_is_named(
    key: str, value: object, fp8_artifact: Path, tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"][key] = value

    findings = check(edited(fp8_artifact, tmp_path / "broken", config=change)).findings
    assert {(f.check, f.subject) for f in findings} == {("quantization-config", "config.json")}
    assert key in findings[0].message


def test_packed_weights_without_a_config_are_named(fp8_artifact: Path, tmp_path: Path) -> None:
    broken = edited(fp8_artifact, tmp_path / "a", config=lambda c: c.pop("quantization_config"))
    assert {f.check for f in check(broken).findings} == {"quantization-config"}


def test_a_config_without_packed_weights_is_named(
    fp8_artifact: Path, dense: Path, tmp_path: Path
) -> None:
    plain = write_checkpoint(tmp_path / "plain", read_config(fp8_artifact), load_all(dense))
    findings = check(plain).findings
    assert any("promises FP8" in f.message for f in findings)
