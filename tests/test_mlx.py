"""MLX: what is written, decoded by formulas of its own, read back from others, and faults."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, safe_open, save_file

import qwen35
from checkpoints import (
    ASSET,
    Tensors,
    layout_of,
    random_tensors,
    tiny_config,
    write_checkpoint,
)
from gguf_models import make_variant
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.codecs.floats import f32_from, from_f32
from qwen35.codecs.mlx.arrays import packed, quantize_rows, rounded, unpacked
from qwen35.codecs.mlx.config import section_findings
from qwen35.codecs.mlx.layout import FORMATS, MlxFormat
from qwen35.codecs.mlx.mlx_names import family_name, mlx_name
from qwen35.errors import ConfigError, InputError, TensorError, UsageError
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.recipe_files import read_recipe_file
from qwen35.publishing.card import card_text
from qwen35.writing.write import write
from running import changed, load_all, plan_of, read_config, run
from verifying import check, edited, found

pytestmark = pytest.mark.sentences

TEXT = "language_model.model."
LAYER = f"{TEXT}layers.0."
NORM = f"{LAYER}input_layernorm.weight"
CONV = f"{LAYER}linear_attn.conv1d.weight"
PATCHES = "vision_tower.patch_embed.proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlx")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Path:
    """Return the embedded checkpoint in 4 bits."""
    run(ASSET, folder / "tiny", "mlx-4bit")
    return folder / "tiny"


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    """Return a mixture of experts."""
    return make_variant(folder, "moe-8")


@pytest.fixture(scope="module")
def experts(source: Path, folder: Path) -> Path:
    """Return it in NVFP4."""
    run(source, folder / "experts", "mlx-nvfp4")
    return folder / "experts"


def like_mlx_community(artifact: Path, out: Path) -> Path:
    """Return an artifact as mlx-lm's converter leaves it: no manifest, no tower."""
    out.mkdir()
    tensors = {n: t for n, t in load_all(artifact).items() if not n.startswith("vision_tower")}
    save_file(tensors, out / "model.safetensors", metadata={"format": "mlx"})
    config = read_config(artifact)
    text = config["text_config"]
    text["mtp_num_hidden_layers"] = 1
    text["rope_parameters"]["type"] = text["rope_parameters"].pop("rope_type")
    config.pop("vision_config", None)
    (out / "config.json").write_text(json.dumps(config))
    return out


def configured(model: Path, out: Path, settings: Mapping[str, object]) -> Path:
    """Return a copy with other settings of the text model, without those that are ``...``."""
    config = read_config(model)
    text = {**config["text_config"], **settings}
    config["text_config"] = {key: value for key, value in text.items() if value is not ...}
    shutil.copytree(model, out)
    (out / "config.json").write_text(json.dumps(config))
    (out / "qwen35.json").unlink(missing_ok=True)
    return out


# --- bytes


def reference(values: np.ndarray[Any, Any], kind: MlxFormat) -> list[np.ndarray[Any, Any]]:
    """Return codes, scales and biases of [rows, columns] float32 values, as ``mx.quantize``.

    A group at a time, in float32 throughout, as mlx 0.32 ``quantized.cpp`` and ``ops.cpp``.
    """
    one, codes, scales, biases = np.float32, [], [], []
    for w in values.reshape(-1, kind.group):
        if kind.affine:
            low, high = w.min(), w.max()
            scale = max((high - low) / one(2**kind.bits - 1), one(1e-7))
            below = abs(low) > abs(high)
            scale, edge = (scale, low) if below else (-scale, high)
            steps, bias = np.rint(edge / scale), one(0)
            if steps:
                scale, bias = edge / steps, edge
            code = np.clip(np.rint((w - bias) / scale), 0, 2**kind.bits - 1)
        else:
            numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], one)
            unit = np.abs(w).max() / one(6)
            if kind.mode == "nvfp4":
                grid = torch.tensor(unit).to(torch.float8_e4m3fn)
                scale, unit = grid.view(torch.uint8).item(), one(grid.float().item())
            else:
                scale = 127 + int(np.ceil(np.log2(np.float64(unit)))) if unit else 127
                unit = one(2.0 ** (scale - 127))
            both = np.concatenate([numbers, -numbers])
            size = w / unit if unit else np.zeros_like(w)
            code, bias = np.abs(size[:, None] - both).argmin(axis=1), one(0)
        codes.append(code)
        scales.append(scale)
        biases.append(bias)
    shape = (len(values), -1)
    whole = np.array(codes).astype(np.uint8).reshape(shape)
    return [whole, np.array(scales).reshape(shape), np.array(biases, one).reshape(shape)]


