"""The skip list: transformers leaves alone exactly what stays plain."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import layout_of, tiny_config
from plans import made_up, packed_config, published_plan, recipe_of, skip_list
from qwen35.model.model_config import parse_config
from qwen35.model.roles import expected_tensors, role_of
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe

pytestmark = pytest.mark.sentences

TEXT = "model.language_model"
BASE_SKIP = ["lm_head", "model.visual", f"{TEXT}.embed_tokens", "mtp"]


@pytest.mark.parametrize(
    ("recipe", "keep", "skip"),
    [
        ("nf4", (), BASE_SKIP),
        ("text-nf4", (), ["lm_head", "model.embed_tokens", "mtp"]),
        ("nf4", ("linear_attn.in_proj_a",), [*BASE_SKIP, "in_proj_a"]),
        ("nf4", ("self_attn",), [*BASE_SKIP, "k_proj", "o_proj", "q_proj", "v_proj"]),
        ("nf4", ("self_attn.o_proj",), [*BASE_SKIP, "o_proj"]),
        (
            "text-nf4",
            ("mlp.gate_proj", "self_attn.q_proj"),
            ["lm_head", "model.embed_tokens", "mtp", "gate_proj", "q_proj"],
        ),
    ],
)
def test_skip_list_names_what_stays_plain(
    recipe: str, keep: tuple[str, ...], skip: list[str]
) -> None:
    assert skip_list(published_plan("Qwen3.5-0.8B", recipe, keep)) == skip


def test_shared_expert_is_named_apart_from_what_ends_alike() -> None:
    plan = published_plan("Qwen3.5-35B-A3B", "nf4", ("mlp.shared_expert_gate",))
    assert skip_list(plan) == [*BASE_SKIP, "shared_expert_gate"]


def test_ending_that_a_packed_layer_shares_is_lengthened() -> None:
    rules = (("mtp", "plain"), ("visual.blocks.attn.proj", "plain"), ("kind:linear", "nf4"))
    plan = make_plan(made_up(tiny_config()), recipe_of(*rules))
    # "proj" would skip every projection of the text model
    assert skip_list(plan) == ["lm_head", f"{TEXT}.embed_tokens", "mtp", "attn.proj"]


def test_layers_kept_one_by_one_are_named_in_full() -> None:
    packed = tuple(f"{TEXT}.layers.{i}.mlp.up_proj.weight" for i in (0, 2))
    recipe = recipe_of(("mtp", "plain"), ("visual", "plain"), ("mlp.up_proj", "keep"))
    plan = make_plan(made_up(packed_config([]), packed=packed), recipe)
    skip = skip_list(plan)
    assert [name for name in skip if "up_proj" in name] == [
        f"{TEXT}.layers.1.mlp.up_proj",
        f"{TEXT}.layers.3.mlp.up_proj",
    ]


def is_skipped(module: str, patterns: list[str]) -> bool:
    """Decide as transformers 5.23 does (``quantizers_utils.should_convert_module``)."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{p}){boundary}", module) or module.endswith(p) for p in patterns)


def linear_modules(plan: Plan) -> dict[str, bool]:
    """Return the linear modules of the output as transformers names them: whether packed."""
    modules = {}
    for step in plan.steps:
        if step.outputs and step.role.info.kind == "linear" and step.role.scope != "mtp":
            modules[step.outputs[0].name.removesuffix(".weight")] = step.outputs[0].dtype == "U8"
    return modules


LINEAR_ROLES = sorted(
    {
        role_of(spec.name).name
        for raw in (tiny_config(), tiny_config(moe=True))
        for spec in expected_tensors(parse_config(raw), layout_of(raw))
        if role_of(spec.name).info.kind == "linear" and not spec.name.startswith("mtp.")
    }
)


@settings(max_examples=60)
@given(
    st.booleans(),
    st.sampled_from(["nf4", "text-nf4", "tower"]),
    st.sets(st.sampled_from(LINEAR_ROLES), max_size=6),
    st.sets(st.integers(0, 3), max_size=2),
)
def test_transformers_skips_exactly_what_stays_plain(
    moe: bool, name: str, keep: set[str], packed_layers: set[int]
) -> None:
    config = tiny_config(moe=moe)
    leaf = "linear_attn.out_proj.weight"
    packed = tuple(f"{TEXT}.layers.{i}.{leaf}" for i in packed_layers if i != 3)
    rules = [(role, "keep" if role in leaf else "plain") for role in sorted(keep)]
    if name == "tower":
        recipe = recipe_of(*rules, ("mtp", "plain"), ("kind:linear", "nf4"))
    else:
        made = load_recipe(name)
        front = recipe_of(*(r for r in rules if name == "nf4" or not r[0].startswith("visual")))
        recipe = replace(made, rules=(*front.rules[:-1], *made.rules))
    plan = make_plan(made_up(config, packed=packed), recipe)
    skip = skip_list(plan)
    for module, is_packed in linear_modules(plan).items():
        assert is_skipped(module, skip) is not is_packed, module
    assert is_skipped("lm_head", skip)
