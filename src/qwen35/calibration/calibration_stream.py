"""The forward pass of a calibration, which sums up the inputs of each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from qwen35.calibration.cached_states import record_cache, recording_attention
from qwen35.calibration.calibration_plan import CalibrationPlan
from qwen35.calibration.hessian_files import BlockHessians
from qwen35.calibration.hessian_record import HessianRecord
from qwen35.calibration.hooks import BlockSums, record_inputs
from qwen35.calibration.states import CalibrationFolder
from qwen35.calibration.sums import Sums
from qwen35.checkpoint.source import Reader
from qwen35.forward.blocks import HEAD, MTP, Block
from qwen35.forward.builder import Builder
from qwen35.forward.decoded_weights import StoredWeights
from qwen35.forward.forward_stream import ForwardStream, Track
from qwen35.progress import Progress
from qwen35.sinks.staging import os_errors

__all__ = ["BlockRecord", "calibration_stream", "save_checked"]


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
    hessians = _Hessians(plan, work, builder.torch, device) if plan.hessians else None

    @contextmanager
    def recorded(block: Block, module: Any) -> Iterator[None]:
        record = BlockRecord(hessians.of(block.name, lambda: stream.passing) if hessians else None)
        with record.of(block, module):
            yield
        save_checked(work, block.name, record.taken())  # the same after each pass

    def again() -> bool:
        return hessians is not None and hessians.passed()

    track = Track(around=recorded, again=again)
    stream = ForwardStream(
        builder,
        plan.blocks,
        plan.text.windows,
        plan.sizes,
        work,
        progress,
        tracks=(track,),
        ahead=ahead,
    )
    return stream


def save_checked(work: CalibrationFolder, block: str, sums: Mapping[str, Sums]) -> None:
    """Save the sums of a block, if every input was finite.

    Raises:
        InputError: one was not.
    """
    for name, one in sums.items():
        one.check(f"{block}.{name}")
    work.save(block, sums)


class BlockRecord:
    """What the matrices of a block read.

    Args:
        hessians: takes it too.
    """

    def __init__(self, hessians: HessianRecord | None = None) -> None:
        self._hessians = hessians
        self._parts: dict[str, BlockSums] = {}  # by prefix of names

    def of(self, block: Block, module: Any) -> ExitStack:
        """Record while the context is open."""
        stack, own = ExitStack(), self._part("")
        if block.name == HEAD:
            _enter(stack, module.register_forward_hook(lambda _, __, out: own.add("lm_head", out)))
        elif block.name == MTP:
            fc = module["fc"]
            _enter(stack, fc.register_forward_pre_hook(lambda _, inputs: own.add("fc", inputs[0])))
            for i, layer in enumerate(module["layers"]):
                _record_layer(stack, layer, self._part(f"layers.{i}."))
        else:
            _record_layer(stack, module, own)
        return stack

    def _part(self, prefix: str) -> BlockSums:
        if prefix not in self._parts:
            sink = self._hessians.under(prefix) if self._hessians else None
            self._parts[prefix] = BlockSums(sink)
        return self._parts[prefix]

    def taken(self) -> dict[str, Sums]:
        """Return the sums since the last call, keyed by measured weight."""
        return {p + name: one for p, part in self._parts.items() for name, one in part.taken()}


class _Hessians:
    """The Hessians of one block after the other."""

    def __init__(
        self, plan: CalibrationPlan, work: CalibrationFolder, torch: Any, device: str
    ) -> None:
        self._plan, self._folder, self._torch, self._device = plan, work.hessians, torch, device
        self._block: BlockHessians | None = None

    def of(self, block: str, windows: Callable[[], range]) -> HessianRecord:
        """Return what takes the inputs of a block in the next pass of it."""
        plan = self._plan
        assert plan.hessians is not None
        if self._block is None:
            with os_errors(self._folder):
                self._folder.mkdir(exist_ok=True)
            self._block = BlockHessians(
                self._torch,
                self._device,
                block,
                plan.hessians.inputs[block],
                windows,
                plan.hessians.group,
                self._folder,
                plan.hessian_provenance,
            )
        return self._block.record

    def passed(self) -> bool:
        """Write what a pass summed up; return whether the block needs another."""
        assert self._block is not None
        more = self._block.passed()
        if not more:
            self._block = None
        return more


def _enter(stack: ExitStack, handle: Any) -> None:
    stack.callback(handle.remove)


def _record_layer(stack: ExitStack, layer: Any, sums: BlockSums) -> None:
    stack.enter_context(record_inputs(layer, sums))
    stack.enter_context(record_cache(layer, sums))
