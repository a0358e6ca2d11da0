"""GGUF files as a subject: check their keys and tensors, match tensors with a source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from qwen35.checkpoint.gguf_header import GgufHeader, weights_of
from qwen35.checkpoint.gguf_parts import read_parts
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.open import GgufFiles, gguf_files
from qwen35.checkpoint.source import Checkpoint, FolderReader
from qwen35.codecs.ggml.types import GGML_TYPES
from qwen35.codecs.registry import codec_of
from qwen35.errors import Finding, InputError, UsageError
from qwen35.planning.gguf_files.adapter_tensors import adapter_tensors
from qwen35.planning.gguf_files.expected_tensors import KEYS, expected, missing_keys
from qwen35.planning.gguf_files.gguf_container import GgufContainer
from qwen35.planning.gguf_files.tensor_names import (
    UntypedTensor,
    mtp_tensors,
    text_tensors,
    vision_tensors,
)
from qwen35.progress import Progress
from qwen35.tensors import TensorSpec, Weight
from qwen35.threads import default_threads
from qwen35.verification.adapter_files_check import adapter_findings, compare_adapter_keys
from qwen35.verification.asking_engines import in_llama, prompted_file
from qwen35.verification.asking_prompts import PromptedArtifact
from qwen35.verification.behaviour import BehaviourResult
from qwen35.verification.foreign_files import foreign_findings
from qwen35.verification.gguf_keys import compare_keys
from qwen35.verification.gguf_sense import sense_findings, vocabulary_findings
from qwen35.verification.settings_comparison import SettingsComparison
from qwen35.verification.source_comparison import attempt, stranger_findings
from qwen35.verification.subject import (
    Engine,
    HeldWeight,
    SourceWeights,
    Subject,
    SubjectPart,
    TensorTable,
)

__all__ = ["GgufSubject", "container_findings"]

_VISION = "clip"
"""The architecture of a file that holds the vision tower."""


class GgufSubject(Subject):
    """GGUF files of one folder or repository, each a model by itself or one of a split model.

    Args:
        name: as the user gave it.
        files: from `qwen35.checkpoint.open.gguf_files`.

    Raises:
        HubError: the Hub refused, or was not reached.
    """

    suffix = ".gguf"

    def __init__(self, name: str, files: GgufFiles) -> None:
        super().__init__(name, files.place)
        self._found = files
        self._containers: dict[str, GgufHeader] = {}
        self._unreadable: list[Finding] = []
        for model in files.models:
            container, problems = read_parts(files, model)
            self._unreadable += [Finding("readable", f, e.message) for f, e in problems.items()]
            if container is not None:
                self._containers[container.path.name] = container

    # --- opened

    @classmethod
    def find(cls, name: str, token: str | None) -> Any:
        """Return the GGUF files, or None if there are none."""
        return gguf_files(name, token=token)

    @classmethod
    def refuse(cls, engine: Engine | None, tensor_parallel: int | None) -> None:
        """Refuse `--engine` and `--tensor-parallel`: GGUF files are asked in llama.cpp."""
        if engine:
            raise UsageError("--engine", "is for checkpoints", expected="llama.cpp, for GGUF")
        if tensor_parallel is not None:
            found = "there are no FP8 weights in GGUF"
            raise UsageError("--tensor-parallel", found, hint="leave it out")

    @classmethod
    def open(cls, name: str, found: Any, *, weights: bool, token: str | None) -> Subject:
        """Read the headers, on the Hub by range requests; with `weights`, download the files."""
        return cls(name, found.fetch(token) if weights else found)

    # --- structure

    @property
    def kind(self) -> str:
        """The container's name: a file holds many types."""
        return GgufContainer.name

    @property
    def vision(self) -> bool:
        """Whether a file holds the tower."""
        return any(one.architecture == _VISION for one in self._containers.values())

    @property
    def files(self) -> Sequence[str]:
        """The GGUF files, including unreadable ones."""
        return self._found.names

    @property
    def whole(self) -> bool:
        """Whether these are all GGUF files of the place."""
        return self._found.whole

    def structure(self) -> Iterator[Finding]:
        """Check each model by itself."""
        yield from self._unreadable
        for container in self._containers.values():
            yield from container_findings(container)
        if self.place is not None and self.whole:
            yield from foreign_findings(self.place)

    def tables(self, manifest: Mapping[str, Any]) -> Iterator[TensorTable]:
        """Yield one table per model, since models have tensors of the same names."""
        for container in self._containers.values():
            stored = {
                container.labelled(name): (f"{entry.kind.name} {list(_squeezed(entry.shape))}", "")
                for name, entry in container.tensors.items()
            }
            texts = {
                f"{file}: {name}": (str(text), "")
                for file in container.files
                for name, text in manifest["tensors"].get(file, {}).items()
            }
            yield TensorTable(stored, texts, _meaning)

    # --- numbers

    @cached_property
    def parts(self) -> Sequence[SubjectPart]:
        """The tensors of each model."""
        return [
            SubjectPart(file, one.nbytes, tuple(map(_held, weights_of(one))), True)
            for file, one in self._containers.items()
        ]

    def folder(self) -> Path:
        """Return the folder of the files."""
        if self._found.root is None:
            hint = "open them with their weights"
            raise InputError(self.name, "only the headers of its files are here", hint=hint)
        return self._found.root

    def stamps(self) -> list[Any]:
        """Return the folder, and the sizes and times of the files."""
        return [str(self.folder().resolve()), {n: list(s) for n, s in self._stamps.items()}]

    @cached_property
    def _stamps(self) -> dict[str, tuple[int, int]]:
        stamps = LocalFolder(self.folder()).stamps()
        return {name: stamps[name] for name in self.files if name in stamps}

    def reader(self) -> FolderReader:
        """Return a reader of the files in their present state."""
        return FolderReader(self.folder(), self._stamps)

    def originals(
        self, part: SubjectPart, source: Checkpoint, items: Sequence[InventoryItem]
    ) -> SourceWeights:
        """Match tensors with those that the converter would write; none may be missing."""
        container = self._containers[part.name]
        tensors = {tensor.name: tensor for tensor in _made_of(container, source, items)}
        findings = tuple(_source_findings(container, tensors))
        rows = {container.labelled(name): tensor.rows for name, tensor in tensors.items()}
        return SourceWeights(rows, findings, comparable=not findings)

    # --- source

    def strangers(self, source: Checkpoint) -> Iterator[Finding]:
        """Yield a finding for each file of other sizes."""
        for file, container in self._containers.items():
            layers = source.config.vision_depth
            there = {"experts": 0, **source.config.geometry, "vision layers": layers}
            yield from stranger_findings(file, source, _sizes(container), there)

    def settings(self, source: Checkpoint) -> SettingsComparison:
        """Compare the keys of each file."""
        result = SettingsComparison()
        for container in self._containers.values():
            if container.is_adapter:
                compare_adapter_keys(container, source, result)
            elif container.architecture in KEYS and not missing_keys(container):
                attempt(result, partial(compare_keys, container, source, result))
            else:
                result.skipped.append(f"{container.path.name}: its keys, which are not whole")
        return result

    # --- behaviour

    def ask(
        self, engine: Engine | None, threads: int | None, progress: Progress | None = None
    ) -> BehaviourResult:
        """Ask every text model in llama.cpp, which computes no MTP layer or adapter alone."""
        del engine
        texts = [one for one in self._containers.values() if one.architecture != _VISION]
        alone = {one.path.name: _alone(one) for one in texts if _alone(one)}
        result = in_llama(self._models(), threads or default_threads(), progress)
        notes = (f"{file}: not asked, it holds {what} alone" for file, what in alone.items())
        return replace(result, notes=(*result.notes, *notes))

    def prompted(self, threads: int | None) -> list[PromptedArtifact]:
        """Return every text model, for llama.cpp."""
        models = [prompted_file(one, threads or default_threads()) for one in self._models()]
        if not models:
            raise InputError(self.name, "holds no text model")
        return models

    def _models(self) -> list[GgufHeader]:
        texts = (one for one in self._containers.values() if one.architecture != _VISION)
        return [one for one in texts if not _alone(one)]


