"""Prices of refined codes: what is left of a price is what files with refined codes lose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import qwen35
from checkpoints import random_tensors, tiny_config, write_checkpoint
from gguf_models import sidecars
from hessian_folders import write_hessians
from qwen35.checkpoint.open import fetch
from qwen35.checkpoint.source import Reader
from qwen35.cli.main import main
from qwen35.codecs.floats import f32_from
from qwen35.errors import UsageError
from qwen35.execution.refiners import Curvatures
from qwen35.planning.hessians import open_hessians
from qwen35.progress import Silent
from qwen35.tuning import tuning_job
from qwen35.tuning.measurements import MeasurementKey, Measurements, load_measurements
from qwen35.tuning.prices import Prices, RefinedShares
from qwen35.tuning.refined_shares import comparing_memory, measure_shares
from qwen35.tuning.space import ChoiceSpace

Capture = pytest.CaptureFixture[str]

TYPES = ("q4_0", "q8_0", "f16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("model") / "in", layers=4)


def made(folder: Path, layers: int) -> Path:
    config = tiny_config(text_only=True, mtp=0, layers=layers)
    return write_checkpoint(folder, config, random_tensors(config), sidecars=sidecars())


@pytest.fixture(scope="module")
def statistics(model: Path) -> Path:
    return write_hessians(model, model.parent / "statistics")


@pytest.fixture(scope="module")
def space(model: Path) -> ChoiceSpace:
    return ChoiceSpace(fetch(str(model)), "gguf", TYPES)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Some words to read, and some more of them. " * 40)
    return path


def measured(space: ChoiceSpace, path: Path) -> Path:
    """Write made-up prices that are the same for all weights of a size."""
    table = {
        unit.name: {"q4_0": 1e-9 * unit.numel, "q8_0": 1e-12 * unit.numel, "f16": 0.0}
        for unit in space.units
    }
    weights = sum(unit.numel for unit in space.units)
    key = MeasurementKey("gguf", "base", "", 512, 16, weights=weights)
    zeros = {unit: dict.fromkeys(row, 0.0) for unit, row in table.items()}
    Measurements(key, "base", Prices(table, zeros)).save(path)
    return path


@pytest.fixture(scope="module")
def shares(space: ChoiceSpace, statistics: Path) -> RefinedShares:
    return measure_shares(space, open_hessians(statistics), 2, Silent())


def test_the_shares_are_those_of_files(
    space: ChoiceSpace, shares: RefinedShares, model: Path, statistics: Path, tmp_path: Path
) -> None:
    """Of matrices of few rows, all of which are compared."""
    from gguf import GGUFReader, dequantize

    files = {}
    for codes in ("plain", "refined"):
        hessian = statistics if codes == "refined" else None
        out = tmp_path / codes
        qwen35.gguf(model, out, types="Q4_0", codes=codes, hessian=hessian)
        [path] = out.glob("*.gguf")
        files[codes] = {one.name: one for one in GGUFReader(path).tensors}
    curvatures = Curvatures(open_hessians(statistics))
    compared = 0
    with Reader(space.checkpoint) as reader:
        for unit, [step, *others] in space.members.items():
            name = step.outputs[0].name
            if others or step.rows.count > 64 or files["plain"][name].tensor_type.name != "Q4_0":
                continue
            curvature = curvatures.of(step.rows, 0)
            if curvature is None:
                continue
            opened = step.rows.open(reader)
            exact = np.empty((step.rows.count, step.rows.row))
            for chunk in step.rows.chunks():
                piece = opened.piece(chunk)
                values = f32_from(piece.values, piece.dtype)
                exact[chunk.first : chunk.first + chunk.count] = values
            held_out = np.tril(curvature.triangle[:, : step.rows.row].astype(np.float64))
            losses = {}
            for codes, tensors in files.items():
                decoded = dequantize(tensors[name].data, tensors[name].tensor_type)
                errors = (decoded.reshape(exact.shape) - exact)[:, curvature.order]
                losses[codes] = np.einsum("rj,jk,rk->", errors, held_out, errors)
            assert shares.of(unit, "q4_0") == pytest.approx(
                min(1.0, losses["refined"] / losses["plain"]), rel=1e-3
            )
            compared += 1
    assert compared > 3


def test_shares_are_parts_of_prices(space: ChoiceSpace, shares: RefinedShares) -> None:
    """Codes of most weights are better refined; exact ones are not compared."""
    found = [shares.shares[unit.name]["q4_0"] for unit in space.units]
    assert all(0 < share <= 1 for share in found)
    assert np.median(found) < 0.9
    assert {shares.shares[unit.name]["f16"] for unit in space.units} == {1.0}


def test_threads_do_not_change_them(
    space: ChoiceSpace, shares: RefinedShares, statistics: Path
) -> None:
    assert measure_shares(space, open_hessians(statistics), 1, Silent()) == shares


def test_memory_decides_how_many_are_compared_at_a_time(space: ChoiceSpace) -> None:
    assert comparing_memory(space, 8, None)[0] == 8
    one = comparing_memory(space, 1, None)[1]
    assert comparing_memory(space, 8, one) == (1, one)
    with pytest.raises(UsageError, match="--memory .*: too little, .* for Hessians of"):
        comparing_memory(space, 8, one - 1)


@pytest.fixture
def asked(model: Path, space: ChoiceSpace, text: Path, tmp_path: Path) -> list[str]:
    """A command that tunes with made-up prices, without a size."""
    base = measured(space, tmp_path / "base.json")
    return [
        *("tune", str(model), "--format", "gguf", "--types", "q4_0,q8_0", "--text", str(text)),
        *("--start-from", str(base), "--output", str(tmp_path / "r.toml"), "--quiet"),
    ]


def test_recipes_for_refined_codes(
    asked: list[str],
    space: ChoiceSpace,
    statistics: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are priced so, which the output says; what was compared once is used again."""
    size = space.size({unit.name: "q4_0" for unit in space.units}) + 20_000
    asked += ["--size", str(size), "--overwrite", "--json"]
    assert main(asked) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["codes"] == "plain"
    refining = [*asked, "--hessian", str(statistics)]
    assert main(refining) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["codes"] == "refined"
    kept = load_measurements(tmp_path / "r.json").refined
    assert kept is not None
    prices = load_measurements(tmp_path / "base.json").prices.weights
    expected = sum(
        prices[unit][choice] * kept.of(unit, choice) for unit, choice in first["chosen"].items()
    )
    assert first["predicted_kld"] == pytest.approx(expected)
    of_plain = sum(
        prices[unit][choice] * kept.of(unit, choice) for unit, choice in plain["chosen"].items()
    )
    assert expected <= of_plain  # the best for these prices
    monkeypatch.setattr(tuning_job, "measure_shares", None)  # not again
    assert main(refining) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert main([one for one in asked if one != "--json"]) == 0
    assert "--codes" not in capsys.readouterr().out
    assert main([one for one in refining if one != "--json"]) == 0
    assert capsys.readouterr().out.endswith("r.toml --types Q4_K_M --codes refined\n")


