"""Compare the bytes of every recipe for a published size, without a download.

python examples/compare_plans.py [MODEL]
"""

from __future__ import annotations

import sys

import qwen35
from qwen35.errors import UsageError
from qwen35.planning.recipe import built_in


def main(model: str = "Qwen3.5-9B") -> None:
    """Print one line per recipe."""
    source = qwen35.inspect(model)
    assert isinstance(source, dict)  # a list would be GGUF files
    print(f"{model}: {source['parameters']:,} parameters, {source['bytes']:,} bytes")
    for recipe in built_in("safetensors"):
        try:
            plan = qwen35.plan(model, recipe=recipe)
        except UsageError as error:  # a dense model has no routed experts
            print(f"{recipe:<22} {error}")
            continue
        packed = sum(step.packing is not None for step in plan.steps)
        share = plan.nbytes / source["bytes"]
        print(f"{recipe:<22} {plan.nbytes:>15,} bytes  {share:>6.1%}  {packed:>4} weights packed")


if __name__ == "__main__":
    main(*sys.argv[1:])
