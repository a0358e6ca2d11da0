"""The table of roles: total over the family, closed to everything else."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import layout_of, tiny_config
from qwen35.checkpoint.source import open_published
from qwen35.errors import TensorError
from qwen35.model.model_config import parse_config
from qwen35.model.roles import (
    ROLES,
    CheckpointNaming,
    Role,
    expected_tensors,
    in_group,
    role_of,
)
from qwen35.model.sizes import PUBLISHED
from qwen35.tensors import TensorSpec

LAYER = "model.language_model.layers.7"


def all_kinds_of_names() -> list[str]:
    """Return the names of small checkpoints of every layout."""
    names: set[str] = set()
    for options in ({"tied": False}, {"moe": True}, {"text_only": True}, {"layers": 1}):
        config = tiny_config(**options)
        stacked = replace(layout_of(config), per_expert=frozenset())
        for layout in (stacked, layout_of(config, per_expert=bool(options.get("moe")))):
            names |= {spec.name for spec in expected_tensors(parse_config(config), layout)}
    return sorted(names)


NAMES = all_kinds_of_names()


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_tensor_of_a_published_size_has_a_role(size: str) -> None:
    for weight in open_published(size).weights:
        role = role_of(weight.name)
        assert ROLES[role.info.path if role.name == role.info.name else _key(role)] is role.info


def _key(role: Role) -> str:
    suffix = ".weight" if role.info.path.endswith(".weight") else ""
    return role.name + suffix


def test_no_row_of_the_table_is_unused() -> None:
    assert set(ROLES) == {_key(role_of(name)) for name in NAMES}


@pytest.mark.parametrize(
    ("name", "role", "layer", "expert", "scope"),
    [
        (f"{LAYER}.linear_attn.in_proj_a.weight", "linear_attn.in_proj_a", 7, None, "text"),
        (f"{LAYER}.linear_attn.A_log", "linear_attn.A_log", 7, None, "text"),
        (f"{LAYER}.linear_attn.norm.weight", "linear_attn.norm", 7, None, "text"),
        ("model.layers.91.mlp.gate.weight", "mlp.gate", 91, None, "text"),
        ("model.layers.0.mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", 0, None, "text"),
        (
            "model.layers.3.mlp.experts.511.gate_proj.weight",
            "mlp.experts.gate_proj",
            3,
            511,
            "text",
        ),
        ("model.language_model.embed_tokens.weight", "embed_tokens", None, None, "text"),
        ("model.norm.weight", "norm", None, None, "text"),
        ("lm_head.weight", "lm_head", None, None, "text"),
        ("model.visual.pos_embed.weight", "visual.pos_embed", None, None, "visual"),
        ("model.visual.merger.norm.bias", "visual.merger.norm.bias", None, None, "visual"),
        ("model.visual.blocks.26.attn.qkv.bias", "visual.blocks.attn.qkv.bias", 26, None, "visual"),
        ("mtp.fc.weight", "mtp.fc", None, None, "mtp"),
        ("mtp.norm.weight", "mtp.norm", None, None, "mtp"),
        ("mtp.layers.0.self_attn.q_norm.weight", "mtp.layers.self_attn.q_norm", 0, None, "mtp"),
        (
            "mtp.layers.0.mlp.experts.17.down_proj.weight",
            "mtp.layers.mlp.experts.down_proj",
            0,
            17,
            "mtp",
        ),
    ],
)
def test_name_is_read(
    name: str, role: str, layer: int | None, expert: int | None, scope: str
) -> None:
    found = role_of(name)
    assert (found.name, found.layer, found.expert, found.scope) == (role, layer, expert, scope)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "weight",
        "model",
        "model.language_model.",
        "model.language_model.embed_tokens",
        "model.language_model.embed_tokens.weight.",
        "model.language_model.embed_tokens.weight\n",
        "xmodel.language_model.embed_tokens.weight",
        "model.language_model.model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "embed_tokens.weight",
        "model.embed_tokens.bias",
        "model.lm_head.weight",
        "model.language_model.lm_head.weight",
        "lm_head.bias",
        f"{LAYER}.linear_attn.in_proj_c.weight",
        f"{LAYER}.linear_attn.in_proj_a.bias",
        f"{LAYER}.linear_attn.A_log.weight",
        f"{LAYER}.linear_attn.a_log",
        f"{LAYER}.Linear_attn.in_proj_a.weight",
        f"{LAYER}.mlp.experts.gate_up_proj.weight",
        f"{LAYER}.mlp.experts.gate_proj.weight",
        f"{LAYER}.mlp.experts.0.gate_up_proj",
        f"{LAYER}.mlp.experts.00.gate_proj.weight",
        f"{LAYER}.mlp.experts.-1.gate_proj.weight",
        f"{LAYER}.mlp.experts.1.2.gate_proj.weight",
        f"{LAYER}.mlp.0.gate_proj.weight",
        f"{LAYER}.embed_tokens.weight",
        f"{LAYER}.norm.weight",
        f"{LAYER}.layers.1.input_layernorm.weight",
        "model.language_model.layers.07.input_layernorm.weight",
        "model.language_model.layers.-7.input_layernorm.weight",
        "model.language_model.layers.+7.input_layernorm.weight",
        "model.language_model.layers.7_0.input_layernorm.weight",
        "model.language_model.layers.1e1.input_layernorm.weight",
        "model.language_model.layers.\u0667.input_layernorm.weight",
        "model.language_model.layers.9999999.input_layernorm.weight",
        "model.language_model.layers.input_layernorm.weight",
        "model.language_model.layers..input_layernorm.weight",
        "model.language_model.blocks.7.input_layernorm.weight",
        "model.language_model.input_layernorm.weight",
        "model.visual.layers.0.norm1.weight",
        "model.visual.norm1.weight",
        "model.language_model.visual.pos_embed.weight",
        "visual.pos_embed.weight",
        "model.visual.merger.0.norm.weight",
        "model.mtp.fc.weight",
        "model.language_model.mtp.fc.weight",
        "mtp.0.fc.weight",
        "mtp.embed_tokens.weight",
        "mtp.lm_head.weight",
        "mtp.blocks.0.input_layernorm.weight",
        "mtp.visual.pos_embed.weight",
        "mtp.layers.0.linear_attn.in_proj_a.weight",
        f"{LAYER}.mlp.up_proj.weight.absmax",
        f"{LAYER}.mlp.up_proj.weight_scale_inv",
        f"{LAYER}.mlp.up_proj.qweight",
        f"{LAYER}.mlp.up_proj.lora_A.weight",
        f"{LAYER}.mlp.up_proj.base_layer.weight",
        "model.language_model.layers.7/mlp.up_proj.weight",
        "../model.language_model.norm.weight",
    ],
)
def test_name_that_almost_matches_is_refused(name: str) -> None:
    with pytest.raises(TensorError, match="not a tensor of Qwen3.5") as caught:
        role_of(name)
    assert caught.value.subject == name


def rebuilt(role: Role, prefix: str) -> str:
    """Build a tensor's name from its role."""
    path = role.info.path
    if role.expert is not None:
        path = path.replace("mlp.experts.", f"mlp.experts.{role.expert}.")
    stack = {"text": "", "visual": "model.visual.", "mtp": "mtp."}[role.scope] or prefix
    if role.layer is not None:
        stack += f"{'blocks' if role.scope == 'visual' else 'layers'}.{role.layer}."
    return path if role.name == "lm_head" else stack + path


