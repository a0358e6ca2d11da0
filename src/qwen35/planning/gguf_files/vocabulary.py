"""A checkpoint's tokenizer in the form that llama.cpp reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType
from gguf.gguf_writer import GGUFWriter
from gguf.vocab import SpecialVocab

from qwen35.checkpoint.header import strict_json
from qwen35.errors import ConfigError

__all__ = ["PRE_TOKENIZERS", "Vocabulary", "read_vocabulary"]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[str, str] = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}": "qwen35",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}": "qwen2",
}
"""llama.cpp's names by split pattern of tokenizer.json (``src/llama-vocab.cpp``).

The converter hashes the token ids of a sample text instead, so it refuses new vocabularies.
"""


@dataclass(frozen=True)
class Vocabulary:
    """The content of the ``tokenizer.*`` keys.

    Args:
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: tokens by id.
        types: `gguf.constants.TokenType` by id.
        special: merges, special tokens and the chat template, as the `gguf` library reads them.
        nfc: whether the tokenizer normalizes text to NFC, which llama.cpp does not.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    special: SpecialVocab
    nfc: bool

    def add_to(self, writer: GGUFWriter) -> None:
        """Add the keys in the converter's order."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        with _library_errors():
            self.special.add_to_gguf(writer, quiet=True)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Read the tokenizer files in `folder`; ids below `size` without a token become padding.

    Raises:
        ConfigError: the tokenizer is missing, or llama.cpp does not support it.
    """
    tokenizer = _json(folder, "tokenizer.json")
    settings = _json(folder, "tokenizer_config.json")
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not model.get("merges"):
        raise ConfigError("tokenizer.json", "not a BPE tokenizer", expected="that of Qwen3.5")
    vocabulary, added = _vocabulary(model), _added(tokenizer, settings)
    tokens, types = _tokens(vocabulary, added, size)
    with _library_errors():
        special = SpecialVocab(folder, load_merges=True)
    # llama.cpp's own copy of the library sets this; the one on PyPI does not.
    if any(step.get("type") == "ByteLevel" for step in _steps(tokenizer, "post_processor")):
        special.add_special_token = {"bos": False, "eos": False}
    nfc = any(step.get("type") == "NFC" for step in _steps(tokenizer, "normalizer"))
    return Vocabulary(_pre_tokenizer(tokenizer), tokens, types, special, nfc)


@contextmanager
def _library_errors() -> Iterator[None]:
    """Turn the gguf library's exceptions on malformed settings into a `ConfigError`."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = f"cannot be read ({type(error).__name__}: {error})"
        raise ConfigError("tokenizer_config.json or a chat template", found) from error


def _json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ConfigError(name, "missing", hint="copy that of the original beside the weights")
    parsed = strict_json(path.read_bytes(), name)
    if not isinstance(parsed, dict):
        raise ConfigError(name, "not a JSON object")
    return parsed


def _vocabulary(model: Mapping[str, Any]) -> dict[int, str]:
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or not all(type(i) is int for i in vocabulary.values()):
        raise ConfigError("tokenizer.json", "malformed vocab", expected="token to id")
    return {i: token for token, i in vocabulary.items()}


def _added(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the added tokens by id; tokenizer.json overrides tokenizer_config.json."""
    decoder = settings.get("added_tokens_decoder")
    rows = [
        {"id": int(i), **row}
        for i, row in (decoder.items() if isinstance(decoder, dict) else ())
        if str(i).isdecimal() and isinstance(row, dict)
    ]
    rows += [row for row in tokenizer.get("added_tokens") or [] if isinstance(row, dict)]
    added = {row["id"]: row for row in rows if type(row.get("id")) is int and "content" in row}
    if not all(isinstance(row["content"], str) for row in added.values()):
        raise ConfigError("tokenizer.json", "an added token that is not text")
    return dict(sorted(added.items()))


def _tokens(
    vocabulary: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], size: int
) -> tuple[list[str], list[int]]:
    highest = max((*vocabulary, *added), default=-1)
    if highest < 0:
        raise ConfigError("tokenizer.json", "no tokens in it")
    if highest >= size:  # the embedding has no row for it
        raise ConfigError(
            "tokenizer.json", f"token id {highest}", expected=f"below vocab_size {size}"
        )
    tokens, types = [], []
    for i in range(size):
        if i in added:
            token, kind = _added_token(added[i])
        elif i in vocabulary:
            token, kind = vocabulary[i], TokenType.NORMAL
        else:
            token, kind = f"[PAD{i}]", TokenType.UNUSED  # the converter's name
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _added_token(row: Mapping[str, Any]) -> tuple[str, TokenType]:
    """Return an added token and its type; ``<|...|>`` counts as special, as upstream."""
    token = str(row["content"])
    if row.get("special") or (token.startswith("<|") and token.endswith("|>")):
        return token, TokenType.CONTROL
    return token.replace("\u2581", " "), TokenType.USER_DEFINED  # SentencePiece's space


def _steps(tokenizer: Mapping[str, Any], part: str) -> Iterator[Mapping[str, Any]]:
    """Yield a component of a tokenizer, or the members of a sequence."""
    whole = tokenizer.get(part)
    if not isinstance(whole, dict):
        return
    for key in ("processors", "normalizers", "pretokenizers"):
        if isinstance(whole.get(key), list):
            yield from (step for step in whole[key] if isinstance(step, dict))
            return
    yield whole


def _pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    for step in _steps(tokenizer, "pre_tokenizer"):
        pattern = step.get("pattern")
        if step.get("type") == "Split" and isinstance(pattern, dict):
            name = PRE_TOKENIZERS.get(str(pattern.get("Regex")))
            if name is not None:
                return name
            found = f"split pattern {str(pattern.get('Regex'))[:80]!r}..."
            raise ConfigError("tokenizer.json", found, expected="that of Qwen3.5 or Qwen2")
    raise ConfigError("tokenizer.json", "no split pattern", expected="that of Qwen3.5 or Qwen2")
