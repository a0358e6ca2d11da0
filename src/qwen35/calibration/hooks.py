"""Hooks that sum up the inputs of a decoder layer's linear layers and experts."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from qwen35.calibration.inputs import EXPERTS_IN, EXPERTS_OUT, HOOKED
from qwen35.calibration.sums import Sums
from qwen35.engines.expert_loop import ExpertInput, experts_in_turn

__all__ = ["BlockSums", "InputSink", "record_inputs"]


class InputSink(Protocol):
    """What else takes the inputs of a layer."""

    def routed(self, chosen: Any) -> None:
        """Take which experts the next tokens reach, [tokens, top-k]."""

    def add(self, name: str, x: Any, number: int) -> None:
        """Take an input [tokens, width] of a weight, or of matrix `number` in a stack."""


class BlockSums:
    """The sums of one block, keyed by measured weight: each thread sees what it computed itself.

    Args:
        also: takes the same inputs.
    """

    def __init__(self, also: InputSink | None = None) -> None:
        self._also, self._own = also, threading.local()

    @property
    def sums(self) -> dict[str, Sums]:
        """The sums so far."""
        sums: dict[str, Sums] = vars(self._own).setdefault("sums", {})
        return sums

    def routed(self, chosen: Any) -> None:
        """Take which experts the next tokens reach, [tokens, top-k]."""
        if self._also is not None:
            self._also.routed(chosen)

    def add(self, name: str, x: Any, *, number: int = 0, slices: int = 1) -> None:
        """Add an input.

        Args:
            name: of the weight.
            x: [..., width] of any float dtype, on any device.
            number: index of the matrix in a stack.
            slices: number of matrices in the stack.
        """
        flat = x.detach().reshape(-1, x.shape[-1])
        if name not in self.sums:
            self.sums[name] = Sums.zeros(slices, flat.shape[1])
        if not len(flat):
            return
        # float32 within a batch, float64 across batches.
        squares = flat.float().square().sum(0).double().cpu().numpy()
        largest = flat.abs().amax(0).float().cpu().numpy()
        self.sums[name].add(number, squares, largest, len(flat))
        if self._also is not None:
            self._also.add(name, flat, number)

    def taken(self) -> Iterable[tuple[str, Sums]]:
        """Return the sums so far, and begin anew."""
        sums = self.sums
        vars(self._own).clear()
        return sums.items()

    def check(self, block: str) -> None:
        """Check that every input was finite.

        Raises:
            InputError: one was not.
        """
        for name, sums in self.sums.items():
            sums.check(f"{block}.{name}")


@contextmanager
def record_inputs(layer: Any, block_sums: BlockSums) -> Iterator[None]:
    """Record the inputs within a transformers decoder layer while the context is open."""
    modules = dict(layer.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(_hook(name, block_sums))
        for name in HOOKED
        if name in modules
    ]
    experts = modules.get("mlp.experts")
    if experts is not None:
        handles.append(experts.register_forward_pre_hook(_prepare(block_sums)))
    try:
        with _recorded(experts, block_sums) if experts is not None else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, block_sums: BlockSums) -> Any:
    def record(_: Any, arguments: tuple[Any, ...]) -> None:
        block_sums.add(name, arguments[0])

    return record


def _prepare(block_sums: BlockSums) -> Any:
    """Return a hook that creates the sums of experts, which no token may reach."""

    def prepare(experts: Any, arguments: tuple[Any, ...]) -> None:
        hidden, chosen = arguments[:2]
        block_sums.routed(chosen)
        for name, width in (
            (EXPERTS_IN, hidden.shape[1]),
            (EXPERTS_OUT, experts.down_proj.shape[2]),
        ):
            block_sums.add(name, hidden.new_empty(0, width), slices=experts.num_experts)

    return prepare


def _recorded(experts: Any, block_sums: BlockSums) -> AbstractContextManager[None]:
    """Record what each expert reads while the context is open."""

    def recording(name: str) -> ExpertInput:
        def record(expert: int, x: Any) -> Any:
            block_sums.add(name, x, number=expert)
            return x

        return record

    return experts_in_turn(experts, recording(EXPERTS_IN), recording(EXPERTS_OUT))
