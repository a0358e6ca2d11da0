"""The config.json that a plan writes."""

from __future__ import annotations

import pytest

from checkpoints import layout_of, tiny_config
from golden_plan import SIZES
from plans import config_of, made_up, packed_config, published_plan, skip_list
from qwen35.codecs.registry import CODECS, packings
from qwen35.model.model_config import parse_config
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import built_in, load_recipe
from qwen35.tensors import TensorSpec

pytestmark = pytest.mark.sentences

TEXT = "model.language_model"


def test_config_keeps_all_keys_of_the_source() -> None:
    raw = tiny_config()
    config = config_of(make_plan(made_up(raw), load_recipe("nf4")))
    quantization = config.pop("quantization_config")
    assert config == raw
    assert quantization == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": ["lm_head", "model.visual", f"{TEXT}.embed_tokens", "mtp"],
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_compute_dtype_is_that_of_the_checkpoint(dtype: str) -> None:
    config = config_of(make_plan(made_up(tiny_config(dtype=dtype)), load_recipe("nf4")))
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == dtype


@pytest.mark.parametrize("moe", [False, True])
def test_text_config_is_the_text_section_with_the_keys_of_the_root(moe: bool) -> None:
    raw = tiny_config(moe=moe) | {"transformers_version": "5.1", "pad_token_id": 3, "mine": 1}
    raw["text_config"] |= {"eos_token_id": 1, "architectures": ["Old"]}
    raw["eos_token_id"] = 2
    config = config_of(make_plan(made_up(raw), load_recipe("text")))
    name = "Moe" if moe else ""
    assert next(iter(config)) == "architectures"
    assert config == {
        **raw["text_config"],
        "architectures": [f"Qwen3_5{name}ForCausalLM"],
        "model_type": f"qwen3_5{'_moe' if moe else ''}_text",
        "eos_token_id": 2,
        "pad_token_id": 3,
        "transformers_version": "5.1",
        "tie_word_embeddings": True,
    }
    vision = ("vision", "image", "video", "text_config", "mine")
    assert not [key for key in config if key.startswith(vision)]
    assert raw["text_config"]["architectures"] == ["Old"]  # the source's is left as it was


@pytest.mark.parametrize("size", SIZES)
def test_text_config_parses_to_the_same_text_model(size: str) -> None:
    plan = published_plan(size, "text-nf4")
    config, source = parse_config(config_of(plan)), plan.checkpoint.config
    assert config.model_type == f"{source.model_type.removesuffix('_text')}_text"
    assert config.dims == {k: v for k, v in source.dims.items() if not k.startswith("vision")}
    assert (config.layer_types, config.tied) == (source.layer_types, source.tied)
    assert (config.mtp_layers, config.dtype) == (source.mtp_layers, source.dtype)
    assert config.vision_depth == 0


def test_text_names_follow_the_class_or_stay() -> None:
    checkpoint = made_up(tiny_config())
    moved = make_plan(checkpoint, load_recipe("text"))
    stayed = make_plan(checkpoint, load_recipe("text"), keep_prefix=True)
    names = [out.name for out in stayed.outputs]
    assert any(name.startswith(f"{TEXT}.layers.") for name in names)
    assert [out.name for out in moved.outputs] == [
        name.replace("model.language_model.", "model.") for name in names
    ]
    assert skip_list(make_plan(checkpoint, load_recipe("text-nf4"), keep_prefix=True))[1] == (
        f"{TEXT}.embed_tokens"
    )


def test_text_only_source_keeps_its_names_and_class() -> None:
    raw = tiny_config(text_only=True)
    for recipe in set(built_in("safetensors")) - {"nvfp4-experts"}:  # a dense model has none
        codec = CODECS.get(load_recipe(recipe).format)
        if codec is not None and codec.dialect:  # which has its own form
            continue
        plan = make_plan(made_up(raw), load_recipe(recipe))
        config = config_of(plan)
        config.pop("quantization_config", None)
        assert config == raw
        assert {step.op for step in plan.steps} <= {"copy", *packings("safetensors")}
        assert all(out.name.startswith(("model.", "mtp.")) for out in plan.outputs)


def test_config_says_no_mtp_when_none_is_written() -> None:
    raw = tiny_config()
    dropped = make_plan(made_up(raw), load_recipe("nf4").dropping_mtp())
    absent = make_plan(made_up(raw, layout_of(raw, mtp=False)), load_recipe("nf4"))
    for plan in (dropped, absent):
        assert config_of(plan)["text_config"]["mtp_num_hidden_layers"] == 0
        assert "mtp" not in skip_list(plan)
    assert dropped.notes == ()
    assert absent.notes == (
        "config.json promises 1 multi-token-prediction layer(s), but the checkpoint has none: the "
        "output promises none; convert and gguf take that of the original with --mtp-from",
    )


UP = f"{TEXT}.layers.0.mlp.up_proj.weight"


def test_nf4_source_passes_through_and_the_rest_is_packed() -> None:
    config = packed_config(["lm_head"])
    plan = make_plan(made_up(config, packed=(UP,)), load_recipe("nf4"))
    step = next(step for step in plan.steps if step.spec.name == UP)
    assert (step.op, step.reason) == ("copy", "linear layer; NF4 already")
    assert len(step.outputs) == 6
    plain = make_plan(made_up(tiny_config()), load_recipe("nf4"))
    assert config_of(plan) == config_of(plain)
    assert list(plan.outputs) == list(plain.outputs)


def test_packed_layers_that_must_be_plain_are_restored() -> None:
    head = "lm_head.weight"
    config = tiny_config(tied=False)
    plan = make_plan(made_up(config, packed=(UP, head)), load_recipe("nf4").keeping(("mlp",)))
    ops = {step.spec.name: step for step in plan.steps if step.op == "decode"}
    assert sorted(ops) == [head, UP]
    assert ops[head].outputs == (TensorSpec(head, "BF16", (512, 256)),)
    assert "packed in the source (nf4), restored" in ops[UP].reason


def test_text_recipe_writes_the_config_of_what_it_copies() -> None:
    skip = ["model.visual", "model.visual.blocks.0.attn.qkv"]  # without the head, as some are
    plan = make_plan(made_up(packed_config(skip), packed=(UP,)), load_recipe("text"))
    quantization = config_of(plan)["quantization_config"]
    assert quantization["bnb_4bit_quant_type"] == "nf4"
    listed = quantization["llm_int8_skip_modules"]
    assert listed[:3] == ["lm_head", "model.embed_tokens", "mtp"]
    assert {"in_proj_qkv", "model.layers.1.mlp.up_proj"} <= set(listed)
    assert "model.layers.0.mlp.up_proj" not in listed
    names = [out.name for out in plan.outputs if ".mlp.up_proj.weight." in out.name]
    assert len(names) == 5
    assert all(name.startswith("model.layers.0.mlp.up_proj.weight.") for name in names)


def test_quantization_of_the_source_goes_when_nothing_packed_is_left() -> None:
    plan = make_plan(made_up(packed_config(["lm_head"])), load_recipe("text"))
    assert "quantization_config" not in config_of(plan)
