"""Modules of transformers, built one at a time from decoded weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from qwen35.checkpoint.inventory import InventoryItem
from qwen35.engines.torch_model import torch_and_transformers
from qwen35.errors import InputError, TensorError
from qwen35.forward.blocks import HEAD, MTP, Block, layer_number
from qwen35.forward.decoded_weights import StoredWeights, tensor_of
from qwen35.forward.expert_stacks import set_apart
from qwen35.forward.side_by_side import MOST, side_by_side

__all__ = ["Builder"]

_ALIGNED = 64
"""Parameters start at multiples of this many elements, so that vector loads are aligned."""


class Builder:
    """Builds transformers modules and fills them with a model's weights.

    Args:
        weights: of the model.
        dtype: compute dtype, ``bfloat16`` or ``float32``.
        device: where to compute.
        attention: the implementation, by transformers' name.
        apart: read experts one by one when they compute, instead of with their layer.

    Raises:
        UsageError: torch or transformers is not installed.
    """

    def __init__(
        self,
        weights: StoredWeights,
        dtype: str,
        device: str,
        *,
        attention: str = "sdpa",
        apart: bool = False,
    ) -> None:
        self.torch, transformers = torch_and_transformers("running a model layer by layer")
        self.weights, self.device, self.apart = weights, device, apart
        self.dtype = getattr(self.torch, dtype)
        moe = weights.config.moe
        family = "qwen3_5_moe" if moe else "qwen3_5"
        models = getattr(transformers.models, family)
        self._stem = "Qwen3_5Moe" if moe else "Qwen3_5"
        self._code = getattr(models, f"modeling_{family}")
        text = getattr(getattr(models, f"configuration_{family}"), f"{self._stem}TextConfig")
        raw = {key: value for key, value in weights.config.text_raw.items() if key != "dtype"}
        self.config: Any = text.from_dict(raw)
        self.config._attn_implementation = attention
        self.config._experts_implementation = "eager"  # the loop that hooks replace
        self._rotary: dict[tuple[int, int], Any] = {}

    def _class(self, name: str) -> Any:
        return getattr(self._code, self._stem + name)

    def positions(self, x: Any) -> dict[str, Any]:
        """Return the position arguments of a decoder layer for states [rows, length, hidden]."""
        rows, length = x.shape[:2]
        found = self._rotary.get((rows, length))
        if found is None:
            with self.torch.inference_mode(mode=False):  # a backward pass uses them too
                # Time, height and width coincide for text.
                places = self.torch.arange(length).expand(3, rows, -1).to(self.device)
                like = self.torch.empty(0, dtype=self.dtype, device=self.device)
                module = self._class("TextRotaryEmbedding")(self.config)
                found = module(like, places)
                # Only the last shape is kept: all batches but the last one have it.
                self._rotary = {(rows, length): found}
        return {"position_embeddings": found, "attention_mask": None}

    def build(self, block: Block) -> Any:
        """Build the module of a block: a decoder layer, a norm, or the parts of MTP.

        Raises:
            TensorError: a weight is missing, or cannot be read or decoded.
            InputError: transformers builds another model.
        """
        with self.torch.device("meta"):  # no memory: `_filled` assigns it
            if block.name == HEAD:
                module = self._norm()
            elif block.name == MTP:
                module = self._mtp()
            else:
                module = self._class("DecoderLayer")(self.config, layer_number(block.name))
        return self._filled(module, block)

    def built(self, parts: Sequence[Block], *, ahead: bool) -> Iterator[tuple[Block, Any]]:
        """Yield each block with its module; the caller frees it with `del`.

        Args:
            parts: the blocks, in order.
            ahead: whether the next one is read while the caller computes.
        """
        if not ahead:
            for block in parts:
                yield block, self.build(block)
            return
        # One worker: at most one block is read ahead, so at most two are in memory.
        with ThreadPoolExecutor(1) as pool:
            pending = [pool.submit(self.build, block) for block in parts[:1]]
            for block, following in zip(parts, [*parts[1:], None], strict=True):
                module = pending.pop().result()
                if following is not None:
                    pending.append(pool.submit(self.build, following))
                yield block, module
                del module

    def _norm(self) -> Any:
        return self._class("RMSNorm")(self.config.hidden_size, eps=self.config.rms_norm_eps)

    def _mtp(self) -> Any:
        """Return the MTP part: fc, three norms, full-attention layers."""
        nn, size = self.torch.nn, self.config.hidden_size
        layers = self.weights.config.mtp_layers
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        config.layer_types = ["full_attention"] * layers
        norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
        return nn.ModuleDict(
            {
                "fc": nn.Linear(2 * size, size, bias=False),
                "layers": nn.ModuleList(
                    self._class("DecoderLayer")(config, i) for i in range(layers)
                ),
                **{name: self._norm() for name in norms},
            }
        )

    def _filled(self, module: Any, block: Block) -> Any:
        """Load the weights of a meta-device module into one allocation, freed with the module."""
        items: Sequence[InventoryItem] = block.items
        if self.apart:
            items = set_apart(self.torch, self.weights, module, items, self.dtype, self.device)
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        sizes = {name: -(-shape.numel() // _ALIGNED) * _ALIGNED for name, shape in shapes.items()}
        memory = self.torch.empty(sum(sizes.values()), dtype=self.dtype)
        parameters = {
            name: piece[: shapes[name].numel()].view(shapes[name])
            for name, piece in zip(sizes, memory.split(list(sizes.values())), strict=True)
        }
        module.load_state_dict(parameters, assign=True)
        module.requires_grad_(requires_grad=False)
        missing = sum(parameter.numel() for parameter in parameters.values())
        targets = [_target(parameters, item, block.name) for item in items]
        self._fill(list(zip(items, targets, strict=True)))
        missing -= sum(target.numel() for target in targets)
        if missing:
            raise TensorError(block.name, f"{missing} of its weights are missing from the files")
        return module.eval().to(self.device)

    def _fill(self, targets: Sequence[tuple[InventoryItem, Any]]) -> None:
        """Read and decode weights into tensors, several at a time."""

        def fill(one: tuple[InventoryItem, Any]) -> None:
            self.weights.fill(self.torch, *one)

        side_by_side(self.torch, fill, targets, min(MOST, self.torch.get_num_threads()))

    def embedded(self, ids: Any) -> Any:
        """Return the embeddings of token ids, [...] int -> [..., hidden]."""
        item = self.weights.embedding
        unique, places = np.unique(ids, return_inverse=True)
        table = self.torch.empty((len(unique), item.spec.shape[1]), dtype=self.dtype)
        done = 0
        for _, values, dtype in self.weights.pieces(item, _runs(unique.tolist())):
            part = table[done : done + len(values)]
            part.copy_(tensor_of(self.torch, values, dtype))
            done += len(values)
        index = self.torch.from_numpy(places.reshape(-1))
        return table[index].view(*np.shape(ids), -1).to(self.device)


def _target(parameters: Mapping[str, Any], item: InventoryItem, block: str) -> Any:
    """Return the parameter of a weight, or the weight's part of a fused parameter."""
    path = item.role.info.path
    if block == HEAD:
        path = "weight"
    elif item.role.scope == "mtp" and item.role.layer is not None:
        path = f"layers.{item.role.layer}.{path}"
    if item.role.expert is None:
        parameter = parameters.get(path)
    else:
        parameter = _expert(parameters, path, item.role.expert)
    if parameter is None or tuple(parameter.shape) != item.spec.shape:
        shape = f"shape {list(parameter.shape)}" if parameter is not None else "no such parameter"
        raise InputError(
            item.spec.name,
            f"transformers has {shape}",
            expected=str(list(item.spec.shape)),
            hint="this version of transformers builds a different model",
        )
    return parameter


def _expert(parameters: Mapping[str, Any], path: str, expert: int) -> Any:
    """Return the view of one expert's matrix in transformers' stacks."""
    stem, _, leaf = path.removesuffix(".weight").rpartition(".")
    if leaf == "down_proj":
        return parameters[f"{stem}.down_proj"][expert]
    both = parameters[f"{stem}.gate_up_proj"][expert]
    half = len(both) // 2
    return both[:half] if leaf == "gate_proj" else both[half:]


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the number of each run of consecutive ids."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            yield ids[start], i - start
            start = i
