"""Importance matrices as llama.cpp writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter

F32 = npt.NDArray[np.float32]
UP = "blk.0.ffn_up.weight"


def gguf_file(
    path: Path, entries: Mapping[str, tuple[F32, F32]], *, drop: str = "", chunks: int = 5
) -> Path:
    """Write an importance matrix: name to sums [slices, row] and counts [slices]."""
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    if drop != "imatrix.datasets":
        writer.add_array("imatrix.datasets", ["a.txt", "b.txt"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", sums)
        if drop != "counts":
            writer.add_tensor(f"{name}.counts", counts[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ones(rows: int, width: int, count: float = 4) -> tuple[F32, F32]:
    return np.full((rows, width), 8, np.float32), np.full(rows, count, np.float32)
