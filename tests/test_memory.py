"""The peak memory that a plan states is kept, whatever the size of the model."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import qwen35
from checkpoints import tiny_config
from gguf_models import sidecars
from qwen35.checkpoint.header import file_layout
from qwen35.cli.main import main
from qwen35.model.model_config import parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors
from qwen35.model.sizes import published_config

SIZES = {
    "small": {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096},
    "middle": {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32768},
    "large": {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 65536},
}


def hollow(folder: Path, config: dict[str, Any]) -> Path:
    """Write a checkpoint of zeros, which takes no disk."""
    folder.mkdir(parents=True)
    parsed = parse_config(config)
    specs = list(expected_tensors(parsed, CheckpointNaming.published(parsed)))
    head, _ = file_layout(specs)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(spec.nbytes for spec in specs))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SCRIPT = """
import sys
from pathlib import Path
from qwen35.cli.main import main
code = main()
status = Path("/proc/self/status").read_text()
Path(sys.argv.pop()).write_text(status.partition("VmHWM:")[2].split()[0])
sys.exit(code)
"""
"""The operating system's own figure for a child begins with what its parent takes."""


def command(*arguments: str) -> tuple[str, int]:
    """Run `qwen35` in a process of its own; returns its output and its peak memory in bytes."""
    source = str(Path(qwen35.__file__).parent.parent)
    with tempfile.NamedTemporaryFile("r") as peak:
        script = SCRIPT.replace("sys.argv.pop()", repr(peak.name))
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments, "--json", "--quiet"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": source},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, int(peak.read()) * 1024


