"""The forward pass: all tokens through one block, then all through the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qwen35.calibration.blocks import Block, Builder, Embedding
from qwen35.calibration.cached_states import record_cache
from qwen35.calibration.calibration_plan import CalibrationPlan
from qwen35.calibration.hooks import BlockSums, record_inputs
from qwen35.calibration.inputs import HEAD, MTP
from qwen35.calibration.states import CalibrationFolder
from qwen35.calibration.sums import Sums
from qwen35.checkpoint.source import Reader
from qwen35.progress import Progress

__all__ = ["ForwardStream", "mtp_forward"]

EMBEDDED = "embeddings"


class ForwardStream:
    """One run over a plan's text.

    Args:
        plan: the plan.
        work: holds the hidden states.
        reader: of the checkpoint.
        device: where to compute.
        progress: receives the bytes of each block.
        ahead: read the next block while the current one computes; by default only on a GPU,
            because two blocks are then in memory.
    """

    def __init__(
        self,
        plan: CalibrationPlan,
        work: CalibrationFolder,
        reader: Reader,
        device: str,
        progress: Progress,
        *,
        ahead: bool | None = None,
    ) -> None:
        self.plan, self.work, self.progress = plan, work, progress
        self.builder = Builder(reader, plan.config, plan.dtype, device)
        self.torch = self.builder.torch
        self.ahead = device != "cpu" if ahead is None else ahead
        embedding = next(i for i in plan.items if i.role.name == "embed_tokens")
        self.embedding = Embedding(self.builder, embedding)
        self.current = 0
        """Number of the hidden-state file that the next block reads."""

    def run(self) -> None:
        """Run every unfinished block.

        Raises:
            InputError: a weight cannot be read, or an input is not finite.
            OutputError: the disk is full.
        """
        with self.torch.inference_mode():
            if EMBEDDED not in self.work.done:
                self._embed()
                self.work.finish(EMBEDDED, {})
            # Blocks alternate between the two files, starting with 0 after the embeddings.
            self.current = len(self.work.done[1:]) % 2
            left = [block for block in self.plan.blocks if block.name not in self.work.done]
            for block in self.plan.blocks:
                if block not in left:
                    self.progress.advance(block.nbytes, block.name)
            for block, module in self._modules(left):
                self._block(block, module)
                del module
                self.progress.advance(block.nbytes, block.name)
                self.current = 1 - self.current

    def _modules(self, left: list[Block]) -> Iterator[tuple[Block, Any]]:
        """Yield each block with its module; keep no reference, so the caller's `del` frees it."""
        if not self.ahead:
            for block in left:
                yield block, self.build(block)
            return
        # One worker: at most one block is read ahead, so at most two are in memory.
        with ThreadPoolExecutor(1) as pool:
            pending = [pool.submit(self.build, block) for block in left[:1]]
            for block, following in zip(left, [*left[1:], None], strict=True):
                module = pending.pop().result()
                if following is not None:
                    pending.append(pool.submit(self.build, following))
                yield block, module
                del module

    def build(self, block: Block) -> Any:
        """Build the module of a block, with its weights."""
        if block.name == HEAD:
            return self.builder.norm(block)
        if block.name == MTP:
            return self.builder.mtp(block, self.plan.config.mtp_layers)
        return self.builder.layer(block)

    def _block(self, block: Block, module: Any) -> None:
        if block.name == MTP:  # last, and reads the normed states that the head block wrote
            sums = self._mtp(module)
        elif block.name == HEAD:
            block_sums = BlockSums()

            def normed(x: Any) -> Any:
                out = module(x)
                block_sums.add("lm_head", out)
                return out

            self._pass(normed)
            block_sums.check(HEAD)
            sums = block_sums.sums
        else:
            block_sums = BlockSums()
            with record_inputs(module, block_sums), record_cache(module, block_sums):
                self._pass(lambda x: module(x, **self._positions(x)))
            block_sums.check(block.name)
            sums = block_sums.sums
        self.work.finish(block.name, sums)

    def _positions(self, x: Any) -> dict[str, Any]:
        """Return the position arguments of a decoder layer."""
        rows, length = x.shape[:2]
        return {"position_embeddings": self.builder.rotary(rows, length), "attention_mask": None}

    def _mtp(self, module: Any) -> dict[str, Sums]:
        fc_sums = BlockSums()
        layer_sums = [BlockSums() for _ in module["layers"]]
        for start, ids in self._batches():
            states = self._load(start, ids.shape)
            embedded = self.embedding.rows(ids)
            mtp_forward(self.builder, module, states, embedded, fc_sums, layer_sums)
        fc_sums.check(MTP)
        sums = dict(fc_sums.sums)
        for i, one in enumerate(layer_sums):
            one.check(f"mtp.layers.{i}")
            sums |= {f"layers.{i}.{name}": value for name, value in one.sums.items()}
        return sums

    def _embed(self) -> None:
        for start, ids in self._batches():
            self._store(0, start, self.embedding.rows(ids))

    def _pass(self, compute: Callable[[Any], Any]) -> None:
        for start, ids in self._batches():
            out = compute(self._load(start, ids.shape))
            self._store(1 - self.current, start, out)

    def _batches(self) -> Iterator[tuple[int, Any]]:
        windows, batch = self.plan.text.windows, self.plan.batch
        for start in range(0, len(windows), batch):
            yield start, windows[start : start + batch]

    @property
    def _window_bytes(self) -> int:
        return self.plan.hidden_bytes // len(self.plan.text.windows)

    def _load(self, start: int, shape: tuple[int, int]) -> Any:
        count = shape[0] * self._window_bytes
        data = self.work.read(self.current, start * self._window_bytes, count)
        states = self.torch.from_numpy(data).view(self.builder.dtype)
        return states.view(*shape, -1).to(self.builder.device)

    def _store(self, number: int, start: int, states: Any) -> None:
        # As bytes: NumPy has no bfloat16.
        flat = states.contiguous().cpu().view(-1).view(self.torch.uint8).numpy()
        self.work.write(number, start * self._window_bytes, memoryview(flat))


