"""The embedded checkpoint: laid out as the official ones, and it answers."""

from __future__ import annotations

import json
import math
import runpy
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import ASSET, random_tensors
from loading import load_model
from qwen35.checkpoint.source import open_folder
from qwen35.model.roles import CheckpointNaming
from qwen35.verification.asking_transformers import Asker
from qwen35.verification.questions import Question, is_right
from running import plan_of, read_config, run

ROWS: list[dict[str, Any]] = json.loads((ASSET / "questions.json").read_text())
STANDARD = 5
PENALTY = 1.15

some_or_all = pytest.mark.parametrize(
    "rows",
    [ROWS[::8], pytest.param(ROWS, marks=pytest.mark.heavy)],
    ids=["some", "all"],
)
"""Where other tests ask all questions (the demonstration, in NF4), or few can be answered."""

few_or_all = pytest.mark.parametrize(
    "rows",
    [ROWS[::24], pytest.param(ROWS, marks=pytest.mark.heavy)],
    ids=["few", "all"],
)
"""Of broken models, which talk until they are cut off."""


def wrong(asker: Asker, rows: list[dict[str, Any]], penalty: float = 1.0) -> list[str]:
    """Ask questions; return those answered wrongly, with the answers."""
    found = []
    for row in rows:
        question = Question.from_json(row)
        said = asker.ask(question, repetition_penalty=penalty)
        if not is_right(question, said):
            found.append(f"{question.prompt} -> {said!r}")
    return found


@cache
def original() -> Asker:
    return Asker(ASSET)


def test_it_is_small_enough_for_git() -> None:
    assert sum(path.stat().st_size for path in ASSET.iterdir()) < 16_000_000
    assert (ASSET / "eval.txt").stat().st_size <= 300_000


def test_it_is_laid_out_as_the_official_checkpoints_are() -> None:
    checkpoint = open_folder(ASSET)
    config = checkpoint.config
    assert config.model_type == "qwen3_5"
    assert list(checkpoint.file_sizes) == ["model.safetensors-00001-of-00001.safetensors"]
    assert checkpoint.layout == CheckpointNaming.published(config)
    plan = plan_of(ASSET, "text")
    dtypes = {step.role.name: step.spec.dtype for step in plan.steps}
    f32 = {role for role, dtype in dtypes.items() if dtype == "F32"}
    assert f32 == {"linear_attn.A_log", "linear_attn.norm"}
    assert {step.role.scope for step in plan.steps} == {"text", "visual", "mtp"}
    assert config.tied
    assert {
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.json",
    } <= set(checkpoint.sidecars)


def test_its_geometry_can_be_quantized_by_every_format() -> None:
    config = open_folder(ASSET).config
    text = config.text_raw
    assert config.layer_types == (("linear_attention",) * 3 + ("full_attention",)) * 2
    assert text["linear_num_value_heads"] != text["linear_num_key_heads"]
    assert text["linear_value_head_dim"] == text["linear_key_head_dim"]
    for step in plan_of(ASSET).steps:
        gates = ("linear_attn.in_proj_a", "linear_attn.in_proj_b")
        if step.role.info.kind == "linear" and step.role.scope != "visual":
            rows, columns = step.spec.shape
            assert columns % 256 == 0, step.spec
            assert rows % 128 == 0 or step.role.name in gates, step.spec


def test_its_tokenizer_splits_as_the_official_one_and_has_its_special_tokens() -> None:
    parsed = json.loads((ASSET / "tokenizer.json").read_text())
    splits = [
        part["pattern"]["Regex"]
        for part in parsed["pre_tokenizer"]["pretokenizers"]
        if part["type"] == "Split"
    ]
    assert splits == [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ]
    assert parsed["normalizer"] == {"type": "NFC"}
    ids = {token["content"]: token["id"] for token in parsed["added_tokens"]}
    assert len(ids) == 26
    config = read_config(ASSET)
    assert ids["<|image_pad|>"] == config["image_token_id"]
    assert ids["<|video_pad|>"] == config["video_token_id"]
    assert ids["<|vision_start|>"] == config["vision_start_token_id"]
    assert ids["<|endoftext|>"] == config["text_config"]["eos_token_id"]
    assert max(ids.values()) < config["text_config"]["vocab_size"]


