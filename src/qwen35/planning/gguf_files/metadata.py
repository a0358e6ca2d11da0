"""The key-value pairs of a GGUF file, in the converter's order, and its rendered head."""

from __future__ import annotations

import io
import math
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import yaml
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType
from gguf.gguf_writer import GGUFWriter, WriterState

from qwen35.checkpoint.header import strict_json
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.ggml.types import GGML_TYPES
from qwen35.errors import ConfigError
from qwen35.model.model_config import ModelConfig
from qwen35.planning.gguf_files.mixes import FileType, mix_order
from qwen35.planning.gguf_files.vocabulary import Vocabulary

__all__ = ["ALIGNMENT", "RenderedHeader", "SourceDocuments", "model_name", "render_head"]

ALIGNMENT = 32
"""Tensors are padded to a multiple of this many bytes."""

_READ = (
    "README.md",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Small files that this package and the `gguf` library read, if present."""

_MAX_BYTES = 256 * 2**20
"""Bound on one of them, far above real ones."""

_MROPE = [11, 11, 10]
"""transformers' default for ``mrope_section``."""


def model_name(checkpoint: Checkpoint) -> str:
    """Return the base of file names: the repository's or the folder's name."""
    if checkpoint.repo:
        return checkpoint.repo.rpartition("/")[2]
    return checkpoint.root.resolve().name if checkpoint.root else checkpoint.name


class SourceDocuments:
    """A checkpoint's small files, copied to a local folder with the model's name.

    The `gguf` library reads files from a folder, and takes the model's name from it.

    Args:
        checkpoint: the source of the files.
        folder: an empty folder to fill.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self.folder = folder / model_name(checkpoint)
        self.folder.mkdir()
        self.complete = checkpoint.place is not None
        if checkpoint.place is None:
            return
        sizes = checkpoint.place.sizes()
        for name in _READ:
            if name in sizes and sizes[name] <= _MAX_BYTES:
                content = checkpoint.place.read(name, 0, sizes[name])
                (self.folder / name).write_bytes(content)

    @classmethod
    @contextmanager
    def of(cls, checkpoint: Checkpoint) -> Iterator[SourceDocuments]:
        """Read them into a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="qwen35-") as folder:
            yield cls(checkpoint, Path(folder))

    def json(self, name: str) -> dict[str, Any]:
        """Return a parsed JSON file; empty if missing."""
        path = self.folder / name
        parsed = strict_json(path.read_bytes(), name) if path.is_file() else {}
        return parsed if isinstance(parsed, dict) else {}


@dataclass(frozen=True)
class RenderedHeader:
    """A rendered file head.

    Args:
        content: the bytes before the tensor data, padded.
        offsets: absolute offset of each tensor.
        nbytes: size of the whole file.
    """

    content: bytes
    offsets: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file's head: name, shape (outermost first), type."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return GGML_TYPES[self.kind].size(self.shape)


def render_head(
    config: ModelConfig,
    documents: SourceDocuments,
    file_type: FileType,
    tensors: Sequence[TensorEntry],
    *,
    vocabulary: Vocabulary | None,
    mtp_layers: int,
    imatrix: Mapping[str, str | int] | None = None,
    vision: bool = False,
) -> RenderedHeader:
    """Render the head of a file.

    Args:
        config: the model's config.
        documents: the model's small files.
        file_type: type of the file.
        tensors: in the converter's order; a quantized file gets llama-quantize's.
        vocabulary: the tokenizer; None in a projector's file, or if unknown.
        mtp_layers: number of multi-token-prediction layers written.
        imatrix: the keys that describe an importance matrix.
        vision: whether this is the projector's file.
    """
    architecture = "clip" if vision else "qwen35moe" if config.moe else "qwen35"
    writer = GGUFWriter(None, architecture)
    for tensor in tensors:
        _add(writer, tensor.name, tensor)
    _general(writer, documents, vision=vision)
    if vision:
        _vision_keys(writer, config, documents, file_type)
    else:
        _text_keys(writer, config, file_type, mtp_layers)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    if vocabulary is not None:
        vocabulary.add_to(writer)
    if file_type.quantized:
        tensors = _as_quantized(writer, tensors, file_type, imatrix or {})
    return _head(writer, tensors)


