"""FP8 on arrays: rows of a weight to codes and scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qwen35.codecs.floats import f32_from
from qwen35.codecs.fp8 import Calibration

__all__ = ["encode_rows"]

Array = npt.NDArray[Any]


def encode_rows(
    values: Array,
    dtype: str,
    calibration: Calibration,
    weights: npt.NDArray[np.float32] | None,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint16],
) -> bool:
    """Quantize whole rows of tiles.

    Args:
        values: [rows, columns] elements of `dtype` (BF16 as uint16 bits), multiples of 128.
        dtype: BF16, F16 or F32.
        calibration: how scales are chosen.
        weights: [columns] how much the error of each column matters; evenly when None.
        codes: [rows, columns], written.
        scales: [rows / 128, columns / 128] bfloat16 bits, written.

    Returns:
        Whether all values are finite.
    """
    from qwen35.codecs import fp8_kernels

    mode = fp8_kernels.MODES.index(calibration.mode)
    parameters = {
        "rms": calibration.rms_factor,
        "percentile": calibration.percentile,
        "mse": calibration.grid_size,
    }
    even = weights is None or not calibration.weighted
    columns = np.ones(values.shape[1], np.float32) if even else weights
    floats = values if dtype == "BF16" else f32_from(values, dtype)
    parameter = float(parameters.get(calibration.mode, 0.0))
    return int(fp8_kernels.encode(floats, mode, parameter, columns, codes, scales)) == 0
