"""FP8 conversion end to end: what is written, from which sources, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from blocks import decode, encode
from checkpoints import (
    Tensors,
    layout_of,
    make_checkpoint,
    random_tensors,
    tiny_config,
    write_checkpoint,
)
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.cli.old import front_doors
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import InputError, TensorError, UsageError
from qwen35.planning.activations import load_activations
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write
from running import load_all, plan_of, read_config, run

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
DOWN = f"{LAYER}.1.mlp.down_proj.weight"


def same(one: Tensors, other: Tensors) -> bool:
    """Whether two sets of tensors are the same, byte for byte."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(
            one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8)
        )
        for name in one
        if one[name].ndim
    )


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


def statistics(source: Path, folder: Path, *, name: str = "stats.json", seed: int = 3) -> Path:
    """Write statistics of all packed linear layers, as the collector before us names them."""
    generator = torch.Generator().manual_seed(seed)
    table = {}
    for step in plan_of(source, "fp8").steps:
        if step.op == "fp8" and ".experts." not in step.spec.name and step.role.scope == "text":
            values = torch.rand(step.spec.shape[1], generator=generator).pow(6) * 20
            table[step.spec.name] = {"input_channel_max": values.bfloat16().float().tolist()}
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(table))
    return folder / name


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
    monkeypatch.setattr(
        "qwen35.planning.safetensors_files.safetensors_options.MAX_SHARD_BYTES", 300_000
    )
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


# --- statistics of activations


def with_statistics(source: Path, file: Path, mode: Any, out: Path) -> Any:
    plan = make_plan(
        open_folder(source),
        load_recipe("fp8"),
        scale_choice=ScaleChoice(mode, grid_size=9),
        activations=load_activations(file),
    )
    return plan, load_all(write(plan, out).out)


