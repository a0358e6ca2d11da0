"""Hooks that sum up the inputs of a decoder layer's linear layers and experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwen35.calibration.inputs import EXPERTS_IN, EXPERTS_OUT, HOOKED
from qwen35.calibration.sums import Sums

__all__ = ["BlockSums", "record_inputs"]


class BlockSums:
    """The sums of one block, keyed by measured weight."""

    def __init__(self) -> None:
        self.sums: dict[str, Sums] = {}

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
    # Hooks see only the input of a fused experts module, not each expert's share of it or the inner
    # vectors, so its forward is replaced. accelerate keeps the real one in `_old_forward`.
    attribute = "_old_forward" if hasattr(experts, "_old_forward") else "forward"
    original = vars(experts).get(attribute) if experts is not None else None
    if experts is not None:
        setattr(experts, attribute, _recording_forward(experts, block_sums))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if original is not None:
            setattr(experts, attribute, original)
        elif experts is not None:
            delattr(experts, attribute)


def _hook(name: str, block_sums: BlockSums) -> Any:
    def record(_: Any, arguments: tuple[Any, ...]) -> None:
        block_sums.add(name, arguments[0])

    return record


def _recording_forward(experts: Any, block_sums: BlockSums) -> Any:
    """Return a forward of fused experts that records each expert's inputs.

    Computes the same as transformers' plain loop over experts (``Qwen3_5MoeExperts.forward``); the
    tests compare the outputs.
    """
    from torch.nn.functional import linear

    def forward(hidden: Any, chosen: Any, weights: Any) -> Any:
        """Return [tokens, width], like `hidden`; the other arguments are [tokens, top-k]."""
        result = hidden.new_zeros(hidden.shape)
        count = experts.num_experts
        for name, width in (
            (EXPERTS_IN, hidden.shape[1]),
            (EXPERTS_OUT, experts.down_proj.shape[2]),
        ):  # create the sums even if no token reaches an expert
            block_sums.add(name, hidden.new_empty(0, width), slices=count)
        for expert in chosen.unique().tolist():
            if expert >= count:  # an expert of another rank, in transformers' numbering
                continue
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            x = hidden[rows]
            block_sums.add(EXPERTS_IN, x, number=expert)
            gate, up = linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = experts.act_fn(gate) * up
            block_sums.add(EXPERTS_OUT, inner, number=expert)
            out = linear(inner, experts.down_proj[expert]) * weights[rows, places, None]
            result.index_add_(0, rows, out.to(result.dtype))
        return result

    return forward
