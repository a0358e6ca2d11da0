"""The work folder of a streamed pass: what is damaged is told, whatever reads it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from qwen35.errors import OutputError
from qwen35.forward.stream_folder import StreamFolder

WINDOW = 24
STATES = np.random.default_rng(0).integers(0, 256, (7, WINDOW), np.uint8)


def interrupted(folder: Path) -> Path:
    """Write states as batches of 3, 3 and 1 windows; the last one first."""
    with StreamFolder(folder, "digest", restart=False) as work:
        for first in (6, 0, 3):
            work.write("hidden-0", first, STATES[first : first + 3])
        work.finish("embeddings")
    return folder


def test_states_come_back_in_batches_of_any_size(tmp_path: Path) -> None:
    with StreamFolder(interrupted(tmp_path / "work"), "digest", restart=False) as work:
        assert work.done == ["embeddings"]
        for first, count in ((0, 7), (2, 3), (6, 1), (5, 2)):
            found = work.read("hidden-0", first, count, WINDOW)
            np.testing.assert_array_equal(found, STATES[first : first + count])
        work.write("hidden-0", 2, STATES[:2])  # in place, as layers that are passed in two parts
        np.testing.assert_array_equal(work.read("hidden-0", 2, 2, WINDOW), STATES[:2])


@pytest.mark.parametrize("kind", ["bin", "crc"])
def test_a_flipped_bit_of_a_window_is_found(kind: str, tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "work")
    with (folder / f"hidden-0.{kind}").open("r+b") as file:
        content = bytearray(file.read())
        content[len(content) * 4 // 7 + 1] ^= 16
        file.seek(0)
        file.write(content)
    expected = r"hidden-0\.bin: window 5 is damaged; remove its folder to start again"
    with StreamFolder(folder, "digest", restart=False) as work:
        work.read("hidden-0", 0, 4, WINDOW)
        work.read("hidden-0", 5, 2, WINDOW)
        with pytest.raises(OutputError, match=expected):
            work.read("hidden-0", 3, 3, WINDOW)


@pytest.mark.parametrize("kind", ["bin", "crc"])
def test_states_that_end_early_are_told(kind: str, tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "work")
    path = folder / f"hidden-0.{kind}"
    os.truncate(path, path.stat().st_size - 1)
    with (
        StreamFolder(folder, "digest", restart=False) as work,
        pytest.raises(OutputError, match="changed by another process; remove it to start again"),
    ):
        work.read("hidden-0", 0, 7, WINDOW)


@pytest.mark.parametrize("left", [0, 1, 20])
@pytest.mark.parametrize("restart", [False, True])
def test_a_torn_state_is_called_damaged(left: int, restart: bool, tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "work")
    os.truncate(folder / "state.json", left)
    expected = (
        r"work: its state\.json is damaged, or was not made by qwen35; "
        "move the folder away to start again"
    )
    with pytest.raises(OutputError, match=expected):
        StreamFolder(folder, "digest", restart=restart)
    assert (folder / "hidden-0.bin").exists()


def test_a_folder_without_a_state_is_not_ours(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "work")
    (folder / "state.json").unlink()
    with pytest.raises(OutputError, match="was not made by qwen35; move it away"):
        StreamFolder(folder, "digest", restart=True)
