"""The FP8 report: good on clean output, and what of it is compared."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from blocks import decode
from checkpoints import Tensors, write_checkpoint
from fp8_reports import DEVIATIONS, FAULTS, MODES, edited, packed, report_on, shuffle
from qwen35.checkpoint.open import describe, fetch
from qwen35.cli.main import main
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.fp8.error_sums import ErrorSums
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import UsageError
from qwen35.verification.fp8_display import report_text
from qwen35.verification.fp8_report import check_fp8
from running import limit_shards, load_all, run
from watching import Watching, watched_pools

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
UP = f"{LAYER}.3.mlp.up_proj.weight"


# --- clean output passes, at any magnitude


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_clean_output_is_good_at_any_magnitude(
    deviation: float,
    mode: Any,
    fp8_sources: dict[float, Path],
    fp8_outputs: dict[tuple[float, str], Path],
) -> None:
    report = report_on(fp8_outputs[deviation, mode], fp8_sources[deviation], ScaleChoice(mode))
    assert report.verdict == ("WARN" if mode == "mse" else "GOOD")
    assert sum(report.judged.values()) == 32
    assert report.identical == report.passthrough == 103 - 32
    for metric in report.metrics[:-1]:
        assert metric.band(report.errors.values()) == "GOOD"
    if mode == "mse":  # which saturates by design
        assert list(report.recommendations()) == [
            "Switch to --calib-mode search: it never saturates and has the least error."
        ]
    else:
        assert list(report.recommendations()) == []


def test_metrics_are_those_of_the_decoded_weights(
    fp8_sources: dict[float, Path], fp8_outputs: dict[tuple[float, str], Path]
) -> None:
    out, source = fp8_outputs[0.02, "max"], fp8_sources[0.02]
    errors = report_on(out, source).errors[QKV]
    tensors = load_all(out)
    q = decode(tensors[QKV], tensors[f"{QKV}_scale_inv"]).double()
    w = load_all(source)[QKV].double()
    assert math.isclose(errors.mae, float((q - w).abs().mean()), rel_tol=1e-9)
    assert errors.worst == float((q - w).abs().max())
    assert math.isclose(errors.relative_rmse, float((q - w).norm() / w.norm()), rel_tol=1e-9)
    cosine = float((q * w).sum() / q.norm() / w.norm())
    assert math.isclose(errors.cosine, cosine, rel_tol=1e-12)


# --- passthrough


def flip(out: Path, name: str, byte: int = 5) -> None:
    """Flip a bit in the stored bytes of a tensor."""
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[8 + length + begin + byte] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("samples", [None, 1, 0])
@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.embed_tokens.weight",
        f"{LAYER}.1.linear_attn.A_log",
        "model.visual.blocks.1.attn.qkv.bias",
        "mtp.fc.weight",
    ],
)
def test_a_flipped_bit_outside_fp8_is_found_whatever_is_sampled(
    name: str,
    samples: int | None,
    fp8_sources: dict[float, Path],
    fp8_outputs: dict[tuple[float, str], Path],
    tmp_path: Path,
) -> None:
    broken = Path(shutil.copytree(fp8_outputs[0.02, "search"], tmp_path / "broken"))
    flip(broken, name)
    report = report_on(broken, fp8_sources[0.02], samples=samples)
    assert report.verdict == "FAIL"
    assert [(f.check, f.subject) for f in report.findings] == [("bytes", name)]
    assert "1 bytes differ" in report.findings[0].message
    assert report.identical == report.passthrough - 1


def test_a_dropped_tensor_is_found(
    fp8_sources: dict[float, Path], fp8_outputs: dict[tuple[float, str], Path], tmp_path: Path
) -> None:
    broken = edited(
        fp8_outputs[0.02, "search"], tmp_path / "broken", lambda t: t.pop("mtp.norm.weight")
    )
    report = report_on(broken, fp8_sources[0.02])
    assert report.verdict == "FAIL"
    assert any(f.subject == "mtp.norm.weight" for f in report.findings)


# --- samples


def test_a_description_is_refused(fp8_sources: dict[float, Path]) -> None:
    with pytest.raises(UsageError) as caught:
        check_fp8(describe("Qwen3.5-0.8B"), fetch(str(fp8_sources[0.02])), ScaleChoice())
    assert str(caught.value) == (
        "Qwen3.5-0.8B: only a description, nothing to verify; give a folder or a Hub id"
    )


def test_weights_are_compared_by_as_many_threads_as_asked_for(
    fp8_sources: dict[float, Path],
    fp8_outputs: dict[tuple[float, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = watched_pools(monkeypatch, "qwen35.verification.numbers_check")
    progress = Watching()
    artifact = describe(str(fp8_outputs[0.02, "max"]), lenient=True)
    source = fetch(str(fp8_sources[0.02]))
    assert (
        check_fp8(artifact, source, ScaleChoice(), threads=3, progress=progress).verdict == "GOOD"
    )
    assert asked == [3]
    assert progress.done == progress.total == sum(weight.nbytes for weight in artifact.weights)


def test_a_weight_astray_is_told_by_its_band_and_the_rest_by_findings(
    fp8_sources: dict[float, Path], fp8_outputs: dict[tuple[float, str], Path], tmp_path: Path
) -> None:
    broken = edited(fp8_outputs[0.02, "max"], tmp_path / "broken", shuffle)
    flip(broken, "mtp.fc.weight")
    report = report_on(broken, fp8_sources[0.02])
    assert [(f.check, f.subject) for f in report.findings] == [("bytes", "mtp.fc.weight")]
    assert report.judged["FAIL"] == 1


def test_a_weight_astray_that_cannot_be_decoded_to_its_end_is_told_twice(
    fp8_sources: dict[float, Path],
    fp8_outputs: dict[tuple[float, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its band, for the pieces that were compared, and by a finding for the one that was not."""

    def spoil(tensors: Tensors) -> None:
        shuffle(tensors)
        tensors[QKV].view(torch.uint8)[-1, -1] = 0x7F

    monkeypatch.setattr("qwen35.codecs.pieces.PIECE", 1)
    broken = edited(fp8_outputs[0.02, "max"], tmp_path / "broken", spoil)
    report = report_on(broken, fp8_sources[0.02])
    assert report.errors[QKV].misplaced
    assert [(f.check, f.subject) for f in report.findings] == [("decode", QKV)]


