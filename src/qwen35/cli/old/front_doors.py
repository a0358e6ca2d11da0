"""Entry points of the earlier toolkit's commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen35.cli.main import run_verb, tune_process

__all__ = [
    "collect_activation_stats",
    "convert",
    "inspect",
    "quantize_fp8",
    "strip",
    "upload",
    "verify",
    "verify_qwen35",
]


def _run(name: str, module: str, argv: Sequence[str] | None) -> int:
    if argv is None:
        tune_process()
    return run_verb(name, sys.argv[1:] if argv is None else argv, module=module, prog=name)


def convert(argv: Sequence[str] | None = None) -> int:
    """`qwen35-convert`: quantize a vision-language checkpoint to NF4."""
    return _run("qwen35-convert", "old.old_convert", argv)


def strip(argv: Sequence[str] | None = None) -> int:
    """`qwen35-strip`: remove a checkpoint's vision tower."""
    return _run("qwen35-strip", "old.old_strip", argv)


def inspect(argv: Sequence[str] | None = None) -> int:
    """`qwen35-inspect`: print prefixes and sizes of a checkpoint."""
    return _run("qwen35-inspect", "inspect_command", argv)


def quantize_fp8(argv: Sequence[str] | None = None) -> int:
    """`qwen35-quantize-fp8`: quantize a checkpoint to block-wise FP8."""
    return _run("qwen35-quantize-fp8", "old.old_quantize_fp8", argv)


def collect_activation_stats(argv: Sequence[str] | None = None) -> int:
    """`qwen35-collect-activation-stats`: statistics of a loaded model that continues prompts."""
    return _run("qwen35-collect-activation-stats", "old.old_collect", argv)


def verify(argv: Sequence[str] | None = None) -> int:
    """`qwen35-verify`: check config, loading, precision and answers."""
    return _run("qwen35-verify", "old.old_verify", argv)


def verify_qwen35(argv: Sequence[str] | None = None) -> int:
    """`qwen35-verify-qwen35`: the same, and an image."""
    return _run("qwen35-verify-qwen35", "old.old_verify_qwen35", argv)


def upload(argv: Sequence[str] | None = None) -> int:
    """`qwen35-upload`: sync a folder with the Hub."""
    return _run("qwen35-upload", "old.old_upload", argv)
