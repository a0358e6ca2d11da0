"""The verifier on what FP8 packs and lists: fused groups, experts, modules left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Tensors
from running import load_all
from verifying import check, edited, found

pytestmark = pytest.mark.sentences

TEXT = "model.language_model"
LAYER = f"{TEXT}.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
UP = f"{LAYER}.1.mlp.up_proj.weight"
V = f"{LAYER}.3.self_attn.v_proj.weight"
EXPERT = f"{LAYER}.2.mlp.experts.1.up_proj.weight"


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
    name: str, group: str, fp8_artifact: Path, dense: Path, tmp_path: Path
) -> None:
    """vLLM: "Detected some but not all shards of ... are quantized"."""
    broken = edited(
        fp8_artifact,
        tmp_path / "broken",
        unpack(name, original=dense),
        listing(name.removesuffix(".weight")),
    )
    findings = check(broken).findings
    assert [f.check for f in findings] == ["fused-group"]
    assert findings[0].subject != name  # it is plain: what is packed is wrong
    assert findings[0].message == f"packed, but not {name}: engines load both as {group}"


def test_experts_packed_by_half_are_named(
    fp8_moe_artifact: Path, moe_per_expert: Path, tmp_path: Path
) -> None:
    broken = edited(fp8_moe_artifact, tmp_path / "broken", unpack(EXPERT, original=moe_per_expert))
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
    fp8_moe_artifact: Path, moe: Path, tmp_path: Path
) -> None:
    """All experts of a layer are one module, of one name or of many."""
    layer = f"{LAYER}.2.mlp"
    original = load_all(moe)

    def fuse(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(f"{layer}.experts.")]:
            del tensors[name]
        tensors |= {n: t for n, t in original.items() if n.startswith(f"{layer}.experts.")}

    listed = edited(fp8_moe_artifact, tmp_path / "listed", fuse, listing(f"{layer}.experts"))
    assert check(listed).findings == ()
    unlisted = edited(
        fp8_moe_artifact, tmp_path / "unlisted", config=lambda c: entries(c).remove(f"{layer}.gate")
    )
    assert found(check(unlisted)) == {("skip-list", f"{layer}.gate")}


@pytest.mark.parametrize("fault", LISTS)
def test_a_list_that_does_not_match_is_named(
    fault: str, fp8_artifact: Path, tmp_path: Path
) -> None:
    change, subject = LISTS[fault]
    broken = edited(fp8_artifact, tmp_path / "broken", config=lambda c: change(entries(c)))
    findings = check(broken).findings
    assert ("skip-list", subject) in {(f.check, f.subject) for f in findings}
    assert fault == "empty list" or len(findings) == 1


@pytest.mark.parametrize("value", ["lm_head", 3, [1, 2], {"lm_head": 1}, [["lm_head"]]])
def test_a_list_that_is_none_is_named(value: object, fp8_artifact: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["modules_to_not_convert"] = value

    findings = check(edited(fp8_artifact, tmp_path / "broken", config=change)).findings
    assert ("skip-list", "config.json") in {(f.check, f.subject) for f in findings}


def test_experts_left_in_bf16_under_an_fp8_config_are_named(
    fp8_moe_artifact: Path, moe: Path, tmp_path: Path
) -> None:
    """What the toolkit before writes: vLLM loads it without a word and computes garbage."""
    original = load_all(moe)

    def fuse(tensors: Tensors) -> None:
        for name in [n for n in tensors if ".mlp.experts." in n and not n.startswith("mtp.")]:
            del tensors[name]
        tensors |= {n: t for n, t in original.items() if ".mlp.experts." in n and "mtp." not in n}

    findings = check(edited(fp8_moe_artifact, tmp_path / "broken", fuse)).findings
    subjects = {f.subject for f in findings if f.check == "skip-list"}
    assert any(".mlp.experts" in subject for subject in subjects)
    assert {s.partition("layers.")[2][0] for s in subjects} == {"0", "1", "2", "3"}
