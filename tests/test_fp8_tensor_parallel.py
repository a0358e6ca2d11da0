"""The verifier on FP8 split over several GPUs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoints import random_tensors, tiny_config, write_checkpoint
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.open import fetch
from qwen35.cli.main import main
from qwen35.errors import UsageError
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from running import read_config, run
from verifying import check, edited

pytestmark = pytest.mark.sentences

TEXT = "model.language_model"
LAYER = f"{TEXT}.layers"
UP = f"{LAYER}.1.mlp.up_proj.weight"


def tensor_parallel(folder: Path, ranks: int) -> set[str]:
    verdict = check(folder, tensor_parallel=ranks)
    assert all(f.check == "tensor-parallel" for f in verdict.findings)
    return {f.message.partition(":")[0] for f in verdict.findings}


def test_shards_that_are_no_whole_tiles_are_named(fp8_artifact: Path) -> None:
    """Rows: gate, up 512, q 512, k, v 128, in_proj_qkv 512 (q, k 128 and v 256), z 256.

    Columns: down 512, o and out_proj 256.
    """
    assert tensor_parallel(fp8_artifact, 1) == set()
    four = tensor_parallel(fp8_artifact, 4)
    assert {"linear_attn.in_proj_z", "linear_attn.out_proj", "self_attn.o_proj"} <= four
    assert not {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"} & four
    eight = tensor_parallel(fp8_artifact, 8)
    assert {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"} <= eight


def test_what_does_not_split_is_said_once_a_role_and_shape(fp8_artifact: Path) -> None:
    said = {f.subject: f.message for f in check(fp8_artifact, tensor_parallel=8).findings}
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


def test_what_gpus_cannot_share_is_told_with_all_else(fp8_artifact: Path, tmp_path: Path) -> None:
    broken = edited(
        fp8_artifact, tmp_path / "broken", lambda tensors: tensors.pop(f"{UP}_scale_inv")
    )
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


def test_gpus_are_asked_of_fp8_only(dense: Path, fp8_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        check(dense, tensor_parallel=2)
    found = "there are no weights in blocks of FP8 here; leave it out"
    assert str(caught.value) == f"--tensor-parallel: {found}"

    def silent(config: dict[str, Any]) -> None:
        del config["quantization_config"]

    unsaid = edited(fp8_artifact, tmp_path / "unsaid", config=silent)
    assert "tensor-parallel" in {f.check for f in check(unsaid, tensor_parallel=4).findings}
    promised = Path(shutil.copytree(dense, tmp_path / "promised"))
    config = read_config(promised)
    config["quantization_config"] = {"quant_method": "fp8"}
    (promised / "config.json").write_text(json.dumps(config))
    checks = {f.check for f in check(promised, tensor_parallel=2).findings}
    assert "tensor-parallel" not in checks


def test_parts_of_a_fused_projection_are_split_one_by_one(fp8_artifact: Path) -> None:
    """in_proj_qkv holds query, key and value heads: 128, 128 and 256 rows, and two GPUs would
    have 64 rows of keys each."""
    assert "linear_attn.in_proj_qkv" in tensor_parallel(fp8_artifact, 2)


def test_experts_are_split_by_their_intermediate_size(fp8_moe_artifact: Path) -> None:
    two = tensor_parallel(fp8_moe_artifact, 2)
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
    fp8_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(fp8_artifact), "--tensor-parallel", "1"]) == 0
    assert main(["verify", str(fp8_artifact), "--tensor-parallel", "4"]) == 1
    assert "multiple of 128" in capsys.readouterr().out
    assert main(["verify", str(fp8_artifact), "--tensor-parallel", "0"]) == 2
