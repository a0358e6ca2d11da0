"""Checkpoints as a subject: check headers, index, config and template, match a source."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from qwen35.checkpoint.inventory import InventoryItem, match
from qwen35.checkpoint.locations import FileLocation
from qwen35.checkpoint.mistaken import LONGEST_HEAD, stand_in
from qwen35.checkpoint.open import describe, fetch, looks_like_artifact
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import INDEX_NAME, Checkpoint, FolderReader, Reader, read_json
from qwen35.codecs.codec import Codec
from qwen35.codecs.kv_cache import attention_of, cache_scale, check_cache_scale
from qwen35.codecs.plain.codec import Plain
from qwen35.codecs.registry import DIALECTS, codec_of, packings
from qwen35.errors import ConfigError, Finding, InputError, TensorError, UsageError
from qwen35.model.config_notes import config_notes, foreign_keys
from qwen35.model.model_config import ModelConfig
from qwen35.model.roles import MTP
from qwen35.model.rope import rope_of
from qwen35.planning.rows import rows_of
from qwen35.planning.safetensors_files.safetensors_container import SafetensorsContainer
from qwen35.planning.sidecar_checks import sidecar_problems
from qwen35.progress import Progress
from qwen35.verification.asking_engines import check_engine, in_engine, prompted_folder
from qwen35.verification.asking_prompts import PromptedArtifact
from qwen35.verification.behaviour import BehaviourResult
from qwen35.verification.chat_prompts import ChatPrompts, special_tokens
from qwen35.verification.foreign_files import foreign_findings
from qwen35.verification.memo import stamped
from qwen35.verification.settings_comparison import SettingsComparison, shown, text_of
from qwen35.verification.source_comparison import compare_checkpoints, stranger_findings
from qwen35.verification.subject import (
    Engine,
    HeldWeight,
    SourceWeights,
    Subject,
    SubjectPart,
    TensorTable,
)
from qwen35.verification.template_comparison import default_template, stored_templates
from qwen35.verification.unreadable import Unreadable

__all__ = ["CheckpointSubject"]

_TEMPLATE = "chat_template.jinja"
_MOST = 2**20
"""Bytes of a template that are read at most."""


class CheckpointSubject(Subject):
    """A checkpoint.

    Args:
        checkpoint: opened leniently (`qwen35.checkpoint.open`), so that faults become findings.

    Attributes:
        checkpoint: the checkpoint.

    Raises:
        UsageError: it is only the description of a published size.
    """

    suffix = ".safetensors"
    unlisted: ClassVar[Literal["files", "hash"]] = "hash"
    place: FileLocation

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.place is None:
            hint = "give a folder or a Hub id"
            raise UsageError(checkpoint.name, "only a description, nothing to verify", hint=hint)
        super().__init__(checkpoint.name, checkpoint.place)
        self.checkpoint = checkpoint

    # --- opened

    @classmethod
    def find(cls, name: str, token: str | None) -> Any:
        """Return the name: whatever is not of another container is taken for a checkpoint."""
        del token
        return name

    @classmethod
    def refuse(cls, engine: Engine | None, tensor_parallel: int | None) -> None:
        """Refuse an engine that is not installed."""
        del tensor_parallel
        check_engine(engine)

    @classmethod
    def open(cls, name: str, found: Any, *, weights: bool, token: str | None) -> Subject:
        """Open a checkpoint; one that exists but cannot be read becomes `Unreadable`."""
        del found
        opened = fetch if weights else describe
        try:
            return cls(opened(name, token=token, lenient=True))
        except InputError as error:
            if not looks_like_artifact(name):
                raise
            return Unreadable(name, error)

    # --- structure

    @property
    def kind(self) -> str:
        """The codec that packs weights, or the plain one if none does."""
        held = {item.codec for item in self.items}
        return next((name for name in _packings() if name in held), Plain.name)

    @property
    def vision(self) -> bool:
        """Whether config.json describes a vision tower."""
        return self.checkpoint.config.architecture.vision

    @property
    def files(self) -> Sequence[str]:
        """The files that the index names."""
        return tuple(self.checkpoint.file_sizes)

    @cached_property
    def _matched(self) -> tuple[tuple[InventoryItem, ...], list[TensorError]]:
        return match(self.checkpoint)

    @property
    def items(self) -> tuple[InventoryItem, ...]:
        """The weights that match config.json."""
        return self._matched[0]

    def structure(self) -> Iterator[Finding]:
        """Check packing, tensors, config, index and template."""
        problems = self.checkpoint.problems
        for problem in problems:
            settings = isinstance(problem, ConfigError)
            yield _finding("config", problem) if settings else _finding("packing", problem)
        known = {problem.subject for problem in problems}
        prefix = self.checkpoint.prefix
        if prefix is not None and prefix.refusal is not None:
            yield _finding("tensors", prefix.refusal)
        unfit = self._matched[1]
        yield from (_finding("tensors", p) for p in unfit if p.subject not in known)
        yield from self._config_findings()
        yield from self._index_findings()
        yield from self._misnamed_findings()
        yield from self._template_findings()
        yield from self._sidecar_findings()
        yield from foreign_findings(self.place)

    def _config_findings(self) -> Iterator[Finding]:
        config = self.checkpoint.config
        if self._empty_promise and MANIFEST_NAME in self.place.sizes():
            yield Finding("mtp", "config.json", self._empty_promise)
        quantization = config.quantization or {}
        method = quantization.get("quant_method")
        for codec in _packings().values():
            count = self._count(codec)
            if count and method != _method(codec):
                message = f"quant_method is {method!r}, but {count} weights are packed {codec.name}"
                yield Finding("quantization-config", "config.json", message)
        yield from dict.fromkeys(  # codecs of one method find the same
            finding
            for codec in self._promised()
            for finding in self._promise_findings(codec, quantization)
        )
        yield from self._cache_findings(quantization)
        yield from self._meaning_findings()

    def _promise_findings(self, codec: Codec, quantization: Mapping[str, Any]) -> Iterator[Finding]:
        yield from codec.config_findings(quantization, self.items, vision=self.vision)
        if self._count(codec):
            yield from codec.documents_findings(quantization, self._document)

    def _document(self, name: str) -> Any:
        """Return a JSON file beside config.json."""
        if name not in self.place.sizes():
            raise ConfigError(name, "is missing: some engines read it instead of config.json")
        return read_json(self.place, name)

    def _cache_findings(self, quantization: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield scales of a KV cache without a scheme that uses them, and the reverse."""
        ours = MANIFEST_NAME in self.place.sizes() and not self.checkpoint.cache_scales
        if self._empty_cache and ours:
            yield Finding("kv-cache", "config.json", self._empty_cache)
        count, scheme = len(self.checkpoint.cache_scales), quantization.get("kv_cache_scheme")
        if not count:
            return
        if not isinstance(scheme, dict):
            message = f"no kv_cache_scheme, but {count} scales of a KV cache: engines ignore them"
            yield Finding("kv-cache", "config.json", message)
            return
        forms = (codec.cache_form for codec in self._promised())
        expected = next((form.scheme for form in forms if form is not None), {})
        for key, value in expected.items():
            if scheme.get(key) != value:
                message = f"kv_cache_scheme: {key} is {scheme.get(key)!r}, expected {value!r}"
                yield Finding("kv-cache", "config.json", message)

    @property
    def _empty_cache(self) -> str:
        """What config.json says about scales of a KV cache if there are none; empty if nothing.

        Model-Optimizer stores none that are 1: a fault in our output, a note elsewhere.
        """
        quantization = self.checkpoint.config.quantization or {}
        names = (scale.spec.name for scale in self.checkpoint.cache_scales)
        of_mtp = [name.startswith(MTP) for name in names]
        if not all(of_mtp) or not quantization.get("kv_cache_scheme"):
            return ""
        none = "there are none but of MTP layers" if of_mtp else "there are none"
        return f"kv_cache_scheme promises scales of a KV cache, but {none}: engines take 1"

    def _meaning_findings(self) -> Iterator[Finding]:
        config = self.checkpoint.config
        for one in foreign_keys(config):
            message = f"{one.path} is {shown(one.value)}: transformers obeys it, the checks here "
            yield Finding("config", "config.json", f"{message}expect {one.row.why}")
        try:
            rope_of(config.text_raw)
        except ConfigError as error:
            yield Finding("config", "config.json", f"transformers refuses it: {error.message}")

    @property
    def notes(self) -> Iterator[str]:
        """What users of config.json should know."""
        if self._empty_promise and MANIFEST_NAME not in self.place.sizes():
            left = "as after transformers' save_pretrained or mlx-lm's converter"
            yield f"config.json: {self._empty_promise}, {left}"
        ours = MANIFEST_NAME in self.place.sizes() and not self.checkpoint.cache_scales
        if self._empty_cache and not ours:
            yield f"config.json: {self._empty_cache}"
        yield from self.checkpoint.notes
        yield from config_notes(self.checkpoint.config, head=self.checkpoint.layout.head)

    @property
    def _empty_promise(self) -> str:
        """What config.json says about MTP layers if there are none; empty if it is right.

        transformers leaves the promise when it saves: a fault in our output, a note elsewhere.
        """
        layers = self.checkpoint.config.mtp_layers
        if not layers or self.checkpoint.layout.mtp:
            return ""
        return f"mtp_num_hidden_layers is {layers}, but there is no mtp tensor"

    def _count(self, codec: Codec) -> int:
        return sum(item.codec == codec.name for item in self.items)

    def _promised(self) -> list[Codec]:
        """Return the codecs of config.json's method; if it has several, those with weights."""
        method = (self.checkpoint.config.quantization or {}).get("quant_method")
        candidates = [codec for codec in _packings().values() if _method(codec) == method]
        return [codec for codec in candidates if self._count(codec)] or candidates

    def _index_findings(self) -> Iterator[Finding]:
        sizes = self.place.sizes()
        for name in sizes:
            if name.endswith(self.suffix) and name not in self.checkpoint.file_sizes:
                yield Finding("files", name, self._unread(name))
        if INDEX_NAME not in sizes:
            return
        metadata = read_json(self.place, INDEX_NAME).get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        total, nbytes = metadata.get("total_size", "missing"), self.checkpoint.nbytes
        if total != nbytes and not self.checkpoint.problems:
            yield Finding("index", INDEX_NAME, f"total_size is {total}, the tensors have {nbytes}")

    def _misnamed_findings(self) -> Iterator[Finding]:
        """Yield files that a loader does not read, whatever the index says."""
        dialect = DIALECTS.get(self.checkpoint.dialect)
        for name in self.checkpoint.file_sizes if dialect else ():
            if dialect and not fnmatchcase(name, dialect.files):
                message = f"{dialect.programs[0].name} does not read it"
                yield Finding("files", name, f"{message}, expected a name like {dialect.files}")

    def _unread(self, name: str) -> str:
        """Why a safetensors file is no part of the checkpoint."""
        dialect = DIALECTS.get(self.checkpoint.dialect)
        if dialect and fnmatchcase(name, dialect.files):
            reader = dialect.programs[0].name
            return f"not read here, but {reader} reads every file named {dialect.files}"
        if self.checkpoint.unread:
            return f"not read by transformers, without {INDEX_NAME}; vLLM reads it"
        return f"not in {INDEX_NAME}: no loader reads it"

    def _template_findings(self) -> Iterator[Finding]:
        """Check the syntax of the template, and that it takes a question."""
        from qwen35.planning.safetensors_files.chat_template import compiles

        subject = _TEMPLATE
        try:
            if _TEMPLATE in self.checkpoint.sidecars:
                text = text_of(self.place, _TEMPLATE, _MOST) or ""
                known = stand_in(_TEMPLATE, text.encode()[:LONGEST_HEAD])
                if known is not None:
                    raise known
                compiles(text, _TEMPLATE)
            try:
                stored, tokens = stored_templates(self.place), special_tokens(self.place)
            except InputError:  # a damaged file is a finding of its own
                return
            chosen = default_template(stored)
            if chosen is not None:
                subject, template = chosen
                ChatPrompts(subject, template, tokens)
        except InputError as error:
            yield Finding("template", subject, error.message)

    def _sidecar_findings(self) -> Iterator[Finding]:
        """Yield sidecars that loaders cannot read, and links that lead nowhere."""
        dangling, sidecars = self.checkpoint.dangling, self.checkpoint.sidecars
        names = {*dangling, *sidecars} - {_TEMPLATE} | {_TEMPLATE} & dangling.keys()
        yield from (_finding("files", p) for p in sidecar_problems(self.checkpoint, names))

    def tables(self, manifest: Mapping[str, Any]) -> Iterator[TensorTable]:
        """Yield one table: a tensor may be in any file."""
        weights = (weight.parts for weight in self.checkpoint.weights)
        held = [self.checkpoint.in_files] if self.checkpoint.in_files else weights
        stored = {
            part.spec.name: (f"{part.spec.dtype} {list(part.spec.shape)}", part.file)
            for parts in (*held, self.checkpoint.cache_scales)
            for part in parts
        }
        planned = {
            name: (text, file)
            for file, tensors in manifest["tensors"].items()
            for name, text in tensors.items()
        }
        yield TensorTable(stored, planned)

    def sharding_findings(self, ranks: int) -> Iterator[Finding]:
        """Yield a finding for each weight that `ranks` GPUs cannot split in whole tiles.

        Raises:
            UsageError: neither config.json nor any weight uses a codec with tiles.
        """
        tiled = [codec for codec in _packings().values() if codec.tiled]
        promised = self._promised()
        used = [codec for codec in tiled if codec in promised or self._count(codec)]
        if not used:
            labels = " or ".join(codec.label for codec in tiled)
            found = f"there are no weights in blocks of {labels} here"
            raise UsageError("--tensor-parallel", found, hint="leave it out")
        for codec in used:
            yield from codec.tensor_parallel(self.checkpoint.config, self.items, ranks)

    # --- numbers

    @cached_property
    def parts(self) -> Sequence[SubjectPart]:
        """One part with all weights."""
        weights = [
            HeldWeight(i.weight, i.spec, i.weight.name, i.weight.storage) for i in self.items
        ]
        nbytes = sum(held.weight.nbytes for held in weights)
        return (SubjectPart(self.name, nbytes, tuple(weights)),)

    def folder(self) -> Path:
        """Return the checkpoint's folder."""
        return self.checkpoint.folder()

    def stamps(self) -> list[Any]:
        """Return the folder, and the sizes and times of its files."""
        return stamped(self.checkpoint)

    def reader(self) -> Reader:
        """Return a reader that raises if the checkpoint changes."""
        return Reader(self.checkpoint)

    def originals(
        self, part: SubjectPart, source: Checkpoint, items: Sequence[InventoryItem]
    ) -> SourceWeights:
        """Match weights by role, layer and expert; the tower or the MTP layer may be missing."""
        del part, source
        originals = _originals(items, {_key(item) for item in self.items})
        findings = list(_unmatched(self.items, originals))
        rows = {}
        for item in self.items:
            original = originals.get(_key(item))
            if original is None:
                continue
            here, there = list(item.spec.shape), list(original.spec.shape)
            if here == there:
                rows[item.weight.name] = rows_of(original)
                continue
            message = f"shape {here}, the source has {there}"
            findings.append(Finding("source", item.weight.name, message))
        return SourceWeights(rows, tuple(findings))

    def beside(self, reader: FolderReader, source: Checkpoint | None) -> Iterator[Finding]:
        """Check what engines ignore, and scales of a KV cache, also against those of the source."""
        yield from self._misread(reader)
        theirs = _cache_values(source) if source is not None else {}
        for scale in self.checkpoint.cache_scales:
            name = scale.spec.name
            try:
                value = cache_scale(bytes(reader.read(scale)), scale.spec.dtype)
                check_cache_scale(name, value)
            except (struct.error, KeyError):  # of a shape or dtype that the structure check names
                continue
            except InputError as error:
                yield Finding("kv-cache", name, error.message)
                continue
            original = theirs.get(_cache_key(name), value)
            if value != original:
                message = f"a scale of {value:g}, that of the source is {original:g}"
                yield Finding("kv-cache", name, message)

    def _misread(self, reader: FolderReader) -> Iterator[Finding]:
        """Yield weights that engines decode otherwise, by what config.json says."""
        if self.checkpoint.foreign is not None:
            return
        quantization = self.checkpoint.config.quantization or {}
        for item in self.items:
            with suppress(InputError):  # the check of the weight itself found it
                for why in codec_of(item.weight).misread(reader, item.weight, quantization):
                    yield Finding("quantization-config", item.weight.name, why)

    # --- source

    def strangers(self, source: Checkpoint) -> Iterator[Finding]:
        """Yield a finding if the sizes of text model or tower differ."""
        here, there = self.checkpoint.config, source.config
        yield from stranger_findings(self.name, source, _sizes(here), _sizes(there))

    def settings(self, source: Checkpoint) -> SettingsComparison:
        """Compare config, sampling, tokenizer, template and preprocessors."""
        mtp = any(item.role.scope == "mtp" for item in self.items)
        return compare_checkpoints(self.checkpoint, source, mtp=mtp)

    # --- behaviour

    def ask(
        self, engine: Engine | None, threads: int | None, progress: Progress | None = None
    ) -> BehaviourResult:
        """Ask it in the engine, by default transformers."""
        del threads
        return in_engine(engine, self.folder(), vision=self.vision, progress=progress)

    def prompted(self, threads: int | None) -> list[PromptedArtifact]:
        """Return the checkpoint, for transformers."""
        del threads
        return [prompted_folder(self.name, self.folder())]