def test_refusals(asked: list[str], statistics: Path, tmp_path: Path, capsys: Capture) -> None:
    asked += ["--size", "9bpw"]
    refining = [*asked, "--hessian", str(statistics)]

    def said(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "--probes: given with --hessian; probes have plain codes" in said(
        *refining, "--probes", "1"
    )
    assert "not a folder" in said(*asked, "--hessian", str(tmp_path / "none"))
    path = tmp_path / "base.json"
    content = json.loads(path.read_text())
    for shares in ({"layers": {"q4_0": 1.5}}, {"layers": {"q4_0": -1}}, 3):
        content["refined"] = {"hessians": "", "shares": shares}
        path.write_text(json.dumps(content))
        assert "malformed measurements" in said(*asked)
    assert not (tmp_path / "r.toml").exists()


def test_hessians_of_another_model(
    statistics: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = made(tmp_path / "in", layers=3)
    asked = ["tune", str(other), "--format", "gguf", "--types", "q8_0", "--size", "9bpw"]
    files = ["--text", str(text), "--output", str(tmp_path / "r.toml")]
    assert main([*asked, *files, "--hessian", str(statistics)]) == 2
    assert "hessians: " in capsys.readouterr().err


def test_damaged_hessians_leave_the_prices(
    asked: list[str], statistics: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The command can be repeated with others."""
    shutil.copytree(statistics, tmp_path / "statistics")
    file = tmp_path / "statistics" / "hessians" / "layer-0001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert main([*asked, "--size", "9bpw", "--hessian", str(tmp_path / "statistics")]) == 2
    assert "layer-0001.safetensors, " in capsys.readouterr().err
    assert not (tmp_path / "r.toml").exists()
    kept, base = (load_measurements(tmp_path / name) for name in ("r.json", "base.json"))
    assert kept.prices == base.prices
