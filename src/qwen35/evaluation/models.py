"""What is measured: a checkpoint or a GGUF file, which engine runs it, and its vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from qwen35.planning.manifest import read_manifest
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
    """What turns text into token ids, apart from code.

    Args:
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: by id, padding included: as many as a row of logits has values.
        merges: in order, two tokens and a space between.
    """

    pre: str
    tokens: Sequence[str]
    merges: Sequence[str]

    def difference(self, base: TokenizerIdentity) -> tuple[str, str] | None:
        """Return what is here and what the base has instead; None if they are the same."""
        if len(self.tokens) != len(base.tokens):
            return f"a vocabulary of {len(self.tokens)}", str(len(base.tokens))
        for i, (mine, its) in enumerate(zip(self.tokens, base.tokens, strict=True)):
            if mine != its:
                return f"token {i} is {mine!r}", repr(its)
        if list(self.merges) != list(base.merges):
            return "other merges in its tokenizer", "the base's"
        return (f"pre-tokenizer {self.pre!r}", repr(base.pre)) if self.pre != base.pre else None


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to run.

    Args:
        name: what it is called in tables.
        path: a GGUF file or the folder of a checkpoint.
        engine: what runs it.
        stored: how its weights are stored: a GGUF file type, a codec's label or a dtype.
        exact: whether nothing in it is quantized.
        nbytes: bytes of its weight files.
        loaded: bytes that its weights take in memory.
        alphabet: its vocabulary.
        plan: digest of the plan that it was written by, if it has a manifest.
        sha256: of a GGUF file, if it has a manifest.
    """

    name: str
    path: Path
    engine: Engine
    stored: str
    exact: bool
    nbytes: int
    loaded: int
    alphabet: TokenizerIdentity
    plan: str | None = None
    sha256: str | None = None

    @property
    def width(self) -> int:
        """Values in a row of its logits."""
        return len(self.alphabet.tokens)

    def identity(self) -> list[object]:
        """Return what changes when its files change: name, size and time of each."""
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        rows = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        return [self.name, self.engine, rows]


def open_base(given: str, *, token: str | None = None) -> EvaluatedModel:
    """Open BASE: a checkpoint, or one GGUF file.

    Raises:
        InputError: it is quantized, or not a model.
        HubError: the Hub refused, or was not reached.
    """
    models = _open(given, token)
    if len(models) > 1:
        names = ", ".join(model.path.name for model in models)
        raise InputError(given, f"{len(models)} models in it ({names})", hint="name one as BASE")
    if not models[0].exact:
        raise InputError(
            models[0].name,
            f"stored as {models[0].stored}",
            expected="a checkpoint in bf16 or f16, or a GGUF file in F16, BF16 or F32",
            hint="give the unquantized model as BASE",
        )
    return models[0]


def open_candidates(given: Sequence[str], *, token: str | None = None) -> list[EvaluatedModel]:
    """Open candidates; a folder of GGUF files is as many candidates. Names are made unique.

    Raises:
        InputError: one is not a model.
        HubError: the Hub refused, or was not reached.
    """
    models = [model for text in given for model in _open(text, token)]
    counts = Counter(model.name for model in models)
    twice = [model for model in models if counts[model.name] > 1]
    if len({model.path.resolve() for model in models}) < len(models):
        raise InputError(twice[0].name, "given twice")
    return [_renamed(model) if model in twice else model for model in models]


def _renamed(model: EvaluatedModel) -> EvaluatedModel:
    return replace(model, name=f"{model.path.resolve().parent.name}/{model.name}")


def check_same_tokens(candidate: EvaluatedModel, base: EvaluatedModel) -> None:
    """Refuse a candidate that would read the base's token ids as other text.

    Raises:
        InputError: its vocabulary or tokenizer differs.
    """
    difference = candidate.alphabet.difference(base.alphabet)
    if difference is not None:
        found, expected = difference
        raise InputError(
            candidate.name,
            found,
            expected=f"{expected} as in {base.name}",
            hint="only models with the same tokenizer can be compared",
        )


def _open(given: str, token: str | None) -> list[EvaluatedModel]:
    found = gguf_files(given, token=token)
    if found is None:
        return [_checkpoint(given, token)]
    files = found.fetch(token)
    containers = [read_gguf(files, name) for name in files.names]
    models = [_gguf(c) for c in containers if c.keys.get("general.type", "model") == "model"]
    if not models:
        raise InputError(given, "no language model in it", expected="GGUF files of Qwen3.5")
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
        alphabet=TokenizerIdentity(str(keys.get("tokenizer.ggml.pre", "")), tokens, merges),
        plan=str(manifest["plan"]) if manifest and entry else None,
        sha256=entry["sha256"] if entry else None,
    )


def _codec(entry: GgufTensor) -> Codec:
    return CODECS[codec_name(entry.kind.name)]


def _checkpoint(given: str, token: str | None) -> EvaluatedModel:
    checkpoint = fetch(given, token=token)
    folder = checkpoint.folder()
    packed = [weight for weight in checkpoint.weights if is_packed(weight)]
    width = checkpoint.config.dims["vocab"]
    vocabulary = read_vocabulary(folder, width)
    manifest = read_manifest(LocalFolder(folder))
    name = checkpoint.repo.split("/")[-1] if checkpoint.repo else folder.resolve().name
    return EvaluatedModel(
        name=name,
        path=folder,
        engine="transformers",
        stored=min((codec_of(w).label for w in packed), default=checkpoint.config.dtype),
        exact=not packed,
        nbytes=sum(checkpoint.file_sizes.values()),
        loaded=sum(map(_in_memory, checkpoint.weights)),
        alphabet=TokenizerIdentity(
            vocabulary.pre, vocabulary.tokens, list(vocabulary.special.merges)
        ),
        plan=str(manifest["plan"]) if manifest else None,
    )


def _in_memory(weight: Weight) -> int:
    """Return what a weight takes in transformers: as stored, or decoded to float32."""
    codec = codec_of(weight)
    return weight.nbytes if codec.in_memory else 4 * codec.numel(weight)
