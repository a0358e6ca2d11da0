"""`qwen35-collect-activation-stats`: its flags, and statistics of a model that generates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from calibrating import source
from checkpoints import ASSET
from parsers import defaults
from qwen35.calibration.generate import PROMPTS
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.source import open_folder
from qwen35.cli.old import front_doors
from qwen35.cli.old.old_collect import add_arguments
from qwen35.planning.activations import load_activations

PROMPT = ("def add(a, b):", "import os")


def collect(model: Path, out: Path, *more: object) -> int:
    arguments = ["--model_dir", model, "--output", out, "--quiet", *more]
    return front_doors.collect_activation_stats([str(argument) for argument in arguments])


def test_flags_and_defaults_are_the_documented_ones() -> None:
    assert defaults(add_arguments) == {
        "model_dir": None,
        "output": None,
        "prompts_file": None,
        "max_tokens": 256,
        "device_map": "auto",
        "overwrite": False,
    }
    assert len(set(PROMPTS)) == 12


def test_statistics_are_of_prompts_and_what_the_model_says(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(("", *PROMPT, "")))
    out = tmp_path / "stats.json"
    more = ("--prompts_file", prompts, "--max_tokens", 6, "--device_map", "cpu")
    assert collect(ASSET, out, *more) == 0
    table = json.loads(out.read_text())
    made = table.pop("__metadata__")
    assert made["prompts"]["count"] == 2
    assert made["geometry"] == open_folder(ASSET).config.geometry
    squares, tokens = replayed("model.language_model.layers.5.mlp.down_proj")
    assert made["tokens"] == tokens
    for name, entry in table.items():
        assert entry["tokens"] == tokens, name
        assert not name.startswith("mtp.")
    found = table["model.language_model.layers.5.mlp.down_proj.weight"]
    assert np.allclose(found["input_channel_mean_square"], squares / tokens, rtol=0.03, atol=1e-9)


def replayed(module: str) -> tuple[Any, int]:
    """Feed what was said once more, all at once: the same inputs but for rounding."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(ASSET, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSET)
    total, count = 0.0, 0
    inputs: list[torch.Tensor] = []
    model.eval().get_submodule(module).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    for prompt in PROMPT:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        said = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        inputs.clear()
        with torch.no_grad():
            model(input_ids=said[:, :-1])
        total = total + inputs[0][0].double().square().sum(0).numpy()
        count += said.shape[1] - 1
    return total, count


def test_experts_are_covered(tmp_path: Path) -> None:
    """The toolkit before hooks nn.Linear only, which fused experts are not."""
    folder = source(tmp_path, moe=True, tied=False)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the rain\n")
    out = tmp_path / "stats.json"
    more = ("--prompts_file", prompts, "--max_tokens", 4, "--device_map", "cpu")
    assert collect(folder, out, *more) == 0
    table = json.loads(out.read_text())
    tokens = table["__metadata__"]["tokens"]
    for layer in range(4):
        stem = f"model.language_model.layers.{layer}.mlp.experts"
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            seen = [table[f"{stem}.{e}.{leaf}.weight"]["tokens"] for e in range(4)]
            assert sum(seen) == 2 * tokens
    checkpoint = open_folder(folder)
    load_activations(out).check(inventory(checkpoint), checkpoint.config.geometry)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model_dir", "nowhere"), "not a folder"),
        (("--prompts_file", "nowhere.txt"), "cannot be read"),
        (("--prompts_file", "empty.txt"), "no prompts in it"),
        (("--output", "there.json"), "exists already"),
        (("--output", "."), "is a folder"),
        (("--output", "no/such/stats.json"), "its folder does not exist"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(
    flags: tuple[str, str],
    message: str,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("there.json").write_text("mine")
    assert collect(dense, tmp_path / "stats.json", *flags) == 2
    assert message in capsys.readouterr().err
    assert Path("there.json").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "there.json"]
