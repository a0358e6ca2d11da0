"""The backward pass: gradients of what a model says of tokens drawn from itself, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qwen35.array_types import I32
from qwen35.engines.expert_loop import experts_in_turn
from qwen35.forward.batch_size import PassSizes
from qwen35.forward.blocks import HEAD, MTP, Block
from qwen35.forward.builder import Builder
from qwen35.forward.forward_stream import ForwardStream, Track
from qwen35.forward.head import Head
from qwen35.forward.stream_folder import StreamFolder
from qwen35.progress import Progress

__all__ = ["BackwardStream", "GradientVisitor", "ProductGradients", "drawn"]

_GRADIENTS = Track("gradients")
_BACK = "back."
"""Before the names of blocks that gradients have passed."""

_DRAWN_ROWS = 16
"""Rows whose probabilities are float64 at a time."""


@dataclass(frozen=True)
class ProductGradients:
    """One matrix and one window of tokens: what it was multiplied with, and the gradients of that.

    Tensors are on the device, and valid during the call that gets them.

    Args:
        block: ``layers.3``, or ``head``.
        name: of the matrix within it, as in transformers: ``mlp.gate_proj``, ``lm_head``,
            ``mlp.experts.gate_up_proj``, whose first half of rows is the gate.
        expert: its number, of a stack.
        window: of the text.
        first: the first row of the matrix that is told of; the head comes in pieces.
        weight: these rows, [rows, columns].
        x: inputs, [tokens, columns].
        g: gradients of the products, [tokens, rows].
    """

    block: str
    name: str
    expert: int | None
    window: int
    first: int
    weight: Any
    x: Any
    g: Any

    @property
    def total(self) -> Any:
        """The gradient of the weight over the window: sum over tokens of g x^T."""
        return self.g.T @ self.x


class GradientVisitor(Protocol):
    """What gets the gradients."""

    def product(self, gradients: ProductGradients) -> None:
        """Take those of one matrix; windows come in order, experts without tokens do not come."""

    def embedding(self, window: int, ids: I32, g: Any) -> None:
        """Take the gradients of the embeddings, [tokens, hidden], of token ids [tokens]."""

    def finished(self, block: str) -> None:
        """Save what was taken of a block (``embeddings`` is the last one): it is not told again."""


class BackwardStream:
    """Both passes over a text: forward, keeping what each layer reads; back, computing it again.

    At each scored position a token is drawn from the model's own distribution; the gradients are
    those of the sum of the log-probabilities that it gives to these.

    Args:
        builder: of the model's modules.
        blocks: of the model.
        windows: [windows, length] token ids.
        first: the first scored position; all from there on are.
        sizes: how many windows go forward together; one by one they go back, and read experts
            again if these are read apart from their layers.
        group: windows whose logits are in memory.
        work: holds hidden states and gradients, from which an interrupted run goes on.
        visitor: gets the gradients.
        progress: receives the bytes of each block, twice.
        seed: of the tokens; those of a window depend on it and on the window's number alone.
        ahead: as for `ForwardStream`.
    """

    def __init__(
        self,
        builder: Builder,
        blocks: Sequence[Block],
        windows: I32,
        first: int,
        sizes: PassSizes,
        group: int,
        work: StreamFolder,
        visitor: GradientVisitor,
        progress: Progress,
        *,
        seed: int = 0,
        ahead: bool | None = None,
    ) -> None:
        self._builder, self._work, self._visitor, self._progress = builder, work, visitor, progress
        self._torch = builder.torch
        self._layers = [block for block in blocks if block.name not in (HEAD, MTP)]
        self._norm = next(block for block in blocks if block.name == HEAD)
        self._windows, self._first, self._group, self._seed = windows, first, group, seed
        self._ahead = builder.device != "cpu" if ahead is None else ahead
        self._states = Track()
        self._forward = ForwardStream(
            builder, self._layers, windows, sizes, work, progress, ahead=ahead, kept=True
        )

    def run(self) -> None:
        """Run every unfinished block, forward and back.

        Raises:
            InputError: a weight cannot be read.
            OutputError: the disk is full.
        """
        self._forward.run()
        parts = [self._norm, *reversed(self._layers)]
        passed = [block for block in parts if _BACK + block.name in self._work.done]
        for block in passed:
            self._progress.advance(block.nbytes, block.name)
        number = len(passed)
        for block, module in self._builder.built(parts[number:], ahead=self._ahead):
            if block.name == HEAD:
                self._head(module)
            else:
                self._layer(block, module, self._layers.index(block), number)
            del module
            self._finish(block.name)
            self._progress.advance(block.nbytes, block.name)
            number += 1
        if _BACK + "embeddings" not in self._work.done:
            for window, ids in enumerate(self._windows):
                self._visitor.embedding(window, ids, self._gradients(number, window)[0])
            self._finish("embeddings")

    def _finish(self, block: str) -> None:
        self._visitor.finished(block)
        self._work.finish(_BACK + block)

    def _gradients(self, number: int, window: int) -> Any:
        """Return what the block before this one left, [1, length, hidden]."""
        return self._forward.load(_GRADIENTS.file(number % 2), window, 1)

    def _input(self, layer: int, window: int) -> Any:
        """Return what a layer read, or for one behind the last, what that computed."""
        states = self._forward.load(self._states.file(layer), window, 1)
        return states.requires_grad_()

    def _head(self, norm: Any) -> None:
        head, count = Head(self._builder), len(self._windows)
        for start in range(0, count, self._group):
            group = range(start, min(count, start + self._group))
            inputs = [self._input(len(self._layers), window) for window in group]
            normed = [norm(x[:, self._first :])[0] for x in inputs]
            with self._torch.no_grad():
                gradients = self._through_head(head, group, [one.detach() for one in normed])
            for window, x, out, g in zip(group, inputs, normed, gradients, strict=True):
                out.backward(g)
                self._forward.store(_GRADIENTS.file(1), window, x.grad)

    def _through_head(self, head: Head, group: range, normed: Sequence[Any]) -> list[Any]:
        """Draw tokens for windows; return the gradients of the head's inputs, [scored, hidden]."""
        torch, scored = self._torch, len(normed[0])
        logits = head.logits(torch.cat(list(normed)))
        for window, part in zip(group, logits.split(scored), strict=True):
            uniform = np.random.default_rng([self._seed, window]).random(scored)
            tokens = drawn(torch, part, uniform)
            # The gradient of log p(token): 1 for the token, minus all probabilities.
            part.copy_(part.softmax(-1).neg_())
            part[torch.arange(scored), tokens] += 1
        totals = [torch.zeros_like(x) for x in normed]
        for first, rows in head.pieces():
            for window, x, g, total in zip(
                group, normed, logits.split(scored), totals, strict=True
            ):
                piece = g[:, first : first + len(rows)].to(x.device, x.dtype)
                made = ProductGradients(HEAD, "lm_head", None, window, first, rows, x, piece)
                self._visitor.product(made)
                total += piece @ rows
        return totals

    def _layer(self, block: Block, module: Any, layer: int, number: int) -> None:
        window = 0

        def told(name: str, expert: int | None, weight: Any, x: Any, g: Any) -> None:
            x, g = (one.detach().flatten(0, -2) for one in (x, g))
            made = ProductGradients(block.name, name, expert, window, 0, weight.detach(), x, g)
            with self._torch.no_grad():
                self._visitor.product(made)

        with _watched(module, told):
            for window in range(len(self._windows)):
                x = self._input(layer, window)
                out = module(x, **self._builder.positions(x))
                out.backward(self._gradients(number, window))
                self._forward.store(_GRADIENTS.file((number + 1) % 2), window, x.grad)


