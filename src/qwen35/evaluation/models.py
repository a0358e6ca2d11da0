"""Models to evaluate: a checkpoint or GGUF file, the engine that runs it, and its tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from qwen35.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.open import fetch, gguf_files
from qwen35.codecs.codec import Codec
from qwen35.codecs.ggml.codec import codec_name
from qwen35.codecs.registry import CODECS, codec_of, is_packed
from qwen35.errors import InputError
from qwen35.planning.gguf_files.mixes import FILE_TYPES
from qwen35.planning.gguf_files.vocabulary import read_vocabulary
from qwen35.planning.manifest import quantized_source, read_manifest
from qwen35.tensors import Weight

__all__ = [
    "Engine",
    "EvaluatedModel",
    "TokenizerIdentity",
    "check_same_tokens",
    "open_base",
    "open_candidates",
]

Engine = Literal["llama.cpp", "transformers"]


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
        path: a GGUF file or the folder of a checkpoint.
        engine: runs it.
        stored: storage format: a GGUF file type, a codec's label or a dtype.
        exact: whether nothing in it is quantized.
        nbytes: bytes of its weight files.
        loaded: bytes of its weights in memory.
        tokenizer: its tokenizer.
        plan: digest of the plan it was written by, if it has a manifest.
        sha256: of a GGUF file, if it has a manifest.
        decoded: format to the number of weights that its source held in it, by its manifest.
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
    decoded: Mapping[str, int] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Values in a row of its logits."""
        return len(self.tokenizer.tokens)

    def identity(self) -> list[object]:
        """Return what changes with its files: name, size and modification time of each."""
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        rows = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        return [self.name, self.engine, rows]


def open_base(source: str, *, token: str | None = None) -> EvaluatedModel:
    """Open BASE: a checkpoint, or one GGUF file.

    Raises:
        InputError: it is quantized, or not a model.
        HubError: the Hub refused, or was not reached.
    """
    models = _open(source, token)
    if len(models) > 1:
        names = ", ".join(model.path.name for model in models)
        raise InputError(source, f"{len(models)} models in it ({names})", hint="name one as BASE")
    if not models[0].exact:
        raise InputError(
            models[0].name,
            f"stored as {models[0].stored}",
            expected="a checkpoint in bf16 or f16, or a GGUF file in F16, BF16 or F32",
            hint="give the unquantized model as BASE",
        )
    return models[0]


def open_candidates(sources: Sequence[str], *, token: str | None = None) -> list[EvaluatedModel]:
    """Open candidates, each GGUF file of a folder as one; make their names unique.

    Raises:
        InputError: one is not a model.
        HubError: the Hub refused, or was not reached.
    """
    models = [model for source in sources for model in _open(source, token)]
    counts = Counter(model.name for model in models)
    same_name = [model for model in models if counts[model.name] > 1]
    if len({model.path.resolve() for model in models}) < len(models):
        raise InputError(same_name[0].name, "given twice")
    return [_renamed(model) if model in same_name else model for model in models]


def _renamed(model: EvaluatedModel) -> EvaluatedModel:
    return replace(model, name=f"{model.path.resolve().parent.name}/{model.name}")


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


def _open(source: str, token: str | None) -> list[EvaluatedModel]:
    located = gguf_files(source, token=token)
    if located is None:
        return [_checkpoint(source, token)]
    files = located.fetch(token)
    # A folder may also hold importance matrices and vision projectors, which have another type.
    containers = [read_gguf(files, name) for name in files.names]
    models = [_gguf(c) for c in containers if c.keys.get("general.type", "model") == "model"]
    if not models:
        raise InputError(source, "no language model in it", expected="GGUF files of Qwen3.5")
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
        name=path.stem,
        path=path,
        engine="llama.cpp",
        stored=stored,
        exact=not any(_codec(entry).packed for entry in container.tensors.values()),
        nbytes=container.nbytes,
        loaded=container.nbytes,
        tokenizer=TokenizerIdentity(str(keys.get("tokenizer.ggml.pre", "")), tokens, merges),
        plan=str(manifest["plan"]) if manifest and entry else None,
        sha256=entry["sha256"] if entry else None,
        decoded=quantized_source(manifest if entry else None),
    )


def _codec(entry: GgufTensor) -> Codec:
    return CODECS[codec_name(entry.kind.name)]


def _checkpoint(source: str, token: str | None) -> EvaluatedModel:
    checkpoint = fetch(source, token=token)
    folder = checkpoint.folder()
    packed = [weight for weight in checkpoint.weights if is_packed(weight)]
    width = checkpoint.config.dims["vocab"]
    vocabulary = read_vocabulary(folder, width)
    manifest = read_manifest(LocalFolder(folder))
    name = checkpoint.title
    return EvaluatedModel(
        name=name,
        path=folder,
        engine="transformers",
        stored=min((codec_of(w).label for w in packed), default=checkpoint.config.dtype),
        exact=not packed,
        nbytes=sum(checkpoint.file_sizes.values()),
        loaded=sum(map(_in_memory, checkpoint.weights)),
        tokenizer=TokenizerIdentity(
            vocabulary.pre, vocabulary.tokens, list(vocabulary.special.merges)
        ),
        plan=str(manifest["plan"]) if manifest else None,
        decoded=quantized_source(manifest),
    )


def _in_memory(weight: Weight) -> int:
    """Return a weight's bytes in transformers: as stored, or decoded to float32."""
    codec = codec_of(weight)
    return weight.nbytes if codec.in_memory else 4 * codec.numel(weight)
