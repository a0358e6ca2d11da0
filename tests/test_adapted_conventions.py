"""Adapters as Unsloth and axolotl leave them: names, folders and settings beyond peft's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen35
from adapters import make_adapter
from checkpoints import ASSET, layout_of, random_tensors, tiny_config, write_checkpoint
from qwen35.errors import InputError
from running import load_all

pytestmark = pytest.mark.sentences

Tensors = dict[str, torch.Tensor]

OF_UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|down_proj|in_proj_qkv))|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn"
    r"|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|down_proj|in_proj_qkv)))"
)
"""Unsloth names the modules of a vision-language model by an expression of this form."""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter("queries", tmp_path_factory.mktemp("adapters") / "queries")


@pytest.fixture(scope="module")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    out = tmp_path_factory.mktemp("merged") / "out"
    qwen35.merge(ASSET, adapter, out, threads=1)
    return load_all(out)


def rewritten(source: Path, out: Path, rename: Callable[[str], str] = str, **settings: Any) -> Path:
    """Copy an adapter, with other names of its tensors and other settings."""
    shutil.copytree(source, out)
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({rename(n): t for n, t in tensors.items()}, out / "adapter_model.safetensors")
    values = json.loads((source / "adapter_config.json").read_bytes()) | settings
    (out / "adapter_config.json").write_text(json.dumps(values))
    return out


NAMES: dict[str, Callable[[str], str]] = {
    "of the whole model": lambda n: n.replace(".model.layers.", ".model.language_model.layers."),
    "with the adapter's name": lambda n: n.replace(".weight", ".default.weight"),
    "compiled": lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
    "sharded": lambda n: n.replace(
        ".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_names(case: str, adapter: Path, merged: Tensors, tmp_path: Path) -> None:
    copy = rewritten(adapter, tmp_path / "adapter", NAMES[case])
    qwen35.merge(ASSET, copy, tmp_path / "out", threads=1)
    got = load_all(tmp_path / "out")
    assert all(value.equal(got[name]) for name, value in merged.items())


def test_modules_by_the_expression_of_unsloth(tmp_path: Path) -> None:
    from adapters import KINDS, peft_merge

    KINDS["of unsloth"] = ("whole", {"r": 2, "target_modules": OF_UNSLOTH})
    try:
        made = make_adapter("of unsloth", tmp_path / "adapter")
        wanted = peft_merge("of unsloth", made)
    finally:
        del KINDS["of unsloth"]
    qwen35.merge(ASSET, made, tmp_path / "out", threads=1)
    got, base = load_all(tmp_path / "out"), load_all(ASSET)
    changed = {name for name, value in got.items() if not value.equal(base[name])}
    ends = ("q_proj.weight", "down_proj.weight", "in_proj_qkv.weight")
    assert changed == {n for n in base if n.endswith(ends) and "language_model" in n}
    for name in changed:
        assert torch.allclose(got[name].float(), wanted[name], rtol=2**-8, atol=1e-6)


def test_a_run_folder_with_checkpoints(adapter: Path, merged: Tensors, tmp_path: Path) -> None:
    """The adapter on top is read, and the optimizer's files beside a checkpoint are not."""
    run = Path(shutil.copytree(adapter, tmp_path / "run"))
    for number in (10, 20):
        inner = Path(shutil.copytree(adapter, run / f"checkpoint-{number}"))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
            (inner / name).write_bytes(b"\x80")
    (run / "README.md").write_text("---\nbase_model: unsloth/x\n---\n")
    for place in (run, run / "checkpoint-20"):
        qwen35.merge(ASSET, place, tmp_path / place.name / "out", threads=1)
        got = load_all(tmp_path / place.name / "out")
        assert all(value.equal(got[name]) for name, value in merged.items())
    (run / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="give one of the folders in it: checkpoint-10, checkpo"):
        qwen35.plan(ASSET, adapter=[run])


@pytest.mark.parametrize(
    ("base", "noted"),
    [
        ("unsloth/qwen3.5-0.8b-unsloth-bnb-4bit", ["trained on unsloth/", "--onto nf4 merges it"]),
        ("/home/me/models/base", []),
        (None, []),
        ([3], []),
    ],
)
def test_the_base_that_it_names(
    base: object, noted: list[str], adapter: Path, tmp_path: Path
) -> None:
    copy = rewritten(
        adapter,
        tmp_path / "adapter",
        base_model_name_or_path=base,
        auto_mapping={"base_model_class": "Qwen3_5ForConditionalGeneration", "unsloth_fixed": True},
    )
    notes = " ".join(qwen35.plan(ASSET, recipe="bf16", adapter=[copy]).notes)
    assert all(text in notes for text in noted)
    assert ("trained on" in notes) is bool(noted)
    assert "/home" not in notes


# --- stacks of experts in Unsloth's order


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(moe=True)
    tensors = random_tensors(config, layout_of(config, per_expert=False), seed=1)
    return write_checkpoint(tmp_path_factory.mktemp("base") / "base", config, tensors)


GROUPED: dict[str, dict[str, Any]] = {
    "flat": {"lora_B_layout": "grouped_by_expert"},
    "detailed": {
        "unsloth_fused_expert_lora": {
            "parameters": {"down_proj": {"lora_B_layout": "grouped_by_expert", "num_experts": 4}}
        }
    },
    "mapped": {"auto_mapping": {"unsloth_fixed": True, "lora_B_layout": "grouped_by_expert"}},
    "before it was recorded": {"auto_mapping": {"unsloth_fixed": True}},
}


@pytest.mark.parametrize("case", GROUPED)
def test_stacks_in_the_order_of_unsloth(case: str, mixture: Path, tmp_path: Path) -> None:
    made = make_adapter("one stack", tmp_path / "adapter", base=mixture)
    qwen35.merge(mixture, made, tmp_path / "one", threads=1)
    copy = rewritten(made, tmp_path / "copy", **GROUPED[case])
    tensors = load_file(copy / "adapter_model.safetensors")
    for name, value in tensors.items():
        if name.endswith("lora_B.weight"):  # [rows, rank, experts] to [rows, experts, rank]
            by_rank = value.view(len(value), 2, 4)
            tensors[name] = by_rank.transpose(1, 2).reshape(len(value), 8).contiguous()
    save_file(tensors, copy / "adapter_model.safetensors")
    result = qwen35.merge(mixture, copy, tmp_path / "two", threads=1)
    assert any("in the order in which Unsloth saves them" in note for note in result.plan.notes)
    one, two = load_all(tmp_path / "one"), load_all(tmp_path / "two")
    assert all(value.equal(two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("settings", "grouped"),
    [
        ({"lora_B_layout": "rank_major", "auto_mapping": {"unsloth_fixed": True}}, False),
        ({"auto_mapping": ["x"]}, False),
        ({"unsloth_fused_expert_lora": {"parameters": {"down_proj": 3}}}, False),
        ({"lora_B_layout": "mixed"}, None),
        ({"lora_B_layout": [1]}, None),
    ],
)
def test_orders(
    settings: dict[str, Any], grouped: bool | None, mixture: Path, tmp_path: Path
) -> None:
    made = make_adapter("one stack", tmp_path / "adapter", base=mixture)
    copy = rewritten(made, tmp_path / "copy", **settings)
    if grouped is None:
        with pytest.raises(InputError, match="lora_B_layout is .*, expected rank_major or gro"):
            qwen35.plan(mixture, recipe="bf16", adapter=[copy])
        return
    notes = qwen35.plan(mixture, recipe="bf16", adapter=[copy]).notes
    assert any("Unsloth" in note for note in notes) is grouped