def test_what_was_compared_as_it_was_written_is_not_read_again(
    fp8_sources: dict[float, Path], fp8_outputs: dict[tuple[float, str], Path], tmp_path: Path
) -> None:
    broken = edited(fp8_outputs[0.02, "max"], tmp_path / "broken", shuffle)
    told = WeightComparison(QKV, errors=asdict(ErrorSums(count=4)), judged=True)
    report = report_on(broken, fp8_sources[0.02], seen={QKV: told.to_json()})
    assert report.verdict == "GOOD"
    assert report.errors[QKV] == ErrorSums(count=4)
    assert len(report.errors) == 32
    astray = WeightComparison(UP, errors=asdict(ErrorSums(count=4, misplaced=1)), judged=True)
    astray.found("codes", "astray")
    astray.found("decode", "damaged")
    report = report_on(broken, fp8_sources[0.02], seen={UP: astray.to_json(), QKV: told.to_json()})
    assert report.judged["FAIL"] == 1
    assert [(f.check, f.subject) for f in report.findings] == [("decode", UP)]


def test_samples_are_drawn_in_each_file_by_a_seed(
    fp8_sources: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_shards(monkeypatch, 1_500_000)
    source = fp8_sources[0.02]
    out = packed(source, tmp_path / "out", ScaleChoice("max"))
    files = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    first, again = (list(report_on(out, source, samples=2, seed=1).errors) for _ in range(2))
    other = list(report_on(out, source, samples=2, seed=2).errors)
    assert first == again != other
    held = Counter(file for name, file in files.items() if name.endswith("_scale_inv"))
    assert len(held) > 2
    assert Counter(files[name] for name in first) == {f: min(2, n) for f, n in held.items()}


def test_no_samples_is_no_verdict_on_fp8(
    fp8_sources: dict[float, Path], fp8_outputs: dict[tuple[float, str], Path]
) -> None:
    """The toolkit before prints NaN and calls it ready."""
    report = report_on(fp8_outputs[0.02, "max"], fp8_sources[0.02], samples=0)
    text = report_text(report)
    assert "nan" not in text
    assert "Spot-checked        : 0 " in text
    assert "✔  No FP8 weight was compared; everything else is as planned." in text.splitlines()
    assert "Model ready" not in text


def test_verification_may_be_skipped(
    fp8_sources: dict[float, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(fp8_sources[0.02]), "--recipe", "fp8", "--quiet"]
    assert main([*arguments, str(tmp_path / "a"), "--skip-verify"]) == 0
    assert "SUMMARY" not in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "b")]) == 0
    assert "SUMMARY" in capsys.readouterr().out


