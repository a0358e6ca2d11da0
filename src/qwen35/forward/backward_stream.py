"""The backward pass: gradients of what a model says of tokens drawn from itself, layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from qwen35.array_types import I32
from qwen35.engines.expert_loop import experts_in_turn
from qwen35.forward.batch_size import PassSizes
from qwen35.forward.blocks import HEAD, MTP, Block
from qwen35.forward.builder import Builder
from qwen35.forward.forward_stream import EMBEDDED, ForwardStream, Track
from qwen35.forward.head import Head
from qwen35.forward.side_by_side import side_by_side
from qwen35.forward.stream_folder import StreamFolder
from qwen35.progress import Progress

__all__ = ["BackwardStream", "GradientVisitor", "ProductGradients", "drawn"]

_GRADIENTS = Track("gradients")
_BACK = "back."
"""Before the names of blocks that gradients have passed."""

_DRAWN_ROWS = 16
"""Rows whose probabilities are float64 at a time."""


_Weight = Callable[[], Any]
"""Returns a matrix."""


def held(matrix: Any) -> _Weight:
    """Return what returns a matrix that is in memory."""
    return lambda: matrix


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
        read: returns these rows.
        x: inputs, [tokens, columns].
        g: gradients of the products, [tokens, rows].
        back: gradients of the inputs by this product alone, [tokens, columns], where the pass has
            computed them.
    """

    block: str
    name: str
    expert: int | None
    window: int
    first: int
    read: _Weight
    x: Any
    g: Any
    back: Any = None

    @property
    def weight(self) -> Any:
        """The rows, [rows, columns]; experts that are read one by one are read for it."""
        return self.read().detach()

    @property
    def total(self) -> Any:
        """The gradient of the weight over the window: sum over tokens of g x^T."""
        return self.g.T @ self.x