def odd_values() -> np.ndarray[Any, Any]:
    """Return [rows, 128] values that are ordinary, equal, zero, tiny, large or halfway."""
    generator = np.random.default_rng(5)
    rows = generator.standard_normal((24, 128)).astype(np.float32) * np.float32(0.02)
    rows[1], rows[2], rows[3] = 0, 3, -0.0
    rows[4], rows[5] = np.abs(rows[0]), -np.abs(rows[0])
    rows[6], rows[7] = rows[0] * 1e-6, rows[0] * 1e4
    rows[8] = 5 + rows[0] * np.float32(0.01)
    for row in range(9, 24):  # the bounds between E2M1 numbers
        halves = generator.choice([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], 128)
        rows[row] = halves * generator.choice([-1, 1], 128) * 2.0 ** (row - 20)
    return rows


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
@pytest.mark.parametrize("name", ["mlx-4bit", "mlx-8bit", "mlx-3bit-g32", "mlx-mxfp4", "mlx-nvfp4"])
def test_codes_and_scales_are_those_of_mlx(name: str, dtype: str) -> None:
    kind, given = FORMATS[name], from_f32(odd_values().reshape(-1), dtype).reshape(24, 128)
    rows = quantize_rows(given, dtype, kind)
    codes, scales, biases = reference(f32_from(given, dtype), kind)
    assert np.array_equal(rows.codes, codes)
    if rows.stored is not None:
        assert np.array_equal(rows.stored, scales)
        return
    for ours, theirs in ((rows.scales, scales), (rows.biases, biases)):
        assert np.array_equal(rounded(ours, dtype), rounded(theirs.astype(np.float32), dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_follow_each_other_without_gaps(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 64)).astype(np.uint8)
    data = packed(codes, bits)
    assert np.array_equal(unpacked(data, bits), codes)
    words = int.from_bytes(data[1].tobytes(), "little")
    assert [words >> bits * i & 2**bits - 1 for i in range(64)] == codes[1].tolist()


@pytest.mark.parametrize(
    ("recipe", "value", "words"),
    [
        ("mlx-4bit", float("nan"), "NaN"),
        ("mlx-nvfp4", 1e5, "too large for mlx-nvfp4"),
        ("mlx-4bit", 3.3e38, "too large for mlx-4bit"),
        ("mlx-mxfp4", 3.3e38, "too large for mlx-mxfp4"),
    ],
)
def test_values_without_a_code_are_refused(
    recipe: str, value: float, words: str, dense: Path, tmp_path: Path
) -> None:
    name = "model.language_model.layers.1.mlp.up_proj.weight"

    weight = load_all(dense)[name]
    weight[3, 5], weight[3, 6] = value, -value
    bad = changed(dense, tmp_path / "bad", {name: weight})
    with pytest.raises(TensorError, match=words) as caught:
        run(bad, tmp_path / "out", recipe)
    assert caught.value.subject == name
    assert not (tmp_path / "out").exists()


# --- what is written


def test_names_and_shapes_are_those_of_mlx(tiny: Path) -> None:
    tensors, before = load_all(tiny), load_all(ASSET)
    with safe_open(tiny / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}
    assert not [name for name in tensors if "mtp" in name]
    assert all(name.startswith((TEXT, "vision_tower.")) for name in tensors)
    prefix = "model.language_model.layers.0."
    assert torch.equal(tensors[NORM], before[f"{prefix}input_layernorm.weight"] + 1)
    gated = "linear_attn.norm.weight"
    assert torch.equal(tensors[LAYER + gated], before[prefix + gated])
    conv = before[f"{prefix}linear_attn.conv1d.weight"]
    assert torch.equal(tensors[CONV], conv.transpose(1, 2))
    patches = before["model.visual.patch_embed.proj.weight"]
    assert torch.equal(tensors[PATCHES], patches.permute(0, 2, 3, 4, 1))
    assert tensors[f"{TEXT}embed_tokens.weight"].shape == (4096, 256 * 8 // 32)
    assert tensors[f"{LAYER}mlp.up_proj.weight"].shape == (512, 256 * 4 // 32)


def test_experts_are_stacks_and_routers_have_8_bits(experts: Path, source: Path) -> None:
    tensors, before = load_all(experts), load_all(source)
    stack = f"{LAYER}mlp.switch_mlp."
    assert tensors[f"{stack}up_proj.weight"].shape == (8, 256, 256 * 4 // 32)
    assert tensors[f"{stack}down_proj.scales"].shape == (8, 256, 256 // 16)
    fused = before["model.language_model.layers.0.mlp.experts.gate_up_proj"]
    for leaf, rows in (("gate_proj", slice(256)), ("up_proj", slice(256, None))):
        exact = fused[5, rows].float().numpy()
        codes, scales, _ = reference(exact[:2], FORMATS["mlx-nvfp4"])
        assert np.array_equal(tensors[f"{stack}{leaf}.scales"][5, :2].numpy(), scales)
        words = tensors[f"{stack}{leaf}.weight"][5, :2].contiguous().numpy().view(np.uint8)
        assert np.array_equal(unpacked(words, 4), codes)
    section = read_config(experts)["quantization"]
    assert section == read_config(experts)["quantization_config"]
    assert {key: section[key] for key in ("mode", "bits", "group_size")} == {
        "mode": "nvfp4",
        "bits": 4,
        "group_size": 16,
    }
    for module in ("mlp.gate", "mlp.shared_expert_gate"):
        assert section[LAYER + module] == {"bits": 8, "group_size": 64}


def test_config_is_nested_and_promises_no_mtp(tiny: Path, folder: Path) -> None:
    assert read_config(ASSET)["text_config"]["mtp_num_hidden_layers"] == 1
    run(ASSET, folder / "flat", "text")
    run(folder / "flat", folder / "text", "mlx-4bit")
    for made in (tiny, folder / "text"):
        config = read_config(made)
        assert config["model_type"] == "qwen3_5"
        text = config["text_config"]
        assert text["mtp_num_hidden_layers"] == 0
        assert text["full_attention_interval"] == 4
        assert text["tie_word_embeddings"] is True
    assert "vision_config" not in read_config(folder / "text")
    same = {n: t for n, t in load_all(tiny).items() if not n.startswith("vision_tower")}
    other = load_all(folder / "text")
    assert same.keys() == other.keys()
    assert all(torch.equal(same[name], other[name]) for name in same)
    assert check(folder / "text", folder / "flat").findings == ()


def test_a_layer_of_experts_shares_a_file(
    source: Path, experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = "qwen35.planning.safetensors_files.safetensors_options.MAX_SHARD_BYTES"
    monkeypatch.setattr(limit, 100_000)
    run(source, tmp_path / "out", "mlx-nvfp4")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    ours, whole = load_all(tmp_path / "out"), load_all(experts)
    assert len(set(index["weight_map"].values())) > 4
    assert index["weight_map"].keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert check(tmp_path / "out", source).findings == ()


def test_kept_experts_are_stacks_too(source: Path, tmp_path: Path) -> None:
    write(plan_of(source, "mlx-4bit", keep=("mlp.experts",)), tmp_path / "out", threads=1)
    fused = load_all(source)["model.language_model.layers.3.mlp.experts.gate_up_proj"]
    up = load_all(tmp_path / "out")[f"{TEXT}layers.3.mlp.switch_mlp.up_proj.weight"]
    assert torch.equal(up, fused[:, 256:])
    assert check(tmp_path / "out", source).findings == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"keep": ("mtp",)}, "MLX does not load"), ({"keep_shards": True}, "--keep-shards")],
)
def test_what_mlx_cannot_hold_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        qwen35.plan(str(ASSET), recipe="mlx-4bit", **options)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("layer_types", ["full_attention"] + ["linear_attention"] * 3, "follow no interval"),
        ("layer_types", ["linear_attention"] * 4, "no layer has full_attention"),
        ("attn_output_gate", False, "attn_output_gate is False: MLX computes"),
        ("hidden_act", "gelu", "hidden_act is 'gelu': MLX computes SiLU"),
        ("attention_bias", True, "attention_bias is True: MLX computes attention without"),
        ("rms_norm_eps", None, "rms_norm_eps is None, expected a number"),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2}, "is dynamic, which MLX"),
        (
            "rope_parameters",
            {"rope_type": "yarn", "factor": 2, "attention_factor": 3},
            "scale of attention",
        ),
    ],
)
def test_layers_that_mlx_does_not_have_are_refused(
    key: str, value: object, words: str, tmp_path: Path
) -> None:
    config = tiny_config()
    config["text_config"][key] = value
    made = tmp_path / "made"
    write_checkpoint(made, config, random_tensors(config, layout_of(config)))
    with pytest.raises(ConfigError, match=words):
        make_plan(open_folder(made), load_recipe("mlx-4bit"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("norm_topk_prob", False, True),  # only MLX obeys it
        ("norm_topk_prob", None, True),
        ("num_experts_per_tok", ..., 8),  # which MLX takes for 0
        ("full_attention_interval", None, 4),
        ("rms_norm_eps", ..., 1e-6),
    ],
)
def test_settings_that_mlx_takes_otherwise_are_written_out(
    key: str, value: object, expected: object, source: Path, tmp_path: Path
) -> None:
    made = configured(source, tmp_path / "made", {key: value})
    run(made, tmp_path / "out", "mlx-4bit")
    written = read_config(tmp_path / "out")["text_config"][key]
    assert written == expected
    assert type(written) is type(expected)
    assert check(tmp_path / "out", made).findings == ()


