"""Which types fit a memory: sizes against plans, cache and state against llama.cpp."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path

import pytest

from checkpoints import ASSET
from gguf_models import make_variant
from imatrices import gguf_file, ones
from qwen35.api.gguf_api import gguf
from qwen35.api.plan_api import plan, types_that_fit
from qwen35.checkpoint.open import describe
from qwen35.cli.main import main
from qwen35.engines.llama import llama_cpp
from qwen35.errors import UsageError
from qwen35.planning.gguf_files.gguf_plan import files_of
from qwen35.planning.gguf_files.memory_fit import context_memory
from qwen35.planning.gguf_files.mixes import FILE_TYPES

ALL = 10**15


def planned(model: Path | str, types: tuple[str, ...], **asked: object) -> dict[str, int]:
    """Return the sizes of files by type, from a plan of them."""
    made = plan(model, types=types, **asked)  # type: ignore[arg-type]
    return dict(zip(types, (file.nbytes for file in made.files), strict=False))


def test_sizes_are_those_of_plans(tmp_path: Path) -> None:
    source = make_variant(tmp_path, "moe")
    plain = types_that_fit(source, ALL)
    bare = {row.type: row.file_bytes for row in plain.types if not row.needs_imatrix}
    assert planned(source, tuple(bare)) == bare
    assert set(bare) == set(FILE_TYPES) - {
        *("IQ3_XS", "IQ3_XXS", "Q2_K_S"),
        *("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
    }
    entries = {
        tensor.name: ones(len(tensor.rows.slabs), tensor.row)
        for tensor in files_of(plan(source, types="F16"))[0].tensors
        if "token_embd" not in tensor.name
    }
    matrix = gguf_file(tmp_path / "imatrix.gguf", entries)
    asked = {"imatrix": matrix, "tensor_type": ["attn_k=q8_0"], "mmproj": True}
    whole = types_that_fit(source, ALL, **asked)  # type: ignore[arg-type]
    assert not any(row.needs_imatrix for row in whole.types)
    sizes = {row.type: row.file_bytes for row in whole.types}
    assert planned(source, tuple(sizes), **asked) == sizes
    assert whole.projector == plan(source, types="F16", mmproj=True).files[1].nbytes
    beside = whole.kv_cache + whole.state + whole.projector
    assert all(row.total_bytes == row.file_bytes + beside for row in whole.types)
    without = {row.type: row.file_bytes for row in plain.types if row.needs_imatrix}
    few = types_that_fit(source, ALL, imatrix=matrix).types
    keys = {row.file_bytes - without[row.type] for row in few if row.type in without}
    assert all(0 < more < 1000 for more in keys)  # the file's keys about the matrix


def test_every_published_size_has_types_that_fit_its_f16() -> None:
    for name in ("Qwen3.5-0.8B", "Qwen3.5-27B", "Qwen3.5-35B-A3B"):
        sizes = [row.file_bytes for row in types_that_fit(name, ALL, mmproj=True).types]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == len(FILE_TYPES)


@pytest.mark.parametrize("name", ["dense", "moe", "three-to-one"])
def test_cache_and_state_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """The buffers that it reports, and the bytes that it saves of a context in use."""
    source = make_variant(tmp_path, name)
    written = gguf(source, tmp_path / "out", types="Q8_0", threads=1).out
    (path,) = written.glob("*.gguf")
    found = types_that_fit(source, ALL, context=1000)
    log, saved = _run(path, context=1000)
    assert re.search(rf"n_ctx += {found.context}\n", log)
    for kind, nbytes in (("KV", found.kv_cache), ("RS", found.state)):
        (shown,) = re.findall(rf"CPU {kind} buffer size = +([\d.]+) MiB", log)
        assert abs(float(shown) - nbytes / 2**20) < 0.006, kind
    one, _ = context_memory(describe(str(source)).config, 1)
    assert 0 <= saved - (found.state + 3 * one) < 2000  # three tokens, and what describes them


def _run(path: Path, *, context: int) -> tuple[str, int]:
    """Return llama.cpp's log of opening a context, and the size of its state after 3 tokens."""
    llama, log = llama_cpp(), list[bytes]()
    listen = llama.llama_log_callback(lambda _level, text, _data: log.append(text))
    llama.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        model = llama.llama_model_load_from_file(
            str(path).encode(), llama.llama_model_default_params()
        )
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_threads, options.n_threads_batch = context, 1, 1
        opened = llama.llama_init_from_model(model, options)
        tokens = (llama.llama_token * 3)(1, 2, 3)
        assert llama.llama_decode(opened, llama.llama_batch_get_one(tokens, 3)) == 0
        saved = int(llama.llama_state_seq_get_size(opened, 0))
        llama.llama_free(opened)
        llama.llama_model_free(model)
    finally:
        llama.llama_log_set(llama_cpp.quiet, ctypes.c_void_p(0))  # type: ignore[attr-defined]
    return b"".join(log).decode(errors="replace"), saved


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", str(ASSET), "--fit", "6.2MB", "--context", "1k"]
    assert main([*asked, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["context"], found["kv_cache"], found["state"]) == (1024, 2**20, 430080)
    assert found["largest"] == found["types"][0]["type"] == "Q4_K_S"
    assert all(row["total_bytes"] <= 6_200_000 for row in found["types"])
    assert main([*asked, "--quiet"]) == 0
    shown = capsys.readouterr().out.splitlines()
    (marked,) = (line for line in shown if line.endswith("largest that fits"))
    assert marked.startswith("Q4_K_S ")
    assert any("IQ1_S" in line and line.endswith("needs --imatrix") for line in shown)


def test_nothing_fits() -> None:
    least = types_that_fit("Qwen3.5-9B", ALL, context=300).types[-1]
    message = rf"too little .* 512 tokens.*\({least.total_bytes:,} bytes\), for {least.type}"
    with pytest.raises(UsageError, match=message):
        types_that_fit("Qwen3.5-9B", least.total_bytes - 1, context=300)
    assert len(types_that_fit("Qwen3.5-9B", least.total_bytes, context=300).types) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--fit", "6GB", "--types", "Q8_0"), "--types: has no effect with --fit"),
        (("--fit", "6GB", "--keep", "self_attn"), "--keep: has no effect with --fit"),
        (("--fit", "6GB", "--keep-shards"), "--keep-shards: has no effect with --fit"),
        (("--fit", "6GB", "--memory", "6GB"), "--memory: has no effect with --fit"),
        (("--fit", "6GB", "--recipe", "nf4"), "not a built-in recipe for GGUF"),
        (("--context", "8192"), "--context: has no effect without --fit"),
        (("--fit", "1MB"), "--fit 1.00 MB: too little for"),
        (("--fit", "-1"), "--fit: '-1', expected a size such as"),
    ],
)
def test_refusals(more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ASSET), *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "context", ["0", "-1", "k", "1.5k", "3000000k", "many", "²", "", "9" * 5000]
)
def test_contexts_that_are_no_number(context: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ASSET), "--fit", "1GB", f"--context={context}"]) == 2
    assert "expected tokens such as 8192 or 32k" in capsys.readouterr().err
    with pytest.raises(UsageError, match="a number of tokens from 1"):
        types_that_fit(ASSET, ALL, context=0)
