"""The steps of a plan: what becomes of each weight, and what is noted about it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from checkpoints import random_tensors, tiny_config, write_checkpoint
from plans import made_up, recipe_of
from qwen35.checkpoint.source import open_folder
from qwen35.codecs.registry import CODECS
from qwen35.errors import TensorError
from qwen35.model.roles import role_of
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.rules import Rule
from qwen35.planning.safetensors_files import safetensors_plan
from qwen35.planning.safetensors_files.safetensors_steps import decide
from qwen35.planning.step import StepTarget
from qwen35.tensors import TensorSpec

pytestmark = pytest.mark.sentences


def test_weight_that_blocks_do_not_fit_stays_plain() -> None:
    config = tiny_config()
    config["vision_config"] |= {"hidden_size": 34, "intermediate_size": 34}
    plan = make_plan(
        made_up(config),
        recipe_of(("mtp", "plain"), ("kind:linear", "nf4")),
    )
    odd = [step for step in plan.steps if "not a multiple of 64 weights" in step.reason]
    assert odd
    assert all(step.op == "copy" and step.spec.numel % 64 for step in odd)
    assert all(step.spec.numel % 64 == 0 for step in plan.steps if step.op == "nf4")


def test_two_weights_of_one_name_are_refused(dense: Path) -> None:
    step = make_plan(open_folder(dense), load_recipe("text")).steps[0]
    with pytest.raises(TensorError) as caught:
        safetensors_plan.plan_file(safetensors_plan.shard_name(2, 3), [step, step])
    assert str(caught.value) == (
        "model-00002-of-00003.safetensors: two weights would be written under one name"
    )


def test_notes_of_all_kinds_are_kept(moe: Path, tmp_path: Path) -> None:
    config = tiny_config(moe=True, tied=False)
    tensors = {n: t for n, t in random_tensors(config).items() if not n.startswith("mtp.")}
    odd = {"chat_template.jinja": "{{ '<|image_pad|>' }}"}
    source = write_checkpoint(tmp_path / "in", config, tensors, sidecars=odd)
    promised, experts, template = make_plan(open_folder(source), load_recipe("text-nf4")).notes
    assert promised.startswith("config.json promises 1 multi-token-prediction layer(s), but the ")
    assert re.fullmatch(
        r"experts stay in BF16: \d\d\.\d% of all parameters, because transformers cannot load "
        "them packed",
        experts,
    )
    assert template.startswith("chat_template.jinja: its test for images or videos was not")
    assert len(make_plan(open_folder(source), load_recipe("fp8")).notes) == 1


def item_of(storage: str, shape: tuple[int, ...]) -> Any:
    """Return a linear layer that is stored so."""
    name = "model.layers.0.mlp.up_proj.weight"
    return SimpleNamespace(
        role=role_of(name),
        weight=SimpleNamespace(storage=storage, name=name),
        spec=TensorSpec(name, "BF16", shape),
        changes=(),
    )


@pytest.mark.parametrize(
    ("action", "storage", "shape", "op"),
    [
        ("nf4", "plain", (64, 64), "nf4"),
        ("nf4", "fp8", (128, 128), "nf4"),
        ("nf4", "nf4", (64, 64), "copy"),
        ("nf4", "plain", (5, 5), "copy"),
        ("nf4", "fp8", (5, 5), "decode"),
        ("fp8", "plain", (128, 128), "fp8"),
        ("fp8", "nf4", (128, 128), "fp8"),
        ("fp8", "fp8", (128, 128), "copy"),
        ("fp8", "plain", (64, 64), "copy"),
        ("fp8", "nf4", (64, 64), "decode"),
        ("plain", "plain", (5, 5), "copy"),
        ("plain", "nf4", (64, 64), "decode"),
        ("keep", "nf4", (64, 64), "copy"),
    ],
)
def test_what_cannot_be_packed_is_copied_or_decoded(
    action: Any, storage: str, shape: tuple[int, int], op: str
) -> None:
    item = item_of(storage, shape)
    unfit = {item.weight.name: "not whole tiles"} if shape[0] % 128 else {}
    rule = Rule("mlp", action, "why")
    codec, copied, reason = decide("r", rule, CODECS.get(action), item, unfit)
    assert StepTarget(codec, (), (), copied).op == op
    if action in ("nf4", "fp8") and op in ("copy", "decode") and storage != action:
        assert "not a multiple of 64 weights" in reason or reason == "not whole tiles"
