"""What we write, in the libraries that users load it with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import make_checkpoint, write_checkpoint
from loading import clean, load_model, packed_layers, settle
from qwen35.planning.safetensors_files import safetensors_steps as planning
from qwen35.writing.write import write
from running import load_all, plan_of, read_config, run

IDS = torch.arange(48).reshape(1, 48)


def test_dense_output_loads_with_every_linear_layer_packed(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "out")
    model, info = load_model(tmp_path / "out")
    assert clean(info)
    layers = packed_layers(model)
    assert len(layers) == sum(step.op == "nf4" for step in plan_of(dense).steps) == 31
    assert all(layer.weight.quant_state is not None for layer in layers)
    with torch.no_grad():
        assert bool(model(input_ids=IDS).logits.isfinite().all())


def test_kept_gates_load_unpacked(dense: Path, tmp_path: Path) -> None:
    write(plan_of(dense, keep=("linear_attn.in_proj_a", "mlp.gate_proj")), tmp_path / "out")
    model, info = load_model(tmp_path / "out")
    assert clean(info)
    assert len(packed_layers(model)) == 31 - 3 - 4
    with torch.no_grad():
        assert bool(model(input_ids=IDS).logits.isfinite().all())


def test_vision_still_works_in_the_output(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "out")
    model, _ = load_model(tmp_path / "out")
    source, _ = load_model(dense)
    pixels = torch.linspace(-1, 1, 16 * 1536).reshape(16, 1536)
    grid = torch.tensor([[1, 4, 4]])
    with torch.no_grad():
        got, expected = (
            m.model.visual(pixels, grid_thw=grid).last_hidden_state for m in (model, source)
        )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", ["moe", "moe_per_expert"])
def test_mixture_of_experts_loads_with_its_experts_unpacked(
    layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(layout)
    run(source, tmp_path / "out")
    model, info = load_model(tmp_path / "out", "Qwen3_5MoeForConditionalGeneration")
    assert clean(info)
    assert len(packed_layers(model)) == 35
    original, _ = load_model(source, "Qwen3_5MoeForConditionalGeneration")
    for layer, expected in zip(
        model.model.language_model.layers, original.model.language_model.layers, strict=True
    ):
        assert torch.equal(layer.mlp.experts.gate_up_proj, expected.mlp.experts.gate_up_proj)
    with torch.no_grad():
        assert bool(model(input_ids=IDS).logits.isfinite().all())


def test_transformers_cannot_load_packed_experts(
    moe_per_expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the recipe leaves experts alone. When this fails, the recipe can pack them."""
    real = planning.decide

    def pack_experts(recipe: str, rule: Any, codec: Any, item: Any, *others: Any) -> Any:
        if item.role.info.kind == "experts" and item.role.scope == "text":
            return "nf4", False, "packed for this test"
        return real(recipe, rule, codec, item, *others)

    monkeypatch.setattr(planning, "decide", pack_experts)
    run(moe_per_expert, tmp_path / "out")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load_model(tmp_path / "out", "Qwen3_5MoeForConditionalGeneration")


def test_text_only_checkpoint_loads(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", text_only=True, tied=False)
    run(source, tmp_path / "out")
    model, info = load_model(tmp_path / "out", "Qwen3_5ForCausalLM")
    assert clean(info)
    assert len(packed_layers(model)) == 31


def test_a_list_without_the_head_would_break_the_model(dense: Path, tmp_path: Path) -> None:
    """Why lm_head is always listed, also when it is tied and has no tensor of its own."""
    config = copy.deepcopy(read_config(run(dense, tmp_path / "out").out))
    config["quantization_config"]["llm_int8_skip_modules"].remove("lm_head")
    broken = write_checkpoint(tmp_path / "broken", config, load_all(tmp_path / "out"))
    model, _ = load_model(broken)
    with torch.no_grad(), pytest.raises((AssertionError, AttributeError, RuntimeError)):
        model(input_ids=IDS)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_trains_a_lora_on_the_output(dense: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    run(dense, tmp_path / "out")
    model, _ = load_model(tmp_path / "out")
    torch.manual_seed(0)
    names = ["in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "v_proj", "gate_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names))
    adapted.train()
    assert (
        "bnb"
        in type(adapted.base_model.model.model.language_model.layers[0].mlp.gate_proj).__module__
    )
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    settle(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 10_000
