"""What a server says about the model that it runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qwen35.errors import EndpointError, UsageError, did_you_mean
from qwen35.serving.hidden_keys import shown
from qwen35.serving.json_values import count_in, list_in, number_in, text_in, value_in
from qwen35.serving.server_client import ServerClient

__all__ = ["Dialect", "DraftCounts", "ServedModel", "draft_counts", "identify"]

Dialect = Literal["vllm", "sglang", "llama.cpp", "ollama", "tgi", "openai"]

_SHOWN = 200
_LISTED = 8
_COMPARED = 1000
"""Names of a server that a wrong one is compared with."""


@dataclass(frozen=True)
class ServedModel:
    """A model as its server describes it; what the server does not tell is None.

    Args:
        name: by which it is asked; `title` is for people.
        dialect: whose extensions of the OpenAI API the server has.
        server: the server's name and version.
        context: tokens of prompt and answer together.
        stored: how the weights are stored.
        sees: whether it takes pictures.
        speculation: how tokens are drafted.
        template: its chat template.
    """

    name: str
    dialect: Dialect = "openai"
    server: str | None = None
    context: int | None = None
    stored: str | None = None
    sees: bool | None = None
    speculation: str | None = None
    template: str | None = None

    @property
    def title(self) -> str:
        """The name, cut and printable, as text for people and records."""
        return shown(self.name, _SHOWN)

    @property
    def described(self) -> str:
        """What is known, in one line."""
        facts = (
            self.server,
            self.context and f"context {self.context}",
            self.stored,
            self.speculation and f"speculative decoding: {self.speculation}",
        )
        return ", ".join(fact for fact in facts if fact) or "the server tells nothing about it"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values, without the template."""
        values = {**asdict(self), "name": self.title}
        del values["template"]
        return values


def identify(client: ServerClient, name: str | None = None) -> ServedModel:
    """Find out what is served.

    Args:
        client: talks to the server.
        name: of the model; may be left out if the server has one only.

    Raises:
        EndpointError: the server was not reached, or lists no models.
        UsageError: it does not serve that model, or several.
    """
    rows = _listed(client, name)
    named = {text: row for row in rows if (text := text_in(row, "id"))}
    if name is None:
        name = _only(client, list(named))
    elif named and name not in named:
        near = [shown(one, _SHOWN) for one in list(named)[:_COMPARED]]
        hint, subject = did_you_mean(name[:_SHOWN], near), f"--model {shown(name, _SHOWN)}"
        raise UsageError(subject, "not served", expected=_some(named), hint=hint)
    row = named.get(name)
    dialect, describe = _OWNERS.get(text_in(row, "owned_by") or "", _STRANGER)
    model = ServedModel(name, dialect, context=count_in(row, "max_model_len"))
    return describe(client, model, row)


def _listed(client: ServerClient, name: str | None) -> list[Any]:
    """Return the rows of a server's list; a server without a list needs the model's name."""
    try:
        return list_in(client.get("/v1/models"), "data")
    except EndpointError as error:
        if name is None or not error.refused:
            raise
        return []