@pytest.mark.parametrize("mode", ["rms", "mse", "search"])
def test_statistics_weigh_the_columns_of_their_weight(
    mode: Any, dense: Path, tmp_path: Path
) -> None:
    file = statistics(dense, tmp_path)
    plan, out = with_statistics(dense, file, mode, tmp_path / "out")
    source, table = load_all(dense), json.loads(file.read_text())
    for name in (QKV, DOWN):
        columns = torch.tensor(table[name]["input_channel_max"])
        codes, scales = encode(source[name], ScaleChoice(mode, grid_size=9), columns)
        assert torch.equal(out[name].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(out[f"{name}_scale_inv"], scales)
    assert any("7 of 32 FP8 weights have no statistics" in note for note in plan.notes)


def with_squares(file: Path) -> dict[str, Any]:
    """Add mean squares, unlike the largest magnitudes, to a file of statistics."""
    table: dict[str, Any] = json.loads(file.read_text())
    for entry in table.values():
        values = entry["input_channel_max"]
        entry["input_channel_mean_square"] = [value**2 for value in reversed(values)]
        entry["tokens"] = 100
    file.write_text(json.dumps({"__metadata__": {"tokens": 100}, **table}))
    return table


@pytest.mark.parametrize(
    ("mode", "key"),
    [
        ("search", "input_channel_mean_square"),
        ("mse", "input_channel_max"),
        ("rms", "input_channel_max"),
    ],
)
def test_search_weighs_by_mean_squares(mode: Any, key: str, dense: Path, tmp_path: Path) -> None:
    file = statistics(dense, tmp_path)
    table = with_squares(file)
    _, out = with_statistics(dense, file, mode, tmp_path / "out")
    source = load_all(dense)
    for name in (QKV, DOWN):
        scales = {
            what: encode(
                source[name], ScaleChoice(mode, grid_size=9), torch.tensor(table[name][what])
            )[1]
            for what in ("input_channel_max", "input_channel_mean_square")
        }
        assert torch.equal(out[f"{name}_scale_inv"], scales.pop(key))
        assert not torch.equal(out[f"{name}_scale_inv"], *scales.values())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0] * 511, "511 mean squares for .*expected 512"),
        ([-1.0] * 512, "negative"),
        ("many", "input_channel_mean_square: a number per column"),
    ],
)
def test_malformed_mean_squares_are_refused(value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    table = {DOWN: {"input_channel_max": [1.0] * 512, "input_channel_mean_square": value}}
    file.write_text(json.dumps(table))
    with pytest.raises(InputError, match=message):
        load_activations(file)


def test_malformed_metadata_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    file.write_text(json.dumps({"__metadata__": 3, DOWN: {"input_channel_max": [1.0] * 512}}))
    with pytest.raises(InputError, match="malformed"):
        load_activations(file)


@pytest.mark.parametrize("mode", ["max", "percentile"])
def test_statistics_are_ignored_with_a_message(mode: Any, dense: Path, tmp_path: Path) -> None:
    file = statistics(dense, tmp_path)
    plan, out = with_statistics(dense, file, mode, tmp_path / "out")
    assert any("stats.json is ignored" in note and mode in note for note in plan.notes)
    bare = make_plan(open_folder(dense), load_recipe("fp8"), scale_choice=ScaleChoice(mode))
    assert same(out, load_all(write(bare, tmp_path / "bare").out))
    assert (
        plan.digest
        == make_plan(
            open_folder(dense), load_recipe("fp8"), scale_choice=ScaleChoice(mode, grid_size=9)
        ).digest
    )


def test_statistics_fit_a_text_only_source_under_either_name(dense: Path, tmp_path: Path) -> None:
    text = run(dense, tmp_path / "text", "text").out
    long = statistics(dense, tmp_path)
    table = json.loads(long.read_text())
    short = tmp_path / "short.json"
    short.write_text(
        json.dumps({n.replace("model.language_model.", "model."): v for n, v in table.items()})
    )
    outs = [
        with_statistics(source, file, "rms", tmp_path / f"out{i}")[1]
        for i, (source, file) in enumerate([(text, long), (text, short), (dense, short)])
    ]
    assert same(outs[0], outs[1])
    assert torch.equal(
        outs[2][f"{DOWN}_scale_inv"],
        outs[0][f"{DOWN}_scale_inv".replace("model.language_model.", "model.")],
    )


def test_manifest_and_digest_tell_how_scales_were_chosen(dense: Path, tmp_path: Path) -> None:
    file = statistics(dense, tmp_path)
    plan, _ = with_statistics(dense, file, "mse", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "qwen35.json").read_text())
    assert manifest["calibration"] == {
        "mode": "mse",
        "rms_factor": 3.0,
        "percentile": 99.9,
        "grid_size": 9,
        "activations": {
            "name": "stats.json",
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        },
    }
    assert manifest["plan"] == plan.digest
    other = statistics(dense, tmp_path / "more", seed=4)
    digests = {plan.digest}
    for activations in (None, load_activations(other)):
        digests.add(
            make_plan(
                open_folder(dense),
                load_recipe("fp8"),
                scale_choice=ScaleChoice("mse", grid_size=9),
                activations=activations,
            ).digest
        )
    assert len(digests) == 3


def test_manifest_of_another_format_has_no_calibration(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "out", "nf4")
    manifest = json.loads((tmp_path / "out" / "qwen35.json").read_text())
    assert manifest["calibration"] is None


