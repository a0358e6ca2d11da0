"""FP8 conversion end to end: what is written, from which sources, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from blocks import decode, encode
from checkpoints import Tensors, layout_of, random_tensors, tiny_config, write_checkpoint
from qwen35.checkpoint.source import open_folder
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import TensorError, UsageError
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write
from running import limit_shards, load_all, read_config, run, same

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
DOWN = f"{LAYER}.1.mlp.down_proj.weight"


def fused_to_single(tensors: Tensors) -> Tensors:
    """Return the same weights with every expert by itself."""
    single: Tensors = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if not stem.endswith(".experts"):
            single[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            if leaf == "down_proj":
                single[f"{stem}.{expert}.down_proj.weight"] = matrix
            else:
                gate, up = matrix.chunk(2)
                single[f"{stem}.{expert}.gate_proj.weight"] = gate
                single[f"{stem}.{expert}.up_proj.weight"] = up
    return single


@pytest.fixture(scope="module")
def fp8(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(dense, tmp_path_factory.mktemp("fp8") / "out", "fp8").out


# --- what is written


@pytest.mark.parametrize("mode", ["rms", "max", "percentile", "mse", "search"])
def test_output_is_what_the_codec_makes_of_each_weight(
    mode: Any, dense: Path, tmp_path: Path
) -> None:
    scale_choice = ScaleChoice(mode, grid_size=5)
    plan = make_plan(open_folder(dense), load_recipe("fp8"), scale_choice=scale_choice)
    write(plan, tmp_path / "out")
    source, out = load_all(dense), load_all(tmp_path / "out")
    expected: Tensors = {}
    for name, tensor in source.items():
        if f"{name}_scale_inv" in out:
            expected[name], expected[f"{name}_scale_inv"] = encode(tensor, scale_choice)
        else:
            expected[name] = tensor
    assert sum(n.endswith("_scale_inv") for n in out) == 32
    assert same(out, expected)


def test_fused_and_single_experts_give_the_same_bytes(moe: Path, tmp_path: Path) -> None:
    single = write_checkpoint(
        tmp_path / "single", read_config(moe), fused_to_single(load_all(moe)), shards=3
    )
    fused_out, single_out = (
        run(moe, tmp_path / "a", "fp8").out,
        run(single, tmp_path / "b", "fp8").out,
    )
    assert same(load_all(fused_out), load_all(single_out))
    assert read_config(fused_out) == read_config(single_out)
    assert (fused_out / "model.safetensors").read_bytes() == (
        single_out / "model.safetensors"
    ).read_bytes()


def test_experts_are_the_parts_of_the_stack(moe: Path, tmp_path: Path) -> None:
    source, out = load_all(moe), load_all(run(moe, tmp_path / "out", "fp8").out)
    stem = f"{LAYER}.2.mlp.experts"
    for expert in range(4):
        gate, up = source[f"{stem}.gate_up_proj"][expert].chunk(2)
        down = source[f"{stem}.down_proj"][expert]
        for leaf, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            name = f"{stem}.{expert}.{leaf}.weight"
            codes, scales = encode(weight, ScaleChoice())
            assert torch.equal(out[name].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(out[f"{name}_scale_inv"], scales)


@pytest.mark.parametrize("source", ["dense", "moe"])
def test_bytes_do_not_depend_on_threads(
    source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(source)
    one = run(folder, tmp_path / "one", "fp8", threads=1)
    four = run(folder, tmp_path / "four", "fp8", threads=4)
    assert one.hashes == four.hashes


def test_bytes_do_not_depend_on_the_size_of_pieces(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(dense, tmp_path / "one", "fp8")
    monkeypatch.setattr("qwen35.codecs.pieces.PIECE", 2**15)
    assert run(dense, tmp_path / "two", "fp8").hashes == one.hashes


def test_back_to_bf16_is_code_times_scale_exactly(fp8: Path, tmp_path: Path) -> None:
    back = load_all(run(fp8, tmp_path / "back", "bf16").out)
    expected: Tensors = {}
    packed = load_all(fp8)
    for name, tensor in packed.items():
        if name.endswith("_scale_inv"):
            continue
        scales = packed.get(f"{name}_scale_inv")
        expected[name] = tensor if scales is None else decode(tensor, scales).bfloat16()
    assert same(back, expected)
    assert "quantization_config" not in read_config(tmp_path / "back")


def test_back_to_bf16_of_a_mixture_keeps_experts_single(moe: Path, tmp_path: Path) -> None:
    packed = run(moe, tmp_path / "fp8", "fp8").out
    back = load_all(run(packed, tmp_path / "back", "bf16").out)
    name = f"{LAYER}.3.mlp.experts.2.up_proj.weight"
    tensors = load_all(packed)
    expected = decode(tensors[name], tensors[f"{name}_scale_inv"]).bfloat16()
    assert torch.equal(back[name], expected)


def test_packing_again_changes_nothing(fp8: Path, tmp_path: Path) -> None:
    again = run(fp8, tmp_path / "again", "fp8").out
    assert same(load_all(again), load_all(fp8))
    assert read_config(again) == read_config(fp8)


def test_decoding_and_packing_again_by_max_is_the_same(dense: Path, tmp_path: Path) -> None:
    """Values that E4M3 holds exactly come back, where the scale is found again."""
    plan = make_plan(open_folder(dense), load_recipe("fp8"), scale_choice=ScaleChoice("max"))
    first = load_all(write(plan, tmp_path / "first").out)
    run(tmp_path / "first", tmp_path / "back", "bf16")
    plan = make_plan(
        open_folder(tmp_path / "back"), load_recipe("fp8"), scale_choice=ScaleChoice("max")
    )
    second = load_all(write(plan, tmp_path / "second").out)
    name = QKV
    one, two = (decode(t[name], t[f"{name}_scale_inv"]) for t in (first, second))
    assert float((one - two).norm() / one.norm()) < 0.005


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_float_sources_are_encoded_without_rounding_first(dtype: str, tmp_path: Path) -> None:
    config = tiny_config(dtype=dtype)
    tensors = random_tensors(config)
    source = write_checkpoint(tmp_path / "in", config, tensors)
    out = load_all(run(source, tmp_path / "out", "fp8").out)
    codes, scales = encode(tensors[QKV], ScaleChoice())
    assert torch.equal(out[QKV].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(out[f"{QKV}_scale_inv"], scales)
    assert scales.dtype == torch.bfloat16


def test_nf4_source_is_decoded_and_then_packed(dense: Path, tmp_path: Path) -> None:
    nf4 = run(dense, tmp_path / "nf4", "nf4").out
    bf16 = run(nf4, tmp_path / "bf16", "bf16").out
    direct, over = run(nf4, tmp_path / "a", "fp8").out, run(bf16, tmp_path / "b", "fp8").out
    assert same(load_all(direct), load_all(over))


def test_text_only_in_one_pass_is_the_same_as_in_two(moe: Path, tmp_path: Path) -> None:
    text = run(moe, tmp_path / "text", "text").out
    two, one = run(text, tmp_path / "two", "fp8").out, run(moe, tmp_path / "one", "text-fp8").out
    assert same(load_all(one), load_all(two))
    assert read_config(one) == read_config(two)


def test_several_shards_hold_a_weight_and_its_scale_together(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_all(run(moe, tmp_path / "whole", "fp8").out)
    limit_shards(monkeypatch, 300_000)
    out = run(moe, tmp_path / "out", "fp8").out
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = index["weight_map"]
    assert len(set(files.values())) > 3
    for name, file in files.items():
        if name.endswith("_scale_inv"):
            assert files[name.removesuffix("_scale_inv")] == file
    total = sum(t.numel() * t.element_size() for t in whole.values())
    assert index["metadata"]["total_size"] == total
    assert same(load_all(out), whole)


def test_zero_weights_decode_to_zero(dense: Path, tmp_path: Path) -> None:
    tensors = load_all(dense)
    tensors[QKV] = torch.zeros_like(tensors[QKV])
    source = write_checkpoint(tmp_path / "in", read_config(dense), tensors)
    out = load_all(run(source, tmp_path / "out", "fp8").out)
    assert not out[QKV].view(torch.uint8).any()
    assert bool((out[f"{QKV}_scale_inv"] == 1).all())


# --- what is refused


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(
    bad: float, threads: int, dense: Path, tmp_path: Path
) -> None:
    tensors = load_all(dense)
    tensors[DOWN][255, 511] = bad
    source = write_checkpoint(tmp_path / "in", read_config(dense), tensors)
    (tmp_path / "to").mkdir()
    with pytest.raises(TensorError, match=f"{DOWN}: holds NaN or infinity"):
        run(source, tmp_path / "to" / "out", "fp8", threads=threads)
    assert list((tmp_path / "to").iterdir()) == []


def test_an_expert_that_is_not_finite_is_named(moe: Path, tmp_path: Path) -> None:
    tensors = load_all(moe)
    tensors[f"{LAYER}.1.mlp.experts.gate_up_proj"][2, 200, 3] = math.nan
    source = write_checkpoint(tmp_path / "in", read_config(moe), tensors)
    with pytest.raises(TensorError, match=rf"{LAYER}\.1\.mlp\.experts\.2\.up_proj\.weight"):
        run(source, tmp_path / "out", "fp8")
    assert not (tmp_path / "out").exists()


def test_nan_in_an_fp16_source_is_refused(tmp_path: Path) -> None:
    config = tiny_config(dtype="float16")
    tensors = random_tensors(config)
    tensors[DOWN][0, 0] = math.nan
    source = write_checkpoint(tmp_path / "in", config, tensors)
    with pytest.raises(TensorError, match=DOWN):
        run(source, tmp_path / "out", "fp8")


def test_nan_outside_the_packed_weights_is_refused_too(dense: Path, tmp_path: Path) -> None:
    name = "model.visual.blocks.0.attn.qkv.weight"
    tensors = load_all(dense)
    tensors[name][0, 0] = math.nan
    source = write_checkpoint(tmp_path / "in", read_config(dense), tensors)
    with pytest.raises(TensorError, match=name):
        run(source, tmp_path / "out", "fp8")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -0.001])
def test_a_source_scale_that_is_no_scale_is_refused_in_decoding(
    bad: float, fp8: Path, tmp_path: Path
) -> None:
    tensors = load_all(fp8)
    tensors[f"{QKV}_scale_inv"][0, 0] = bad
    source = write_checkpoint(tmp_path / "in", read_config(fp8), tensors)
    with pytest.raises(TensorError, match=f"{QKV}_scale_inv"):
        run(source, tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -0.001])
def test_a_source_scale_that_is_no_scale_is_refused_in_copying(
    bad: float, fp8: Path, tmp_path: Path
) -> None:
    tensors = load_all(fp8)
    tensors[f"{QKV}_scale_inv"][0, 0] = bad
    source = write_checkpoint(tmp_path / "in", read_config(fp8), tensors)
    with pytest.raises(TensorError, match=f"{QKV}_scale_inv"):
        run(source, tmp_path / "out", "fp8")
    assert not (tmp_path / "out").exists()


# --- what it costs


def test_conversion_and_its_check_import_no_torch(dense: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from qwen35.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'triton', 'bitsandbytes', 'transformers'} & set(sys.modules)\n"
        "print(sorted(heavy)); sys.exit(code)\n"
    )
    arguments = ["convert", str(dense), str(tmp_path / "out"), "--recipe", "fp8", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "Model ready for inference" in done.stdout


def test_memory_stays_below_the_plans_estimate(tmp_path: Path) -> None:
    """A checkpoint of several pieces a weight; the estimate is an upper one."""
    config = tiny_config(layers=4)
    config["text_config"] |= {"hidden_size": 1024, "intermediate_size": 8192}
    config["vision_config"]["out_hidden_size"] = 1024
    source = write_checkpoint(tmp_path / "in", config, random_tensors(config))
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from qwen35.checkpoint.source import open_folder\n"
        "from qwen35.writing.write import write\n"
        "from qwen35.planning.output_plan import make_plan\n"
        "from qwen35.planning.recipe import load_recipe\n"
        "from qwen35.planning.memory import peak_memory\n"
        "plan = make_plan(open_folder(Path(sys.argv[1])), load_recipe('fp8'))\n"
        "write(plan, Path(sys.argv[2]), threads=2)\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "print(peak_memory(plan, 2))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, estimate = map(int, done.stdout.split())  # the first in KiB
    assert peak * 1024 < 1.25 * estimate
    assert estimate < 500_000_000


def test_a_bad_calibration_is_seen_before_anything_is_written(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        make_plan(open_folder(dense), load_recipe("nf4"), scale_choice=ScaleChoice("search"))
    assert layout_of(read_config(dense)).mtp