def _sizes(config: ModelConfig) -> dict[str, int]:
    """Return the sizes that no conversion changes."""
    tower = {key: size for key, size in config.dims.items() if key.startswith("vision")}
    return {"experts": 0, **config.geometry, **tower}


def _packings() -> dict[str, Codec]:
    """Return the codecs that quantize in safetensors files, by name."""
    return packings(SafetensorsContainer.name)


def _method(codec: Codec) -> str:
    """Return the ``quant_method`` of a codec in config.json."""
    return codec.method or codec.name


def _finding(check: str, error: InputError) -> Finding:
    return Finding(check, error.subject, error.message)


def _cache_key(name: str) -> tuple[str, int]:
    """Return whose scale of a KV cache this is, whatever the prefix of text tensors."""
    module, kind = attention_of(name)
    return module if module.startswith(MTP) else module.rpartition("layers.")[2], kind


def _cache_values(source: Checkpoint) -> dict[tuple[str, int], float]:
    with Reader(source) as reader:
        return {
            _cache_key(one.spec.name): cache_scale(bytes(reader.read(one)), one.spec.dtype)
            for one in source.cache_scales  # `take` checked their shapes and dtypes
        }


_Key = tuple[str, int | None, int | None]


def _key(item: InventoryItem) -> _Key:
    return item.role.name, item.role.layer, item.role.expert


def _originals(items: Sequence[InventoryItem], wanted: Set[_Key]) -> dict[_Key, InventoryItem]:
    """Return a source's weights by key, with fused experts split where `wanted` has them so."""
    originals: dict[_Key, InventoryItem] = {}
    for item in items:
        parts = [item]
        if _key(item) not in wanted:
            parts = list(item.experts()) or parts
        originals |= {_key(part): part for part in parts}
    return originals


def _unmatched(
    items: Sequence[InventoryItem], originals: Mapping[_Key, InventoryItem]
) -> Iterator[Finding]:
    found = {_key(item) for item in items}
    for item in items:
        if _key(item) not in originals:
            yield Finding("source", item.weight.name, "the source has no such weight")
    scopes = {item.role.scope for item in items}
    whole = {scope for scope in ("visual", "mtp") if scope not in scopes}
    for key, item in originals.items():
        if key not in found and item.role.scope not in whole:
            yield Finding("source", item.weight.name, "in the source, but not here")