def test_a_dense_model_is_no_mixture(tmp_path: Path) -> None:
    made = configured(ASSET, tmp_path / "made", {"num_experts": 4})
    run(made, tmp_path / "out", "mlx-4bit")
    assert "num_experts" not in read_config(tmp_path / "out")["text_config"]
    assert check(tmp_path / "out", made).findings == ()


@pytest.fixture(scope="module")
def own_head(folder: Path) -> tuple[Path, Path]:
    """Return a tied model that stores a head all the same, and what is made of it."""
    tensors = load_all(ASSET)
    head = tensors["model.language_model.embed_tokens.weight"].flip(0).contiguous()
    made = changed(ASSET, folder / "with-head", {"lm_head.weight": head})
    run(made, folder / "own-head", "mlx-4bit")
    return made, folder / "own-head"


def test_a_head_of_its_own_is_not_tied(own_head: tuple[Path, Path]) -> None:
    made, out = own_head
    config = read_config(out)
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert "language_model.lm_head.scales" in load_all(out)
    verdict = check(out, made)
    assert verdict.findings == ()
    assert any("tie_word_embeddings is false, as there is a head" in n for n in verdict.notes)


TIED = {"tie_word_embeddings": True}


def test_a_packed_head_of_a_tied_model_is_found(
    own_head: tuple[Path, Path], tmp_path: Path
) -> None:
    tied = configured(own_head[1], tmp_path / "tied", TIED)
    assert ("packing", "language_model.lm_head.weight") in found(check(tied))
    with pytest.raises(TensorError, match="stored, though tie_word_embeddings is true"):
        plan_of(tied, "bf16")