def _add(writer: GGUFWriter, name: str, tensor: TensorEntry) -> None:
    kind = GGMLQuantizationType(GGML_TYPES[tensor.kind].code)
    shape = [int(size) for size in tensor.shape]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)


def _general(writer: GGUFWriter, documents: SourceDocuments, *, vision: bool) -> None:
    total, shared, expert, count = writer.get_total_parameter_count()
    try:
        metadata = gguf.Metadata.load(None, documents.folder, None, total)
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            "README.md", f"front matter that cannot be read ({reason})", hint="fix or remove it"
        ) from error
    metadata.name = metadata.name or documents.folder.name
    penalty = documents.json("generation_config.json").get("repetition_penalty")
    if metadata.sampling_penalty_repeat is None:
        metadata.sampling_penalty_repeat = penalty
    if metadata.size_label is None and total > 0:
        metadata.size_label = gguf.size_label(total, shared, expert, count)
    writer.add_type(gguf.GGUFType.MMPROJ if vision else gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)


def _text_keys(
    writer: GGUFWriter, config: ModelConfig, file_type: FileType, mtp_layers: int
) -> None:
    text = config.text_raw
    rope = {**text, **(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    layers = len(config.layer_types)
    writer.add_block_count(layers + mtp_layers)
    if "max_position_embeddings" in text:
        writer.add_context_length(int(_number(text, "max_position_embeddings")))
    writer.add_embedding_length(config.dims["hidden"])
    if "ffn" in config.dims:
        writer.add_feed_forward_length(config.dims["ffn"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    sections = _sections(rope)
    if "mrope_section" in rope:  # keys keep the order in which the converter adds them
        writer.add_rope_dimension_sections(sections)
    if "rope_theta" in rope:
        writer.add_rope_freq_base(_number(rope, "rope_theta"))
    writer.add_layer_norm_rms_eps(_number(text, "rms_norm_eps", 1e-6))
    if config.moe:
        writer.add_expert_count(config.dims["experts"])
        writer.add_expert_used_count(int(_number(text, "num_experts_per_tok", 8)))
    writer.add_key_length(config.dims["head"])
    writer.add_value_length(config.dims["head"])
    writer.add_file_type(file_type.code)
    if config.moe:
        writer.add_expert_feed_forward_length(config.dims["expert_ffn"])
        writer.add_expert_shared_feed_forward_length(config.dims["shared_ffn"])
    if mtp_layers:
        writer.add_nextn_predict_layers(mtp_layers)
    _ssm_keys(writer, config, rope, mtp_layers)
    if "mrope_section" not in rope:
        writer.add_rope_dimension_sections(sections)


def _number(section: Mapping[str, Any], key: str, default: float = 0) -> float:
    """Return a number from config.json that `ModelConfig` does not check."""
    value = section.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**32:
        raise ConfigError("config.json", f"{key} is {repr(value)[:80]}", expected="a number")
    return value


def _sections(rope: Mapping[str, Any]) -> list[int]:
    """Return ``mrope_section`` padded with zeros to four entries."""
    sections = rope.get("mrope_section", _MROPE)
    fits = isinstance(sections, list) and all(type(size) is int for size in sections)
    if not fits or not 1 <= len(sections) <= 4:
        found = f"mrope_section is {repr(sections)[:80]}"
        raise ConfigError("config.json", found, expected="at most four integers")
    return [*sections, 0, 0, 0][:4]


def _ssm_keys(
    writer: GGUFWriter, config: ModelConfig, rope: Mapping[str, Any], mtp_layers: int
) -> None:
    text = config.text_raw
    writer.add_ssm_conv_kernel(config.dims["conv"])
    writer.add_ssm_state_size(text["linear_key_head_dim"])
    writer.add_ssm_group_count(text["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config.dims["linear_heads"])
    writer.add_ssm_inner_size(config.dims["linear_value"])
    recurrent = [kind == "linear_attention" for kind in config.layer_types]
    recurrent += [False] * mtp_layers
    writer.add_array(f"{writer.arch}.attention.recurrent_layers", recurrent)
    writer.add_full_attention_interval(int(_number(text, "full_attention_interval", 4)))
    factor = _number(rope, "partial_rotary_factor", 0.25)
    writer.add_rope_dimension_count(int(config.dims["head"] * factor))


def _vision_keys(
    writer: GGUFWriter, config: ModelConfig, documents: SourceDocuments, file_type: FileType
) -> None:
    vision = config.raw["vision_config"]
    positions, patch = config.dims["vision_positions"], config.dims["vision_patch"]
    mean, deviation = _normalization(documents)
    writer.add_file_type(file_type.code)
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(config.dims["hidden"])
    writer.add_vision_image_size(vision.get("image_size") or int(math.sqrt(positions) * patch))
    writer.add_vision_patch_size(patch)
    writer.add_vision_embedding_length(config.dims["vision_hidden"])
    writer.add_vision_feed_forward_length(config.dims["vision_ffn"])
    writer.add_vision_block_count(config.vision_depth)
    writer.add_vision_head_count(vision["num_heads"])
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(deviation)
    writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN3VL)
    writer.add_vision_use_gelu(True)
    writer.add_vision_spatial_merge_size(vision["spatial_merge_size"])
    writer.add_vision_attention_layernorm_eps(_number(config.text_raw, "rms_norm_eps", 1e-6))
    deep = set(vision.get("deepstack_visual_indexes") or [])
    writer.add_vision_is_deepstack_layers([i in deep for i in range(config.vision_depth)])


def _normalization(documents: SourceDocuments) -> tuple[list[float], list[float]]:
    """Return mean and deviation of the pixels.

    Published sizes have no files here; zeros take the same number of bytes.
    """
    if not documents.complete:
        return [0.0] * 3, [0.0] * 3
    settings = documents.json("preprocessor_config.json")
    newer = documents.json("processor_config.json")
    settings = {**settings, **newer, **(newer.get("image_processor") or {})}
    values = settings.get("image_mean"), settings.get("image_std")
    if not all(isinstance(value, list) and len(value) == 3 for value in values):
        raise ConfigError(
            "preprocessor_config.json",
            "no image_mean and image_std",
            hint="the projector's file needs them: copy the file from the original checkpoint",
        )
    return [float(x) for x in values[0]], [float(x) for x in values[1]]  # type: ignore[union-attr]


def _as_quantized(
    writer: GGUFWriter,
    tensors: Sequence[TensorEntry],
    file_type: FileType,
    imatrix: Mapping[str, str | int],
) -> list[TensorEntry]:
    """Rearrange keys and tensors to the order and form that llama-quantize writes."""
    # llama-quantize copies the keys of its input and sets these two again, at the end.
    keys = writer.kv_data[0]
    for key in (gguf.Keys.General.QUANTIZATION_VERSION, gguf.Keys.General.FILE_TYPE):
        keys.pop(key)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(file_type.code)
    for key, value in imatrix.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.tensors = [{}]
    ordered = sorted(tensors, key=lambda tensor: mix_order(tensor.name))
    for tensor in ordered:
        shape = tensor.shape
        while len(shape) > 1 and shape[0] == 1:  # ggml drops outer dimensions of 1
            shape = shape[1:]
        _add(writer, tensor.name, TensorEntry(tensor.name, shape, tensor.kind))
    return ordered


def _head(writer: GGUFWriter, tensors: Sequence[TensorEntry]) -> RenderedHeader:
    buffer = io.BytesIO()
    writer.fout = cast("list[BufferedWriter]", [buffer])  # only write and flush are used
    writer.state = WriterState.EMPTY  # as if it had opened the buffer as its file
    writer.write_header_to_file()
    try:
        writer.write_kv_data_to_file()
    except struct.error as error:
        raise ConfigError(
            "generation_config.json", f"a value that is not a number ({error})"
        ) from error
    writer.write_ti_data_to_file()
    content = buffer.getvalue()
    content += bytes(-len(content) % ALIGNMENT)
    offsets, position = {}, len(content)
    for tensor in tensors:
        offsets[tensor.name] = position
        position += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    return RenderedHeader(content, offsets, position)
