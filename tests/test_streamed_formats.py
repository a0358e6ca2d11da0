"""Every format of checkpoints, streamed and in memory: the same figures; damage is told."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen35
from calibrating import source
from checkpoints import Tensors
from qwen35.cli.main import main
from qwen35.evaluation.evaluation_run import evaluate
from qwen35.evaluation.evaluation_table import notes

pytestmark = pytest.mark.filterwarnings("ignore:.*FP8.*", "ignore:.*is deprecated.*")

OWN = """
format = "nvfp4"
base = "nvfp4"

[[rules]]
match = "linear_attn.in_proj_a"
action = "plain"

[[rules]]
match = "linear_attn.in_proj_b"
action = "plain"

[[rules]]
match = "linear_attn"
action = "fp8-channel"

[[rules]]
match = "self_attn"
action = "int4-g32-asym"
"""
"""Three formats in a checkpoint, one of them with zero points."""

FORMATS: dict[str, dict[str, Any]] = {
    "fp8": {"recipe": "fp8"},
    "fp8-channel": {"recipe": "fp8-channel"},
    "fp8-channel-modelopt": {"recipe": "fp8-channel", "layout": "modelopt", "statistics": True},
    "int4": {"recipe": "int4"},
    "int4-gptq": {"recipe": "int4-gptq"},
    "mixed": {"recipe": "own"},
    "mlx-4bit": {"recipe": "mlx-4bit"},
    "mlx-8bit": {"recipe": "mlx-8bit"},
    "mlx-mxfp4": {"recipe": "mlx-mxfp4"},
    "mlx-nvfp4": {"recipe": "mlx-nvfp4"},
    "nf4": {"recipe": "nf4", "mtp": "drop"},
    "nvfp4": {"recipe": "nvfp4", "activations": True, "statistics": True},
    "nvfp4-modelopt": {"recipe": "nvfp4", "layout": "modelopt"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "fused": {"moe": True, "tied": False},
    "per-expert": {"moe": True, "tied": False, "per_expert": True},
    "text": {"text_only": True, "tied": False, "mtp": 0},
}
OPTIONS: dict[str, Any] = {"chunks": 2, "context": 32, "threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the rain in a Model, seven times; " * 16)
    return path


def make(folder: Path, text: Path, names: list[str], **variant: Any) -> Path:
    """Write a checkpoint, and formats of it beside it."""
    made = source(folder, **variant)
    qwen35.calibrate(made, text=text, output=folder / "statistics", context=32, threads=1)
    (folder / "own.toml").write_text(OWN)
    for name in names:
        asked = dict(FORMATS[name])
        if asked.pop("statistics", False):
            asked["activation_stats"] = folder / "statistics" / "activation-stats.json"
        if asked["recipe"] == "own":
            asked["recipe"] = str(folder / "own.toml")
        if variant.get("mtp") == 0:
            asked.pop("mtp", None)
        qwen35.convert(made, folder / name, threads=1, **asked)
    return made


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=() if name == "fused" else pytest.mark.heavy)
        for name in sorted(VARIANTS)
    ],
)
def test_figures_are_those_in_memory(variant: str, text: Path, tmp_path: Path) -> None:
    """Of weights alone, and with inputs as servers quantize them."""
    base = make(tmp_path, text, sorted(FORMATS), **VARIANTS[variant])
    models = [tmp_path / name for name in sorted(FORMATS)]
    there = evaluate(base, models, text, **OPTIONS)
    here = evaluate(base, models, text, streamed=True, **OPTIONS)
    for rows in ("candidates", "simulations"):
        klds = [
            {row.model.name: row.comparison.kld.value for row in getattr(report, rows)}
            for report in (here, there)
        ]
        assert klds[0] == pytest.approx(klds[1], rel=1e-4)
        assert min(klds[0].values()) > 1e-3
    assert len(here.simulations) == 5
    stored = {row.model.name: row.model.stored for row in here.candidates}
    assert stored["mlx-nvfp4"] == "MLX-nvfp4"  # though the embedding has 8 bits
    assert not [note for note in notes(here) if "engines go by" in note]


# --- damage


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with a checkpoint, and some formats of it."""
    folder = tmp_path_factory.mktemp("damaged")
    make(folder, text, ["int4", "int4-gptq", "mixed", "mlx-4bit", "nvfp4"])
    return folder


def rewritten(folder: Path, out: Path, change: Callable[[Tensors], object]) -> Path:
    """Copy a checkpoint with other tensors."""
    shutil.copytree(folder, out)
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return out


def _nan(tensors: Tensors, name: str) -> None:
    values = tensors[name].float()
    values.view(-1)[0] = float("nan")
    tensors[name] = values.to(tensors[name].dtype)


def _shaped(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].reshape(-1)[::2].clone()


def _removed(tensors: Tensors, name: str) -> None:
    del tensors[name]


@pytest.mark.parametrize(
    ("name", "ending", "change", "message"),
    [
        ("int4", "in_proj_qkv.weight_scale", _nan, "in_proj_qkv.weight: holds NaN or infinity"),
        ("int4", "in_proj_qkv.weight_scale", _removed, "the weight it belongs to is missing"),
        ("int4-gptq", "down_proj.qzeros", _removed, "down_proj.qzeros: missing"),
        ("int4-gptq", "down_proj.qzeros", _shaped, "expected [4, 32] by config.json"),
        ("mixed", "v_proj.weight_zero_point", _shaped, "expected [16, 8] by config.json"),
        ("mlx-4bit", "down_proj.scales", _nan, "NaN"),
        ("mlx-4bit", "down_proj.scales", _removed, "down_proj"),
        ("nvfp4", "down_proj.weight_scale", _nan, "a scale that is negative or NaN"),
        ("nvfp4", "down_proj.weight_global_scale", _nan, "is nan, expected a positive number"),
        ("nvfp4", "down_proj.weight_scale", _shaped, "expected [256, 32] by config.json"),
    ],
)
def test_damaged_scales_are_refused_in_a_sentence(
    damaged: Path,
    text: Path,
    tmp_path: Path,
    name: str,
    ending: str,
    change: Callable[[Tensors, str], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def spoil(tensors: Tensors) -> None:
        change(tensors, min(one for one in tensors if one.endswith(ending)))

    out = rewritten(damaged / name, tmp_path / "out", spoil)
    asked = ["evaluate", str(damaged / "in"), str(out), "--text", str(text), "--context", "32"]
    assert main([*asked, "--chunks", "2", "--streamed", "--quiet", "--threads", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_file_that_is_cut_off_is_refused(
    damaged: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(damaged / "mixed", tmp_path / "out")
    (file,) = out.glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1000)
    asked = ["evaluate", str(damaged / "in"), str(out), "--text", str(text), "--streamed"]
    assert main(asked) == 2
    assert "the file is truncated" in capsys.readouterr().err


def test_zero_points_that_config_json_promises_are_missed(
    damaged: Path, text: Path, tmp_path: Path
) -> None:
    """They lie in tensors of their own, without which weights decode to others."""

    def spoil(tensors: Tensors) -> None:
        for name in [one for one in tensors if one.endswith("weight_zero_point")]:
            del tensors[name]

    out = rewritten(damaged / "mixed", tmp_path / "out", spoil)
    report = evaluate(damaged / "in", (out,), text, streamed=True, **OPTIONS)
    (told,) = (note for note in notes(report) if "engines go by" in note)
    assert told.startswith("out: config.json describes other tensors than were measured")
    assert "symmetric of the weights is False, expected True" in told
    assert torch.tensor(report.candidates[0].comparison.kld.value).isfinite()
