"""Write a custom recipe: NF4, with the last layers in bf16.

python examples/own_recipe.py [MODEL]
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import qwen35

TINY = Path(__file__).parent.parent / "assets" / "qwen3.5-tiny"

RECIPE = """
format = "nf4"
base = "text-nf4"
description = "text-only NF4, layers from {first} on in bf16"

[[rules]]
match = "kind:linear"
layers = "{first}-{last}"
action = "plain"
reason = "the last layers cost most"
"""


def main(model: str = str(TINY)) -> None:
    """Plan the model with and without the rule."""
    roles = (step.role for step in qwen35.plan(model, recipe="text-nf4").steps)
    last = max(role.layer for role in roles if role.layer is not None and role.scope == "text")
    with TemporaryDirectory() as folder:
        recipe = Path(folder) / "last-layers.toml"
        recipe.write_text(RECIPE.format(first=last - 1, last=last))
        for name in ("text-nf4", recipe):
            plan = qwen35.plan(model, recipe=name)
            packed = sum(step.op == "nf4" for step in plan.steps)
            print(f"{plan.recipe.name:<18} {plan.nbytes:>13,} bytes, {packed} weights in NF4")


if __name__ == "__main__":
    main(*sys.argv[1:])
