"""The GPU kernel, interpreted on a processor: the same codes and scales as without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "encode_on.py"


def compared(device: str, **environment: str) -> object:
    done = subprocess.run(
        [sys.executable, "-W", "ignore:invalid value:RuntimeWarning", SCRIPT, device],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_interpreted_kernel_encodes_as_the_processor_does() -> None:
    """All modes, bf16, f16 and f32, with statistics and without, zeros, tiny and huge weights."""
    pytest.importorskip("triton")
    assert compared("cpu", TRITON_INTERPRET="1") == {"differences": {}, "untold": []}


def test_a_gpu_encodes_as_the_processor_does() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here: the test above interprets the same kernel")
    assert compared("cuda") == {"differences": {}, "untold": []}
