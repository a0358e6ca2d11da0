"""The forward pass of a calibration, which sums up the inputs of each block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from qwen35.calibration.cached_states import record_cache, recording_attention
from qwen35.calibration.calibration_plan import CalibrationPlan
from qwen35.calibration.hooks import BlockSums, record_inputs
from qwen35.calibration.states import CalibrationFolder
from qwen35.calibration.sums import Sums
from qwen35.checkpoint.source import Reader
from qwen35.forward.blocks import HEAD, MTP, Block
from qwen35.forward.builder import Builder
from qwen35.forward.decoded_weights import StoredWeights
from qwen35.forward.forward_stream import ForwardStream, Track
from qwen35.progress import Progress

__all__ = ["calibration_stream"]


def calibration_stream(
    plan: CalibrationPlan,
    work: CalibrationFolder,
    reader: Reader,
    device: str,
    progress: Progress,
    *,
    ahead: bool | None = None,
) -> ForwardStream:
    """Return the pass of a plan's text through its checkpoint; it leaves the sums in `work`.

    Its `run` raises an `InputError` if an input is not finite.
    """
    weights = StoredWeights(reader, plan.config, plan.items)
    attention, apart = recording_attention("sdpa"), plan.sizes.wide > 0
    builder = Builder(weights, plan.dtype, device, attention=attention, apart=apart)

    @contextmanager
    def recorded(block: Block, module: Any) -> Iterator[None]:
        parts = {"": BlockSums()}
        with _recording(block, module, parts):
            yield
        sums: dict[str, Sums] = {}
        for prefix, one in parts.items():
            one.check(f"{block.name}.{prefix}".rstrip("."))
            sums |= {prefix + name: value for name, value in one.sums.items()}
        work.save(block.name, sums)

    track = Track(around=recorded)
    return ForwardStream(
        builder,
        plan.blocks,
        plan.text.windows,
        plan.sizes,
        work,
        progress,
        tracks=(track,),
        ahead=ahead,
    )


def _recording(block: Block, module: Any, parts: dict[str, BlockSums]) -> ExitStack:
    """Record what the matrices of a block read while the context is open, by prefix of names."""
    stack, own = ExitStack(), parts[""]
    if block.name == HEAD:
        _enter(stack, module.register_forward_hook(lambda _, __, out: own.add("lm_head", out)))
    elif block.name == MTP:
        hook = module["fc"].register_forward_pre_hook(lambda _, inputs: own.add("fc", inputs[0]))
        _enter(stack, hook)
        for i, layer in enumerate(module["layers"]):
            prefix = f"layers.{i}."
            parts[prefix] = BlockSums()
            _record_layer(stack, layer, parts[prefix])
    else:
        _record_layer(stack, module, own)
    return stack


def _enter(stack: ExitStack, handle: Any) -> None:
    stack.callback(handle.remove)


def _record_layer(stack: ExitStack, layer: Any, sums: BlockSums) -> None:
    stack.enter_context(record_inputs(layer, sums))
    stack.enter_context(record_cache(layer, sums))
