"""Refined codes in artifacts: closer on held-out tokens, the same bytes whoever writes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

import qwen35
from gguf_models import make_variant
from hessian_folders import write_hessians
from qwen35.array_types import F32
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.source import Reader
from qwen35.cli.main import main
from qwen35.codecs import pieces
from qwen35.codecs.floats import empty, f32_from
from qwen35.codecs.ggml.grids import grid_of, with_codes
from qwen35.codecs.registry import codec_of
from qwen35.errors import UsageError
from qwen35.evaluation.models import open_candidates
from qwen35.execution.refiners import Guard
from qwen35.planning.hessians import open_hessians
from qwen35.planning.memory import peak_memory
from qwen35.planning.refinement import refined_codes, refined_targets, refining_memory
from qwen35.planning.sources import open_source
from qwen35.publishing.repo_documents import documents
from running import load_all, tree
from watching import Watching

pytestmark = pytest.mark.sentences


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("source"), "dense")


@pytest.fixture(scope="module")
def hessian(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hessians(source, tmp_path_factory.mktemp("hessians") / "statistics")


@pytest.fixture(scope="module")
def expected(source: Path, hessian: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("expected") / "out"
    qwen35.gguf(source, out, types="Q4_K_M", codes="refined", hessian=hessian, threads=1)
    return out


def values(artifact: Path) -> dict[Any, F32]:
    """Return the weights of a checkpoint or a GGUF file by role, layer and expert."""
    checkpoint, found = open_source(artifact), {}
    with Reader(checkpoint) as reader:
        for item in inventory(checkpoint):
            flat = empty(item.spec.dtype, item.spec.numel)
            codec_of(item.weight).open(reader, item.weight, item.spec).read_into(0, flat)
            matrix = f32_from(flat, item.spec.dtype).reshape(item.spec.shape)
            for number, part in enumerate(list(item.experts()) or [item]):
                key = part.role.name, part.role.layer, part.role.expert
                rows = part.spec.shape
                found[key] = matrix if part is item else _expert(matrix, number, rows)
    return found


def _expert(stack: F32, number: int, shape: tuple[int, ...]) -> F32:
    matrix: F32 = stack.reshape(-1, *shape)[number]
    return matrix


def losses(artifact: Path, source: Path, hessian: Path) -> dict[Any, float]:
    """Return the loss of each weight on held-out tokens, in the columns of the source."""
    originals, found = values(source), values(artifact)
    result = {}
    for key, measured in open_hessians(hessian).by_weight.items():
        if key in found and key in originals:
            error = (found[key] - originals[key]).astype(np.float64)
            result[key] = float(((error @ measured.held_out) * error).sum())
    return result


def file_of(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


def refined_of(folder: Path) -> dict[str, dict[str, str]]:
    recorded = json.loads((folder / "qwen35.json").read_text())
    table: dict[str, dict[str, str]] = recorded["refined"]
    return table


def interrupting(step: int) -> None:
    """Interrupt a run after some weights."""
    if step == 12:
        raise KeyboardInterrupt


@pytest.mark.parametrize("moe", [False, True])
def test_every_weight_errs_less_in_its_layers_outputs(
    source: Path, hessian: Path, expected: Path, tmp_path: Path, *, moe: bool
) -> None:
    if moe:  # experts in stacks; gate and up projections of one stack
        source = make_variant(tmp_path / "source", "moe")
        hessian = write_hessians(source, tmp_path / "statistics")
        options: Any = {"codes": "refined", "hessian": hessian, "threads": 1}
        expected = qwen35.gguf(source, tmp_path / "refined", types="Q4_K_M", **options).out
    qwen35.gguf(source, tmp_path / "plain", types="Q4_K_M", threads=1)
    plain = losses(file_of(tmp_path / "plain"), source, hessian)
    refined = losses(file_of(expected), source, hessian)
    quantized = [key for key in plain if plain[key] > 0]
    assert len(quantized) > 30
    assert {key for key in quantized if refined[key] >= plain[key]} == set()
    assert sum(refined.values()) < 0.75 * sum(plain.values())
    (record,) = refined_of(expected).values()
    assert set("".join(record.values())) == {"1"}
    assert qwen35.verify(expected, source=source, hessian=hessian).passed


def test_white_inputs_keep_the_plain_codes(source: Path, tmp_path: Path) -> None:
    hessian = write_hessians(source, tmp_path / "white", spectrum=0, tokens=300)
    options: Any = {"types": "Q4_K_M", "threads": 2}
    qwen35.gguf(source, tmp_path / "plain", **options)
    refined = qwen35.gguf(source, tmp_path / "out", codes="refined", hessian=hessian, **options)
    digits = refined_of(refined.out)[file_of(refined.out).name]
    kept, left = (
        losses(file_of(refined.out), source, hessian),
        losses(file_of(tmp_path / "plain"), source, hessian),
    )
    assert "0" in digits.values()
    assert {key for key in kept if kept[key] > left[key]} == set()
    assert qwen35.verify(refined.out, source=source, hessian=hessian).passed
    if "1" not in digits.values():
        assert file_of(refined.out).read_bytes() == file_of(tmp_path / "plain").read_bytes()


def test_whoever_writes_them_the_bytes_are_the_same(
    source: Path, hessian: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"types": "Q4_K_M", "codes": "refined", "hessian": hessian}
    qwen35.gguf(source, tmp_path / "workers", workers=2, threads=1, **options)
    assert tree(tmp_path / "workers") == tree(expected)
    for number in (1, 2):
        qwen35.gguf(source, tmp_path / "slices", slice=(number, 2), threads=2, **options)
    qwen35.finalize(tmp_path / "slices")
    assert tree(tmp_path / "slices") == tree(expected)
    monkeypatch.setattr(pieces, "PIECE", 5 * 256)
    qwen35.gguf(source, tmp_path / "pieces", threads=3, **options)
    assert tree(tmp_path / "pieces") == tree(expected)


def test_a_killed_run_goes_on_to_the_same_bytes(
    source: Path, hessian: Path, expected: Path, tmp_path: Path
) -> None:
    from qwen35.sinks import tensor_writer

    options: Any = {"types": "Q4_K_M", "codes": "refined", "hessian": hessian, "threads": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_writer, "SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            qwen35.gguf(source, tmp_path / "out", progress=Watching(interrupting), **options)
    again = Watching()
    qwen35.gguf(source, tmp_path / "out", progress=again, **options)
    assert again.title.startswith("continuing")
    assert tree(tmp_path / "out") == tree(expected)


def test_it_is_reproduced_from_the_manifest_and_the_hessians(
    source: Path, hessian: Path, expected: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", str(expected), "--source", str(source), "--quiet"]
    assert main(command) == 2
    assert "made with the Hessians in statistics; give them: --hessian" in capsys.readouterr().err
    assert main([*command, "--hessian", str(hessian)]) == 0
    assert "reproduced, byte for byte" in capsys.readouterr().out


FORMATS = ("text-nf4", "text-fp8", "nvfp4", "int4", "fp8-channel")


@pytest.mark.parametrize("recipe", FORMATS)
def test_scales_stay_and_the_verifier_knows_the_method(
    dense: Path, dense_hessians: Path, tmp_path: Path, recipe: str
) -> None:
    options: Any = {"recipe": recipe, "threads": 1}
    qwen35.convert(dense, tmp_path / "plain", **options)
    result = qwen35.convert(
        dense, tmp_path / "out", codes="refined", hessian=dense_hessians, **options
    )
    assert result.passed
    before, after = load_all(tmp_path / "plain"), load_all(tmp_path / "out")
    record = {name for table in refined_of(tmp_path / "out").values() for name in table}
    assert {name for name in after if not after[name].equal(before[name])} == record
    with_codes = losses(tmp_path / "out", dense, dense_hessians)
    without = losses(tmp_path / "plain", dense, dense_hessians)
    assert sum(with_codes.values()) < 0.75 * sum(without.values())
    assert qwen35.verify(tmp_path / "out", source=dense, hessian=dense_hessians).passed
    shutil.copytree(tmp_path / "out", tmp_path / "broken")
    _break(tmp_path / "broken", min(record))
    found = qwen35.verify(tmp_path / "broken", source=dense, depth="numbers").findings
    assert {one.check for one in found} - {"hash"}


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"text": [{"name": "a.txt", "sha256": "5" * 64, "more": 1}], "tokens": 1200}, True),
        ({"text": [{"name": "a.txt"}], "tokens": 1200}, False),
        ({"text": "a.txt", "tokens": "1200"}, False),
        ({}, False),
    ],
)
def test_reports_and_cards_say_which_codes_are_refined(
    dense: Path, tmp_path: Path, about: dict[str, Any], said: bool
) -> None:
    measured, out = write_hessians(dense, tmp_path / "own", about=about), tmp_path / "out"
    options: Any = {"recipe": "text-nf4", "hessian": measured, "threads": 2}
    qwen35.convert(dense, out, codes="refined+scales", **options)
    recorded = json.loads((out / "qwen35.json").read_text())["recipe"]["hessians"]
    text = {"text": [{"name": "a.txt", "sha256": "5" * 64}], "tokens": 1200} if said else {}
    assert recorded == {"name": "own", "sha256": open_hessians(measured).sha256} | text
    card = documents(out, "someone/some-model")["README.md"].decode()
    shown = "Refined codes and scales: chosen by what they do to the outputs of layers"
    assert shown + (", calibrated on 1,200 tokens of a.txt." if said else ".") in card
    assert not qwen35.reproduce(out, source=dense, hessian=measured).findings


def test_models_tell_by_their_own_file(source: Path, expected: Path, tmp_path: Path) -> None:
    (model,) = open_candidates([str(expected)])
    assert model.codes == "refined"
    assert refined_codes(None) == ""
    manifest = {"refined": {"a.gguf": {"x": "0", "y": "01"}, "b.gguf": {"x": "0", "z": "20"}}}
    assert refined_codes(manifest) == refined_codes(manifest, ["b.gguf"]) == "refined+scales"
    assert refined_codes(manifest, ["a.gguf"]) == "refined"
    assert refined_codes({"refined": {"a.gguf": {"x": "00"}}}) == ""
    qwen35.gguf(source, tmp_path / "plain", types="Q4_K_M", threads=1)
    (model,) = open_candidates([str(tmp_path / "plain")])
    assert model.codes == ""


def _reversed(data: bytes) -> bytes:
    return data[::-1]


def _break(folder: Path, name: str, change: Callable[[bytes], bytes] = _reversed) -> None:
    """Change the codes of a few rows: turn them upside down."""
    for file in folder.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        size = int.from_bytes(data[:8], "little")
        entry = json.loads(data[8 : 8 + size]).get(name)
        if entry is not None:
            begin, end = entry["data_offsets"]
            part = slice(8 + size + begin, 8 + size + begin + (end - begin) // 8)
            data[part] = change(bytes(data[part]))
            file.write_bytes(data)


def test_searched_scales_lose_less_again(dense: Path, dense_hessians: Path, tmp_path: Path) -> None:
    options: Any = {"recipe": "text-nf4", "hessian": dense_hessians}
    refined, out = tmp_path / "refined", tmp_path / "out"
    qwen35.convert(dense, refined, codes="refined", threads=2, **options)
    assert qwen35.convert(dense, out, codes="refined+scales", threads=2, **options).passed
    (digits,) = refined_of(out).values()
    assert "2" in set(digits.values()) <= set("012")
    before, after = losses(refined, dense, dense_hessians), losses(out, dense, dense_hessians)
    assert {key for key in after if after[key] > before[key] * (1 + 1e-6)} == set()
    assert sum(after.values()) < 0.95 * sum(before.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", 33 * 256)
        qwen35.convert(dense, tmp_path / "pieces", codes="refined+scales", threads=1, **options)
    assert tree(tmp_path / "pieces") == tree(out)
    assert qwen35.verify(out, source=dense, hessian=dense_hessians).passed
    name = next(one for one in digits if digits[one] == "2" and "gate_proj" in one)
    _break(out, f"{name}.absmax", lambda data: bytes(len(data)))
    assert "absmax" in {one.check for one in qwen35.verify(out, source=dense).findings}


def test_where_searched_scales_lose_more_refined_ones_are_written(
    dense: Path, dense_hessians: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"recipe": "text-nf4", "hessian": dense_hessians, "threads": 2}
    qwen35.convert(dense, tmp_path / "refined", codes="refined", **options)
    # the scales that are farthest off
    monkeypatch.setattr(
        "qwen35.codecs.refining.searched_scales",
        lambda weights, grid, others, curvature: np.full(grid.scales.shape, 8, np.uint8),
    )
    qwen35.convert(dense, tmp_path / "out", codes="refined+scales", **options)
    before, after = load_all(tmp_path / "refined"), load_all(tmp_path / "out")
    assert all(after[name].equal(before[name]) for name in before)
    assert set("".join(*map(dict.values, refined_of(tmp_path / "out").values()))) <= set("01")


def test_formats_whose_scales_are_searched_anyway_are_refined(
    source: Path, hessian: Path, expected: Path, tmp_path: Path
) -> None:
    options: Any = {"types": "Q4_K_M", "hessian": hessian, "threads": 2}
    qwen35.gguf(source, tmp_path / "out", codes="refined+scales", **options)
    assert refined_of(tmp_path / "out") == refined_of(expected)
    assert values(file_of(tmp_path / "out")).keys() == values(file_of(expected)).keys()
    assert _data(file_of(tmp_path / "out")) == _data(file_of(expected))


def _data(file: Path) -> dict[str, bytes]:
    return {one.name: one.data.tobytes() for one in GGUFReader(file).tensors}


def test_exchanged_codes_are_found_by_the_errors_in_outputs(
    source: Path, hessian: Path, expected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(expected, tmp_path / "out")
    file = file_of(tmp_path / "out")
    tensor = next(one for one in GGUFReader(file).tensors if one.name.endswith("ffn_gate.weight"))
    kind, shape = "q4_K", (int(tensor.shape[1]), int(tensor.shape[0]))
    assert tensor.tensor_type.name == "Q4_K"
    blocks = np.array(tensor.data).reshape(-1)
    grid = grid_of(blocks, kind, shape)
    moved = np.clip(grid.codes.astype(int) + np.resize([1, 0, 0, -1, 0, 0], shape), 0, 15)
    data = bytearray(file.read_bytes())
    at = int(tensor.data_offset)
    data[at : at + blocks.size] = with_codes(blocks, kind, moved.astype(np.uint8)).tobytes()
    file.write_bytes(data)

    def found(**options: Any) -> dict[str, str]:
        verdict = qwen35.verify(tmp_path / "out", source=source, **options)
        return {one.check: one.message for one in verdict.findings}

    assert found().keys() == {"hash"}
    findings = found(hessian=hessian)
    assert findings.keys() == {"hash", "outputs"}
    assert "refined codes of 1 of 1 matrices err more in outputs" in findings["outputs"]
    moved[1:] = grid.codes[1:]  # in one row alone
    data[at : at + blocks.size] = with_codes(blocks, kind, moved.astype(np.uint8)).tobytes()
    file.write_bytes(data)
    assert "refined codes of 1 rows err more" in found(hessian=hessian)["outputs"]
    other = write_hessians(source, tmp_path / "other", tokens=40)
    for more, words in (
        (["--source", source, "--hessian", other], "not the Hessians that the manifest names"),
        (["--hessian", hessian], "judges weights by their source"),
    ):
        assert main(["verify", str(tmp_path / "out"), "--quiet", *map(str, more)]) == 2
        assert words in capsys.readouterr().err


def test_a_matrix_at_most_waits_for_its_verdict(
    source: Path, hessian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[tuple[Guard, int], int] = {}
    waiting: list[int] = []

    def finished(guard: Guard, span: Any, written: Any) -> Any:
        for number, (_, _, data) in written:
            kept[guard, number] = kept.get((guard, number), 0) + len(data)
        waiting.append(sum(kept.values()))
        verdicts = original(guard, span, written)
        for verdict in verdicts:
            held = kept.pop((guard, verdict.slab))
            assert verdict.held is None or held == sum(len(data) for *_, data in verdict.held)
        return verdicts

    original = Guard.finished
    monkeypatch.setattr(Guard, "finished", finished)
    monkeypatch.setattr(pieces, "PIECE", 512)  # a span is 32 of them
    options: Any = {"types": "Q4_K_M", "codes": "refined", "hessian": hessian, "threads": 1}
    plan = qwen35.gguf(source, tmp_path / "out", **options).plan
    matrices = [t.nbytes // len(step.rows.slabs) for step, t in refined_targets(plan)]
    assert len(waiting) > len(matrices)  # several spans a matrix
    assert max(waiting) == max(matrices)
    assert refining_memory(plan, 1) > max(matrices)


def test_without_a_word_on_it_they_are_not_the_nearest(
    dense: Path, dense_hessians: Path, tmp_path: Path
) -> None:
    options: Any = {"recipe": "text-nf4", "codes": "refined", "hessian": dense_hessians}
    qwen35.convert(dense, tmp_path / "out", threads=1, **options)
    manifest = tmp_path / "out" / "qwen35.json"
    recorded = json.loads(manifest.read_text())
    del recorded["refined"]
    manifest.write_text(json.dumps(recorded))
    found = qwen35.verify(tmp_path / "out", source=dense, depth="numbers").findings
    assert {one.check for one in found} == {"codes"}


def test_a_rule_decides_for_its_weights(dense: Path, dense_hessians: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'format = "nf4"\nbase = "text-nf4"\n'
        '[[rules]]\nmatch = "mlp"\naction = "nf4"\ncodes = "refined"\n'
    )
    options: Any = {"recipe": recipe, "hessian": dense_hessians, "threads": 1}
    qwen35.convert(dense, tmp_path / "out", **options)
    names = {name for table in refined_of(tmp_path / "out").values() for name in table}
    assert names
    assert all(".mlp." in name for name in names)
    qwen35.convert(dense, tmp_path / "plain", recipe="text-nf4", threads=1)
    before, after = load_all(tmp_path / "plain"), load_all(tmp_path / "out")
    assert {name for name in after if not after[name].equal(before[name])} == names


def test_what_does_not_fit_is_refused_in_a_sentence(
    dense: Path, dense_hessians: Path, moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> str:
        out = str(tmp_path / "out")
        assert main(["convert", str(dense), out, "--quiet", *map(str, arguments)]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "needs Hessians of the model's inputs" in said("--codes", "refined")
    assert "has no effect on plain codes" in said("--hessian", dense_hessians)
    other = write_hessians(moe, tmp_path / "other", tokens=4)
    assert "of a model with" in said("--codes", "refined", "--hessian", other)
    recipe = tmp_path / "mine.toml"
    recipe.write_text('format = "nf4"\nbase = "nf4"\n[[rules]]\nmatch="mlp"\naction="nf4"\n')
    for codes, words in (
        ('"finer"', "codes = 'finer'"),
        ('""', "codes = '', expected 'plain'"),
        ('"refined"', "needs Hessians"),
    ):
        recipe.write_text(recipe.read_text().partition("codes")[0] + f"codes = {codes}\n")
        assert words in said("--recipe", recipe)


def test_a_plan_states_what_refining_takes(
    source: Path, hessian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: Any = {"types": "Q4_K_M", "dry_run": True}
    plain = qwen35.gguf(source, tmp_path / "out", **options).plan
    refined = qwen35.gguf(
        source, tmp_path / "out", codes="refined", hessian=hessian, **options
    ).plan
    widest = max(one.columns for one in open_hessians(hessian).by_weight.values())
    for threads in (1, 3):
        more = peak_memory(refined, threads) - peak_memory(plain, threads)
        assert more > threads * 6 * 4 * widest**2  # three matrices, and what they are made of
    assert plain.digest != refined.digest
    assert plain.nbytes == refined.nbytes
    command = ["gguf", str(source), str(tmp_path / "out"), "--types", "Q4_K_M", "--dry-run"]
    assert main([*command, "--codes", "refined", "--hessian", str(hessian)]) == 0
    said = capsys.readouterr().out
    assert "refines the codes of " in said
    assert "of one processor" in said


def test_a_plan_needs_no_hessians(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    rule = '[[rules]]\nmatch = "mlp"\naction = "{}"\ncodes = "refined"\n'
    recipe.write_text('format = "nf4"\nbase = "nf4"\n' + rule.format("nf4"))
    assert qwen35.plan(source, recipe=recipe).recipe.rules[0].codes == "refined"
    recipe.write_text('format = "gguf"\n' + rule.format("q4_K"))
    assert qwen35.plan(source, recipe=recipe, types="Q4_K_M").recipe.rules[0].codes == "refined"


def test_a_run_file_asks_for_them(dense: Path, dense_hessians: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    top = f'model = "{dense}"\nout = "made"\ndepth = "numbers"\n'
    file.write_text(f'{top}[[artifact]]\nrecipe = "text-nf4"\ncodes = "refined"\nhessian = "h"\n')
    shutil.copytree(dense_hessians, tmp_path / "h")
    assert qwen35.run(file, threads=1).passed
    (made,) = (tmp_path / "made").glob("*/qwen35.json")
    assert "refined" in json.loads(made.read_text())
    file.write_text(file.read_text().replace('"refined"', '"finer"'))
    with pytest.raises(UsageError, match="artifact 1.codes: 'finer' is unknown"):
        qwen35.run(file)
