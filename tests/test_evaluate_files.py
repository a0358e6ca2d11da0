"""The files of a base: llama-perplexity's and the compact one. Sizes, bounds, damage."""

from __future__ import annotations

import os
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import ASSET
from evaluating import gguf, measure
from qwen35.engines.llama import Llama
from qwen35.errors import InputError, OutputError
from qwen35.evaluation.cache import (
    RATIO,
    REST,
    CacheFile,
    CacheWriter,
    cache_head,
    compact,
    most_kept,
    pack,
    unpack,
)
from qwen35.evaluation.chunk_sweep import check_state
from qwen35.evaluation.evaluation_job import EvaluationRequest, prepare
from qwen35.evaluation.kld_file import KldFile, KldWriter, encode, kld_file_size
from qwen35.evaluation.records import RecordFile
from qwen35.evaluation.reference import ExactReference
from qwen35.evaluation.text_chunks import TokenChunks

F32 = npt.NDArray[np.float32]

ROUNDING = 2e-6
"""What storing float32 log probabilities down to -40 can do to a divergence."""


def peaked(rows: int, width: int, slope: float, seed: int) -> F32:
    """Logits that fall with the logarithm of a token's rank, as those of language models do."""
    generator = np.random.default_rng(seed)
    falling = -slope * np.log(np.arange(1, width + 1))
    found = [generator.permutation(falling) for _ in range(rows)]
    return (np.stack(found) + generator.normal(0, 0.3, (rows, width))).astype(np.float32)


def near(logits: F32, seed: int, far: float = 0.15) -> F32:
    noise = np.random.default_rng(seed).normal(0, far, logits.shape)
    return (logits + noise).astype(np.float32)


def exact_of(logits: F32) -> tuple[ExactReference, npt.NDArray[np.int64]]:
    targets = np.arange(len(logits)) * 7 % logits.shape[1]
    return ExactReference(logits, targets, 1), targets


