"""A run file that names the server of an artifact: it is asked before anything is published."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoints import ASSET
from fake_server import FAULTS, KEY, FakeServer, serving
from pipeline_runs import Capture
from qwen35.cli.main import main
from qwen35.pipeline.run_file import read_run_file

FILE = """
model = "{model}"
out = "made"
depth = "structure"

[[artifact]]
recipe = "fp8"
name = "served"
endpoint = "{url}"
"""


@pytest.fixture
def go(tmp_path: Path, capsys: Capture) -> Any:
    """Return a function that runs a file for a server, and returns exit code and steps."""

    def run(fake: FakeServer) -> tuple[int, dict[str, Any]]:
        (tmp_path / "run.toml").write_text(FILE.format(model=ASSET, url=fake.url))
        code = main(["run", str(tmp_path / "run.toml"), "--json"])
        steps = json.loads(capsys.readouterr().out)["steps"]
        return code, {row["step"]: row for row in steps}

    return run


def test_only_what_serves_well_goes_on(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server at first, then a faulty one, then a sound one: what was made is kept."""
    monkeypatch.setenv("QWEN35_API_KEY", KEY)
    monkeypatch.setattr("qwen35.serving.server_client.time.sleep", lambda _: None)
    with serving() as gone:
        pass
    manifest = tmp_path / "made" / "served" / "qwen35.json"
    code, steps = go(gone)
    assert (code, steps["make served"]["state"]) == (1, "done")
    assert steps["ask served"]["gate"] == "serving"
    assert "cannot be reached" in steps["ask served"]["reasons"][0]
    assert steps["document served"]["state"] == "stopped"
    with serving(FakeServer(change=FAULTS["a wrong answer"].change, key=KEY)) as fake:
        code, steps = go(fake)
        assert (code, steps["make served"]["state"]) == (1, "kept")
        assert steps["ask served"]["findings"][0]["check"] == "behaviour"
        assert json.loads(manifest.read_text())["served"]["passed"] is False
        fake.change = lambda _, turn: turn
        code, steps = go(fake)
        assert (code, steps["ask served"]["state"]) == (0, "done")
    entry = json.loads(manifest.read_text())["served"]
    assert entry["result"] == "passed: 11 answers right, 19 checks of the server"
    assert entry["server"] == "vLLM"
    written = "".join(
        path.read_text() for path in manifest.parent.glob("*.*") if path.suffix in (".json", ".md")
    )
    assert "Asked where it was served: vLLM: passed: 11 answers right" in written
    assert fake.url not in written
    assert KEY not in written


def test_a_server_is_started_by_the_command_line_alone(tmp_path: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = tmp_path / "run.toml"
    file.write_text(FILE.format(model=ASSET, url=f"http://127.0.0.1:{port}"))
    program = Path(__file__).parent / "starting_server.py"
    command = f"{sys.executable} '{program}' {port} '{tmp_path / 'children'}'"
    assert main(["run", str(file), "--serve", f"other={command}"]) == 2
    assert "--serve other: no artifact with an endpoint, expected served" in capsys.readouterr().err
    assert main(["run", str(file), "--serve", f"served={command}", "--json"]) == 0
    steps = {row["step"]: row for row in json.loads(capsys.readouterr().out)["steps"]}
    assert steps["ask served"]["state"] == "done"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert main(["run", str(file), "--serve", "served=false", "--json"]) == 1
    assert "the server that --serve starts ends with exit code 1" in capsys.readouterr().out


def test_a_dry_run_names_the_server_and_asks_nothing(tmp_path: Path, capsys: Capture) -> None:
    with serving() as fake:
        (tmp_path / "run.toml").write_text(FILE.format(model=ASSET, url=fake.url))
        assert main(["run", str(tmp_path / "run.toml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"serving gate; {fake.url}" in shown
    assert fake.heard == []


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('endpoint = "x"', "artifact 1.endpoint: 'x', expected an address such as http://"),
        ('endpoint = "http://u:sesame@x"', "artifact 1.endpoint: an address with a user, a query"),
        ("endpoint = 7", "artifact 1.endpoint: 7, expected a string"),
        ('served_model = "x"', "artifact 1.served_model: without an endpoint; name that too"),
        ('start = "rm -rf /"', "artifact 1.start: unknown key, expected"),
        ('endpoint_command = "x"', "artifact 1.endpoint_command: unknown key"),
        ('api_key = "x"', "artifact 1.api_key: unknown key"),
    ],
)
def test_a_file_names_servers_only(lines: str, problem: str, tmp_path: Path) -> None:
    """No commands, and no keys."""
    text = f'model = "{ASSET}"\nout = "made"\n[[artifact]]\nrecipe = "fp8"\n{lines}\n'
    (tmp_path / "run.toml").write_text(text)
    [found] = read_run_file(tmp_path / "run.toml").problems
    assert str(found).startswith(f"run.toml: {problem}")
    assert "sesame" not in str(found)