def test_an_unpacked_head_of_a_tied_model_is_found(
    own_head: tuple[Path, Path], tmp_path: Path
) -> None:
    def change(tensors: Tensors) -> None:
        for ending in ("scales", "biases"):
            del tensors[f"language_model.lm_head.{ending}"]
        tensors["language_model.lm_head.weight"] = torch.zeros(4096, 256).bfloat16()

    tied = edited(configured(own_head[1], tmp_path / "tied", TIED), tmp_path / "made", change)
    assert ("packing", "language_model.lm_head.weight") in found(check(tied))
    with pytest.raises(TensorError, match="stored, though tie_word_embeddings is true"):
        plan_of(tied, "bf16")


# --- as a source


@pytest.mark.parametrize("recipe", ["bf16", "nf4"])
@pytest.mark.parametrize("name", [NORM, PATCHES, f"{LAYER}linear_attn.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_in_what_is_unpacked_is_refused(
    name: str, value: float, recipe: str, tiny: Path, tmp_path: Path
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].bfloat16()
        tensors[name].view(-1)[-1] = value

    bad = edited(tiny, tmp_path / "bad", change)
    with pytest.raises(TensorError, match="NaN or infinity"):
        run(bad, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (100000.0, 0.25)),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, (100000.0, 0.5)),
        ({"type": "default", "rope_theta": 7}, (7, 0.25)),
    ],
)
def test_the_rotary_embedding_has_the_defaults_of_mlx(
    given: dict[str, Any], expected: tuple[float, float], tiny: Path, tmp_path: Path
) -> None:
    made = configured(tiny, tmp_path / "made", {"rope_parameters": given})
    rope = open_folder(made).config.text_raw["rope_parameters"]
    assert (rope["rope_theta"], rope["partial_rotary_factor"]) == expected