def mtp_forward(
    builder: Builder,
    module: Any,
    states: Any,
    embedded: Any,
    fc_sums: BlockSums,
    layer_sums: list[BlockSums],
) -> Any:
    """Run the multi-token-prediction (MTP) part, which transformers does not build.

    The trunk's state at t (after its final norm) and the embedding of token t + 1 are normed,
    concatenated (embedding first), projected by ``fc`` and run through a full-attention layer. Each
    further layer takes the previous layer's state and the embedding one token later.
    Source: vLLM ``qwen3_5_mtp.py``, llama.cpp 0c1e5709 ``src/models/qwen35.cpp`` (``graph_mtp``).

    Args:
        builder: computes the positions.
        module: returned by `Builder.mtp`.
        states: [rows, length, hidden] trunk states, normed.
        embedded: [rows, length, hidden] token embeddings.
        fc_sums: receives the inputs of ``fc``.
        layer_sums: receive the inputs of each layer.

    Returns:
        [rows, length - layers, hidden], normed: the last layer's states.
    """
    for i, (layer, sums) in enumerate(zip(module["layers"], layer_sums, strict=True)):
        following = embedded[:, i + 1 :]
        joined = builder.torch.cat(
            [
                module["pre_fc_norm_embedding"](following),
                module["pre_fc_norm_hidden"](states[:, : following.shape[1]]),
            ],
            dim=-1,
        )
        fc_sums.add("fc", joined)
        mixed = module["fc"](joined)
        positions = builder.rotary(*mixed.shape[:2])
        with record_inputs(layer, sums), record_cache(layer, sums):
            out = layer(mixed, position_embeddings=positions, attention_mask=None)
        states = module["norm"](out)
    return states
