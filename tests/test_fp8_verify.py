"""The verifier on FP8 artifacts: silent on good ones, and every planted fault is named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import Tensors, make_checkpoint, random_tensors, tiny_config, write_checkpoint
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.open import fetch
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import UsageError
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import Verdict, verify
from qwen35.writing.write import write
from running import load_all, plan_of, read_config, run

pytestmark = pytest.mark.sentences

TEXT = "model.language_model"
LAYER = f"{TEXT}.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
UP = f"{LAYER}.1.mlp.up_proj.weight"
V = f"{LAYER}.3.self_attn.v_proj.weight"
DOWN = "mtp.layers.0.mlp.down_proj.weight"
EXPERT = f"{LAYER}.2.mlp.experts.1.up_proj.weight"


def check(artifact: Path, source: Path | None = None, **more: Any) -> Verdict:
    opened = open_artifact(str(artifact))
    if source is None:
        return verify(opened, **more)
    return verify(opened, source=fetch(str(source)), depth="numbers", threads=1, **more)


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(dense, tmp_path_factory.mktemp("packed") / "fp8", "fp8").out


@pytest.fixture(scope="module")
def packed_moe(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(moe, tmp_path_factory.mktemp("packed") / "moe", "fp8").out


def edited(
    artifact: Path,
    folder: Path,
    change: Callable[[Tensors], object] | None = None,
    config: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """Return a copy of an artifact with something wrong, without its manifest."""
    copy = Path(shutil.copytree(artifact, folder))
    (copy / "qwen35.json").unlink()
    if change is not None:
        tensors = load_all(copy)
        change(tensors)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            copy / "model.safetensors",
            metadata={"format": "pt"},
        )
    if config is not None:
        parsed = read_config(copy)
        config(parsed)
        (copy / "config.json").write_text(json.dumps(parsed))
    return copy


def found(verdict: Verdict) -> set[tuple[str, str]]:
    return {(f.check, f.subject) for f in verdict.findings}


# --- good artifacts


@pytest.mark.parametrize("recipe", ["fp8", "fp8-conservative", "text-fp8", "text-fp8-conservative"])
@pytest.mark.parametrize("source", ["dense", "moe", "moe_per_expert"])
def test_good_artifacts_pass_at_every_depth(
    recipe: str, source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(source)
    out = run(folder, tmp_path / "out", recipe).out
    for verdict in (check(out), check(out, folder), check(out, tensor_parallel=1)):
        assert verdict.findings == ()
        assert verdict.kind == "fp8"
    (out / "qwen35.json").unlink()
    assert check(out).findings == ()


@pytest.mark.parametrize(
    "scale_choice",
    [
        ScaleChoice("max"),
        ScaleChoice("rms"),
        ScaleChoice("percentile"),
        ScaleChoice("mse", grid_size=5),
    ],
    ids=str,
)
def test_every_mode_passes_on_bell_shaped_weights(
    scale_choice: ScaleChoice, dense: Path, tmp_path: Path
) -> None:
    plan = make_plan(open_folder(dense), load_recipe("fp8"), scale_choice=scale_choice)
    assert check(write(plan, tmp_path / "out").out, dense).findings == ()


@pytest.mark.parametrize("keep", [("mlp",), ("self_attn.o_proj", "mtp"), ("linear_attn",)])
def test_kept_roles_pass(keep: tuple[str, ...], dense: Path, tmp_path: Path) -> None:
    out = write(plan_of(dense, "fp8", keep=keep), tmp_path / "out").out
    assert check(out, dense).findings == ()


@pytest.mark.parametrize("source", ["moe", "moe_per_expert"])
def test_kept_experts_pass(source: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(source)
    keep = ("mlp.experts", "mtp.layers.mlp.experts")
    out = write(plan_of(folder, "fp8", keep=keep), tmp_path / "out").out
    assert check(out, folder).findings == ()


def test_a_text_only_source_and_other_float_formats_pass(tmp_path: Path) -> None:
    for number, options in enumerate(
        ({"text_only": True, "tied": False}, {"dtype": "float16"}, {"mtp": 0})
    ):
        source = make_checkpoint(tmp_path / f"in{number}", **options)  # type: ignore[arg-type]
        out = run(source, tmp_path / f"out{number}", "fp8").out
        assert check(out, source).findings == ()


def test_weights_that_tiles_do_not_fit_pass(tmp_path: Path) -> None:
    config = tiny_config()
    config["text_config"]["intermediate_size"] = 192
    source = write_checkpoint(tmp_path / "in", config, random_tensors(config))
    assert check(run(source, tmp_path / "out", "fp8").out, source).findings == ()


def test_the_official_config_without_fmt_passes(packed: Path, tmp_path: Path) -> None:
    def without(config: dict[str, Any]) -> None:
        del config["quantization_config"]["fmt"]

    assert check(edited(packed, tmp_path / "copy", config=without)).findings == ()


def test_what_other_tools_write_passes(dense: Path, tmp_path: Path) -> None:
    """F32 scales, and bf16 ones that were rounded after the codes were made."""
    source = load_all(dense)
    config = read_config(run(dense, tmp_path / "ours", "fp8").out)
    ours = load_all(tmp_path / "ours")
    for scale_dtype in (torch.float32, torch.bfloat16):
        tensors = dict(source)
        for name in source:
            if f"{name}_scale_inv" not in ours:
                continue
            rows, columns = (size // 128 for size in source[name].shape)
            weight = source[name].float().reshape(rows, 128, columns, 128)
            scale = weight.abs().amax((1, 3)) / 448
            codes = weight / scale[:, None, :, None]
            tensors[name] = codes.reshape(source[name].shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.to(scale_dtype)
        other = write_checkpoint(tmp_path / str(scale_dtype), config, tensors)
        assert check(other, dense).findings == ()


# --- scales


def drop(*names: str) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return apply


def set_scale(name: str, value: float) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[f"{name}_scale_inv"][0, -1] = value

    return apply


def reshape_scale(*shape: int) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[f"{QKV}_scale_inv"] = torch.ones(shape, dtype=torch.bfloat16)

    return apply


def rename(tensors: Tensors) -> None:
    tensors[f"{QKV.removesuffix('.weight')}.weight_scale"] = tensors.pop(f"{QKV}_scale_inv")


def integer_scale(tensors: Tensors) -> None:
    tensors[f"{QKV}_scale_inv"] = torch.ones(4, 2, dtype=torch.int32)


SCALES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "scale without its weight": (drop(QKV), f"{QKV}_scale_inv"),
    "weight without its scale": (drop(f"{QKV}_scale_inv"), QKV),
    "weight of the MTP layer without its scale": (drop(f"{DOWN}_scale_inv"), DOWN),
    "a row of scales too few": (reshape_scale(3, 2), f"{QKV}_scale_inv"),
    "transposed shape": (reshape_scale(2, 4), f"{QKV}_scale_inv"),
    "one scale for all": (reshape_scale(1), f"{QKV}_scale_inv"),
    "a scalar": (reshape_scale(1, 1), f"{QKV}_scale_inv"),
    "a scale for each row": (reshape_scale(512, 2), f"{QKV}_scale_inv"),
    "scale under another name": (rename, QKV),
    "scale of integers": (integer_scale, f"{QKV}_scale_inv"),
}


@pytest.mark.parametrize("fault", SCALES)
def test_scales_that_do_not_fit_are_named_from_headers_alone(
    fault: str, packed: Path, tmp_path: Path
) -> None:
    change, subject = SCALES[fault]
    verdict = check(edited(packed, tmp_path / "broken", change))
    assert subject in {f.subject for f in verdict.findings}


@pytest.mark.parametrize("name", [QKV, V, DOWN])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -0.0, -1e-4])
@pytest.mark.parametrize("with_source", [True, False])
def test_a_scale_that_is_no_scale_is_named(
    with_source: bool, bad: float, name: str, packed: Path, dense: Path, tmp_path: Path
) -> None:
    broken = edited(packed, tmp_path / "broken", set_scale(name, bad))
    opened = open_artifact(str(broken))
    source = fetch(str(dense)) if with_source else None
    verdict = verify(opened, source=source, depth="numbers")
    assert [f.subject for f in verdict.findings] == [f"{name}_scale_inv"]
    assert "not finite or not positive" in verdict.findings[0].message


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("with_source", [True, False])
def test_nan_codes_are_named(
    with_source: bool, code: int, packed: Path, dense: Path, tmp_path: Path
) -> None:
    def plant(tensors: Tensors) -> None:
        tensors[UP].view(torch.uint8)[300, 5] = code

    broken = edited(packed, tmp_path / "broken", plant)
    verdict = verify(
        open_artifact(str(broken)),
        source=fetch(str(dense)) if with_source else None,
        depth="numbers",
    )
    assert [f.subject for f in verdict.findings] == [UP]


def test_wrong_scales_and_codes_are_found_beside_the_source(
    packed: Path, dense: Path, tmp_path: Path
) -> None:
    def double(tensors: Tensors) -> None:
        tensors[f"{UP}_scale_inv"][2, 1] *= 2

    verdict = check(edited(packed, tmp_path / "broken", double), dense)
    assert found(verdict) == {("codes", UP)}


def test_an_expert_in_anothers_place_is_found(packed_moe: Path, moe: Path, tmp_path: Path) -> None:
    def swap(tensors: Tensors) -> None:
        other = EXPERT.replace("experts.1", "experts.2")
        for suffix in ("", "_scale_inv"):
            one, two = EXPERT + suffix, other + suffix
            tensors[one], tensors[two] = tensors[two], tensors[one]

    verdict = check(edited(packed_moe, tmp_path / "broken", swap), moe)
    assert found(verdict) == {
        ("codes", EXPERT),
        ("codes", EXPERT.replace("experts.1", "experts.2")),
    }


def test_gate_and_up_exchanged_are_found(packed_moe: Path, moe: Path, tmp_path: Path) -> None:
    def swap(tensors: Tensors) -> None:
        other = EXPERT.replace("up_proj", "gate_proj")
        for suffix in ("", "_scale_inv"):
            one, two = EXPERT + suffix, other + suffix
            tensors[one], tensors[two] = tensors[two], tensors[one]

    verdict = check(edited(packed_moe, tmp_path / "broken", swap), moe)
    assert len(verdict.findings) == 2


def test_a_missing_expert_is_named(packed_moe: Path, tmp_path: Path) -> None:
    broken = edited(packed_moe, tmp_path / "broken", drop(EXPERT, f"{EXPERT}_scale_inv"))
    assert EXPERT in {f.subject for f in check(broken).findings}


# --- fused groups


def unpack(*names: str, original: Path) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        source = load_all(original)
        for name in names:
            tensors[name] = source[name]
            del tensors[f"{name}_scale_inv"]

    return apply


def listing(*modules: str) -> Callable[[dict[str, Any]], None]:
    def apply(config: dict[str, Any]) -> None:
        config["quantization_config"]["modules_to_not_convert"] += modules

    return apply


@pytest.mark.parametrize(
    ("name", "group"),
    [
        (V, "self_attn.qkv_proj"),
        (f"{LAYER}.3.self_attn.q_proj.weight", "self_attn.qkv_proj"),
        (UP, "mlp.gate_up_proj"),
        (QKV, "linear_attn.in_proj_qkvz"),
        (f"{LAYER}.1.linear_attn.in_proj_z.weight", "linear_attn.in_proj_qkvz"),
        ("mtp.layers.0.self_attn.k_proj.weight", "self_attn.qkv_proj"),
        ("mtp.layers.0.mlp.gate_proj.weight", "mlp.gate_up_proj"),
    ],
)
def test_half_a_fused_group_is_named_though_listed_correctly(
    name: str, group: str, packed: Path, dense: Path, tmp_path: Path
) -> None:
    """vLLM: "Detected some but not all shards of ... are quantized"."""
    broken = edited(
        packed,
        tmp_path / "broken",
        unpack(name, original=dense),
        listing(name.removesuffix(".weight")),
    )
    findings = check(broken).findings
    assert [f.check for f in findings] == ["fused-group"]
    assert findings[0].subject != name  # it is plain: what is packed is wrong
    assert findings[0].message == f"packed, but not {name}: engines load both as {group}"


def test_experts_packed_by_half_are_named(
    packed_moe: Path, moe_per_expert: Path, tmp_path: Path
) -> None:
    broken = edited(packed_moe, tmp_path / "broken", unpack(EXPERT, original=moe_per_expert))
    checks = {f.check for f in check(broken).findings}
    assert "fused-group" in checks


# --- lists


def entries(config: dict[str, Any]) -> list[str]:
    names: list[str] = config["quantization_config"]["modules_to_not_convert"]
    return names


LISTS: dict[str, tuple[Callable[[list[str]], object], str]] = {
    "head not listed": (lambda names: names.remove("lm_head"), "lm_head"),
    "gate not listed": (
        lambda names: names.remove(f"{LAYER}.0.linear_attn.in_proj_a"),
        f"{LAYER}.0.linear_attn.in_proj_a",
    ),
    "vision layer not listed": (
        lambda names: names.remove("model.visual.blocks.0.attn.qkv"),
        "model.visual.blocks.0.attn.qkv",
    ),
    "mtp.fc not listed": (lambda names: names.remove("mtp.fc"), "mtp.fc"),
    "experts where there are none": (
        lambda names: names.append(f"{LAYER}.3.self_attn.o_proj.mlp.experts"),
        f"{LAYER}.3.self_attn.o_proj.mlp.experts",
    ),
    "entry of another prefix": (
        lambda names: names.append("model.layers.0.linear_attn.in_proj_a"),
        "model.layers.0.linear_attn.in_proj_a",
    ),
    "entry of no layer": (
        lambda names: names.append(f"{LAYER}.99.linear_attn.in_proj_a"),
        f"{LAYER}.99.linear_attn.in_proj_a",
    ),
    "entry with .weight": (
        lambda names: names.append(f"{LAYER}.0.linear_attn.in_proj_a.weight"),
        f"{LAYER}.0.linear_attn.in_proj_a.weight",
    ),
    "glob": (lambda names: names.append("*.in_proj_a"), "*.in_proj_a"),
    "packed but listed": (
        lambda names: names.append(UP.removesuffix(".weight")),
        UP.removesuffix(".weight"),
    ),
    "empty list": (lambda names: names.clear(), "lm_head"),
}


def test_experts_and_routers_are_listed_by_layer(
    packed_moe: Path, moe: Path, tmp_path: Path
) -> None:
    """All experts of a layer are one module, of one name or of many."""
    layer = f"{LAYER}.2.mlp"
    original = load_all(moe)

    def fuse(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(f"{layer}.experts.")]:
            del tensors[name]
        tensors |= {n: t for n, t in original.items() if n.startswith(f"{layer}.experts.")}

    listed = edited(packed_moe, tmp_path / "listed", fuse, listing(f"{layer}.experts"))
    assert check(listed).findings == ()
    unlisted = edited(
        packed_moe, tmp_path / "unlisted", config=lambda c: entries(c).remove(f"{layer}.gate")
    )
    assert found(check(unlisted)) == {("skip-list", f"{layer}.gate")}


@pytest.mark.parametrize("fault", LISTS)
def test_a_list_that_does_not_match_is_named(fault: str, packed: Path, tmp_path: Path) -> None:
    change, subject = LISTS[fault]
    broken = edited(packed, tmp_path / "broken", config=lambda c: change(entries(c)))
    findings = check(broken).findings
    assert ("skip-list", subject) in {(f.check, f.subject) for f in findings}
    assert fault == "empty list" or len(findings) == 1


@pytest.mark.parametrize("value", [None, "lm_head", 3, [1, 2], {"lm_head": 1}, [["lm_head"]]])
def test_a_list_that_is_none_is_named(value: object, packed: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["modules_to_not_convert"] = value

    findings = check(edited(packed, tmp_path / "broken", config=change)).findings
    assert ("skip-list", "config.json") in {(f.check, f.subject) for f in findings}


def test_experts_left_in_bf16_under_an_fp8_config_are_named(
    packed_moe: Path, moe: Path, tmp_path: Path
) -> None:
    """What the toolkit before writes: vLLM loads it without a word and computes garbage."""
    original = load_all(moe)

    def fuse(tensors: Tensors) -> None:
        for name in [n for n in tensors if ".mlp.experts." in n and not n.startswith("mtp.")]:
            del tensors[name]
        tensors |= {n: t for n, t in original.items() if ".mlp.experts." in n and "mtp." not in n}

    findings = check(edited(packed_moe, tmp_path / "broken", fuse)).findings
    subjects = {f.subject for f in findings if f.check == "skip-list"}
    assert any(".mlp.experts" in subject for subject in subjects)
    assert {s.partition("layers.")[2][0] for s in subjects} == {"0", "1", "2", "3"}


# --- the rest of the config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight_block_size", [64, 64]),
        ("weight_block_size", [128]),
        ("weight_block_size", None),
        ("weight_block_size", "128"),
        ("activation_scheme", "static"),
        ("quant_method", "compressed-tensors"),
        ("quant_method", None),
    ],
)
def test_a_wrong_setting_is_named(key: str, value: object, packed: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"][key] = value

    findings = check(edited(packed, tmp_path / "broken", config=change)).findings
    assert [(f.check, f.subject) for f in findings] == [("quantization-config", "config.json")]
    assert key in findings[0].message


def test_packed_weights_without_a_config_are_named(packed: Path, tmp_path: Path) -> None:
    broken = edited(packed, tmp_path / "a", config=lambda c: c.pop("quantization_config"))
    assert {f.check for f in check(broken).findings} == {"quantization-config"}


def test_a_config_without_packed_weights_is_named(
    packed: Path, dense: Path, tmp_path: Path
) -> None:
    plain = write_checkpoint(tmp_path / "plain", read_config(packed), load_all(dense))
    findings = check(plain).findings
    assert any("promises FP8" in f.message for f in findings)


def test_a_flipped_byte_is_found_by_hash_and_by_source(
    packed: Path, dense: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(packed, tmp_path / "broken"))
    file = broken / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)
    assert check(broken).findings == ()  # headers alone cannot tell
    checks = {f.check for f in check(broken, dense).findings}
    assert "hash" in checks
    assert checks & {"codes", "bytes"}


# --- tensor parallel


def tensor_parallel(folder: Path, ranks: int) -> set[str]:
    verdict = check(folder, tensor_parallel=ranks)
    assert all(f.check == "tensor-parallel" for f in verdict.findings)
    return {f.message.partition(":")[0] for f in verdict.findings}


def test_shards_that_are_no_whole_tiles_are_named(packed: Path) -> None:
    """Rows: gate, up 512, q 512, k, v 128, in_proj_qkv 512 (q, k 128 and v 256), z 256.

    Columns: down 512, o and out_proj 256.
    """
    assert tensor_parallel(packed, 1) == set()
    four = tensor_parallel(packed, 4)
    assert {"linear_attn.in_proj_z", "linear_attn.out_proj", "self_attn.o_proj"} <= four
    assert not {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"} & four
    eight = tensor_parallel(packed, 8)
    assert {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"} <= eight


def test_what_does_not_split_is_said_once_a_role_and_shape(packed: Path) -> None:
    said = {f.subject: f.message for f in check(packed, tensor_parallel=8).findings}
    every = "each, expected a multiple of 128"
    assert said[f"{LAYER}.0.linear_attn.in_proj_qkv.weight"] == (
        f"linear_attn.in_proj_qkv: 128 rows over 8 GPUs are 16 {every}"
    )
    assert said[f"{LAYER}.0.mlp.down_proj.weight"] == (
        f"mlp.down_proj: 512 columns over 8 GPUs are 64 {every}"
    )
    assert said[f"{LAYER}.0.mlp.gate_proj.weight"] == (
        f"mlp.gate_proj: 512 rows over 8 GPUs are 64 {every}"
    )
    assert not any(f"{LAYER}.1." in name for name in said)


def test_what_gpus_cannot_share_is_told_with_all_else(packed: Path, tmp_path: Path) -> None:
    broken = edited(packed, tmp_path / "broken", lambda tensors: tensors.pop(f"{UP}_scale_inv"))
    alone = check(broken).findings
    assert alone
    both = check(broken, tensor_parallel=4).findings
    assert both[: len(alone)] == alone
    assert {f.check for f in both[len(alone) :]} == {"tensor-parallel"}


@pytest.mark.parametrize(("ranks", "found"), [(2, False), (3, True), (4, False), (8, False)])
def test_heads_of_keys_and_values_are_repeated_not_split(
    ranks: int, found: bool, tmp_path: Path
) -> None:
    """Four heads of 128: eight GPUs have one each, as four have."""
    config = tiny_config()
    config["text_config"] |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    source = write_checkpoint(tmp_path / "in", config, random_tensors(config))
    roles = tensor_parallel(run(source, tmp_path / "out", "fp8").out, ranks)
    for name in ("k_proj", "v_proj"):
        assert (f"self_attn.{name}" in roles) == found


def test_heads_that_are_no_whole_tiles_are_told_as_they_are_split(tmp_path: Path) -> None:
    """Two heads of 192 rows: four GPUs have one each, which are one tile and a half."""
    config = tiny_config()
    config["text_config"] |= {"num_key_value_heads": 2, "head_dim": 192}
    source = write_checkpoint(tmp_path / "in", config, random_tensors(config))
    out = run(source, tmp_path / "out", "fp8").out
    told = {f.message for f in check(out, tensor_parallel=4).findings}
    said = "384 rows over 2 GPUs are 192 each, expected a multiple of 128"
    assert {f"self_attn.{name}: {said}" for name in ("k_proj", "v_proj")} <= told


def test_a_packed_tower_is_not_split(tmp_path: Path) -> None:
    """Engines keep the tower whole on every GPU."""
    config = tiny_config()
    config["vision_config"] |= {"hidden_size": 128}
    source = write_checkpoint(tmp_path / "in", config, random_tensors(config))
    recipe = tmp_path / "tower.toml"
    rules = "".join(
        f'[[rules]]\nmatch = "{match}"\naction = "{action}"\n'
        for match, action in (("kind:linear", "fp8"), ("*", "plain"))
    )
    recipe.write_text(f'format = "fp8"\n{rules}')
    out = run(source, tmp_path / "out", str(recipe)).out
    packed = {f"{i.role.scope}" for i in inventory(fetch(str(out))) if i.weight.storage == "fp8"}
    assert packed == {"text", "visual", "mtp"}
    assert not any(role.startswith("visual") for role in tensor_parallel(out, 8))


def test_gpus_are_asked_of_fp8_only(dense: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        check(dense, tensor_parallel=2)
    assert str(caught.value) == "--tensor-parallel: there are no FP8 weights here; leave it out"

    def silent(config: dict[str, Any]) -> None:
        del config["quantization_config"]

    unsaid = edited(packed, tmp_path / "unsaid", config=silent)
    assert "tensor-parallel" in {f.check for f in check(unsaid, tensor_parallel=4).findings}
    promised = Path(shutil.copytree(dense, tmp_path / "promised"))
    config = read_config(promised)
    config["quantization_config"] = {"quant_method": "fp8"}
    (promised / "config.json").write_text(json.dumps(config))
    checks = {f.check for f in check(promised, tensor_parallel=2).findings}
    assert "tensor-parallel" not in checks


def test_parts_of_a_fused_projection_are_split_one_by_one(packed: Path) -> None:
    """in_proj_qkv holds query, key and value heads: 128, 128 and 256 rows, and two GPUs would
    have 64 rows of keys each."""
    assert "linear_attn.in_proj_qkv" in tensor_parallel(packed, 2)


def test_experts_are_split_by_their_intermediate_size(packed_moe: Path) -> None:
    two = tensor_parallel(packed_moe, 2)
    assert {"mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"} <= two
    assert {"mlp.shared_expert.gate_proj", "mlp.shared_expert.down_proj"} <= two


def test_published_sizes_split_as_vllm_says(tmp_path: Path) -> None:
    from qwen35.checkpoint.inventory import inventory
    from qwen35.checkpoint.source import Checkpoint, open_published
    from qwen35.codecs.fp8.config import tensor_parallel_findings
    from qwen35.codecs.registry import group
    from qwen35.model.roles import CheckpointNaming
    from qwen35.tensors import StoredTensor

    plan = make_plan(open_published("Qwen3.5-35B-A3B"), load_recipe("fp8"))
    tensors = {o.name: StoredTensor(o, "model.safetensors", 0) for o in plan.outputs}
    weights, _ = group(tensors)
    config = open_published("Qwen3.5-35B-A3B").config
    items = inventory(Checkpoint("35B", config, weights, CheckpointNaming.of(tensors), {}))

    def roles(ranks: int) -> set[str]:
        return {f.message.partition(":")[0] for f in tensor_parallel_findings(config, items, ranks)}

    assert roles(1) == roles(2) == roles(4) == set()  # 512 / 4 = 128
    assert {"mlp.experts.gate_proj", "mlp.experts.down_proj", "mlp.shared_expert.up_proj"} <= roles(
        8
    )
    assert not {"self_attn.k_proj", "self_attn.v_proj"} & roles(8)  # two heads, repeated
    # 16 heads of 128 keys, and rows in all that 32 GPUs could share
    assert "linear_attn.in_proj_qkv" not in roles(16)
    assert "linear_attn.in_proj_qkv" in roles(32)


def test_tensor_parallel_on_the_command_line(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(packed), "--tensor-parallel", "1"]) == 0
    assert main(["verify", str(packed), "--tensor-parallel", "4"]) == 1
    assert "multiple of 128" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["verify", str(packed), "--tensor-parallel", "0"])


def test_exit_codes(packed: Path, dense: Path, tmp_path: Path) -> None:
    assert main(["verify", str(packed), "--source", str(dense), "--quiet"]) == 0
    broken = edited(packed, tmp_path / "broken", set_scale(QKV, math.nan))
    assert main(["verify", str(broken), "--source", str(dense), "--quiet"]) == 1
    assert main(["verify", str(broken), "--depth", "numbers", "--quiet"]) == 1
