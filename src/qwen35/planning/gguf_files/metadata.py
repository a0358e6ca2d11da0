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
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType
from gguf.gguf_writer import GGUFWriter, WriterState

from qwen35.checkpoint.header import strict_json
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.ggml.codec import BlockSpec
from qwen35.codecs.ggml.types import GGML_TYPES
from qwen35.errors import ConfigError
from qwen35.model.model_config import ModelConfig
from qwen35.model.rope import DEFAULT_LENGTH, RopeSettings, rope_of, usual_attention
from qwen35.planning.gguf_files.front_matter import checked_card
from qwen35.planning.gguf_files.mixes import FileType, mix_order
from qwen35.planning.gguf_files.vocabulary import Vocabulary
from qwen35.planning.sidecar_checks import check_generation
from qwen35.tensors import TensorSpec

__all__ = [
    "ALIGNMENT",
    "RenderedHeader",
    "SourceDocuments",
    "architecture_of",
    "documents_of",
    "keys_of",
    "model_name",
    "padded",
    "render_adapter_head",
    "render_head",
    "squeezed",
]

ALIGNMENT = 32
"""Tensors are padded to a multiple of this many bytes."""


def padded(size: int) -> int:
    """Return a size with its padding."""
    return size + -size % ALIGNMENT


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without outer dimensions of 1, which ggml drops."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


_CARD, _SAMPLING = "README.md", "generation_config.json"
_TEXT = (
    _CARD,
    "config.json",
    _SAMPLING,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
)
_VISION = ("preprocessor_config.json", "processor_config.json")
"""Small files that this package and the `gguf` library read, if present."""


def documents_of(*, vision: bool) -> tuple[str, ...]:
    """Return the small files whose content goes into GGUF files with or without a projector."""
    return (*_TEXT, *_VISION) if vision else _TEXT


_MAX_BYTES = 256 * 2**20
"""Bound on one of them, far above real ones."""

_MROPE = [11, 11, 10]
"""transformers' default for ``mrope_section``."""


def model_name(checkpoint: Checkpoint) -> str:
    """Return the base of file names: the repository's or the folder's name."""
    return checkpoint.title


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
        for name in documents_of(vision=True):
            if name in sizes and sizes[name] <= _MAX_BYTES:
                content = checkpoint.place.read(name, 0, sizes[name])
                if name == _CARD:
                    content = checked_card(content)
                (self.folder / name).write_bytes(content)

    @classmethod
    @contextmanager
    def of(cls, checkpoint: Checkpoint) -> Iterator[SourceDocuments]:
        """Read them into a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="qwen35-") as folder:
            yield cls(checkpoint, Path(folder))

    def json(self, name: str) -> dict[str, Any]:
        """Return a parsed JSON file; empty if missing.

        Raises:
            InputError: it is not valid, or not an object.
        """
        path = self.folder / name
        parsed = strict_json(path.read_bytes(), name) if path.is_file() else {}
        if not isinstance(parsed, dict):
            raise ConfigError(name, "not a JSON object")
        return parsed


@dataclass(frozen=True)
class RenderedHeader:
    """A rendered file head.

    Args:
        content: the bytes before the tensor data, padded.
        keys: where the keys end.
        records: where the tensors' records end, before the padding.
        offsets: absolute offset of each tensor.
        nbytes: size of the whole file.
    """

    content: bytes
    keys: int
    records: int
    offsets: Mapping[str, int]
    nbytes: int


def render_head(
    config: ModelConfig,
    documents: SourceDocuments,
    file_type: FileType,
    tensors: Sequence[TensorSpec],
    *,
    vocabulary: Vocabulary | None,
    mtp_layers: int,
    quantized: bool,
    imatrix: Mapping[str, str | int] | None = None,
    vision: bool = False,
) -> RenderedHeader:
    """Render the head of a file.

    Args:
        config: the model's config.
        documents: the model's small files.
        file_type: type of the file.
        tensors: `BlockSpec`s in the converter's order.
        vocabulary: the tokenizer; None in a projector's file, or if unknown.
        mtp_layers: number of multi-token-prediction layers written.
        quantized: whether keys and tensors get llama-quantize's order.
        imatrix: the keys that describe an importance matrix.
        vision: whether this is the projector's file.
    """
    writer = _filled(config, documents, file_type, tensors, vocabulary, mtp_layers, vision=vision)
    if quantized:
        tensors = _as_quantized(writer, tensors, file_type, imatrix or {})
    return _head(writer, tensors)


def render_adapter_head(
    config: ModelConfig, folder: Path, tensors: Sequence[TensorSpec], alpha: float
) -> RenderedHeader:
    """Render the head of an adapter's file.

    Args:
        config: the base's config.
        folder: the adapter's model card, in a folder of the adapter's name.
        tensors: `BlockSpec`s in the converter's order.
        alpha: what llama.cpp divides by the rank to get the factor of each product.
    """
    writer = GGUFWriter(None, architecture_of(config))
    for tensor in tensors:
        _add(writer, tensor.name, tensor)
    metadata = gguf.Metadata.load(None, folder, None, writer.get_total_parameter_count()[0])
    metadata.name = metadata.name or folder.name
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    metadata.set_gguf_meta_model(writer)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    return _head(writer, tensors)


def architecture_of(config: ModelConfig) -> str:
    """Return llama.cpp's name of the architecture of a text model."""
    return "qwen35moe" if config.moe else "qwen35"


