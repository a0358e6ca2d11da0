"""What a calibration will read, hold and write, from headers and the text alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal

from qwen35.calibration.blocks import Block, blocks
from qwen35.calibration.inputs import MTP, input_of
from qwen35.calibration.sums import FLOOR
from qwen35.calibration.text_windows import TextWindows
from qwen35.checkpoint.inventory import InventoryItem, inventory
from qwen35.checkpoint.source import Checkpoint
from qwen35.display import least, size
from qwen35.errors import InputError, UsageError
from qwen35.model.model_config import ModelConfig
from qwen35.planning.gguf_files.mixes import quantizable
from qwen35.planning.gguf_files.tensor_names import UntypedTensor, text_tensors
from qwen35.planning.manifest import source_json
from qwen35.version import __version__

__all__ = [
    "COVERAGE",
    "IMATRIX",
    "LEGACY",
    "STATISTICS",
    "CalibrationPlan",
    "CalibrationRequest",
    "Dtype",
    "make_plan",
]

Dtype = Literal["auto", "bfloat16", "float32"]

STATISTICS, IMATRIX, LEGACY, COVERAGE = (
    "activation-stats.json",
    "imatrix.gguf",
    "imatrix.dat",
    "coverage.json",
)

_TOKENS_AT_ONCE = 2048
_LARGEST_TEXT = 16
"""Bytes of a number in the JSON file, at most, with its separator."""


@dataclass(frozen=True)
class CalibrationRequest:
    """What the user chose.

    Args:
        dtype: what to compute in; ``auto`` is bfloat16 for a bfloat16 checkpoint, else float32.
        floor: tokens below which an expert's statistics are filled up from its layer's.
        legacy: whether the older ``.dat`` form is written as well.
        memory: bytes that a run may take beside the libraries, if limited.
    """

    dtype: Dtype = "auto"
    floor: int = FLOOR
    legacy: bool = False
    memory: int | None = None


@dataclass(frozen=True)
class CalibrationPlan:
    """A run, known before it.

    Args:
        checkpoint: the source.
        text: what to run over it.
        asked: what the user chose.
        items: the checkpoint's weights.
        blocks: what is in memory one at a time, in order.
        batch: windows computed at once.
    """

    checkpoint: Checkpoint
    text: TextWindows
    asked: CalibrationRequest
    items: tuple[InventoryItem, ...]
    blocks: tuple[Block, ...]
    batch: int

    @property
    def config(self) -> ModelConfig:
        """The model's geometry."""
        return self.checkpoint.config

    @property
    def dtype(self) -> str:
        """What is computed in, as torch calls it."""
        return _dtype(self.config, self.asked.dtype)

    @property
    def itemsize(self) -> int:
        """Bytes of a number that is computed with."""
        return _ITEMSIZE[self.dtype]

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of all tokens; two such files are on the disk."""
        return self.text.tokens * self.config.dims["hidden"] * self.itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest block."""
        return max(block.numel for block in self.blocks) * self.itemsize

    @property
    def batch_bytes(self) -> int:
        """Bytes that a batch takes within a layer, an upper bound."""
        return self.batch * workspace(self.config, self.text.context, self.itemsize)

    @property
    def peak_bytes(self) -> int:
        """Bytes of memory beside Python and its libraries; the hidden states are on the disk."""
        return self.layer_bytes + self.batch_bytes

    @property
    def tensors(self) -> list[UntypedTensor]:
        """The GGUF tensors that have an entry in the importance matrix."""
        mtp = any(block.name == MTP for block in self.blocks)
        return [
            tensor
            for tensor in text_tensors(self.items, self.config, mtp=mtp)
            if quantizable(tensor.name, tensor.shape)
            and input_of(tensor.rows.item.role, self.config) is not None
        ]

    @property
    def file_names(self) -> tuple[str, ...]:
        """The files that are written, but for the manifest."""
        names: tuple[str, ...] = (STATISTICS, IMATRIX)
        names += (LEGACY,) if self.asked.legacy else ()
        return names + ((COVERAGE,) if self.config.moe else ())

    @property
    def output_bytes(self) -> int:
        """Bytes of the files, at most."""
        values = sum(tensor.row * len(tensor.rows.slabs) for tensor in self.tensors)
        return values * (2 * _LARGEST_TEXT + 8) + 2**20

    @property
    def disk_bytes(self) -> int:
        """Bytes on the disk at most: hidden states, sums, and the output."""
        return 2 * self.hidden_bytes + 2 * self.output_bytes

    @property
    def read_bytes(self) -> int:
        """Tensor bytes that are read, but for the embedding."""
        return sum(block.nbytes for block in self.blocks)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What made the statistics, for the files."""
        return {
            "qwen35": __version__,
            **{name: version(name) for name in ("torch", "transformers")},
            "source": source_json(self.checkpoint),
            "text": [{"name": name, "sha256": digest} for name, digest in self.text.files],
            "tokens": self.text.tokens,
            "context": self.text.context,
            "dtype": self.dtype,
            "floor": self.asked.floor,
            "geometry": self.config.geometry,
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides the result; another digest cannot be resumed."""
        described = {
            **self.provenance,
            "windows": hashlib.sha256(self.text.windows.tobytes()).hexdigest(),
            "weights": [
                [part.spec.name, part.spec.dtype, list(part.spec.shape), part.file, part.begin]
                for item in self.items
                for part in item.weight.parts
            ],
            "files": self._stamps(),
            "batch": self.batch,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def _stamps(self) -> dict[str, int]:
        """Return when each file was last changed, in nanoseconds."""
        root = self.checkpoint.root
        if root is None:
            return {}
        return {name: (root / name).stat().st_mtime_ns for name in self.checkpoint.file_sizes}


_ITEMSIZE = {"bfloat16": 2, "float32": 4}


def _dtype(config: ModelConfig, asked: Dtype) -> str:
    if asked != "auto":
        return asked
    return "bfloat16" if config.dtype == "BF16" else "float32"


def make_plan(
    checkpoint: Checkpoint, text: TextWindows, asked: CalibrationRequest
) -> CalibrationPlan:
    """Plan a calibration, reading nothing but headers.

    Raises:
        TensorError: the checkpoint does not have the weights that its config promises.
        UsageError: one layer and one window are more than `asked.memory`.
    """
    items = inventory(checkpoint)
    config = checkpoint.config
    if config.quantization is not None:
        raise InputError(
            checkpoint.name,
            "quantized",
            expected="the original checkpoint",
            hint="statistics of rounded weights would be those of another model",
        )
    parts = tuple(blocks(items))
    itemsize = _ITEMSIZE[_dtype(config, asked.dtype)]
    window = workspace(config, text.context, itemsize)
    layer = max(block.numel for block in parts) * itemsize
    batch = min(max(1, _TOKENS_AT_ONCE // text.context), max(1, layer // 2 // window))
    if asked.memory is not None:
        if layer + window > asked.memory:
            expected = f"at least {least(layer + window)}"
            raise UsageError(f"--memory {size(asked.memory)}", "too little", expected=expected)
        batch = min(batch, (asked.memory - layer) // window)
    batch = min(batch, len(text.windows))
    return CalibrationPlan(checkpoint, text, asked, items, parts, batch)


def workspace(config: ModelConfig, context: int, itemsize: int) -> int:
    """Return the bytes that one window takes within a layer, an upper bound.

    Linear attention holds some sixteen float32 copies of its value heads (transformers'
    ``torch_chunk_gated_delta_rule``); a feed-forward layer three inner vectors, one in float32 to
    be squared.
    """
    dims = config.dims
    heads = 16 * 4 * max(dims["linear_value"], dims["attention"])
    inner = dims.get("ffn") or dims["expert_ffn"] + dims["shared_ffn"]
    return context * (heads + inner * (3 * itemsize + 8) + dims["hidden"] * (6 * itemsize + 8))