def _alone(container: GgufHeader) -> str:
    """Return what a file holds without the model that it goes with; empty if it is a model."""
    return "an adapter" if container.is_adapter else "the MTP layer" * container.mtp_alone


def _held(weight: Weight) -> HeldWeight:
    stored = weight.main.spec
    decoded = TensorSpec(weight.name, "F32", stored.shape)
    return HeldWeight(weight, decoded, f"{weight.main.file}: {weight.name}", stored.dtype)


def container_findings(container: GgufHeader) -> Iterator[Finding]:
    """Check keys, vocabulary and tensors of one model."""
    name = container.path.name
    if container.is_adapter:
        yield from adapter_findings(container)
        return
    if container.architecture not in KEYS:
        found = f"architecture {container.architecture!r}, expected {' or '.join(KEYS)}"
        yield Finding("metadata", name, found)
        return
    missing = missing_keys(container)
    yield from (Finding("metadata", name, f"no key {key}") for key in missing)
    if missing:
        return
    if container.architecture != _VISION:
        yield from vocabulary_findings(container)
    try:
        table = expected(container)
    except InputError as error:
        yield Finding("metadata", name, error.message)
        return
    unfit = list(_tensors(container, table))
    yield from unfit
    if unfit:  # what follows compares keys with the tensors
        return
    free = [one for one, tensor in table.items() if tensor.storage not in GGML_TYPES]
    yield from sense_findings(container, free)


