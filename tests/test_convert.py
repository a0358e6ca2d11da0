"""Conversion end to end: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import (
    Tensors,
    layout_of,
    make_checkpoint,
    random_tensors,
    tiny_config,
    write_checkpoint,
)
from qwen35.checkpoint.source import open_folder
from qwen35.codecs.devices import Kernels
from qwen35.codecs.fp8.arrays import encode_rows
from qwen35.codecs.nf4.tables import LEVELS
from qwen35.errors import OutputError, TensorError, UsageError
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write
from running import load_all, plan_of, read_config, run

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"


def dequantize(tensors: Tensors, name: str) -> torch.Tensor:
    """Decode an NF4 weight with bitsandbytes."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    parts = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    result: torch.Tensor = dequantize_4bit(tensors[name], state)
    return result


def changed(source: Path, out: Path, changes: Tensors) -> Path:
    """Write a copy of a checkpoint with some tensors replaced."""
    return write_checkpoint(out, read_config(source), {**load_all(source), **changes})


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
    sidecars = {"tokenizer.json": "{}", "merges.txt": "a b", "notes.md": "private"}
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
    monkeypatch.setattr(
        "qwen35.planning.safetensors_files.safetensors_options.MAX_SHARD_BYTES", 600_000
    )
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


def test_output_equal_to_or_inside_the_input_is_refused(dense: Path, tmp_path: Path) -> None:
    for out in (dense, dense / "sub", dense.parent):
        with pytest.raises(OutputError, match="same folder|overlaps"):
            run(dense, out, overwrite=True)
    assert not (dense / "sub").exists()


def test_overwrite_replaces_only_what_qwen35_wrote(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        run(dense, tmp_path / "out")
    run(dense, tmp_path / "out", "text", overwrite=True)
    assert "quantization_config" not in read_config(tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not written by qwen35"):
        run(dense, other, overwrite=True)
    assert (other / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_full_disk_is_seen_before_the_work(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="free on its disk"):
        run(dense, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_source_that_shrinks_while_it_is_read_is_named(dense: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", read_config(dense), load_all(dense))
    plan = plan_of(source)
    shard = next(source.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(TensorError, match="changed since its header was read; run again on files"):
        write(plan, tmp_path / "out", threads=2)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_interrupt_leaves_no_output_and_says_how_to_go_on(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen35.writing.write.write_file", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(dense, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    (note,) = caught.value.__notes__
    assert note.endswith(".out.partial: the same command continues")
    monkeypatch.undo()
    run(dense, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_run_leaves_no_output_and_the_next_cleans_up(dense: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "import qwen35.writing.write as c\n"
        "real = c.write_file\n"
        "def slow(*a):\n    print('ready', flush=True); time.sleep(60)\n    return real(*a)\n"
        "c.write_file = slow\n"
        "from qwen35.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "convert",
        str(dense),
        str(tmp_path / "out"),
        "--quiet",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(OutputError, match="another run is writing it"):
            run(dense, tmp_path / "out")
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {".out.partial", ".out.lock"}
    run(dense, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_progress_counts_every_byte_read(dense: Path, tmp_path: Path) -> None:
    class Counter:
        def __init__(self) -> None:
            self.total = self.done = 0
            self.ended = False
            self.lock = threading.Lock()

        def begin(self, title: str, nbytes: int) -> None:
            self.total = nbytes

        def advance(self, nbytes: int, item: str) -> None:
            with self.lock:
                self.done += nbytes

        def end(self) -> None:
            self.ended = True

    counter = Counter()
    run(dense, tmp_path / "out", progress=counter)
    assert (
        counter.done
        == counter.total
        == sum(t.numel() * t.element_size() for t in load_all(dense).values())
    )
    assert counter.ended


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


def test_bitsandbytes_encoder_gives_the_same_bytes(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of --device cuda, on bitsandbytes' own CPU device."""
    from qwen35.codecs.nf4.torch import TorchEncoder

    weight = load_all(dense)[QKV].clone()
    weight[5] = 0
    source = changed(dense, tmp_path / "in", {QKV: weight})
    expected = run(source, tmp_path / "expected").hashes
    kernels: Kernels = {"nf4": TorchEncoder("cpu"), "fp8": encode_rows}
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
