"""The plan of a calibration: what it reads, keeps in memory and writes, from headers and text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from qwen35.calibration.hessian_inputs import HOLD_OUT
from qwen35.calibration.hessian_plan import HessianPlan, plan_hessians
from qwen35.calibration.inputs import input_of
from qwen35.calibration.sums import FLOOR
from qwen35.calibration.text_windows import TextWindows
from qwen35.checkpoint.grafted import grafted_notes
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.reconciled import source_notes, take
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.registry import is_lossy
from qwen35.errors import InputError, UsageError
from qwen35.forward.batch_size import PassSizes, pass_sizes
from qwen35.forward.blocks import MTP, Block, blocks
from qwen35.model.model_config import ModelConfig
from qwen35.planning.gguf_files.imatrix import IMATRIX_NAME
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
    IMATRIX_NAME,
    "imatrix.dat",
    "coverage.json",
)

PARTS = 16
"""Most parts of the text whose products are summed up apart: more let more workers share them, but
each part is added to the sums in a file."""

_NUMBER_BYTES = 16
"""Upper bound for a number in the JSON file with its separator."""


@dataclass(frozen=True)
class CalibrationRequest:
    """User options of a calibration.

    Args:
        dtype: compute dtype; ``auto`` is bfloat16 for a bfloat16 checkpoint, else float32.
        floor: tokens below which an expert's statistics are topped up from its layer's.
        legacy: also write the older ``.dat`` form.
        memory: most bytes a run may take on top of the libraries; None for no limit.
        draft: also measure how often what the MTP layer drafts is accepted.
        hessian: also keep the Hessians of all inputs.
        workers: processes on this machine that share `memory`.
        threads: batches that each of them computes at a time, if memory allows; without Hessians.
    """

    dtype: Dtype = "auto"
    floor: int = FLOOR
    legacy: bool = False
    memory: int | None = None
    draft: bool = False
    hessian: bool = False
    workers: int = 1
    threads: int = 1


@dataclass(frozen=True)
class CalibrationPlan:
    """A planned calibration.

    Args:
        checkpoint: the source.
        text: the calibration text.
        request: the user's options.
        items: the checkpoint's weights.
        blocks: parts of the model in execution order; one is in memory at a time.
        sizes: what is in memory at a time.
        notes: for the user, on how the checkpoint was read.
        hessians: what they are of, and take, if asked for.
    """

    checkpoint: Checkpoint
    text: TextWindows
    request: CalibrationRequest
    items: tuple[InventoryItem, ...]
    blocks: tuple[Block, ...]
    sizes: PassSizes
    notes: tuple[str, ...] = ()
    hessians: HessianPlan | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's geometry."""
        return self.checkpoint.config

    @property
    def dtype(self) -> str:
        """Compute dtype, as torch calls it."""
        return _dtype(self.config, self.request.dtype)

    @property
    def itemsize(self) -> int:
        """Bytes per value of the compute dtype."""
        return _ITEMSIZE[self.dtype]

    @property
    def hidden_bytes(self) -> int:
        """Bytes of all tokens' hidden states; two such files are on disk."""
        return self.text.tokens * self.config.dims["hidden"] * self.itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest block, without experts that are read one by one."""
        return self.sizes.layer

    @property
    def batch(self) -> int:
        """Windows per forward call."""
        return self.sizes.batch

    @property
    def batch_bytes(self) -> int:
        """Upper bound on the bytes, within a layer, of the batches that are computed at a time."""
        return self.sizes.nbytes - self.sizes.layer

    @property
    def peak_bytes(self) -> int:
        """Peak memory on top of Python and its libraries; hidden states are on disk."""
        hessians = self.hessian_bytes
        return self.request.workers * (self.layer_bytes + self.batch_bytes + hessians)

    @property
    def part(self) -> int:
        """Windows whose products are summed up together: a part of the text, of whole batches."""
        count, unit = len(self.text.windows), self.sizes.wide or self.sizes.batch
        return unit * -(-count // (unit * PARTS))

    @property
    def part_bytes(self) -> int:
        """Upper bound on the bytes of workers' sums on disk, until they are added up."""
        return PARTS * self.hessian_bytes // 2 if self.hessians else 0

    @property
    def hessian_bytes(self) -> int:
        """Most bytes of Hessians in memory."""
        return self.hessians.nbytes if self.hessians else 0

    def hessian_disk_bytes(self, done: Collection[str] = ()) -> int:
        """Return an upper bound on the bytes of Hessians on disk, without those of blocks."""
        # Those of a block are added up in a file of their own.
        return self.hessians.disk_bytes(done) + self.hessian_bytes if self.hessians else 0

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
        """The files written, without the manifest."""
        names: tuple[str, ...] = (STATISTICS, IMATRIX)
        names += (LEGACY,) if self.request.legacy else ()
        return names + ((COVERAGE,) if self.config.moe else ())

    @property
    def output_bytes(self) -> int:
        """Upper bound on the bytes of the files."""
        values = sum(tensor.row * len(tensor.rows.slabs) for tensor in self.tensors)
        # Per value two JSON numbers and two float32 (GGUF and .dat); 1 MiB for names and metadata.
        return values * (2 * _NUMBER_BYTES + 8) + 2**20

    @property
    def disk_bytes(self) -> int:
        """Upper bound on disk use: hidden states, sums and the output."""
        shared = self.part_bytes if self.request.workers > 1 else 0
        return self.own_disk_bytes + shared

    @property
    def own_disk_bytes(self) -> int:
        """The same for one process."""
        return 2 * (self.hidden_bytes + self.output_bytes) + self.hessian_disk_bytes()

    @property
    def streamed_disk_bytes(self) -> int:
        """Upper bound on disk use if Hessians are used up layer by layer, and there is no output.

        That is hidden states, sums, and the Hessians of one block, which are added up in a file.
        """
        assert self.hessians is not None
        own = 2 * self.hidden_bytes + self.output_bytes + self.hessian_bytes
        return own + self.hessians.streamed_disk_bytes

    @property
    def read_bytes(self) -> int:
        """Tensor bytes to read, without the embedding."""
        return sum(block.nbytes for block in self.blocks)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Origin of the statistics, recorded in the files."""
        return {
            "qwen35": __version__,
            **{name: version(name) for name in ("torch", "transformers")},
            "source": source_json(self.checkpoint),
            "text": [{"name": name, "sha256": digest} for name, digest in self.text.files],
            "tokens": self.text.tokens,
            "context": self.text.context,
            "dtype": self.dtype,
            "floor": self.request.floor,
            "geometry": self.config.geometry,
        }

    @cached_property
    def hessian_provenance(self) -> dict[str, Any]:
        """Origin of the Hessians, recorded in each file of them."""
        files = self.hessians.files if self.hessians else ()
        return {**self.provenance, "hold_out": HOLD_OUT, "files": list(files)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything the result depends on; only the same digest is resumed."""
        described = {
            **self.provenance,
            "config": self.config.raw,
            "windows": hashlib.sha256(self.text.windows.tobytes()).hexdigest(),
            "weights": [
                [part.spec.name, part.spec.dtype, list(part.spec.shape), part.file, part.begin]
                for item in self.items
                for part in item.weight.parts
            ],
            "files": self._mtimes(),
            "batch": self.batch,  # float sums depend on it
            **({"wide": self.sizes.wide} if self.sizes.wide else {}),
            **({"hessians": self.hessian_provenance, "part": self.part} if self.hessians else {}),
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def _mtimes(self) -> dict[str, int]:
        """Return the modification time of each file, in nanoseconds."""
        root = self.checkpoint.root
        if root is None:
            return {}
        times = {name: (root / name).stat().st_mtime_ns for name in self.checkpoint.file_sizes}
        donor = self.checkpoint.donor
        files = map(donor.path_of, donor.file_sizes) if donor and donor.root else ()
        return times | {path: Path(path).stat().st_mtime_ns for path in files}


_ITEMSIZE = {"bfloat16": 2, "float32": 4}


def _dtype(config: ModelConfig, dtype: Dtype) -> str:
    if dtype != "auto":
        return dtype
    return "bfloat16" if config.dtype == "BF16" else "float32"


def make_plan(
    checkpoint: Checkpoint, text: TextWindows, request: CalibrationRequest
) -> CalibrationPlan:
    """Plan a calibration; read only headers.

    Raises:
        InputError: the checkpoint is quantized.
        TensorError: the checkpoint lacks weights that its config implies.
        UsageError: one layer and one window exceed `request.memory`.
    """
    original = checkpoint
    checkpoint, items = take(original, tower=False)
    config = checkpoint.config
    lossy = not original.adapters and any(map(is_lossy, original.weights))
    if config.quantization is not None or lossy:
        raise InputError(
            checkpoint.name,
            "quantized",
            expected="the original checkpoint",
            hint="rounded weights would give the statistics of another model",
        )
    parts = tuple(blocks(items))
    if request.draft and not any(block.name == MTP for block in parts):
        found = f"{checkpoint.name} has no MTP layer"
        raise UsageError("--draft", found, hint="take that of the original: --mtp-from MODEL")
    itemsize = _ITEMSIZE[_dtype(config, request.dtype)]
    memory = None if request.memory is None else request.memory // request.workers
    hessians = None
    if request.hessian:
        layer = max(block.numel for block in parts) * itemsize
        hessians = plan_hessians(items, config, text, layer, memory)
    sizes = pass_sizes(
        parts,
        config,
        length=text.context,
        count=len(text.windows),
        itemsize=itemsize,
        memory=memory,
        fixed=hessians.nbytes if hessians else 0,
        shares=request.workers,
    )
    if hessians is None:  # whose sums are in the order of the text
        sizes = sizes.side_by_side(request.threads, len(text.windows), memory)
    notes = (*source_notes(original, mtp=True, tower=False), *grafted_notes(original))
    return CalibrationPlan(checkpoint, text, request, items, parts, sizes, notes, hessians)
