"""The GPU kernel, interpreted on a processor: the same codes and scales as without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen35.codecs.devices import kernels_for
from qwen35.codecs.nf4 import torch as nf4_torch
from qwen35.errors import UsageError

HERE = Path(__file__).parent


def printed(script: str, *arguments: str, **environment: str) -> object:
    done = subprocess.run(
        [sys.executable, "-W", "ignore:invalid value:RuntimeWarning", HERE / script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("cases", ["some", pytest.param("every", marks=pytest.mark.heavy)])
def test_the_interpreted_kernel_encodes_as_the_processor_does(cases: str) -> None:
    """All modes, bf16, f16 and f32, with statistics and without, zeros, tiny and huge weights."""
    pytest.importorskip("triton")
    found = printed("encode_on.py", "cpu", cases, TRITON_INTERPRET="1")
    assert found == {"differences": {}, "untold": []}


@pytest.mark.parametrize(
    "capabilities", [["90"], pytest.param(["80", "100"], marks=pytest.mark.heavy)]
)
def test_the_kernel_compiles_for_gpus_that_are_not_present(
    capabilities: list[str], tmp_path: Path
) -> None:
    """The interpreter accepts code that the compiler refuses."""
    pytest.importorskip("triton")
    cache = {"TRITON_CACHE_DIR": str(tmp_path)}
    assert printed("compile_for.py", *capabilities, **cache) == {}


def test_a_gpu_encodes_as_the_processor_does() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here: the test above interprets the same kernel")
    assert printed("encode_on.py", "cuda") == {"differences": {}, "untold": []}


def test_a_gpu_without_triton_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_torch, "TorchEncoder", lambda device: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "qwen35.codecs.fp8.triton", raising=False)
    with pytest.raises(UsageError, match="--device cuda: triton is not installed"):
        kernels_for("cuda")


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:0", "cuda:99", "cuda:x", "cuda:", "cuda:0,cuda:99"]
)
def test_a_gpu_that_is_not_there_is_refused_in_a_sentence(device: str) -> None:
    import torch

    if torch.cuda.is_available() and device in ("cuda", "cuda:0"):
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="does not see such a GPU"):
        kernels_for(device)


@pytest.mark.parametrize("device", ["", "gpu", "cpu,cuda", "cuda,cpu", "CUDA", "cuda0", "mps"])
def test_an_unknown_device_is_refused_in_a_sentence(device: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        kernels_for(device)
