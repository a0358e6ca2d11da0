"""Models run layer by layer: all chunks through each layer in turn, then through the head."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from qwen35.array_types import F32
from qwen35.checkpoint.reconciled import take
from qwen35.checkpoint.source import Reader
from qwen35.engines.simulated_inputs import (
    Quantizers,
    input_quantizers,
    layer_inputs,
    llama_inputs,
)
from qwen35.evaluation.models import EvaluatedModel
from qwen35.evaluation.stream_plan import StreamPlan
from qwen35.evaluation.text_chunks import TokenChunks
from qwen35.forward.blocks import HEAD, MTP, Block, blocks
from qwen35.forward.builder import Builder
from qwen35.forward.decoded_weights import StoredWeights
from qwen35.forward.forward_stream import ForwardStream, Track
from qwen35.forward.head import Head
from qwen35.forward.stream_folder import StreamFolder
from qwen35.progress import Progress, counting
from qwen35.sinks.staging import check_space, os_errors
from qwen35.sinks.work_folder import check_entries
from qwen35.version import __version__

__all__ = ["StreamedModel", "streamed_models", "streaming_folder"]

_PLAIN, _QUANTIZED = "plain", "quantized"
"""Hidden states with the inputs of layers as they are, and quantized."""


def streaming_folder(state: Path) -> Path:
    """Return the folder of hidden states of an evaluation with such a file of results."""
    return state.with_name(f"{state.name}.states")


@contextmanager
def streamed_models(
    plan: StreamPlan,
    running: Sequence[EvaluatedModel],
    chunks: TokenChunks,
    device: str,
    state: Path | None,
    progress: Progress,
) -> Iterator[Callable[[EvaluatedModel], StreamedModel]]:
    """Run models through their layers; yield what returns the rest of each.

    Args:
        plan: the plan.
        running: the models, simulations among them.
        chunks: the text.
        device: for torch.
        state: the file of results, beside which hidden states are kept to resume from.
        progress: receives layers.
    """
    simulated = {model.loaded_as for model in running if model.simulated}
    with _folder(state, plan.states) as folder:
        models: dict[object, StreamedModel] = {}
        try:
            for model in running:
                key = model.loaded_as
                if key in models:
                    continue
                quantized = key in simulated
                work = _work(folder, model, chunks, plan, device, quantized=quantized)
                models[key] = StreamedModel(model, work, chunks, plan, device)
                models[key].run(progress, quantized=quantized)
            yield lambda model: models[model.loaded_as]
        finally:
            for streamed in models.values():
                streamed.close()


@contextmanager
def _folder(state: Path | None, nbytes: int) -> Iterator[Path]:
    """Yield the folder of all hidden states, a temporary one without a file of results."""
    if state is None:
        with tempfile.TemporaryDirectory(prefix="qwen35-") as temporary:
            check_space(Path(temporary), nbytes)
            yield Path(temporary)
        return
    folder = streaming_folder(state)
    with os_errors(folder):
        fresh = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        check_entries(folder)
    if fresh:
        check_space(folder, nbytes)
    yield folder


def _work(
    folder: Path,
    model: EvaluatedModel,
    chunks: TokenChunks,
    plan: StreamPlan,
    device: str,
    *,
    quantized: bool,
) -> StreamFolder:
    """Return the work folder of a model, which its states are resumed from if they are the same."""
    sizes = (plan.sizes.batch, plan.sizes.wide)
    identity = [__version__, model.identity(), chunks.sha256, chunks.context, sizes, device]
    digest = hashlib.sha256(json.dumps([*identity, quantized]).encode()).hexdigest()
    return StreamFolder(folder / digest[:16], digest, restart=True)


class StreamedModel:
    """A model between its layers, run by `run`, and its logits.

    Args:
        model: the model, whose files are open meanwhile.
        work: holds the hidden states.
        chunks: the text.
        plan: the plan.
        device: for torch.
    """

    def __init__(
        self,
        model: EvaluatedModel,
        work: StreamFolder,
        chunks: TokenChunks,
        plan: StreamPlan,
        device: str,
    ) -> None:
        self._model, self._work, self._chunks, self._plan = model, work, chunks, plan
        self._checkpoint, self._items = take(model.checkpoint(), tower=False)
        self._reader = Reader(self._checkpoint)
        weights = StoredWeights(self._reader, self._checkpoint.config, self._items)
        self._builder = Builder(weights, "float32", device, apart=plan.sizes.wide > 0)
        self._head = Head(self._builder)
        self._quantizers: Quantizers = {}
        self._stream: Any = None
        self._group: dict[bool, tuple[int, F32]] = {}

    def run(self, progress: Progress, *, quantized: bool) -> None:
        """Run all chunks through the layers.

        Raises:
            InputError: a weight cannot be read or decoded.
            OutputError: the disk is full.
        """
        tracks = [Track(_PLAIN)]
        if quantized:
            inputs = llama_inputs if self._model.single else input_quantizers
            self._quantizers = inputs(self._checkpoint)
            tracks.append(Track(_QUANTIZED, self._simulated))
        parts = [b for b in blocks(self._items) if b.name != MTP]
        windows = np.ascontiguousarray(self._chunks.ids[:, :-1])
        progress = counting("layers", progress)
        layers = _Layers(progress)
        stream = ForwardStream(
            self._builder, parts, windows, self._plan.sizes, self._work, layers, tracks=tracks
        )
        progress.begin(f"running {self._model.name}", sum(b.name != HEAD for b in parts))
        try:
            stream.run()
        finally:
            progress.end()
        self._stream = stream

    def _simulated(self, block: Block, module: Any) -> AbstractContextManager[None]:
        roles = {item.role for item in block.items}
        own = {role: one for role, one in self._quantizers.items() if role in roles}
        own = {role: one for role, one in own.items() if role.layer is not None}
        return layer_inputs(module, own) if own else nullcontext()

    def logits(self, chunks: TokenChunks, index: int, *, simulated: bool = False) -> F32:
        """Return the logits of a chunk's scored positions, [scored, v]; valid until next call."""
        del chunks  # they are those of its states
        first, logits = self._group.get(simulated, (index, None))
        if logits is None or not first <= index < first + len(logits):
            self._group.pop(simulated, None)
            logits = self._logits(index, simulated=simulated)
            first = index
            self._group[simulated] = first, logits
        part: F32 = logits[index - first]
        return part

    def _logits(self, first: int, *, simulated: bool) -> Any:
        """Return the logits of a group of chunks, [chunks, scored, v]."""
        chunks, stream = self._chunks, self._stream
        count = min(self._plan.group, chunks.count - first)
        file = f"{_QUANTIZED if simulated else _PLAIN}-{stream.current}"
        with self._builder.torch.inference_mode():
            states = stream.load(file, first, count)[:, chunks.first :]
            quantizer = self._head_quantizer if simulated else None
            states = states.reshape(count * chunks.scored, -1)
            logits = self._head.logits(states if quantizer is None else quantizer(states))
        return logits.numpy().reshape(count, chunks.scored, -1)

    @property
    def _head_quantizer(self) -> Any:
        return self._quantizers.get(self._head.item.role)

    def close(self) -> None:
        """Close its files."""
        self._work.close()
        self._reader.close()


class _Layers:
    """Progress of blocks, whatever their bytes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def begin(self, title: str, nbytes: int) -> None:
        """Do nothing: whoever counts has begun."""

    def advance(self, nbytes: int, item: str) -> None:
        """Count a block."""
        del nbytes
        self._progress.advance(int(item != HEAD), item)

    def end(self) -> None:
        """Do nothing."""