@pytest.mark.parametrize("name", NAMES)
def test_role_holds_all_that_is_in_the_name(name: str) -> None:
    prefix = "model.language_model." if ".language_model." in name else "model."
    assert rebuilt(role_of(name), prefix) == name


def unnumbered(name: str) -> str:
    """Return a name with N for every number."""
    return re.sub(r"\.\d+(?=\.)", ".N", name)


PATTERNS = {unnumbered(name.replace("model.language_model.", "model.")) for name in NAMES}

mutations = st.tuples(
    st.sampled_from(["insert", "delete", "replace", "swap segments", "drop segment", "twice"]),
    st.integers(0, 200),
    st.sampled_from(
        [*"._-0123456789aAzZ \n\0é/", "model", "mtp.", "visual.", ".weight", "layers."]
    ),
)


def mutate(name: str, kind: str, where: int, text: str) -> str:
    """Return `name` with one change."""
    at = where % (len(name) + 1)
    segments = name.split(".")
    i = where % len(segments)
    j = (where // 7) % len(segments)
    if kind == "insert":
        return name[:at] + text + name[at:]
    if kind == "delete":
        return name[:at] + name[at + 1 :]
    if kind == "replace":
        return name[:at] + text + name[at + 1 :]
    if kind == "swap segments":
        segments[i], segments[j] = segments[j], segments[i]
    elif kind == "drop segment":
        del segments[i]
    else:
        segments.insert(i, segments[i])
    return ".".join(segments)


@settings(max_examples=400)
@given(st.sampled_from(NAMES), st.lists(mutations, min_size=1, max_size=2))
def test_mutated_name_is_a_true_name_or_refused(
    name: str, changes: list[tuple[str, int, str]]
) -> None:
    for change in changes:
        name = mutate(name, *change)
    try:
        role = role_of(name)
    except TensorError:
        return
    prefix = "model.language_model." if ".language_model." in name else "model."
    assert rebuilt(role, prefix) == name
    assert unnumbered(name.replace("model.language_model.", "model.")) in PATTERNS


@given(st.text(max_size=40))
def test_any_text_is_a_role_or_refused(name: str) -> None:
    try:
        role_of(name)
    except TensorError as error:
        assert error.subject == name  # noqa: PT017


@pytest.mark.parametrize(
    ("role", "group", "answer"),
    [
        ("mlp.gate_proj", "mlp", True),
        ("mlp.gate_proj", "mlp.gate_proj", True),
        ("mlp.gate_proj", "mlp.gate", False),
        ("mlp.gate", "mlp.gate_proj", False),
        ("mlp.shared_expert_gate", "mlp.shared_expert", False),
        ("mlp.shared_expert.up_proj", "mlp.shared_expert", True),
        ("mtp.layers.mlp.gate", "mlp", False),
        ("mtp.layers.mlp.gate", "mtp", True),
        ("mtp.layers.mlp.gate", "mtp.layers.mlp", True),
        ("visual.blocks.norm1", "visual.blocks", True),
        ("visual.blocks.norm1", "visual.block", False),
        ("norm", "norm", True),
        ("linear_attn.norm", "norm", False),
        ("mlp", "", False),
    ],
)
def test_group_is_matched_by_whole_segments(role: str, group: str, answer: bool) -> None:
    assert in_group(role, group) is answer


@given(st.sampled_from(sorted({role_of(name).name for name in NAMES})), st.integers(1, 6))
def test_first_segments_of_a_role_are_a_group_of_it(role: str, count: int) -> None:
    segments = role.split(".")
    group = ".".join(segments[:count])
    assert in_group(role, group)
    assert not in_group(role, group[:-1])
    assert not in_group(role, group + ".x")


def test_rows_say_what_they_are() -> None:
    assert {info.kind for info in ROLES.values()} == {
        "conv",
        "embedding",
        "experts",
        "head",
        "linear",
        "router",
        "vector",
    }
    for path, info in ROLES.items():
        assert path.endswith(info.path)
        assert info.meaning
        assert (info.kind == "linear") <= (len(info.shape) == 2)
        assert (info.kind == "vector") == (len(info.shape) == 1)
    assert sorted(path for path, info in ROLES.items() if info.dtype == "F32") == [
        "linear_attn.A_log",
        "linear_attn.norm.weight",
    ]


def test_layout_is_read_off_the_keys() -> None:
    assert CheckpointNaming.of(["model.language_model.embed_tokens.weight"]) == CheckpointNaming(
        mtp=False
    )
    assert CheckpointNaming.of(
        ["model.embed_tokens.weight", "lm_head.weight", "mtp.fc.weight"]
    ) == CheckpointNaming("model.", frozenset(), mtp=True, head=True)
    names = [
        f"{LAYER}.mlp.experts.gate_up_proj",
        "model.language_model.layers.8.mlp.experts.0.up_proj.weight",
        "mtp.layers.0.mlp.experts.3.up_proj.weight",
    ]
    assert CheckpointNaming.of(names).per_expert == {"layers.8", "mtp.layers.0"}


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"moe": True}, {"tied": False}, {"mtp": 0}, {"text_only": True, "moe": True}],
    ids=str,
)
def test_layout_read_off_the_expected_names_is_the_layout(
    options: dict[str, bool], per_expert: bool
) -> None:
    config = tiny_config(**options)  # type: ignore[arg-type]
    layout = layout_of(config, per_expert=per_expert and bool(options.get("moe")))
    names = [spec.name for spec in expected_tensors(parse_config(config), layout)]
    assert CheckpointNaming.of(names) == layout
    assert len(set(names)) == len(names)


def test_expected_tensors_come_in_model_order() -> None:
    names = [spec.name for spec in open_specs("Qwen3.5-9B")]
    assert names[:3] == [
        "lm_head.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.norm.weight",
    ]
    layers = [
        int(m[1]) for n in names if (m := re.match(r"model\.language_model\.layers\.(\d+)", n))
    ]
    assert layers == sorted(layers)
    assert names[-1].startswith("mtp.layers.0.")


def open_specs(size: str) -> list[TensorSpec]:
    """Return the tensors of a published size."""
    return [weight.main.spec for weight in open_published(size).weights]


def test_scalars_kept_in_float32_do_not_follow_the_checkpoint() -> None:
    config = parse_config(tiny_config(dtype="float16"))
    layer = "model.language_model.layers.0."
    found = {
        spec.name.removeprefix(layer): spec.dtype
        for spec in expected_tensors(config, CheckpointNaming.published(config))
        if spec.name.startswith(layer)
    }
    assert {path for path, dtype in found.items() if dtype == "F32"} == {
        "linear_attn.A_log",
        "linear_attn.norm.weight",
    }
    assert set(found.values()) == {"F16", "F32"}