def keys_of(
    config: ModelConfig,
    documents: SourceDocuments,
    file_type: FileType,
    tensors: Sequence[TensorSpec],
    *,
    vocabulary: Vocabulary | None,
    mtp_layers: int,
    vision: bool = False,
) -> dict[str, Any]:
    """Return the keys and values that `render_head` would write, without those of a quantizer."""
    writer = _filled(config, documents, file_type, tensors, vocabulary, mtp_layers, vision=vision)
    return {key: entry.value for key, entry in writer.kv_data[0].items()}


def _filled(
    config: ModelConfig,
    documents: SourceDocuments,
    file_type: FileType,
    tensors: Sequence[TensorSpec],
    vocabulary: Vocabulary | None,
    mtp_layers: int,
    *,
    vision: bool,
) -> GGUFWriter:
    """Return a writer with all keys and tensors, in the converter's order."""
    writer = GGUFWriter(None, "clip" if vision else architecture_of(config))
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
    return writer


def _add(writer: GGUFWriter, name: str, tensor: TensorSpec) -> None:
    # not the library's own member: it writes the number of types that it does not know as well
    kind = cast("GGMLQuantizationType", GGML_TYPES[tensor.dtype].code)
    shape = [int(size) for size in tensor.shape]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)


def _general(writer: GGUFWriter, documents: SourceDocuments, *, vision: bool) -> None:
    total, shared, expert, count = writer.get_total_parameter_count()
    sampling = documents.json(_SAMPLING)
    check_generation(_SAMPLING, sampling)
    path = documents.json("config.json").get("_name_or_path")
    if path is not None and not isinstance(path, str):
        found = f"_name_or_path is {repr(path)[:80]}"
        raise ConfigError("config.json", found, expected="text")
    metadata = gguf.Metadata.load(None, documents.folder, None, total)
    metadata.name = metadata.name or documents.folder.name
    if metadata.sampling_penalty_repeat is None:
        metadata.sampling_penalty_repeat = sampling.get("repetition_penalty")
    if metadata.size_label is None and total > 0:
        metadata.size_label = gguf.size_label(total, shared, expert, count)
    writer.add_type(gguf.GGUFType.MMPROJ if vision else gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)


def _text_keys(
    writer: GGUFWriter, config: ModelConfig, file_type: FileType, mtp_layers: int
) -> None:
    text = config.text_raw
    rope = rope_of(text)
    layers = len(config.layer_types)
    writer.add_block_count(layers + mtp_layers)
    writer.add_context_length(int(_number(text, "max_position_embeddings", DEFAULT_LENGTH)))
    writer.add_embedding_length(config.dims["hidden"])
    if "ffn" in config.dims:
        writer.add_feed_forward_length(config.dims["ffn"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    _scaling_keys(writer, rope)
    sections = _sections(rope.parameters)
    if "mrope_section" in rope.parameters:  # keys keep the converter's order
        writer.add_rope_dimension_sections(sections)
    writer.add_rope_freq_base(rope.theta)
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
    if "mrope_section" not in rope.parameters:
        writer.add_rope_dimension_sections(sections)


def _scaling_keys(writer: GGUFWriter, rope: RopeSettings) -> None:
    """Add the keys of scaled positions."""
    if rope.kind not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope.kind))
    writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "linear":
        return
    writer.add_rope_scaling_orig_ctx_len(rope.length)
    given = rope.parameters
    attention = "attention_factor" if "attention_factor" in given else "attn_factor"
    adders = {
        "extrapolation_factor": writer.add_rope_scaling_yarn_ext_factor,
        attention: writer.add_rope_scaling_yarn_attn_factor,
        "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
        "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
    }
    for key, add in adders.items():
        if given.get(key) is not None:
            add(_number(given, key))
    # The converter stops here, but llama.cpp does not read yarn_attn_factor for this family: it
    # derives the usual factor and multiplies it by this one.
    share = rope.attention / usual_attention(rope.factor)
    if share != 1:
        writer.add_rope_scaling_attn_factors(share)


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