def test_statistics_of_another_model_are_refused(dense: Path, tmp_path: Path) -> None:
    wider = make_checkpoint(tmp_path / "wider", layers=8)
    with pytest.raises(InputError, match="statistics of another model"):
        make_plan(
            open_folder(dense),
            load_recipe("fp8"),
            activations=load_activations(statistics(wider, tmp_path)),
        )
    table = {DOWN: {"input_channel_max": [1.0] * 513}}
    (tmp_path / "long.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match="513 columns.*expected 512"):
        make_plan(
            open_folder(dense),
            load_recipe("fp8"),
            activations=load_activations(tmp_path / "long.json"),
        )


def entry(value: object) -> str:
    return json.dumps({DOWN: {"input_channel_max": value}})


MALFORMED = {
    "empty file": "",
    "not JSON": "{",
    "not UTF-8": "\udcff\udcfe{}",
    "a list": "[]",
    "an empty table": "{}",
    "a number": "3",
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep entry": f'{{"{DOWN}": ' + '{"input_channel_max":' * 50_000 + "1" + "}" * 50_001,
    "entry is a list": json.dumps({DOWN: [1.0] * 512}),
    "entry is null": json.dumps({DOWN: None}),
    "no such key": json.dumps({DOWN: {"input_channel_mean": [1.0] * 512}}),
    "no numbers": entry([]),
    "a string": entry("1.0"),
    "strings": entry(["1.0"] * 512),
    "booleans": entry([True] * 512),
    "nested": entry([[1.0]] * 512),
    "null": entry([None] * 512),
    "NaN": entry([math.nan] * 512),
    "infinity": entry([math.inf] + [1.0] * 511),
    "infinity by size": entry([1.0] * 511).replace("1.0]", "1.0, 1e400]"),
    "infinity as float32": entry([1e39] * 512),
    "a huge integer": entry([10**400] * 512),
    "negative": entry([1.0] * 511 + [-1e-9]),
    "unknown weight": json.dumps({"model.layers.0.nothing.weight": {"input_channel_max": [1.0]}}),
    "twice the same": entry([1.0] * 512)[:-1] + ", " + entry([2.0] * 512)[1:],
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_statistics_are_refused_in_a_sentence(
    what: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stats.json"
    file.write_bytes(MALFORMED[what].encode(errors="surrogateescape"))
    arguments = ["convert", str(dense), str(tmp_path / "out"), "--recipe", "fp8", "--quiet"]
    assert main([*arguments, "--activation-stats", str(file)]) == 2
    error = capsys.readouterr().err
    assert "stats.json" in error
    assert len(error) < 500
    assert not (tmp_path / "out").exists()


def test_two_names_of_one_weight_are_refused(tmp_path: Path) -> None:
    pair = (DOWN, DOWN.replace("model.language_model.", "model."))
    file = tmp_path / "stats.json"
    file.write_text(
        json.dumps({n: {"input_channel_max": [float(i)] * 512} for i, n in enumerate(pair)})
    )
    with pytest.raises(InputError, match="twice"):
        load_activations(file)


def test_missing_statistics_are_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_activations(tmp_path / "none.json")
    with pytest.raises(InputError, match="not a file"):
        load_activations(tmp_path)


def test_statistics_are_never_picked_up_by_themselves(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toolkit before reads calib_stats_<size>.json of the working directory."""
    plain = run(dense, tmp_path / "plain", "fp8").hashes
    for name in ("calib_stats_0.8B.json", "calib_stats.json", "calib_stats_0_8b.json"):
        statistics(dense, tmp_path / "cwd", name=name)
    monkeypatch.chdir(tmp_path / "cwd")
    assert run(dense, tmp_path / "out", "fp8").hashes == plain
    code = front_doors.quantize_fp8(
        ["--input_dir", str(dense), "--output_dir", str(tmp_path / "old"), "--skip_verify"]
    )
    assert code == 0
    manifest = json.loads((tmp_path / "old" / "qwen35.json").read_text())
    assert manifest["calibration"]["activations"] is None


# --- the command of the toolkit before


def test_old_command_has_the_documented_flags_and_defaults() -> None:
    import argparse

    from qwen35.cli.old.old_quantize_fp8 import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for name in (
        "input_dir",
        "output_dir",
        "calib_mode",
        "rms_factor",
        "calib_percentile",
        "mse_grid_size",
        "activation_stats",
        "verify_samples",
        "skip_verify",
    ):
        assert {f"--{name}", f"--{name.replace('_', '-')}"} <= flags
    assert "--device" in flags
    parsed = parser.parse_args(["--input_dir", "a", "--output_dir", "b"])
    assert parsed.calib_mode == "rms"
    assert parsed.rms_factor == 3.0
    assert parsed.calib_percentile == 99.9
    assert parsed.mse_grid_size == 50
    assert parsed.activation_stats is None
    assert parsed.verify_samples == 5
    assert parsed.skip_verify is False


def test_old_command_writes_the_conservative_recipe(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert front_doors.quantize_fp8(["--input_dir", str(dense), "--output_dir", str(out)]) in (0, 1)
    text = capsys.readouterr().out
    assert "Calibration         : rms(k=3.0)" in text
    assert "Spot-checked        : 5 " in text
    plan = make_plan(
        open_folder(dense), load_recipe("fp8-conservative"), scale_choice=ScaleChoice("rms")
    )
    expected = write(plan, tmp_path / "expected")
    assert same(load_all(out), load_all(expected.out))
    assert read_config(out) == read_config(tmp_path / "expected")
    assert f"{LAYER}.0.linear_attn.out_proj.weight_scale_inv" not in load_all(out)


@pytest.mark.parametrize("dash", ["_", "-"])
def test_old_command_takes_underscores_and_dashes(dash: str, dense: Path, tmp_path: Path) -> None:
    flags = {
        "input_dir": str(dense),
        "output_dir": str(tmp_path / "out"),
        "calib_mode": "mse",
        "mse_grid_size": "3",
        "rms_factor": "4.0",
        "calib_percentile": "99.5",
        "activation_stats": str(statistics(dense, tmp_path)),
        "verify_samples": "2",
    }
    arguments = [part for n, v in flags.items() for part in (f"--{n.replace('_', dash)}", v)]
    assert front_doors.quantize_fp8([*arguments, "--device", "cpu", f"--skip{dash}verify"]) == 0
    manifest = json.loads((tmp_path / "out" / "qwen35.json").read_text())
    scale_choice = manifest["calibration"]
    assert (scale_choice["mode"], scale_choice["grid_size"]) == ("mse", 3)
    assert (scale_choice["rms_factor"], scale_choice["percentile"]) == (4.0, 99.5)
    assert scale_choice["activations"]["name"] == "stats.json"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rms_factor", "0"], "--rms-factor"),
        (["--rms_factor", "nan"], "--rms-factor"),
        (["--calib_percentile", "101"], "--calib-percentile"),
        (["--mse_grid_size", "0"], "--mse-grid-size"),
        (["--activation_stats", "nowhere.json"], "nowhere.json"),
        (["--device", "tpu"], "--device"),
        (["--device", "cuda:x"], "--device"),
    ],
)
def test_old_command_refuses_nonsense_with_code_two(
    more: list[str],
    words: str,
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--input_dir", str(dense), "--output_dir", str(tmp_path / "out"), *more]
    assert front_doors.quantize_fp8(arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_old_command_refuses_a_missing_folder_and_a_taken_one(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        front_doors.quantize_fp8(["--input_dir", str(tmp_path / "no"), "--output_dir", str(out)])
        == 2
    )
    assert "not a folder" in capsys.readouterr().err
    out.mkdir()
    (out / "mine").write_text("")
    assert front_doors.quantize_fp8(["--input_dir", str(dense), "--output_dir", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert front_doors.quantize_fp8(["--input_dir", str(dense), "--output_dir", str(dense)]) == 2
    with pytest.raises(SystemExit) as caught:
        front_doors.quantize_fp8([])
    assert caught.value.code == 2


def test_calibration_flags_without_an_fp8_recipe_are_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(dense), str(tmp_path / "out"), "--recipe", "nf4"]
    assert main([*arguments, "--calib-mode", "max"]) == 2
    assert "nothing is encoded as FP8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ["--rms-factor", "0"],
        ["--mse-grid-size", "0"],
        ["--calib-percentile", "101"],
        ["--rms-factor", "2.5"],
        ["--mse-grid-size", "20"],
    ],
)
def test_a_parameter_without_its_mode_is_not_ignored(
    more: list[str], dense: Path, tmp_path: Path
) -> None:
    arguments = ["convert", str(dense), str(tmp_path / "out"), "--recipe", "fp8", "--quiet"]
    assert main([*arguments, *more]) == 2


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
