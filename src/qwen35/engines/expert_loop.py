"""The experts of a layer of transformers one by one, with access to what each of them reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["ExpertInput", "ExpertProduct", "experts_in_turn"]

ExpertInput = Callable[[int, Any], Any]
"""Takes the number of an expert and an input of its, [tokens, width]; returns it, or another."""

ExpertProduct = Callable[[int, str, Callable[[], Any], Any, Any], None]
"""Takes the number of an expert, the name of a stack, what returns the expert's matrix in it, an
input, and their product."""


def _unchanged(_: int, x: Any) -> Any:
    return x


def _unwatched(*_: Any) -> None:
    pass


@contextmanager
def experts_in_turn(
    experts: Any,
    outer: ExpertInput = _unchanged,
    inner: ExpertInput = _unchanged,
    watch: ExpertProduct = _unwatched,
) -> Iterator[None]:
    """Run a fused experts module as a loop while the context is open.

    Hooks see only the input of the module, not each expert's share of it or the vectors between its
    matrices, so its forward is replaced. accelerate keeps the real one in `_old_forward`.

    Args:
        experts: the module.
        outer: what gate and up projections read.
        inner: what down projections read.
        watch: called with each product.
    """
    attribute = "_old_forward" if hasattr(experts, "_old_forward") else "forward"
    original = vars(experts).get(attribute)
    setattr(experts, attribute, _loop(experts, outer, inner, watch))
    try:
        yield
    finally:
        if original is not None:
            setattr(experts, attribute, original)
        else:
            delattr(experts, attribute)


def _loop(experts: Any, outer: ExpertInput, inner: ExpertInput, watch: ExpertProduct) -> Any:
    """Return a forward that computes the same as transformers' plain loop over experts.

    Source: transformers 5.23 ``Qwen3_5MoeExperts.forward``; the tests compare the outputs.
    """
    from torch.nn.functional import linear

    def product(name: str, expert: int, x: Any) -> Any:
        stack = getattr(experts, name)
        # A stack that is read one by one (`qwen35.forward.expert_stacks`) reads for its way back.
        times = getattr(stack, "product", None) or (lambda e, x: linear(x, stack[e]))
        out = times(expert, x)
        watch(expert, name, lambda: stack[expert], x, out)
        return out

    def forward(hidden: Any, chosen: Any, weights: Any) -> Any:
        """Return [tokens, width], like `hidden`; the other arguments are [tokens, top-k]."""
        result = hidden.new_zeros(hidden.shape)
        for expert in chosen.unique().tolist():
            if expert >= experts.num_experts:  # of another rank, in transformers' numbering
                continue
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            x = outer(expert, hidden[rows])
            both = product("gate_up_proj", expert, x)
            gate, up = both.chunk(2, dim=-1)
            between = inner(expert, experts.act_fn(gate) * up)
            out = product("down_proj", expert, between) * weights[rows, places, None]
            result.index_add_(0, rows, out.to(result.dtype))
        return result

    return forward