class GradientVisitor(Protocol):
    """What gets the gradients."""

    def product(self, gradients: ProductGradients) -> None:
        """Take those of one matrix; experts without tokens do not come.

        Windows come in order, unless several are computed at a time: then each comes from a thread
        of its own, with its matrices in the order of the way back.
        """

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
        sizes: how many windows go forward together, and how many such batches at a time; back, a
            window is a batch, and reads experts again if these are read apart from their layers.
        group: windows whose logits are in memory.
        work: holds hidden states and gradients, from which an interrupted run goes on.
        visitor: gets the gradients.
        progress: receives the bytes of each block, twice.
        seed: of the tokens; those of a window depend on it and on the window's number alone.
        ahead: as for `ForwardStream`.

    Attributes:
        forward: the pass of the text, which comes first.
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
        self.forward = ForwardStream(
            builder, self._layers, windows, sizes, work, progress, ahead=ahead, kept=True
        )

    def run(self) -> None:
        """Run every unfinished block, forward and back.

        Raises:
            InputError: a weight cannot be read.
            OutputError: the disk is full.
        """
        self.forward.run()
        for block, module in self._builder.built(self.begin(), ahead=self._ahead):
            self.through(block, module, range(len(self._windows)))
            del module
            self.finish(block)
        if self.embeddings_left:
            self.embeddings()
            self.finish_embeddings()

    def begin(self) -> list[Block]:
        """Return the blocks that gradients have not passed, once text has passed all of them."""
        parts = [self._norm, *reversed(self._layers)]
        passed = [block for block in parts if _BACK + block.name in self._work.done]
        for block in passed:
            self._progress.advance(block.nbytes, block.name)
        return parts[len(passed) :]

    def through(self, block: Block, module: Any, part: range) -> None:
        """Take the gradients of windows back through a block: of whole groups through the head."""
        if block.name == HEAD:
            self._head(module, part)
        else:
            layer = self._layers.index(block)
            self._layer(block, module, layer, len(self._layers) - layer, part)

    def finish(self, block: Block) -> None:
        """Note that the gradients of all windows have passed a block."""
        self._finish(block.name)
        self._progress.advance(block.nbytes, block.name)

    @property
    def embeddings_left(self) -> bool:
        """Whether the gradients of embeddings are not told of yet."""
        return _BACK + EMBEDDED not in self._work.done

    def embeddings(self) -> None:
        """Tell of the gradients of embeddings, once those of all windows have passed all blocks."""
        passed = len(self._layers) + 1
        for window, ids in enumerate(self._windows):
            self._visitor.embedding(window, ids, self._gradients(passed, window)[0])

    def finish_embeddings(self) -> None:
        """Note that the gradients of embeddings are told of."""
        self._finish(EMBEDDED)

    def _finish(self, block: str) -> None:
        self._visitor.finished(block)
        self._work.finish(_BACK + block)

    def _gradients(self, number: int, window: int) -> Any:
        """Return what the block before this one left, [1, length, hidden]."""
        return self.forward.load(_GRADIENTS.file(number % 2), window, 1)

    def _input(self, layer: int, window: int) -> Any:
        """Return what a layer read, or for one behind the last, what that computed."""
        states = self.forward.load(self._states.file(layer), window, 1)
        return states.requires_grad_()

    def _head(self, norm: Any, part: range) -> None:
        head = Head(self._builder)
        for start in range(part.start, part.stop, self._group):
            group = range(start, min(part.stop, start + self._group))
            inputs = [self._input(len(self._layers), window) for window in group]
            normed = [norm(x[:, self._first :])[0] for x in inputs]
            with self._torch.no_grad():
                gradients = self._through_head(head, group, [one.detach() for one in normed])
            for window, x, out, g in zip(group, inputs, normed, gradients, strict=True):
                out.backward(g)
                self.forward.store(_GRADIENTS.file(1), window, x.grad)

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
                back = piece @ rows
                self._visitor.product(
                    ProductGradients(
                        HEAD, "lm_head", None, window, first, held(rows), x, piece, back
                    )
                )
                total += back
        return totals

    def _layer(self, block: Block, module: Any, layer: int, number: int, part: range) -> None:
        passing = threading.local()  # the window of each thread

        def told(
            name: str, expert: int | None, weight: _Weight, x: Any, g: Any, back: Any = None
        ) -> None:
            x, g = (one.detach().flatten(0, -2) for one in (x, g))
            back = None if back is None else back.flatten(0, -2)
            window: int = passing.window
            made = ProductGradients(block.name, name, expert, window, 0, weight, x, g, back)
            with self._torch.no_grad():
                self._visitor.product(made)

        def through(window: int) -> None:
            passing.window = window
            x = self._input(layer, window)
            out = module(x, **self._builder.positions(x))
            out.backward(self._gradients(number, window))
            self.forward.store(_GRADIENTS.file((number + 1) % 2), window, x.grad)

        with _watched(module, told):
            side_by_side(self._torch, through, part, self.forward.at_once)


class _Told(Protocol):
    """Takes a matrix and its gradients, as `ProductGradients` has them."""

    def __call__(
        self, name: str, expert: int | None, weight: _Weight, x: Any, g: Any, back: Any = None
    ) -> None: ...


@contextmanager
def _watched(module: Any, told: _Told) -> Iterator[None]:
    """Tell of each product of a layer when gradients reach it, while the context is open."""
    from torch.nn import Linear

    with ExitStack() as stack:
        for name, layer in module.named_modules():
            if isinstance(layer, Linear):
                layer.forward = _product(layer, partial(told, name, None, held(layer.weight)))
                stack.callback(delattr, layer, "forward")
        experts = dict(module.named_modules()).get("mlp.experts")
        if experts is not None:

            def product(expert: int, name: str, matrix: _Weight, x: Any, out: Any) -> None:
                # Told within the hook: the framework may use the gradient's memory again.
                out.register_hook(partial(told, f"mlp.experts.{name}", expert, matrix, x))

            stack.enter_context(experts_in_turn(experts, watch=product))
        yield


def _product(layer: Any, told: Callable[[Any, Any, Any], None]) -> Any:
    """Return the forward of a linear layer, which tells of its gradients on the way back."""
    from torch.autograd import Function
    from torch.nn.functional import linear

    class Product(Function):  # type: ignore[misc]  # torch has no types
        @staticmethod
        def forward(context: Any, x: Any) -> Any:
            context.save_for_backward(x)
            return linear(x, layer.weight, layer.bias)

        @staticmethod
        def backward(context: Any, g: Any) -> Any:
            [x] = context.saved_tensors
            back = g @ layer.weight
            told(x, g, back)
            return back

    return Product.apply


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
