"""The verifier on FP8 scales and codes: every planted fault is named."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import Tensors
from qwen35.checkpoint.open import fetch
from qwen35.cli.main import main
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import verify
from verifying import check, edited, found

pytestmark = pytest.mark.sentences

TEXT = "model.language_model"
LAYER = f"{TEXT}.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
UP = f"{LAYER}.1.mlp.up_proj.weight"
V = f"{LAYER}.3.self_attn.v_proj.weight"
DOWN = "mtp.layers.0.mlp.down_proj.weight"
EXPERT = f"{LAYER}.2.mlp.experts.1.up_proj.weight"


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
    fault: str, fp8_artifact: Path, tmp_path: Path
) -> None:
    change, subject = SCALES[fault]
    verdict = check(edited(fp8_artifact, tmp_path / "broken", change))
    assert subject in {f.subject for f in verdict.findings}


@pytest.mark.parametrize("name", [QKV, V, DOWN])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -0.0, -1e-4])
@pytest.mark.parametrize("with_source", [True, False])
def test_a_scale_that_is_no_scale_is_named(
    with_source: bool, bad: float, name: str, fp8_artifact: Path, dense: Path, tmp_path: Path
) -> None:
    broken = edited(fp8_artifact, tmp_path / "broken", set_scale(name, bad))
    opened = open_artifact(str(broken))
    source = fetch(str(dense)) if with_source else None
    verdict = verify(opened, source=source, depth="numbers")
    assert [f.subject for f in verdict.findings] == [f"{name}_scale_inv"]
    assert "not finite or not positive" in verdict.findings[0].message


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("with_source", [True, False])
def test_nan_codes_are_named(
    with_source: bool, code: int, fp8_artifact: Path, dense: Path, tmp_path: Path
) -> None:
    def plant(tensors: Tensors) -> None:
        tensors[UP].view(torch.uint8)[300, 5] = code

    broken = edited(fp8_artifact, tmp_path / "broken", plant)
    verdict = verify(
        open_artifact(str(broken)),
        source=fetch(str(dense)) if with_source else None,
        depth="numbers",
    )
    assert [f.subject for f in verdict.findings] == [UP]


def test_wrong_scales_and_codes_are_found_beside_the_source(
    fp8_artifact: Path, dense: Path, tmp_path: Path
) -> None:
    def double(tensors: Tensors) -> None:
        tensors[f"{UP}_scale_inv"][2, 1] *= 2

    verdict = check(edited(fp8_artifact, tmp_path / "broken", double), dense)
    assert found(verdict) == {("codes", UP)}


def test_an_expert_in_anothers_place_is_found(
    fp8_moe_artifact: Path, moe: Path, tmp_path: Path
) -> None:
    def swap(tensors: Tensors) -> None:
        other = EXPERT.replace("experts.1", "experts.2")
        for suffix in ("", "_scale_inv"):
            one, two = EXPERT + suffix, other + suffix
            tensors[one], tensors[two] = tensors[two], tensors[one]

    verdict = check(edited(fp8_moe_artifact, tmp_path / "broken", swap), moe)
    assert found(verdict) == {
        ("codes", EXPERT),
        ("codes", EXPERT.replace("experts.1", "experts.2")),
    }


def test_gate_and_up_exchanged_are_found(fp8_moe_artifact: Path, moe: Path, tmp_path: Path) -> None:
    def swap(tensors: Tensors) -> None:
        other = EXPERT.replace("up_proj", "gate_proj")
        for suffix in ("", "_scale_inv"):
            one, two = EXPERT + suffix, other + suffix
            tensors[one], tensors[two] = tensors[two], tensors[one]

    verdict = check(edited(fp8_moe_artifact, tmp_path / "broken", swap), moe)
    assert len(verdict.findings) == 2


def test_a_missing_expert_is_named(fp8_moe_artifact: Path, tmp_path: Path) -> None:
    broken = edited(fp8_moe_artifact, tmp_path / "broken", drop(EXPERT, f"{EXPERT}_scale_inv"))
    assert EXPERT in {f.subject for f in check(broken).findings}


def test_a_flipped_byte_is_found_by_hash_and_by_source(
    fp8_artifact: Path, dense: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(fp8_artifact, tmp_path / "broken"))
    file = broken / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)
    assert check(broken).findings == ()  # headers alone cannot tell
    checks = {f.check for f in check(broken, dense).findings}
    assert "hash" in checks
    assert checks & {"codes", "bytes"}


def test_exit_codes(fp8_artifact: Path, dense: Path, tmp_path: Path) -> None:
    assert main(["verify", str(fp8_artifact), "--source", str(dense), "--quiet"]) == 0
    broken = edited(fp8_artifact, tmp_path / "broken", set_scale(QKV, math.nan))
    assert main(["verify", str(broken), "--source", str(dense), "--quiet"]) == 1
    assert main(["verify", str(broken), "--depth", "numbers", "--quiet"]) == 1
