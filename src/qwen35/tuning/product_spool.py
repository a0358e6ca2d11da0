"""The products of one block on disk: inputs and gradients of each matrix, a window at a time."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from qwen35.array_types import F32, I32, I64, Array
from qwen35.closing import Closing
from qwen35.sinks.staging import os_errors

__all__ = ["ProductSpool"]

MatrixKey = tuple[str, int | None]
"""The name of a matrix in its block, and the number of its expert, if it is one of a stack."""


@dataclass(frozen=True)
class _Spooled:
    """Where an array is: [rows, columns] float32."""

    file: IO[bytes]
    offset: int
    rows: int
    columns: int

    def to_json(self) -> list[int]:
        """Return plain values, without the file."""
        return [self.offset, self.rows, self.columns]


@dataclass
class _Window:
    """What is known of a matrix from one window: its inputs, and gradients by the first row."""

    x: _Spooled | None = None
    g: dict[int, _Spooled] = field(default_factory=dict)
    ids: I32 | None = None


_INDEX = ".json"
"""Behind a file's name: of the list of what is where in it."""


def _places(window: _Window) -> list[tuple[int, list[int]]]:
    return [(first, place.to_json()) for first, place in window.g.items()]


def _ids(window: _Window) -> list[int] | None:
    return None if window.ids is None else window.ids.tolist()


class ProductSpool(Closing):
    """Holds what the squares of a block's gradients are computed from, whatever the rows asked for.

    A layer of experts has more squares than memory; these are computed when they are needed, and
    only for the rows that are priced.

    Args:
        torch: the library.
        device: where to compute.
        folder: for the file.
        name: of the file, for other processes; without one, it goes with the spool.
        parts: names of what other processes kept, in any order; each window is in one of them.
    """

    def __init__(
        self, torch: Any, device: str, folder: Path, name: str = "", parts: Sequence[str] = ()
    ) -> None:
        self._torch, self._device, self._folder, self._name = torch, device, folder, name
        self._windows: dict[MatrixKey, dict[int, _Window]] = defaultdict(dict)
        self._end = 0
        self._adding = threading.Lock()
        with os_errors(folder):
            self._file: IO[bytes]  # closed by `close`
            if name:
                self._file = (folder / name).open("w+b")
            else:
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            self._files: list[IO[bytes]] = [self._file]
            for part in parts:
                self._take(part)

    def close(self) -> None:
        """Close the files, of which one without a name is gone then; twice is harmless."""
        for file in self._files:
            file.close()

    def keep(self) -> None:
        """Write what others need to take the products from the file."""
        rows = [
            [*key, number, one.x and one.x.to_json(), _places(one), _ids(one)]
            for key, windows in self._windows.items()
            for number, one in windows.items()
        ]
        with os_errors(self._folder):
            os.fsync(self._file.fileno())
            (self._folder / f"{self._name}{_INDEX}").write_text(json.dumps(rows))

    def _take(self, part: str) -> None:
        """Open what another process kept."""
        file = (self._folder / part).open("rb")
        self._files.append(file)
        rows = json.loads((self._folder / f"{part}{_INDEX}").read_text())
        for name, expert, number, x, places, ids in rows:
            self._windows[name, expert][number] = _Window(
                x and _Spooled(file, *x),
                {first: _Spooled(file, *place) for first, place in places},
                None if ids is None else np.array(ids, np.int32),
            )

    def add(self, key: MatrixKey, window: int, first: int, x: Any, g: Any) -> None:
        """Keep inputs [tokens, columns], and the gradients of rows from `first` on.

        Raises:
            OutputError: the disk is full.
        """
        with self._adding:  # windows may come from several threads; each from one
            found = self._windows[key].setdefault(window, _Window())
        if found.x is None:  # of a matrix that comes in pieces, they are all the same
            found.x = self._write(x)
        found.g[first] = self._write(g)

    def add_rows(self, key: MatrixKey, window: int, ids: I32, g: Any) -> None:
        """Keep the gradients [tokens, columns] of rows that are looked up by `ids`."""
        self._windows[key][window] = _Window(g={0: self._write(g)}, ids=ids)

    def tokens(self, key: MatrixKey) -> int:
        """Return the number of inputs."""
        return sum(one.x.rows for one in self._windows.get(key, {}).values() if one.x is not None)

    def squares(self, key: MatrixKey, rows: I64) -> F32 | None:
        """Return F of some rows, [rows, columns]: the sum over windows of squared gradients.

        Args:
            key: the matrix.
            rows: their numbers, in increasing order.

        Returns:
            None if it is zero: no token of the text gets there.
        """
        total: Any = None
        for window in sorted(self._windows.get(key, {})):
            one = self._windows[key][window]
            made = self._scattered(one, rows) if one.ids is not None else self._made(one, rows)
            if made is not None:
                total = made.square_() if total is None else total.addcmul_(made, made)
        return None if total is None else total.cpu().numpy()

    def _made(self, window: _Window, rows: I64) -> Any:
        assert window.x is not None
        x = self._read(window.x)
        out = self._torch.zeros((len(rows), window.x.columns), device=self._device)
        for first, stored in window.g.items():
            begin, end = np.searchsorted(rows, (first, first + stored.columns))
            if begin < end:
                g = self._read(stored, rows[begin:end] - first)
                self._torch.mm(g.T, x, out=out[begin:end])
        return out

    def _scattered(self, window: _Window, rows: I64) -> Any:
        """Return the gradients of rows to which each token that looks one up adds its own."""
        assert window.ids is not None
        places = np.searchsorted(rows, window.ids).clip(max=len(rows) - 1)
        mine = np.flatnonzero(rows[places] == window.ids)
        if not len(mine):
            return None
        g = self._read(window.g[0])[self._torch.from_numpy(mine)]
        out = self._torch.zeros((len(rows), g.shape[1]), device=self._device)
        index = self._torch.from_numpy(places[mine].astype(np.int64)).to(self._device)
        return out.index_add_(0, index, g)

    def looked_up(self, key: MatrixKey) -> I64:
        """Return the rows that tokens look up, in increasing order."""
        ids = [one.ids for one in self._windows[key].values() if one.ids is not None]
        return np.unique(np.concatenate(ids)).astype(np.int64)

    def _write(self, values: Any) -> _Spooled:
        array: F32 = np.ascontiguousarray(values.float().cpu().numpy())
        data = array.data.cast("B")
        with self._adding:
            offset, self._end = self._end, self._end + len(data)
        position = offset
        with os_errors(self._folder):
            while data:  # pwrite may write less than asked
                count = os.pwrite(self._file.fileno(), data, position)
                data, position = data[count:], position + count
        return _Spooled(self._file, offset, *array.shape)

    def _read(self, stored: _Spooled, columns: I64 | None = None) -> Any:
        """Return an array, or some of its columns, on the device."""
        shape = (stored.rows, stored.columns)
        # Copied on write, which nobody does: torch refuses memory that cannot be written.
        mapped: Array = np.memmap(stored.file, np.float32, "c", stored.offset, shape)
        if columns is None:
            values = mapped
        elif columns[-1] - columns[0] + 1 == len(columns):
            values = np.array(mapped[:, columns[0] : columns[-1] + 1])
        else:
            values = mapped[:, columns]
        return self._torch.from_numpy(values).to(self._device)