def _only(client: ServerClient, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    if not names:
        raise EndpointError(client.endpoint.url, "lists no model", hint="name it with --model")
    raise UsageError("--model", "missing", expected=f"one of {_some(names)}")


def _some(names: Mapping[str, Any] | list[str]) -> str:
    first = [shown(name, 80) for name in list(names)[:_LISTED]]
    return ", ".join([*first, *(["..."] if len(names) > _LISTED else [])])


def _asked(client: ServerClient, path: str, body: Any = None) -> Any:
    """Return what a server tells at a path that it may not have."""
    try:
        return client.get(path) if body is None else client.post(path, body)
    except EndpointError:
        return None


def _said(value: Any, *path: str | int) -> str | None:
    text = text_in(value, *path)
    return shown(text, _SHOWN) if text else None


def _vllm(client: ServerClient, model: ServedModel, row: Any) -> ServedModel:
    version = _said(_asked(client, "/version"), "version")
    root = _said(row, "root")
    return replace(
        model,
        server=f"vLLM {version}" if version else "vLLM",
        stored=f"from {root}" if root and root != model.name else None,
    )


def _sglang(client: ServerClient, model: ServedModel, row: Any) -> ServedModel:
    del row
    told = _asked(client, "/server_info") or _asked(client, "/get_server_info")
    version, kept = _said(told, "version"), _said(told, "quantization")
    return replace(
        model,
        server=f"SGLang {version}" if version else "SGLang",
        context=model.context or count_in(told, "context_length"),
        stored=kept or _said(told, "dtype"),
        speculation=_said(told, "speculative_algorithm"),
    )


def _llama_cpp(client: ServerClient, model: ServedModel, row: Any) -> ServedModel:
    told = _asked(client, "/props")
    size, count = number_in(row, "meta", "size"), number_in(row, "meta", "n_params")
    bits = f"{8 * size / count:.2f} bits a weight" if size and count else None
    file = (_said(told, "model_path") or "").rpartition("/")[2]
    sees = value_in(told, "modalities", "vision")
    drafts = value_in(told, "default_generation_settings", "speculative")
    return replace(
        model,
        server=f"llama-server {_said(told, 'build_info') or ''}".strip(),
        context=count_in(told, "default_generation_settings", "n_ctx"),
        stored=", ".join(filter(None, (_said(row, "meta", "ftype"), bits, file))) or None,
        sees=sees if isinstance(sees, bool) else None,
        speculation="on" if drafts is True else None,
        template=text_in(told, "chat_template"),
    )


def _stranger(client: ServerClient, model: ServedModel, row: Any) -> ServedModel:
    """Describe a model of Ollama, TGI, or of a server that says nothing about itself."""
    del row
    told = _asked(client, "/api/show", {"model": model.name})
    if isinstance(told, dict) and isinstance(told.get("details"), dict):
        version = _said(_asked(client, "/api/version"), "version")
        abilities = list_in(told, "capabilities")
        return replace(
            model,
            dialect="ollama",
            server=f"Ollama {version}" if version else "Ollama",
            stored=_said(told, "details", "quantization_level"),
            sees="vision" in abilities if abilities else None,
        )
    told = _asked(client, "/info")
    if count_in(told, "max_total_tokens") is None:
        return model
    return replace(
        model,
        dialect="tgi",
        server=f"TGI {_said(told, 'version') or ''}".strip(),
        context=count_in(told, "max_total_tokens"),
        stored=_said(told, "quantize") or _said(told, "model_dtype"),
    )


_Describe = Callable[[ServerClient, ServedModel, Any], ServedModel]

_OWNERS: dict[str, tuple[Dialect, _Describe]] = {
    "vllm": ("vllm", _vllm),
    "sglang": ("sglang", _sglang),
    "llamacpp": ("llama.cpp", _llama_cpp),
}
"""Who owns a model in a server's list, to the server."""

_STRANGER: tuple[Dialect, _Describe] = ("openai", _stranger)


@dataclass(frozen=True)
class DraftCounts:
    """Counters of speculative decoding since the server began.

    Args:
        drafted: tokens that were drafted.
        accepted: those of them that the model agreed with.
    """

    drafted: float
    accepted: float

    def since(self, before: DraftCounts) -> DraftCounts:
        """Return what was counted after `before`."""
        return DraftCounts(self.drafted - before.drafted, self.accepted - before.accepted)


_SAMPLE = re.compile(r"^(\w+):spec_decode_num_(draft|accepted)_tokens(?:_total)?(?:\{.*\})? (\S+)")
"""A line of vLLM's and of llama-server's metrics (in the text format of Prometheus)."""


def draft_counts(client: ServerClient) -> DraftCounts | None:
    """Return the counters of speculative decoding in a server's metrics; None if there are none."""
    try:
        text = client.text("/metrics")
    except EndpointError:
        return None
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            sums[match[2]] = sums.get(match[2], 0.0) + _counted(match[3])
    counts = DraftCounts(sums.get("draft", math.nan), sums.get("accepted", 0.0))
    return counts if math.isfinite(counts.drafted + counts.accepted) else None


def _counted(text: str) -> float:
    """Return a counter; NaN if it is none."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if 0 <= value < math.inf else math.nan
