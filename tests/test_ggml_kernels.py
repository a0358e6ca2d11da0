"""Our quantizers of ggml's types: the bytes of ggml, whatever the weights and the processor."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ggml_bytes import ROW, difference, differences, importance
from ggml_values import weights
from qwen35.codecs.ggml.kernels import QUANTIZERS, quantize
from qwen35.codecs.ggml.library import open_library
from qwen35.codecs.ggml.types import COMPILED, ENCODABLE, GGML_TYPES


def test_the_table_of_types_names_all_of_ours() -> None:
    assert tuple(QUANTIZERS) == COMPILED
    assert set(COMPILED) < set(ENCODABLE)


@pytest.mark.parametrize("kind", COMPILED)
def test_bytes_are_those_of_ggml(kind: str) -> None:
    assert differences(kind, 5) == {}


@pytest.mark.heavy
@pytest.mark.parametrize("kind", COMPILED)
def test_bytes_of_a_million_weights_are_those_of_ggml(kind: str) -> None:
    assert differences(kind, 2**20 // ROW) == {}


@pytest.mark.parametrize("kind", COMPILED)
def test_any_number_of_blocks(kind: str) -> None:
    """Fewer than fill a tile, as many, and more; rows of one block, and one row."""
    block = GGML_TYPES[kind].block
    for count in (1, 2, 15, 16, 17, 33):
        values = weights("bf16", (1, count * block), count)
        for shape in ((count, block), (1, count * block)):
            rows, weighed = values.reshape(shape), importance("exponential", shape[1])
            assert difference(rows, kind, weighed) == "", shape
            assert difference(rows, kind, None) == "", shape
    assert quantize(np.empty((0, block), np.float32), kind, None).size == 0


@pytest.mark.parametrize("kind", COMPILED)
def test_a_scale_beyond_float16_is_refused(kind: str) -> None:
    rows = weights("bf16", (3, 256))
    rows[1, 7] = -1e9
    with pytest.raises(ValueError, match=kind):
        quantize(rows, kind, None)
    with pytest.raises(ValueError, match=kind):
        open_library().quantize(rows, kind, None)


# --- other processors


_FORCED = """
import json, sys
from ggml_bytes import differences
from qwen35.codecs.ggml import small_blocks
wrong = {kind: differences(kind, int(sys.argv[1])) for kind in sys.argv[2:]}
[assembly] = small_blocks.encode_q8_0.inspect_asm().values()
registers = [name for name in ("xmm", "ymm", "zmm") if name in assembly]
print(json.dumps([registers, {kind: str(said) for kind, said in wrong.items() if said}]))
"""

_TARGETS = {
    "x86-64": ("", "xmm"),
    "haswell": ("+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+popcnt,+sse4.2", "ymm"),
}
"""Processor as LLVM names it, to its features and its widest registers.

Fused multiply-add is there in the second, and must not be used. On ARM, NEON is the third way to
split the same vectors; LLVM's rules for the operations are the same there.
"""


def on(target: str, folder: Path, count: int, *kinds: str) -> None:
    """Compare bytes in a process whose kernels are compiled for another processor."""
    features, widest = _TARGETS[target]
    forced = {"NUMBA_CPU_NAME": target, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", _FORCED, str(count), *kinds],
        cwd=Path(__file__).parent,
        env={**os.environ, **forced, "NUMBA_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = '["xmm"]' if widest == "xmm" else '["xmm", "ymm"]'
    assert done.stdout.strip() == f"[{expected}, {{}}]"


x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")


@x86
@pytest.mark.parametrize("target", _TARGETS)
def test_bytes_do_not_depend_on_the_processor(target: str, tmp_path: Path) -> None:
    on(target, tmp_path, 1, "q4_K", "q8_0")


@x86
@pytest.mark.heavy
@pytest.mark.parametrize("target", _TARGETS)
def test_bytes_of_all_types_do_not_depend_on_the_processor(target: str, tmp_path: Path) -> None:
    on(target, tmp_path, 20, *COMPILED)