def _ssm_keys(writer: GGUFWriter, config: ModelConfig, rope: RopeSettings, mtp_layers: int) -> None:
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
    writer.add_rope_dimension_count(int(config.dims["head"] * rope.partial))


def _vision_keys(
    writer: GGUFWriter, config: ModelConfig, documents: SourceDocuments, file_type: FileType
) -> None:
    vision = config.raw["vision_config"]
    positions, patch = config.dims["vision_positions"], config.dims["vision_patch"]
    mean, deviation = _normalization(documents)
    writer.add_file_type(file_type.code)
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(config.dims["hidden"])
    side = int(_number(vision, "image_size")) or int(math.sqrt(positions) * patch)
    writer.add_vision_image_size(side)
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
    deep = vision.get("deepstack_visual_indexes") or []
    if not isinstance(deep, list):
        found = f"deepstack_visual_indexes is {repr(deep)[:80]}"
        raise ConfigError("config.json", found, expected="a list of layers")
    writer.add_vision_is_deepstack_layers([i in deep for i in range(config.vision_depth)])


def _normalization(documents: SourceDocuments) -> tuple[list[float], list[float]]:
    """Return mean and deviation of the pixels.

    Published sizes have no files here; zeros take the same number of bytes.
    """
    if not documents.complete:
        return [0.0] * 3, [0.0] * 3
    settings = documents.json("preprocessor_config.json")
    newer = documents.json("processor_config.json")
    inner = newer.get("image_processor")
    settings = {**settings, **newer, **(inner if isinstance(inner, dict) else {})}
    values = settings.get("image_mean"), settings.get("image_std")
    if not all(_is_color(value) for value in values):
        raise ConfigError(
            "preprocessor_config.json",
            "no image_mean and image_std",
            expected="three numbers each",
            hint="the projector's file needs them: copy the file from the original checkpoint",
        )
    return [float(x) for x in values[0]], [float(x) for x in values[1]]  # type: ignore[union-attr]


def _is_color(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(number) in (int, float) and abs(number) < 2**32 for number in value)
    )


def _as_quantized(
    writer: GGUFWriter,
    tensors: Sequence[TensorSpec],
    file_type: FileType,
    imatrix: Mapping[str, str | int],
) -> list[TensorSpec]:
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
        shape = squeezed(tensor.shape)
        _add(writer, tensor.name, BlockSpec(tensor.name, tensor.dtype, shape))
    return ordered


def _head(writer: GGUFWriter, tensors: Sequence[TensorSpec]) -> RenderedHeader:
    buffer = io.BytesIO()
    writer.fout = cast("list[BufferedWriter]", [buffer])  # only write and flush are used
    writer.state = WriterState.EMPTY  # as if it had opened the buffer as its file
    writer.write_header_to_file()
    try:
        writer.write_kv_data_to_file()
    except (struct.error, AttributeError, OverflowError, TypeError, ValueError) as error:
        raise _unwritable(writer) or error from error
    keys = buffer.tell()
    writer.write_ti_data_to_file()
    content = buffer.getvalue()
    records = len(content)
    content += bytes(padded(records) - records)
    offsets, position = {}, len(content)
    for tensor in tensors:
        offsets[tensor.name] = position
        position += padded(tensor.nbytes)
    return RenderedHeader(content, keys, records, offsets, position)


_ORIGINS = (
    ("general.sampling.", _SAMPLING),
    ("general.", "the model's name, or its README.md"),
    ("tokenizer.", "the tokenizer's files"),
    ("", "config.json"),
)
"""Where the values of keys come from, by the start of the key."""


def _unwritable(writer: GGUFWriter) -> ConfigError | None:
    """Return an error about the value that cannot be written, or None if all can."""
    for key, entry in writer.kv_data[0].items():
        try:
            writer._pack_val(entry.value, entry.type, add_vtype=True, sub_type=entry.sub_type)
        except (struct.error, AttributeError, OverflowError, TypeError, ValueError) as error:
            origin = next(name for start, name in _ORIGINS if key.startswith(start))
            return ConfigError(origin, f"a value that {key} cannot hold ({error})")
    return None
