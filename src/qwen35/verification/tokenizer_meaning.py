"""What the tokenizer's files mean together, however they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen35.checkpoint.locations import FileLocation
from qwen35.verification.settings_comparison import settings_of, text_of

__all__ = ["CONFIG", "TOKENIZER", "AddedToken", "TokenizerMeaning", "tokenizer_meaning"]

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
VOCABULARY = "vocab.json"
MERGES = "merges.txt"
ADDED = "added_tokens.json"
SPECIAL = "special_tokens_map.json"

_MAX_TEXT = 64 * 2**20

_MODEL: dict[str, Any] = {
    "byte_fallback": False,
    "continuing_subword_prefix": "",
    "dropout": None,
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "ignore_merges": False,
    "type": "BPE",
    "unk_token": None,
}
"""The model's settings with the value of one that is absent, which older versions did not write."""

_SETTINGS: dict[str, Any] = {
    "add_bos_token": False,
    "add_eos_token": False,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "errors": "replace",
    "model_max_length": None,
    "padding_side": "right",
    "split_special_tokens": False,
    "truncation_side": "right",
}
"""The same of tokenizer_config.json (transformers 5.23 ``Qwen2Tokenizer``)."""

_UNLIMITED = 10**30
"""``model_max_length`` from here on is none: what transformers writes where there was none."""

_UNKNOWN = "<|endoftext|>"
"""What transformers writes as ``unk_token`` where there was none; every text has tokens."""

_NO_MEANING = frozenset(
    {
        "added_tokens_decoder",
        "additional_special_tokens",
        "auto_map",
        "backend",
        "chat_template",
        "extra_special_tokens",
        "is_local",
        "local_files_only",
        "merges_file",
        "model_specific_special_tokens",
        "name_or_path",
        "processor_class",
        "special_tokens_map_file",
        "tokenizer_class",
        "tokenizer_file",
        "transformers_version",
        "vocab_file",
    }
)
"""Keys of tokenizer_config.json that say nothing about tokens, or that are compared elsewhere."""

_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary.

    Args:
        content: its text.
        flags: how text is searched for it, and whether it is special; None: the file does not say.
    """

    content: str
    flags: tuple[bool, ...] | None = None

    def fits(self, other: AddedToken | None) -> bool:
        """Whether two descriptions are of one token."""
        return other is not None and (
            (self.content == other.content and None in (self.flags, other.flags)) or self == other
        )


@dataclass(frozen=True)
class TokenizerMeaning:
    """The meaning of all files of a tokenizer.

    Args:
        vocabularies: file to token ids by token.
        merges: file to pairs that are merged, in order.
        added: file to added tokens by id.
        special: names of special tokens to their texts, and the set of all special texts.
        pipeline: what happens to text before and after the model, and the model's settings.
        settings: of tokenizer_config.json.
    """

    vocabularies: Mapping[str, Mapping[str, int]]
    merges: Mapping[str, list[tuple[str, ...]]]
    added: Mapping[str, Mapping[int, AddedToken]]
    special: Mapping[str, Any]
    pipeline: Mapping[str, Any]
    settings: Mapping[str, Any]

    def tokens(self) -> dict[int, AddedToken]:
        """Return the added tokens; tokenizer.json comes first, then tokenizer_config.json."""
        result: dict[int, AddedToken] = {}
        for file in (ADDED, CONFIG, TOKENIZER):
            result |= self.added.get(file, {})
        return result


def tokenizer_meaning(place: FileLocation) -> TokenizerMeaning:
    """Read the files of a tokenizer; missing ones are left out.

    Raises:
        InputError: a file is damaged.
    """
    tokenizer = settings_of(place, TOKENIZER)
    config = settings_of(place, CONFIG) or {}
    model = (tokenizer or {}).get("model")
    model = model if isinstance(model, dict) else {}
    vocabularies = {TOKENIZER: model.get("vocab"), VOCABULARY: settings_of(place, VOCABULARY)}
    added = {
        TOKENIZER: _rows((tokenizer or {}).get("added_tokens")),
        CONFIG: _decoder(config.get("added_tokens_decoder")),
        ADDED: _ids(settings_of(place, ADDED)),
    }
    merges = {TOKENIZER: _pairs(model.get("merges")), MERGES: _merges_file(place)}
    return TokenizerMeaning(
        {name: one for name, one in vocabularies.items() if isinstance(one, dict)},
        {name: one for name, one in merges.items() if one is not None},
        {name: one for name, one in added.items() if one},
        _special(config, settings_of(place, SPECIAL) or {}, added),
        _pipeline(tokenizer, model) if tokenizer is not None else {},
        _settings(config),
    )


def _rows(rows: Any) -> dict[int, AddedToken]:
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {row["id"]: _row(row) for row in rows if type(row.get("id")) is int}


def _decoder(decoder: Any) -> dict[int, AddedToken]:
    rows = decoder.items() if isinstance(decoder, dict) else ()
    return {int(i): _row(row) for i, row in rows if i.isdecimal() and isinstance(row, dict)}


def _ids(ids: Mapping[str, Any] | None) -> dict[int, AddedToken]:
    return {i: AddedToken(content) for content, i in (ids or {}).items() if type(i) is int}


def _row(row: Mapping[str, Any]) -> AddedToken:
    return AddedToken(str(row.get("content")), tuple(bool(row.get(flag)) for flag in _FLAGS))


def _pairs(merges: Any) -> list[tuple[str, ...]] | None:
    """Return merges as pairs; older files write a pair as one string."""
    if not isinstance(merges, list):
        return None
    return [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(map(str, _listed(m))) for m in merges
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _merges_file(place: FileLocation) -> list[tuple[str, ...]] | None:
    text = text_of(place, MERGES, _MAX_TEXT)
    if text is None:
        return None
    lines = text.split("\n")
    rest = lines[1:] if lines[0].startswith("#version") else lines
    return [tuple(line.rstrip("\r").split(" ")) for line in rest if line.strip()]


def _text(token: Any) -> Any:
    """Return the text of a special token, which may be given with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _special(
    config: Mapping[str, Any],
    mapped: Mapping[str, Any],
    added: Mapping[str, Mapping[int, AddedToken]],
) -> dict[str, Any]:
    specific = config.get("model_specific_special_tokens")
    specific = specific if isinstance(specific, dict) else {}
    named = {
        key: _text(value)
        for key, value in {**mapped, **specific, **config}.items()
        if key.endswith("_token") and not key.startswith("add_") and value is not None
    }
    if named.get("unk_token") == _UNKNOWN:
        del named["unk_token"]
    # A map that contradicts the config decides in older libraries.
    named |= {f"{key} of {SPECIAL}": text for key, text in _contradictions(mapped, config)}
    texts = {row.content for rows in added.values() for row in rows.values() if _is_special(row)}
    for section in (mapped, config):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            texts |= set(_texts(section.get(key)))
    return {**named, "special tokens": sorted(texts)}