_Told = Callable[[str, int | None, Any, Any, Any], None]
"""Takes the name of a matrix, the number of its expert, the matrix, its inputs and gradients."""


@contextmanager
def _watched(module: Any, told: _Told) -> Iterator[None]:
    """Tell of each product of a layer when gradients reach it, while the context is open."""
    from torch.nn import Linear

    def watch(name: str, expert: int | None, weight: Any, x: Any, out: Any) -> None:
        # Told within the hook: the framework may use the gradient's memory again.
        out.register_hook(lambda g: told(name, expert, weight, x, g))

    def hook(name: str) -> Any:
        return lambda layer, given, out: watch(name, None, layer.weight, given[0], out)

    with ExitStack() as stack:
        for name, layer in module.named_modules():
            if isinstance(layer, Linear):
                stack.callback(layer.register_forward_hook(hook(name)).remove)
        experts = dict(module.named_modules()).get("mlp.experts")
        if experts is not None:

            def product(expert: int, name: str, matrix: Any, x: Any, out: Any) -> None:
                watch(f"mlp.experts.{name}", expert, matrix, x, out)

            stack.enter_context(experts_in_turn(experts, watch=product))
        yield


def drawn(torch: Any, logits: Any, uniform: Any) -> Any:
    """Return tokens drawn from distributions.

    Args:
        torch: the library.
        logits: [n, vocabulary].
        uniform: [n] float64 in [0, 1): where in the cumulative distribution.

    Returns:
        [n] int64, on the CPU.
    """
    tokens = []
    for rows, places in zip(
        logits.split(_DRAWN_ROWS), torch.from_numpy(uniform).split(_DRAWN_ROWS), strict=True
    ):
        sums = rows.cpu().double().softmax(-1).cumsum(-1)
        found = torch.searchsorted(sums, (places * sums[:, -1])[:, None], right=True)
        tokens.append(found[:, 0].clamp(max=logits.shape[-1] - 1))
    return torch.cat(tokens)
