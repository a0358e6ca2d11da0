"""Every built-in recipe as a table, the actions, and every role."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources

from generating.markdown import cell, code, heading, table
from qwen35.model.roles import ROLES
from qwen35.planning.gguf_files.mixes import FILE_TYPES
from qwen35.planning.layers import spell_layers
from qwen35.planning.recipe import built_in, load_recipe
from qwen35.planning.rules import Rule
from qwen35.planning.safetensors_files.safetensors_container import ACTIONS

__all__ = ["recipes_page", "roles_page"]

_LEAD = (
    "A recipe is a table from roles to actions; the first row that matches a tensor decides. "
    "These are built in. Your own recipe is a TOML file in the same format "
    "([every key](../recipes.md)), accepted wherever a built-in name is. "
    "`match` is a [role](roles.md), a group of roles by its first segments, `kind:` and a kind, or "
    "`*`."
)
_GGUF_LEAD = (
    "For `qwen35 gguf`. A tensor that no row matches gets its type from llama-quantize's mix for "
    "the file type; norms, biases and other vectors are F32 in every file."
)
_ROLES_LEAD = (
    "A role is a tensor's name without prefix, layer and expert numbers and `.weight`. "
    "`qwen35 plan --roles` prints this table; `--keep` and the `match` of recipes use these names. "
    "Published checkpoints store two kinds of vectors in `F32`; all other tensors have the "
    "checkpoint's dtype."
)
_PLACES = {
    "root": "once",
    "layer": "every layer",
    "linear": "linear attention",
    "full": "full attention",
    "dense": "dense layers",
    "moe": "mixture layers",
    "fused": "fused experts",
    "expert": "each expert",
}


def recipes_page() -> str:
    """Return the page of all recipes and actions."""
    lines = [*heading("Recipes", _LEAD), "## Actions", ""]
    lines += table(("action", "does"), ([code(a), cell(text)] for a, text in ACTIONS.items()))
    lines += ["## Safetensors", "", "For `qwen35 plan` and `qwen35 convert`.", ""]
    for name in built_in("safetensors"):
        lines += _recipe(name, load_recipe(name).rules)
    lines += ["## GGUF", "", _GGUF_LEAD, ""]
    for name in built_in("gguf"):
        lines += _recipe(name, load_recipe(name, "gguf").rules)
    lines += ["### File types", "", _file_types(), ""]
    return "\n".join(lines).rstrip() + "\n"


def _recipe(name: str, rules: Sequence[Rule]) -> Iterator[str]:
    path = resources.files("qwen35.planning").joinpath(f"recipes/{name}.toml")
    head = tomllib.loads(path.read_text("utf-8"))
    yield from (f"### {name}", "", f"{cell(head['description'])}. Format `{head['format']}`.")
    if "base" in head:
        own = len(head.get("rules", ()))
        which = "row is" if own == 1 else f"{own} rows are"
        yield f"The first {which} its own, the others come from `{head['base']}`."
    yield ""
    if rules:
        rows = ([_match(rule), code(rule.action), cell(rule.reason)] for rule in rules)
        yield from table(("role", "action", "reason"), rows)


def _match(rule: Rule) -> str:
    only = "" if rule.layers is None else f", layers {spell_layers(rule.layers)}"
    return code(rule.match) + only


def _file_types() -> str:
    names = ", ".join(code(name) for name in FILE_TYPES)
    return f"`--types` takes {names}."


def roles_page() -> str:
    """Return the page of all roles."""
    rows = (
        [
            code(path.removesuffix(".weight")),
            info.kind,
            _PLACES[info.place],
            code(" x ".join(info.shape)),
            info.dtype,
            cell(info.meaning),
        ]
        for path, info in ROLES.items()
    )
    columns = ("role", "kind", "where", "shape", "dtype", "meaning")
    lines = [*heading("Roles", _ROLES_LEAD), *table(columns, rows)]
    return "\n".join(lines).rstrip() + "\n"
