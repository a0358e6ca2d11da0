"""Models to evaluate: a checkpoint or GGUF file, the engine that runs it, and its tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from qwen35.checkpoint.adapter_files import Adapter
from qwen35.checkpoint.gguf_header import GgufHeader, GgufTensor
from qwen35.checkpoint.gguf_parts import read_model
from qwen35.checkpoint.inventory import match
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.open import fetch, gguf_files
from qwen35.checkpoint.reconciled import take
from qwen35.checkpoint.source import Checkpoint
from qwen35.checkpoint.split_gguf import title_of
from qwen35.codecs.codec import Codec
from qwen35.codecs.ggml.codec import codec_name
from qwen35.codecs.registry import CODECS, codec_of, is_packed
from qwen35.engines.simulated_inputs import served_inputs, unknown_inputs
from qwen35.errors import InputError, UsageError
from qwen35.planning.gguf_files.mixes import FILE_TYPES
from qwen35.planning.gguf_files.vocabulary import read_vocabulary
from qwen35.planning.manifest import quantized_source, read_manifest
from qwen35.planning.merged_source import with_adapters
from qwen35.planning.refinement import refined_codes
from qwen35.planning.sources import open_source
from qwen35.tensors import Weight

__all__ = [
    "Engine",
    "EvaluatedModel",
    "TokenizerIdentity",
    "check_same_tokens",
    "open_base",
    "open_candidates",
]

Engine = Literal["llama.cpp", "transformers", "transformers (streamed)", "server"]


@dataclass(frozen=True)
class TokenizerIdentity:
    """The data of a tokenizer, for comparison.

    Args:
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: by id, with padding: as many as a row of logits has values.
        merges: in order, two tokens separated by a space.
    """

    pre: str
    tokens: Sequence[str]
    merges: Sequence[str]

    def difference(self, base: TokenizerIdentity) -> tuple[str, str] | None:
        """Return the first difference as (this, the base's); None if they are the same."""
        if len(self.tokens) != len(base.tokens):
            return f"a vocabulary of {len(self.tokens)}", str(len(base.tokens))
        for i, (own, other) in enumerate(zip(self.tokens, base.tokens, strict=True)):
            if own != other:
                return f"token {i} is {own!r}", repr(other)
        if list(self.merges) != list(base.merges):
            return "other merges in its tokenizer", "the base's"
        return (f"pre-tokenizer {self.pre!r}", repr(base.pre)) if self.pre != base.pre else None


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to run.

    Args:
        name: its name in tables.
        path: a GGUF file, the first of a split model, or the folder of a checkpoint.
        engine: runs it.
        stored: storage format: a GGUF file type, a codec's label or a dtype.
        exact: whether nothing in it is quantized.
        nbytes: bytes of its weight files.
        loaded: bytes of its weights in memory.
        tokenizer: its tokenizer.
        plan: digest of the plan it was written by, if it has a manifest.
        sha256: of a GGUF file, if it has a manifest and is the whole model.
        codes: how its codes were chosen, by its manifest; empty if they are the nearest.
        decoded: format to the number of weights that its source held in it, by its manifest.
        served_inputs: how servers quantize the inputs of its layers when they run it; empty if they
            do not.
        unknown_inputs: whether they do it in a way that cannot be simulated.
        contradiction: how config.json describes other tensors than it has, if it does.
        simulated: whether it is run so.
        others: the other files of a split GGUF model.
        adapters: merged into it when it is loaded.
        tokenizer_folder: holds its tokenizer.
    """

    name: str
    path: Path
    engine: Engine
    stored: str
    exact: bool
    nbytes: int
    loaded: int
    tokenizer: TokenizerIdentity
    plan: str | None = None
    sha256: str | None = None
    codes: str = ""
    decoded: Mapping[str, int] = field(default_factory=dict)
    served_inputs: str = ""
    unknown_inputs: bool = False
    contradiction: str = ""
    simulated: bool = False
    others: tuple[Path, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    tokenizer_folder: Path = Path()

    @property
    def single(self) -> bool:
        """Whether it is a GGUF file, or the first of several."""
        return self.path.is_file()

    @property
    def loaded_as(self) -> tuple[Path, bool]:
        """What a model shares with its simulation; the base may have adapters."""
        return self.path, bool(self.adapters)

    def checkpoint(self) -> Checkpoint:
        """Open it, with its adapters; a GGUF model is read as a checkpoint."""
        return with_adapters(open_source(self.path), self.adapters)

    @property
    def simulation(self) -> EvaluatedModel:
        """The same model, with quantized inputs."""
        return replace(self, name=f"{self.name} (inputs quantized)", simulated=True)

    @property
    def simulable(self) -> bool:
        """Whether servers quantize inputs, and always in ways that can be simulated."""
        return bool(self.served_inputs) and not self.unknown_inputs

    @property
    def width(self) -> int:
        """Values in a row of its logits."""
        return len(self.tokenizer.tokens)

    def identity(self) -> list[object]:
        """Return what changes with its files: name, size and modification time of each."""
        files = (
            [self.path, *self.others] if self.single else sorted(self.path.glob("*.safetensors"))
        )
        rows = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        return [self.name, self.engine, rows, *self.effects()]

    def effects(self) -> list[object]:
        """Return what its adapters do, for comparison."""
        return [adapter.effect_json() for adapter in self.adapters]


def open_base(
    source: str,
    *,
    adapters: Sequence[Adapter] = (),
    token: str | None = None,
    alone: bool = False,
) -> EvaluatedModel:
    """Open BASE: a checkpoint, which adapters may change, or one GGUF file.

    Args:
        source: as the user named it.
        adapters: what changes the checkpoint's weights.
        token: for the Hub.
        alone: whether nothing is compared with it, so that it may be quantized.

    Raises:
        InputError: it is quantized, or not a model.
        UsageError: adapters are given with a GGUF file.
        HubError: the Hub refused, or was not reached.
    """
    models = _open(source, token, adapters)
    if len(models) > 1:
        names = ", ".join(model.path.name for model in models)
        raise InputError(source, f"{len(models)} models in it ({names})", hint="name one as BASE")
    if not models[0].exact and not alone:
        raise InputError(
            models[0].name,
            f"stored as {models[0].stored}",
            expected="a checkpoint in bf16 or f16, or a GGUF file in F16, BF16 or F32",
            hint="give the unquantized model as BASE",
        )
    return models[0]


def open_candidates(sources: Sequence[str], *, token: str | None = None) -> list[EvaluatedModel]:
    """Open candidates, each GGUF model of a folder as one; make their names unique.

    Files of a split model, given one by one, are one candidate.

    Raises:
        InputError: one is not a model.
        HubError: the Hub refused, or was not reached.
    """
    models: list[EvaluatedModel] = []
    for model in (model for source in sources for model in _open(source, token)):
        if not (model.others and model in models):  # the shell's *.gguf names all files of a split
            models.append(model)
    counts = Counter(model.path.resolve() for model in models)
    twice = next((model for model in models if counts[model.path.resolve()] > 1), None)
    if twice is not None:
        raise InputError(twice.name, "given twice")
    return _distinct(models)


def _distinct(models: Sequence[EvaluatedModel]) -> list[EvaluatedModel]:
    """Put folders in front of names that several models have, or a model and a simulation."""
    named = list(models)
    deepest = max((len(model.path.resolve().parts) for model in models), default=0)
    for depth in range(1, deepest):
        counts = Counter(model.name for model in named)
        if max(counts.values()) == 1:
            counts.update(model.simulation.name for model in named if model.simulable)
        if max(counts.values()) == 1:
            break
        named = [
            _renamed(model, depth) if counts[one.name] > 1 else one
            for model, one in zip(models, named, strict=True)
        ]
    return named


def _renamed(model: EvaluatedModel, depth: int) -> EvaluatedModel:
    folders = "/".join(model.path.resolve().parent.parts[-depth:])
    # In one folder, a model may be both split and in one piece.
    name = model.path.stem if model.others else model.name
    return replace(model, name=f"{folders}/{name}")


def check_same_tokens(candidate: EvaluatedModel, base: EvaluatedModel) -> None:
    """Refuse a candidate that would decode the base's token ids to other text.

    Raises:
        InputError: its vocabulary or tokenizer differs.
    """
    difference = candidate.tokenizer.difference(base.tokenizer)
    if difference is not None:
        found, expected = difference
        raise InputError(
            candidate.name,
            found,
            expected=f"{expected} as in {base.name}",
            hint="only models with the same tokenizer can be compared",
        )


def _open(source: str, token: str | None, adapters: Sequence[Adapter] = ()) -> list[EvaluatedModel]:
    located = gguf_files(source, token=token)
    if located is None:
        return [_checkpoint(with_adapters(fetch(source, token=token), adapters))]
    if adapters:
        hint = "give the checkpoint that it was made from"
        raise UsageError("--adapter", "given with a GGUF file as BASE", hint=hint)
    files = located.fetch(token)
    # A folder may also hold importance matrices and vision projectors, which have another type,
    # and an MTP layer alone, on which llama.cpp crashes as on a model of its own.
    containers = [one for n in files.models if not (one := read_model(files, n)).mtp_alone]
    models = [_gguf(c) for c in containers if c.keys.get("general.type", "model") == "model"]
    if not models:
        adapter = any(container.is_adapter for container in containers)
        hint = "merge the adapter: evaluate MODEL --adapter DIR" if adapter else ""
        expected = "GGUF files of Qwen3.5"
        raise InputError(source, "no language model in it", expected=expected, hint=hint)
    return models


def _gguf(container: GgufHeader) -> EvaluatedModel:
    path, keys = container.path, container.keys
    if container.architecture not in ("qwen35", "qwen35moe"):
        raise InputError(
            path.name, f"architecture {container.architecture!r}", expected="qwen35 or qwen35moe"
        )
    tokens, merges = (keys.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise InputError(path.name, "no vocabulary in it", expected="tokenizer.ggml.tokens, merges")
    # Every model gets the base's token ids, without the tokens that such a file expects.
    if keys.get("tokenizer.ggml.add_bos_token") or keys.get("tokenizer.ggml.add_eos_token"):
        raise InputError(path.name, "its tokenizer adds tokens", expected="that of Qwen3.5")
    code = keys.get("general.file_type")
    stored = next((name for name, row in FILE_TYPES.items() if row.code == code), "GGUF")
    manifest = read_manifest(LocalFolder(path.parent))
    entry = manifest["files"].get(path.name) if manifest else None
    return EvaluatedModel(
        name=title_of(container.files),
        path=path,
        engine="llama.cpp",
        stored=stored,
        exact=not any(_codec(entry).packed for entry in container.tensors.values()),
        nbytes=container.nbytes,
        loaded=container.nbytes,
        tokenizer=TokenizerIdentity(str(keys.get("tokenizer.ggml.pre", "")), tokens, merges),
        plan=str(manifest["plan"]) if manifest and entry else None,
        sha256=entry["sha256"] if entry and not container.others else None,
        codes=refined_codes(manifest, container.files) if entry else "",
        decoded=quantized_source(manifest if entry else None),
        others=tuple(path.with_name(name) for name in container.others),
    )


def _codec(entry: GgufTensor) -> Codec:
    return CODECS[codec_name(entry.kind.name)]


def _checkpoint(checkpoint: Checkpoint) -> EvaluatedModel:
    folder = checkpoint.folder()
    packed = [weight for weight in checkpoint.weights if is_packed(weight)]
    width = checkpoint.config.dims["vocab"]
    tokenizer = _tokenizer_folder(checkpoint)
    vocabulary = read_vocabulary(tokenizer, width)
    manifest = read_manifest(LocalFolder(folder))
    merged = checkpoint.adapters
    if merged:
        take(checkpoint, tower=False)  # adapters that do not fit are refused before anything runs
    onto = f" (as {merged[0].onto})" if merged and merged[0].onto else ""
    name = " + ".join([checkpoint.title + onto, *(adapter.weighted_title for adapter in merged)])
    return EvaluatedModel(
        name=name,
        path=folder,
        engine="transformers",
        stored=_label(packed) if packed and not merged else checkpoint.config.dtype,
        exact=not packed or bool(merged),  # merging decodes
        nbytes=sum(checkpoint.file_sizes.values()),
        loaded=sum(map(_in_memory, checkpoint.weights)),
        tokenizer=TokenizerIdentity(
            vocabulary.pre, vocabulary.tokens, list(vocabulary.special.merges)
        ),
        plan=str(manifest["plan"]) if manifest else None,
        codes="" if merged else refined_codes(manifest),
        decoded=quantized_source(manifest),
        served_inputs=served_inputs(checkpoint),
        unknown_inputs=unknown_inputs(checkpoint),
        contradiction=_contradiction(checkpoint),
        adapters=merged,
        tokenizer_folder=tokenizer,
    )


def _label(packed: Sequence[Weight]) -> str:
    """Return the format that holds most of the packed weights."""
    counts = Counter[str]()
    for weight in packed:
        counts[codec_of(weight).label] += codec_of(weight).numel(weight)
    return max(sorted(counts), key=counts.__getitem__)


def _contradiction(checkpoint: Checkpoint) -> str:
    """Return how config.json describes other packed tensors than there are; empty if it does not.

    What lies in the files is measured; engines go by config.json.
    """
    quantization = checkpoint.config.quantization or {}
    codecs = {codec_of(weight).name for weight in checkpoint.weights if is_packed(weight)}
    items, _ = match(checkpoint, tower=False)
    vision = checkpoint.config.architecture.vision
    found = (
        f"{finding.subject}: {finding.message}"
        for name in sorted(codecs)
        for finding in CODECS[name].config_findings(quantization, items, vision=vision)
        if finding.check == "quantization-config"
    )
    return next(found, "")


def _tokenizer_folder(checkpoint: Checkpoint) -> Path:
    """Return the folder of an adapter that has a tokenizer, or the checkpoint's."""
    needed = {"tokenizer.json", "tokenizer_config.json"}
    roots = (adapter.root for adapter in checkpoint.adapters if needed <= adapter.files.keys())
    return next(roots, checkpoint.folder())


def _in_memory(weight: Weight) -> int:
    """Return a weight's bytes in transformers: as stored, or decoded to float32."""
    codec = codec_of(weight)
    return weight.nbytes if codec.in_memory else 4 * codec.numel(weight)
