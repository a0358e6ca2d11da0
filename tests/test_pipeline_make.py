"""One sweep for all artifacts: the same bytes as one by one, and each of the source read once."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from checkpoints import (
    layout_of,
    make_checkpoint,
    random_tensors,
    tiny_config,
    write_checkpoint,
)
from gguf_models import exact_tensors, make_variant, sidecars, variant_config
from hub_client import files_in
from qwen35.checkpoint.open import fetch
from qwen35.errors import TensorError
from qwen35.execution import window
from qwen35.execution.window import Window
from qwen35.pipeline.make import make_artifacts
from qwen35.pipeline.planned_artifacts import PlannedArtifact, plan_artifacts, source_bytes
from qwen35.pipeline.run_request import ArtifactRequest, RunRequest
from qwen35.progress import Silent
from running import run as converted

GGUF = ArtifactRequest("mix", types=("F16", "BF16", "Q8_0", "Q4_K_M"), name="gguf")
ALL = (
    ArtifactRequest("text-nf4", name="nf4"),
    ArtifactRequest("text", name="text"),
    ArtifactRequest("fp8", name="fp8"),
    ArtifactRequest("nf4", name="vision-nf4"),
    GGUF,
)


class Reads:
    """Counts the bytes of the source that are read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.total = 0

    def __call__(self, descriptor: int, buffers: Any, offset: int) -> int:
        done = _preadv(descriptor, buffers, offset)
        with self.lock:
            self.total += done
        return done


_preadv = os.preadv


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    counting = Reads()
    monkeypatch.setattr("qwen35.checkpoint.source.os.preadv", counting)
    return counting


def planned(
    source: Path, out: Path, wanted: tuple[ArtifactRequest, ...] = ALL
) -> tuple[PlannedArtifact, ...]:
    job = RunRequest(str(source), out, wanted, depth="numbers")
    artifacts, problems = plan_artifacts(fetch(str(source)), job)
    assert problems == ()
    return artifacts


def made(artifacts: tuple[PlannedArtifact, ...], threads: int = 2) -> dict[str, Any]:
    return make_artifacts(artifacts, threads=threads, device="auto", progress=Silent())


@pytest.mark.parametrize(
    "variant", ["dense", "three-to-one", "f16", "moe", "moe-per-expert", "text", "nf4", "fp8"]
)
def test_same_bytes_as_one_by_one_and_each_read_once(
    variant: str, tmp_path: Path, reads: Reads
) -> None:
    wanted: tuple[ArtifactRequest, ...] = ALL
    if variant in ("nf4", "fp8"):
        original = make_variant(tmp_path / "original", "dense")
        source = converted(original, tmp_path / f"Tiny-{variant}", variant).out
        wanted = (ArtifactRequest("text", name="text"), ArtifactRequest("bf16", name="bf16"), GGUF)
    else:
        source = make_variant(tmp_path / "source", variant)
    artifacts = planned(source, tmp_path / "swept", wanted)
    reads.total = 0
    assert made(artifacts) == {}
    assert reads.total == source_bytes(artifacts)
    assert reads.total < sum(artifact.plan.read_bytes for artifact in artifacts)
    if wanted is ALL:
        assert reads.total == sum(w.nbytes for w in artifacts[0].plan.checkpoint.weights)
    for artifact in planned(source, tmp_path / "single", wanted):
        assert made((artifact,)) == {}
        assert files_in(artifact.out) == files_in(tmp_path / "swept" / artifact.name)
    assert sorted(path.name for path in (tmp_path / "swept").iterdir()) == sorted(
        one.name for one in wanted
    )


def test_both_layouts_of_nvfp4_come_from_one_read(tmp_path: Path, reads: Reads) -> None:
    """Packed weights are read again for their largest magnitudes, at most once for both layouts."""
    wanted = (
        ArtifactRequest("nvfp4", name="ours"),
        ArtifactRequest("nvfp4", name="theirs", layout="modelopt"),
    )
    artifacts = planned(make_variant(tmp_path / "source", "dense"), tmp_path / "out", wanted)
    packed = sum(step.read_bytes for step in artifacts[0].plan.steps if step.packing)
    reads.total = 0
    assert made(artifacts) == {}
    assert source_bytes(artifacts) < reads.total <= source_bytes(artifacts) + packed


