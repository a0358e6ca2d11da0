"""NVFP4, INT4 and FP8 per channel: what is written, decoded by formulas of its own, and faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import Tensors
from qwen35.checkpoint.source import open_folder, open_published
from qwen35.cli.main import main
from qwen35.codecs.compressed_tensors import SCHEMES, matcher
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.codecs.registry import CODECS
from qwen35.errors import UsageError
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.rules import Recipe, Rule
from qwen35.writing.write import write
from running import load_all, plan_of, read_config, statistics, tree
from verifying import agree, check, edit_config, found, rewrite

pytestmark = pytest.mark.sentences

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
LAYER = "model.language_model.layers"
GATE, UP, DOWN = (f"{LAYER}.1.mlp.{name}_proj" for name in ("gate", "up", "down"))
Capture = pytest.CaptureFixture[str]
KINDS = (
    *("nvfp4", "nvfp4-modelopt", "fp8-channel"),
    *("int4", "int4-g32", "int4-asym", "int4-g32-asym", "int4-gptq", "int4-g32-gptq"),
)


def recipe_of(kind: str) -> Recipe:
    """Return a recipe that packs the linear layers and experts of the text model as `kind`."""
    kept = ("visual", "mtp", "embed_tokens", "lm_head", "linear_attn.in_proj_a")
    rules = [Rule(name, "plain", "") for name in (*kept, "linear_attn.in_proj_b")]
    rules += [Rule("mlp.shared_expert_gate", "plain", "")]
    rules += [Rule(f"kind:{name}", kind, "") for name in ("experts", "linear")]
    container = load_recipe("nf4").container
    return Recipe(kind, kind, "", (*rules, Rule("*", "plain", "")), container)


def make(source: Path, out: Path, kind: str, threads: int = 1, **options: Any) -> Path:
    write(make_plan(open_folder(source), recipe_of(kind), **options), out, threads=threads)
    return out


@pytest.fixture(scope="module")
def made(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the dense model in a format, made once."""
    folder = tmp_path_factory.mktemp("made")

    def get(kind: str) -> Path:
        out = folder / kind
        return out if out.exists() else make(dense, out, kind)

    return get


@pytest.fixture(scope="module")
def experts(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(moe, tmp_path_factory.mktemp("experts") / "out", "nvfp4")


def nibbles(data: torch.Tensor, axis: int = -1) -> torch.Tensor:
    """Return the codes in bytes or words along an axis, the lowest bits first."""
    whole = data.movedim(axis, -1).contiguous().view(torch.uint8)
    codes = torch.stack([whole & 15, whole >> 4], dim=-1).flatten(-2)
    return codes.movedim(-1, axis).int()


def decoded(tensors: Tensors, module: str) -> torch.Tensor:
    """Decode a weight in float32, by the formulas of the libraries that read it."""
    part = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(module)}
    if "qweight" in part:
        q, zero = nibbles(part["qweight"], 0), nibbles(part["qzeros"]) + 1
        group = part["g_idx"].long()
        return ((q - zero[group]) * part["scales"].float()[group]).T
    if "weight_shape" in part:
        q = nibbles(part["weight_packed"]) - 8
        each = q.shape[1] // part["weight_scale"].shape[1]
        if "weight_zero_point" in part:
            q = q - (nibbles(part["weight_zero_point"], 0) - 8).repeat_interleave(each, 1)
        assert tuple(part["weight_shape"]) == q.shape
        return q * part["weight_scale"].float().repeat_interleave(each, 1)
    if "weight_scale_2" in part or "weight_global_scale" in part:
        name, whole = (
            ("weight", part["weight_scale_2"])
            if "weight_scale_2" in part
            else ("weight_packed", 1 / part["weight_global_scale"])
        )
        units = part["weight_scale"].float() * whole
        return E2M1[nibbles(part[name])] * units.repeat_interleave(16, 1)
    return part["weight"].float() * part["weight_scale"].float()