def _tensors(container: GgufHeader, table: Mapping[str, UntypedTensor]) -> Iterator[Finding]:
    for name, tensor in table.items():
        entry, subject = container.tensors.get(name), container.labelled(name)
        if entry is None:
            yield Finding("tensors", subject, "missing, but the keys imply it")
            continue
        if _squeezed(entry.shape) != _squeezed(tensor.shape):
            message = f"shape {list(entry.shape)}, expected {list(tensor.shape)} by the keys"
            yield Finding("tensors", subject, message)
        if tensor.storage in GGML_TYPES and entry.kind.name != tensor.storage:
            message = f"{entry.kind.name}, but llama.cpp computes with it in {tensor.storage}"
            yield Finding("tensors", subject, message)
    scaled = _scaled(container, table)
    yield from _scale_findings(container, scaled)
    for name in _unknown(container, table, scaled):
        yield Finding("tensors", container.labelled(name), "not a tensor that the keys imply")


def _scaled(container: GgufHeader, table: Mapping[str, UntypedTensor]) -> list[Weight]:
    """Return the weights of `table` beside which llama.cpp reads the scales of their type."""
    weights = (weight for weight in weights_of(container) if weight.name in table)
    return [w for w in weights if codec_of(w).packs(table[w.name].rows.item.role)]


def _scale_findings(container: GgufHeader, scaled: Sequence[Weight]) -> Iterator[Finding]:
    """Yield scales of another shape, or missing though the file has them for other weights."""
    usual = {weight.storage for weight in scaled if weight.parts[1:]}
    for weight in scaled:
        held = {part.spec.name: part.spec for part in weight.parts}
        for scale in codec_of(weight).layout(weight.main.spec)[1:]:
            subject = container.labelled(scale.name)
            expected = f"{scale.dtype} {list(scale.shape)}"
            found = held.get(scale.name)
            if found is not None and (found.dtype, found.shape) != (scale.dtype, scale.shape):
                message = f"{found.dtype} {list(found.shape)}, expected {expected}"
                yield Finding("tensors", subject, message)
            elif found is None and weight.storage in usual:
                message = f"missing, but other {codec_of(weight).label} tensors have theirs"
                yield Finding("tensors", subject, message)


def _unknown(
    container: GgufHeader, table: Mapping[str, UntypedTensor], scaled: Sequence[Weight]
) -> list[str]:
    beside = {part.spec.name for weight in scaled for part in weight.parts[1:]}
    return sorted(container.tensors.keys() - table.keys() - beside)


def _sizes(container: GgufHeader) -> dict[str, Any]:
    """Return the sizes of a file by the names that `ModelConfig.geometry` has for them."""
    keys, name = container.keys, container.architecture
    if container.is_adapter:  # which has no keys of the model's
        return {}
    if name == _VISION:
        return {"vision layers": keys.get("clip.vision.block_count")}
    tokens, mtp = keys.get("tokenizer.ggml.tokens"), keys.get(f"{name}.nextn_predict_layers", 0)
    blocks = keys.get(f"{name}.block_count")
    sizes = {
        "experts": keys.get(f"{name}.expert_count", 0),
        "hidden": keys.get(f"{name}.embedding_length"),
        "ffn": keys.get(f"{name}.feed_forward_length"),
        "head": keys.get(f"{name}.attention.key_length"),
    }
    if type(blocks) is int and type(mtp) is int:
        sizes["layers"] = blocks - mtp
    if isinstance(tokens, list):
        sizes["vocab"] = len(tokens)
    return {key: size for key, size in sizes.items() if size is not None}


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without leading ones, which ggml does not store."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _meaning(text: str) -> str:
    """Normalize a manifest's type and shape: drop leading ones."""
    kind, _, shape = text.partition(" ")
    sizes = tuple(int(size) for size in shape.strip("[]").split(",") if size.strip().isdigit())
    return f"{kind} {list(_squeezed(sizes))}"


def _made_of(
    container: GgufHeader, source: Checkpoint, items: Sequence[InventoryItem]
) -> list[UntypedTensor]:
    """Return the tensors that the converter would write to such a file."""
    if container.is_adapter:
        return adapter_tensors(source, items)
    if container.architecture == _VISION:
        return vision_tensors(items)
    if container.mtp_alone:
        return mtp_tensors(items, source.config)
    mtp = bool(container.keys.get(f"{container.architecture}.nextn_predict_layers"))
    return text_tensors(items, source.config, mtp=mtp)


def _source_findings(
    container: GgufHeader, table: Mapping[str, UntypedTensor]
) -> Iterator[Finding]:
    """Yield the differences that make a file and the source incomparable."""
    for name, tensor in table.items():
        entry, subject = container.tensors.get(name), container.labelled(name)
        if entry is None:
            yield Finding("source", subject, "in the source, but not here")
        elif _squeezed(entry.shape) != _squeezed(tensor.shape):
            message = f"shape {list(entry.shape)}, the source has {list(tensor.shape)}"
            yield Finding("source", subject, message)
    for name in _unknown(container, table, _scaled(container, table)):
        yield Finding("source", container.labelled(name), "not in the source")