SETTINGS: dict[str, dict[str, Any]] = {
    "full_attention_interval is 2, expected 4": {"full_attention_interval": 2},
    "full_attention_interval is [4], expected 4": {"full_attention_interval": [4]},
    "full_attention_interval is None, expected 4": {"full_attention_interval": None},
    "full_attention_interval is True, expected 4": {"full_attention_interval": True},
    "rms_norm_eps is None, expected a number": {"rms_norm_eps": None},
    "rms_norm_eps is '1e-6', expected a number": {"rms_norm_eps": "1e-6"},
    "num_experts_per_tok is None, expected 1 to 8": {"num_experts_per_tok": None},
    "num_experts_per_tok is 9, expected 1 to 8": {"num_experts_per_tok": 9},
    "norm_topk_prob is False: MLX obeys it": {"norm_topk_prob": False},
    "hidden_act is 'relu': MLX computes": {"hidden_act": "relu"},
    "attention_bias is True: MLX computes": {"attention_bias": True},
}


@pytest.mark.parametrize("words", SETTINGS)
def test_settings_that_mlx_reads_otherwise_are_found(
    words: str, experts: Path, tmp_path: Path
) -> None:
    made = configured(experts, tmp_path / "made", SETTINGS[words])
    [finding] = check(made).findings
    assert (finding.check, finding.subject) == ("config", "config.json")
    assert words in finding.message
    with pytest.raises(ConfigError, match=re.escape(words)):
        plan_of(made, "bf16")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("mlp.switch_mlp.up_proj", True),
        ("mlp.switch_mlp.up_proj", {"mode": "nvfp4"}),
        ("mlp.gate", {"bits": 8}),
        ("mlp.gate", {"bits": 8, "group_size": None, "mode": "affine"}),
        ("input_layernorm", False),
    ],
)
def test_settings_of_a_module_may_be_short(
    path: str, value: object, experts: Path, tmp_path: Path
) -> None:
    short = partial(both, lambda section: section.update({LAYER + path: value}))
    assert check(edited(experts, tmp_path / "made", None, short)).findings == ()


def test_what_mlx_lm_makes_of_it_is_no_fault(tiny: Path, tmp_path: Path) -> None:
    strange = like_mlx_community(tiny, tmp_path / "strange")
    tensors, gated = load_all(strange), f"{LAYER}linear_attn.norm.weight"
    tensors[gated] = tensors[gated].bfloat16()
    save_file(tensors, strange / "model.safetensors", metadata={"format": "mlx"})
    for path in ASSET.iterdir():
        if not (strange / path.name).exists() and "safetensors" not in path.name:
            shutil.copy(path, strange)
    config = read_config(strange)
    generation = json.loads((ASSET / "generation_config.json").read_text())
    config["eos_token_id"] = generation["eos_token_id"]
    assert config["eos_token_id"] != config["text_config"]["eos_token_id"]
    (strange / "config.json").write_text(json.dumps(config))
    verdict = check(strange, ASSET)
    assert verdict.findings == ()
    assert "eos_token_id of config.json is that of generation_config.json" in verdict.notes
    run(strange, tmp_path / "out", "bf16")
    norm = load_all(tmp_path / "out")["model.layers.0.linear_attn.norm.weight"]
    assert torch.equal(norm, tensors[gated])
    tensors[gated][3] *= 1.01
    save_file(tensors, strange / "model.safetensors", metadata={"format": "mlx"})
    assert found(check(strange, ASSET)) == {("values", "model.layers.0.linear_attn.norm.weight")}


@pytest.mark.parametrize("packed", [True, False])
def test_convolutions_of_transformers_under_names_of_mlx(
    packed: bool, tiny: Path, tmp_path: Path
) -> None:
    def change(tensors: Tensors) -> None:
        for name in [*tensors]:
            if name.endswith("conv1d.weight"):
                tensors[name] = tensors[name].transpose(1, 2)
            if not packed and name.endswith((".scales", ".biases")):
                del tensors[name]
            elif not packed and tensors[name].dtype == torch.uint32:
                tensors[name] = torch.zeros(2, 2)

    made = edited(tiny, tmp_path / "made", change)
    save_file(load_all(made), made / "model.safetensors", metadata={"format": "mlx"})
    with pytest.raises(TensorError, match="MLX adds 1 to all norms") as caught:
        open_folder(made)
    assert caught.value.subject == CONV


