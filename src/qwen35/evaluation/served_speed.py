"""Speed of a server: time to the first token and tokens per second, alone and under load."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen35.errors import EndpointError
from qwen35.serving.chat_replies import StreamedReply, streamed_chat
from qwen35.serving.served_model import ServedModel
from qwen35.serving.server_client import ServerClient
from qwen35.threads import detached_map

__all__ = ["ServedSpeed", "measure_served"]

_AT_ONCE = (1, 8)
_ROUNDS = 3
_GENERATED = 32
_MOST_PROMPT = 8192
"""Tokens of a prompt, if each of its characters is one, and the template adds a thousand."""

_LEAST = 1e-4
"""Seconds that any request takes."""

_KEPT_BACK = 0.05
"""Of the whole time: generating takes more."""

_SENTENCE = "The number of this line is {}, and it is followed by another. "
_SENTENCES = 30
"""About 500 tokens of a prompt."""

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class ServedSpeed:
    """Speed with a number of requests at once.

    Args:
        at_once: requests at a time.
        requests: that were made.
        first: seconds to the first token, at 50, 90 and 99 % of the requests.
        prompt: tokens of prompts per second until the first token, of all requests together; 0 if
            the server does not count them.
        generation: generated tokens per second, of all requests together.
    """

    at_once: int
    requests: int
    first: tuple[float, ...]
    prompt: float
    generation: float


def measure_served(client: ServerClient, served: ServedModel) -> list[ServedSpeed]:
    """Measure a server: one request at a time, then many.

    Raises:
        EndpointError: it refused or failed, or generates nothing.
    """
    _ask(client, served, 0)  # warm-up
    return [_round(client, served, count) for count in _AT_ONCE]


def _round(client: ServerClient, served: ServedModel, at_once: int) -> ServedSpeed:
    numbers = range(1000 * at_once, 1000 * at_once + _ROUNDS * at_once)
    begun = time.monotonic()
    replies = list(detached_map(lambda number: _ask(client, served, number), numbers, at_once))
    seconds = max(time.monotonic() - begun, _LEAST)
    first, rest = [one.first for one in replies], [one.seconds - one.first for one in replies]
    prompts = sum(one.reply.prompt_tokens or 0 for one in replies)
    tokens = sum(one.reply.completion_tokens or one.pieces for one in replies)
    if not all(one.pieces for one in replies):
        raise EndpointError(client.endpoint.url, "generates nothing")
    if tokens > len(replies) * _GENERATED or prompts > len(replies) * _MOST_PROMPT:
        found = f"counts {prompts} tokens of {len(replies)} prompts, and {tokens} generated ones"
        most = f"at most {len(replies) * _MOST_PROMPT} and {len(replies) * _GENERATED}"
        raise EndpointError(client.endpoint.url, found, expected=most)
    # Requests that run at once share the time to their first tokens.
    waited, spent = (max(sum(times) / at_once, _LEAST) for times in (first, rest))
    # A stream that comes all at once was kept back: it does not show when tokens were generated.
    kept_back = spent < _KEPT_BACK * seconds
    return ServedSpeed(
        at_once,
        len(replies),
        _percentiles(first),
        prompts / waited,
        tokens / (seconds if at_once > 1 or kept_back else spent),
    )


def _percentiles(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in np.percentile(values, PERCENTILES))


def _ask(client: ServerClient, served: ServedModel, number: int) -> StreamedReply:
    """Ask for a fixed number of tokens after a prompt of its own, which no cache knows."""
    text = "".join(_SENTENCE.format(97 * number + line) for line in range(_SENTENCES))
    request = {
        "model": served.name,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": _GENERATED,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    try:
        return streamed_chat(client, request)
    except EndpointError as error:
        if not error.refused:
            raise
        del request["ignore_eos"]
        return streamed_chat(client, request)
