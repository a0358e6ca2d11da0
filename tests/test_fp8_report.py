"""The FP8 report: quiet on clean output, loud on planted faults, right in its advice."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blocks import decode
from checkpoints import Tensors, random_tensors, tiny_config, write_checkpoint
from qwen35.checkpoint.open import describe, fetch
from qwen35.cli.main import main
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.fp8.arrays import encode_rows
from qwen35.codecs.fp8.error_sums import ErrorSums
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import Finding, UsageError
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.bands import BANDS
from qwen35.verification.fp8_display import report_text
from qwen35.verification.fp8_report import Fp8Report, check_fp8
from qwen35.writing.write import write
from running import load_all, run
from watching import Watching, watched_pools

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
UP = f"{LAYER}.3.mlp.up_proj.weight"
DOWN = UP.replace("up_proj", "down_proj")
DEVIATIONS = (0.002, 0.02, 0.2)
MODES = ("max", "search", "mse")


def make_source(folder: Path, deviation: float, *, tails: bool = False) -> Path:
    """Write a small checkpoint whose linear layers have this standard deviation."""
    config = tiny_config(layers=4)
    tensors = random_tensors(config)
    generator = torch.Generator().manual_seed(9)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and min(tensor.shape) >= 128 and "visual" not in name:
            values = torch.randn(tensor.shape, generator=generator)
            if tails:
                chi = torch.randn(4, *tensor.shape, generator=generator).square().sum(0)
                values = values / (chi / 4).sqrt()
            tensors[name] = (values * deviation).bfloat16()
    return write_checkpoint(folder, config, tensors, shards=2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {d: make_source(folder / str(d), d) for d in DEVIATIONS}


@pytest.fixture(scope="module")
def tails(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("tails") / "in", 0.02, tails=True)


def packed(source: Path, out: Path, scale_choice: ScaleChoice) -> Path:
    plan = make_plan(fetch(str(source)), load_recipe("fp8"), scale_choice=scale_choice)
    return write(plan, out, threads=1).out


@pytest.fixture(scope="module")
def outputs(
    sources: dict[float, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[float, str], Path]:
    folder = tmp_path_factory.mktemp("outputs")
    return {
        (d, mode): packed(source, folder / f"{d}-{mode}", ScaleChoice(mode, grid_size=10))  # type: ignore[arg-type]
        for d, source in sources.items()
        for mode in MODES
    }


def report_on(
    out: Path, source: Path, scale_choice: ScaleChoice | None = None, **more: Any
) -> Fp8Report:
    artifact = describe(str(out), lenient=True)
    return check_fp8(artifact, fetch(str(source)), scale_choice or ScaleChoice(), threads=1, **more)


def edited(out: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    """Return a copy of an artifact with other tensors."""
    copy = Path(shutil.copytree(out, folder))
    tensors = load_all(copy)
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "qwen35.json").unlink()
    return copy


# --- clean output passes, at any magnitude


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_clean_output_is_good_at_any_magnitude(
    deviation: float,
    mode: Any,
    sources: dict[float, Path],
    outputs: dict[tuple[float, str], Path],
) -> None:
    report = report_on(outputs[deviation, mode], sources[deviation], ScaleChoice(mode))
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
    sources: dict[float, Path], outputs: dict[tuple[float, str], Path]
) -> None:
    out, source = outputs[0.02, "max"], sources[0.02]
    errors = report_on(out, source).errors[QKV]
    tensors = load_all(out)
    q = decode(tensors[QKV], tensors[f"{QKV}_scale_inv"]).double()
    w = load_all(source)[QKV].double()
    assert math.isclose(errors.mae, float((q - w).abs().mean()), rel_tol=1e-9)
    assert errors.worst == float((q - w).abs().max())
    assert math.isclose(errors.relative_rmse, float((q - w).norm() / w.norm()), rel_tol=1e-9)
    cosine = float((q * w).sum() / q.norm() / w.norm())
    assert math.isclose(errors.cosine, cosine, rel_tol=1e-12)


# --- planted faults


def scales(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        key = f"{QKV}_scale_inv"
        tensors[key] = change(tensors[key]).contiguous()

    return apply


def shuffle(tensors: Tensors) -> None:
    codes = tensors[QKV].view(torch.uint8).flatten()
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    tensors[QKV] = codes[order].reshape(tensors[QKV].shape).view(torch.float8_e4m3fn)


def transpose_codes(tensors: Tensors) -> None:
    tile = tensors[QKV].view(torch.uint8)[:128, :128].clone()
    tensors[QKV].view(torch.uint8)[:128, :128] = tile.T


def swap_tensors(tensors: Tensors) -> None:
    gate = UP.replace("up_proj", "gate_proj")
    for suffix in ("", "_scale_inv"):
        tensors[UP + suffix], tensors[gate + suffix] = tensors[gate + suffix], tensors[UP + suffix]


def one_code(tensors: Tensors) -> None:
    codes = tensors[QKV].view(torch.uint8)
    codes[77, 33] ^= 0x80 if codes[77, 33] & 0x70 else 0x40


FAULTS: dict[str, Callable[[Tensors], None]] = {
    "doubled scales": scales(lambda s: s * 2),
    "halved scales": scales(lambda s: s / 2),
    "one doubled scale": scales(lambda s: s * torch.tensor([[1, 1], [1, 1], [1, 2], [1, 1]])),
    "transposed scales": scales(lambda s: s.T.reshape(s.shape)),
    "scales shifted by a row": scales(lambda s: s.roll(1, 0)),
    "scales shifted by a column": scales(lambda s: s.roll(1, 1)),
    "zeroed scales": scales(torch.zeros_like),
    "scales of one": scales(torch.ones_like),
    "negated scales": scales(torch.neg),
    "scales that are inverses": scales(lambda s: 1 / s),
    "a scale that is NaN": scales(lambda s: s.index_fill(0, torch.tensor([1]), math.nan)),
    "a scale that is infinite": scales(lambda s: s.index_fill(0, torch.tensor([1]), math.inf)),
    "shuffled codes": shuffle,
    "codes of a tile transposed": transpose_codes,
    "two tensors swapped": swap_tensors,
    "one code": one_code,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("deviation", "mode"), [(d, m) for d in DEVIATIONS for m in MODES if m != "mse" or d == 0.02]
)
def test_planted_fault_fails_at_any_magnitude(
    deviation: float,
    fault: str,
    mode: Any,
    sources: dict[float, Path],
    outputs: dict[tuple[float, str], Path],
    tmp_path: Path,
) -> None:
    broken = edited(outputs[deviation, mode], tmp_path / "broken", FAULTS[fault])
    report = report_on(broken, sources[deviation], ScaleChoice(mode))
    assert report.verdict == "FAIL"
    assert QKV in report_text(report) or report.judged["FAIL"]
    if report.judged["FAIL"]:
        failed = {n for n, row in report.to_json()["tensors"].items() if row["band"] == "FAIL"}
        assert failed == ({UP, UP.replace("up_", "gate_")} if "swapped" in fault else {QKV})


@pytest.mark.parametrize("fault", ["doubled", "transposed", "shifted", "zeroed", "shuffled"])
def test_a_faulty_encoder_makes_convert_exit_with_one(
    fault: str,
    sources: dict[float, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(
        values: Any, dtype: str, scale_choice: Any, weights: Any, codes: Any, out: Any
    ) -> bool:
        finite = encode_rows(values, dtype, scale_choice, weights, codes, out)
        if fault == "doubled":
            out += 0x80
        elif fault == "transposed":
            out[:] = out.T.reshape(out.shape)
        elif fault == "shifted":
            out[:] = np.roll(out, 1, 0)
        elif fault == "zeroed":
            out[:] = 0
        else:
            codes[:] = codes[::-1].copy()
        return finite

    monkeypatch.setattr("qwen35.writing.write.kernels_for", lambda *_: ({"fp8": broken},))
    out = tmp_path / "out"
    assert main(["convert", str(sources[0.02]), str(out), "--recipe", "fp8", "--quiet"]) == 1
    text = capsys.readouterr().out
    assert "✘  Outside hard limits. Do not deploy." in text
    assert main(["verify", str(out), "--source", str(sources[0.02]), "--quiet"]) == 1


def test_saturation_fails_where_it_costs_more_than_any_rounding(
    tails: Path, tmp_path: Path
) -> None:
    out = packed(tails, tmp_path / "out", ScaleChoice("rms"))
    report = report_on(out, tails, ScaleChoice("rms"))
    assert report.verdict == "FAIL"
    assert not any(e.misplaced for e in report.errors.values())
    assert all(e.clipped for e in report.errors.values())


def test_a_little_saturation_is_a_warning(sources: dict[float, Path], tmp_path: Path) -> None:
    scale_choice = ScaleChoice("percentile", percentile=99.95)
    out = packed(sources[0.02], tmp_path / "out", scale_choice)
    assert report_on(out, sources[0.02], scale_choice).verdict == "WARN"


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
    sources: dict[float, Path],
    outputs: dict[tuple[float, str], Path],
    tmp_path: Path,
) -> None:
    broken = Path(shutil.copytree(outputs[0.02, "search"], tmp_path / "broken"))
    flip(broken, name)
    report = report_on(broken, sources[0.02], samples=samples)
    assert report.verdict == "FAIL"
    assert [(f.check, f.subject) for f in report.findings] == [("bytes", name)]
    assert "1 bytes differ" in report.findings[0].message
    assert report.identical == report.passthrough - 1


def test_a_dropped_tensor_is_found(
    sources: dict[float, Path], outputs: dict[tuple[float, str], Path], tmp_path: Path
) -> None:
    broken = edited(
        outputs[0.02, "search"], tmp_path / "broken", lambda t: t.pop("mtp.norm.weight")
    )
    report = report_on(broken, sources[0.02])
    assert report.verdict == "FAIL"
    assert any(f.subject == "mtp.norm.weight" for f in report.findings)


# --- samples


def test_a_description_is_refused(sources: dict[float, Path]) -> None:
    with pytest.raises(UsageError) as caught:
        check_fp8(describe("Qwen3.5-0.8B"), fetch(str(sources[0.02])), ScaleChoice())
    assert str(caught.value) == (
        "Qwen3.5-0.8B: only a description, nothing to verify; give a folder or a Hub id"
    )


def test_weights_are_compared_by_as_many_threads_as_asked_for(
    sources: dict[float, Path],
    outputs: dict[tuple[float, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = watched_pools(monkeypatch, "qwen35.verification.numbers_check")
    progress = Watching()
    artifact = describe(str(outputs[0.02, "max"]), lenient=True)
    source = fetch(str(sources[0.02]))
    assert (
        check_fp8(artifact, source, ScaleChoice(), threads=3, progress=progress).verdict == "GOOD"
    )
    assert asked == [3]
    assert progress.done == progress.total == sum(weight.nbytes for weight in artifact.weights)


def test_a_weight_astray_is_told_by_its_band_and_the_rest_by_findings(
    sources: dict[float, Path], outputs: dict[tuple[float, str], Path], tmp_path: Path
) -> None:
    broken = edited(outputs[0.02, "max"], tmp_path / "broken", shuffle)
    flip(broken, "mtp.fc.weight")
    report = report_on(broken, sources[0.02])
    assert [(f.check, f.subject) for f in report.findings] == [("bytes", "mtp.fc.weight")]
    assert report.judged["FAIL"] == 1


def test_a_weight_astray_that_cannot_be_decoded_to_its_end_is_told_twice(
    sources: dict[float, Path],
    outputs: dict[tuple[float, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its band, for the pieces that were compared, and by a finding for the one that was not."""

    def spoil(tensors: Tensors) -> None:
        shuffle(tensors)
        tensors[QKV].view(torch.uint8)[-1, -1] = 0x7F

    monkeypatch.setattr("qwen35.codecs.pieces.PIECE", 1)
    broken = edited(outputs[0.02, "max"], tmp_path / "broken", spoil)
    report = report_on(broken, sources[0.02])
    assert report.errors[QKV].misplaced
    assert [(f.check, f.subject) for f in report.findings] == [("decode", QKV)]


