"""The plan of an adapter's own GGUF files, which llama.cpp applies to the base as it runs it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from qwen35.checkpoint.adapter_files import Adapter
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.reconciled import take
from qwen35.checkpoint.source import Checkpoint
from qwen35.planning.gguf_files.adapter_tensors import adapter_tensors, only_adapter, stored_alpha
from qwen35.planning.gguf_files.front_matter import checked_card, without_folders
from qwen35.planning.gguf_files.gguf_options import GgufOptions
from qwen35.planning.gguf_files.gguf_plan import GgufFile, plan_of, specs_of
from qwen35.planning.gguf_files.metadata import model_name, render_adapter_head
from qwen35.planning.gguf_files.mixes import FILE_TYPES
from qwen35.planning.gguf_files.tensor_names import UntypedTensor
from qwen35.planning.gguf_files.type_choice import converted_kind, misfit_notes
from qwen35.planning.output_plan import Plan
from qwen35.planning.rules import Recipe

__all__ = ["make_adapter"]

_CARD = "README.md"
_MAX_CARD_BYTES = 2**24


def make_adapter(checkpoint: Checkpoint, recipe: Recipe, options: GgufOptions) -> Plan:
    """Plan the files of the adapter of a checkpoint, one for each type.

    Raises:
        TensorError: the adapter does not fit the base, or holds what llama.cpp cannot add.
        UsageError: there is no adapter, or there are several.
    """
    adapter = only_adapter(checkpoint)  # refused before its base is read
    base, items = take(checkpoint, tower=False)
    tensors = adapter_tensors(base, items)
    files, notes = [], list[str]()
    with tempfile.TemporaryDirectory(prefix="qwen35-") as folder:
        card = _card(adapter, Path(folder))
        for type_name in options.types:
            files.append(_file(base, adapter, type_name, tensors, card))
            notes += misfit_notes(files[-1].name, tensors, FILE_TYPES[type_name])
    notes += [f"llama.cpp adds it to the model: --lora {file.name}" for file in files[:1]]
    # its weights are read, not the base's: those on the Hub stay there
    base = replace(base, root=base.root or adapter.root)
    return plan_of(base, recipe, options, files, notes)


def _card(adapter: Adapter, folder: Path) -> Path:
    """Return a folder of the adapter's name with its model card, which the library reads."""
    named = folder / adapter.title
    named.mkdir()
    place = LocalFolder(adapter.root)
    size = place.sizes().get(_CARD, _MAX_CARD_BYTES)
    if size < _MAX_CARD_BYTES:
        content = checked_card(place.read(_CARD, 0, size))
        (named / _CARD).write_bytes(without_folders(content))
    return named


def _file(
    base: Checkpoint, adapter: Adapter, type_name: str, tensors: list[UntypedTensor], card: Path
) -> GgufFile:
    file_type = FILE_TYPES[type_name]
    kinds = {tensor.name: converted_kind(tensor, file_type) for tensor in tensors}
    parts = [part for t in tensors for part in specs_of(t, kinds[t.name])]
    head = render_adapter_head(base.config, card, parts, stored_alpha(adapter))
    name = f"{model_name(base)}-{adapter.title}-{type_name}-LoRA.gguf"
    return GgufFile.of(name, head, file_type, tensors, kinds, quantized=False)
