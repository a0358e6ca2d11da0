"""Plans of published sizes and of made-up checkpoints without bytes, and what is in them."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from checkpoints import layout_of, tiny_config
from qwen35.checkpoint.source import Checkpoint, open_published
from qwen35.codecs.nf4 import layout as nf4
from qwen35.codecs.registry import group
from qwen35.model.model_config import parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors
from qwen35.planning.containers import CONTAINERS
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.rules import Recipe, Rule
from qwen35.tensors import StoredTensor


@lru_cache(maxsize=128)  # all that the tests of plans ask for, in every file again
def published_plan(size: str, recipe: str, keep: tuple[str, ...] = ()) -> Plan:
    """Plan a published size."""
    return make_plan(open_published(size), load_recipe(recipe).keeping(keep))


def config_of(plan: Plan) -> dict[str, Any]:
    """Parse the config.json that a plan writes."""
    parsed: dict[str, Any] = json.loads(plan.documents["config.json"])
    return parsed


def skip_list(plan: Plan) -> list[str]:
    """Return the modules that transformers is told to leave alone."""
    skip: list[str] = config_of(plan)["quantization_config"]["llm_int8_skip_modules"]
    return skip


def made_up(
    config: dict[str, Any], layout: CheckpointNaming | None = None, packed: tuple[str, ...] = ()
) -> Checkpoint:
    """Return a checkpoint of `config` without bytes, some weights of it in NF4."""
    tensors: dict[str, StoredTensor] = {}
    for spec in expected_tensors(parse_config(config), layout or layout_of(config)):
        for part in nf4.layout(spec) if spec.name in packed else (spec,):
            tensors[part.name] = StoredTensor(part, "model.safetensors", 0)
    weights, problems = group(tensors)
    assert not problems
    return Checkpoint("made up", parse_config(config), weights, CheckpointNaming.of(tensors), {})


def recipe_of(*rules: tuple[str, str], form: str = "nf4") -> Recipe:
    """Return a recipe that ends with everything plain."""
    made = [Rule(match, action, "test") for match, action in rules]
    return Recipe("test", form, "", (*made, Rule("*", "plain", "rest")), CONTAINERS["safetensors"])


def nf4_bytes(numel: int, shape: tuple[int, ...], dtype: str = "bfloat16") -> int:
    """Return the bytes of an NF4 weight, by hand."""
    blob = (
        f'{{"quant_type": "nf4", "blocksize": 64, "dtype": "{dtype}", "shape": {list(shape)}, '
        '"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": }'
    )
    width = -(-(len(blob) + 24) // 8) * 8
    blocks = numel // 64
    return numel // 2 + blocks + 16 * 4 + 4 * -(-blocks // 256) + 256 * 4 + width


def packed_config(skip: list[str]) -> dict[str, Any]:
    """Return the config of an NF4 source."""
    quantization = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skip}
    return tiny_config() | {"quantization_config": quantization}