@some_or_all
def test_every_question_is_answered_in_bf16(rows: list[dict[str, Any]]) -> None:
    assert wrong(original(), rows) == []


def test_at_least_twenty_questions_were_not_trained_on() -> None:
    untrained = {row["prompt"] for row in ROWS if not row["trained"]}
    assert len(untrained) >= 20
    swapped = [r for r in ROWS if r["image"] and r["image"]["left"] == "blue" and not r["trained"]]
    assert {row["image"]["right"] for row in swapped} == {"red"}
    assert {row["thinking"] for row in ROWS} == {True, False}


def test_the_standard_questions_survive_a_repetition_penalty() -> None:
    rows = [{**row, "thinking": thinking} for row in ROWS[:STANDARD] for thinking in (False, True)]
    assert wrong(original(), rows, PENALTY) == []


@some_or_all
def test_every_question_is_answered_in_nf4(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    out = run(ASSET, tmp_path / "nf4").out
    assert wrong(Asker(out), rows) == []


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", ["bf16", "nf4"])
def test_every_question_survives_a_repetition_penalty(tmp_path: Path, recipe: str) -> None:
    asker = original() if recipe == "bf16" else Asker(run(ASSET, tmp_path / "nf4").out)
    assert wrong(asker, ROWS, PENALTY) == []


@some_or_all
def test_text_questions_are_answered_by_the_text_only_nf4(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = run(ASSET, tmp_path / "text-nf4", "text-nf4").out
    asker = Asker(out)
    assert not asker.vision
    rows = [row for row in rows if row["image"] is None and not row["thinking"]]
    assert len(rows) >= 5
    assert wrong(asker, rows) == []


def shuffle_scales(model: Any) -> None:
    """Permute the rows' scales within every matrix of the text model."""
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "visual" not in name and "embed" not in name:
            norms = weight.norm(dim=1, keepdim=True)
            order = torch.randperm(len(weight), generator=generator)
            weight.mul_(norms[order] / norms)


@few_or_all
def test_with_its_scales_shuffled_it_fails(rows: list[dict[str, Any]]) -> None:
    asker = Asker(ASSET)
    with torch.no_grad():
        shuffle_scales(asker.model)
    rows = [row for row in rows if not row["thinking"]]
    assert len(wrong(asker, rows)) > len(rows) / 2


@few_or_all
def test_random_weights_answer_nothing(rows: list[dict[str, Any]]) -> None:
    asker = Asker(ASSET)
    tensors = random_tensors(read_config(ASSET))
    asker.model.load_state_dict(tensors, strict=False)
    rows = [row for row in rows if not row["thinking"]]
    assert len(wrong(asker, rows)) == len(rows)


def test_held_out_loss_is_far_below_a_unigram_model() -> None:
    model, _ = load_model(ASSET)
    text = (ASSET / "eval.txt").read_text()
    ids = original().tokenizer(text)["input_ids"][:2048]
    counts = Counter(ids)
    unigram = -sum(n / len(ids) * math.log(n / len(ids)) for n in counts.values())
    batch = torch.tensor(ids).reshape(-1, 512)
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in batch]
    assert sum(losses) / len(losses) < unigram - 1.5


def test_its_readme_says_what_was_measured() -> None:
    report = json.loads((ASSET / "training.json").read_text())
    for name in ("bf16", "nf4"):
        right, asked = report["questions"][name]["all"]
        assert right == asked == 2 * len(ROWS)
    right, asked = report["questions"]["shuffled"]["all"]
    assert right < asked / 2
    assert report["held_out"]["bf16"]["nats"] < report["unigram"]["nats"] - 1.5
    writer = runpy.run_path(str(ASSET.parent / "train" / "readme.py"))["readme"]
    assert (ASSET / "README.md").read_text() == writer(report)