def said(*arguments: str) -> int:
    """Return the peak memory that a command that only plans states; it runs in this process."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main([*arguments, "--json", "--quiet"]) == 0
    peak: int = json.loads(printed.getvalue())["peak_memory"]
    return peak


def stated(source: Path, recipe: str, threads: int) -> int:
    """Return the peak memory that the plan states."""
    return said("plan", str(source), "--recipe", recipe, "--threads", str(threads))


Packed = Callable[[str, str], tuple[Path, int]]


@pytest.fixture(scope="module")
def packed(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Pack a source with two threads, each once; returns where it is and the peak memory."""
    root = tmp_path_factory.mktemp("packed")

    @cache
    def one(size: str, recipe: str) -> tuple[Path, int]:
        out = root / f"{size}-{recipe}"
        arguments = ["convert", str(sources[size]), str(out), "--recipe", recipe, "--threads", "2"]
        return out, command(*arguments)[1]

    return one


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large weights in NF4."""
    folder = tmp_path_factory.mktemp("wide")
    config = tiny_config(layers=2)
    config["text_config"].update(hidden_size=1024, intermediate_size=65536)
    config["vision_config"]["out_hidden_size"] = 1024
    source = hollow(folder / "in", config)
    for side, text in sidecars().items():
        (source / side).write_text(text)
    command("convert", str(source), str(folder / "nf4"), "--recipe", "nf4")
    return folder / "nf4"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hollow")
    found = {}
    for name, sizes in SIZES.items():
        config = tiny_config()
        config["text_config"].update(sizes)
        config["vision_config"]["out_hidden_size"] = sizes["hidden_size"]
        found[name] = hollow(root / name, config)
        for side, text in sidecars().items():
            (found[name] / side).write_text(text)
    for recipe in ("nf4", "fp8"):  # kernels are compiled once, which takes more
        command("convert", str(found["small"]), str(root / recipe), "--recipe", recipe)
    command("gguf", str(found["small"]), str(root / "gguf"), "--types", "Q8_0")
    return found


@pytest.mark.parametrize("recipe", ["nf4", "fp8"])
@pytest.mark.parametrize("size", SIZES)
def test_a_conversion_keeps_to_what_the_plan_states(
    sources: dict[str, Path], packed: Packed, recipe: str, size: str
) -> None:
    _, used = packed(size, recipe)
    assert used <= stated(sources[size], recipe, 2)


@pytest.mark.parametrize("held", ["plain", "nf4", "fp8"])
@pytest.mark.parametrize("size", SIZES)
def test_gguf_files_keep_to_what_their_plan_states(
    sources: dict[str, Path], packed: Packed, size: str, held: str, tmp_path: Path
) -> None:
    source = sources[size] if held == "plain" else packed(size, held)[0]  # decoded on the way
    arguments = ["gguf", str(source), str(tmp_path / "out"), "--types", "F16,Q8_0"]
    promised = said(*arguments, "--threads", "2", "--dry-run")
    _, used = command(*arguments, "--threads", "2")
    assert used <= promised


@pytest.mark.parametrize("threads", ["2", "8"])
@pytest.mark.parametrize("verb", [("convert", "--recipe", "bf16"), ("gguf", "--types", "Q8_0")])
def test_large_packed_weights_keep_to_what_is_stated(
    verb: tuple[str, ...], threads: str, wide: Path, tmp_path: Path
) -> None:
    asked = [*verb, str(wide), str(tmp_path / "out"), "--threads", threads]
    promised = said(*asked, "--dry-run")
    assert command(*asked)[1] <= promised


def test_the_limit_given_is_kept_by_fewer_threads(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["large"]
    limit = stated(source, "nf4", 1) + 1_000_000
    assert stated(source, "nf4", 8) > limit
    out = str(tmp_path / "out")
    _, used = command("convert", str(source), out, "--threads", "8", "--memory", str(limit))
    assert used <= limit


@pytest.mark.parametrize("recipe", ["nf4", "fp8"])
def test_a_worker_keeps_to_what_the_plan_states(
    sources: dict[str, Path], recipe: str, tmp_path: Path
) -> None:
    from qwen35.execution.process_pool import ProcessPool
    from qwen35.planning.memory import peak_memory
    from qwen35.progress import Silent
    from qwen35.writing.write import write
    from running import plan_of

    plan = plan_of(sources["large"], recipe)
    used: list[int] = []

    class Watching(Silent):
        def advance(self, nbytes: int, item: str) -> None:
            for pid in pool.pids:
                status = Path(f"/proc/{pid}/status").read_text()
                used.append(int(status.partition("VmHWM:")[2].split()[0]) * 1024)

    pool = ProcessPool(1, threads=2)
    write(plan, tmp_path / "out", pool=pool, progress=Watching())
    assert used
    assert 10**8 < max(used) <= peak_memory(plan, 2)


@pytest.mark.parametrize("way", ["bf16 to nf4", "nf4 to gguf", "fp8 to gguf"])
def test_peak_memory_does_not_grow_with_the_weights(
    sources: dict[str, Path], packed: Packed, way: str, tmp_path: Path
) -> None:
    held, _, to = way.split()
    used = {}
    for size in sources:
        if to == "nf4":
            used[size] = packed(size, "nf4")[1]
        else:
            verb = ("gguf", str(packed(size, held)[0]), str(tmp_path / size), "--types", "Q8_0")
            used[size] = command(*verb, "--threads", "2")[1]
    bytes_of = {
        size: (source / "model.safetensors").stat().st_size for size, source in sources.items()
    }
    assert bytes_of["large"] > 10 * bytes_of["small"]
    assert used["large"] < 1.25 * used["small"]


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", ["fp8", "nf4"])
def test_experts_of_the_35b_at_their_true_shapes(tmp_path: Path, recipe: str) -> None:
    """Two layers, one of each kind, with fused experts of 256 x 1024 x 2048."""
    config = published_config("Qwen3.5-35B-A3B")
    config["text_config"]["num_hidden_layers"] = 2
    config["text_config"]["layer_types"] = ["linear_attention", "full_attention"]
    source = hollow(tmp_path / "source", config)
    with (source / "model.safetensors").open("rb") as file:
        assert b'"shape":[256,1024,2048]' in file.read(2**20)
    promised = stated(source, recipe, 2)
    out = str(tmp_path / "out")
    printed, used = command("convert", str(source), out, "--recipe", recipe, "--threads", "2")
    assert json.loads(printed)["bytes"] > 10**9
    assert used <= promised < 10**9