def row_bytes(width: int) -> int:
    return 2 * (2 * ((width + 1) // 2) + 4)


@pytest.mark.parametrize("slope", [0.5, 1.0, 1.6, 2.5])
def test_fifty_times_smaller_at_the_published_vocabulary(slope: float) -> None:
    """However flat the logits are; and no divergence is off by more than its bound says."""
    width, rows = 248_320, 12
    logits = peaked(rows, width, slope, seed=int(slope * 10))
    exact, targets = exact_of(logits)
    data = pack(compact(exact))
    assert len(data) * RATIO <= rows * row_bytes(width)
    candidate = near(logits, seed=1)
    true = exact.against(candidate, targets, 1)
    found = unpack(data, rows, width).against(candidate, targets, 1)
    assert found.bound is not None
    missing = true.kld - found.kld
    assert (missing >= -ROUNDING).all()
    assert (missing <= found.bound + ROUNDING).all()
    assert found.nll == pytest.approx(true.nll)
    assert found.top.tolist() == true.top.tolist()
    if slope == 2.5:  # as peaked as a trained model's: the bound is small too
        assert found.bound.mean() < 1e-3
        assert missing.mean() < 1e-5


@given(
    st.integers(520, 1200), st.floats(0, 4), st.floats(0, 6), st.integers(0, 2**32 - 1)
)  # fmt: skip
@settings(max_examples=60)
def test_the_bound_holds_for_any_pair(width: int, slope: float, far: float, seed: int) -> None:
    logits = peaked(3, width, slope, seed)
    exact, targets = exact_of(logits)
    candidate = near(logits, seed + 1, far)
    true = exact.against(candidate, targets, 1)
    found = compact(exact).against(candidate, targets, 1)
    assert found.bound is not None
    missing = true.kld - found.kld
    assert (missing >= -ROUNDING).all()
    assert (missing <= found.bound + ROUNDING).all()


def test_the_bound_is_reached() -> None:
    """All that is not kept lies on the candidate's least likely token: nothing is to be gained."""
    width = 4096
    logits = np.full((1, width), -50, np.float32)
    logits[0, : most_kept(width)] = 0
    logits[0, -1] = -0.5
    candidate = logits.copy()
    candidate[0, -1] = -60
    exact, targets = exact_of(logits)
    true = exact.against(candidate, targets, 1)
    found = compact(exact).against(candidate, targets, 1)
    assert found.bound is not None
    assert true.kld[0] - found.kld[0] == pytest.approx(found.bound[0], rel=1e-3)
    assert found.bound[0] > 1e-3


def test_packing_loses_nothing() -> None:
    exact, _ = exact_of(peaked(5, 3000, 1.5, seed=2))
    before = compact(exact)
    after = unpack(pack(before), 5, 3000)
    assert after.starts.tolist() == before.starts.tolist()
    assert after.ids.tolist() == before.ids.tolist()
    assert after.kept.tobytes() == before.kept.tobytes()
    assert after.top.tolist() == before.top.tolist()
    for name in ("nll", "rest", "inner"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-6)
    for i, (start, end) in enumerate(zip(before.starts, before.starts[1:], strict=False)):
        row, ids = exact.logits[i], before.ids[start:end].astype(int)
        assert (np.diff(ids) > 0).all()
        assert row[ids].min() >= np.delete(row, ids).max()


def test_no_more_is_kept_than_needed() -> None:
    logits = np.full((1, 5000), -30, np.float32)
    logits[0, [3, 4000]] = 5, 4
    kept = compact(exact_of(logits)[0])
    assert kept.ids.tolist() == [3, 4000]
    assert kept.rest[0] < REST


def test_the_cache_on_the_embedded_checkpoint(formats: Path, tmp_path: Path) -> None:
    base, candidate = gguf(formats, "F16"), gguf(formats, "Q4_K_M")
    path = tmp_path / "reference"
    exact = measure(formats, base, candidate, cache=path).candidates[0].comparison
    cached = measure(formats, base, candidate, cache=path)
    found = cached.candidates[0].comparison
    assert exact.bound == 0 < found.bound
    assert found.kld.value - ROUNDING <= exact.kld.value <= found.kld.value + found.bound + ROUNDING
    assert found.perplexity == exact.perplexity
    assert found.base_perplexity.value == pytest.approx(exact.base_perplexity.value, rel=1e-6)
    assert found.same_top == exact.same_top
    assert cached.reference == "compact file"
    columns = cached.to_json()["table"]["rows"]
    assert columns[1][0] == "Mean KLD, higher by at most"
    chunks = prepare(EvaluationRequest(base, text=formats / "text.txt", chunks=2)).chunks
    assert path.stat().st_size * 3 < kld_file_size(chunks, 4096)  # 512 tokens of 4096 are kept
    assert found.kld.value > 0.9 * exact.kld.value


def test_the_embedded_checkpoints_logits_at_the_published_vocabulary(formats: Path) -> None:
    """Its real distributions among tokens that are all but impossible, as most of so many are."""
    chunks = prepare(EvaluationRequest(gguf(formats, "F16"), text=formats / "text.txt")).chunks
    rows = []
    for kind in ("F16", "Q4_K_M"):
        with Llama(Path(gguf(formats, kind)), context=512) as llama:
            rows.append(llama.logits(chunks.inputs(0), chunks.first)[::16])
    generator = np.random.default_rng(4)
    share = generator.normal(-30, 1, (248_320 - 4096)).astype(np.float32)
    wide = [np.hstack([r, r.max(axis=1, keepdims=True) + share]) for r in rows]
    exact, targets = exact_of(wide[0])
    data = pack(compact(exact))
    assert len(data) * RATIO <= len(wide[0]) * row_bytes(248_320)
    true = exact.against(wide[1], targets, 1)
    found = unpack(data, len(wide[0]), 248_320).against(wide[1], targets, 1)
    assert found.bound is not None
    missing = true.kld - found.kld
    assert (missing >= -ROUNDING).all()
    assert (missing <= found.bound + ROUNDING).all()
    assert missing.mean() < 0.05 * true.kld.mean()


def small_chunks() -> TokenChunks:
    return TokenChunks(np.arange(64, dtype=np.int32).reshape(4, 16))


def write_all(writer: Any, width: int, chunks: TokenChunks) -> list[ExactReference]:
    """Write every chunk; return what was written."""
    assert writer.resume(0) == 0
    written = []
    for i in range(chunks.count):
        targets = chunks.targets(i)
        written.append(ExactReference(peaked(chunks.scored, width, 2, i), targets, 1))
        writer.add(written[-1])
    writer.finish()
    return written


@pytest.mark.parametrize("width", [100, 101])
def test_sixteen_bits_are_half_a_step_off_at_most(width: int, tmp_path: Path) -> None:
    chunks, path = small_chunks(), tmp_path / "x.kld"
    written = write_all(KldWriter(path, chunks, width), width, chunks)
    assert path.stat().st_size == kld_file_size(chunks, width)
    file = KldFile(path)
    assert file.chunks.ids.tolist() == chunks.ids.tolist()
    for i, exact in enumerate(written):
        found = file.chunk(i)
        assert found.nll == pytest.approx(exact.nll, abs=16 / 65535 / 2 + 1e-5)
        assert found.top.tolist() == exact.top.tolist()
    file.close()


def test_flat_rows_have_no_scale() -> None:
    rows = encode(np.full((2, 10), 3, np.float32))
    assert (rows[:, 4:] == 0).all()
    assert rows[:, :4].copy().view("<f4")[:, :2] == pytest.approx(
        np.array([[0, -np.log(10)]] * 2), abs=1e-6
    )


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "magic": lambda d: b"x" + d[1:],
    "context": lambda d: d[:8] + b"\xff\xff\xff\xff" + d[12:],
    "vocabulary": lambda d: d[:12] + b"\xff\xff\xff\xff" + d[16:],
    "chunks": lambda d: d[:16] + b"\x05" + d[17:],
    "token": lambda d: d[:20] + b"\xff\xff\xff\x7f" + d[24:],
    "short": lambda d: d[:-1],
    "long": lambda d: d + b"\0",
    "empty": lambda d: b"",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_of_llama_perplexity(name: str, tmp_path: Path) -> None:
    chunks, path = small_chunks(), tmp_path / "x.kld"
    write_all(KldWriter(path, chunks, 100), 100, chunks)
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    with pytest.raises(InputError, match=r"x\.kld"):
        KldFile(path)


def test_rows_that_are_not_finite(tmp_path: Path) -> None:
    chunks, path = small_chunks(), tmp_path / "x.kld"
    write_all(KldWriter(path, chunks, 100), 100, chunks)
    data = bytearray(path.read_bytes())
    data[20 + 64 * 4 : 20 + 64 * 4 + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    file = KldFile(path)
    with pytest.raises(InputError, match="not finite in chunk 1"):
        file.chunk(0)
    file.close()


def test_results_of_another_run_are_dropped_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "results"
    for head in ({"of": 1}, {"of": 2}):
        assert not caplog.records
        file = RecordFile(path, "m", head)
        assert file.count == 0
        file.append(b"1")
        file.close()
    assert caplog.messages == [f"{path}: holds results of another run: starting over"]


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_not_read(kind: str, tmp_path: Path) -> None:
    path, chunks = tmp_path / "reference", small_chunks()
    if kind == "pipe":
        os.mkfifo(path)
        ends = os.open(path, os.O_RDWR)  # so that a reader gets something, and does not wait
        os.write(ends, bytes(4096))
    else:
        path.symlink_to("/dev/zero")
    for door in (lambda: KldFile(path), lambda: CacheFile(path, chunks, 100)):
        with pytest.raises(InputError, match="reference: not a file$"):
            door()
    if kind == "pipe":
        os.close(ends)


def test_damaged_caches(tmp_path: Path) -> None:
    chunks, path = small_chunks(), tmp_path / "reference"
    write_all(CacheWriter(path, chunks, 100), 100, chunks)
    good = path.read_bytes()
    with pytest.raises(InputError, match="vocabulary 100, expected 101"):
        CacheFile(path, chunks, 101)
    with pytest.raises(InputError, match="tokens .* another text"):
        CacheFile(path, TokenChunks(chunks.ids + 1), 100)
    path.write_bytes(good[:-3])
    with pytest.raises(InputError, match="3 chunks, expected 4"):
        CacheFile(path, chunks, 100)
    path.write_bytes(good[:-3] + b"abc")
    file = CacheFile(path, chunks, 100)
    with pytest.raises(InputError, match="record 4 is damaged"):
        file.chunk(3)
    file.close()
    path.write_bytes(b"something else\n")
    with pytest.raises(InputError, match="not a file of this kind"):
        CacheFile(path, chunks, 100)


@pytest.mark.parametrize("kind", ["text", "link", "pipe", "folder", "empty", "torn"])
def test_what_lies_where_results_go_is_ours_or_refused(kind: str, tmp_path: Path) -> None:
    """A text given as --resume was emptied, and links under the hidden names were followed."""
    chunks, victim = small_chunks(), tmp_path / "victim"
    victim.write_text("precious")
    doors: dict[str, Callable[[Path], Any]] = {
        "state": lambda path: check_state(path),
        ".cache.partial": lambda path: CacheWriter(path, chunks, 100).close(),
        ".kld.partial": lambda path: KldWriter(path, chunks, 100).close(),
    }
    begins = {".cache.partial": b"qwen35 ref", ".kld.partial": b"_log", "state": b"qwen35 ev"}
    for name, door in doors.items():
        path, given = tmp_path / name, tmp_path / name.removeprefix(".").removesuffix(".partial")
        if kind == "text":
            path.write_text("precious")
        elif kind == "link":
            path.symlink_to(victim)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.write_bytes(begins[name] if kind == "torn" else b"")
        if kind in ("empty", "torn"):
            door(given)
            continue
        with pytest.raises((InputError, OutputError), match=name):
            door(given)
        assert kind != "text" or path.read_text() == "precious"
    assert victim.read_text() == "precious"


def test_a_compressed_chunk_is_not_expanded_beyond_what_it_can_hold(tmp_path: Path) -> None:
    chunks, path = small_chunks(), tmp_path / "reference"
    written = write_all(CacheWriter(path, chunks, 100), 100, chunks)
    good = pack(compact(written[0]))
    spoilt = {
        "more than": zlib.compress(bytes(50_000_000), 9),
        "incomplete": good[:-5],
        "rows of": pack(compact(exact_of(peaked(2, 100, 1, seed=1))[0])),
        "not finite": pack(replace(compact(written[0]), nll=written[0].nll * np.nan)),
        "beyond the vocabulary": pack(replace(compact(written[0]), top=written[0].top + 100)),
    }
    for message, record in spoilt.items():
        records = RecordFile(path, "qwen35 reference 1", cache_head(chunks, 100))
        records.cut(0)
        for data in (record, good, good, good):
            records.append(data)
        records.close()
        file = CacheFile(path, chunks, 100)
        tracemalloc.start()
        with pytest.raises(InputError, match=f"chunk 1 is damaged .*{message}"):
            file.chunk(0)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()
        file.close()


def test_files_over_another_text_or_model(formats: Path, tmp_path: Path) -> None:
    base = gguf(formats, "F16")
    path = tmp_path / "x.kld"
    measure(formats, base, kld_file=path)
    other = tmp_path / "other.txt"
    other.write_text((formats / "text.txt").read_text()[500:])
    with pytest.raises(InputError, match="its tokens differ from those of the text"):
        prepare(EvaluationRequest(base, text=other, kld_file=path))
    with pytest.raises(InputError, match=r"a context of 512, expected 64 \(--context\)"):
        prepare(EvaluationRequest(base, text=formats / "text.txt", context=64, kld_file=path))
    assert prepare(EvaluationRequest(base, kld_file=path)).chunks.count == 2
    small = tmp_path / "small.kld"
    chunks = small_chunks()
    write_all(KldWriter(small, chunks, 100), 100, chunks)
    with pytest.raises(InputError, match="a vocabulary of 100, expected 4096"):
        prepare(EvaluationRequest(str(ASSET), kld_file=small))


@given(st.lists(st.binary(max_size=40), max_size=6), st.data())
@settings(max_examples=40)
def test_records_survive_any_cut(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("records") / "x"
    records = RecordFile(path, "kind 1", {"a": 1})
    for part in parts:
        records.append(part)
    records.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    records = RecordFile(path, "kind 1", {"a": 1})
    assert [records.read(i) for i in range(records.count)] == parts[: records.count]
    records.cut(records.count)
    records.append(b"more")
    records.close()
    records = RecordFile(path, "kind 1")
    assert records.read(records.count - 1) == b"more"
    records.close()
