"""Blocks of the model, built one at a time from a checkpoint's files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen35.calibration.cached_states import recording_attention
from qwen35.calibration.inputs import HEAD, MTP
from qwen35.calibration.libraries import libraries
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.source import Reader
from qwen35.codecs.registry import is_packed
from qwen35.errors import InputError, TensorError
from qwen35.model.model_config import ModelConfig
from qwen35.planning.rows import rows_of

__all__ = ["Block", "Builder", "Embedding", "blocks"]

_ALIGNED = 64
"""Parameters start at multiples of this many elements, so that vector loads are aligned."""

_TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Block:
    """A decoder layer, the norm before the head, or the multi-token-prediction part.

    Args:
        name: ``layers.3``, ``head``, ``mtp``.
        items: its weights.
    """

    name: str
    items: tuple[InventoryItem, ...]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(item.spec.numel for item in self.items)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(item.weight.nbytes for item in self.items)


def blocks(items: Sequence[InventoryItem]) -> list[Block]:
    """Return the blocks of the text model in execution order."""
    parts: dict[str, list[InventoryItem]] = {}
    for item in items:
        role = item.role
        if role.scope == "text" and role.layer is not None:
            parts.setdefault(f"layers.{role.layer}", []).append(item)
        elif role.scope == "text" and role.name == "norm":
            parts[HEAD] = [item]
        elif role.scope == "mtp":
            parts.setdefault(MTP, []).append(item)
    order = sorted(parts, key=lambda name: (name == MTP, name == HEAD, _number(name)))
    return [Block(name, tuple(parts[name])) for name in order]


def _number(name: str) -> int:
    return int(name.partition(".")[2] or 0)


class Builder:
    """Builds transformers modules and loads their weights from a checkpoint.

    Args:
        reader: of the checkpoint.
        config: its geometry.
        dtype: compute dtype, ``bfloat16`` or ``float32``.
        device: where to compute.
    """

    def __init__(self, reader: Reader, config: ModelConfig, dtype: str, device: str) -> None:
        self.torch, transformers = libraries()
        self.reader = reader
        self.dtype = getattr(self.torch, dtype)
        self.device = device
        family = "qwen3_5_moe" if config.moe else "qwen3_5"
        self._models = getattr(transformers.models, family)
        name = "Qwen3_5Moe" if config.moe else "Qwen3_5"
        self._stem, self._code = name, getattr(self._models, f"modeling_{family}")
        configuration = getattr(self._models, f"configuration_{family}")
        text = getattr(configuration, f"{name}TextConfig")
        raw = {key: value for key, value in config.text_raw.items() if key != "dtype"}
        self.config: Any = text.from_dict(raw)
        self.config._attn_implementation = recording_attention("sdpa")
        self.config._experts_implementation = "eager"  # the loop that the hooks replace
        self._rotary: dict[tuple[int, int], Any] = {}

    def _class(self, name: str) -> Any:
        return getattr(self._code, self._stem + name)

    def rotary(self, rows: int, length: int) -> Any:
        """Return the position embeddings (cosine, sine) for `rows` windows of `length`."""
        if (rows, length) not in self._rotary:
            # Time, height and width coincide for text.
            positions = self.torch.arange(length).expand(3, rows, -1).to(self.device)
            like = self.torch.empty(0, dtype=self.dtype, device=self.device)
            module = self._class("TextRotaryEmbedding")(self.config)
            # Only the last shape is kept: all batches but the last one have it.
            self._rotary = {(rows, length): module(like, positions)}
        return self._rotary[rows, length]

    def layer(self, block: Block) -> Any:
        """Build decoder layer ``layers.N``."""
        with self.torch.device("meta"):  # no memory: `_filled` assigns it
            module = self._class("DecoderLayer")(self.config, _number(block.name))
        return self._filled(module, block)

    def norm(self, block: Block) -> Any:
        """Build the norm before the head."""
        with self.torch.device("meta"):
            module = self._norm()
        return self._filled(module, block)

    def _norm(self) -> Any:
        return self._class("RMSNorm")(self.config.hidden_size, eps=self.config.rms_norm_eps)

    def mtp(self, block: Block, layers: int) -> Any:
        """Build the MTP part: fc, three norms, full-attention layers."""
        nn, size = self.torch.nn, self.config.hidden_size
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        config.layer_types = ["full_attention"] * layers
        with self.torch.device("meta"):
            stack = [self._class("DecoderLayer")(config, i) for i in range(layers)]
            norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
            module = nn.ModuleDict(
                {
                    "fc": nn.Linear(2 * size, size, bias=False),
                    "layers": nn.ModuleList(stack),
                    **{name: self._norm() for name in norms},
                }
            )
        return self._filled(module, block)

    def _filled(self, module: Any, block: Block) -> Any:
        """Load the weights of a meta-device module into one allocation, freed with the module."""
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
        for item in block.items:
            target = _target(parameters, item, block.name)
            self._read(item, target.view(-1))
            missing -= target.numel()
        if missing:
            raise TensorError(block.name, f"{missing} of its weights are missing from the files")
        return module.eval().to(self.device)

    def _read(self, item: InventoryItem, target: Any) -> None:
        """Fill the flat `target` with a weight, decoded and rounded to the target's dtype."""
        torch, spec = self.torch, item.spec
        if not is_packed(item.weight) and getattr(torch, _TORCH[spec.dtype]) == self.dtype:
            self.reader.read_into(item.weight.main, 0, _bytes(torch, target))  # no copy
            return
        rows, done = rows_of(item), 0
        # Non-finite weights are not checked here: the sums of their products are.
        for piece in rows.open(self.reader, check=False).pieces(rows.chunks()):
            values = piece.values.reshape(-1)
            target[done : done + values.size].copy_(_tensor(torch, values, piece.dtype))
            done += values.size


def _bytes(torch: Any, flat: Any) -> memoryview:
    return memoryview(flat.view(torch.uint8).numpy())


def _tensor(torch: Any, values: Any, dtype: str) -> Any:
    """Return a tensor sharing memory with an array of `dtype` (BF16 arrays hold the bits)."""
    if dtype == "BF16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


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


class Embedding:
    """Rows of the token embedding, read on demand.

    Args:
        builder: has the reader, dtype and device.
        item: the embedding.

    Raises:
        InputError: the embedding is packed.
    """

    def __init__(self, builder: Builder, item: InventoryItem) -> None:
        if is_packed(item.weight):
            raise InputError(item.spec.name, f"packed as {item.weight.storage}", expected="plain")
        self._builder, self._item = builder, item

    def rows(self, ids: Any) -> Any:
        """Return the embeddings of token ids, [...] int -> [..., hidden]."""
        torch, spec = self._builder.torch, self._item.spec
        unique_ids, places = np.unique(ids, return_inverse=True)
        dtype = getattr(torch, _TORCH[spec.dtype])
        table = torch.empty((len(unique_ids), spec.shape[1]), dtype=dtype)
        view, row = _bytes(torch, table.view(-1)), spec.shape[1] * spec.itemsize
        for i, first, count in _runs(unique_ids.tolist()):
            part = view[i * row : (i + count) * row]
            self._builder.reader.read_into(self._item.weight.main, first * row, part)
        table = table.to(self._builder.dtype)
        index = torch.from_numpy(places.reshape(-1))
        chosen = table[index].view(*np.shape(ids), spec.shape[1])
        return chosen.to(self._builder.device)


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (position, first id, count) of each run of consecutive ids."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            yield start, ids[start], i - start
            start = i
