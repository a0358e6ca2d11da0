"""FP8 conversion with statistics of activations."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from blocks import encode
from checkpoints import make_checkpoint
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.cli.old import front_doors
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import InputError
from qwen35.planning.activations import load_activations
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write
from running import load_all, run, same, statistics

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
DOWN = f"{LAYER}.1.mlp.down_proj.weight"


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
