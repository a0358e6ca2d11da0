"""The README's results table, built from the figures that `make results` measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from generating.markdown import table

__all__ = ["results_lines"]

_RESULTS = Path(__file__).parents[1] / "results.json"


def results_lines() -> Iterator[str]:
    """Yield the lines of the table."""
    results = json.loads(_RESULTS.read_text("utf-8"))
    base, tokens, tool = results["base"], results["tokens"], results["tool"]
    yield (
        f"{tokens['scored']:,} tokens in {tokens['chunks']} chunks of {tokens['context']}; ± "
        "treats chunks as independent. And inputs: the mean KLD if servers quantize inputs."
    )
    yield (
        f"Measured with qwen35 {tool['qwen35']}, llama-cpp-python {tool['llama_cpp_python']}, "
        f"PyTorch {tool['torch'].partition('+')[0]} and transformers {tool['transformers']}."
    )
    yield ""
    columns = ("format", "made by", "bytes of weights", "mean KLD", "same top token", "and inputs")
    rows = [[base["name"], "", f"{base['bytes']:,}", "", "", ""]]
    for row in results["rows"]:
        kld, top, inputs = row["kld"], row["same_top"], row["kld_with_inputs"]
        rows.append(
            [
                row["name"],
                f"`{row['verb']} --recipe {row['recipe']}`",
                f"{row['bytes']:,}",
                f"{kld['value']:.6f} ± {kld['block_error']:.6f}",
                f"{100 * top['value']:.2f} %",
                f"{inputs['value']:.6f}" if inputs else "",
            ]
        )
    yield from table(columns, rows)
