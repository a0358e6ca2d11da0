"""Conversion end to end: what goes in and what comes out."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import layout_of, make_checkpoint, random_tensors, tiny_config, write_checkpoint
from qwen35.checkpoint.source import open_folder
from qwen35.codecs.devices import Kernels
from qwen35.codecs.fp8.arrays import encode_rows
from qwen35.codecs.nf4.tables import LEVELS
from qwen35.errors import UsageError
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write
from running import changed, dequantize, limit_shards, load_all, plan_of, read_config, run

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"


def test_manifest_holds_size_and_hash_of_every_file(dense: Path, tmp_path: Path) -> None:
    result = run(dense, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "qwen35.json").read_text())
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == set(manifest["files"]) | {"qwen35.json"}
    for name, entry in manifest["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size"], entry["sha256"])
        assert result.hashes[name] == entry["sha256"]
    assert manifest["source"] == {"folder": "source"}
    assert manifest["recipe"]["name"] == "nf4"
    assert len(manifest["plan"]) == 64


def test_planned_sizes_are_the_sizes_written(moe: Path, tmp_path: Path) -> None:
    plan = plan_of(moe)
    result = write(plan, tmp_path / "out")
    for name, nbytes in plan.file_sizes():
        assert (tmp_path / "out" / name).stat().st_size == nbytes
    assert result.nbytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())


def test_bytes_do_not_depend_on_threads(moe_per_expert: Path, tmp_path: Path) -> None:
    one = run(moe_per_expert, tmp_path / "one", threads=1)
    four = run(moe_per_expert, tmp_path / "four", threads=4)
    assert one.hashes == four.hashes


def test_bytes_do_not_depend_on_the_size_of_pieces(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(dense, tmp_path / "whole")
    monkeypatch.setattr("qwen35.codecs.pieces.PIECE", 64 * 256)
    assert run(dense, tmp_path / "pieces").hashes == whole.hashes


def test_kept_tensors_are_the_same_bytes(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "out")
    before, after = load_all(dense), load_all(tmp_path / "out")
    plan = plan_of(dense)
    kept = [step.weight.name for step in plan.steps if step.op == "copy"]
    assert len(kept) == len(before) - sum(step.op == "nf4" for step in plan.steps)
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
    assert any(name.startswith("mtp.") for name in kept)
    assert after[f"{LAYER}.0.linear_attn.A_log"].dtype == torch.float32


def test_sidecars_travel_unchanged_and_strangers_do_not(dense: Path, tmp_path: Path) -> None:
    config = read_config(dense)
    tokenizer = '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'
    sidecars = {"tokenizer.json": tokenizer, "merges.txt": "a b", "notes.md": "private"}
    source = write_checkpoint(tmp_path / "in", config, load_all(dense), sidecars=sidecars)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    run(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "qwen35.json",
        "tokenizer.json",
        "merges.txt",
    }
    assert (tmp_path / "out" / "merges.txt").read_text() == "a b"


def test_files_have_the_mode_that_umask_gives(dense: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        run(dense, tmp_path / "out")
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o640}


@pytest.mark.parametrize(("shards", "index"), [(3, True), (1, False)])
def test_source_in_shards_or_one_file_gives_the_same_weights(
    dense: Path, tmp_path: Path, shards: int, index: bool
) -> None:
    source = write_checkpoint(
        tmp_path / "in", read_config(dense), load_all(dense), shards=shards, index=index
    )
    expected = run(dense, tmp_path / "expected").hashes["model.safetensors"]
    assert run(source, tmp_path / "out").hashes["model.safetensors"] == expected


def test_output_in_several_shards_has_a_true_index(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_shards(monkeypatch, 600_000)
    run(dense, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = load_all(tmp_path / "out")
    assert set(index["weight_map"]) == set(tensors)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["metadata"]["total_size"] == total
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 3
    for name, shard in index["weight_map"].items():
        if ".weight." in name:
            assert index["weight_map"][name.partition(".weight.")[0] + ".weight"] == shard
    monkeypatch.undo()
    assert set(tensors) == set(load_all(run(dense, tmp_path / "one").out))


def test_text_only_prefix_is_kept_and_named_in_the_skip_list(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", text_only=True)
    run(source, tmp_path / "out")
    skip = read_config(tmp_path / "out")["quantization_config"]["llm_int8_skip_modules"]
    assert skip == ["lm_head", "model.embed_tokens", "mtp"]
    assert "model.layers.0.mlp.up_proj.weight.absmax" in load_all(tmp_path / "out")


def test_missing_mtp_layer_is_noted_and_config_says_zero(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config, layout_of(config, mtp=False))
    source = write_checkpoint(tmp_path / "in", config, tensors)
    plan = plan_of(source)
    assert "multi-token-prediction" in plan.notes[0]
    write(plan, tmp_path / "out")
    written = read_config(tmp_path / "out")
    assert written["text_config"]["mtp_num_hidden_layers"] == 0
    assert "mtp" not in written["quantization_config"]["llm_int8_skip_modules"]


def test_keep_leaves_roles_unquantized_and_lists_them(dense: Path, tmp_path: Path) -> None:
    recipe = load_recipe("nf4").keeping(("linear_attn.in_proj_a", "linear_attn.in_proj_b"))
    write(make_plan(open_folder(dense), recipe), tmp_path / "out")
    tensors = load_all(tmp_path / "out")
    assert tensors[f"{LAYER}.0.linear_attn.in_proj_a.weight"].dtype == torch.bfloat16
    skip = read_config(tmp_path / "out")["quantization_config"]["llm_int8_skip_modules"]
    assert skip[-2:] == ["in_proj_a", "in_proj_b"]


def test_every_weight_decodes_within_the_formats_bound(dense: Path, tmp_path: Path) -> None:
    """Half the widest gap between levels, times absmax, plus what 8-bit absmax adds (1/127)."""
    run(dense, tmp_path / "out")
    before, after = load_all(dense), load_all(tmp_path / "out")
    gap = float(np.diff(LEVELS).max()) / 2
    for step in plan_of(dense).steps:
        if step.op != "nf4":
            continue
        name = step.weight.name
        weight = before[name].float().reshape(-1, 64)
        error = (dequantize(after, name).float().reshape(-1, 64) - weight).abs()
        absmax = weight.abs().amax(1, keepdim=True)
        spread = (absmax - absmax.mean()).abs().max()
        assert bool((error <= gap * absmax + spread / 50 + 0.005 * absmax).all())


def test_cuda_without_a_gpu_is_refused_in_a_sentence(dense: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="does not see such a GPU"):
        run(dense, tmp_path / "out", device="cuda")
    with pytest.raises(UsageError, match="auto, cpu, cuda"):
        run(dense, tmp_path / "out", device="tpu")
    assert not (tmp_path / "out").exists()


def test_the_encoder_for_gpus_gives_the_same_bytes(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of --device cuda, on torch's CPU device."""
    from qwen35.codecs.nf4.torch import TorchEncoder

    weight = load_all(dense)[QKV].clone()
    weight[5] = 0
    source = changed(dense, tmp_path / "in", {QKV: weight})
    expected = run(source, tmp_path / "expected").hashes
    kernels = Kernels({"nf4": TorchEncoder("cpu"), "fp8": encode_rows})
    monkeypatch.setattr("qwen35.writing.write.kernels_for", lambda _: (kernels,))
    assert run(source, tmp_path / "out").hashes == expected