# --- packed sources


@pytest.mark.parametrize("recipe", ["fp8", "fp8-conservative", "text-fp8", "text-fp8-conservative"])
@pytest.mark.parametrize("source", ["dense", "moe", "moe_per_expert"])
def test_all_recipes_report_good(
    recipe: str, source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(source)
    out = run(folder, tmp_path / "out", recipe).out
    report = report_on(out, folder)
    assert report.verdict == "GOOD"
    assert report.findings == []
    assert len(report.errors) == report.packed > 10


def test_an_nf4_source_is_compared_with_what_it_decodes_to(dense: Path, tmp_path: Path) -> None:
    nf4 = run(dense, tmp_path / "nf4", "nf4").out
    report = report_on(run(nf4, tmp_path / "out", "fp8").out, nf4)
    assert report.verdict == "GOOD"
    assert len(report.errors) == 32


def test_a_source_that_is_fp8_in_part_is_counted_once(dense: Path, tmp_path: Path) -> None:
    full = load_all(run(dense, tmp_path / "full", "fp8").out)
    tensors = load_all(dense)
    for name in [n.removesuffix("_scale_inv") for n in full if n.endswith("_scale_inv")]:
        if ".mlp." not in name:
            tensors |= {name + suffix: full[name + suffix] for suffix in ("", "_scale_inv")}
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    source = write_checkpoint(tmp_path / "in", config, tensors)
    report = report_on(run(source, tmp_path / "out", "fp8").out, source)
    assert (report.verdict, report.packed, len(report.errors)) == ("GOOD", 32, 15)
    assert report.identical == report.passthrough == 71
    out = edited(tmp_path / "out", tmp_path / "broken", FAULTS["one code"])  # a copied weight
    broken = report_on(out, source)
    assert broken.verdict == "FAIL"
    assert [f.subject for f in broken.findings] == [QKV]


def test_a_weight_of_zeros_is_good(dense: Path, tmp_path: Path) -> None:
    tensors = load_all(dense)
    tensors[QKV] = torch.zeros_like(tensors[QKV])
    config = json.loads((dense / "config.json").read_text())
    source = write_checkpoint(tmp_path / "in", config, tensors)
    report = report_on(run(source, tmp_path / "out", "fp8").out, source)
    assert report.verdict == "GOOD"
    assert (report.errors[QKV].relative_rmse, report.errors[QKV].cosine) == (0, 1)
    json.dumps(report.to_json(), allow_nan=False)

    def plant(made: Tensors) -> None:
        made[QKV].view(torch.uint8)[3, 3] = 0x38

    broken = report_on(edited(tmp_path / "out", tmp_path / "broken", plant), source)
    assert broken.verdict == "FAIL"
