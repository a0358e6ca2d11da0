"""Export of the sums as llama.cpp importance matrices: GGUF and the older binary form."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from qwen35.array_types import F32
from qwen35.calibration.calibration_plan import CalibrationPlan
from qwen35.calibration.inputs import input_of
from qwen35.calibration.statistics_file import SumsSource
from qwen35.calibration.sums import Sums
from qwen35.errors import InputError
from qwen35.planning.gguf_files.imatrix import COUNTS, PROVENANCE_KEY, SUMS
from qwen35.planning.gguf_files.tensor_names import UntypedTensor

__all__ = ["write_imatrix", "write_legacy"]


def write_imatrix(
    path: Path, plan: CalibrationPlan, source: SumsSource, provenance: Mapping[str, Any]
) -> None:
    """Write ``NAME.in_sum2`` [slices, row] and ``NAME.counts`` [slices, 1] of every tensor.

    Columns are in the order of the GGUF tensor. Experts below the floor are topped up
    (`Sums.filled`), counts included, so that stock quantizers, which use sum / count, benefit too.
    """
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()  # an importance matrix names no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [name for name, _ in plan.text.files])
    writer.add_uint32("imatrix.chunk_count", len(plan.text.windows))
    writer.add_uint32("imatrix.chunk_size", plan.text.context)
    writer.add_string(PROVENANCE_KEY, json.dumps(provenance, ensure_ascii=False))
    tensors = plan.tensors
    for tensor in tensors:
        slices = len(tensor.rows.slabs)
        for suffix, shape in ((SUMS, (slices, tensor.row)), (COUNTS, (slices, 1))):
            writer.add_tensor_info(
                tensor.name + suffix, shape, np.dtype(np.float32), 4 * shape[0] * shape[1]
            )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, squares, counts in _entries(tensors, plan, source):
            writer.write_tensor_data(squares)
            writer.write_tensor_data(counts[:, None])
    finally:
        writer.close()


def _entries(
    tensors: Sequence[UntypedTensor], plan: CalibrationPlan, source: SumsSource
) -> Iterator[tuple[UntypedTensor, F32, F32]]:
    """Yield each tensor with sums of squares [slices, row] and counts [slices]."""
    cached: dict[str, dict[str, Sums]] = {}  # one block at a time
    for tensor in tensors:
        source_input = input_of(tensor.rows.item.role, plan.config)
        assert source_input is not None  # `CalibrationPlan.tensors` lists only measured tensors
        block, name = source_input
        if block not in cached:
            cached = {block: dict(source.sums(block))}
        if name not in cached[block]:
            found = f"no sums of {name} among those of finished layers"
            raise InputError(block, found, hint="give --overwrite to start again")
        sums = cached[block][name].filled(plan.request.floor)
        squares = tensor.rows.columns(sums.squares.astype(np.float32))
        yield tensor, squares, sums.tokens.astype(np.float32)


def write_legacy(path: Path, plan: CalibrationPlan, source: SumsSource) -> None:
    """Write the older form: length-prefixed records of mean squares times the window count."""
    chunks = len(plan.text.windows)
    tensors = plan.tensors
    with path.open("xb") as file:
        file.write(struct.pack("<i", len(tensors)))
        for tensor, squares, counts in _entries(tensors, plan, source):
            name = tensor.name.encode()
            values = (squares / counts[:, None] * np.float32(chunks)).astype("<f4")
            file.write(struct.pack("<i", len(name)) + name)
            file.write(struct.pack("<ii", chunks, values.size) + values.tobytes())
        dataset = plan.text.files[0][0].encode()
        file.write(struct.pack("<ii", chunks, len(dataset)) + dataset)
