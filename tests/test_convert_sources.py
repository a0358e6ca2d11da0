"""Conversion of sources of every kind, and what of them is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoints import Tensors, make_checkpoint, random_tensors, tiny_config, write_checkpoint
from qwen35.checkpoint.source import open_folder
from qwen35.errors import TensorError, UsageError
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write
from running import changed, dequantize, load_all, plan_of, read_config, run

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"


def test_fp16_source_stays_fp16_where_it_is_kept(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", dtype="float16")
    run(source, tmp_path / "out")
    tensors = load_all(tmp_path / "out")
    assert tensors["model.language_model.embed_tokens.weight"].dtype == torch.float16
    state = json.loads(bytes(tensors[f"{QKV}.quant_state.bitsandbytes__nf4"].tolist()))
    assert state["dtype"] == "float16"
    quantization = read_config(tmp_path / "out")["quantization_config"]
    assert quantization["bnb_4bit_compute_dtype"] == "float16"
    original = load_all(source)[QKV].float()
    error = (dequantize(tensors, QKV).float() - original).norm() / original.norm()
    assert 0.05 < float(error) < 0.12


def test_zero_blocks_decode_to_zero_and_zero_tensors_too(dense: Path, tmp_path: Path) -> None:
    weight = load_all(dense)[QKV].clone()
    weight[3, :64] = 0
    zeros = torch.zeros_like(load_all(dense)[f"{LAYER}.0.mlp.up_proj.weight"])
    source = changed(dense, tmp_path / "in", {QKV: weight, f"{LAYER}.0.mlp.up_proj.weight": zeros})
    run(source, tmp_path / "out")
    tensors = load_all(tmp_path / "out")
    assert not dequantize(tensors, QKV)[3, :64].any()
    assert dequantize(tensors, QKV)[3, 64:].any()
    assert not dequantize(tensors, f"{LAYER}.0.mlp.up_proj.weight").any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [QKV, "model.language_model.embed_tokens.weight", f"{LAYER}.1.linear_attn.A_log"],
)
def test_nan_and_infinity_are_refused_with_the_tensors_name(
    dense: Path, tmp_path: Path, name: str, value: float
) -> None:
    weight = load_all(dense)[name].clone()
    weight.view(-1)[-1] = value
    source = changed(dense, tmp_path / "in", {name: weight})
    with pytest.raises(TensorError, match="NaN or infinity") as caught:
        run(source, tmp_path / "out")
    assert caught.value.subject == name
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_nan_in_an_fp16_source_is_refused(tmp_path: Path) -> None:
    config = tiny_config(dtype="float16")
    tensors = random_tensors(config)
    tensors[QKV].view(-1)[5] = float("nan")
    source = write_checkpoint(tmp_path / "in", config, tensors)
    with pytest.raises(TensorError, match="NaN or infinity"):
        run(source, tmp_path / "out")


def test_nf4_source_passes_through_and_packed_vision_is_restored(
    dense: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "all.toml"
    recipe.write_text(
        'format = "nf4"\n[[rules]]\nmatch = "mtp"\naction = "plain"\n'
        '[[rules]]\nmatch = "kind:linear"\naction = "nf4"\n'
        '[[rules]]\nmatch = "*"\naction = "plain"\n'
    )
    run(dense, tmp_path / "packed", str(recipe))
    packed = load_all(tmp_path / "packed")
    name = "model.visual.blocks.0.attn.qkv.weight"
    assert packed[name].dtype == torch.uint8
    skip = read_config(tmp_path / "packed")["quantization_config"]["llm_int8_skip_modules"]
    assert "model.visual" not in skip

    plan = plan_of(tmp_path / "packed")
    assert {step.op for step in plan.steps} == {"copy", "decode"}
    write(plan, tmp_path / "out")
    tensors = load_all(tmp_path / "out")
    assert tensors[name].dtype == torch.bfloat16
    assert torch.equal(tensors[name], dequantize(packed, name))
    for part in (QKV, f"{QKV}.absmax", f"{QKV}.quant_state.bitsandbytes__nf4"):
        assert torch.equal(tensors[part], packed[part])
    again = read_config(tmp_path / "out")["quantization_config"]["llm_int8_skip_modules"]
    assert again == ["lm_head", "model.visual", "model.language_model.embed_tokens", "mtp"]


def test_nf4_source_without_double_quantization_is_read(dense: Path, tmp_path: Path) -> None:
    from bitsandbytes.functional import quantize_4bit

    name = "model.visual.blocks.1.mlp.linear_fc1.weight"
    original = load_all(dense)
    codes, state = quantize_4bit(
        original[name], blocksize=64, quant_type="nf4", compress_statistics=False
    )
    parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    config = read_config(dense) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    source = write_checkpoint(tmp_path / "in", config, {**original, name: codes, **parts})
    run(source, tmp_path / "out")
    expected = dequantize({name: codes, **parts}, name)
    assert torch.equal(load_all(tmp_path / "out")[name], expected)


def fp8_checkpoint(dense: Path, folder: Path) -> tuple[Path, Tensors]:
    """Write a block-FP8 copy of a checkpoint; return it and what its weights decode to."""
    original = load_all(dense)
    tensors, decoded = dict(original), {}
    for name, weight in original.items():
        if ".mlp." not in name or "language_model" not in name:
            continue
        scale = weight.float().abs().amax() / 448
        grid = torch.full((weight.shape[0] // 128, weight.shape[1] // 128), float(scale))
        grid = (grid * torch.linspace(1, 2, grid.numel()).reshape(grid.shape)).bfloat16()
        wide = grid.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        tensors[name] = (weight.float() / wide).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = grid
        decoded[name] = (tensors[name].float() * wide).bfloat16()
    config = read_config(dense) | {"quantization_config": {"quant_method": "fp8"}}
    return write_checkpoint(folder, config, tensors), decoded


def test_fp8_source_is_decoded_and_then_packed(dense: Path, tmp_path: Path) -> None:
    source, decoded = fp8_checkpoint(dense, tmp_path / "in")
    plain = changed(dense, tmp_path / "plain", decoded)
    expected = run(plain, tmp_path / "expected")
    got = run(source, tmp_path / "out")
    assert got.hashes["model.safetensors"] == expected.hashes["model.safetensors"]
    quantization = read_config(tmp_path / "out")["quantization_config"]
    assert quantization["quant_method"] == "bitsandbytes"


def test_fp8_values_beyond_fp16_are_refused_and_not_written_as_infinity(
    dense: Path, tmp_path: Path
) -> None:
    name = f"{LAYER}.0.mlp.up_proj.weight"
    config = tiny_config(dtype="float16")
    tensors = random_tensors(config)
    tensors[name] = torch.full(tensors[name].shape, 448.0).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.full((4, 2), 1000.0)
    config["quantization_config"] = {"quant_method": "fp8"}
    source = write_checkpoint(tmp_path / "in", config, tensors)
    with pytest.raises(TensorError, match="NaN or infinity"):
        write(plan_of(source, keep=("mlp",)), tmp_path / "out")


def test_fp8_scale_of_another_shape_is_refused(dense: Path, tmp_path: Path) -> None:
    source, _ = fp8_checkpoint(dense, tmp_path / "in")
    name = f"{LAYER}.0.mlp.up_proj.weight_scale_inv"
    broken = changed(source, tmp_path / "broken", {name: torch.ones(1, 1, dtype=torch.bfloat16)})
    with pytest.raises(TensorError, match="blocks of 128x128"):
        plan_of(broken)


def test_fused_experts_are_kept_and_said(moe: Path, tmp_path: Path) -> None:
    plan = plan_of(moe)
    experts = [step for step in plan.steps if step.role.info.kind == "experts"]
    assert experts
    assert {step.op for step in experts} == {"copy"}
    share = sum(s.spec.numel for s in experts) / sum(s.spec.numel for s in plan.steps)
    assert f"experts stay in BF16: {share:.1%} of all parameters" in plan.notes[0]


def test_missing_and_unknown_tensors_are_refused_before_any_output(
    dense: Path, tmp_path: Path
) -> None:
    tensors = load_all(dense)
    del tensors[QKV]
    tensors["model.language_model.layers.0.surprise.weight"] = torch.zeros(1)
    source = write_checkpoint(tmp_path / "in", read_config(dense), tensors)
    with pytest.raises(TensorError, match="missing.*1 more tensors") as caught:
        run(source, tmp_path / "out")
    assert caught.value.subject == QKV
    assert not (tmp_path / "out").exists()


def nf4_without_double_quantization(dense: Path, folder: Path) -> Path:
    """Write an NF4 copy of a checkpoint as bitsandbytes does without compressed statistics."""
    from bitsandbytes.functional import quantize_4bit

    tensors = load_all(dense)
    for step in plan_of(dense).steps:
        if step.op != "nf4":
            continue
        name = step.weight.name
        codes, state = quantize_4bit(
            tensors[name], blocksize=64, quant_type="nf4", compress_statistics=False
        )
        tensors[name] = codes
        tensors |= {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
    config = read_config(dense) | {
        "quantization_config": {"quant_method": "bitsandbytes", "llm_int8_skip_modules": None}
    }
    return write_checkpoint(folder, config, tensors)


@pytest.mark.parametrize("recipe", ["nf4", "text", "text-nf4"])
def test_any_nf4_source_gives_an_output_that_passes(
    dense: Path, tmp_path: Path, recipe: str
) -> None:
    """Whatever its config says: ours is derived from the tensors written."""
    from qwen35.checkpoint.open import fetch
    from qwen35.verification.opening import open_artifact
    from qwen35.verification.verdict import verify

    source = nf4_without_double_quantization(dense, tmp_path / "in")
    out = run(source, tmp_path / "out", recipe).out
    assert not read_config(out)["quantization_config"]["bnb_4bit_use_double_quant"]
    verdict = verify(open_artifact(str(out), "numbers"), source=fetch(str(dense)), depth="numbers")
    assert verdict.findings == ()


def test_decoded_layers_of_an_nf4_source_are_listed(dense: Path, tmp_path: Path) -> None:
    nf4 = run(dense, tmp_path / "nf4").out
    recipe = load_recipe("text").keeping(("self_attn",))
    write(make_plan(open_folder(nf4), recipe), tmp_path / "out")
    skip = read_config(tmp_path / "out")["quantization_config"]["llm_int8_skip_modules"]
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= set(skip)


def test_weights_packed_twice_and_once_are_not_mixed(dense: Path, tmp_path: Path) -> None:
    once = load_all(nf4_without_double_quantization(dense, tmp_path / "once"))
    twice = load_all(run(dense, tmp_path / "twice").out)
    mixed = {k: v for k, v in twice.items() if not k.startswith(QKV)}
    mixed |= {k: v for k, v in once.items() if k.startswith(QKV)}
    source = write_checkpoint(tmp_path / "in", read_config(tmp_path / "twice"), mixed)
    with pytest.raises(UsageError, match="with and without double quantization"):
        plan_of(source)


def test_nan_codes_of_an_fp8_source_are_refused_when_copied(dense: Path, tmp_path: Path) -> None:
    source, _ = fp8_checkpoint(dense, tmp_path / "in")
    name = f"{LAYER}.0.mlp.up_proj.weight"
    weight = load_all(source)[name].clone()
    weight.view(torch.uint8)[1, 1] = 0xFF
    with pytest.raises(TensorError, match="NaN or infinity"):
        run(changed(source, tmp_path / "nan", {name: weight}), tmp_path / "out", "text")