def _contradictions(
    mapped: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    for key, value in mapped.items():
        if key.endswith("_token") and key in config and _text(value) != _text(config[key]):
            yield key, _text(value)


def _texts(tokens: Any) -> Iterator[str]:
    if isinstance(tokens, dict):
        tokens = list(tokens.values())
    for token in tokens if isinstance(tokens, list) else []:
        if isinstance(_text(token), str):
            yield _text(token)


def _is_special(token: AddedToken) -> bool:
    return token.flags is not None and token.flags[_FLAGS.index("special")]


def _pipeline(tokenizer: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: model.get(key, value) for key, value in _MODEL.items()}
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        settings[key] = settings[key] or ""
    return {
        **{f"model.{key}": value for key, value in settings.items()},
        "normalizer": _steps(tokenizer.get("normalizer"), "normalizers"),
        "pre_tokenizer": _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"),
        "post_processor": _steps(tokenizer.get("post_processor"), "processors", only_offsets=True),
        "decoder": [
            {"type": "ByteLevel"} if step.get("type") == "ByteLevel" else step
            for step in _steps(tokenizer.get("decoder"), "decoders")
        ],
        "truncation": tokenizer.get("truncation"),
        "padding": tokenizer.get("padding"),
    }


def _steps(part: Any, key: str, *, only_offsets: bool = False) -> list[dict[str, Any]]:
    """Return the steps of a component, a sequence or not, with their defaults filled in."""
    if not isinstance(part, dict):
        return []
    if part.get("type") == "Sequence" and isinstance(part.get(key), list):
        return [
            step for inner in part[key] for step in _steps(inner, key, only_offsets=only_offsets)
        ]
    step = {name: value for name, value in part.items() if value is not None}
    if step.get("type") == "ByteLevel":
        if only_offsets:  # after the model it changes offsets alone
            return []
        step.pop("trim_offsets", None)
        step = {"add_prefix_space": True, "use_regex": True, **step}
    return [{"invert": False, **step} if step.get("type") == "Split" else step]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    known = {
        key: value
        for key, value in config.items()
        if key not in _NO_MEANING and not key.endswith("_token") and value is not None
    }
    added = {key: config[key] for key in ("add_bos_token", "add_eos_token") if config.get(key)}
    length = config.get("model_max_length")
    if isinstance(length, int | float) and length >= _UNLIMITED:
        del known["model_max_length"]
    kind = str(config.get("tokenizer_class", "Qwen2Tokenizer")).removesuffix("Fast")
    if kind in ("PreTrainedTokenizer", "TokenizersBackend", "Qwen3_5Tokenizer"):
        kind = "Qwen2Tokenizer"  # what tokenizer.json says is all that these do
    return {**_SETTINGS, **known, **added, "tokenizer_class": kind}