def test_memory_is_a_few_pieces_however_large_the_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Reads
) -> None:
    """A vocabulary of 40,000 rows is 20 MB of one weight; what is kept of it stays below 5 MB."""
    config = tiny_config(layers=4)
    config["text_config"]["vocab_size"] = 40_000
    tensors = random_tensors(config, layout_of(config))
    source = write_checkpoint(tmp_path / "Tiny-wide", config, tensors)
    kept: list[int] = []
    real = Window.forget

    def watched(self: Window, *arguments: Any) -> None:
        kept.append(self.nbytes)
        real(self, *arguments)

    monkeypatch.setattr(Window, "forget", watched)
    artifacts = planned(source, tmp_path / "out", ALL[:4])
    largest = max(weight.nbytes for weight in artifacts[0].plan.checkpoint.weights)
    assert largest > 20_000_000
    assert made(artifacts, threads=1) == {}
    assert max(kept) < 5_000_000


def test_failure_of_one_leaves_the_others(tmp_path: Path) -> None:
    config = variant_config("dense")
    tensors = exact_tensors(config, layout_of(config), seed=5)
    tensors["model.language_model.embed_tokens.weight"][0, 0] = 1e6
    source = write_checkpoint(tmp_path / "Tiny", config, tensors, sidecars=sidecars())
    errors = made(planned(source, tmp_path / "out"))
    assert list(errors) == ["gguf"]
    assert isinstance(errors["gguf"], TensorError)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["fp8", "nf4", "text", "vision-nf4"]


def test_damaged_weight_fails_those_that_want_it(tmp_path: Path) -> None:
    """NaN in the vision tower: what has none of it is made."""
    config = variant_config("dense")
    tensors = exact_tensors(config, layout_of(config), seed=5)
    tensors["model.visual.blocks.0.mlp.linear_fc1.weight"][0, 0] = float("nan")
    source = write_checkpoint(tmp_path / "Tiny", config, tensors, sidecars=sidecars())
    errors = made(planned(source, tmp_path / "out"))
    assert sorted(errors) == ["fp8", "vision-nf4"]
    assert all("NaN" in str(error) for error in errors.values())
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["gguf", "nf4", "text"]


def test_full_disk_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def full(descriptor: int, data: Any, offset: int) -> int:
        if "fp8" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr("qwen35.sinks.files.os.pwrite", full)
    errors = made(planned(dense, tmp_path / "out", ALL[:3]))
    assert "cannot be written (No space left on device)" in str(errors["fp8"])
    assert sorted(errors) == ["fp8"]
    assert (tmp_path / "out" / "nf4" / "qwen35.json").is_file()


def test_bug_ends_everything_and_leaves_no_output(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("qwen35.codecs.nf4.stored.EncodingNf4.add", broken)
    with pytest.raises(ZeroDivisionError):
        made(planned(dense, tmp_path / "out", ALL[:3]))
    left = [path for path in (tmp_path / "out").glob("*") if not path.name.startswith(".")]
    assert left == []


def test_interrupted_sweep_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Reads
) -> None:
    """What was finished before an interrupt is not read again; the bytes are those of one go."""
    monkeypatch.setattr("qwen35.sinks.tensor_writer.SECONDS", 0.0)
    source = make_checkpoint(tmp_path / "Tiny")
    real = window.advance
    groups: list[int] = []

    def interrupted(*arguments: Any) -> None:
        groups.append(1)
        if len(groups) == 12:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr("qwen35.execution.step_runner.advance", interrupted)
    wanted = ALL[:3]
    with pytest.raises(KeyboardInterrupt):
        made(planned(source, tmp_path / "out", wanted), threads=1)
    first = reads.total
    monkeypatch.setattr("qwen35.execution.step_runner.advance", real)
    artifacts = planned(source, tmp_path / "out", wanted)
    assert made(artifacts) == {}
    assert reads.total < first + source_bytes(artifacts)
    for artifact in planned(source, tmp_path / "single", wanted):
        assert made((artifact,)) == {}
        assert files_in(artifact.out) == files_in(tmp_path / "out" / artifact.name)
