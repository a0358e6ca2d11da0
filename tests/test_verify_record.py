"""`qwen35 verify --record`, and what publishing makes of a recorded fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hub_client import World
from qwen35.cli.main import main
from running import run

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def nf4(dense: Path, tmp_path: Path) -> Path:
    return run(dense, tmp_path / "nf4").out


def manifest(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "qwen35.json").read_text())
    return parsed


def test_verdict_is_recorded_when_asked(nf4: Path, dense: Path, capsys: Capture) -> None:
    before = manifest(nf4)
    assert main(["verify", str(nf4), "--source", str(dense)]) == 0
    assert manifest(nf4) == before
    assert main(["verify", str(nf4), "--source", str(dense), "--record"]) == 0
    after = manifest(nf4)
    assert {name: after[name] for name in before} == before
    verified = after["verified"]
    assert (verified["passed"], verified["depth"], verified["findings"]) == (True, "numbers", [])
    assert "artifact" not in verified  # where it lay is nobody's business
    content = (nf4 / "qwen35.json").read_bytes()
    assert main(["verify", str(nf4), "--source", str(dense), "--record"]) == 0
    assert (nf4 / "qwen35.json").read_bytes() == content


def test_recorded_fault_stops_a_push_until_it_is_mended(
    world: World, nf4: Path, dense: Path
) -> None:
    path = nf4 / "model.safetensors"
    right = path.read_bytes()
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    assert main(["verify", str(nf4), "--source", str(dense), "--record", "--quiet"]) == 1
    assert manifest(nf4)["verified"]["passed"] is False
    path.write_bytes(right)
    done = world.publish(folder=nf4)
    assert done.code == 1
    assert "STOPPED qwen35.json: records a failed verification" in done.out
    assert not world.hub.repos
    assert main(["verify", str(nf4), "--source", str(dense), "--record", "--quiet"]) == 0
    assert world.publish(folder=nf4).code == 0


def test_nothing_to_record_in(dense: Path, nf4: Path, capsys: Capture) -> None:
    assert main(["verify", str(dense), "--record"]) == 2
    assert "holds no qwen35.json; leave it out" in capsys.readouterr().err
    (nf4 / "model.sig").write_text("{}")
    assert main(["verify", str(nf4), "--record"]) == 2
    assert "model.sig signs the manifest as it is" in capsys.readouterr().err
