"""Where a conversion may write, and what an interrupted one leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from checkpoints import write_checkpoint
from qwen35.errors import OutputError, TensorError
from qwen35.writing.write import write
from running import load_all, plan_of, read_config, run

pytestmark = pytest.mark.sentences


def test_output_equal_to_or_inside_the_input_is_refused(dense: Path, tmp_path: Path) -> None:
    for out in (dense, dense / "sub", dense.parent):
        with pytest.raises(OutputError, match="same folder|overlaps"):
            run(dense, out, overwrite=True)
    assert not (dense / "sub").exists()


def test_overwrite_replaces_only_what_qwen35_wrote(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        run(dense, tmp_path / "out")
    run(dense, tmp_path / "out", "text", overwrite=True)
    assert "quantization_config" not in read_config(tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not written by qwen35"):
        run(dense, other, overwrite=True)
    assert (other / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_full_disk_is_seen_before_the_work(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="free on its disk"):
        run(dense, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_source_that_shrinks_while_it_is_read_is_named(dense: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", read_config(dense), load_all(dense))
    plan = plan_of(source)
    shard = next(source.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(TensorError, match="changed since its header was read; run again once it"):
        write(plan, tmp_path / "out", threads=2)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_interrupt_leaves_no_output_and_says_how_to_go_on(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen35.writing.write.write_file", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(dense, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    (note,) = caught.value.__notes__
    assert note.endswith(".out.partial: run the same command to resume")
    monkeypatch.undo()
    run(dense, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_run_leaves_no_output_and_the_next_cleans_up(dense: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "import qwen35.writing.write as c\n"
        "real = c.write_file\n"
        "def slow(*a):\n    print('ready', flush=True); time.sleep(3600)\n    return real(*a)\n"
        "c.write_file = slow\n"
        "from qwen35.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "convert",
        str(dense),
        str(tmp_path / "out"),
        "--quiet",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(OutputError, match="another run is writing it"):
            run(dense, tmp_path / "out")
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {".out.partial", ".out.lock"}
    run(dense, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_progress_counts_every_byte_read(dense: Path, tmp_path: Path) -> None:
    class Counter:
        def __init__(self) -> None:
            self.total = self.done = 0
            self.ended = False
            self.lock = threading.Lock()

        def begin(self, title: str, nbytes: int) -> None:
            self.total = nbytes

        def advance(self, nbytes: int, item: str) -> None:
            with self.lock:
                self.done += nbytes

        def end(self) -> None:
            self.ended = True

    counter = Counter()
    run(dense, tmp_path / "out", progress=counter)
    assert (
        counter.done
        == counter.total
        == sum(t.numel() * t.element_size() for t in load_all(dense).values())
    )
    assert counter.ended
