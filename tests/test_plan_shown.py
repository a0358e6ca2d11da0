"""Plans as they are shown, and as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden_plan import SHOWN_AS, shown_plans
from plans import published_plan
from qwen35.checkpoint.source import open_folder
from qwen35.display import bytes_of, size, size_rounded_up
from qwen35.planning.manifest import manifest_size
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.safetensors_files.safetensors_display import (
    packed_text,
    plan_json,
    plan_text,
    roles_json,
    roles_text,
)

pytestmark = pytest.mark.sentences


def test_json_of_a_plan_is_complete_and_plain() -> None:
    plan = published_plan("Qwen3.5-0.8B", "nf4")
    shown = json.loads(json.dumps(plan_json(plan, 2)))
    assert shown["digest"] == plan.digest
    assert [step["weight"] for step in shown["steps"]] == [s.weight.name for s in plan.steps]
    assert len(shown["steps"]) == 488
    written = [out for step in shown["steps"] for out in step["outputs"]]
    assert sum(out["bytes"] for out in written) == sum(s.nbytes for s in plan.steps)
    manifest = shown["files"].pop("qwen35.json")
    assert shown["files"] == dict(plan.file_sizes())
    assert manifest == manifest_size(plan)


def test_text_of_a_plan_counts_up() -> None:
    plan = published_plan("Qwen3.5-0.8B", "text-nf4")
    text = plan_text(plan, 2)
    total = plan.nbytes + manifest_size(plan)
    assert re.search(rf"^total +{total:,}$", text, re.MULTILINE)
    assert "488 weights in, 1265 tensors out, 186 weights in NF4" in text
    assert f"plan {plan.digest}" in text
    assert "drop: vision tower" in text
    assert "note: sidecars (tokenizer, chat template) are not known here and not counted" in text
    rows = re.findall(r"^  (\S+) +(\d+) +([\d,]+) +([\d,]+)$", text, re.MULTILINE)
    assert sum(int(count) for _, count, _, _ in rows) == 488
    assert sum(int(b.replace(",", "")) for *_, b in rows) == sum(s.nbytes for s in plan.steps)


def test_plans_are_shown_as_they_were() -> None:
    assert shown_plans() == SHOWN_AS.read_text("utf-8")


@pytest.mark.parametrize(("shards", "lines"), [(5, 5), (6, 3), (7, 3)])
def test_many_shards_are_shown_as_a_line(shards: int, lines: int, dense: Path) -> None:
    checkpoint = open_folder(dense)
    whole = make_plan(checkpoint, load_recipe("text")).files[0]
    files = [replace(whole, name=f"model-{i}.safetensors", nbytes=i) for i in range(shards)]
    plan = replace(make_plan(checkpoint, load_recipe("text")), files=tuple(files))
    rows = [line.split() for line in plan_text(plan, 1).splitlines()]
    found = [row for row in rows if row and (row[0] == "..." or row[0].endswith(".safetensors"))]
    assert len(found) == lines
    if lines == 3:
        assert found == [
            ["model-0.safetensors", "0"],
            ["...", str(shards - 2), "more", str(sum(range(1, shards - 1)))],
            [f"model-{shards - 1}.safetensors", str(shards - 1)],
        ]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_999, "1000.00 kB"),
        (10**6, "1.00 MB"),
        (5 * 10**9, "5.00 GB"),
        (806_795_875_168, "806.80 GB"),
    ],
)
def test_sizes_are_decimal(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@given(st.integers(1, 10**13))
def test_the_least_size_is_enough_when_it_is_typed(nbytes: int) -> None:
    typed = bytes_of(size_rounded_up(nbytes))
    assert nbytes <= typed <= nbytes * 1.0101


def test_what_is_packed_is_counted_by_format() -> None:
    nf4_plan, fp8_plan = (published_plan("Qwen3.5-0.8B", name) for name in ("nf4", "fp8"))
    both = replace(nf4_plan, steps=(*nf4_plan.steps, *fp8_plan.steps))
    assert packed_text(both) == "186 weights in NF4, 157 weights in FP8"
    assert packed_text(published_plan("Qwen3.5-0.8B", "text")) == "none packed"


def test_roles_are_shown_with_their_meaning() -> None:
    rows = roles_json()
    names = [row["role"] for row in rows]
    assert {"mlp.up_proj", "visual.blocks.norm1", "mtp.fc", "mlp.experts.gate_up_proj"} <= set(
        names
    )
    assert all(row["meaning"] and row["kind"] and row["shape"] for row in rows)


def test_roles_are_a_table_that_folds() -> None:
    wide = roles_text(200).splitlines()
    assert wide[0].split() == ["role", "kind", "meaning"]
    assert len(wide) == 1 + len({(row["role"], row["kind"]) for row in roles_json()})
    (experts,) = (line for line in wide if line.startswith("mlp.experts.down_proj "))
    meanings = [row["meaning"] for row in roles_json() if row["role"] == "mlp.experts.down_proj"]
    assert experts.split(None, 2)[2] == "; or ".join(meanings)
    assert len(meanings) == 2
    assert max(map(len, roles_text(60).splitlines())) <= 60 < max(map(len, wide))
