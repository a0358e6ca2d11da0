"""Text-only outputs: the same model on text, without its vision tower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import make_checkpoint, random_tensors, tiny_config, write_checkpoint
from loading import clean, load_model, packed_layers
from qwen35.checkpoint.source import open_folder
from qwen35.errors import UsageError
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write
from running import load_all, plan_of, read_config, run

pytestmark = pytest.mark.sentences

IDS = torch.arange(96).reshape(1, 96) * 5 % 500


def logits(folder: Path, kind: str) -> torch.Tensor:
    model, info = load_model(folder, kind)
    assert clean(info)
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("recipe", ["text", "text-nf4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keep_prefix", [True, False])
def test_logits_are_bitwise_those_of_the_vision_language_model(
    recipe: str, tied: bool, keep_prefix: bool, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "in", tied=tied)
    whole = source if recipe == "text" else run(source, tmp_path / "whole", "nf4").out
    plan = make_plan(open_folder(source), load_recipe(recipe), keep_prefix=keep_prefix)
    write(plan, tmp_path / "text", threads=1)
    expected = logits(whole, "Qwen3_5ForConditionalGeneration")
    for kind in ("Qwen3_5ForCausalLM", "AutoModelForCausalLM"):
        assert torch.equal(logits(tmp_path / "text", kind), expected)


def test_mixture_of_experts_logits_are_the_same_too(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "text", "text")
    assert torch.equal(
        logits(tmp_path / "text", "Qwen3_5MoeForCausalLM"),
        logits(moe, "Qwen3_5MoeForConditionalGeneration"),
    )


def test_config_is_that_of_a_text_model(tmp_path: Path) -> None:
    config = tiny_config() | {
        "bos_token_id": 3,
        "pad_token_id": 4,
        "transformers_version": "4.57.0.dev0",
        "language_model_only": False,
    }
    del config["text_config"]["tie_word_embeddings"]
    source = write_checkpoint(tmp_path / "in", config, random_tensors(config))
    run(source, tmp_path / "out", "text")
    written = read_config(tmp_path / "out")
    expected = dict(config["text_config"])
    expected |= {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "tie_word_embeddings": True,
        "bos_token_id": 3,
        "pad_token_id": 4,
        "transformers_version": "4.57.0.dev0",
    }
    assert written == expected


def test_root_only_tying_survives_and_no_head_is_missing(tmp_path: Path) -> None:
    """The old strip lost it: transformers then made up a random head."""
    config = tiny_config()
    del config["text_config"]["tie_word_embeddings"]
    source = write_checkpoint(tmp_path / "in", config, random_tensors(config))
    run(source, tmp_path / "out", "text")
    model, info = load_model(tmp_path / "out", "Qwen3_5ForCausalLM")
    assert clean(info)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_stripping_nf4_equals_converting_to_text_nf4(dense: Path, tmp_path: Path) -> None:
    nf4 = run(dense, tmp_path / "nf4", "nf4").out
    stripped = run(nf4, tmp_path / "stripped", "text")
    direct = run(dense, tmp_path / "direct", "text-nf4")
    assert {step.op for step in plan_of(nf4, "text").steps} == {"copy", "drop"}
    for name in ("model.safetensors", "config.json"):
        assert stripped.hashes[name] == direct.hashes[name]
    model, info = load_model(stripped.out, "Qwen3_5ForCausalLM")
    assert clean(info)
    assert len(packed_layers(model)) == 31


@pytest.mark.parametrize("recipe", ["nf4", "text", "text-nf4"])
def test_mtp_tensors_and_config_agree(recipe: str, dense: Path, tmp_path: Path) -> None:
    dropped = load_recipe(recipe).dropping_mtp()
    write(make_plan(open_folder(dense), dropped), tmp_path / "dropped")
    run(dense, tmp_path / "kept", recipe)
    for folder, count in ((tmp_path / "dropped", 0), (tmp_path / "kept", 1)):
        config = read_config(folder)
        text = config.get("text_config", config)
        assert text["mtp_num_hidden_layers"] == count
        assert any(name.startswith("mtp.") for name in load_all(folder)) == bool(count)
        skip = config.get("quantization_config", {}).get("llm_int8_skip_modules")
        if skip is not None:
            assert ("mtp" in skip) == bool(count)


def test_prefix_is_written_as_asked(dense: Path, tmp_path: Path) -> None:
    recipe = load_recipe("text-nf4")
    write(make_plan(open_folder(dense), recipe, keep_prefix=True), tmp_path / "old")
    write(make_plan(open_folder(dense), recipe), tmp_path / "new")
    old, new = load_all(tmp_path / "old"), load_all(tmp_path / "new")
    assert {name.replace("model.language_model.", "model.") for name in old} == set(new)
    assert all(
        name.startswith(("model.layers.", "model.norm", "model.embed", "mtp.")) for name in new
    )
    for folder, prefix in (("old", "model.language_model."), ("new", "model.")):
        skip = read_config(tmp_path / folder)["quantization_config"]["llm_int8_skip_modules"]
        assert skip == ["lm_head", f"{prefix}embed_tokens", "mtp"]


def test_fp8_source_stays_fp8_and_its_list_follows(dense: Path, tmp_path: Path) -> None:
    source = run(dense, tmp_path / "in", "fp8").out
    out = run(source, tmp_path / "out", "text").out
    before = read_config(source)["quantization_config"]
    after = read_config(out)["quantization_config"]
    names = [name for name in before["modules_to_not_convert"] if "visual" not in name]
    renamed = [name.replace("model.language_model.", "model.") for name in names]
    assert after == {**before, "modules_to_not_convert": sorted(renamed)}
    written, tensors = load_all(out), load_all(source)
    for part in ("weight", "weight_scale_inv"):
        here = written[f"model.layers.0.mlp.up_proj.{part}"]
        there = tensors[f"model.language_model.layers.0.mlp.up_proj.{part}"]
        assert torch.equal(here.view(torch.uint8), there.view(torch.uint8))


def test_half_a_fused_group_in_fp8_is_refused(dense: Path, tmp_path: Path) -> None:
    tensors = load_all(dense)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    tensors[f"{name}_scale_inv"] = torch.ones(4, 2, dtype=torch.bfloat16)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    source = write_checkpoint(tmp_path / "in", read_config(dense), tensors)
    with pytest.raises(UsageError, match="both or neither: engines load them as one matrix"):
        plan_of(source, "text")


def test_half_a_vision_tower_is_refused(dense: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "half.toml"
    recipe.write_text(
        'format = "stored"\n[[rules]]\nmatch = "visual.merger"\naction = "drop"\n'
        '[[rules]]\nmatch = "*"\naction = "keep"\n'
    )
    with pytest.raises(UsageError, match="part of the vision tower"):
        plan_of(dense, str(recipe))
