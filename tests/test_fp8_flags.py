"""FP8 on command lines: flags that fit, and the command of the toolkit before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints import ASSET, random_tensors, tiny_config, write_checkpoint
from parsers import actions_of
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.cli.old import front_doors
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write
from running import load_all, read_config, same, statistics

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"


def test_old_command_has_the_documented_flags_and_defaults() -> None:
    import argparse

    from qwen35.cli.old.old_quantize_fp8 import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = {flag for action in actions_of(parser) for flag in action.option_strings}
    for name in (
        "input_dir",
        "output_dir",
        "calib_mode",
        "rms_factor",
        "calib_percentile",
        "mse_grid_size",
        "activation_stats",
        "verify_samples",
        "skip_verify",
    ):
        assert {f"--{name}", f"--{name.replace('_', '-')}"} <= flags
    assert "--device" in flags
    parsed = parser.parse_args(["--input_dir", "a", "--output_dir", "b"])
    assert parsed.calib_mode == "rms"
    assert parsed.rms_factor == 3.0
    assert parsed.calib_percentile == 99.9
    assert parsed.mse_grid_size == 50
    assert parsed.activation_stats is None
    assert parsed.verify_samples == 5
    assert parsed.skip_verify is False


def test_old_command_writes_the_conservative_recipe(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert front_doors.quantize_fp8(["--input_dir", str(dense), "--output_dir", str(out)]) in (0, 1)
    text = capsys.readouterr().out
    assert "Calibration         : rms(k=3.0)" in text
    assert "Spot-checked        : 5 " in text
    plan = make_plan(
        open_folder(dense), load_recipe("fp8-conservative"), scale_choice=ScaleChoice("rms")
    )
    expected = write(plan, tmp_path / "expected")
    assert same(load_all(out), load_all(expected.out))
    assert read_config(out) == read_config(tmp_path / "expected")
    assert f"{LAYER}.0.linear_attn.out_proj.weight_scale_inv" not in load_all(out)


def test_old_command_keeps_the_shards_of_the_source_and_samples_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(layers=4)
    source = write_checkpoint(tmp_path / "in", config, random_tensors(config), shards=3)
    out = tmp_path / "out"
    arguments = ["--input_dir", str(source), "--output_dir", str(out), "--calib_mode", "max"]
    assert front_doors.quantize_fp8([*arguments, "--verify_samples", "1", "--json"]) == 0
    before, after = (
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for folder in (source, out)
    )
    assert after == {name: before[name.removesuffix("_scale_inv")] for name in after}
    assert {*before} <= {*after}
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["shards"] == 3
    assert sum(report["checked"].values()) == 3
    assert sorted({before[name] for name in report["tensors"]}) == sorted(set(before.values()))
    files = {path.name for path in out.glob("*.safetensors")}
    assert files == set(before.values())


def test_a_run_that_checked_a_sample_says_so(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sample may miss what a check of all weights finds."""
    arguments = ["--input_dir", str(dense), "--output_dir", str(tmp_path / "out")]
    assert front_doors.quantize_fp8([*arguments, "--calib_mode", "max"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "5 of 29 FP8 weights were checked; others may be worse: --verify-samples 29" in text
    whole = [*arguments, "--calib_mode", "max", "--verify_samples", "29", "--overwrite"]
    assert front_doors.quantize_fp8(whole) == 0
    assert "were checked" not in capsys.readouterr().out


def test_the_default_on_the_embedded_checkpoint_is_what_the_guide_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/fp8.md: the sample passes with a warning, a check of all weights fails."""
    arguments = ["--input_dir", str(ASSET), "--output_dir", str(tmp_path / "out")]
    assert front_doors.quantize_fp8(arguments) == 0
    assert "✔ 0 GOOD  ⚠ 5 WARN  ✘ 0 FAIL" in capsys.readouterr().out
    whole = [*arguments, "--verify_samples", "51", "--overwrite"]
    assert front_doors.quantize_fp8(whole) == 1
    assert "⚠ 47 WARN  ✘ 4 FAIL" in capsys.readouterr().out


def test_an_fp8_source_is_named_as_such(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "fp8"
    arguments = ["--output_dir", str(source), "--skip_verify"]
    assert front_doors.quantize_fp8(["--input_dir", str(dense), *arguments]) == 0
    arguments = ["--input_dir", str(source), "--output_dir", str(tmp_path / "out")]
    assert front_doors.quantize_fp8(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {source}: FP8 already (29 weights): no scales are chosen, expected an unquantized "
        "checkpoint; start from the original; qwen35 convert without --calib-mode and "
        "--activation-stats copies the codes"
    )


@pytest.mark.parametrize("mode", ["max", "percentile"])
def test_statistics_are_ignored_unread_by_modes_that_weigh_nothing(
    mode: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Statistics of another model, or no statistics at all."""
    foreign = tmp_path / "stats.json"
    foreign.write_text('{"model.another.weight": {"input_channel_max": [1.0]}}')
    arguments = ["--input_dir", str(dense), "--output_dir", str(tmp_path / "out")]
    more = ["--activation_stats", str(foreign), "--calib_mode", mode, "--skip_verify"]
    assert front_doors.quantize_fp8([*arguments, *more]) == 0
    note = f"note: stats.json is ignored: mode {mode}"
    assert note in capsys.readouterr().err
    more[-2] = "rms"
    assert front_doors.quantize_fp8([*arguments, *more, "--overwrite"]) == 2
    assert "stats.json" in capsys.readouterr().err


@pytest.mark.parametrize("dash", ["_", "-"])
def test_old_command_takes_underscores_and_dashes(dash: str, dense: Path, tmp_path: Path) -> None:
    flags = {
        "input_dir": str(dense),
        "output_dir": str(tmp_path / "out"),
        "calib_mode": "mse",
        "mse_grid_size": "3",
        "rms_factor": "4.0",
        "calib_percentile": "99.5",
        "activation_stats": str(statistics(dense, tmp_path)),
        "verify_samples": "2",
    }
    arguments = [part for n, v in flags.items() for part in (f"--{n.replace('_', dash)}", v)]
    assert front_doors.quantize_fp8([*arguments, "--device", "cpu", f"--skip{dash}verify"]) == 0
    manifest = json.loads((tmp_path / "out" / "qwen35.json").read_text())
    scale_choice = manifest["calibration"]
    assert (scale_choice["mode"], scale_choice["grid_size"]) == ("mse", 3)
    assert (scale_choice["rms_factor"], scale_choice["percentile"]) == (4.0, 99.5)
    assert scale_choice["activations"]["name"] == "stats.json"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rms_factor", "0"], "--rms-factor"),
        (["--rms_factor", "nan"], "--rms-factor"),
        (["--calib_percentile", "101"], "--calib-percentile"),
        (["--mse_grid_size", "0"], "--mse-grid-size"),
        (["--activation_stats", "nowhere.json"], "nowhere.json"),
        (["--device", "tpu"], "--device"),
        (["--device", "cuda:x"], "--device"),
    ],
)
def test_old_command_refuses_nonsense_with_code_two(
    more: list[str],
    words: str,
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--input_dir", str(dense), "--output_dir", str(tmp_path / "out"), *more]
    assert front_doors.quantize_fp8(arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_old_command_refuses_a_missing_folder_and_a_taken_one(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        front_doors.quantize_fp8(["--input_dir", str(tmp_path / "no"), "--output_dir", str(out)])
        == 2
    )
    assert "not a folder" in capsys.readouterr().err
    out.mkdir()
    (out / "mine").write_text("")
    assert front_doors.quantize_fp8(["--input_dir", str(dense), "--output_dir", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert front_doors.quantize_fp8(["--input_dir", str(dense), "--output_dir", str(dense)]) == 2
    assert front_doors.quantize_fp8([]) == 2
    assert "are required: --input_dir" in capsys.readouterr().err


def test_calibration_flags_without_an_fp8_recipe_are_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(dense), str(tmp_path / "out"), "--recipe", "nf4"]
    assert main([*arguments, "--calib-mode", "max"]) == 2
    assert "no scales are chosen here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ["--rms-factor", "0"],
        ["--mse-grid-size", "0"],
        ["--calib-percentile", "101"],
        ["--rms-factor", "2.5"],
        ["--mse-grid-size", "20"],
    ],
)
def test_a_parameter_without_its_mode_is_not_ignored(
    more: list[str], dense: Path, tmp_path: Path
) -> None:
    arguments = ["convert", str(dense), str(tmp_path / "out"), "--recipe", "fp8", "--quiet"]
    assert main([*arguments, *more]) == 2
