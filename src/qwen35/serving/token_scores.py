"""Log probabilities of given tokens, from servers that tell them.

- vLLM: ``prompt_logprobs`` of ``/v1/completions``, for every token of a prompt at once (vLLM
  ``entrypoints/openai/completion/protocol.py``); -1 stands for the whole vocabulary.
- SGLang: ``return_logprob`` of ``/generate``, from ``logprob_start_len`` on (SGLang
  ``docs/basic_usage/native_api``).
- llama-server tells none of a prompt: one token is generated after each sampled position, with
  ``n_probs`` of ``/completion`` (``tools/server/README.md``), which come before any sampling.

A server tells the most likely tokens only; the rest of the probability is that of all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qwen35.array_types import F64, I64
from qwen35.errors import EndpointError
from qwen35.serving.json_values import count_in, list_in, number_in, text_in, value_in
from qwen35.serving.served_model import Dialect, ServedModel
from qwen35.serving.server_client import ANSWER_BYTES, ServerClient

__all__ = ["SAMPLED", "TokenScorer", "TokenScores"]

SAMPLED = 32
"""Positions of a chunk that are asked for where each is a request of its own."""

_TELLING = "vLLM, SGLang and llama-server do"

_WIDTHS = (256, 100, 20, 5)
"""Likely tokens to ask vLLM for, the most that it gives: by default 20."""

_LIKELY = {"sglang": 256, "llama.cpp": 1024}
_MOST_BYTES = 2**28
_ENTRY_BYTES = 256
"""Of the JSON for a token: about 100, with a text of everyday length."""

_LEAST = -1e4
"""vLLM's value for a probability of zero; llama-server's is the least float32."""

_SUM = 1.01
"""The most that probabilities in low precision may add up to."""

_Row = dict[int, float]


@dataclass(frozen=True)
class TokenScores:
    """Log probabilities at n positions.

    Args:
        places: [n] the positions: each predicts the token after it.
        targets: [n], of the actual token; NaN where it is not among the likely ones.
        ids: [n, k], the likely tokens; -1 where there are fewer.
        values: [n, k], theirs.
        texts: some tokens with the server's text for them.
    """

    places: I64
    targets: F64
    ids: I64
    values: F64
    texts: Mapping[int, str]


class TokenScorer:
    """Asks a server for log probabilities.

    Args:
        client: talks to the server.
        served: the model.

    Attributes:
        sampled: whether only some positions are asked for.
        likely: tokens of a row.

    Raises:
        EndpointError: the server tells no log probabilities of given tokens.
    """

    def __init__(self, client: ServerClient, served: ServedModel) -> None:
        self._client, self._served = client, served
        self.sampled = served.dialect == "llama.cpp"
        ask = _ASK.get(served.dialect)
        if ask is None:
            found = "tells no log probabilities of given tokens"
            raise EndpointError(client.endpoint.url, found, hint=_TELLING)
        self._ask = ask
        self.likely = _LIKELY.get(served.dialect) or self._widest()

    def _untold(self, error: EndpointError) -> EndpointError:
        """Return what to say of an error of a server that tells nothing about itself."""
        if self._served.dialect != "openai" or error.status in (0, 200, 401, 403):
            return error
        found = f"takes no token ids, or tells no log probabilities of them ({error.found})"
        return EndpointError(self._client.endpoint.url, found, hint=_TELLING)

    def _widest(self) -> int:
        """Return the most tokens that the server gives for a position."""
        for width in _WIDTHS:
            try:
                rows = list(_vllm(self._client, self._served, [1, 2, 3], [0, 1], width, {}))
            except EndpointError as error:
                if not error.refused or width == _WIDTHS[-1]:
                    raise self._untold(error) from error
                continue
            if len(rows) == 2 and all(rows):
                return width
        raise EndpointError(self._client.endpoint.url, "an answer without prompt_logprobs")

    def places(self, first: int, count: int) -> list[int]:
        """Return the positions to ask for, of `count` from `first` on."""
        if not self.sampled or count <= SAMPLED:
            return list(range(first, first + count))
        return [first + int(i) for i in np.linspace(0, count - 1, SAMPLED).round()]

    def scores(self, ids: Sequence[int], places: Sequence[int]) -> TokenScores:
        """Return the log probabilities of the tokens after `places`, and of the likely ones there.

        Raises:
            EndpointError: the server refused or failed, or tells nothing about a position.
        """
        texts: dict[int, str] = {}
        rows = []
        asked = self._ask(self._client, self._served, ids, places, self.likely, texts)
        for row, place in zip(asked, places, strict=True):
            if sum(map(math.exp, row.values())) > _SUM:
                message = f"probabilities of more than 1 for token {place + 1} of a prompt"
                raise EndpointError(self._client.endpoint.url, message)
            rows.append(row)
        width = max(map(len, rows), default=0)
        found = np.full((len(rows), width), -1, np.int64)
        values = np.full((len(rows), width), -np.inf)
        for number, row in enumerate(rows):
            found[number, : len(row)] = list(row)
            values[number, : len(row)] = list(row.values())
        pairs = zip(rows, places, strict=True)
        targets = np.array([row.get(ids[place + 1], np.nan) for row, place in pairs])
        return TokenScores(np.array(places, np.int64), targets, found, values, texts)


def _nothing(client: ServerClient, place: int) -> EndpointError:
    return EndpointError(client.endpoint.url, f"tells nothing about token {place + 1} of a prompt")


def _most(count: int, likely: int) -> int:
    """Return the bytes of an answer about `count` positions."""
    return min(_MOST_BYTES, ANSWER_BYTES + count * (likely + 1) * _ENTRY_BYTES)


_Entry = tuple[int | None, float | None, str | None]
"""What a server tells of a token: its number, log probability and text."""


def _row(
    client: ServerClient, place: int, entries: list[_Entry], likely: int, texts: dict[int, str]
) -> _Row:
    """Return a row; add the texts of its tokens to `texts`."""
    url = client.endpoint.url
    if len(entries) > likely + 2:  # beside them, the actual token and the generated one
        found = f"tells {len(entries)} tokens at a position, asked for {likely}"
        raise EndpointError(url, found)
    row: _Row = {}
    for token, value, text in entries:
        if token is None:
            continue
        if value is not None and value > 1e-3:
            found = f"a log probability above 0 for token {place + 1} of a prompt"
            raise EndpointError(url, found)
        if value is not None and value >= _LEAST:
            row[token] = min(value, 0.0)
        if text is not None:
            texts[token] = text
    return row


def _vllm(
    client: ServerClient,
    served: ServedModel,
    ids: Sequence[int],
    places: Sequence[int],
    likely: int,
    texts: dict[int, str],
) -> Iterator[_Row]:
    body = {
        "model": served.name,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": likely,
    }
    answer = client.post("/v1/completions", body, most=_most(len(ids), likely))
    told = list_in(answer, "choices", 0, "prompt_logprobs")
    for place in places:
        entries = value_in(told, place + 1)
        entries_told = [
            (
                int(name) if name.isdecimal() and len(name) < 10 else None,
                number_in(entry, "logprob"),
                text_in(entry, "decoded_token"),
            )
            for name, entry in (entries.items() if isinstance(entries, dict) else ())
        ]
        row = _row(client, place, entries_told, likely, texts)
        if ids[place + 1] not in row:
            raise _nothing(client, place)
        yield row


def _sglang(
    client: ServerClient,
    served: ServedModel,
    ids: Sequence[int],
    places: Sequence[int],
    likely: int,
    texts: dict[int, str],
) -> Iterator[_Row]:
    del served
    body = {
        "input_ids": list(ids),
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": likely,
        "return_text_in_logprobs": True,
    }
    answer = client.post("/generate", body, most=_most(len(ids), likely))
    told = value_in(answer, "meta_info")
    actual, tops = list_in(told, "input_token_logprobs"), list_in(told, "input_top_logprobs")
    for place in places:
        # Counted from the end: the first token, which nothing predicts, may be left out.
        back = place + 1 - len(ids)
        entries_told = [
            (count_in(entry, 1), number_in(entry, 0), text_in(entry, 2))
            for entry in [*list_in(tops, back), value_in(actual, back)]
        ]
        row = _row(client, place, entries_told, likely, texts)
        if ids[place + 1] not in row:
            raise _nothing(client, place)
        yield row


def _llama_cpp(
    client: ServerClient,
    served: ServedModel,
    ids: Sequence[int],
    places: Sequence[int],
    likely: int,
    texts: dict[int, str],
) -> Iterator[_Row]:
    for place in places:
        body = {
            "model": served.name,
            "prompt": list(ids[: place + 1]),
            "n_predict": 1,
            "n_probs": likely,
            "temperature": 0.0,
            "cache_prompt": True,
        }
        answer = client.post("/completion", body, most=_most(1, likely))
        entries_told = [
            (count_in(entry, "id"), number_in(entry, "logprob"), text_in(entry, "token"))
            for entry in list_in(answer, "completion_probabilities", 0, "top_logprobs")
        ]
        row = _row(client, place, entries_told, likely, texts)
        if not row:
            raise _nothing(client, place)
        yield row


_Ask = Callable[
    [ServerClient, ServedModel, Sequence[int], Sequence[int], int, dict[int, str]],
    Iterator[_Row],
]

_ASK: dict[Dialect, _Ask] = {
    "vllm": _vllm,
    "openai": _vllm,  # what stands before a vLLM may hide that it is one
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
}
