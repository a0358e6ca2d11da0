"""Describe a checkpoint from its headers: prefixes, sizes, dtypes, format, parameters."""

from __future__ import annotations

import argparse

from qwen35.api.inspect_api import inspect
from qwen35.checkpoint.checkpoint_summary import summary_text
from qwen35.cli.console import Console
from qwen35.cli.shared_flags import add_model, keywords

EXAMPLES = {
    "a checkpoint on the Hub, from its headers alone": "qwen35 inspect Qwen/Qwen3.5-0.8B",
    "a published size, without a network": "qwen35 inspect Qwen3.5-35B-A3B",
    "GGUF files with their metadata, as JSON": ("qwen35 inspect Qwen3.5-text-0.8B-GGUF --json"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser, sizes=True, files=True)


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""
    summary = inspect(**keywords(args))
    if isinstance(summary, list):
        from qwen35.planning.gguf_files.gguf_summary import summary_text as gguf_text

        output.data("\n\n".join(map(gguf_text, summary)), summary)
    else:
        output.data(summary_text(summary), summary)
    return 0