def test_what_was_compared_as_it_was_written_is_not_read_again(
    sources: dict[float, Path], outputs: dict[tuple[float, str], Path], tmp_path: Path
) -> None:
    broken = edited(outputs[0.02, "max"], tmp_path / "broken", shuffle)
    told = WeightComparison(QKV, errors=asdict(ErrorSums(count=4)), judged=True)
    report = report_on(broken, sources[0.02], seen={QKV: told.to_json()})
    assert report.verdict == "GOOD"
    assert report.errors[QKV] == ErrorSums(count=4)
    assert len(report.errors) == 32
    astray = WeightComparison(UP, errors=asdict(ErrorSums(count=4, misplaced=1)), judged=True)
    astray.found("codes", "astray")
    astray.found("decode", "damaged")
    report = report_on(broken, sources[0.02], seen={UP: astray.to_json(), QKV: told.to_json()})
    assert report.judged["FAIL"] == 1
    assert [(f.check, f.subject) for f in report.findings] == [("decode", UP)]


def test_samples_are_drawn_in_each_file_by_a_seed(
    sources: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qwen35.planning.safetensors_files.safetensors_options.MAX_SHARD_BYTES", 1_500_000
    )
    source = sources[0.02]
    out = packed(source, tmp_path / "out", ScaleChoice("max"))
    files = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    first, again = (list(report_on(out, source, samples=2, seed=1).errors) for _ in range(2))
    other = list(report_on(out, source, samples=2, seed=2).errors)
    assert first == again != other
    held = Counter(file for name, file in files.items() if name.endswith("_scale_inv"))
    assert len(held) > 2
    assert Counter(files[name] for name in first) == {f: min(2, n) for f, n in held.items()}


