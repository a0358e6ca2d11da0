"""Open PEFT adapters: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen35.checkpoint.adapter_config import ADAPTER_CONFIG, AdapterConfig, parse_adapter_config
from qwen35.checkpoint.header import read_header, strict_json
from qwen35.checkpoint.locations import LocalFolder, expanded, folder_name, read_bounded
from qwen35.checkpoint.source import FolderReader
from qwen35.codecs.pieces import PIECE
from qwen35.errors import ConfigError, InputError, TensorError, UsageError
from qwen35.tensors import FLOAT_DTYPES, StoredTensor

__all__ = [
    "ADAPTER_WEIGHTS",
    "Adapter",
    "LoraTensors",
    "open_adapter",
    "open_adapters",
    "same_values",
]

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_MAX_CONFIG_BYTES = 8 * 2**20
_BEFORE = "base_model.model."
"""What peft writes before the names of a model's modules."""

_TOKENIZER = (
    "chat_template.jinja",
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
"""What trainers save beside an adapter; all but the template count with tokenizer.json alone."""

_PART = re.compile(
    r"(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)"
    r"(?:\.default)?(?:\.weight)?\Z",
    re.DOTALL,
)
_TRAINING = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What torch.compile, FSDP and activation checkpointing put into names while they train."""

_SHOWN = 8

_ORIGINAL, _TRAINED = ".original_module.", ".modules_to_save."
"""A module before training and after: peft saves both if the vocabulary was resized."""

_WRAPPED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.[^.]+\Z)")
"""What may stand between a module's name and a parameter that is held whole."""


@dataclass(frozen=True, eq=False)
class LoraTensors:
    """The matrices of one module.

    Args:
        module: its name, as in the model that the adapter was trained on; with ``.base_layer`` if
            peft wrapped another parameter of it too.
        parts: the tensors, by the names that peft gives them.
    """

    module: str
    parts: Mapping[str, StoredTensor]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An opened adapter.

    Args:
        name: the name the user gave it.
        root: its folder.
        factor: what its changes are multiplied by.
        config: its checked settings.
        loras: its low-rank modules, by name.
        whole: parameters that it holds whole, by name in the model.
        sha256: hash of its weights.
        config_sha256: hash of adapter_config.json.
        reader: reads its tensors; refuses files that have changed.
        place: where its files are.
        files: hash of each file of its tokenizer and chat template, by name.
        onto: the format whose values it changes; empty for the base's own.
    """

    name: str
    root: Path
    factor: float
    config: AdapterConfig
    loras: Mapping[str, LoraTensors]
    whole: Mapping[str, StoredTensor]
    sha256: str
    config_sha256: str
    reader: FolderReader
    place: LocalFolder
    files: Mapping[str, str]
    onto: str = ""

    @cached_property
    def title(self) -> str:
        """The name of its folder."""
        return folder_name(self.root)

    @property
    def path(self) -> str:
        """Where its weights are."""
        return str(self.root.absolute() / ADAPTER_WEIGHTS)

    def located(self, stored: StoredTensor) -> StoredTensor:
        """Return one of its tensors as a reader of the base takes it: its file by `path`."""
        return StoredTensor(stored.spec, self.path, stored.begin)

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a tensor that is `located`, starting at `offset`."""
        here = StoredTensor(tensor.spec, ADAPTER_WEIGHTS, tensor.begin)
        self.reader.read_into(here, offset, buffer)

    @property
    def weighted_title(self) -> str:
        """Its name, and its weight unless it is 1."""
        return self.title if self.factor == 1 else f"{self.title} (weight {self.factor:g})"

    def effect_json(self) -> dict[str, Any]:
        """Return what decides its effect: not where it is, nor what its folder is called."""
        hashes = {"sha256": self.sha256, "config_sha256": self.config_sha256}
        files = {"files": dict(self.files)} if self.files else {}
        onto = {"onto": self.onto} if self.onto else {}
        return {"weight": self.factor, **hashes, **files, **onto}

    def to_json(self) -> dict[str, Any]:
        """Return its name and effect, as manifests record them."""
        return {"name": self.title, **self.effect_json()}


def open_adapters(texts: Iterable[str | Path]) -> tuple[Adapter, ...]:
    """Open adapters given as ``DIR`` or ``DIR=WEIGHT``.

    Raises:
        UsageError: a weight is no number, or an adapter is given twice.
        InputError: one cannot be read.
    """
    adapters = tuple(open_adapter(*_split(str(text))) for text in texts)
    seen = set()
    for adapter in adapters:
        if adapter.root.resolve() in seen:
            raise UsageError("--adapter", f"{adapter.name} twice", hint="give it once, as DIR=2")
        seen.add(adapter.root.resolve())
    return adapters


def _split(text: str) -> tuple[str, float]:
    folder, separator, number = text.rpartition("=")
    if not separator or expanded(text).is_dir():
        return text, 1.0
    try:
        factor = float(number)
    except ValueError:
        return text, 1.0  # no such folder: the name, not the number, is at fault
    if not math.isfinite(factor) or factor == 0 or abs(factor) > 2**16:
        found = f"{number[:40]!r} as a weight"
        raise UsageError("--adapter", found, expected="a number other than 0, such as 0.5")
    return folder, factor


def open_adapter(name: str, factor: float = 1.0) -> Adapter:
    """Read the settings and the header of an adapter.

    Args:
        name: its folder.
        factor: what its changes are multiplied by.

    Raises:
        InputError: not a readable adapter in safetensors.
    """
    root = expanded(name)
    if not root.is_dir():
        found = "not a folder" if root.exists() else "no such folder"
        raise InputError(name, found, expected=f"a folder with {ADAPTER_CONFIG}")
    place = LocalFolder(root)
    _check_files(name, place.sizes(), root)
    text = read_bounded(root / ADAPTER_CONFIG, _MAX_CONFIG_BYTES)
    config = parse_adapter_config(strict_json(text, ADAPTER_CONFIG, ConfigError))
    header = read_header(place, ADAPTER_WEIGHTS)
    tensors = {
        name: StoredTensor(spec, ADAPTER_WEIGHTS, begin)
        for name, (spec, begin, _) in header.tensors.items()
    }
    reader = FolderReader(root, place.stamps())
    loras, whole = _grouped(tensors, reader)
    if not loras and not whole:
        raise InputError(ADAPTER_WEIGHTS, "no tensors in it", expected="those of an adapter")
    with (root / ADAPTER_WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Adapter(
        name,
        root,
        factor,
        config,
        loras,
        whole,
        digest,
        hashlib.sha256(text).hexdigest(),
        reader,
        place,
        _tokenizer_files(place),
    )


def _tokenizer_files(place: LocalFolder) -> dict[str, str]:
    """Return the hashes of the files of its tokenizer, and of its chat template."""
    sizes = place.sizes()
    names = _TOKENIZER if "tokenizer.json" in sizes else _TOKENIZER[:1]
    held = {name: place.read(name, 0, sizes[name]) for name in names if name in sizes}
    return {name: hashlib.sha256(content).hexdigest() for name, content in held.items()}


def _check_files(name: str, sizes: Mapping[str, int], root: Path) -> None:
    if ADAPTER_CONFIG not in sizes:
        inner = [p.parent.name for p in sorted(root.glob(f"*/{ADAPTER_CONFIG}"))[:_SHOWN]]
        hint = f"give one of the folders in it: {', '.join(inner)}" if inner else ""
        found = f"no {ADAPTER_CONFIG} in it"
        raise InputError(name, found, expected="an adapter saved by peft", hint=hint)
    if ADAPTER_WEIGHTS in sizes:
        return
    if "adapter_model.bin" in sizes:
        found = "adapter_model.bin is a pickle, which can run code: it is not read"
        hint = "save the adapter with safe_serialization=True"
        raise InputError(name, found, expected=ADAPTER_WEIGHTS, hint=hint)
    raise InputError(name, f"no {ADAPTER_WEIGHTS} in it", expected="an adapter saved by peft")


def _grouped(
    tensors: Mapping[str, StoredTensor], reader: FolderReader
) -> tuple[dict[str, LoraTensors], dict[str, StoredTensor]]:
    """Return the low-rank modules and the parameters held whole, by name."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        if not name.startswith(_BEFORE):
            hint = "merge it with peft"
            raise TensorError(name[:200], f"unknown, in {ADAPTER_WEIGHTS}", hint=hint)
        if stored.spec.dtype not in FLOAT_DTYPES:
            expected = ", ".join(FLOAT_DTYPES)
            raise TensorError(name[:200], f"{stored.spec.dtype}", expected=expected)
        inner = _TRAINING.sub("", name.removeprefix(_BEFORE))
        match = _PART.match(inner)
        if match is not None:
            _put(parts.setdefault(match["module"], {}), match["part"], stored)
        elif "lora" in inner:
            hint = "merge it with peft"
            raise TensorError(name[:200], "a part of LoRA that is not supported", hint=hint)
        elif _ORIGINAL not in name or name.replace(_ORIGINAL, _TRAINED) not in tensors:
            other = whole.get(_WRAPPED.sub("", inner))
            if other is None or not same_values(reader, stored, other):
                _put(whole, _WRAPPED.sub("", inner), stored)
    return {module: LoraTensors(module, found) for module, found in parts.items()}, whole


def same_values(reader: FolderReader, one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors of an adapter are the same: peft saves some of them twice."""
    if (one.spec.dtype, one.spec.shape) != (other.spec.dtype, other.spec.shape):
        return False
    size = one.spec.nbytes
    for begin in range(0, size, PIECE):
        parts = [bytearray(min(PIECE, size - begin)) for _ in range(2)]
        for stored, part in zip((one, other), parts, strict=True):
            reader.read_into(stored, begin, memoryview(part))
        if parts[0] != parts[1]:
            return False
    return True


def _put(table: dict[str, StoredTensor], key: str, stored: StoredTensor) -> None:
    if key in table:
        other = table[key].spec.name[:200]
        raise TensorError(stored.spec.name[:200], f"the same part as {other}")
    table[key] = stored
