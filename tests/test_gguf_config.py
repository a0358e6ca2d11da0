"""config.json in GGUF files: every key as llama.cpp's converter writes it, or a refusal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoints import ASSET, make_checkpoint, tiny_config
from evaluating import measure
from golden_config import GOLDEN, VARIANTS, upstream_keys, varied
from qwen35.checkpoint.gguf_header import read_container
from qwen35.checkpoint.source import open_folder, open_published
from qwen35.cli import evaluate_command
from qwen35.cli.main import main
from qwen35.errors import ConfigError
from qwen35.evaluation.evaluation_table import report_text
from qwen35.model.config_notes import refuse_uncarried
from qwen35.model.model_config import parse_config
from qwen35.model.rope import rope_of
from qwen35.planning.gguf_files import metadata
from qwen35.planning.gguf_files.metadata import SourceDocuments, keys_of
from qwen35.planning.gguf_files.mixes import FILE_TYPES
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import verify
from qwen35.writing.write import write

RECORDED: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text())

SCALING = "qwen35.rope.scaling."

BEYOND: dict[str, dict[str, Any]] = {
    # llama.cpp ignores yarn_attn_factor for this family, but multiplies by attn_factor
    "yarn with an attention factor": {f"{SCALING}attn_factor": 1.5 / 1.1386294361119891},
    "yarn with mscale": {f"{SCALING}attn_factor": 1.121751143713058 / 1.1386294361119891},
    # transformers computes with the key beside the parameters; the converter overlooks it
    "yarn from a length beside": {f"{SCALING}original_context_length": 512},
}
"""Where the numbers of transformers need another key than the converter writes."""


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> SourceDocuments:
    """No documents: config.json alone decides the keys compared here."""
    return SourceDocuments(open_published("Qwen3.5-0.8B"), tmp_path_factory.mktemp("documents"))


def our_keys(config: dict[str, Any], documents: SourceDocuments) -> dict[str, Any]:
    parsed = parse_config(config)
    options: Any = {"vocabulary": None, "mtp_layers": parsed.mtp_layers}
    keys = keys_of(parsed, documents, FILE_TYPES["F16"], (), **options)
    shared = ("general.architecture", "general.file_type")
    return {k: v for k, v in keys.items() if k in shared or not k.startswith("general.")}


@pytest.mark.parametrize("name", VARIANTS)
def test_keys_are_those_of_the_converter(name: str, documents: SourceDocuments) -> None:
    ours = our_keys(varied(name), documents)
    expected = RECORDED[name] | BEYOND.get(name, {})
    assert ours == {
        key: pytest.approx(v) if isinstance(v, float) else v for key, v in expected.items()
    }
    assert list(ours)[: len(RECORDED[name])] == list(RECORDED[name]) or name in BEYOND


@pytest.mark.heavy
def test_the_golden_keys_are_the_converters(tmp_path: Path) -> None:
    llama = os.environ.get("QWEN35_LLAMA_CPP")
    if llama is None:
        pytest.skip("needs the source of llama.cpp: make test-all")
    assert upstream_keys(Path(llama), tmp_path) == RECORDED


def test_a_factor_of_null_is_the_ratio_of_lengths(documents: SourceDocuments) -> None:
    """The converter writes no scaling at all."""
    config = tiny_config()
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024}
    config["text_config"]["rope_parameters"] |= rope
    assert our_keys(config, documents)[f"{SCALING}factor"] == 4.0


Change = Callable[[dict[str, Any]], None]


def text(**keys: Any) -> Change:
    return lambda config: config["text_config"].update(keys)


def rope(**keys: Any) -> Change:
    return lambda config: config["text_config"]["rope_parameters"].update(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rope(rope_type="dynamic", factor=2.0), "rope_type dynamic, which llama.cpp cannot"),
        (rope(rope_type="longrope", short_factor=[1], long_factor=[2]), "rope_type longrope"),
        (
            rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
            "rope_type llama3",
        ),
        (rope(rope_type="proportional"), "rope_type proportional"),
        (rope(rope_type="mrope"), "rope_type is 'mrope'"),
        (rope(rope_type="yarn"), "rope_type yarn without factor"),
        (rope(rope_type="linear", factor="2"), "factor is '2'"),
        (rope(rope_type="linear", factor=0), "factor is 0"),
        (rope(rope_theta=None), "rope_theta is None"),
        (text(rope_parameters=[1]), "rope_parameters is [1]"),
        (
            text(rope_parameters={"full_attention": {}}),
            "separate rope_parameters for full_attention layers",
        ),
        (text(hidden_act="gelu"), "text_config.hidden_act is 'gelu'"),
        (text(attention_bias=True), "text_config.attention_bias is True"),
        (text(is_causal=False), "text_config.is_causal is False"),
        (text(per_layer_config={"0": {}}), "text_config.per_layer_config"),
    ],
)
def test_numbers_that_a_file_cannot_carry_are_refused(change: Change, message: str) -> None:
    config = tiny_config()
    change(config)
    with pytest.raises(ConfigError) as caught:
        refuse_uncarried(parse_config(config), vision=False)
    assert message in str(caught.value)


def test_a_tower_that_a_projector_cannot_carry_is_refused() -> None:
    config = tiny_config()
    config["vision_config"] |= {"hidden_act": "silu", "rope_parameters": {"rope_theta": 10000.0}}
    parsed = parse_config(config)
    refuse_uncarried(parsed, vision=False)
    with pytest.raises(ConfigError, match=r"vision_config\.hidden_act is 'silu'"):
        refuse_uncarried(parsed, vision=True)


def test_gguf_refuses_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    rope(rope_type="dynamic", factor=2.0)(config)
    (source / "config.json").write_text(json.dumps(config))
    assert main(["gguf", str(source), str(tmp_path / "out")]) == 2
    assert "rope_type dynamic, which llama.cpp cannot compute" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- numbers: llama.cpp against transformers


def scaled(folder: Path, **parameters: Any) -> Path:
    """Return the embedded checkpoint with scaled positions."""
    source = Path(shutil.copytree(ASSET, folder))
    config = json.loads((source / "config.json").read_text())
    rope(**parameters)(config)
    (source / "config.json").write_text(json.dumps(config))
    return source


def in_f16(source: Path, out: Path) -> Path:
    plan = make_plan(open_folder(source), load_recipe("mix", "gguf"), types=("F16",), drop_mtp=True)
    return write(plan, out, threads=1).out / plan.files[0].name


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_scaled_positions_compute_what_transformers_computes(
    formats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file without the keys is abnormal, whether it is a candidate or the floor itself."""
    source = scaled(tmp_path / "source", **YARN, attention_factor=1.3)
    good = in_f16(source, tmp_path / "good")
    keys = read_container(good).keys
    assert keys[f"{SCALING}type"] == "yarn"
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "rope_of", lambda text: replace(rope_of(text), kind="default"))
        bare = in_f16(source, tmp_path / "bare")
        blind = measure(formats, str(source), str(bare), context=256)
    report = measure(formats, str(source), str(good), str(bare), context=256)
    right, wrong = (row.comparison for row in report.candidates)
    assert right.kld.value < 1e-5
    assert wrong.kld.value > 1e-3
    assert [finding.subject for finding in report.findings] == ["bare/source-F16"]
    assert "[noise-floor] bare/source-F16: abnormal: unquantized (F16)" in report_text(report)
    assert [finding.check for finding in blind.findings] == ["noise-floor"] * 2
    assert "abnormal noise floor" in report_text(blind)
    assert "within 3 times" not in report_text(blind)
    monkeypatch.setattr(evaluate_command, "evaluate", lambda *_, **__: blind)
    assert main(["evaluate", str(source), str(bare)]) == 1
    verdict = verify(open_artifact(str(bare)), source=open_folder(source))
    named = {finding.message.partition(" ")[0] for finding in verdict.findings}
    assert {f"{SCALING}{key}" for key in ("type", "factor", "original_context_length")} <= named
    assert verify(open_artifact(str(good)), source=open_folder(source)).findings == ()


@pytest.mark.heavy
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 2.0},
        {**YARN, "mscale": 2.0, "mscale_all_dim": 1.0},
        YARN,
        {"partial_rotary_factor": 0.5, "mrope_section": [6, 5, 5], "rope_theta": 5000.0},
    ],
    ids=json.dumps,
)
def test_every_setting_computes_what_transformers_computes(
    formats: Path, tmp_path: Path, parameters: dict[str, Any]
) -> None:
    source = scaled(tmp_path / "source", **parameters)
    report = measure(formats, str(source), str(in_f16(source, tmp_path / "out")), context=256)
    assert report.candidates[0].comparison.kld.value < 1e-5
    assert report.findings == []