def test_no_samples_is_no_verdict_on_fp8(
    sources: dict[float, Path], outputs: dict[tuple[float, str], Path]
) -> None:
    """The toolkit before prints NaN and calls it ready."""
    report = report_on(outputs[0.02, "max"], sources[0.02], samples=0)
    text = report_text(report)
    assert "nan" not in text
    assert "Spot-checked        : 0 " in text
    assert "✔  No FP8 weight was compared; everything else is as planned." in text.splitlines()
    assert "Model ready" not in text


def test_verification_may_be_skipped(
    sources: dict[float, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(sources[0.02]), "--recipe", "fp8", "--quiet"]
    assert main([*arguments, str(tmp_path / "a"), "--skip-verify"]) == 0
    assert "SUMMARY" not in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "b")]) == 0
    assert "SUMMARY" in capsys.readouterr().out


def test_json_report_is_plain_and_complete(
    sources: dict[float, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(sources[0.02]), str(tmp_path / "out"), "--recipe", "fp8"]
    assert main([*arguments, "--quiet", "--json", "--verify-samples", "3"]) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert (report["verdict"], report["bands"]) == ("GOOD", "derived")
    assert report["checked"] == {"GOOD": 3, "WARN": 0, "FAIL": 0}
    assert set(report["metrics"]) == {m.name for m in BANDS["derived"]}
    assert len(report["tensors"]) == 3


# --- layout of the summary

LINES = [
    r"={64}",
    r"  QUANTIZATION VERIFICATION SUMMARY",
    r"  Calibration         : max",
    r"-{64}",
    r"  Shards processed    : 1  \(0 failed\)",
    r"  FP8 weight tensors  : 32",
    r"  Passthrough tensors : 71  .*",
    r"  Spot-checked        : 32  \(✔ 32 GOOD  ⚠ 0 WARN  ✘ 0 FAIL\)",
    r"-{64}",
    r"  metric          mean value  typical range  +band +hard limit",
    r"  -{63}",
    r"  cosine sim      0\.\d{6}    0\.\d+–\.\.\. +✔ GOOD +≥ 0\.\d+",
    r"  relative RMSE   0\.\d{6} .*✔ GOOD +≤ 0\.\d+",
    r"  mean abs err    0\.\d{6} .*✔ GOOD .*",
    r"  worst RMSE      0\.\d{6} +✔ GOOD +≤ 0\.\d+",
    r"  worst MaxAE     0\.\d{6} .*✔ GOOD .*",
    r"-{64}",
    r"✔  All metrics within typical range. Model ready for inference.",
    r"={64}",
]


def test_summary_has_the_layout_of_the_toolkit_before(
    sources: dict[float, Path], outputs: dict[tuple[float, str], Path]
) -> None:
    text = report_text(report_on(outputs[0.02, "max"], sources[0.02], ScaleChoice("max")))
    lines = text.splitlines()
    for line, pattern in zip(lines, LINES, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_degraded_summary_has_numbered_recommendations(tails: Path, tmp_path: Path) -> None:
    scale_choice = ScaleChoice("percentile", percentile=99)
    out = packed(tails, tmp_path / "out", scale_choice)
    lines = report_text(report_on(out, tails, scale_choice)).splitlines()
    assert lines[2] == "  Calibration         : percentile(p=99)"
    assert "✘  Outside hard limits. Do not deploy." in lines
    at = lines.index("  CALIBRATION RECOMMENDATIONS")
    assert lines[at - 1] == "-" * 64
    assert lines[at + 1].startswith("  1. ")


# --- the whole of it, of errors by hand


def errors(relative: float, *, clipped: int = 0, misplaced: int = 0) -> ErrorSums:
    """Return errors at right angles to four weights of one."""
    return ErrorSums(
        count=4,
        squared=4 * relative**2,
        norm=4.0,
        decoded_norm=4.0 + 4 * relative**2,
        product=4.0,
        absolute=4 * relative,
        magnitude=4.0,
        worst=relative,
        largest=1.0,
        clipped=clipped,
        misplaced=misplaced,
    )


def report_of(mode: Any, found: dict[str, ErrorSums], *findings: Finding, **more: Any) -> Fp8Report:
    return Fp8Report(
        scale_choice=ScaleChoice(mode, **more),
        bands="derived",
        shards=3,
        packed=5,
        passthrough=7,
        identical=6,
        errors=found,
        findings=findings,
    )


SEARCH = "Switch to --calib-mode search: it never saturates and has the least error."
ASTRAY = (
    "Codes and scales do not belong together, or not to this source: convert again from the "
    "original."
)


@pytest.mark.parametrize(
    ("report", "advice"),
    [
        (report_of("max", {UP: errors(0.02)}), []),
        (report_of("max", {}, Finding("bytes", UP, "differ")), []),
        (report_of("max", {UP: errors(0.04)}), [SEARCH]),
        (report_of("search", {UP: errors(0.02), QKV: errors(0.04, misplaced=1)}), [ASTRAY]),
        (
            report_of("rms", {UP: errors(0.02), QKV: errors(0.04, clipped=9)}),
            ["9 weights saturate: raise --rms-factor (now 3) until none does.", SEARCH],
        ),
        (
            report_of("percentile", {UP: errors(0.04, clipped=2), QKV: errors(0.02, clipped=3)}),
            [
                "5 weights saturate: raise --calib-percentile (now 99.9; 100 saturates none).",
                SEARCH,
            ],
        ),
        (report_of("mse", {UP: errors(0.04, clipped=2)}), [SEARCH]),
        (report_of("max", {UP: errors(0.02)}, Finding("bytes", QKV, "differ")), []),
        (
            report_of("search", {UP: errors(0.04), QKV: errors(0.07)}),
            [
                f"Leave the worst, {QKV}, in bf16: --keep linear_attn.in_proj_qkv "
                "--keep linear_attn.in_proj_z"
            ],
        ),
        (
            report_of("search", {UP: errors(0.061), QKV: errors(0.02, clipped=1)}),
            [f"Leave the worst, {UP}, in bf16: --keep mlp.gate_proj --keep mlp.up_proj"],
        ),
        (
            report_of("search", {UP: errors(0.065), QKV: errors(0.064)}),
            [f"Leave the worst, {UP}, in bf16: --keep mlp.gate_proj --keep mlp.up_proj"],
        ),
    ],
)
def test_advice_is_about_what_is_not_good(report: Fp8Report, advice: list[str]) -> None:
    assert list(report.recommendations()) == advice


def test_the_worst_is_in_the_worst_band_first_and_then_by_its_error() -> None:
    """A code astray fails a weight of little error."""
    report = report_of("search", {UP: errors(0.06), QKV: errors(0.01, clipped=0)})
    assert UP in next(report.recommendations())
    documented = replace(report, bands="documented", errors={UP: errors(0.02), QKV: errors(0.03)})
    assert documented.judged == {"FAIL": 2}
    assert QKV in next(documented.recommendations())


def test_the_whole_summary() -> None:
    report = report_of(
        "rms",
        {UP: errors(0.02), QKV: errors(0.05, clipped=9)},
        Finding("hash", "model.safetensors", "changed"),
        Finding("bytes", DOWN, "3 bytes differ from the source"),
        Finding("plan", "model.safetensors", "not in the plan"),
    )
    assert (
        report_text(report)
        == f"""\
{"=" * 64}
  QUANTIZATION VERIFICATION SUMMARY
  Calibration         : rms(k=3.0)
{"-" * 64}
  Shards processed    : 3  (1 failed)
  FP8 weight tensors  : 5
  Passthrough tensors : 7  (6 byte for byte the source's)
  Spot-checked        : 2  (✔ 1 GOOD  ⚠ 1 WARN  ✘ 0 FAIL)
{"-" * 64}
  metric          mean value  typical range   band    hard limit
  {"-" * 63}
  cosine sim      0.999276    0.99955–...     ⚠ WARN  ≥ 0.99805
  relative RMSE   0.035000    0.02–0.03       ⚠ WARN  ≤ 0.0625
  mean abs err    0.035000    2–3% of |w|     ⚠ WARN  ≤ 6.25% of |w|
  worst RMSE      0.050000                    ⚠ WARN  ≤ 0.0625
  worst MaxAE     0.050000    no clipping     ⚠ WARN  no code astray
✘  model.safetensors: changed
✘  {DOWN}: 3 bytes differ from the source
✘  model.safetensors: not in the plan
{"-" * 64}
✘  Outside hard limits. Do not deploy.
{"-" * 64}
  CALIBRATION RECOMMENDATIONS
  1. 9 weights saturate: raise --rms-factor (now 3) until none does.
  2. {SEARCH}
{"=" * 64}"""
    )


def test_the_whole_json() -> None:
    report = report_of("max", {QKV: errors(0.5, misplaced=2)}, Finding("hash", "x", "changed"))
    assert report.to_json() == {
        "calibration": "max",
        "bands": "derived",
        "verdict": "FAIL",
        "shards": 3,
        "fp8": 5,
        "passthrough": 7,
        "passthrough_identical": 6,
        "checked": {"GOOD": 0, "WARN": 0, "FAIL": 1},
        "metrics": {
            "cosine sim": pytest.approx(0.8**0.5),
            "relative RMSE": 0.5,
            "mean abs err": 0.5,
            "worst RMSE": 0.5,
            "worst MaxAE": 0.5,
        },
        "tensors": {
            QKV: {
                "cosine": pytest.approx(0.8**0.5),
                "mae": 0.5,
                "max_ae": 0.5,
                "relative_rmse": 0.5,
                "clipped": 0,
                "misplaced": 2,
                "band": "FAIL",
            }
        },
        "findings": [{"check": "hash", "subject": "x", "message": "changed"}],
        "recommendations": [ASTRAY],
    }
    assert report_of("max", {}).to_json()["metrics"] == {}


def test_metrics_of_zeros_and_of_what_became_of_them() -> None:
    rows = {metric.name: metric for metric in BANDS["derived"]}
    for found, band in ((ErrorSums(count=4), "GOOD"), (ErrorSums(count=4, absolute=1.0), "GOOD")):
        assert rows["mean abs err"].band([found]) == band
    half = ErrorSums(count=4, absolute=0.2, magnitude=8.0)  # 0.05 of weights of 2
    assert rows["mean abs err"].band([half]) == "GOOD"
    assert rows["mean abs err"].band([replace(half, absolute=0.3)]) == "WARN"
    assert rows["mean abs err"].band([replace(half, absolute=0.6)]) == "FAIL"
    pair = [errors(0.01), errors(0.08)]
    assert rows["worst RMSE"].band(pair) == "FAIL"
    assert rows["relative RMSE"].band(pair) == "WARN"
    astray = {1: "WARN", 2: "FAIL"}
    for misplaced, clipped, worst in ((0, 0, 0), (0, 7, 1), (3, 0, 2), (1, 1, 2)):
        found = errors(0.01, clipped=clipped, misplaced=misplaced)
        assert rows["worst MaxAE"].band([found]) == astray.get(worst, "GOOD")


# --- documented bands


def test_documented_bands_are_those_of_the_document() -> None:
    rows = {m.name: (m.good, m.limit) for m in BANDS["documented"]}
    assert rows == {
        "cosine sim": (0.9997, 0.9995),
        "mean abs err": (0.0008, 0.001),
        "worst MAE": (0.0008, 0.001),
        "worst MaxAE": (0.01, 0.02),
    }


def test_documented_bands_judge_by_magnitude(
    sources: dict[float, Path], outputs: dict[tuple[float, str], Path]
) -> None:
    """So the same quantizer passes and fails; E4M3 reaches no cosine of 0.9997."""
    verdicts = {}
    for deviation in DEVIATIONS:
        out = outputs[deviation, "max"]
        report = report_on(out, sources[deviation], ScaleChoice("max"), bands="documented")
        verdicts[deviation] = report.verdict
        cosine = report.metrics[0]
        assert 0.9995 < report.value(cosine) < 0.9997
        assert cosine.band(report.errors.values()) == "WARN"
    assert verdicts == {0.002: "WARN", 0.02: "WARN", 0.2: "FAIL"}


def test_exit_code_follows_the_bands_asked_for(
    sources: dict[float, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", "fp8", "--quiet", "--calib-mode", "max", "--bands", "documented"]
    warn = ["convert", str(sources[0.02]), str(tmp_path / "a"), *arguments]
    assert main(warn) == 0
    assert "⚠  Metrics within hard limits" in capsys.readouterr().out
    fail = ["convert", str(sources[0.2]), str(tmp_path / "b"), *arguments]
    assert main(fail) == 1
    text = capsys.readouterr().out
    assert "worst MAE" in text
    assert re.search(r"worst MaxAE .*✘ FAIL", text)


# --- recommendations: following each improves what it speaks of


def advice(report: Fp8Report) -> str:
    return "\n".join(report.recommendations())


def better(before: Fp8Report, after: Fp8Report, *names: str) -> None:
    """Check that every metric that was not good, or those named, is better now."""
    for metric in before.metrics:
        if metric.name in names or (not names and metric.band(before.errors.values()) != "GOOD"):
            one, two = before.value(metric), after.value(metric)
            assert two > one if metric.rises else two < one, (metric.name, one, two)


def follow(
    source: Path, folder: Path, scale_choice: ScaleChoice, *keep: str, **more: Any
) -> Fp8Report:
    recipe = load_recipe("fp8").keeping(keep)
    plan = make_plan(fetch(str(source)), recipe, scale_choice=scale_choice)
    return report_on(write(plan, folder, threads=1).out, source, scale_choice, **more)


@pytest.mark.parametrize("bands", ["derived", "documented"])
def test_advice_to_raise_the_rms_factor_is_right(bands: Any, tails: Path, tmp_path: Path) -> None:
    before = follow(tails, tmp_path / "a", ScaleChoice("rms"), bands=bands)
    assert re.search(r"raise --rms-factor \(now 3\)", advice(before))
    after = follow(tails, tmp_path / "b", ScaleChoice("rms", rms_factor=6.0), bands=bands)
    better(before, after)
    best = follow(tails, tmp_path / "c", ScaleChoice("rms", rms_factor=60.0), bands=bands)
    assert "--rms-factor" not in advice(best)


@pytest.mark.parametrize("bands", ["derived", "documented"])
def test_advice_to_raise_the_percentile_is_right(bands: Any, tails: Path, tmp_path: Path) -> None:
    before = follow(tails, tmp_path / "a", ScaleChoice("percentile", percentile=99), bands=bands)
    assert re.search(r"raise --calib-percentile \(now 99", advice(before))
    after = follow(tails, tmp_path / "b", ScaleChoice("percentile"), bands=bands)
    better(before, after)
    best = follow(tails, tmp_path / "c", ScaleChoice("percentile", percentile=100), bands=bands)
    assert "--calib-percentile" not in advice(best)


@pytest.mark.parametrize("bands", ["derived", "documented"])
@pytest.mark.parametrize(
    "scale_choice",
    [
        ScaleChoice("rms"),
        ScaleChoice("percentile", percentile=99),
        ScaleChoice("max"),
        ScaleChoice("mse", grid_size=10),
        ScaleChoice("rms", rms_factor=128),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["tails", "large"])
def test_advice_to_switch_to_search_is_right(
    kind: str,
    scale_choice: ScaleChoice,
    bands: Any,
    tails: Path,
    sources: dict[float, Path],
    tmp_path: Path,
) -> None:
    source = tails if kind == "tails" else sources[0.2]
    before = follow(source, tmp_path / "a", scale_choice, bands=bands)
    if before.verdict == "GOOD":
        assert advice(before) == ""
        return
    assert "--calib-mode search" in advice(before)
    after = follow(source, tmp_path / "b", ScaleChoice("search"), bands=bands)
    better(before, after, "cosine sim", "mean abs err", "relative RMSE")


@pytest.mark.parametrize(
    "where",
    [
        UP,
        QKV,
        f"{LAYER}.3.self_attn.v_proj.weight",
        f"{LAYER}.3.self_attn.o_proj.weight",
        "mtp.layers.0.self_attn.k_proj.weight",
        "mtp.layers.0.mlp.down_proj.weight",
    ],
)
def test_advice_to_keep_the_worst_can_be_followed_and_helps(where: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", 0.02)
    tensors = load_all(source)
    tensors[where] = (tensors[where].float() * 20).bfloat16()
    large = write_checkpoint(tmp_path / "large", tiny_config(layers=4), tensors)
    before = follow(large, tmp_path / "a", ScaleChoice(), bands="documented")
    assert before.verdict == "FAIL"
    assert where in advice(before)
    keep = re.findall(r"--keep (\S+)", advice(before))
    assert keep
    after = follow(large, tmp_path / "b", ScaleChoice(), *keep, bands="documented")
    assert where not in after.errors
    better(before, after, "worst MAE", "worst MaxAE")


def test_advice_to_keep_experts_can_be_followed(moe: Path, tmp_path: Path) -> None:
    tensors = load_all(moe)
    tensors[f"{LAYER}.1.mlp.experts.down_proj"] *= 20
    config = json.loads((moe / "config.json").read_text())
    large = write_checkpoint(tmp_path / "large", config, tensors)
    before = follow(large, tmp_path / "a", ScaleChoice(), bands="documented")
    keep = re.findall(r"--keep (\S+)", advice(before))
    assert keep == ["mlp.experts"]
    after = follow(large, tmp_path / "b", ScaleChoice(), *keep, bands="documented")
    better(before, after, "worst MAE", "worst MaxAE")


def test_advice_to_convert_again_is_right(
    sources: dict[float, Path], outputs: dict[tuple[float, str], Path], tmp_path: Path
) -> None:
    broken = edited(outputs[0.02, "max"], tmp_path / "broken", FAULTS["doubled scales"])
    before = report_on(broken, sources[0.02], ScaleChoice("max"))
    assert advice(before).startswith("Codes and scales do not belong together")
    assert len(list(before.recommendations())) == 1
    after = follow(sources[0.02], tmp_path / "again", ScaleChoice("max"))
    better(before, after, "relative RMSE", "mean abs err", "worst RMSE", "worst MaxAE")
    assert after.verdict == "GOOD"


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
