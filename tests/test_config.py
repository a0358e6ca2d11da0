"""config.json: what is read from it, what is refused, and the originals of the family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import tiny_config
from qwen35.errors import ConfigError
from qwen35.model.model_config import ARCHITECTURES, ModelConfig, parse_config
from qwen35.model.sizes import PUBLISHED, published_config

OFFICIAL = Path(__file__).parent / "data" / "official-configs"
NAMES = sorted(path.stem for path in OFFICIAL.glob("*.json"))


def official(name: str) -> dict[str, Any]:
    """Return the original config.json of a release."""
    parsed: dict[str, Any] = json.loads((OFFICIAL / f"{name}.json").read_text())
    return parsed


def facts(config: ModelConfig) -> dict[str, Any]:
    """Return all that plans depend on, and nothing else."""
    return {
        "model_type": config.model_type,
        "dims": config.dims,
        "layer_types": config.layer_types,
        "vision_depth": config.vision_depth,
        "mtp_layers": config.mtp_layers,
        "tied": config.tied,
        "dtype": config.dtype,
        "moe": config.moe,
    }


def test_originals_are_those_of_the_table() -> None:
    assert len(NAMES) == 15
    assert set(PUBLISHED) - set(NAMES) == {"Qwen3.8-27B", "Qwen3.8-2.4T-A95B"}


@pytest.mark.parametrize("name", NAMES)
def test_original_parses_to_what_the_table_of_sizes_says(name: str) -> None:
    assert facts(parse_config(official(name))) == facts(parse_config(published_config(name)))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("Qwen3.5")])
def test_original_of_3_5_is_the_table_word_for_word(name: str) -> None:
    assert published_config(name) == official(name)


@pytest.mark.parametrize("name", NAMES)
def test_original_agrees_with_the_table_key_by_key(name: str) -> None:
    ours, theirs = published_config(name), official(name)
    for key in ("architectures", "model_type", "image_token_id", "video_token_id"):
        assert ours[key] == theirs[key]
    for key in ("vision_start_token_id", "vision_end_token_id"):
        assert ours[key] == theirs[key]
    for section in ("text_config", "vision_config"):
        for key, value in ours[section].items():
            assert theirs[section].get(key, value) == value, f"{section}.{key}"


def test_facts_of_the_smallest_are_these() -> None:
    config = parse_config(official("Qwen3.5-0.8B"))
    assert config.architecture.class_name == "Qwen3_5ForConditionalGeneration"
    assert (config.tied, config.mtp_layers, config.vision_depth) == (True, 1, 12)
    assert config.dtype == "BF16"
    assert config.quantization is None
    assert config.layer_types == (*("linear_attention",) * 3, "full_attention") * 6
    assert config.dims == {
        "one": 1,
        "vocab": 248320,
        "hidden": 1024,
        "two_hidden": 2048,
        "head": 256,
        "query": 4096,
        "key_value": 512,
        "attention": 2048,
        "linear_qkv": 6144,
        "linear_value": 2048,
        "linear_heads": 16,
        "linear_head": 128,
        "conv": 4,
        "ffn": 3584,
        "vision_hidden": 768,
        "vision_qkv": 2304,
        "vision_ffn": 3072,
        "vision_channels": 3,
        "vision_frames": 2,
        "vision_patch": 16,
        "vision_positions": 2304,
        "vision_merged": 3072,
        "vision_out": 1024,
    }


def test_facts_of_the_largest_are_these() -> None:
    config = parse_config(official("Qwen3.5-397B-A17B"))
    assert (config.moe, config.tied, config.vision_depth) == (True, False, 27)
    assert len(config.layer_types) == 60
    assert config.layer_types.count("full_attention") == 15
    wanted = ("experts", "expert_ffn", "expert_gate_up", "shared_ffn", "linear_qkv", "query")
    assert [config.dims[name] for name in wanted] == [512, 1024, 2048, 1024, 12288, 16384]
    assert "ffn" not in config.dims


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_parses(model_type: str) -> None:
    arch = ARCHITECTURES[model_type]
    config = parse_config(tiny_config(moe=arch.moe, text_only=not arch.vision))
    assert config.model_type == model_type
    assert config.architecture is arch
    assert (config.vision_depth > 0) is arch.vision
    assert ("experts" in config.dims) is arch.moe
    assert config.raw["architectures"] == [arch.class_name]


def test_text_only_config_is_its_own_text_section() -> None:
    config = parse_config(tiny_config(text_only=True))
    assert config.text_raw is config.raw
    assert not any(name.startswith("vision") for name in config.dims)


def test_layer_types_follow_from_the_interval_when_absent() -> None:
    raw = tiny_config(layers=7)
    given_types = parse_config(raw).layer_types
    del raw["text_config"]["layer_types"]
    assert parse_config(raw).layer_types == given_types
    raw["text_config"]["full_attention_interval"] = 2
    assert [kind == "full_attention" for kind in parse_config(raw).layer_types] == [
        False,
        True,
        False,
        True,
        False,
        True,
        False,
    ]


def test_defaults_of_older_configs() -> None:
    raw = tiny_config()
    for key in ("linear_conv_kernel_dim", "head_dim", "attn_output_gate", "mtp_num_hidden_layers"):
        del raw["text_config"][key]
    config = parse_config(raw)
    assert (config.dims["conv"], config.dims["head"], config.mtp_layers) == (4, 256, 0)
    assert config.dims["query"] == 2 * 2 * 256


def test_ungated_attention_has_half_the_queries() -> None:
    raw = tiny_config()
    raw["text_config"]["attn_output_gate"] = False
    assert parse_config(raw).dims["query"] == 2 * 128


@pytest.mark.parametrize(
    ("root", "text", "tied"),
    [(True, None, True), (None, True, False), (False, True, False), (None, None, False)],
)
def test_root_decides_whether_the_head_is_tied(
    root: bool | None, text: bool | None, tied: bool
) -> None:
    raw = tiny_config()
    for section, value in ((raw, root), (raw["text_config"], text)):
        section.pop("tie_word_embeddings", None)
        if value is not None:
            section["tie_word_embeddings"] = value
    assert parse_config(raw).tied is tied


@pytest.mark.parametrize(
    ("key", "value", "dtype"),
    [
        ("dtype", "bfloat16", "BF16"),
        ("dtype", "float16", "F16"),
        ("dtype", "float32", "F32"),
        ("torch_dtype", "float16", "F16"),
        ("dtype", None, "BF16"),
    ],
)
def test_dtype_is_read_from_either_key(key: str, value: str | None, dtype: str) -> None:
    raw = tiny_config()
    del raw["text_config"]["dtype"]
    assert parse_config(raw).dtype == "BF16"
    raw["text_config"][key] = value
    assert parse_config(raw).dtype == dtype
    raw["dtype"] = "float32"
    assert parse_config(raw).dtype == "F32"


@pytest.mark.parametrize("value", ["float8_e4m3fn", "int8", 16, "auto", ["bfloat16"]])
def test_other_dtype_is_refused(value: Any) -> None:
    raw = tiny_config()
    raw["text_config"]["dtype"] = value
    with pytest.raises(ConfigError, match="dtype is .* expected bfloat16, float16, float32"):
        parse_config(raw)


def test_quantization_is_found_at_the_root_or_in_the_text_section() -> None:
    for section in ("root", "text"):
        raw = tiny_config()
        (raw if section == "root" else raw["text_config"])["quantization_config"] = {"a": 1}
        assert parse_config(raw).quantization == {"a": 1}
    raw["text_config"]["quantization_config"] = None
    assert parse_config(raw).quantization is None


@pytest.mark.parametrize("raw", [None, [], "x", 3, True])
def test_config_that_is_not_an_object_is_refused(raw: object) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: not a JSON object$"):
        parse_config(raw)


@pytest.mark.parametrize(
    "model_type", ["qwen4_exp", "qwen3_5_moe_vl", "Qwen3_5", "qwen3", None, 3, [], {}, True]
)
def test_other_architecture_is_refused_by_name(model_type: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tiny_config() | {"model_type": model_type})
    sentence = str(caught.value)
    assert sentence.startswith(f"config.json: model_type {model_type!r} is not a Qwen3.5")
    assert "expected qwen3_5 or qwen3_5_moe or qwen3_5_text or qwen3_5_moe_text" in sentence


@pytest.mark.parametrize("model_type", ["qwen4_exp", "qwen4_exp_text"])
def test_refusal_of_qwen4_exp_says_what_it_is(model_type: str) -> None:
    with pytest.raises(ConfigError, match=r"that is Qwen3\.8-Flash-Next, whose layers differ"):
        parse_config({"model_type": model_type, "architectures": ["Qwen3_5ForCausalLM"]})


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
@pytest.mark.parametrize("value", [None, [], "x", "absent"])
def test_missing_section_is_named(section: str, value: Any) -> None:
    raw = tiny_config()
    raw[section] = value
    if value == "absent":
        del raw[section]
    with pytest.raises(ConfigError, match=f"{section} is missing"):
        parse_config(raw)


BAD_SIZES = [0, -1, 1.0, 1.5, "256", True, None, [], {}, 2**31, 10**30]


@pytest.mark.parametrize("value", BAD_SIZES, ids=repr)
@pytest.mark.parametrize(
    "path",
    [
        ("text_config", "hidden_size"),
        ("text_config", "vocab_size"),
        ("text_config", "num_experts"),
        ("text_config", "num_hidden_layers"),
        ("vision_config", "depth"),
        ("vision_config", "patch_size"),
    ],
    ids=".".join,
)
def test_nonsense_size_is_named(path: tuple[str, str], value: Any) -> None:
    raw = tiny_config(moe=True)
    section, key = path
    raw[section][key] = value
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    shown = f"vision_config.{key}" if section == "vision_config" else key
    assert str(caught.value).startswith(f"config.json: {shown} is {value!r}, expected a positive")


@pytest.mark.parametrize(
    ("section", "key", "limit"),
    [
        ("text_config", "num_hidden_layers", 10_000),
        ("text_config", "num_experts", 100_000),
        ("vision_config", "depth", 10_000),
    ],
)
def test_count_that_would_fill_the_memory_is_refused(section: str, key: str, limit: int) -> None:
    raw = tiny_config(moe=True)
    del raw["text_config"]["layer_types"]
    raw[section][key] = limit
    parse_config(raw)
    raw[section][key] = limit + 1
    with pytest.raises(ConfigError, match=f"{key} is {limit + 1}, .* {limit} at most"):
        parse_config(raw)


@pytest.mark.parametrize("value", [-1, 1.0, "1", True, 101, [1]])
def test_nonsense_number_of_mtp_layers_is_refused(value: Any) -> None:
    raw = tiny_config()
    raw["text_config"]["mtp_num_hidden_layers"] = value
    with pytest.raises(ConfigError, match="mtp_num_hidden_layers is"):
        parse_config(raw)


@pytest.mark.parametrize(
    "value",
    [
        [],
        ["linear_attention"] * 3,
        ["linear_attention"] * 5,
        ["linear_attention"] * 3 + ["sliding_attention"],
        ["linear_attention"] * 3 + [None],
        "linear_attention",
        {"0": "linear_attention"},
        [["linear_attention"]] * 4,
    ],
    ids=str,
)
def test_layer_types_that_do_not_fit_are_refused(value: Any) -> None:
    raw = tiny_config()
    raw["text_config"]["layer_types"] = value
    with pytest.raises(ConfigError, match="layer_types does not fit .* expected 4 times"):
        parse_config(raw)


@pytest.mark.parametrize("value", [0, -4, "4", 4.0, True])
def test_nonsense_interval_is_refused(value: Any) -> None:
    raw = tiny_config()
    del raw["text_config"]["layer_types"]
    raw["text_config"]["full_attention_interval"] = value
    with pytest.raises(ConfigError, match="full_attention_interval is"):
        parse_config(raw)


def test_dense_config_needs_its_feed_forward_size() -> None:
    raw = tiny_config()
    del raw["text_config"]["intermediate_size"]
    with pytest.raises(ConfigError, match="intermediate_size is None"):
        parse_config(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=200)
@given(st.data(), json_values)
def test_any_value_anywhere_parses_or_is_a_config_error(data: st.DataObject, value: Any) -> None:
    raw = tiny_config(moe=data.draw(st.booleans()), text_only=data.draw(st.booleans()))
    section = raw
    if "text_config" in raw and data.draw(st.booleans()):
        section = raw[data.draw(st.sampled_from(["text_config", "vision_config"]))]
    section[data.draw(st.sampled_from(sorted(section)))] = value
    try:
        config = parse_config(raw)
    except ConfigError as error:
        assert str(error).startswith("config.json: ")  # noqa: PT017
        return
    assert all(size > 0 for size in config.dims.values())
    assert set(config.layer_types) <= {"linear_attention", "full_attention"}
