"""Refined codes in torch are those of the CPU kernels, to the bit; on a GPU too, where one is."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qwen35
from checkpoints import random_tensors, tiny_config, write_checkpoint
from gguf_models import sidecars
from hessian_folders import write_hessians
from qwen35.array_types import F32, Array
from qwen35.codecs import devices, pieces, refining, refining_torch
from qwen35.codecs.devices import Kernels, kernels_for
from qwen35.codecs.fp8.arrays import e4m3_levels
from qwen35.codecs.ggml.grids import GRIDS, grid_of
from qwen35.codecs.ggml.library import find_library
from qwen35.codecs.ggml.quantizers import encode
from qwen35.codecs.nf4.tables import LEVELS
from qwen35.codecs.refining import CodeGrid, Curvature, Refining
from qwen35.codecs.refining_torch import TorchRefining
from qwen35.errors import UsageError, WorkerError
from refined_grids import INTEGERS, grid_for, pair_of, weights_of
from running import tree

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
needs_library = pytest.mark.skipif(find_library() is None, reason="needs llama-cpp-python")

KINDS = [*sorted(GRIDS.keys() - {"nvfp4"}), pytest.param("nvfp4", marks=needs_library)]

LEVELS_OF = {
    "e2m1": np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32),
    "e4m3": e4m3_levels().values,
    "integers": INTEGERS,
    "nf4": LEVELS,
    "one": np.ones(1, np.float32),
    "signed": np.arange(-8, 8, dtype=np.float32),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def same(
    weights: F32, grid: CodeGrid, curvature: Curvature, device: str, chunk: int = 2**22
) -> None:
    """Check codes, with and without coordinate descent, and losses."""
    found = TorchRefining(device, chunk)
    for sweeps in (0, refining.SWEEPS):
        expected = refining.refined_codes(weights, grid, curvature, sweeps)
        codes = found.refined_codes(weights, grid, curvature, sweeps)
        assert codes.dtype == np.uint8
        np.testing.assert_array_equal(codes, expected)
    for codes in (grid.codes, expected):
        losses = refining.row_losses(weights, grid, codes, curvature)
        np.testing.assert_array_equal(found.row_losses(weights, grid, codes, curvature), losses)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_every_ggml_type(kind: str, device: str) -> None:
    weights, pair = weights_of(9, 256, 9) * np.float32(50), pair_of(256, 700)
    data = np.frombuffer(encode("x", weights, kind, pair.fit.diagonal().copy()), np.uint8)
    grid = grid_of(data, kind, weights.shape)
    same(weights, grid, Curvature.of(pair), device, chunk=4 * 256)


@pytest.mark.parametrize("levels", sorted(LEVELS_OF))
@pytest.mark.parametrize("offsets", [False, True])
def test_every_kind_of_levels(levels: str, device: str, *, offsets: bool) -> None:
    weights = weights_of(50, 96)
    grid = grid_for(weights, LEVELS_OF[levels]) if levels != "one" else _flat(weights)
    if not offsets:
        grid = replace(grid, offsets=None)
    same(weights, grid, Curvature.of(pair_of(96)), device)


def _flat(weights: F32) -> CodeGrid:
    """Return a grid of a single level."""
    scales = np.full((len(weights), 3), 0.01, np.float32)
    return CodeGrid(np.zeros(weights.shape, np.uint8), scales, LEVELS_OF["one"], scales)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 63, 64, 65, 130])
@pytest.mark.parametrize("rows", [1, 37])
def test_every_width(columns: int, rows: int, device: str) -> None:
    weights = weights_of(rows, columns)
    grid = grid_for(weights, group=columns)
    same(weights, grid, Curvature.of(pair_of(columns, 150)), device)


@pytest.mark.parametrize("rows", [15, 16, 17, 33])
def test_rows_that_go_in_several_parts(rows: int, device: str) -> None:
    weights = weights_of(rows, 64)
    same(weights, grid_for(weights, LEVELS), Curvature.of(pair_of(64)), device, chunk=16 * 64)


def test_scales_of_zero_dead_columns_and_few_tokens(device: str) -> None:
    weights, pair = weights_of(20, 96), pair_of(96, 10)
    for matrix in (pair.fit, pair.held_out):
        matrix[:, 5:9] = matrix[5:9] = 0
    grid = grid_for(weights)
    grid.codes[2] = 7
    grid.scales[2:9, 1] = grid.scales[4] = 0
    grid.scales[:, 2] *= -1
    same(weights, grid, Curvature.of(pair), device)
    same(weights, grid, Curvature.of(pair, damping=0.0), device)


def test_heavy_tails_and_tiny_weights(device: str) -> None:
    drawn = np.random.default_rng(6).standard_cauchy((24, 64)).astype(np.float32)
    for factor in (1e-42, 1e-38, 1e30):
        weights = drawn * np.float32(factor)
        same(weights, grid_for(weights, LEVELS), Curvature.of(pair_of(64)), device)


def test_arrays_that_are_views_or_read_only(device: str) -> None:
    weights, curvature = weights_of(40, 128)[::2, 32:], Curvature.of(pair_of(96))
    grid = grid_for(weights)
    weights.flags.writeable = grid.codes.flags.writeable = grid.scales.flags.writeable = False
    same(weights, grid, curvature, device)


def test_the_same_scales_are_chosen(device: str) -> None:
    weights, curvature = weights_of(30, 192), Curvature.of(pair_of(192))
    grid = replace(grid_for(weights, LEVELS, group=64), offsets=None)
    grid.scales[3, 1] = 0
    others = np.stack([grid.scales * np.float32(factor) for factor in (0.8, 1.1, 0.9, 1.0, 0)])
    expected = refining.searched_scales(weights, grid, others, curvature)
    found = TorchRefining(device, 7 * 192).searched_scales(weights, grid, others, curvature)
    assert set(np.unique(expected)) >= {0, 2, 3}
    np.testing.assert_array_equal(found, expected)


def test_a_curvature_is_sent_once_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stay; on torch's CPU device, they hold the memory of the arrays themselves."""
    sent: list[int] = []

    def from_numpy(array: Array) -> Any:
        sent.extend(n for n, one in zip(sizes, several, strict=False) if array is one.hessian)
        return original(array)

    original, sizes = torch.from_numpy, (16, 24, 32)
    found, several = TorchRefining("cpu"), [Curvature.of(pair_of(n)) for n in sizes]
    monkeypatch.setattr(torch, "from_numpy", from_numpy)
    for which in (0, 0, 1, 0, 1, 2, 1, 0):
        refine(found, sizes[which], several[which])
    assert sent == [16, 24, 32, 16]
    held = [weakref.ref(one.hessian) for one in several]
    del several[1:]
    refine(found, sizes[0], several[0])
    assert [one() is not None for one in held] == [True, False, False]


