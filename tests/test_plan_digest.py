"""The digest of a plan: what it depends on, and what it does not."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints import tiny_config
from plans import made_up
from qwen35.checkpoint.source import open_published
from qwen35.planning.output_plan import digest_of, make_plan
from qwen35.planning.recipe import load_recipe

pytestmark = pytest.mark.sentences


@pytest.mark.parametrize("values", [{}, {"a": []}, {"b": [1, {"d": 2, "c": 3}], "a": None}])
def test_digest_is_that_of_sorted_json(values: dict[str, object]) -> None:
    text = json.dumps(values, sort_keys=True).encode()
    given = {name: iter(v) if isinstance(v, list) else v for name, v in values.items()}
    assert digest_of(given) == digest_of(values) == hashlib.sha256(text).hexdigest()


def test_digest_does_not_depend_on_the_name_or_place() -> None:
    checkpoint = open_published("Qwen3.5-0.8B")
    other = replace(checkpoint, name="elsewhere", root=Path("/elsewhere"), revision="abc")
    recipe = load_recipe("nf4")
    assert make_plan(checkpoint, recipe).digest == make_plan(other, recipe).digest


def test_digest_depends_on_all_that_decides_the_bytes() -> None:
    config = tiny_config()
    checkpoint, recipe = made_up(config), load_recipe("nf4")
    plans = [
        make_plan(checkpoint, recipe),
        make_plan(checkpoint, load_recipe("text-nf4")),
        make_plan(checkpoint, load_recipe("text-nf4"), keep_prefix=True),
        make_plan(checkpoint, load_recipe("text")),
        make_plan(checkpoint, recipe.keeping(("mlp",))),
        make_plan(checkpoint, recipe.dropping_mtp()),
        make_plan(made_up(config | {"eos_token_id": 5}), recipe),
        make_plan(made_up(tiny_config(dtype="float16")), recipe),
        make_plan(replace(checkpoint, sidecars={"tokenizer.json": 7}), recipe),
        make_plan(replace(checkpoint, sidecars={"tokenizer.json": 8}), recipe),
    ]
    digests = [plan.digest for plan in plans]
    assert len(set(digests)) == len(plans)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
