"""Statistics of a fully loaded model continuing prompts, for `qwen35-collect-activation-stats`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qwen35.calibration.hooks import BlockSums, record_inputs
from qwen35.calibration.statistics_file import coverage, write_statistics
from qwen35.calibration.sums import FLOOR, Sums
from qwen35.checkpoint.locations import read_bounded
from qwen35.checkpoint.reconciled import has_tower, take
from qwen35.checkpoint.source import Checkpoint
from qwen35.engines.torch_model import MODEL_OPTIONS, NO_CODE, torch_and_transformers
from qwen35.errors import InputError
from qwen35.forward.blocks import HEAD
from qwen35.planning.manifest import source_json
from qwen35.progress import Progress
from qwen35.version import __version__

__all__ = ["PROMPTS", "collect", "read_prompts"]

PROMPTS = (
    "Explain how a bicycle stays upright while it is moving.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Summarize the causes of the French Revolution in a paragraph.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey?",
    "Translate into German: The library closes early on Fridays.",
    "List five ways in which a household can save electricity.",
    "What is the difference between a virus and a bacterium?",
    "Write a short poem about rain on a tin roof.",
    "Prove that the sum of two even numbers is even.",
    "Describe the steps of making sourdough bread, from starter to oven.",
    "SELECT name, COUNT(*) FROM orders GROUP BY name; What does this query do?",
    "Compare renting and buying a home for a family that may move in three years.",
)
"""Default prompts: prose, code, arithmetic, another language."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts from a file, one per line; skip empty lines.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or has no prompts.
    """
    try:
        lines = read_bounded(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(str(path), "not UTF-8 text") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InputError(str(path), "no prompts in it", expected="one per line")
    return prompts


class _MemorySums:
    """The sums of all blocks, in memory."""

    def __init__(self) -> None:
        self.blocks: dict[str, BlockSums] = {}

    def sums(self, block: str) -> Mapping[str, Sums]:
        block_sums = self.blocks.get(block)
        return block_sums.sums if block_sums else {}


def collect(
    checkpoint: Checkpoint,
    out: Path,
    prompts: Sequence[str],
    *,
    tokens: int,
    device_map: str,
    progress: Progress,
) -> dict[str, Any]:
    """Load a model, continue prompts greedily, and write statistics of its layers' inputs.

    Prompts get no chat template. The whole model is in memory; MTP layers, which transformers does
    not build, have no entries.

    Args:
        checkpoint: in a folder.
        out: the JSON file; its folder exists.
        prompts: to continue.
        tokens: most new tokens per prompt.
        device_map: for ``from_pretrained``.
        progress: receives each prompt.

    Returns:
        The provenance recorded in the file.

    Raises:
        InputError: an input is not finite.
    """
    torch, transformers = torch_and_transformers("calibrate")
    folder, vision = checkpoint.folder(), has_tower(checkpoint)
    checkpoint, items = take(checkpoint, tower=False)
    kind = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    options = {"dtype": "auto", "device_map": device_map, **MODEL_OPTIONS}
    model = getattr(transformers, kind).from_pretrained(folder, **options)
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
    # Only the text model is measured: prompts have no images.
    text = model.model.language_model if vision else model.model
    sums = _MemorySums()
    with _record_all(text, sums), torch.inference_mode():
        count = _continue(model, tokenizer, prompts, tokens, progress)
    for block, block_sums in sums.blocks.items():
        block_sums.check(block)
    expert_coverage = coverage(((name, one.sums) for name, one in sums.blocks.items()), FLOOR)
    provenance = {
        "qwen35": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "source": source_json(checkpoint),
        "prompts": {"count": len(prompts), "sha256": _digest(prompts)},
        "tokens": count,
        "max_tokens": tokens,
        "floor": FLOOR,
        "experts_below_floor": sum(map(len, expert_coverage["below_floor"].values())),
        "geometry": checkpoint.config.geometry,
    }
    write_statistics(out, items, checkpoint.config, sums, floor=FLOOR, provenance=provenance)
    return provenance


def _digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def _record_all(text: Any, sums: _MemorySums) -> ExitStack:
    """Record the inputs of every decoder layer and of the head while the context is open."""
    stack = ExitStack()
    for i, layer in enumerate(text.layers):
        sums.blocks[f"layers.{i}"] = BlockSums()
        stack.enter_context(record_inputs(layer, sums.blocks[f"layers.{i}"]))
    head = sums.blocks.setdefault(HEAD, BlockSums())
    handle = text.norm.register_forward_hook(lambda _, __, out: head.add("lm_head", out))
    stack.callback(handle.remove)
    return stack


def _continue(
    model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, progress: Progress
) -> int:
    """Continue each prompt; return the number of input tokens."""
    count = 0
    progress.begin("continuing prompts", len(prompts))
    try:
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
            ids = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=tokens,
                do_sample=False,
            )
            count += ids.shape[1] - 1  # the last token is not fed back
            progress.advance(1, prompt[:40])
    finally:
        progress.end()
    return count