def refine(found: TorchRefining, columns: int, curvature: Curvature) -> None:
    weights = weights_of(4, columns)
    grid = grid_for(weights, group=columns)
    found.refined_codes(weights, grid, curvature)
    found.row_losses(weights, grid, grid.codes, curvature)


# --- in artifacts


def recipe_for(action: str, codes: str, folder: Path) -> Path:
    """Return a recipe by which a few weights are refined."""
    form = "int4" if action.startswith("int4") else action
    recipe = folder / "mine.toml"
    recipe.write_text(
        f'format = "{form}"\nbase = "{form}"\n[[rules]]\nmatch = "mlp"\nlayers = "0-1"\n'
        f'action = "{action}"\ncodes = "{codes}"\n'
    )
    return recipe


@pytest.mark.parametrize(
    ("action", "codes"),
    [
        ("fp8", "refined"),
        pytest.param("fp8-channel", "refined", marks=pytest.mark.heavy),
        ("int4", "refined"),
        pytest.param("int4-asym", "refined", marks=pytest.mark.heavy),
        ("nf4", "refined+scales"),
        ("nvfp4", "refined"),
    ],
)
def test_artifacts_are_the_same(
    dense: Path,
    dense_hessians: Path,
    tmp_path: Path,
    action: str,
    codes: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: Any = {"recipe": recipe_for(action, codes, tmp_path), "hessian": dense_hessians}
    written = partial(qwen35.convert, dense, threads=2, **options)
    check_on_two_devices(written, tmp_path, monkeypatch)


def test_gguf_files_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor encodes them, and the device chooses codes."""
    config = tiny_config(text_only=True, mtp=0, layers=2)
    model = write_checkpoint(tmp_path / "in", config, random_tensors(config), sidecars=sidecars())
    hessians = write_hessians(model, tmp_path / "statistics")
    options: Any = {"types": "Q8_0,Q4_0", "codes": "refined", "hessian": hessians}
    check_on_two_devices(partial(qwen35.gguf, model, threads=2, **options), tmp_path, monkeypatch)


def test_plain_codes_of_gguf_files_need_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device cuda:0: plain codes are encoded by the CPU"):
        qwen35.gguf(tmp_path / "none", tmp_path / "out", device="cuda:0")
    with pytest.raises(UsageError, match="--device tpu: unknown, expected auto, cpu, cuda"):
        qwen35.gguf(tmp_path / "none", tmp_path / "out", device="tpu")


def check_on_two_devices(
    written: Callable[[Path], object], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that both choose codes, the same as the processor, of several pieces at a time."""
    monkeypatch.setattr(pieces, "PIECE", 2**14)
    written(folder / "expected")
    seen: list[tuple[int, int]] = []

    def on_torch(number: int) -> Kernels:
        own = TorchRefining("cpu")

        def refined_codes(weights: F32, grid: CodeGrid, curvature: Curvature) -> Any:
            seen.append((number, weights.size))
            return own.refined_codes(weights, grid, curvature)

        chosen = Refining(refined_codes, own.row_losses, own.searched_scales, 3)
        return replace(kernels, refining=chosen)

    (kernels,) = kernels_for("cpu")
    both = on_torch(0), on_torch(1)
    monkeypatch.setattr("qwen35.writing.write.kernels_for", lambda _: both)
    written(folder / "out")
    assert tree(folder / "out") == tree(folder / "expected")
    assert {number for number, _ in seen} == {0, 1}
    assert max(size for _, size in seen) > 2**14


def test_a_gpu_without_memory_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for name in ("refined_codes", "row_losses", "searched_scales"):
        monkeypatch.setattr(TorchRefining, name, full)
    one, two = kernels_for("cuda")
    assert one.refining.pieces == two.refining.pieces == refining_torch.PIECES
    calls: tuple[Any, ...] = (
        two.refining.refined_codes,
        two.refining.row_losses,
        two.refining.searched_scales,
    )
    for call in calls:
        with pytest.raises(
            WorkerError, match="--device cuda:1: the GPU has too little free memory"
        ):
            call(None, None, None)


def test_a_cpu_refines_without_torch(dense: Path, dense_hessians: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from qwen35.cli.main import main\n"
        "code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)\n"
    )
    options = [
        "--recipe",
        "text-nf4",
        "--codes",
        "refined",
        "--hessian",
        str(dense_hessians),
        "--quiet",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, "convert", str(dense), str(tmp_path / "out"), *options],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert devices.kernels_for("cpu")[0].refining.pieces == 1
