"""Checkpoints that are not as their config.json says: every verb takes what its output needs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from checkpoints import ASSET, Tensors, random_tensors, tiny_config, write_checkpoint
from qwen35.api.calibrate_api import planned
from qwen35.api.convert_api import convert
from qwen35.api.gguf_api import gguf
from qwen35.api.plan_api import plan
from qwen35.api.verify_api import verify
from qwen35.calibration.calibration_plan import CalibrationRequest
from qwen35.checkpoint.gguf_header import read_gguf
from qwen35.checkpoint.open import describe, gguf_files
from qwen35.checkpoint.source import open_folder
from qwen35.errors import InputError, TensorError
from qwen35.pipeline.planned_artifacts import plan_artifacts
from qwen35.pipeline.run_request import RunRequest, path_artifacts
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.tuning.tuning_job import prepare
from qwen35.tuning.tuning_request import TuningRequest

_OWN = "model.language_model."
_TOWER = "model.visual."
_PROMISED = "config.json promises 1 multi-token-prediction layer(s), but the checkpoint has none"

Change = Callable[[Tensors, dict[str, Any]], Tensors]


def _without(*starts: str) -> Change:
    return lambda tensors, _: {k: v for k, v in tensors.items() if not k.startswith(starts)}


def _renamed(**prefixes: str) -> Change:
    def change(tensors: Tensors, _: dict[str, Any]) -> Tensors:
        named = {}
        for name, tensor in tensors.items():
            start = "text" if name.startswith(_OWN) else "visual"
            own = _OWN if start == "text" else _TOWER
            prefix = prefixes.get(start) if name.startswith(own) else None
            named[name if prefix is None else prefix + name.removeprefix(own)] = tensor
        return named

    return change


def _two_promised(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    config["text_config"]["mtp_num_hidden_layers"] = 2
    return tensors


def _not_promised(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    del config["text_config"]["mtp_num_hidden_layers"]
    return tensors


def _second_layer(tensors: Tensors, _: dict[str, Any]) -> Tensors:
    first = "mtp.layers.0."
    more = {k.replace(first, "mtp.layers.1."): v for k, v in tensors.items() if first in k}
    return tensors | {name: tensor.clone() for name, tensor in more.items()}


def _half_a_second(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    more = _second_layer(tensors, config)
    del more["mtp.layers.1.mlp.up_proj.weight"]
    return more


def _other_width(tensors: Tensors, _: dict[str, Any]) -> Tensors:
    return tensors | {"mtp.fc.weight": tensors["mtp.fc.weight"][:, :64].contiguous()}


def _half_a_tower(tensors: Tensors, _: dict[str, Any]) -> Tensors:
    return {k: v for k, v in tensors.items() if ".visual.blocks.1." not in k}


def _text_config(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    text = config.pop("text_config")
    tied = config["tie_word_embeddings"]
    config.clear()
    config |= text | {"architectures": ["Qwen3_5ForCausalLM"], "tie_word_embeddings": tied}
    return tensors


def _both(*changes: Change) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> Tensors:
        for one in changes:
            tensors = one(tensors, config)
        return tensors

    return change


CASES: dict[str, tuple[Change, int, str]] = {
    "saved by transformers": (
        _without("mtp."),
        0,
        f"{_PROMISED}: the output promises none; convert and",
    ),
    "a promise too many": (_two_promised, 1, "promises 2 multi-token-prediction layer(s), but"),
    "no promise": (_not_promised, 1, "promises 0 multi-token-prediction layer(s), but"),
    "part of a layer": (_without("mtp.layers.0.mlp."), 0, "is not whole, mtp.layers.0.mlp."),
    "no projection": (_without("mtp.fc."), 0, "is not whole, mtp.fc.weight is missing: left out"),
    "another width": (_other_width, 0, "is not whole, mtp.fc.weight does not fit"),
    "half a second layer": (_half_a_second, 1, "mtp.layers.1.mlp.up_proj.weight is missing: 1 "),
    "no tower": (_without(_TOWER), 1, "describes a vision tower, but the checkpoint has none"),
    "half a tower": (_half_a_tower, 1, "the vision tower is not whole, "),
    "neither": (_without(_TOWER, "mtp."), 0, _PROMISED),
    "under model.": (_renamed(text="model."), 1, "begin with 'model.': read as 'model.lang"),
    "headless": (
        _both(_without("mtp."), _renamed(text="language_model.", visual="visual.")),
        0,
        "begin with 'language_model.': read as 'model.language_model.', as transformers does",
    ),
    "text, headless": (
        _both(_text_config, _without("mtp.", _TOWER), _renamed(text="")),
        0,
        "have no prefix: read as 'model.', as transformers does",
    ),
    "tower, headless": (
        _renamed(visual="visual."),
        1,
        "vision tensors begin with 'visual.': read ",
    ),
    "tower, headless, under model.": (
        _renamed(text="model.", visual="visual."),
        1,
        "begin with 'model.': read as 'model.lang",
    ),
    "text, with a headless tower": (
        _both(_text_config, _renamed(visual="visual.")),
        1,
        "33 tensors of a vision tower, which",
    ),
    "text, with a tower": (_text_config, 1, "33 tensors of a vision tower, which config.json"),
}
"""What is changed, the MTP layers that remain, and a part of the note."""


def _made(folder: Path, change: Change) -> Path:
    shutil.copytree(ASSET, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    config = json.loads((folder / "config.json").read_text())
    tensors = {k: v for f in sorted(ASSET.glob("*.safetensors")) for k, v in load_file(f).items()}
    save_file(change(tensors, config), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int, str]:
    """One of the checkpoints, the MTP layers that remain, and a part of its note."""
    change, layers, note = CASES[request.param]
    return _made(tmp_path_factory.mktemp("reconciled") / "source", change), layers, note


def _run(source: Path) -> tuple[str, ...]:
    artifacts = path_artifacts(["A", "B"], types=("Q8_0",))
    request = RunRequest(str(source), source.parent / "run", artifacts)
    planned_ones, problems = plan_artifacts(describe(str(source)), request)
    assert problems == ()
    assert len({one.plan.notes[0] for one in planned_ones}) >= 1
    return tuple(n for one in planned_ones for n in one.plan.notes)


def _convert(source: Path) -> tuple[str, ...]:
    return convert(source, source.parent / "out", recipe="text", dry_run=True).plan.notes


def _gguf(source: Path) -> tuple[str, ...]:
    return gguf(source, source.parent / "out", types="Q8_0", dry_run=True).plan.notes


def _tune(source: Path) -> tuple[str, ...]:
    request = TuningRequest(
        str(source), "gguf", ASSET / "eval.txt", size="6bpw", output=None, probes=0
    )
    return prepare(request).space.notes


def _calibrate(source: Path) -> tuple[str, ...]:
    request = CalibrationRequest()
    text = ASSET / "eval.txt"
    return planned(
        source, text=text, context=64, chunks=1, request=request, token=None, headers_only=True
    ).notes


VERBS: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "convert": _convert,
    "gguf": _gguf,
    "plan": lambda source: plan(source, recipe="text-nf4").notes,
    "plan --types": lambda source: plan(source, types="Q4_K_M").notes,
    "run": _run,
    "tune": _tune,
    "calibrate": _calibrate,
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_it_and_says_what_is_odd(case: tuple[Path, int, str], verb: str) -> None:
    source, _, note = case
    assert any(note in said for said in VERBS[verb](source)), VERBS[verb](source)


@pytest.mark.parametrize("mtp", [True, False])
def test_the_output_promises_what_it_holds(case: tuple[Path, int, str], *, mtp: bool) -> None:
    source, layers, note = case
    recipe = load_recipe("text") if mtp else load_recipe("text").dropping_mtp()
    made = make_plan(describe(str(source)), recipe)
    config = json.loads(made.documents["config.json"])
    held = {name.split(".")[2] for name in (o.name for o in made.outputs) if "mtp.layers." in name}
    assert config.get("mtp_num_hidden_layers", 0) == len(held) == (layers if mtp else 0)
    if not mtp:
        assert not any("prediction" in said for said in made.notes), note


def test_artifacts_pass_with_their_source(case: tuple[Path, int, str]) -> None:
    source, layers, _ = case
    out = convert(source, source.parent / "text", recipe="text").out
    assert verify(out, source=source).findings == ()
    files = gguf(source, source.parent / "gguf", types="F16").out
    verdict = verify(files, source=source)
    assert verdict.findings == ()
    found = gguf_files(str(files))
    assert found is not None
    keys = read_gguf(found, found.names[0]).keys
    assert keys.get("qwen35.nextn_predict_layers", 0) == layers


def test_a_rule_may_drop_what_is_not_there(tmp_path: Path) -> None:
    source = _made(tmp_path / "source", CASES["neither"][0])
    recipe = tmp_path / "mine.toml"
    rule = '[[rules]]\nmatch = "{}"\naction = "{}"\n'
    rules = "".join(
        rule.format(*row) for row in (("visual", "drop"), ("mtp", "drop"), ("*", "keep"))
    )
    recipe.write_text(f'format = "stored"\n{rules}')
    made = convert(source, tmp_path / "out", recipe=recipe, dry_run=True).plan
    assert made.notes[0] == "config.json describes a vision tower, but the checkpoint has none"


@pytest.mark.parametrize("name", ["no tower", "half a tower", "under model."])
def test_what_needs_the_tower_says_so_once(name: str, tmp_path: Path) -> None:
    source = _made(tmp_path / "source", CASES[name][0])
    with pytest.raises(TensorError, match=r"text-only recipes and GGUF files of the text model"):
        convert(source, tmp_path / "out", recipe="bf16", dry_run=True)
    findings = verify(source).findings
    if name != "half a tower":
        assert len(findings) == 1
    assert {finding.check for finding in findings} == {"tensors"}


def test_llama_cpp_reads_a_tower_beside_text_under_model(tmp_path: Path) -> None:
    source = _made(tmp_path / "source", CASES["under model."][0])
    made = gguf(source, tmp_path / "out", types="F16", mmproj=True, dry_run=True).plan
    assert len(made.files) == 2


@pytest.mark.parametrize("recipe", ["bf16", "nf4"])
@pytest.mark.parametrize("name", ["headless", "tower, headless"])
def test_a_headless_save_keeps_its_tower(name: str, recipe: str, tmp_path: Path) -> None:
    source = _made(tmp_path / "source", CASES[name][0])
    out = convert(source, tmp_path / "out", recipe=recipe).out
    assert verify(out, source=source).findings == ()
    names = {weight.name for weight in open_folder(out).weights}
    assert any(name.startswith(_TOWER) for name in names)


def test_two_layers_stay_in_a_checkpoint_and_not_in_gguf(tmp_path: Path) -> None:
    source = _made(tmp_path / "source", _second_layer)
    made = make_plan(describe(str(source)), load_recipe("bf16"))
    assert json.loads(made.documents["config.json"])["text_config"]["mtp_num_hidden_layers"] == 2
    notes = gguf(source, tmp_path / "out", types="F16", dry_run=True).plan.notes
    assert "2 multi-token-prediction layers are left out: llama.cpp reads one at most" in notes


@pytest.mark.parametrize("gone", ["mtp.layers.0.mlp.experts.2.", "mtp.layers.0.mlp.gate.", "mtp."])
def test_part_of_a_layer_of_experts_is_left_out(gone: str, tmp_path: Path) -> None:
    config = tiny_config(moe=True)
    tensors = {k: v for k, v in random_tensors(config).items() if not k.startswith(gone)}
    source = write_checkpoint(tmp_path / "source", config, tensors)
    made = make_plan(open_folder(source), load_recipe("text"))
    assert not any(output.name.startswith("mtp.") for output in made.outputs)
    assert json.loads(made.documents["config.json"])["mtp_num_hidden_layers"] == 0


def test_the_file_that_transformers_reads_wins(tmp_path: Path) -> None:
    source = _made(tmp_path / "source", _without("mtp."))
    shutil.copy(source / "model.safetensors", source / "consolidated.safetensors")
    made = convert(source, tmp_path / "out", recipe="bf16").plan
    assert (
        "without model.safetensors.index.json, only model.safetensors is read, as by transformers: "
        "not consolidated.safetensors"
    ) in made.notes
    assert verify(tmp_path / "out", source=source).findings == ()
    assert [f.subject for f in verify(source).findings] == ["consolidated.safetensors"]


def test_files_without_an_index_and_without_that_name_are_refused(tmp_path: Path) -> None:
    source = _made(tmp_path / "source", _without("mtp."))
    (source / "model.safetensors").rename(source / "a.safetensors")
    shutil.copy(source / "a.safetensors", source / "b.safetensors")
    with pytest.raises(InputError, match="2 safetensors files but no"):
        describe(str(source))


def test_names_under_both_prefixes_are_not_guessed(tmp_path: Path) -> None:
    def doubled(tensors: Tensors, _: dict[str, Any]) -> Tensors:
        more = {k.replace(_OWN, "model."): v.clone() for k, v in tensors.items() if _OWN in k}
        return tensors | more

    source = _made(tmp_path / "source", doubled)
    assert describe(str(source)).prefix is None
    with pytest.raises(TensorError):
        convert(source, tmp_path / "out", recipe="text", dry_run=True)
