"""Pricing: what every candidate of every weight costs, from a forward and a backward pass.

The divergence that a small change dW of a matrix causes is, to second order, half the mean square
of how much it changes the log-probability of tokens drawn from the model's own distribution. With
G_c the gradient of the sum of these over window c, and C windows of S scored positions:

    price = sum(F * dW^2) / (2 C S),  F = sum over windows c of G_c^2, element by element

Terms between different elements are left out. So is a price of rounding inputs x to 8 bits: the
sum over tokens of ((W^T g) . (round(x) - x))^2 / (2 C S), with g the gradient of the product.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qwen35.array_types import F32, I32, I64
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.source import Reader
from qwen35.codecs.codec import Codec
from qwen35.codecs.devices import kernels_for
from qwen35.codecs.input_quantizers import InputQuantizer
from qwen35.errors import InputError
from qwen35.execution.survey import Survey
from qwen35.forward.backward_stream import ProductGradients
from qwen35.forward.blocks import HEAD
from qwen35.planning.rows import RowChunk
from qwen35.planning.step import Step
from qwen35.progress import Progress
from qwen35.sinks.staging import os_errors
from qwen35.tuning.prices import ExpertPrices, Prices, shared_prices, united
from qwen35.tuning.product_spool import ProductSpool
from qwen35.tuning.rounding_errors import (
    RoundingErrors,
    RowChoice,
    row_grain,
    row_parts,
    whole_matrices,
)
from qwen35.tuning.space import ChoiceSpace

__all__ = ["EMBEDDINGS", "FoundPrices", "InputShift", "PriceVisitor"]

EMBEDDINGS = "embeddings"
"""The block of the embedding, whose rows are looked up."""

_LOOKED_UP, _MULTIPLIED = "embed_tokens", "lm_head"
"""Names of the matrices outside layers."""

_FLOAT = 4

_GATE, _UP = "gate_proj", "up_proj"


@dataclass(frozen=True)
class _PricedStep:
    """A step of a unit, and the block in which its gradients are found."""

    unit: str
    step: Step


InputShift = tuple[str, int, float]
"""A unit, the number of a way of rounding inputs, and the sum of squares over one window."""


_PricedRows = tuple[_PricedStep, list[RowChunk]]
"""Rows of a weight whose candidates are encoded together."""


@dataclass(frozen=True)
class FoundPrices:
    """The sums of F dW^2 over some rows of a step, all of one expert if there are any."""

    unit: str
    expert: int | None
    squares: Mapping[str, float]


class PriceVisitor:
    """Takes the gradients of a backward pass, and leaves the prices of each block in a folder.

    The price of one block is the sum over windows of what each contributes, in their order.

    Args:
        torch: the library.
        device: where to compute.
        space: the choices.
        reader: of its checkpoint.
        folder: for prices, and for the products of the block at hand.
        scored: scored positions of all windows together.
        sample: every how many rows candidates are compared.
        threads: most threads that encode.
        progress: receives `nbytes` of each block.
    """

    def __init__(
        self,
        torch: Any,
        device: str,
        space: ChoiceSpace,
        reader: Reader,
        folder: Path,
        scored: int,
        sample: int,
        threads: int,
        progress: Progress,
    ) -> None:
        self._torch, self._device = torch, device
        self._space, self._reader, self._folder = space, reader, folder
        self._scored, self._sample, self._threads = scored, sample, threads
        self._progress = progress
        self._block = ""
        self._spool: ProductSpool | None = None
        self._opening = threading.Lock()
        self._shifts: dict[tuple[str, int | None, int, InputQuantizer], Any] = {}
        self._told: tuple[Sequence[InputShift], Sequence[FoundPrices]] | None = None
        self._last = threading.local()  # inputs of each thread
        self._survey = Survey()
        [self._kernels] = kernels_for("cpu")

    # --- what the backward pass tells

    def product(self, gradients: ProductGradients) -> None:
        """Keep the inputs and gradients of a product; price the rounding of its inputs."""
        one = gradients
        spool = self._opened(one.block)
        if (one.block, one.name) not in self._products:  # nothing to choose
            return
        spool.add((one.name, one.expert), one.window, one.first, one.x, one.g)
        if not self._roundings:
            return
        weight: Any = one.weight if one.back is None else None
        for leaf, part in self._products[one.block, one.name].items():
            half = one.g.shape[1] // 2
            rows = {_GATE: slice(0, half), _UP: slice(half, None)}.get(leaf, slice(None))
            back = one.back
            if back is None or leaf:
                back = one.g[:, rows].float() @ weight[rows].float()
            for rounding, shift in self._shifted(part, one.x.float(), back):
                key = (part.unit, one.expert, one.window, rounding)
                self._shifts[key] = self._shifts.get(key, 0) + shift

    def embedding(self, window: int, ids: I32, g: Any) -> None:
        """Keep the gradients of the rows that a window looks up."""
        self._opened(EMBEDDINGS).add_rows((_LOOKED_UP, None), window, ids, g)

    def finished(self, block: str) -> None:
        """Price every candidate of a block's weights, and forget its gradients.

        Raises:
            InputError: they have no price, since the model computes NaN or its weights hold it.
        """
        spool = self._opened(block)
        try:
            prices = self._priced(block, spool)
        finally:
            self.close()
        if not prices.sound:
            raise InputError(
                f"{self._space.checkpoint.name}: {block}",
                "its prices are NaN or infinite, as its weights or gradients are",
                hint="qwen35 verify --depth numbers it first",
            )
        path = self._folder / f"{block}.prices"
        with os_errors(self._folder):
            path.write_text(json.dumps(asdict(prices)))

    def close(self) -> None:
        """Forget the gradients of an unfinished block."""
        if self._spool is not None:
            self._spool.close()
        self._block, self._spool, self._shifts, self._told = "", None, {}, None
        self._last = threading.local()

    def _opened(self, block: str) -> ProductSpool:
        with self._opening:  # whose product is first is open
            if self._spool is None or block != self._block:
                return self.open(block)
            return self._spool

    # --- what workers share

    def open(self, block: str, name: str = "", parts: Sequence[str] = ()) -> ProductSpool:
        """Begin with a block: keep products under a name, or take those that others kept."""
        self.close()
        self._spool = ProductSpool(self._torch, self._device, self._folder, name, parts)
        self._block = block
        return self._spool

    def keep(self) -> list[InputShift]:
        """Leave the products of some windows to others; return what rounding inputs costs."""
        assert self._spool is not None
        self._spool.keep()
        shifts = self._input_shifts()
        self.close()
        return shifts

    def jobs(self, block: str) -> list[int]:
        """Return the bytes that each job of pricing a block's weights reads, in order."""
        return [_nbytes(part, rows) for part, rows in self._jobs(block)]

    def found(self, block: str, jobs: range) -> list[FoundPrices]:
        """Do some of the jobs of pricing an open block."""
        return list(self._measured(block, self._jobs(block)[jobs.start : jobs.stop]))

    def tell(self, shifts: Sequence[InputShift], found: Sequence[FoundPrices]) -> None:
        """Take what workers found of an open block, in the order of windows and of jobs."""
        self._told = shifts, found

    # --- rounding of inputs

    @cached_property
    def _roundings(self) -> dict[str, InputQuantizer]:
        """Choice to what the engine does to the inputs of products with it."""
        found = {choice: self._space.input_rounding(choice) for choice in self._space.choices}
        return {choice: rounding for choice, rounding in found.items() if rounding is not None}

    @cache  # noqa: B019 - a process has one visitor
    def _ways(self, unit: str) -> list[InputQuantizer]:
        """Return the distinct ways of rounding the inputs of products with a unit's choices."""
        fitting = (choice for choice in self._roundings if choice in self._space.unit(unit).sizes)
        return list(dict.fromkeys(self._roundings[choice] for choice in fitting))

    def _shifted(
        self, part: _PricedStep, x: Any, back: Any
    ) -> Iterator[tuple[InputQuantizer, Any]]:
        """Yield each way of rounding inputs, and how much it changes each token, [tokens] float64.

        Args:
            part: of a unit.
            x: inputs, [tokens, columns].
            back: gradients of the inputs by this product alone, [tokens, columns].
        """
        torch, rows = self._torch, part.step.rows
        if rows.transforms:  # the engine's columns are in another order
            x, back = (
                torch.from_numpy(rows.columns(t.cpu().numpy())).to(x.device) for t in (x, back)
            )
        for rounding in self._ways(part.unit):
            yield rounding, (back * self._moved(rounding, x)).sum(-1).double().cpu()

    def _moved(self, rounding: InputQuantizer, x: Any) -> Any:
        """Return what rounding does to inputs, [tokens, columns]; several products share them."""
        last, found = vars(self._last).get("moved", (None, {}))
        if last is None or (last.data_ptr(), last.shape) != (x.data_ptr(), x.shape):
            found = {}
            self._last.moved = x, found  # which keeps the memory: no other inputs get it
        if rounding not in found:
            found[rounding] = rounding(x) - x
        return found[rounding]

    @cached_property
    def _products(self) -> dict[tuple[str, str], dict[str, _PricedStep]]:
        """Block and name of a product to the first part in each of its halves, or in the whole."""
        found: dict[tuple[str, str], dict[str, _PricedStep]] = defaultdict(dict)
        for block, parts in self._parts.items():
            for part in parts:
                name, leaf = product_of(part.step.rows.item) if block != HEAD else (_MULTIPLIED, "")
                if block != EMBEDDINGS:
                    found[block, name].setdefault(leaf, part)
        return dict(found)

    # --- prices

    def nbytes(self, done: Sequence[str] | None = None) -> int:
        """Return the bytes to price of all blocks, or of those among the finished parts `done`."""
        return sum(
            _nbytes(part, rows)
            for block, parts in self._parts.items()
            for part in parts
            for rows in row_parts(part.step, self._codecs(part))
            if done is None or f"back.{block}" in done
        )

    @cached_property
    def _parts(self) -> dict[str, list[_PricedStep]]:
        """Block to the steps whose gradients it has."""
        found: dict[str, list[_PricedStep]] = defaultdict(list)
        tied = self._space.checkpoint.config.tied
        for unit, steps in self._space.members.items():
            for step in steps:
                role = step.role
                # gradients have the rows of the checkpoint's weights
                part = _PricedStep(unit, replace(step, rows=step.rows.by_weight))
                if role.layer is not None:
                    found[f"layers.{role.layer}"].append(part)
                elif role.info.kind == "embedding":
                    found[EMBEDDINGS].append(part)
                if role.layer is None and (tied or role.info.kind == "head"):
                    found[HEAD].append(part)
        return found

    def _priced(self, block: str, spool: ProductSpool) -> Prices:
        parts = self._parts.get(block, [])
        prices = Prices()
        experts: dict[str, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        shifts, measured = self._told or (
            self._input_shifts(),
            self._measured(block, self._jobs(block)),
        )
        for found in measured:
            row = prices.weights.setdefault(found.unit, {})
            if found.expert is not None:
                row = experts[found.unit][found.expert]
            for choice, square in found.squares.items():
                row[choice] = row.get(choice, 0.0) + square / (2 * self._scored)
        for unit in dict.fromkeys(part.unit for part in parts):
            self._complete(prices, unit)
            if unit in experts or self._of_experts(unit):
                self._add_experts(prices, unit, experts[unit], spool)
        for unit, number, square in shifts:
            row = prices.inputs[unit]
            for choice, own in self._roundings.items():
                if own is self._distinct[number] and choice in row:
                    row[choice] += square / (2 * self._scored)
        return prices

    def _input_shifts(self) -> list[InputShift]:
        return [
            (unit, self._distinct.index(rounding), float(shift.square().sum()))
            # In the order of windows, of which several may be computed at a time.
            for (unit, _, _, rounding), shift in sorted(self._shifts.items(), key=_window)
        ]

    @cached_property
    def _distinct(self) -> list[InputQuantizer]:
        """The distinct ways of rounding inputs."""
        return list(dict.fromkeys(self._roundings.values()))

    def _complete(self, prices: Prices, unit: str) -> None:
        """Put zeros where no token came."""
        choices = self._space.unit(unit).sizes
        row = prices.weights.setdefault(unit, {})
        prices.weights[unit] = {choice: row.get(choice, 0.0) for choice in choices}
        prices.inputs[unit] = dict.fromkeys(choices, 0.0)

    def _of_experts(self, unit: str) -> bool:
        return self._space.members[unit][0].role.info.kind == "experts"

    def _add_experts(
        self,
        prices: Prices,
        unit: str,
        found: Mapping[int, Mapping[str, float]],
        spool: ProductSpool,
    ) -> None:
        [name, *_] = {product_of(step.rows.item)[0] for step in self._space.members[unit]}
        count = self._space.checkpoint.config.dims["experts"]
        one = ExpertPrices([spool.tokens((name, expert)) for expert in range(count)])
        for choice in prices.weights[unit]:
            one.prices[choice] = [found.get(e, {}).get(choice, 0.0) for e in range(count)]
            prices.weights[unit][choice] = sum(shared_prices(one.prices[choice], one.tokens))
        prices.experts[unit] = one

    def _jobs(self, block: str) -> list[_PricedRows]:
        return [
            (part, rows)
            for part in self._parts.get(block, [])
            for rows in row_parts(part.step, self._codecs(part))
        ]

    def _measured(self, block: str, jobs: Sequence[_PricedRows]) -> Iterator[FoundPrices]:
        spool = self._opened(block)
        torch, before = self._torch, self._torch.get_num_threads()

        def alone() -> None:
            # A pool of the library's own under each thread would only spin.
            torch.set_num_threads(1)
            torch.set_flush_denormal(False)  # candidates are those of artifacts

        with ThreadPoolExecutor(min(self._threads, max(1, len(jobs))), initializer=alone) as pool:
            # In order of the jobs, so that sums do not depend on the threads' timing.
            made = pool.map(lambda job: self._work(block, job[0], job[1], spool), jobs)
            for (part, chunks), found in zip(jobs, made, strict=True):
                yield from found
                self._progress.advance(_nbytes(part, chunks), part.step.weight.name)
        torch.set_num_threads(before)

    def _codecs(self, part: _PricedStep) -> list[Codec]:
        return list(self._space.packed(part.unit).values())

    def _work(
        self, block: str, part: _PricedStep, chunks: Sequence[RowChunk], spool: ProductSpool
    ) -> list[FoundPrices]:
        """Return the prices of some rows of a weight."""
        found: list[FoundPrices] = []
        codecs, step = self._space.packed(part.unit), part.step
        if not any(self._reached(block, step, chunk, spool) for chunk in chunks):
            return found  # no token reaches the expert: nothing of it costs anything
        chosen, share = self._chosen(block, part, spool)
        errors = RoundingErrors(
            self._space.plan, step, chunks, chosen, codecs, self._kernels, self._survey
        )
        for chunk, rows, changed in errors.pieces(self._reader):
            item = step.rows.slabs[chunk.slab].item
            for key, places, own in _matrices(block, item, chunk.source + rows):
                squares = spool.squares(key, own)
                if squares is not None:
                    squares = step.rows.columns(squares)
                    parted = {choice: error[places] for choice, error in changed.items()}
                    sums = {choice: share * _weighted(squares, e) for choice, e in parted.items()}
                    found.append(FoundPrices(part.unit, key[1], sums))
        return found

    def _reached(self, block: str, step: Step, chunk: RowChunk, spool: ProductSpool) -> bool:
        item = step.rows.slabs[chunk.slab].item
        if item.role.info.kind != "experts":
            return True
        rows = np.arange(chunk.source, chunk.source + chunk.count)
        return any(spool.tokens(key) for key, _, _ in _matrices(block, item, rows))

    def _chosen(
        self, block: str, part: _PricedStep, spool: ProductSpool
    ) -> tuple[RowChoice, float]:
        """Return which rows to compare, and how many rows each of them stands for."""
        codecs, sample = self._codecs(part), self._sample
        grain = row_grain(part.step, codecs)
        if block == EMBEDDINGS:  # other rows cost nothing
            used = spool.looked_up((_LOOKED_UP, None)) // grain
            return lambda chunk: _of_grains(chunk, grain, chunk.source, used), 1.0
        if sample == 1 or whole_matrices(part.step, codecs):
            return lambda chunk: np.arange(chunk.count), 1.0
        count = part.step.rows.count
        used = np.arange(0, -(-count // grain), sample)
        taken = sum(min(grain, count - n * grain) for n in used.tolist())
        return lambda chunk: _of_grains(chunk, grain, chunk.first, used), count / taken

    def prices(self, blocks: Sequence[str]) -> Prices:
        """Return the prices of finished blocks, added up."""
        return united(self._loaded(block) for block in blocks)

    def _loaded(self, block: str) -> Prices:
        content = json.loads((self._folder / f"{block}.prices").read_text())
        experts = {unit: ExpertPrices(**one) for unit, one in content.pop("experts").items()}
        return Prices(**content, experts=experts)


def _window(shift: tuple[tuple[str, int | None, int, InputQuantizer], Any]) -> int:
    return shift[0][2]


def _weighted(squares: F32, errors: F32) -> float:
    """Return the sum of F times squared errors."""
    return float(np.einsum("ij,ij,ij->i", squares, errors, errors).sum(dtype=np.float64))


def _nbytes(part: _PricedStep, chunks: Sequence[RowChunk]) -> int:
    return sum(chunk.count for chunk in chunks) * part.step.rows.row * _FLOAT


def _of_grains(chunk: RowChunk, grain: int, first: int, wanted: I64) -> I64:
    """Return the rows of a chunk, from 0 on, in one of the grains wanted."""
    rows = np.arange(chunk.count)
    return rows[np.isin((first + rows) // grain, wanted)]


def product_of(item: InventoryItem) -> tuple[str, str]:
    """Return the name of the product that a weight is in, and which half of it, if it is one."""
    name = item.role.info.name
    stem, _, leaf = name.rpartition(".")
    if item.role.info.place == "expert" and leaf in (_GATE, _UP):
        return f"{stem}.gate_up_proj", leaf
    return name, ""


def _matrices(
    block: str, item: InventoryItem, rows: I64
) -> Iterator[tuple[tuple[str, int | None], Any, I64]]:
    """Yield the matrices of a block that rows of a weight are of: key, places in `rows`, rows."""
    every = slice(None)
    if block in (HEAD, EMBEDDINGS):
        yield (_MULTIPLIED if block == HEAD else _LOOKED_UP, None), every, rows
        return
    name, leaf = product_of(item)
    if item.role.info.place == "fused":
        experts, own = np.divmod(rows, item.spec.shape[-2])
        for expert in np.unique(experts).tolist():
            places = np.flatnonzero(experts == expert)
            yield (name, expert), places, own[places]
        return
    moved = item.spec.shape[0] if leaf == _UP else 0
    yield (name, item.role.expert), every, rows + moved