@pytest.mark.parametrize("kind", KINDS)
def test_our_decoding_is_that_of_the_formulas(
    kind: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    packed = load_all(made(kind))
    write(plan_of(made(kind), "bf16"), tmp_path / "plain", threads=1)
    plain = load_all(tmp_path / "plain")
    modules = [f"{LAYER}.{i}.mlp.{n}_proj" for i in range(4) for n in ("gate", "up", "down")]
    for module in [*modules, f"{LAYER}.3.self_attn.q_proj", f"{LAYER}.0.linear_attn.in_proj_qkv"]:
        assert f"{module}.weight" in plain
        expected = decoded(packed, module)
        torch.testing.assert_close(plain[f"{module}.weight"].float(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_depth_of_the_check_passes(
    kind: str, made: Callable[[str], Path], dense: Path
) -> None:
    verdict = check(made(kind), dense)
    assert verdict.findings == ()
    packed = [row for row in verdict.errors if row.squared]
    assert sum(row.count for row in packed) == 4 * 3 + 3 * 3 + 4
    assert all(0.01 < row.relative < 0.13 for row in packed)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_depend_on_neither_threads_nor_pieces(
    kind: str,
    made: Callable[[str], Path],
    dense: Path,
    tmp_path: Path,
    small_pieces: None,
) -> None:
    again = make(dense, tmp_path / "out", kind, threads=2)
    assert tree(again).keys() == tree(made(kind)).keys()
    assert tree(again)["model.safetensors"] == tree(made(kind))["model.safetensors"]


def test_both_layouts_of_nvfp4_hold_the_same_codes(made: Callable[[str], Path]) -> None:
    ours, theirs = load_all(made("nvfp4")), load_all(made("nvfp4-modelopt"))
    for module in (GATE, f"{LAYER}.3.self_attn.o_proj"):
        assert torch.equal(ours[f"{module}.weight_packed"], theirs[f"{module}.weight"])
        scales = (t[f"{module}.weight_scale"].view(torch.uint8) for t in (ours, theirs))
        assert torch.equal(*scales)
        whole = ours[f"{module}.weight_global_scale"] * theirs[f"{module}.weight_scale_2"]
        torch.testing.assert_close(whole, torch.ones(1))


def test_what_engines_fuse_has_one_scale_of_the_whole(
    made: Callable[[str], Path], dense: Path
) -> None:
    packed, plain = load_all(made("nvfp4")), load_all(dense)
    layers = f"{LAYER}.3.self_attn", f"{LAYER}.0.linear_attn"
    groups = (
        *([f"{layers[0]}.{n}_proj" for n in "qkv"], [f"{layers[0]}.o_proj"], [GATE, UP], [DOWN]),
        [f"{layers[1]}.in_proj_qkv", f"{layers[1]}.in_proj_z"],
    )
    for group in groups:
        largest = max(plain[f"{name}.weight"].float().abs().max() for name in group)
        for name in group:
            assert packed[f"{name}.weight_global_scale"].item() == 2688 / largest


def test_each_expert_has_its_gate_and_up_tied(experts: Path, moe: Path) -> None:
    packed, plain = load_all(experts), load_all(moe)
    stack = f"{LAYER}.1.mlp.experts"
    for i in range(4):
        whole = {
            name: packed[f"{stack}.{i}.{name}_proj.weight_global_scale"].item()
            for name in ("gate", "up", "down")
        }
        assert whole["gate"] == 2688 / plain[f"{stack}.gate_up_proj"][i].float().abs().max()
        assert whole["up"] == whole["gate"]
        assert whole["down"] == 2688 / plain[f"{stack}.down_proj"][i].float().abs().max()
    assert check(experts, moe).findings == ()


@pytest.mark.parametrize("mode", ["max", "search"])
def test_scales_are_those_of_the_mode(
    mode: Any, made: Callable[[str], Path], dense: Path, tmp_path: Path
) -> None:
    """`max` is compressed-tensors' formula; a search has less error, and is the default."""
    out = make(dense, tmp_path / "out", "nvfp4", scale_choice=ScaleChoice(mode))
    if mode == "search":
        assert tree(out)["model.safetensors"] == tree(made("nvfp4"))["model.safetensors"]
        return
    packed, plain = load_all(out), load_all(dense)[f"{DOWN}.weight"].float()
    peaks = plain.view(len(plain), -1, 16).abs().amax(-1)
    whole = packed[f"{DOWN}.weight_global_scale"]
    expected = (whole * (peaks / 6)).to(torch.float8_e4m3fn)
    scales = packed[f"{DOWN}.weight_scale"]
    assert torch.equal(scales.view(torch.uint8), expected.view(torch.uint8))
    error, least = (
        (decoded(load_all(folder), DOWN) - plain).square().sum() for folder in (out, made("nvfp4"))
    )
    assert least < 0.85 * error


def test_importance_moves_the_scales(dense: Path, tmp_path: Path) -> None:
    """Columns that matter alone are nearer than with equal weights."""
    from qwen35.codecs.fp8.arrays import e4m3_values
    from qwen35.codecs.nvfp4.arrays import decode_rows, encode_rows, whole_scale

    values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    weights = np.where(np.arange(64) % 4 == 0, 1, 1e-6).astype(np.float32)
    whole = whole_scale(float(np.abs(values).max()))
    errors = []
    for importance in (None, weights):
        codes, scales = encode_rows(values, "F32", whole, importance, search=True)
        found_values = decode_rows(codes, e4m3_values()[scales] / whole)
        errors.append(float((weights * (found_values - values) ** 2).sum()))
    assert errors[1] < 0.7 * errors[0]


# --- inputs quantized too


def make_with_inputs(source: Path, out: Path, recipe: str, layout: str) -> tuple[Path, Any]:
    """Convert with the statistics of random inputs; return the output and the statistics."""
    stats = statistics(source, out.parent)
    options = ["--activation-stats", str(stats), "--layout", layout, "--quiet"]
    asked = [] if recipe == "nvfp4-mixed" else ["--activations"]
    command = ["convert", str(source), str(out), "--recipe", recipe]
    assert main([*command, *options, *asked]) == 0
    return out, json.loads(stats.read_text())


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_scales_of_inputs_are_those_of_the_statistics(
    layout: str, dense: Path, tmp_path: Path, made: Callable[[str], Path]
) -> None:
    out, stats = make_with_inputs(dense, tmp_path / "out", "nvfp4", layout)
    tensors = load_all(out)
    largest = max(max(stats[f"{name}.weight"]["input_channel_max"]) for name in (GATE, UP))
    quantization = read_config(out)["quantization_config"]
    if layout == "modelopt":
        assert tensors[f"{UP}.input_scale"].item() == np.float32(largest) / np.float32(2688)
        assert quantization["quant_algo"] == "NVFP4"
    else:
        inverse = np.float32(1) / np.float32(largest)
        assert tensors[f"{UP}.input_global_scale"].item() == np.float32(2688) * inverse
        inputs = quantization["config_groups"]["group_0"]["input_activations"]
        assert (inputs["dynamic"], inputs["num_bits"]) == ("local", 4)
    assert check(out, dense).findings == ()


@pytest.mark.parametrize(
    ("kind", "missing", "words"),
    [
        ("nvfp4", "weight_scale", "weight_scale: missing"),
        ("nvfp4", "weight_global_scale", "weight_scale: F8_E4M3 data without the tensors"),
        ("nvfp4-modelopt", "weight_scale", "weight_scale: missing"),
        ("int4", "weight_shape", "weight_packed: no part of a weight of compressed-tensors"),
        ("int4-gptq", "qzeros", "qzeros: missing"),
        ("fp8-channel", "weight_scale", "weight: F8_E4M3 data without"),
    ],
)
def test_a_missing_part_names_its_weight(
    kind: str,
    missing: str,
    words: str,
    made: Callable[[str], Path],
    tmp_path: Path,
    capsys: Capture,
) -> None:
    broken = Path(shutil.copytree(made(kind), tmp_path / "broken"))
    rewrite(broken, lambda tensors: tensors.pop(f"{DOWN}.{missing}"))
    assert main(["convert", str(broken), str(tmp_path / "out"), "--recipe", "bf16"]) == 2
    assert f"{DOWN}.{words}" in capsys.readouterr().err


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_of_inputs_that_is_no_scale(value: float, dense: Path, tmp_path: Path) -> None:
    out, _ = make_with_inputs(dense, tmp_path / "out", "nvfp4", "compressed-tensors")
    name = f"{UP}.input_global_scale"
    rewrite(out, lambda tensors: tensors[name].fill_(value))
    assert ("scales", name) in found(check(out, dense))


def test_a_list_of_each_expert_takes_no_square_of_them() -> None:
    """In config.json of others, whose ignore names every module."""
    names = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(30_000)]
    listed = matcher(names)
    assert all(map(listed, names))
    assert not listed("model.layers.0.mlp.experts.0.down_proj")


def test_plans_need_no_statistics(capsys: Capture) -> None:
    """Their values do not change a byte count."""
    for flags in (["nvfp4-mixed", "--layout", "modelopt"], ["nvfp4", "--activations"]):
        assert main(["plan", "Qwen3.5-0.8B", "--recipe", *flags]) == 0
        assert "stores scales of its layers' inputs" in capsys.readouterr().out


def test_plan_of_scales_that_nothing_chooses_names_no_choice(capsys: Capture) -> None:
    flags = ["--recipe", "fp8-channel", "--layout", "modelopt"]
    assert main(["plan", "Qwen3.5-0.8B", *flags]) == 0
    assert "scales: " not in capsys.readouterr().out


def test_inputs_take_statistics(dense: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["convert", str(dense), str(tmp_path / "out"), "--recipe", "nvfp4", "--activations"]
    assert main(command) == 2
    assert "give them: --activation-stats FILE" in capsys.readouterr().err
    stats = statistics(dense, tmp_path)
    table = json.loads(stats.read_text())
    del table[f"{DOWN}.weight"]
    stats.write_text(json.dumps(table))
    assert main([*command, "--activation-stats", str(stats)]) == 2
    assert f"no inputs of {DOWN}.weight" in capsys.readouterr().err
    mixed = ["convert", str(dense), str(tmp_path / "out"), "--recipe", "nvfp4-mixed"]
    assert main([*mixed, "--layout", "modelopt"]) == 2  # its FP8 has one, whatever is asked for
    assert "give them: --activation-stats FILE" in capsys.readouterr().err
    assert main(["convert", str(dense), str(tmp_path / "o"), "--activations"]) == 2
    assert "NF4 has no form with inputs quantized" in capsys.readouterr().err


def test_mixed_precision_of_modelopt(dense: Path, tmp_path: Path) -> None:
    out, stats = make_with_inputs(dense, tmp_path / "out", "nvfp4-mixed", "modelopt")
    tensors, plain = load_all(out), load_all(dense)
    quantization = read_config(out)["quantization_config"]
    assert quantization["quant_algo"] == "MIXED_PRECISION"
    layers = quantization["quantized_layers"]
    assert layers[DOWN] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    names = [f"{LAYER}.3.self_attn.{name}_proj" for name in "qkv"]
    largest = max(plain[f"{name}.weight"].float().abs().max() for name in names)
    for name in names:
        assert layers[name] == {"quant_algo": "FP8"}
        assert tensors[f"{name}.weight_scale"].item() == largest / 448
        peaks = [max(stats[f"{other}.weight"]["input_channel_max"]) for other in names]
        assert tensors[f"{name}.input_scale"].item() == np.float32(max(peaks)) / np.float32(448)
        decoded_here = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
        exact = plain[f"{name}.weight"].float()
        assert (decoded_here - exact).norm() < 0.03 * exact.norm()
    assert check(out, dense).findings == ()
    as_theirs = Path(shutil.copytree(out, tmp_path / "as theirs"))
    short = ["mtp*", "mtp.layers.0*"]  # quantized_layers says what is packed
    edit_config(as_theirs, lambda c: c["quantization_config"].update(ignore=short))
    assert found(check(agree(as_theirs))) == set()
    broken = Path(shutil.copytree(out, tmp_path / "broken"))
    edit_config(broken, lambda c: c["quantization_config"]["quantized_layers"].pop(DOWN))
    assert found(check(agree(broken))) == {("quantization-config", DOWN)}


@pytest.mark.parametrize(
    ("size", "recipe", "fp8", "nvfp4"),
    [
        ("Qwen3.6-27B", "nvfp4-mixed", 208, 193),
        ("Qwen3.6-35B-A3B", "nvfp4-mixed", 130, 161),
        ("Qwen3.5-122B-A10B", "nvfp4-experts", 0, 48),
    ],
)
def test_published_recipes_pack_the_modules_that_nvidia_packs(
    size: str, recipe: str, fp8: int, nvfp4: int
) -> None:
    """The counts of ``quantized_layers``, and of layers with routed experts, of its config.json."""
    packed = {
        step.module.partition(".experts.")[0]: step.packing
        for step in make_plan(open_published(size), load_recipe(recipe)).steps
        if step.packing
    }
    assert [list(packed.values()).count(kind) for kind in ("fp8-channel", "nvfp4")] == [fp8, nvfp4]


# --- what loaders are told


def test_config_of_compressed_tensors(made: Callable[[str], Path], experts: Path) -> None:
    quantization = read_config(made("nvfp4"))["quantization_config"]
    assert quantization["format"] == "nvfp4-pack-quantized"
    assert quantization["config_groups"]["group_0"]["targets"] == ["Linear"]
    kept = [r"re:.*\.linear_attn\.in_proj_a$", r"re:.*\.linear_attn\.in_proj_b$"]
    assert quantization["ignore"] == ["lm_head", "re:.*visual.*", "re:.*mtp.*", *kept]
    gates = [r"re:.*\.mlp\.gate$", r"re:.*\.mlp\.shared_expert_gate$"]
    assert read_config(experts)["quantization_config"]["ignore"][3:] == [*kept, *gates]


def test_config_of_modelopt(made: Callable[[str], Path]) -> None:
    quantization = read_config(made("nvfp4-modelopt"))["quantization_config"]
    assert quantization["quant_method"] == "modelopt"
    assert quantization["quant_algo"] == "W4A16_NVFP4"
    assert quantization["ignore"][:3] == ["lm_head", "model.visual*", "mtp*"]
    beside = json.loads((made("nvfp4-modelopt") / "hf_quant_config.json").read_text())
    assert beside["quantization"]["exclude_modules"] == quantization["ignore"]


def test_config_of_gptq(made: Callable[[str], Path]) -> None:
    quantization = read_config(made("int4-gptq"))["quantization_config"]
    assert (quantization["bits"], quantization["group_size"], quantization["sym"]) == (4, 128, True)
    assert list(quantization["dynamic"])[:2] == ["-:.*visual.*", "-:.*mtp.*"]


def test_scales_of_inputs_are_read_whatever_the_mode(dense: Path, tmp_path: Path) -> None:
    """`max` leaves statistics unread; the FP8 of ModelOpt needs them all the same."""
    flags = ["--recipe", "nvfp4-mixed", "--layout", "modelopt", "--calib-mode", "max"]
    given = ["--activation-stats", str(statistics(dense, tmp_path))]
    assert main(["convert", str(dense), str(tmp_path / "out"), *flags, *given, "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("size", "packed", "patterns"),
    [
        ("Qwen3.5-27B", 192, [".*visual.*", ".*mtp.*", ".*attn.*"]),
        (
            "Qwen3.5-35B-A3B",
            40 * 256 * 3,
            [".*visual.*", ".*mtp.*", ".*attn.*", ".*shared_expert.*", r".*\.mlp\.gate$"],
        ),
    ],
)
def test_layout_of_gptq_packs_what_the_official_checkpoints_pack(
    size: str, packed: int, patterns: list[str]
) -> None:
    """MLP and routed experts: 192 modules of Qwen/Qwen3.5-27B-GPTQ-Int4."""
    plan = make_plan(open_published(size), load_recipe("int4", layout="gptq"))
    assert plan.container.packed_json(plan) == {"int4-gptq": packed}
    quantization = json.loads(plan.documents["config.json"])["quantization_config"]
    assert quantization["dynamic"] == {f"-:{pattern}": {} for pattern in patterns}


def test_one_artifact_of_several_precisions(dense: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.toml"
    recipe.write_text(
        'format = "nvfp4"\nbase = "nvfp4"\n[[rules]]\nmatch = "self_attn"\naction = "fp8-channel"\n'
    )
    write(plan_of(dense, str(recipe)), tmp_path / "out", threads=1)
    quantization = read_config(tmp_path / "out")["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    targets = [group["targets"] for group in quantization["config_groups"].values()]
    assert targets[0] == [rf"re:.*\.mlp\.{name}_proj$" for name in ("down", "gate", "up")]
    assert targets[1] == [rf"re:.*\.self_attn\.{n}_proj$" for n in "koqv"]
    assert check(tmp_path / "out", dense).findings == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "nf4", "--layout", "modelopt"], "NF4 has only one; leave it out"),
        (["--recipe", "text", "--layout", "modelopt"], "this recipe packs nothing"),
        (["--recipe", "int4", "--layout", "modelopt"], "INT4 has no such layout"),
        (["--recipe", "nvfp4", "--calib-mode", "rms"], "NVFP4 has no mode rms"),
    ],
)
def test_refusals(
    arguments: list[str],
    words: str,
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["convert", str(dense), str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_groups_of_two_sizes_are_no_config_of_gptq(dense: Path) -> None:
    recipe = recipe_of("int4-gptq")
    mixed = recipe.preceded([Rule("self_attn", "int4-g32-gptq", "")])
    with pytest.raises(UsageError, match="would leave groups of 32 and 128 in one checkpoint"):
        make_plan(open_folder(dense), mixed)


def test_methods_do_not_mix(dense: Path) -> None:
    container = load_recipe("nf4").container
    with pytest.raises(UsageError, match="packs as NF4"):
        container.action("mine.toml", "rule 1", "nf4", "nvfp4")


# --- faults


def swap_nibbles(tensors: Tensors) -> None:
    codes = tensors[f"{DOWN}.weight_packed"]
    if codes.dtype == torch.uint8:
        tensors[f"{DOWN}.weight_packed"] = codes >> 4 | codes << 4
    else:
        both = codes.view(torch.uint8)
        tensors[f"{DOWN}.weight_packed"] = (both >> 4 | both << 4).view(torch.int32)


def invert(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = 1 / tensors[name]

    return change


def untie(tensors: Tensors) -> None:
    """Encode the smaller of two partners by itself, as a tool that does not tie them would."""
    gate, up = (f"{name}.weight_global_scale" for name in (GATE, UP))
    tensors[up] = tensors[gate] * 1.25


FAULTS: dict[str, tuple[str, Callable[[Tensors], object], str, str]] = {
    "nibbles swapped": ("nvfp4", swap_nibbles, "codes", DOWN),
    "direction inverted": ("nvfp4", invert(f"{DOWN}.weight_global_scale"), "scales", DOWN),
    "direction inverted, ModelOpt": (
        "nvfp4-modelopt",
        invert(f"{DOWN}.weight_scale_2"),
        "scales",
        DOWN,
    ),
    "a partner's scale changed": ("nvfp4", untie, "scales", UP),
    "INT4 nibbles swapped": ("int4", swap_nibbles, "codes", DOWN),
    "INT4 scale halved": (
        "int4",
        lambda t: t[f"{DOWN}.weight_scale"].mul_(0.4),
        "scales",
        DOWN,
    ),
    "zero point off": (
        "int4-asym",
        lambda t: t[f"{DOWN}.weight_zero_point"].view(torch.uint8).sub_(1),
        "codes",
        DOWN,
    ),
    "GPTQ zero points of version 2": (
        "int4-gptq",
        lambda t: t[f"{DOWN}.qzeros"].fill_(-0x77777778),
        "codes",
        DOWN,
    ),
    "a channel's scale doubled": (
        "fp8-channel",
        lambda t: t[f"{DOWN}.weight_scale"][3].mul_(2),
        "codes",
        DOWN,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(
    name: str, made: Callable[[str], Path], dense: Path, tmp_path: Path
) -> None:
    kind, change, expected, module = FAULTS[name]
    broken = Path(shutil.copytree(made(kind), tmp_path / "broken"))
    rewrite(broken, change)
    assert (expected, f"{module}.weight") in found(check(broken, dense))


def test_untied_experts_are_named_without_a_source(experts: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(experts, tmp_path / "broken"))
    name = f"{LAYER}.2.mlp.experts.1.up_proj"
    rewrite(broken, lambda t: t[f"{name}.weight_global_scale"].mul_(1.5))
    assert found(check(broken, depth="numbers")) == {("scales", f"{name}.weight")}


def drop(entry: str) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"]["ignore"].remove(entry)


def section(**keys: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"].update(keys)


def group_of(**keys: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"]["config_groups"]["group_0"].update(keys)


CONFIG, PACKING = ("quantization-config", "config.json"), ("packing", "config.json")
CONFIG_FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str, str]] = {
    "head": ("nvfp4", drop("lm_head"), "skip-list", "lm_head"),
    "tower": ("nvfp4", drop("re:.*visual.*"), "skip-list", "model.visual.blocks.0.attn.proj"),
    "one role": (
        "int4",
        drop(r"re:.*\.linear_attn\.in_proj_a$"),
        "skip-list",
        f"{LAYER}.0.linear_attn.in_proj_a",
    ),
    "packed, but ignored": (
        "nvfp4",
        lambda c: c["quantization_config"]["ignore"].append("re:.*down_proj"),
        "skip-list",
        DOWN,
    ),
    "another group size": (
        "int4",
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(
            group_size=64
        ),
        "quantization-config",
        "config.json",
    ),
    "inputs that the tensors have no scale of": (
        "nvfp4",
        group_of(input_activations=dict(SCHEMES["nvfp4-a4"].inputs or {})),
        *CONFIG,
    ),
    "inputs of INT4": ("int4", group_of(input_activations={"num_bits": 8}), *CONFIG),
    "inputs of a stored scale": (
        "fp8-channel",
        group_of(input_activations={"num_bits": 8, "type": "float", "strategy": "tensor"}),
        *CONFIG,
    ),
    "inputs that are no table": ("fp8-channel", group_of(input_activations=True), *CONFIG),
    "format of a group": ("nvfp4", group_of(format="pack-quantized"), *CONFIG),
    "format of all": ("nvfp4", section(format="pack-quantized"), *CONFIG),
    "format of none": ("nvfp4", section(format=[1]), *CONFIG),
    "a transform": ("nvfp4", section(transform_config={"config_groups": {"R1": {}}}), *PACKING),
    "sparsity": ("int4", section(sparsity_config={"format": "sparse-24-bitmask"}), *PACKING),
    "GPTQ, head": ("int4-gptq", section(lm_head=True), *CONFIG),
    "GPTQ, modules": (
        "int4-gptq",
        section(modules_in_block_to_quantize=[["x"]]),
        "skip-list",
        DOWN,
    ),
    "GPTQ, no modules": (
        "int4-gptq",
        section(modules_in_block_to_quantize=[1]),
        "skip-list",
        "config.json",
    ),
    "ModelOpt, group": ("nvfp4-modelopt", group_of(weights={"num_bits": 4}), *CONFIG),
    "ModelOpt, no groups": ("nvfp4-modelopt", section(config_groups=[1]), *CONFIG),
    "ModelOpt, tower": (
        "nvfp4-modelopt",
        drop("model.visual*"),
        "skip-list",
        "model.visual.blocks.0.attn.proj",
    ),
    "GPTQ, tower": (
        "int4-gptq",
        lambda c: c["quantization_config"]["dynamic"].pop("-:.*visual.*"),
        "skip-list",
        "model.visual.blocks.0.attn.proj",
    ),
}


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_a_fault_of_the_config_is_named(
    name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    kind, change, expected, subject = CONFIG_FAULTS[name]
    broken = Path(shutil.copytree(made(kind), tmp_path / "broken"))
    edit_config(broken, change)
    assert (expected, subject) in found(check(broken))


FINE: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "no inputs": ("fp8-channel", group_of(input_activations=None)),
    "format only of all": ("nvfp4", group_of(format=None)),
    "format only of groups": ("nvfp4", section(format=None)),
    "arguments that are not given": (
        "fp8-channel",
        group_of(weights={"num_bits": 8, "type": "float", "strategy": "channel"}),
    ),
    "neither transforms nor sparsity": (
        "nvfp4",
        section(transform_config={"config_groups": {}}, sparsity_config={}),
    ),
    "sparse, but stored whole": ("nvfp4", section(sparsity_config={"format": "dense"})),
    "GPTQ, modules": (
        "int4-gptq",
        section(modules_in_block_to_quantize=[["mlp.", "self_attn", "linear_attn."]]),
    ),
    "ModelOpt, inputs as in NVIDIA's Qwen3.6-35B-A3B-NVFP4": (
        "nvfp4-modelopt",
        group_of(input_activations={"num_bits": 4, "type": "float", "group_size": 16}),
    ),
}


@pytest.mark.parametrize("name", FINE)
def test_what_published_files_may_say_is_fine(
    name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    kind, change = FINE[name]
    copy = Path(shutil.copytree(made(kind), tmp_path / "copy"))
    edit_config(copy, change)
    assert check(copy).findings == ()


DOCUMENTS: dict[str, tuple[str, str]] = {
    "missing": ("", "is missing"),
    "no JSON": ("{", "not valid JSON"),
    "no table": ("[]", "no table of the name quantization"),
    "algorithm": ('{"quant_algo": "FP8"}', "quant_algo is not that of config.json"),
    "layers": ('{"quantized_layers": {"x": {}}}', "quantized_layers is not that"),
    "modules": ('{"exclude_modules": [{}]}', "exclude_modules is not that of config.json"),
    "cache": ('{"kv_cache_quant_algo": ["INT8"]}', "is ['INT8'], expected null or FP8"),
    "group": ('{"group_size": 32}', "group_size is 32, expected 16"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_hf_quant_config_says_what_config_json_says(
    name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    text, message = DOCUMENTS[name]
    broken = Path(shutil.copytree(made("nvfp4-modelopt"), tmp_path / "broken"))
    (broken / "qwen35.json").unlink()
    path = broken / "hf_quant_config.json"
    document = json.loads(path.read_text())
    if len(text) > 2:
        document["quantization"] |= json.loads(text)
        path.write_text(json.dumps(document))
    elif text:
        path.write_text(text)
    else:
        path.unlink()
    (finding,) = check(broken).findings
    assert (finding.check, finding.subject) == ("quantization-config", "hf_quant_config.json")
    assert message in finding.message


def test_mtp_by_single_names_is_a_finding(made: Callable[[str], Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(made("nvfp4"), tmp_path / "broken"))
    names = [n.removesuffix(".weight") for n in load_all(broken) if n.startswith("mtp.")]

    def change(config: dict[str, Any]) -> None:
        ignore = config["quantization_config"]["ignore"]
        ignore.remove("re:.*mtp.*")
        ignore += names

    edit_config(broken, change)
    assert found(check(broken)) == {("skip-list", "mtp")}


@pytest.mark.parametrize(
    ("kind", "key"), [("int4", "ignore"), ("nvfp4-modelopt", "ignore"), ("int4-gptq", "dynamic")]
)
def test_very_many_patterns_are_one_finding(
    kind: str, key: str, made: Callable[[str], Path]
) -> None:
    from qwen35.verification.opening import open_artifact

    subject: Any = open_artifact(str(made(kind)))
    many = [f"{start}{i}.*y.*z*" for i in range(100_000) for start in ("re:x", "-:x")]
    settings = {**read_config(made(kind))["quantization_config"]}
    settings[key] = dict.fromkeys(many) if key == "dynamic" else many
    (finding,) = CODECS[kind].config_findings(settings, subject.items, vision=True)
    assert "patterns, expected 2048 at most" in finding.message


def settings() -> Iterator[tuple[str, Any]]:
    values: list[Any] = [None, 1, "x", [], {}, [1], {"a": 1}, [{}], True]
    for value in values:
        for key in ("ignore", "config_groups", "quant_algo", "dynamic", "bits"):
            yield key, value


@pytest.mark.parametrize("kind", ["nvfp4", "nvfp4-modelopt", "int4-gptq"])
def test_settings_of_any_type_are_findings_or_fine(
    kind: str, made: Callable[[str], Path], dense: Path
) -> None:
    from qwen35.verification.opening import open_artifact

    subject: Any = open_artifact(str(made(kind)))
    whole = read_config(made(kind))["quantization_config"]
    for key, value in settings():
        list(CODECS[kind].config_findings({**whole, key: value}, subject.items, vision=True))


# --- kernels


@pytest.mark.parametrize("search", [False, True])
def test_kernels_give_the_same_whatever_is_encoded_beside(search: bool) -> None:
    """Tiles of 16 blocks, full or not, of bfloat16 or of the same values in float32."""
    from qwen35.codecs.int4.arrays import packed, quantize_rows
    from qwen35.codecs.nvfp4.arrays import encode_rows, whole_scale

    generator = np.random.default_rng(0)
    wide = generator.standard_normal((17, 96), np.float32).view(np.uint32)
    halves = (wide >> np.uint32(16)).astype(np.uint16)
    exact = (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    whole, weights = whole_scale(float(np.abs(exact).max())), generator.random(96, np.float32)

    def nvfp4(values: np.ndarray[Any, Any], dtype: str) -> bytes:
        codes, scales = encode_rows(values, dtype, whole, weights, search=search)
        return b"".join(a.tobytes() + b.tobytes() for a, b in zip(codes, scales, strict=True))

    def int4(values: np.ndarray[Any, Any], dtype: str) -> bytes:
        rows = quantize_rows(values, dtype, 32, "BF16", weights, symmetric=False, search=search)
        parts = zip(packed(rows.codes), rows.scales, rows.zeros, strict=True)
        return b"".join(part.tobytes() for row in parts for part in row)

    for encode in (nvfp4, int4):
        together = encode(halves, "BF16")
        assert together == b"".join(encode(row[None], "BF16") for row in halves)
        assert together == encode(exact, "F32")
