"""The forward pass: all windows of tokens through one block, then all through the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from qwen35.array_types import I32
from qwen35.engines.expert_loop import experts_in_turn
from qwen35.forward.batch_size import PassSizes
from qwen35.forward.blocks import HEAD, MTP, Block
from qwen35.forward.builder import Builder
from qwen35.forward.side_by_side import side_by_side
from qwen35.forward.stream_folder import StreamFolder
from qwen35.progress import Progress

__all__ = ["EMBEDDED", "ForwardStream", "Track", "mtp_states"]

EMBEDDED = "embeddings"
"""What is listed as done once the embeddings of all tokens are in a file."""


@dataclass(frozen=True)
class Track:
    """One way of running a model; several share each block while it is in memory.

    Args:
        name: of its files of hidden states.
        around: called with a block and its module, surrounds the pass of all windows through it.
        passed: called after each batch of windows, in the thread that computed it.
        merge: gets what `passed` returned, in the order of the batches.
        again: called after a pass, returns whether the block is passed once more.
    """

    name: str = "hidden"
    around: Callable[[Block, Any], AbstractContextManager[None]] = lambda _, __: nullcontext()
    passed: Callable[[], Any] = lambda: None
    merge: Callable[[Any], None] = lambda _: None
    again: Callable[[], bool] = lambda: False

    def file(self, number: int) -> str:
        """Return the name of one of its files."""
        return f"{self.name}-{number}"


class ForwardStream:
    """One run of a model over a text.

    Args:
        builder: of its modules.
        blocks: to run, in order.
        windows: [windows, length] token ids.
        sizes: how many windows are computed together, and how many such batches at a time.
        work: holds the hidden states.
        progress: receives the bytes of each block.
        tracks: the ways of running it.
        ahead: read the next block while the current one computes; by default only on a GPU,
            because two blocks are then in memory.
        kept: keep the states before each block, in a file each; otherwise blocks alternate between
            two files.

    Attributes:
        passing: the windows that are computed at the moment, if that is one batch.
    """

    def __init__(
        self,
        builder: Builder,
        blocks: Sequence[Block],
        windows: I32,
        sizes: PassSizes,
        work: StreamFolder,
        progress: Progress,
        *,
        tracks: Sequence[Track] = (Track(),),
        ahead: bool | None = None,
        kept: bool = False,
    ) -> None:
        self.builder, self.blocks, self.work = builder, blocks, work
        self.windows, self._sizes = windows, sizes
        self.torch = builder.torch
        self._progress, self._tracks = progress, tracks
        self._kept = kept
        self._ahead = builder.device != "cpu" if ahead is None else ahead
        self.passing = range(0)

    @property
    def current(self) -> int:
        """Number of the files that the next block reads: 0 after the embeddings."""
        return self._number(sum(block.name in self.work.done for block in self.blocks))

    def _number(self, passed: int) -> int:
        return passed if self._kept else passed % 2

    def run(self) -> None:
        """Run every unfinished block.

        Raises:
            InputError: a weight cannot be read.
            OutputError: the disk is full.
        """
        with self.torch.inference_mode():
            for block, module in self.builder.built(self.begin(), ahead=self._ahead):
                for track in self._tracks:
                    unfinished = True
                    while unfinished:
                        with track.around(block, module):
                            self.through(track, block, module, self.current)
                        unfinished = track.again()
                self.finish(block)
                del module

    def begin(self) -> list[Block]:
        """Look up the embeddings, unless that is done; return the blocks that are left."""
        if EMBEDDED not in self.work.done:
            for start, ids in self.batches():
                embedded = self.builder.embedded(ids)
                for track in self._tracks:
                    self.store(track.file(0), start, embedded)
            self.work.finish(EMBEDDED)
        passed = [block for block in self.blocks if block.name in self.work.done]
        for block in passed:
            self._progress.advance(block.nbytes, block.name)
        return [block for block in self.blocks if block not in passed]

    def finish(self, block: Block) -> None:
        """Note that all windows have passed a block."""
        self.work.finish(block.name)
        self._progress.advance(block.nbytes, block.name)

    def through(
        self, track: Track, block: Block, module: Any, number: int, part: range | None = None
    ) -> None:
        """Run windows through a block.

        Args:
            track: the way of running it.
            block: the block.
            module: its module.
            number: of the files that it reads.
            part: the windows, from the first of a batch on; all of them by default.
        """
        if self.builder.apart and block.name not in (HEAD, MTP):
            self._through_apart(track, module, number, part)
            return

        def passed(batch: tuple[int, I32]) -> Any:
            start, ids = batch
            states = self.load(track.file(number), start, len(ids))
            if block.name == MTP:  # last, and reads the normed states that the head block wrote
                embedded = self.builder.embedded(ids)
                out = self._shifted(mtp_states(self.builder, module, states, embedded), states)
            else:
                arguments = {} if block.name == HEAD else self.builder.positions(states)
                out = module(states, **arguments)
            self.store(track.file(self._number(number + 1)), start, out)
            return track.passed()

        batches = self.batches(part=part)
        side_by_side(self.torch, passed, batches, self.at_once, track.merge)

    @property
    def at_once(self) -> int:
        """How many batches are computed at a time."""
        if self.builder.device != "cpu":
            return 1
        return min(self._sizes.at_once, int(self.torch.get_num_threads()))

    def _shifted(self, drafted: Any, states: Any) -> Any:
        """Return MTP's states at the positions of the states that predict the same tokens."""
        out = self.torch.zeros_like(states)
        out[:, states.shape[1] - drafted.shape[1] :] = drafted
        return out

    def _through_apart(self, track: Track, module: Any, number: int, part: range | None) -> None:
        """Run a layer in two parts: its experts, read one by one, get as many windows as fit."""
        mlp = module.mlp
        between = track.file(self._number(number + 1))
        mlp.forward = self.torch.zeros_like  # the layer adds it to what attention computed
        for start, ids in self.batches(part=part):
            states = self.load(track.file(number), start, len(ids))
            self.store(between, start, module(states, **self.builder.positions(states)))
            track.merge(track.passed())
        del mlp.forward
        replaced = "forward" in vars(mlp.experts)  # by what watches their inputs
        with nullcontext() if replaced else experts_in_turn(mlp.experts):
            for start, ids in self.batches(self._sizes.wide, part):
                states = self.load(between, start, len(ids))
                computed = mlp(module.post_attention_layernorm(states))
                self.store(between, start, states + computed)
                track.merge(track.passed())

    def batches(self, batch: int = 0, part: range | None = None) -> Iterator[tuple[int, I32]]:
        """Yield the first window of each batch, and its token ids.

        Args:
            batch: windows in a batch; `sizes.batch` by default.
            part: the windows; all of them by default.
        """
        part, batch = part or range(len(self.windows)), batch or self._sizes.batch
        for start in range(part.start, part.stop, batch):
            self.passing = range(start, min(start + batch, part.stop))
            yield start, self.windows[start : self.passing.stop]

    @property
    def _window_bytes(self) -> int:
        size: int = self.builder.config.hidden_size * self.builder.dtype.itemsize
        return int(self.windows.shape[1]) * size

    def load(self, name: str, start: int, count: int) -> Any:
        """Return the states of windows from a file, [count, length, hidden], on the device."""
        data = self.work.read(name, start, count, self._window_bytes)
        states = self.torch.from_numpy(data).view(self.builder.dtype)
        return states.view(count, self.windows.shape[1], -1).to(self.builder.device)

    def store(self, name: str, start: int, states: Any) -> None:
        """Write the states of windows from `start` on."""
        # As bytes: NumPy has no bfloat16.
        flat = states.contiguous().cpu().flatten(1).view(self.torch.uint8).numpy()
        self.work.write(name, start, flat)


def mtp_states(builder: Builder, module: Any, states: Any, embedded: Any) -> Any:
    """Run the multi-token-prediction (MTP) part, which transformers does not build.

    The trunk's state at t (after its final norm) and the embedding of token t + 1 are normed,
    concatenated (embedding first), projected by ``fc`` and run through a full-attention layer. Each
    further layer takes the previous layer's state and the embedding one token later.
    Source: vLLM ``qwen3_5_mtp.py``, llama.cpp 0c1e5709 ``src/models/qwen35.cpp`` (``graph_mtp``).

    Args:
        builder: computes the positions.
        module: the MTP part, from `Builder.build`.
        states: [rows, length, hidden] trunk states, normed.
        embedded: [rows, length, hidden] token embeddings.

    Returns:
        [rows, length - layers, hidden], normed: the last layer's states.
    """
    for i, layer in enumerate(module["layers"]):
        following = embedded[:, i + 1 :]
        joined = builder.torch.cat(
            [
                module["pre_fc_norm_embedding"](following),
                module["pre_fc_norm_hidden"](states[:, : following.shape[1]]),
            ],
            dim=-1,
        )
        mixed = module["fc"](joined)
        states = module["norm"](layer(mixed, **builder.positions(mixed)))
    return states
