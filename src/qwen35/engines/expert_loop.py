"""The experts of a layer of transformers one by one, with access to what each of them reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["ExpertInput", "experts_in_turn"]

ExpertInput = Callable[[int, Any], Any]
"""Takes the number of an expert and an input of its, [tokens, width]; returns it, or another."""


@contextmanager
def experts_in_turn(experts: Any, outer: ExpertInput, inner: ExpertInput) -> Iterator[None]:
    """Run a fused experts module as a loop while the context is open.

    Hooks see only the input of the module, not each expert's share of it or the vectors between its
    matrices, so its forward is replaced. accelerate keeps the real one in `_old_forward`.

    Args:
        experts: the module.
        outer: what gate and up projections read.
        inner: what down projections read.
    """
    attribute = "_old_forward" if hasattr(experts, "_old_forward") else "forward"
    original = vars(experts).get(attribute)
    setattr(experts, attribute, _loop(experts, outer, inner))
    try:
        yield
    finally:
        if original is not None:
            setattr(experts, attribute, original)
        else:
            delattr(experts, attribute)


def _loop(experts: Any, outer: ExpertInput, inner: ExpertInput) -> Any:
    """Return a forward that computes the same as transformers' plain loop over experts.

    Source: transformers 5.23 ``Qwen3_5MoeExperts.forward``; the tests compare the outputs.
    """
    from torch.nn.functional import linear

    def forward(hidden: Any, chosen: Any, weights: Any) -> Any:
        """Return [tokens, width], like `hidden`; the other arguments are [tokens, top-k]."""
        result = hidden.new_zeros(hidden.shape)
        for expert in chosen.unique().tolist():
            if expert >= experts.num_experts:  # of another rank, in transformers' numbering
                continue
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            x = outer(expert, hidden[rows])
            gate, up = linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            between = inner(expert, experts.act_fn(gate) * up)
            out = linear(between, experts.down_proj[expert]) * weights[rows, places, None]
            result.index_add_(0, rows, out.to(result.dtype))
        return result

    return forward
