"""Hooks that sum up what the linear layers and experts of a decoder layer read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwen35.calibration.inputs import EXPERTS_IN, EXPERTS_OUT, HOOKED
from qwen35.calibration.sums import Sums

__all__ = ["BlockSums", "measured"]


class BlockSums:
    """The sums of one block, by the weight that is measured."""

    def __init__(self) -> None:
        self.sums: dict[str, Sums] = {}

    def add(self, name: str, x: Any, *, number: int = 0, slices: int = 1) -> None:
        """Add an input.

        Args:
            name: of the weight.
            x: [..., width] of any float dtype, on any device.
            number: of the matrix in a stack.
            slices: matrices of the stack.
        """
        flat = x.detach().reshape(-1, x.shape[-1])
        if name not in self.sums:
            self.sums[name] = Sums.zeros(slices, flat.shape[1])
        if not len(flat):
            return
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
def measured(layer: Any, measures: BlockSums) -> Iterator[None]:
    """Measure the inputs in a decoder layer of transformers while the context lasts."""
    modules = dict(layer.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(_hook(name, measures))
        for name in HOOKED
        if name in modules
    ]
    experts = modules.get("mlp.experts")
    place = "_old_forward" if hasattr(experts, "_old_forward") else "forward"  # accelerate's
    before = vars(experts).get(place) if experts is not None else None
    if experts is not None:
        setattr(experts, place, _counting(experts, measures))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if before is not None:
            setattr(experts, place, before)
        elif experts is not None:
            delattr(experts, place)


def _hook(name: str, measures: BlockSums) -> Any:
    def note(_: Any, arguments: tuple[Any, ...]) -> None:
        measures.add(name, arguments[0])

    return note


def _counting(experts: Any, measures: BlockSums) -> Any:
    """Return a forward of fused experts that measures what each expert reads.

    It computes what transformers' own plain loop does (``Qwen3_5MoeExperts.forward``), expert by
    expert; the tests compare its output.
    """
    from torch.nn.functional import linear

    def forward(hidden: Any, chosen: Any, weights: Any) -> Any:
        """Return [tokens, width] for `hidden` of that shape; the others are [tokens, top-k]."""
        result = hidden.new_zeros(hidden.shape)
        count = experts.num_experts
        for name, width in (
            (EXPERTS_IN, hidden.shape[1]),
            (EXPERTS_OUT, experts.down_proj.shape[2]),
        ):
            measures.add(name, hidden.new_empty(0, width), slices=count)
        for expert in chosen.unique().tolist():
            if expert >= count:  # an expert of another rank, in transformers' numbering
                continue
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            x = hidden[rows]
            measures.add(EXPERTS_IN, x, number=expert)
            gate, up = linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = experts.act_fn(gate) * up
            measures.add(EXPERTS_OUT, inner, number=expert)
            out = linear(inner, experts.down_proj[expert]) * weights[rows, places, None]
            result.index_add_(0, rows, out.to(result.dtype))
        return result

    return forward
