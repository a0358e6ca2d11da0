"""`qwen35 inspect` counts what a checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen35.checkpoint.open import describe
from qwen35.cli.main import main
from running import load_all, read_config, run

pytestmark = pytest.mark.sentences


def test_inspect_counts_what_is_there(
    nf4_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(nf4_artifact), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    tensors = load_all(nf4_artifact)
    assert summary["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert sum(row["tensors"] for row in summary["prefixes"].values()) == len(tensors)
    visual = [t for name, t in tensors.items() if name.startswith("model.visual.")]
    assert summary["prefixes"]["model.visual"] == {
        "tensors": len(visual),
        "bytes": sum(t.numel() * t.element_size() for t in visual),
    }
    assert "NF4 (31 of" in summary["format"]
    assert main(["inspect", str(nf4_artifact)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 shard(s)"
    assert max(map(len, lines[:8])) <= 80


def test_inspect_counts_parameters_once(dense: Path, nf4_artifact: Path) -> None:
    from qwen35.checkpoint.checkpoint_summary import summarize

    total = sum(t.numel() for t in load_all(dense).values())
    assert summarize(describe(str(dense)))["parameters"] == total
    assert summarize(describe(str(nf4_artifact)))["parameters"] == total
    assert summarize(describe("Qwen3.5-27B"))["parameters"] == 27_781_427_952


def test_inspect_counts_every_format_of_a_mixture(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.toml"
    rules = [("mlp.down_proj", "int4"), ("mlp.gate_proj", "int4-asym")]
    rules += [("mlp.up_proj", "int4-asym"), ("self_attn.o_proj", "fp8-channel")]
    text = 'format = "nvfp4"\nbase = "nvfp4"\n'
    for match, action in rules:
        text += f'[[rules]]\nmatch = "{match}"\naction = "{action}"\nreason = "x"\n'
    own.write_text(text)
    out = run(dense, tmp_path / "out", str(own)).out
    assert main(["inspect", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["format"]
    layers = read_config(dense)["text_config"]["layer_types"]
    full = layers.count("full_attention")
    int4, nvfp4, fp8 = 3 * len(layers), 3 * full, full
    counts = sorted(((int4, "INT4"), (nvfp4, "NVFP4"), (fp8, "FP8 per channel")), reverse=True)
    mixture = ", ".join(f"{count} {name}" for count, name in counts)
    assert said.startswith(f"mixed precision: {mixture} ({int4 + nvfp4 + fp8} of ")
    assert said.endswith(" weights packed)")
