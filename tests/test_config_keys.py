"""The table of config.json's keys, and what config.json means, against transformers' classes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextRotaryEmbedding,
)
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeConfig

from checkpoints import ASSET, make_checkpoint, random_tensors, tiny_config, write_checkpoint
from golden_config import VARIANTS, varied
from qwen35.api.inspect_api import inspect
from qwen35.checkpoint.checkpoint_summary import summary_text
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.source import open_folder
from qwen35.errors import ConfigError, TensorError
from qwen35.model.config_keys import SECTIONS, ConfigKey, fixed_values, misplaced_keys, unknown_keys
from qwen35.model.config_notes import config_notes
from qwen35.model.model_config import parse_config
from qwen35.model.rope import SCALED, rope_of
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import verify
from running import run

PUBLISHED = sorted((Path(__file__).parent / "data" / "official-configs").glob("*.json"))
BASE = {field.name for field in fields(transformers.PreTrainedConfig)}
CLASSES = {"": Qwen3_5Config, "moe": Qwen3_5MoeConfig}


def notes(config: dict[str, Any]) -> list[str]:
    return list(config_notes(parse_config(config)))


# --- the table


@pytest.mark.parametrize("path", [*PUBLISHED, ASSET / "config.json"], ids=lambda path: path.stem)
def test_published_configs_hold_nothing_unknown(path: Path) -> None:
    raw = json.loads(path.read_text())
    assert unknown_keys(raw) == misplaced_keys(raw) == notes(raw) == []
    assert list(fixed_values(raw)) == []


@pytest.mark.parametrize("name", CLASSES)
def test_the_table_lists_what_transformers_reads(name: str) -> None:
    nested_classes = CLASSES[name].sub_configs_defaults
    classes = {section: spec.config_class for section, spec in nested_classes.items()}
    nested = {"text_config", "vision_config", "rope_parameters"}
    for section, cls in {"": CLASSES[name], **classes}.items():
        read = {field.name for field in fields(cls)} - nested
        assert read - SECTIONS[section].keys() == set(), section
        assert BASE - SECTIONS[section].keys() == set()


def test_the_table_lists_what_transformers_takes_from_other_keys() -> None:
    sampling = transformers.GenerationConfig._get_default_generation_params()
    others = {"torch_dtype", "num_labels", "name_or_path", "_commit_hash", "per_layer_config"}
    others |= {"output_attentions", "attn_implementation", "experts_implementation"}
    for section in ("", "text_config", "vision_config"):
        assert {*sampling, *others} - SECTIONS[section].keys() == set()
    text = SECTIONS["text_config"].keys()
    assert {"rope_theta", "partial_rotary_factor", "full_attention_interval"} <= text


def test_the_table_lists_the_parameters_of_every_kind_of_scaling() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

    assert {"default", *ROPE_INIT_FUNCTIONS} == set(SCALED)
    named = {*RopeParameters.__annotations__, "mrope_interleaved", "type"}
    assert named - SECTIONS["rope_parameters"].keys() == set()


def test_each_row_says_what_becomes_of_its_key() -> None:
    for rows in SECTIONS.values():
        for name, row in rows.items():
            assert bool(row.gguf) != bool(row.why), name
            assert not row.only or row.why, name
    assert ConfigKey().only == ()


# --- what is said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(foo=1), "unknown keys: foo:"),
        (lambda c: c["text_config"].update(bar=1), "unknown keys: text_config.bar:"),
        (
            lambda c: c["text_config"]["rope_parameters"].update(baz=1),
            "unknown keys: text_config.rope_parameters.baz:",
        ),
        (lambda c: c["vision_config"].update(foo=[]), "unknown keys: vision_config.foo:"),
        (lambda c: c.update(rope_theta=1), "config.json has rope_theta beside text_config"),
        (lambda c: c["text_config"].update(tie_word_embeddings=False), "true at the root"),
        (lambda c: c.pop("tie_word_embeddings"), "false at the root of config.json and true in"),
        (lambda c: c["text_config"]["rope_parameters"].pop("rope_theta"), "no rope_theta: 10000"),
        (
            lambda c: c["text_config"].update(rope_scaling={"type": "linear", "factor": 2.0}),
            "rope_scaling and rope_parameters",
        ),
        (
            lambda c: c["text_config"]["rope_parameters"].update(mrope_interleaved=False),
            "mrope_interleaved is false",
        ),
        (
            lambda c: c["text_config"].update(norm_topk_prob=False),
            "text_config.norm_topk_prob is False: transformers and llama.cpp always compute expert",
        ),
        (lambda c: c["text_config"].update(attn_output_gate=False), "attn_output_gate is false"),
        (
            lambda c: c["text_config"].update(quantization_config={"quant_method": "fp8"}),
            "quantization_config is only in text_config",
        ),
        (
            lambda c: c["text_config"]["rope_parameters"].update(
                rope_type="yarn", factor=2, beta_fast=8
            ),
            "YaRN with beta_fast 8 and beta_slow 1",
        ),
        (
            lambda c: c["text_config"]["rope_parameters"].update(
                rope_type="yarn", factor=2, truncate=False
            ),
            "YaRN without truncate",
        ),
        (
            lambda c: (
                c["text_config"].update(original_max_position_embeddings=7),
                c["text_config"]["rope_parameters"].update(rope_type="yarn", factor=2),
            ),
            "original_max_position_embeddings 7, which is beside",
        ),
        (
            lambda c: c["text_config"]["rope_parameters"].update(rope_type="su"),
            "transformers refuses config.json: rope_type is 'su'",
        ),
    ],
)
def test_users_are_told(change: Callable[[dict[str, Any]], Any], said: str) -> None:
    config = tiny_config()
    change(config)
    assert any(said in note for note in notes(config)), notes(config)


def test_names_of_keys_stay_on_their_line() -> None:
    (note,) = notes(tiny_config() | {"a\nb\x1b[31m": 1, **dict.fromkeys(map(str, range(20)), 1)})
    assert note.isprintable()
    assert "and 13 more" in note


def test_the_notes_are_in_plans_and_in_the_summary(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"foo": 1}
    (source / "config.json").write_text(json.dumps(config))
    (note,) = config_notes(parse_config(config))
    checkpoint = open_folder(source)
    assert note in make_plan(checkpoint, load_recipe("nf4", "safetensors")).notes
    summary = inspect(source)
    assert isinstance(summary, dict)
    assert summary["notes"] == [note]
    assert f"note: {note}" in summary_text(summary)


def test_a_config_saved_by_transformers_is_the_same_config(tmp_path: Path) -> None:
    raw = json.loads((ASSET / "config.json").read_text())
    Qwen3_5Config(**copy.deepcopy(raw)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert notes(saved) == []
    assert rope_of(saved["text_config"]) == rope_of(raw["text_config"])


def test_keys_of_any_type_are_no_traceback() -> None:
    values: list[Any] = [None, True, 0, -1, 1e400, "x", [], [[]], {}, {"a": {}}]
    for value in values:
        config = tiny_config()
        config |= {"foo": value, "rope_theta": value}
        config["text_config"] |= {"hidden_act": value, "attention_bias": value, "bar": value}
        config["vision_config"] |= {"rope_parameters": value}
        for key in ("factor", "truncate", "mscale", "mscale_all_dim", "beta_fast", "rope_theta"):
            changed = copy.deepcopy(config)
            changed["text_config"]["rope_parameters"] |= {"rope_type": "yarn", "factor": 2.0}
            changed["text_config"]["rope_parameters"][key] = value
            list(fixed_values(changed))
            notes(changed)


# --- meaning


@pytest.mark.parametrize("name", VARIANTS)
def test_the_rotary_embedding_is_that_of_transformers(name: str) -> None:
    config = varied(name)
    cls = Qwen3_5MoeConfig if config["model_type"] == "qwen3_5_moe" else Qwen3_5Config
    theirs = cls(**copy.deepcopy(config)).text_config
    embedding = Qwen3_5TextRotaryEmbedding(theirs)
    ours = rope_of(config["text_config"])
    assert ours.kind == theirs.rope_parameters["rope_type"]
    assert ours.theta == theirs.rope_parameters["rope_theta"]
    assert ours.attention == pytest.approx(embedding.attention_scaling)
    head = config["text_config"].get("head_dim", 256)
    assert len(embedding.inv_freq) == int(head * ours.partial) // 2
    if ours.kind == "yarn":
        assert ours.length == theirs.rope_parameters["original_max_position_embeddings"]
    assert ours.factor == (theirs.rope_parameters.get("factor") if ours.kind != "default" else 1.0)


def test_a_share_of_null_is_the_whole_head() -> None:
    config = tiny_config()
    del config["text_config"]["rope_parameters"]["partial_rotary_factor"]
    config["text_config"]["partial_rotary_factor"] = None
    theirs = Qwen3_5TextRotaryEmbedding(Qwen3_5Config(**copy.deepcopy(config)).text_config)
    assert rope_of(config["text_config"]).partial * 128 == 2 * len(theirs.inv_freq)


ABSENT = "absent"


@pytest.mark.parametrize("root", [True, False, ABSENT])
@pytest.mark.parametrize("text", [True, False, ABSENT])
def test_tying_is_what_transformers_ties(root: object, text: object) -> None:
    config = tiny_config()
    for section, value in ((config, root), (config["text_config"], text)):
        section["tie_word_embeddings"] = value
        if value is ABSENT:
            del section["tie_word_embeddings"]
    theirs = Qwen3_5Config(**copy.deepcopy(config))
    with torch.device("meta"):
        whole = Qwen3_5ForConditionalGeneration(theirs)
        alone = Qwen3_5ForCausalLM(theirs.text_config)
    ties = [bool(m.get_expanded_tied_weights_keys(all_submodels=True)) for m in (whole, alone)]
    parsed = parse_config(config)
    assert parsed.tied is ties[0]
    assert parse_config(config["text_config"]).tied is ties[1]
    differ = any("tie_word_embeddings is" in note for note in config_notes(parsed))
    assert differ is (ties[0] is not ties[1])


@pytest.mark.parametrize("value", [None, "true", 1, 0, []])
def test_tying_must_be_true_or_false(value: object) -> None:
    config = tiny_config() | {"tie_word_embeddings": value}
    with pytest.raises(ConfigError, match="tie_word_embeddings is .*, expected true or false"):
        parse_config(config)
    with pytest.raises(Exception, match="tie_word_embeddings"):
        Qwen3_5Config(**config)


# --- verify


@pytest.mark.sentences
def test_verify_names_what_it_does_not_check(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"foo": 1}
    config["text_config"]["per_layer_config"] = {"0": {"head_dim": 64}}
    config["text_config"]["rope_parameters"]["rope_type"] = "su"
    (source / "config.json").write_text(json.dumps(config))
    verdict = verify(open_artifact(str(source)))
    messages = [finding.message for finding in verdict.findings if finding.check == "config"]
    assert messages == [
        "text_config.per_layer_config is {'0': {'head_dim': 64}}: transformers obeys it, the "
        "checks here expect the same settings in every layer",
        "transformers refuses it: rope_type is 'su', expected default, linear, dynamic, yarn, "
        "longrope, llama3, proportional",
    ]
    assert any("unknown keys: foo:" in note for note in verdict.notes)


@pytest.mark.sentences
def test_a_head_tied_in_text_config_alone_is_missing(tmp_path: Path) -> None:
    """transformers goes by the root, and would make up a random head."""
    source = make_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        TensorError, match=r"lm_head\.weight: missing.*transformers goes by the root"
    ):
        inventory(open_folder(source))


def test_a_text_model_keeps_the_tying_of_the_root(tmp_path: Path) -> None:
    """Where the root says nothing, that is false, whatever text_config says."""
    config = tiny_config(tied=False)
    config["text_config"]["tie_word_embeddings"] = True
    del config["tie_word_embeddings"]
    source = write_checkpoint(tmp_path / "source", config, random_tensors(config))
    out = run(source, tmp_path / "out", "text").out
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
