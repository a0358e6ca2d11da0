"""Resumable state of a streamed pass: hidden states in files, and the blocks that are done."""

from __future__ import annotations

import json
import os
import shutil
import threading
import zlib
from pathlib import Path

import numpy as np

from qwen35.array_types import U8
from qwen35.checkpoint.locations import read_bounded
from qwen35.closing import Closing
from qwen35.errors import InputError, OutputError
from qwen35.sinks.files import replace_file
from qwen35.sinks.staging import os_errors
from qwen35.sinks.work_folder import check_entries

__all__ = ["StreamFolder"]

_STATE = "state.json"
_SUM = np.dtype("<u4")


class StreamFolder(Closing):
    """The work folder of one pass.

    A block reads one file of hidden states and writes another, so that it can be run again if it is
    interrupted. Beside each file lie the CRC-32s of its windows, since no later result would show
    that a bit of a state has changed.

    Args:
        folder: created if missing.
        digest: of the plan; only work with the same digest is resumed.
        restart: discard work of another plan.

    Attributes:
        done: names of the finished blocks.

    Raises:
        OutputError: the folder holds work of another plan, or cannot be written.
    """

    def __init__(self, folder: Path, digest: str, *, restart: bool) -> None:
        self.folder = folder
        self._digest = digest
        self._files: dict[str, int] = {}
        self._opening = threading.Lock()
        with os_errors(folder):
            self.done: list[str] = self._load_done(restart)
            folder.mkdir(exist_ok=True)
            if not self.done:
                self._save()

    def _load_done(self, restart: bool) -> list[str]:
        if not os.path.lexists(self.folder):
            return []
        check_entries(self.folder)
        if not any(self.folder.iterdir()):  # of a run that ended while it removed it
            return []
        try:
            state = json.loads(read_bounded(self.folder / _STATE))
            digest, done = state["plan"], [str(name) for name in state["done"]]
        except (InputError, ValueError, KeyError, TypeError, RecursionError) as error:
            if os.path.lexists(self.folder / _STATE):
                found = f"its {_STATE} is damaged, or was not made by qwen35"
                hint = "move the folder away to start again"
            else:
                found, hint = "is in the way and was not made by qwen35", "move it away"
            raise OutputError(str(self.folder), found, hint=hint) from error
        if digest == self._digest:
            return done
        if not restart:
            raise OutputError(
                str(self.folder),
                f"holds an interrupted run of another plan ({len(done)} blocks done)",
                hint="repeat that command, or give --overwrite to start again",
            )
        shutil.rmtree(self.folder)
        return []

    def _save(self) -> None:
        state = {"plan": self._digest, "done": self.done}
        replace_file(self.folder / _STATE, json.dumps(state).encode())

    def close(self) -> None:
        """Close the files; closing twice is harmless."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def finish(self, block: str) -> None:
        """Record a finished block; flush what it wrote first."""
        self.flush()  # the next block reads these states: on disk before the block is listed
        with os_errors(self.folder):
            self.done.append(block)
            self._save()

    def flush(self) -> None:
        """Wait until what was written is on disk, or where other machines see it."""
        with os_errors(self.folder):
            for descriptor in self._files.values():
                os.fsync(descriptor)

    def remove(self) -> None:
        """Remove the folder."""
        for path in self.folder.iterdir():
            if path.name != _STATE:  # last: without it nobody knows whose folder this is
                path.unlink()
        shutil.rmtree(self.folder)

    def _file(self, name: str) -> int:
        with self._opening:  # batches are computed side by side
            if name not in self._files:
                flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
                self._files[name] = os.open(self.folder / name, flags, 0o666)
            return self._files[name]

    def write(self, name: str, first: int, states: U8) -> None:
        """Write hidden states into a file.

        Args:
            name: of the file.
            first: number of the first window.
            states: [windows, bytes], contiguous.

        Raises:
            OutputError: the disk is full.
        """
        sums = np.array([zlib.crc32(one.data) for one in states], _SUM)
        with os_errors(self.folder):
            self._write(f"{name}.bin", first * states.shape[1], states)
            self._write(f"{name}.crc", first * _SUM.itemsize, sums.view(np.uint8))

    def _write(self, name: str, offset: int, data: U8) -> None:
        left = data.reshape(-1).data
        while left:  # pwrite may write less than asked
            count = os.pwrite(self._file(name), left, offset)
            left, offset = left[count:], offset + count

    def read(self, name: str, first: int, count: int, nbytes: int) -> U8:
        """Return the hidden states of windows.

        Args:
            name: of the file.
            first: number of the first window.
            count: number of windows.
            nbytes: of a window.

        Returns:
            [count, nbytes].

        Raises:
            OutputError: the file is too short, or a window is not what was written.
        """
        states = self._read(f"{name}.bin", first * nbytes, count * nbytes).reshape(count, nbytes)
        sums = self._read(f"{name}.crc", first * _SUM.itemsize, count * _SUM.itemsize).view(_SUM)
        for window, (one, expected) in enumerate(zip(states, sums.tolist(), strict=True), first):
            if zlib.crc32(one.data) != expected:
                path, hint = self.folder / f"{name}.bin", "remove its folder to start again"
                raise OutputError(str(path), f"window {window + 1} is damaged", hint=hint)
        return states

    def _read(self, name: str, offset: int, count: int) -> U8:
        buffer = np.empty(count, np.uint8)
        view, done = buffer.data, 0
        while done < count:
            received = os.preadv(self._file(name), [view[done:]], offset + done)
            if received == 0:
                hint = "remove it to start again"
                raise OutputError(str(self.folder), "was changed by another process", hint=hint)
            done += received
        return buffer