def test_missing_scales_are_named(tiny: Path, experts: Path, tmp_path: Path) -> None:
    module = f"{LAYER}mlp.up_proj"
    made = edited(tiny, tmp_path / "made", lambda t: t.pop(f"{module}.scales"))
    with pytest.raises(TensorError, match="missing, though .*up_proj.weight is packed") as caught:
        open_folder(made)
    assert caught.value.subject == f"{module}.scales"
    assert ("packing", f"{module}.scales") in found(check(made))
    stack = f"{LAYER}mlp.switch_mlp.up_proj.scales"
    made = edited(experts, tmp_path / "stack", lambda t: t.pop(stack))
    assert [s for c, s in found(check(made)) if c == "packing"] == [stack]


def test_decoding_is_that_of_the_formulas(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "plain", "bf16")
    plain, tensors, before = load_all(tmp_path / "plain"), load_all(tiny), load_all(ASSET)
    module = f"{TEXT}layers.3.self_attn.q_proj"
    codes = unpacked(tensors[f"{module}.weight"].numpy().view(np.uint8), 4)
    scales, biases = (tensors[f"{module}.{n}"].float().numpy() for n in ("scales", "biases"))
    expected = codes * np.repeat(scales, 64, axis=1) + np.repeat(biases, 64, axis=1)
    name = "model.language_model.layers.3.self_attn.q_proj.weight"
    assert torch.equal(plain[name], torch.from_numpy(expected).bfloat16())
    assert plain.keys() == {name for name in before if not name.startswith("mtp.")}
    for name in ("visual.patch_embed.proj", "language_model.layers.0.linear_attn.conv1d"):
        assert torch.equal(plain[f"model.{name}.weight"], before[f"model.{name}.weight"])
    norm = "model.language_model.layers.0.input_layernorm.weight"
    assert torch.equal(plain[norm].float(), (before[norm] + 1).float() - 1)
    assert check(tmp_path / "plain", tiny).findings == ()


def test_gguf_is_that_of_the_decoded_weights(tiny: Path, experts: Path, tmp_path: Path) -> None:
    for number, made in enumerate((tiny, experts)):
        run(made, tmp_path / f"plain{number}", "bf16")
        files = []
        for source in (made, tmp_path / f"plain{number}"):
            out = tmp_path / f"gguf-{number}-{source.name}"
            qwen35.gguf(source, out, types=["Q8_0"], threads=1)
            [file] = out.glob("*.gguf")
            files.append({t.name: t.data for t in GGUFReader(file).tensors})
        assert files[0].keys() == files[1].keys()
        assert all(np.array_equal(files[0][name], files[1][name]) for name in files[0])


def test_what_is_packed_already_is_copied(experts: Path, tmp_path: Path) -> None:
    run(experts, tmp_path / "again", "mlx-nvfp4")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (experts / name).read_bytes()


