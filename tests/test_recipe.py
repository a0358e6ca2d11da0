"""Recipes: the built-in ones, those of a user, and every way to write one wrongly."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qwen35
from checkpoints import ASSET, make_checkpoint
from pages import ROOT, tokens_of
from qwen35.checkpoint.source import open_folder, open_published
from qwen35.errors import UsageError
from qwen35.model.roles import ROLES, Role, role_of
from qwen35.planning.containers import CONTAINERS
from qwen35.planning.gguf_files.gguf_plan import files_of
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import built_in, load_recipe
from qwen35.planning.recipe_files import KEYS
from qwen35.planning.rules import Recipe, Rule
from qwen35.planning.safetensors_files.safetensors_container import ACTIONS

pytestmark = pytest.mark.sentences

HEAD = 'format = "nf4"\n'
REST = '[[rules]]\nmatch = "*"\naction = "plain"\n'


def rule(match: str, action: str) -> str:
    """Return a rule as TOML."""
    return f'[[rules]]\nmatch = "{match}"\naction = "{action}"\n'


def write(folder: Path, *parts: str) -> Recipe:
    """Write and load a recipe."""
    path = folder / "mine.toml"
    path.write_text("".join(parts))
    return load_recipe(str(path))


def refusal(folder: Path, *parts: str) -> str:
    """Return the sentence that refuses a recipe."""
    with pytest.raises(UsageError) as caught:
        write(folder, *parts)
    return str(caught.value)


ALL_ROLES = [
    Role(path.removesuffix(".weight"), info, 0 if info.place != "root" else None)
    for path, info in ROLES.items()
]


def test_built_in_recipes_are_the_files_of_the_package() -> None:
    folder = Path(qwen35.__file__).parent / "planning" / "recipes"
    names = [name for container in CONTAINERS for name in built_in(container)]
    assert sorted(path.stem for path in folder.glob("*")) == sorted(names)


@pytest.mark.parametrize("name", built_in("safetensors"))
def test_built_in_recipe_covers_every_role(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    for role in ALL_ROLES:
        assert recipe.rule_for(role).action in ACTIONS
        assert recipe.rule_for(role).reason
    assert not any(rule.required for rule in recipe.rules)


@pytest.mark.parametrize("name", built_in("safetensors"))
def test_no_rule_of_a_built_in_recipe_is_without_use(name: str) -> None:
    recipe = load_recipe(name)
    used = {recipe.rule_for(role).match for role in ALL_ROLES}
    assert used == {rule.match for rule in recipe.rules}


def actions(name: str) -> dict[str, str]:
    """Return what a built-in recipe does to some telling roles."""
    telling = (
        "model.visual.blocks.0.mlp.linear_fc1.weight",
        "model.visual.pos_embed.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "mtp.fc.weight",
        "mtp.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.linear_attn.conv1d.weight",
        "model.layers.0.linear_attn.in_proj_a.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.input_layernorm.weight",
    )
    recipe = load_recipe(name)
    return {role_of(n).name: recipe.rule_for(role_of(n)).action for n in telling}


def test_nf4_packs_linear_layers_of_the_text_model_only() -> None:
    assert actions("nf4") == {
        "visual.blocks.mlp.linear_fc1": "plain",
        "visual.pos_embed": "plain",
        "embed_tokens": "plain",
        "lm_head": "plain",
        "mtp.fc": "plain",
        "mtp.layers.mlp.up_proj": "plain",
        "mlp.experts.gate_up_proj": "plain",
        "mlp.experts.up_proj": "plain",
        "mlp.gate": "plain",
        "mlp.shared_expert_gate": "nf4",
        "mlp.up_proj": "nf4",
        "linear_attn.conv1d": "plain",
        "linear_attn.in_proj_a": "nf4",
        "self_attn.q_proj": "nf4",
        "input_layernorm": "plain",
    }


def test_text_nf4_is_nf4_without_the_tower() -> None:
    expected = actions("nf4")
    expected |= {role: "drop" for role in expected if role.startswith("visual.")}
    assert actions("text-nf4") == expected


def test_text_keeps_all_but_the_tower() -> None:
    for role, action in actions("text").items():
        assert action == ("drop" if role.startswith("visual.") else "keep")


def test_first_rule_that_matches_decides(tmp_path: Path) -> None:
    rules = [rule("mlp.up_proj", "plain"), rule("mlp", "nf4"), rule("mlp.up_proj", "drop"), REST]
    recipe = write(tmp_path, HEAD, *rules)
    up = role_of("model.layers.0.mlp.up_proj.weight")
    down = role_of("model.layers.0.mlp.down_proj.weight")
    assert recipe.rule_for(up) is recipe.rules[0]
    assert recipe.rule_for(down) is recipe.rules[1]


@given(st.permutations(["mlp", "self_attn", "mlp.up_proj", "kind:linear", "mtp"]))
def test_no_later_rule_is_ever_chosen_over_an_earlier(matches: list[str]) -> None:
    rules = tuple(Rule(match, "plain", match) for match in (*matches, "*"))
    recipe = Recipe("r", "nf4", "", rules, CONTAINERS["safetensors"])
    for role in ALL_ROLES:
        chosen = rules.index(recipe.rule_for(role))
        assert rules[chosen].matches(role)
        assert not any(rule.matches(role) for rule in rules[:chosen])


def test_user_recipe_is_read(tmp_path: Path) -> None:
    recipe = write(
        tmp_path, HEAD, 'description = "mine"\n', rule("mlp", "nf4"), 'reason = "try"\n', REST
    )
    assert recipe == Recipe(
        "mine.toml",
        "nf4",
        "mine",
        (
            Rule("mlp", "nf4", "try", required=True),
            Rule("*", "plain", "match = '*'", required=False),
        ),
        CONTAINERS["safetensors"],
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("format =", "not valid TOML"),
        ("a = 1\na = 2\n" + HEAD + REST, "not valid TOML"),
        ("x = " + "[" * 5000, "not valid TOML"),
        ("", "format None, expected stored or nf4"),
        (REST, "format None, expected stored or nf4"),
        ('format = "gguf"\n' + REST, "format 'gguf', expected stored or nf4"),
        ("format = []\n" + REST, "format [], expected stored or nf4"),
        (HEAD, "no [[rules]] in it"),
        (HEAD + "rules = []\n", "no [[rules]] in it"),
        (HEAD + 'rules = "*"\n', "no [[rules]] in it"),
        (HEAD + "rules = [1]\n", "rule 1: malformed, expected match and action"),
        (HEAD + 'keep = ["mlp"]\n' + REST, "unknown key 'keep'"),
        (HEAD + '[[rules]]\nmatch = "*"\n', "rule 1: malformed"),
        (HEAD + '[[rules]]\naction = "nf4"\n', "rule 1: malformed"),
        (HEAD + REST + "why = 1\n", "rule 1: malformed"),
        (HEAD + rule("*", "fp8"), 'packs as FP8; give it format = "fp8"'),
        (HEAD + rule("*", "NF4"), "rule 1: action 'NF4'"),
        (HEAD + REST + rule("mpl", "nf4"), "rule 2: 'mpl' is not a role; did you mean mtp?"),
        (HEAD + rule("", "nf4"), "rule 1: '' is not a role"),
        (
            HEAD + rule("mlp.gate_pro", "nf4"),
            "is not a role; did you mean mlp.gate_proj?",
        ),
        (HEAD + rule("layers.0", "nf4"), "'layers.0' is not a role"),
        (HEAD + rule("mlp.up_proj.weight", "nf4"), "'mlp.up_proj.weight' is not a role"),
        (HEAD + rule("linear", "nf4"), "'linear' is not a role"),
        (HEAD + rule("mlp.*", "nf4"), "'mlp.*' is not a role"),
        (HEAD + rule("mtp.layers.linear_attn", "nf4"), "'mtp.layers.linear_attn' is not a role"),
        (HEAD + rule("kind:matrix", "nf4"), "'kind:matrix', expected kind: and conv, embedding"),
        (HEAD + rule("kind:", "nf4"), "'kind:', expected kind: and"),
    ],
)
def test_recipe_written_wrongly_is_refused(tmp_path: Path, text: str, words: str) -> None:
    sentence = refusal(tmp_path, text)
    assert sentence.startswith("recipe mine.toml")
    assert words in sentence


def test_a_rule_may_have_every_key_and_is_for_its_layers(tmp_path: Path) -> None:
    recipe = write(tmp_path, HEAD, rule("mlp", "nf4"), 'layers = "0, 2"\nreason = "try"\n', REST)
    assert recipe.rules[0] == Rule("mlp", "nf4", "try", True, frozenset({0, 2}))
    for layer, action in ((0, "nf4"), (1, "plain"), (2, "nf4")):
        role = role_of(f"model.layers.{layer}.mlp.up_proj.weight")
        assert recipe.rule_for(role).action == action
    with pytest.raises(UsageError, match=r"^recipe mine\.toml, rule 1: layers 'x', expected"):
        write(tmp_path, HEAD, rule("mlp", "nf4"), 'layers = "x"\n', REST)


def test_a_recipe_may_be_its_base_and_nothing_else(tmp_path: Path) -> None:
    recipe = write(tmp_path, HEAD, 'base = "nf4"\n')
    assert recipe == replace(load_recipe("nf4"), name="mine.toml", description="")


def test_a_line_of_many_dots_is_refused(tmp_path: Path) -> None:
    assert write(tmp_path, HEAD, "# " + "." * 100 + "\n", REST).rules
    assert refusal(tmp_path, HEAD, "# " + "." * 101 + "\n", REST) == (
        f"recipe {tmp_path / 'mine.toml'}: a line of more than 100 dots"
    )


def test_a_file_larger_than_any_recipe_is_refused(tmp_path: Path) -> None:
    assert re.fullmatch(
        r"recipe \S+mine\.toml: .*, expected at most \S+.*", refusal(tmp_path, HEAD, "#" * 2**20)
    )


@given(st.text(max_size=40))
def test_any_text_is_a_recipe_or_a_usage_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(text.encode("utf-8", "replace"))
    with pytest.raises(UsageError):
        load_recipe(str(path))


def test_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"x\.toml: not UTF-8, expected TOML"):
        load_recipe(str(tmp_path / "x.toml"))


def test_recipe_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.toml: cannot be read \(.*No such file"):
        load_recipe(str(tmp_path / "nothing.toml"))


@pytest.mark.parametrize("name", ["", "NF4", "nf4.json", "../recipes/nf4", "FP8", "text_nf4"])
def test_unknown_recipe_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(name)
    known = ", ".join(built_in("safetensors"))
    assert f"not a built-in recipe, expected {known} or a .toml file" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("text-nf4", "; it is one of `qwen35 convert`"),
        ("text-nf5", ""),
        ("../../planning/recipes/nf4", ""),
        ("../recipes/nf4", ""),
    ],
)
def test_a_recipe_of_another_verb_is_said_to_be_one(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(name, "gguf")
    assert str(caught.value).endswith(f"or a .toml file{hint}")


def test_recipe_without_a_last_rule_is_refused_when_a_tensor_needs_it(
    tmp_path: Path, dense: Path
) -> None:
    recipe = write(tmp_path, HEAD, rule("mlp", "nf4"))
    with pytest.raises(UsageError, match=r"recipe mine\.toml: no rule for \S+; end it with match"):
        make_plan(open_folder(dense), recipe)


@pytest.mark.parametrize("role", ["mlp", "self_attn.q_proj", "visual", "linear_attn.in_proj_a"])
def test_keep_puts_a_rule_in_front(role: str) -> None:
    recipe = load_recipe("nf4").keeping((role,))
    assert recipe.rules[0] == Rule(role, "plain", "asked for by --keep", required=True)
    assert recipe.rules[1:] == load_recipe("nf4").rules


def test_keep_of_nothing_changes_nothing() -> None:
    assert load_recipe("nf4").keeping(()) == load_recipe("nf4")


@pytest.mark.parametrize("role", ["mpl", "up_proj", "mlp.gate_pro", "layers.0", "", "MLP", "mlp."])
def test_keep_of_an_unknown_role_is_refused(role: str) -> None:
    with pytest.raises(UsageError, match=f"^--keep {role}: '{role}' is not a role"):
        load_recipe("nf4").keeping((role,))


def test_keep_of_a_role_that_the_checkpoint_lacks_is_refused(dense: Path) -> None:
    recipe = load_recipe("nf4").keeping(("mlp.shared_expert",))
    with pytest.raises(UsageError, match="rule for 'mlp.shared_expert' .*--keep.* no tensor of"):
        make_plan(open_folder(dense), recipe)


def test_rule_of_a_user_that_nothing_is_left_for_is_refused(tmp_path: Path, dense: Path) -> None:
    recipe = write(tmp_path, HEAD, rule("mlp", "nf4"), rule("mlp.up_proj", "plain"), REST)
    with pytest.raises(UsageError, match="rule for 'mlp.up_proj' .* move it before the rule"):
        make_plan(open_folder(dense), recipe)


def test_last_rule_of_a_user_may_be_unused(tmp_path: Path, dense: Path) -> None:
    rules = [rule("mlp", "nf4"), *(rule(f"kind:{k}", "plain") for k in ("linear", "vector"))]
    assert make_plan(open_folder(dense), write(tmp_path, HEAD, *rules, REST)).steps


@pytest.mark.parametrize("match", ["embed_tokens", "mlp", "norm", "kind:linear", "*"])
def test_dropping_text_tensors_is_refused(tmp_path: Path, dense: Path, match: str) -> None:
    recipe = write(tmp_path, HEAD, rule("visual", "plain"), rule(match, "drop"), REST)
    with pytest.raises(UsageError, match="drops model.language_model.*, which every model needs"):
        make_plan(open_folder(dense), recipe)


def test_dropping_an_untied_head_is_refused(tmp_path: Path, moe: Path) -> None:
    recipe = write(tmp_path, HEAD, rule("lm_head", "drop"), REST)
    with pytest.raises(UsageError, match="drops lm_head.weight, which every model needs"):
        make_plan(open_folder(moe), recipe)


@pytest.mark.parametrize("match", ["visual.blocks", "visual.merger", "visual.pos_embed"])
def test_dropping_a_part_of_the_tower_is_refused(tmp_path: Path, dense: Path, match: str) -> None:
    recipe = write(tmp_path, HEAD, rule(match, "drop"), REST)
    with pytest.raises(UsageError, match=r"recipe mine\.toml: drops a part of the vision tower"):
        make_plan(open_folder(dense), recipe)


@pytest.mark.parametrize(
    ("match", "name"),
    [
        ("input_layernorm", "model.language_model.layers.0.input_layernorm.weight"),
        ("lm_head", "lm_head.weight"),
        ("embed_tokens", "model.language_model.embed_tokens.weight"),
        ("mtp.fc", "mtp.fc.weight"),
        ("mtp.layers.self_attn.q_proj", "mtp.layers.0.self_attn.q_proj.weight"),
        ("mlp.experts", "model.language_model.layers.0.mlp.experts.down_proj"),
        ("mlp.gate", "model.language_model.layers.0.mlp.gate.weight"),
        ("linear_attn.conv1d", "model.language_model.layers.0.linear_attn.conv1d.weight"),
        ("visual.pos_embed", "model.visual.pos_embed.weight"),
    ],
)
def test_packing_what_cannot_be_loaded_packed_is_refused(
    tmp_path: Path, moe: Path, match: str, name: str
) -> None:
    recipe = write(tmp_path, HEAD, rule(match, "nf4"), REST)
    with pytest.raises(UsageError) as caught:
        make_plan(open_folder(moe), recipe)
    assert f"packs {name}, expected linear layers of the text model" in str(caught.value)


def test_packing_single_experts_is_refused(tmp_path: Path, moe_per_expert: Path) -> None:
    recipe = write(tmp_path, HEAD, rule("mlp.experts", "nf4"), REST)
    with pytest.raises(UsageError, match=r"packs .*\.mlp\.experts\.0\.down_proj\.weight"):
        make_plan(open_folder(moe_per_expert), recipe)


def test_tower_may_be_packed_by_its_linear_layers(tmp_path: Path, dense: Path) -> None:
    bias = rule("visual.blocks.attn.qkv.bias", "plain")
    recipe = write(tmp_path, HEAD, bias, rule("visual.blocks.attn.qkv", "nf4"), REST)
    steps = make_plan(open_folder(dense), recipe).steps
    packed = [step.spec.name for step in steps if step.op == "nf4"]
    assert packed == [f"model.visual.blocks.{i}.attn.qkv.weight" for i in (0, 1)]


def test_drop_mtp_drops_it_and_nothing_else(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", layers=1)
    plan = make_plan(open_folder(source), load_recipe("nf4").dropping_mtp())
    dropped = [step.spec.name for step in plan.steps if step.op == "drop"]
    assert len(dropped) == 15
    assert all(name.startswith("mtp.") for name in dropped)
    assert load_recipe("nf4").dropping_mtp().rules[0] == Rule(
        "mtp", "drop", "asked for by --drop-mtp"
    )


def test_drop_mtp_of_a_checkpoint_without_it_is_fine() -> None:
    checkpoint = open_published("Qwen3.5-0.8B")
    assert make_plan(checkpoint, load_recipe("text").dropping_mtp()).steps


def test_recipes_of_the_package_have_only_known_keys() -> None:
    folder = Path(qwen35.__file__).parent / "planning" / "recipes"
    for path in folder.glob("*.toml"):
        keys = set(tomllib.loads(path.read_text()))
        assert {"format", "description"} <= keys
        assert "rules" in keys or path.stem in built_in("gguf")  # where rules may be silent
        assert not keys - {"base", "format", "description", "rules"}


def test_a_recipe_goes_on_with_the_rules_of_its_base() -> None:
    assert load_recipe("text-nf4").rules[1:] == load_recipe("nf4").rules


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('format = "nf4"\nbase = "x"\n[[rules]]\nmatch = "*"\naction = "plain"', "base 'x'"),
        ('format = "nf4"\nbase = "text"\n[[rules]]\nmatch = "*"\naction = "plain"', "that of text"),
        ('format = "stored"\n[[rules]]\nmatch = "mlp"\naction = "nf4"', "packs as NF4"),
    ],
)
def test_base_and_format_must_fit(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        load_recipe(str(path))


def test_a_recipe_that_packs_nothing_is_refused(tmp_path: Path, dense: Path) -> None:
    recipe = write(tmp_path, HEAD, REST)
    with pytest.raises(UsageError, match="leaves nothing to be packed"):
        make_plan(open_folder(dense), recipe)


def test_half_an_mtp_layer_is_refused(tmp_path: Path, dense: Path) -> None:
    recipe = write(tmp_path, HEAD, rule("mtp.layers", "drop"), rule("mlp", "nf4"), REST)
    with pytest.raises(UsageError, match="part of the MTP layer"):
        make_plan(open_folder(dense), recipe)


def test_a_group_to_pack_leaves_its_norms_and_biases_alone(tmp_path: Path, dense: Path) -> None:
    recipe = write(
        tmp_path, HEAD, rule("self_attn", "nf4"), rule("visual.blocks.attn.qkv", "nf4"), REST
    )
    steps = {step.role.name: step.op for step in make_plan(open_folder(dense), recipe).steps}
    assert steps["self_attn.q_proj"] == steps["visual.blocks.attn.qkv"] == "nf4"
    assert steps["self_attn.q_norm"] == steps["visual.blocks.attn.qkv.bias"] == "copy"


def test_roles_kept_twice_are_kept_once(dense: Path) -> None:
    keep = ("mlp.up_proj", "mlp", "mlp", "mlp.up_proj")
    recipe = load_recipe("nf4").keeping(keep)
    assert [r.match for r in recipe.rules if r.reason == "asked for by --keep"] == ["mlp"]
    ops = {s.role.name: s.op for s in make_plan(open_folder(dense), recipe).steps}
    assert ops["mlp.up_proj"] == "copy"


@pytest.mark.parametrize("name", ["*", "kind:linear"])
def test_keep_takes_roles_only(name: str) -> None:
    with pytest.raises(UsageError, match="not a role"):
        load_recipe("nf4").keeping((name,))


# --- what docs/recipes.md says


GUIDE = (ROOT / "docs" / "recipes.md").read_text("utf-8")


def section(title: str) -> str:
    """Return what stands under a heading of the guide."""
    return GUIDE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_column(title: str) -> set[str]:
    """Return the names in the first column of the table under a heading."""
    rows = re.findall(r"^\| (`.+?) \|", section(title), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_guide_has_every_key_format_and_action() -> None:
    assert first_column("The file") == KEYS
    assert first_column("A rule") == {"match", "action", "layers", "codes", "reason"}
    assert first_column("Actions in safetensors") == set(ACTIONS)
    for name in (name for container in CONTAINERS.values() for name in container.formats):
        assert f"`{name}`" in section("The file")
    for key in ("match", "action", "layers", "reason"):
        assert f"\n{key} = " in GUIDE


def test_the_recipes_of_the_guide_decide_something(tmp_path: Path) -> None:
    packed, typed = [token.content for token in tokens_of(GUIDE) if token.info == "toml"]
    steps = make_plan(open_published("Qwen3.5-0.8B"), write(tmp_path, packed)).steps
    kept = {step.reason for step in steps if step.op == "copy"}
    assert {"attention stays as it is", "the first layer reads the embedding"} <= kept
    (tmp_path / "typed.toml").write_text(typed)
    recipe = load_recipe(str(tmp_path / "typed.toml"), "gguf")
    (file,) = files_of(make_plan(open_folder(ASSET), recipe, types=("Q4_K_M",)))
    kinds = file.kinds
    assert kinds["blk.1.ffn_up.weight"] == "q8_0" != kinds["blk.2.ffn_up.weight"]
