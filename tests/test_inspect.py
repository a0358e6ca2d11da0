"""`qwen35 inspect` counts what a checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen35.checkpoint.open import describe
from qwen35.cli.main import main
from running import load_all

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
