"""What surrounds a command: closed and full streams, deleted folders, odd names, pipes, limits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints import ASSET
from qwen35.cli.main import main
from qwen35.threads import default_threads

QWEN35 = Path(sys.executable).with_name("qwen35")


def shell(
    line: str, folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a line of shell, where ``$Q`` is the command and ``$A`` the embedded checkpoint."""
    env = {**os.environ, "Q": str(QWEN35), "A": str(ASSET), **(environment or {})}
    started = time.monotonic()
    done = subprocess.run(
        ["/bin/sh", "-c", line],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr + done.stdout
    assert time.monotonic() - started < 30
    return done


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    done = shell(f"$Q convert $A out --recipe text {closed}", tmp_path)
    assert done.returncode == 0
    assert shell("$Q verify out --source $A", tmp_path).returncode == 0


@pytest.mark.parametrize("verb", ["inspect $A", "inspect $A --json", "--print-completion bash"])
def test_results_that_cannot_be_printed(verb: str, tmp_path: Path) -> None:
    done = shell(f"$Q {verb} >/dev/full", tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: stdout: cannot be written (No space left on device); print it somewhere else\n"
    )


def test_messages_that_cannot_be_printed_end_no_work(tmp_path: Path) -> None:
    done = shell("$Q convert $A out --recipe text 2>/dev/full", tmp_path)
    assert done.returncode == 0
    assert "out: 9 files" in done.stdout


def test_working_folder_that_is_gone(tmp_path: Path) -> None:
    line = "mkdir gone; cd gone; rmdir ../gone; $Q convert $A out --recipe text"
    done = shell(line, tmp_path)
    assert done.returncode == 2
    expected = "error: the working folder: no longer exists; change to another\n"
    assert done.stderr == expected
    assert shell("mkdir gone; cd gone; rmdir ../gone; $Q inspect $A", tmp_path).returncode == 0


@pytest.mark.parametrize("name", [b"not-utf8-\xff\xfe", b"new\nline", b"tab\tbell\x07", b"-dash"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_odd_names(name: bytes, encoding: str, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    folder.symlink_to(ASSET)
    environment = {"PYTHONIOENCODING": encoding, "N": os.fsdecode(name)}
    done = shell('$Q inspect "./$N" && $Q plan "./$N" --recipe nf4', tmp_path, environment)
    assert done.returncode == 0
    assert "\x07" not in done.stdout
    done = shell('$Q convert "$A" "./out$N" --recipe text --dry-run', tmp_path, environment)
    assert done.returncode == 0


NOT_TEXT = {
    "text": "evaluate $A $A --text PATH",
    "apply": "publish $A me/model --apply PATH",
    "recipe": "plan $A --recipe PATH",
    "run file": "run PATH",
    "types": "gguf $A out --types Q8_0 --dry-run --tensor-type-file PATH",
    "imatrix": "gguf $A out --types Q8_0 --dry-run --imatrix PATH",
    "calibration": "calibrate $A --output out --text PATH",
    "tuning": "tune $A --format nf4 --size 9MB --text PATH --output recipe.toml",
    "model": "inspect PATH",
    "candidate": "verify PATH",
    "types to write": "gguf $A out --types Q8_0 --export PATH",
}


@pytest.mark.parametrize("command", NOT_TEXT.values(), ids=NOT_TEXT)
@pytest.mark.parametrize("device", [False, True])
def test_pipes_and_devices_are_not_read(command: str, device: bool, tmp_path: Path) -> None:
    path = tmp_path / "pipe.toml"
    if device:
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    done = shell("$Q " + command.replace("PATH", str(path)), tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "None" not in done.stderr
    assert "no such" not in done.stderr
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_pipe_in_a_checkpoint(name: str, tmp_path: Path) -> None:
    for path in ASSET.iterdir():
        if path.name != name:
            (tmp_path / path.name).symlink_to(path)
    os.mkfifo(tmp_path / name)
    done = shell("$Q convert . ../out --recipe text", tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {name}: a pipe, a socket or a device; download the file again"
    )


@pytest.mark.parametrize("verb", ["convert $A out --recipe nf4", "gguf $A out --types Q8_0"])
def test_workers_far_beyond_the_processors(verb: str, tmp_path: Path) -> None:
    done = shell(f"$Q {verb} --workers 300", tmp_path)
    assert done.returncode == 2
    many = default_threads()
    assert f"--workers: 300 on {many} processors, expected at most {8 * many}" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", ["-n 24", "-f 1000", "-v 4000000"])
def test_low_limits(limit: str, tmp_path: Path) -> None:
    done = shell(f"ulimit {limit}; $Q convert $A out --recipe nf4", tmp_path)
    assert (done.returncode, (tmp_path / "out").exists()) in [(0, True), (2, False)]


@pytest.mark.parametrize("out", ["/proc/out", "/dev/null/out", "/dev/full", "/sys/out"])
def test_places_where_nothing_can_be_written(out: str, tmp_path: Path) -> None:
    done = shell(f"$Q convert $A {out} --recipe text", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


LONG = "n" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["reproduce", LONG],
        ["finalize", LONG],
        ["amend", LONG],
        ["inspect", LONG],
        ["publish", LONG, "a/b", "--mode", "check"],
        ["gguf", str(ASSET), "o", "--types", "Q4_K_M", "--imatrix", LONG, "--dry-run"],
        ["evaluate", str(ASSET), "--text", str(ASSET / "eval.txt"), "--cache", LONG, "--dry-run"],
        ["reproduce", "~nobody-of-that-name/x"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_names_that_no_file_can_have(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [LONG, "~nobody-of-that-name/x", "a\\u0000b"])
@pytest.mark.parametrize("key", ["model", "out", "imatrix", "activation_stats", "recipe"])
def test_names_in_a_run_file_that_no_file_can_have(
    key: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    top = {"model": str(ASSET), "out": "made"}
    row = {"recipe": "fp8"} | ({"types": "Q4_K_M", "recipe": "mix"} if key == "imatrix" else {})
    (top if key in top else row)[key] = value
    kind = "gguf" if key == "imatrix" else "artifact"
    lines = [f'{name} = "{text}"' for name, text in top.items()]
    rows = [f'{n} = ["{t}"]' if n == "types" else f'{n} = "{t}"' for n, t in row.items()]
    (tmp_path / "run.toml").write_text("\n".join([*lines, f"[[{kind}]]", *rows]))
    assert main(["run", str(tmp_path / "run.toml"), "--dry-run", "--quiet"]) == 2