def test_a_folder_of_strangers_is_read(
    tiny: Path, experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for made, name in ((tiny, "tiny"), (experts, "experts")):
        strange = like_mlx_community(made, tmp_path / name)
        assert main(["inspect", str(strange)]) == 0
        assert "MLX" in capsys.readouterr().out
        run(strange, tmp_path / f"{name}-text", "bf16")
        run(made, tmp_path / f"{name}-whole", "bf16")
        ours, theirs = load_all(tmp_path / f"{name}-text"), load_all(tmp_path / f"{name}-whole")
        for tensor, value in ours.items():
            whole = tensor.replace("model.", "model.language_model.", 1)
            assert torch.equal(value, theirs[whole if whole in theirs else tensor])
        config = read_config(tmp_path / f"{name}-text")
        assert config["model_type"].endswith("_text")
        assert config["mtp_num_hidden_layers"] == 0
        assert "quantization" not in config


def test_names_of_both_forms() -> None:
    for family in ("model.language_model.norm.weight", "lm_head.scales", "model.visual.a.weight"):
        assert family_name(mlx_name(family), vision=True) == family
    assert family_name("language_model.model.norm.weight", vision=False) == "model.norm.weight"
    expert = "model.layers.0.mlp.experts.12.up_proj.weight"
    assert mlx_name(expert) == f"{LAYER}mlp.switch_mlp.up_proj.weight"


# --- faults

Change = Callable[[Tensors], object]


def without_shift(tensors: Tensors) -> None:
    tensors[NORM] = tensors[NORM] - 1


def axes_lost(tensors: Tensors) -> None:
    tensors[CONV] = tensors[CONV].transpose(1, 2)


def one_code(tensors: Tensors) -> None:
    tensors[f"{LAYER}mlp.up_proj.weight"].view(torch.uint8)[3, 7] ^= 0x30


def wide_scale(tensors: Tensors) -> None:
    tensors[f"{LAYER}mlp.up_proj.scales"][3, 1] *= 3


def no_biases(tensors: Tensors) -> None:
    del tensors[f"{LAYER}mlp.up_proj.biases"]


FAMILY = "model.language_model.layers.0."
FAULTS: dict[str, tuple[Change, tuple[str, str]]] = {
    "norm": (without_shift, ("values", f"{FAMILY}input_layernorm.weight")),
    "conv": (axes_lost, ("packing", CONV)),
    "code": (one_code, ("codes", f"{FAMILY}mlp.up_proj.weight")),
    "scale": (wide_scale, ("scales", f"{FAMILY}mlp.up_proj.weight")),
    "biases": (no_biases, ("packing", f"{FAMILY}mlp.up_proj.biases")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_tensors_is_found(fault: str, tiny: Path, tmp_path: Path) -> None:
    change, expected = FAULTS[fault]
    broken = edited(tiny, tmp_path / "broken", change)
    assert expected in found(check(broken, ASSET))


def test_a_lost_shift_is_named(tiny: Path, tmp_path: Path) -> None:
    findings = check(edited(tiny, tmp_path / "broken", without_shift), ASSET).findings
    assert "lack the 1 that MLX adds to norms" in findings[0].message


def promised(config: dict[str, Any]) -> None:
    config["text_config"]["mtp_num_hidden_layers"] = 1


def both(change: Callable[[dict[str, Any]], object], config: dict[str, Any]) -> None:
    change(config["quantization"])
    config["quantization_config"] = config["quantization"]


CONFIG_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, str]]] = {
    "router bits": (
        partial(both, lambda section: section.pop(f"{LAYER}mlp.gate")),
        ("quantization-config", f"{LAYER}mlp.gate"),
    ),
    "router not packed": (
        partial(both, lambda section: section.update({f"{LAYER}mlp.gate": False})),
        ("quantization-config", f"{LAYER}mlp.gate"),
    ),
    "norm packed": (
        partial(both, lambda section: section.update({f"{TEXT}norm": {"bits": 8}})),
        ("skip-list", f"{TEXT}norm"),
    ),
    "two sections": (
        lambda config: config.update(quantization_config={"bits": 8}),
        ("quantization-config", "config.json"),
    ),
    "no section": (
        lambda config: [config.pop(key) for key in ("quantization", "quantization_config")],
        ("quantization-config", "config.json"),
    ),
    "one section": (
        lambda config: config.pop("quantization"),
        ("quantization-config", "config.json"),
    ),
    "no format of most": (
        partial(both, lambda section: [section.pop(key) for key in ("group_size", "bits")]),
        ("quantization-config", "config.json"),
    ),
    "unknown setting": (
        partial(both, lambda section: section[f"{LAYER}mlp.gate"].update(quantize_input=True)),
        ("quantization-config", f"{LAYER}mlp.gate"),
    ),
    "code beside": (
        lambda config: config.update(model_file="model.py"),
        ("config", "config.json"),
    ),
    "inputs": (
        lambda config: config.update(quantize_activations=True),
        ("config", "config.json"),
    ),
    "strange section": (
        partial(both, lambda section: section.update(bits=[4], mode=None)),
        ("quantization-config", f"{LAYER}mlp.switch_mlp.up_proj"),
    ),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_fault_in_config_is_found(fault: str, experts: Path, tmp_path: Path) -> None:
    change, expected = CONFIG_FAULTS[fault]
    assert expected in found(check(edited(experts, tmp_path / "broken", None, change)))


@pytest.mark.parametrize("section", [{}, [1], "x", 0, True])
def test_a_section_of_any_type_is_found(section: object) -> None:
    findings = section_findings({"quantization": section, "quantization_config": None}, [])
    assert [one.check for one in findings] == ["quantization-config"]
    assert not [*section_findings({"quantization": None, "quantization_config": None}, [])]


@pytest.mark.parametrize("name", ["weights.00.safetensors", "model-1.safetensors"])
def test_mlx_lm_reads_files_by_their_names(name: str, tiny: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(tiny, tmp_path / "made"))
    (made / "qwen35.json").unlink()
    (made / "model.safetensors").rename(made / name)
    tensors = load_file(made / name)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": dict.fromkeys(tensors, name),
    }
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = {("files", name)} if name.startswith("weights") else set()
    assert found(check(made)) == expected
    save_file({NORM: tensors[NORM]}, made / "model-2.safetensors")
    assert found(check(made)) == expected | {("files", "model-2.safetensors")}


