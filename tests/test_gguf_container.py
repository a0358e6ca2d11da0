"""The head of a GGUF file: what breaks the format is refused with a sentence, within bounds."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_models import make_variant
from hostile_gguf import HOSTILE, file_bytes
from qwen35.checkpoint.gguf_header import read_container
from qwen35.checkpoint.source import open_folder
from qwen35.errors import InputError
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write


def test_the_control_is_read(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(file_bytes())
    container = read_container(path)
    assert container.architecture == "qwen35"
    assert container.tensors["t"].shape == (32,)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"bad\.gguf"):
            read_container(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("container")
    plan = make_plan(
        open_folder(make_variant(folder, "dense")), load_recipe("mix", "gguf"), types=("Q4_K_M",)
    )
    return write(plan, folder / "out", threads=1).out / plan.files[0].name


def test_it_reads_what_the_gguf_library_reads(written: Path) -> None:
    ours, theirs = read_container(written), GGUFReader(written)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert entry.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert entry.kind.code == int(tensor.tensor_type)
        assert (entry.begin, entry.nbytes) == (tensor.data_offset, tensor.n_bytes)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.keys[name] == field.contents()


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32 - 1), cut=st.booleans())
def test_damage_gives_a_sentence_or_a_checked_head(written: Path, seed: int, cut: bool) -> None:
    generator = np.random.default_rng(seed)
    content = bytearray(written.read_bytes()[:40_000])
    for position in generator.integers(0, 9_000, 3):
        content[position] = generator.integers(0, 256)
    path = written.with_name("damaged.gguf")
    path.write_bytes(content[: generator.integers(0, 9_000)] if cut else content)
    with pytest.raises(InputError):
        read_container(path)  # at the least, the file is too short for its tensors
