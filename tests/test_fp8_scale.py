"""FP8 weights of a shared or sliced run are checked by those who write them, not afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import random_tensors, tiny_config, write_checkpoint
from qwen35.api.convert_api import convert
from qwen35.api.finalize_api import finalize
from qwen35.cli.main import main
from qwen35.codecs.fp8.codec import Fp8
from qwen35.verification.fp8_report import Fp8Report

Judge = Callable[..., None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(layers=4)
    folder = tmp_path_factory.mktemp("shared") / "in"
    return write_checkpoint(folder, config, random_tensors(config), shards=2)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Fp8Report:
    """What one process finds that checks its output when all is written."""
    out = tmp_path_factory.mktemp("alone") / "out"
    report = convert(source, out, recipe="fp8", threads=1).report
    assert report is not None
    assert sum(report.judged.values()) == 32
    return report


def told(report: Fp8Report | None) -> dict[str, Any]:
    assert report is not None
    return report.to_json()


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weights that this process compares with their source."""
    seen: list[str] = []
    judge = Fp8.judge

    def watching(self: Fp8, *arguments: Any) -> None:
        seen.append(arguments[2].name)
        judge(self, *arguments)

    monkeypatch.setattr(Fp8, "judge", watching)
    return seen


def test_processes_check_what_they_write(
    source: Path, tmp_path: Path, expected: Fp8Report, judged: list[str]
) -> None:
    made = convert(source, tmp_path / "out", recipe="fp8", workers=2)
    assert told(made.report) == told(expected)
    assert judged == []


def test_slices_check_what_they_write_and_finalize_reports_it(
    source: Path, tmp_path: Path, expected: Fp8Report, judged: list[str]
) -> None:
    for part in ((2, 3), (3, 3), (1, 3)):
        before = len(judged)
        assert convert(source, tmp_path / "out", recipe="fp8", slice=part, threads=1).report is None
        assert len(judged) > before
    assert len(judged) == len(set(judged)) == 32
    made = finalize(tmp_path / "out", threads=1)
    assert told(made.report) == told(expected)
    assert len(judged) == 32


def test_a_slice_that_was_complete_is_not_checked_again(
    source: Path, tmp_path: Path, judged: list[str]
) -> None:
    for _ in range(2):
        convert(source, tmp_path / "out", recipe="fp8", slice=(1, 2), threads=1)
    assert len(judged) == len(set(judged)) > 0


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the codes of one weight as zeros: every bit pattern is FP8, and none was meant."""
    pwrite = os.pwrite

    def zeros(descriptor: int, data: Any, offset: int) -> int:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.suffix == ".safetensors" and len(memoryview(data).cast("B")) >= 128 * 128:
            data = bytes(len(memoryview(data).cast("B")))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", zeros)


def test_what_slices_find_is_in_the_report_and_the_exit_code(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "out")
    arguments = ["convert", str(source), out, "--recipe", "fp8", "--threads", "1", "--quiet"]
    with monkeypatch.context() as patch:
        spoil(patch)
        assert main([*arguments, "--slice", "1/2"]) == 0
    assert main([*arguments, "--slice", "2/2"]) == 0
    capsys.readouterr()
    assert main(["finalize", out, "--json", "--quiet"]) == 1
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["verdict"] == "FAIL"


def test_a_check_that_was_left_out_is_left_out(
    source: Path, tmp_path: Path, judged: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    arguments = ["convert", str(source), out, "--recipe", "fp8", "--skip-verify", "--quiet"]
    for part in ("1/2", "2/2"):
        assert main([*arguments, "--slice", part]) == 0
    assert main(["finalize", out]) == 0
    assert "FP8 weights were not checked by the slices: qwen35 verify" in capsys.readouterr().err
    assert judged == []