def test_promised_mtp_is_found(tiny: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
    config = read_config(broken)
    promised(config)
    (broken / "config.json").write_text(json.dumps(config))
    assert ("mtp", "config.json") in found(check(broken))


@pytest.mark.parametrize("value", [None, [], 3, "x", {"text_config": 3}, {"text_config": {}}])
def test_any_config_is_refused_by_name(value: object, tiny: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
    (broken / "config.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"config\.json"):
        open_folder(broken)


@pytest.mark.parametrize("name", ["language_model.model.mtp.fc.weight", "mtp.fc.weight"])
def test_mtp_of_other_tools_is_left_out_with_a_note(name: str, tiny: Path, tmp_path: Path) -> None:
    made = edited(tiny, tmp_path / "made", lambda t: t.update({name: torch.zeros(2, 2)}))
    plan = plan_of(made, "bf16")
    assert any("multi-token prediction are left out" in note for note in plan.notes)


def test_a_packed_norm_is_refused(tiny: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[NORM] = torch.zeros(32, dtype=torch.uint32)
        tensors[NORM.replace("weight", "scales")] = torch.zeros(4, dtype=torch.bfloat16)
        tensors[NORM.replace("weight", "biases")] = torch.zeros(4, dtype=torch.bfloat16)

    broken = edited(tiny, tmp_path / "broken", change)
    assert ("tensors", f"{FAMILY}input_layernorm.weight") in found(check(broken))
    with pytest.raises(TensorError, match="as MLX packs"):
        plan_of(broken, "bf16")


STRANGE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "1 bit": lambda codes: codes[:, :8],
    "no whole words": lambda codes: codes[:, :7],
    "another dtype": lambda codes: codes.view(torch.int32),
    "flat": lambda codes: codes.flatten(),
}


@pytest.mark.parametrize("what", STRANGE)
def test_codes_of_no_known_format_are_named(what: str, tiny: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        name = f"{LAYER}mlp.up_proj.weight"
        tensors[name] = STRANGE[what](tensors[name]).clone()

    broken = edited(tiny, tmp_path / "broken", change)
    assert found(check(broken)) == {("packing", f"{FAMILY}mlp.up_proj.weight")}
    with pytest.raises(TensorError, match=r"with scales BF16 .512, 4., expected a format of MLX"):
        plan_of(broken, "bf16")


def test_a_stack_of_other_experts_is_refused(experts: Path, tmp_path: Path) -> None:
    name = f"{LAYER}mlp.switch_mlp.up_proj.weight"
    broken = edited(experts, tmp_path / "broken", lambda t: t.update({name: t[name][:7]}))
    with pytest.raises(TensorError, match="a stack of shape .7, 256, 32., expected 8 experts"):
        plan_of(broken, "bf16")


# --- cards


def test_card_has_the_commands(tiny: Path, experts: Path) -> None:
    for made, vision in ((tiny, True), (experts, True)):
        manifest = json.loads((made / "qwen35.json").read_text())
        text = card_text(LocalFolder(made), manifest, "me/model")
        assert "library_name: mlx" in text
        assert "mlx_lm.generate --model me/model" in text
        assert ("mlx_vlm.generate" in text) is vision
        assert "transformers" not in text.partition("## Load it")[2].partition("## Prov")[0]
    assert "| `mlp.gate` | MLX-8bit | 4 |" in text


def test_a_recipe_may_mix_formats(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'format = "mlx-4bit"\nbase = "mlx-4bit"\n'
        '[[rules]]\nmatch = "self_attn"\naction = "mlx-6bit"\n'
        '[[rules]]\nmatch = "mlp.down_proj"\naction = "mlx-4bit-g32"\n'
        '[[rules]]\nmatch = "embed_tokens"\naction = "plain"\n'
    )
    recipe = read_recipe_file(path, load_recipe("nf4").container)
    qwen35.convert(ASSET, tmp_path / "out", recipe=str(path), threads=1)
    assert recipe.format == "mlx-4bit"
    assert check(tmp_path / "out", ASSET).findings == ()
    section = read_config(tmp_path / "out")["quantization"]
    assert section[f"{TEXT}layers.3.self_attn.q_proj"] == {"bits": 6, "group_size": 64}
    assert f"{TEXT}embed_tokens" not in section
