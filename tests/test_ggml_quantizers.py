"""Which quantizers encode a type: ours, or ggml's where ours differ, are missing or not wanted."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import ASSET
from ggml_values import weights
from qwen35.api.gguf_api import gguf
from qwen35.array_types import F32, U8
from qwen35.checkpoint.open import describe
from qwen35.cli.main import main
from qwen35.codecs.ggml import quantizers
from qwen35.codecs.ggml.kernels import quantize
from qwen35.codecs.ggml.library import Library, open_library
from qwen35.codecs.ggml.quantizers import differs, encode, quantizer
from qwen35.codecs.ggml.types import COMPILED
from qwen35.errors import TensorError, UsageError
from qwen35.planning.gguf_files.gguf_options import GgufOptions
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.work_order import order_of, plan_from

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Forget what other tests found in the library, and what these do."""
    open_library.cache_clear()
    differs.cache_clear()
    yield
    open_library.cache_clear()
    differs.cache_clear()


@pytest.fixture
def absent(monkeypatch: Patch) -> None:
    """Let llama-cpp-python not be installed."""
    real = importlib.util.find_spec
    fake = lambda name, *rest: None if name == "llama_cpp" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", fake)


@pytest.fixture
def fused(monkeypatch: Patch) -> None:
    """Let the library be one built with fused multiply-add: a few blocks of a type differ."""
    real = Library.quantize

    def other(self: Library, rows: F32, kind: str, importance: F32 | None) -> U8:
        found = real(self, rows, kind, importance)
        if kind == "q5_K":
            found[-1] ^= 1
        return found

    monkeypatch.setattr(Library, "quantize", other)


def is_ours(chosen: Any) -> bool:
    return chosen is quantize


@pytest.mark.parametrize("kind", COMPILED)
def test_ours_encode_where_ggml_gives_the_same_bytes(kind: str) -> None:
    assert not differs(kind)
    assert is_ours(quantizer(kind))
    assert not is_ours(quantizer(kind, "ggml"))


def test_ggml_alone_encodes_where_it_rounds_otherwise(fused: None) -> None:
    """One type shows it for all that sum: the others differ too rarely to be seen on a tile."""
    assert [kind for kind in COMPILED if is_ours(quantizer(kind))] == ["q8_0"]


def test_what_ggml_alone_encoded_is_said(fused: None, tmp_path: Path) -> None:
    made = gguf(ASSET, tmp_path / "out", types="Q4_K_M,Q8_0", threads=1)
    said = made.plan.container.written_text(made.plan)
    assert said == "q4_K, q6_K by ggml, which was built to round otherwise"
    forced = gguf(ASSET, tmp_path / "forced", types="Q4_K_M,Q8_0", threads=1, encoder="ggml")
    assert forced.plan.container.written_text(forced.plan) == ""
    assert forced.hashes == made.hashes


def test_nothing_is_said_where_all_is_well(tmp_path: Path) -> None:
    made = gguf(ASSET, tmp_path / "out", types="Q8_0", threads=1)
    assert made.plan.container.written_text(made.plan) == ""


@pytest.mark.usefixtures("absent")
def test_our_types_need_no_library() -> None:
    assert all(is_ours(quantizer(kind)) for kind in COMPILED)
    with pytest.raises(UsageError, match="iq3_s needs llama-cpp-python, which is not installed"):
        quantizer("iq3_s")
    with pytest.raises(
        UsageError, match="llama-cpp-python is not installed; in your clone of qwen35: pip"
    ):
        quantizer("q4_K", "ggml")


def test_a_library_that_does_not_open_is_not_asked(tmp_path: Path, monkeypatch: Patch) -> None:
    broken = tmp_path / "libggml-base.so"
    broken.write_bytes(b"nothing")
    monkeypatch.setattr("qwen35.codecs.ggml.library.find_library", lambda: broken)
    assert is_ours(quantizer("q4_K"))
    with pytest.raises(UsageError, match="cannot be opened"):
        quantizer("q4_K", "ggml")


def test_a_scale_beyond_float16_is_told_with_the_tensor() -> None:
    with pytest.raises(TensorError, match=r"a\.weight: a value beyond the range of q4_K"):
        encode("a.weight", np.full((1, 256), 1e9, np.float32), "q4_K", None)


@pytest.mark.parametrize("encoder", quantizers.ENCODERS)
@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
def test_floats_have_no_quantizer(kind: str, encoder: str) -> None:
    rows = weights("bf16", (2, 256))
    assert len(encode("a", rows, kind, None, encoder)) == rows.size * (4 if kind == "f32" else 2)


# --- as users ask for it


def plan(encoder: str) -> Plan:
    recipe = load_recipe("mix", "gguf")
    return make_plan(describe(str(ASSET)), recipe, types=("Q8_0",), encoder=encoder)


def test_workers_are_told_and_manifests_are_not() -> None:
    ours, theirs = plan("auto"), plan("ggml")
    assert ours.digest == theirs.digest
    assert ours.container.request_json(ours) == theirs.container.request_json(theirs)
    for planned in (ours, theirs):
        again = plan_from(order_of(planned, 1))
        assert isinstance(again.options, GgufOptions)
        assert again.options.encoder == planned.options.encoder


def test_the_flag_changes_no_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for encoder in quantizers.ENCODERS:
        words = ["gguf", str(ASSET), str(tmp_path / encoder), "--types", "Q5_K_M,IQ4_XS"]
        assert main([*words, "--encoder", encoder, "--threads", "1", "--quiet"]) == 0
    files = [sorted((tmp_path / encoder).glob("*")) for encoder in quantizers.ENCODERS]
    assert [a.read_bytes() for a in files[0]] == [b.read_bytes() for b in files[1]]
    with pytest.raises(UsageError, match="--encoder: 'c' is unknown, expected auto, ggml"):
        gguf(ASSET, tmp_path / "out", encoder="c")


def test_processes_use_the_encoder(
    tmp_path: Path, absent: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["gguf", str(ASSET), str(tmp_path / "out"), "--types", "Q8_0", "--encoder", "ggml"]
    assert main([*words, "--quiet"]) == 2
    assert "llama-cpp-python is not installed" in capsys.readouterr().err