def test_conversion_imports_neither_torch_nor_bitsandbytes(dense: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from qwen35.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'bitsandbytes', 'transformers', 'huggingface_hub', 'scipy.linalg'}\n"
        "print(sorted(heavy & set(sys.modules))); sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "convert", str(dense), str(tmp_path / "out"), "--quiet"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("recipe", ["nf4", "text"])
@pytest.mark.parametrize("drop", [True, False])
def test_mtp_count_at_the_root_is_kept_true(tmp_path: Path, recipe: str, drop: bool) -> None:
    config = tiny_config()
    del config["text_config"]["mtp_num_hidden_layers"]
    config["mtp_num_hidden_layers"] = 1
    published = layout_of(tiny_config())
    source = write_checkpoint(tmp_path / "in", config, random_tensors(config, published))
    chosen = load_recipe(recipe)
    plan = make_plan(open_folder(source), chosen.dropping_mtp() if drop else chosen)
    write(plan, tmp_path / "out")
    written = read_config(tmp_path / "out")
    holders = [h for h in (written, written.get("text_config", {})) if "mtp_num_hidden_layers" in h]
    assert holders
    assert {h["mtp_num_hidden_layers"] for h in holders} == {0 if drop else 1}


def test_share_of_experts_is_of_what_is_written(moe: Path, tmp_path: Path) -> None:
    plan = make_plan(open_folder(moe), load_recipe("text-nf4").dropping_mtp())
    written = [step for step in plan.steps if step.outputs]
    experts = sum(s.spec.numel for s in written if s.role.info.kind == "experts")
    share = experts / sum(s.spec.numel for s in written)
    assert f"{share:.1%} of all parameters" in plan.notes[0]
    again = plan_of(run(moe, tmp_path / "nf4").out)
    assert "experts stay in BF16" in again.notes[0]


def test_kernels_work_without_a_place_to_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen35.codecs import compiled as compiling

    real = vars(compiling)["njit"]

    def njit(*args: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **options)

    monkeypatch.setattr(compiling, "njit", njit)
    double = compiling.compiled(lambda value: value + value)
    assert double(2) == 4


def test_keep_prefix_without_a_tower_to_drop_is_refused(dense: Path) -> None:
    with pytest.raises(UsageError, match="nothing is renamed here"):
        make_plan(open_folder(dense), load_recipe("nf4"), keep_prefix=True)
