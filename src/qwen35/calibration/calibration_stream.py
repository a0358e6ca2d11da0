"""The forward pass of a calibration, which sums up the inputs of each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from qwen35.calibration.cached_states import record_cache, recording_attention
from qwen35.calibration.calibration_plan import CalibrationPlan
from qwen35.calibration.hessian_files import BlockHessians
from qwen35.calibration.hessian_record import HessianRecord
from qwen35.calibration.hessian_totals import triangles_of
from qwen35.calibration.hooks import BlockSums, record_inputs
from qwen35.calibration.states import CalibrationFolder
from qwen35.calibration.sums import Sums, merge_sums
from qwen35.checkpoint.source import Reader
from qwen35.forward.blocks import HEAD, MTP, Block
from qwen35.forward.builder import Builder
from qwen35.forward.decoded_weights import StoredWeights
from qwen35.forward.forward_stream import ForwardStream, Track
from qwen35.progress import Progress

__all__ = ["BlockRecord", "block_hessians", "calibration_stream", "save_checked"]


def calibration_stream(
    plan: CalibrationPlan,
    work: CalibrationFolder,
    reader: Reader,
    device: str,
    progress: Progress,
    *,
    ahead: bool | None = None,
    finished: Callable[[Sequence[str]], None] = lambda _: None,
) -> ForwardStream:
    """Return the pass of a plan's text through its checkpoint; it leaves the sums in `work`.

    Its `run` raises an `InputError` if an input is not finite.

    Args:
        plan: the plan.
        work: its folder.
        reader: of the checkpoint.
        device: for torch.
        progress: receives the bytes of each block.
        ahead: as for `ForwardStream`.
        finished: called with the names of a block's files of Hessians when these are complete,
            before the block is listed as done.
    """
    weights = StoredWeights(reader, plan.config, plan.items)
    attention, apart = recording_attention("sdpa"), plan.sizes.wide > 0
    builder = Builder(weights, plan.dtype, device, attention=attention, apart=apart)
    hessians = _Hessians(plan, work, builder.torch, device) if plan.hessians else None
    record, merged = BlockRecord(), dict[str, Sums]()

    @contextmanager
    def recorded(block: Block, module: Any) -> Iterator[None]:
        nonlocal record
        record = BlockRecord(hessians.of(block.name, lambda: stream.passing) if hessians else None)
        with record.of(block, module):
            yield
        save_checked(work, block.name, merged)  # the same after each pass
        merged.clear()

    def again() -> bool:
        if hessians is None:
            return False
        names = hessians.passed()
        if names:
            finished(names)
        return not names

    def passed() -> dict[str, Sums]:
        if hessians is not None:
            hessians.summed(stream.passing)
        return record.taken()

    def merge(sums: dict[str, Sums]) -> None:
        merge_sums(merged, sums)

    track = Track(around=recorded, passed=passed, merge=merge, again=again)
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
        """Return this thread's sums since the last call, keyed by measured weight."""
        return {p + name: one for p, part in self._parts.items() for name, one in part.taken()}


def block_hessians(plan: CalibrationPlan, work: CalibrationFolder, block: str) -> BlockHessians:
    """Return what writes the Hessians of a block.

    Raises:
        OutputError: the disk is full.
    """
    assert plan.hessians is not None
    return BlockHessians(
        block,
        plan.hessians.inputs[block],
        plan.hessians.group,
        work.hessians,
        work.folder,
        plan.hessian_provenance,
    )


class _Hessians:
    """The Hessians of one block after the other."""

    def __init__(
        self, plan: CalibrationPlan, work: CalibrationFolder, torch: Any, device: str
    ) -> None:
        self._plan, self._work, self._torch, self._device = plan, work, torch, device
        self._block: BlockHessians | None = None
        self._record: HessianRecord | None = None

    def of(self, block: str, windows: Callable[[], range]) -> HessianRecord:
        """Return what takes the inputs of a block in the next pass of it."""
        assert self._plan.hessians is not None
        if self._block is None:
            self._block = block_hessians(self._plan, self._work, block)
        inputs, wanted = self._plan.hessians.inputs[block], self._block.wanted
        self._record = HessianRecord(self._torch, self._device, inputs, windows, wanted)
        return self._record

    def summed(self, windows: range) -> None:
        """Add up parts of the text, each when its last windows have passed."""
        ends = windows.stop % self._plan.part == 0 or windows.stop == len(self._plan.text.windows)
        if ends:
            assert self._block is not None
            assert self._record is not None
            self._block.merge(triangles_of(self._record.sums))
            self._record.sums.clear()  # before those of the next part are allocated

    def passed(self) -> list[str]:
        """Write what a pass summed up; return the block's files if it needs no other pass."""
        block = self._block
        assert block is not None
        assert self._record is not None
        if block.passed(self._record.tokens):
            return []
        self._block = self._record = None
        return block.names


def _enter(stack: ExitStack, handle: Any) -> None:
    stack.callback(handle.remove)


def _record_layer(stack: ExitStack, layer: Any, sums: BlockSums) -> None:
    stack.enter_context(record_inputs(layer, sums))
    stack.enter_context(record_cache(layer, sums))
