"""The figures of llama-perplexity, on files that it wrote; see golden_kld.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_kld import BASE, CANDIDATE, GOLDEN, GOLDEN_FILE, TEXT, make_pair
from qwen35.engines.llama import Llama
from qwen35.evaluation.divergence import PERCENTILES, Comparison, Estimate
from qwen35.evaluation.evaluation_report import EvaluationReport
from qwen35.evaluation.evaluation_run import evaluate
from qwen35.evaluation.kld_file import KldFile, encode

RECORDED = json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = make_pair(tmp_path_factory.mktemp("golden"))
    hashes = {kind: hashlib.sha256(path.read_bytes()).hexdigest() for kind, path in made.items()}
    assert hashes == RECORDED["models"], "other models than recorded: run tests/golden_kld.py"
    return made


def measure(models: dict[str, Path], **asked: Any) -> Comparison:
    """Evaluate the candidate against the base."""
    report: EvaluationReport = evaluate(
        str(models[BASE]), [str(models[CANDIDATE])], threads=1, **asked
    )
    return report.candidates[0].comparison


def rows(found: Comparison) -> Iterator[tuple[str, float, float, list[float]]]:
    """Yield llama-perplexity's name of each figure, unit of its last digit, factor, and ours."""

    def both(figure: Estimate, factor: float = 1.0) -> list[float]:
        return [figure.value * factor, figure.error * factor]

    yield "Mean PPL(Q)", 1e-6, 1, both(found.perplexity)
    yield "Mean PPL(base)", 1e-6, 1, both(found.base_perplexity)
    yield "Cor(ln(PPL(Q)), ln(PPL(base)))", 1e-2, 100, [found.correlation * 100]
    yield "Mean ln(PPL(Q)/PPL(base))", 1e-6, 1, both(found.log_ratio)
    yield "Mean PPL(Q)/PPL(base)", 1e-6, 1, both(found.ratio)
    yield "Mean PPL(Q)-PPL(base)", 1e-6, 1, both(found.difference)
    yield "Mean KLD", 1e-6, 1, both(found.kld)
    yield "Maximum KLD", 1e-6, 1, [found.maximum]
    yield "Minimum KLD", 1e-6, 1, [found.minimum]
    for percent in PERCENTILES:
        name = "Median KLD" if percent == 50 else f"{percent:.1f}% KLD"
        yield name, 1e-6, 1, [found.percentiles[percent]]
    yield "Mean Δp", 1e-3, 100, both(found.change, 100)
    yield "RMS Δp", 1e-3, 100, both(found.change_rms, 100)
    yield "Same top p", 1e-3, 100, both(found.same_top, 100)


def test_the_table_on_the_programs_own_file(models: dict[str, Path]) -> None:
    """The base is in the file, so only the candidate's arithmetic is this machine's."""
    found = measure(models, kld_file=GOLDEN_FILE)
    expected = RECORDED["one chunk"]
    for name, digit, _, values in rows(found):
        assert len(values) == len(expected[name])
        for ours, theirs in zip(values, expected[name], strict=True):
            assert ours == pytest.approx(theirs, abs=2 * digit, rel=2e-5), name
    assert found.kld.block_error is None  # one chunk says nothing of how chunks differ


def test_the_table_without_a_file(models: dict[str, Path]) -> None:
    """The program's base is rounded to 16 bits: half a step of 2.4e-4 nats at most a token."""
    found = measure(models, text=TEXT, chunks=8)
    expected = RECORDED["eight chunks"]
    for name, digit, factor, values in rows(found):
        for ours, theirs in zip(values, expected[name], strict=True):
            tolerance = 2 * digit + 1.3e-4 * (1 if factor == 1 else 0)
            assert ours == pytest.approx(theirs, abs=tolerance, rel=1.3e-4), name
    assert found.kld.value == pytest.approx(expected["Mean KLD"][0], abs=1e-5)
    assert found.kld.block_error is not None


def test_words_of_its_file(models: dict[str, Path]) -> None:
    """We write what it writes, but for what the base's own arithmetic differs in here."""
    file = KldFile(GOLDEN_FILE)
    chunks = file.chunks
    with Llama(models[BASE], context=512) as llama:
        rows = encode(llama.logits(chunks.inputs(0), chunks.first))
    reference = file.chunk(0)
    file.close()
    theirs = np.frombuffer(GOLDEN_FILE.read_bytes()[-rows.nbytes :], "<u2").reshape(rows.shape)
    assert rows.shape == (255, 512 + 4)
    assert reference.nll.shape == (255,)
    far = np.abs(rows[:, 4:].astype(int) - theirs[:, 4:])
    assert far.max() <= 1
    assert (far == 0).mean() > 0.999
    ours, its = (r[:, :4].copy().view("<f4")[:, :2] for r in (rows, theirs))
    assert ours == pytest.approx(its, rel=1e-5)


def test_its_tokens_are_ours(models: dict[str, Path]) -> None:
    file = KldFile(GOLDEN_FILE)
    file.close()
    with Llama(models[BASE], vocabulary_only=True) as llama:
        ids = llama.encode(TEXT.read_text().removesuffix("\n"), special=False)
    assert file.chunks.ids.reshape(-1).tolist() == ids[:512]


def test_a_file_written_here_is_read_here(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "two.kld"
    exact = measure(models, text=TEXT, chunks=2, kld_file=path)
    assert path.stat().st_size == 20 + 4 * 1024 + 2 * 255 * (512 + 4) * 2
    assert list(tmp_path.iterdir()) == [path]
    read = measure(models, text=TEXT, kld_file=path)
    assert read.kld.value == pytest.approx(exact.kld.value, abs=2e-5)
    assert read.kld.value != exact.kld.value
