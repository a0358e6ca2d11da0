"""Candidates that a server runs: their divergence from the base by the server's log probabilities.

With K the tokens that the server tells at a position, p the base's and q the server's probability,

    sum over K of p (log p - log q) + r log(r / s)        r = 1 - sum of p, s = 1 - sum of q

counts all other tokens as one, and is never above the divergence (log sum inequality). It misses
``r KL(others of the base || others of the server)``, which is at most
``H + r (log s - log q(least likely))`` with H the sum over the others of p log(p / r). Servers do
not tell their least likely token: the bound takes the base's for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from qwen35.array_types import F64, I64
from qwen35.errors import InputError
from qwen35.evaluation.divergence import Series
from qwen35.evaluation.models import EvaluatedModel
from qwen35.evaluation.reference import ChunkComparison, Reference
from qwen35.evaluation.text_chunks import Decode, TokenChunks
from qwen35.serving.endpoint import Endpoint
from qwen35.serving.hidden_keys import shown
from qwen35.serving.served_model import ServedModel, identify
from qwen35.serving.server_client import ServerClient
from qwen35.serving.token_scores import TokenScorer, TokenScores

__all__ = [
    "NOT_ASKED",
    "ServedCandidate",
    "ServedTarget",
    "at_asked",
    "compared",
    "open_served",
    "served_candidate",
]

NOT_ASKED = np.nan
"""The divergence at a position that the server was not asked about."""

_TEXTS = 64
_LOST = "\ufffd"
_LEAST = 1e-12


def served_candidate(
    endpoint: Endpoint, served: ServedModel, base: EvaluatedModel
) -> EvaluatedModel:
    """Return a served model as a candidate; its tokens are those of the base, or it is refused."""
    place = urlsplit(endpoint.url).netloc
    return EvaluatedModel(
        name=f"{served.title} at {place}",
        path=Path(f"{place}/{served.title}"),
        engine="server",
        stored=served.stored or served.server or "served",
        exact=False,
        nbytes=0,
        loaded=0,
        tokenizer=base.tokenizer,
    )


class ServedCandidate:
    """A model that a server runs.

    Args:
        target: the candidate and its server.
        decode: decodes the base's tokens.

    Raises:
        EndpointError: the server tells no log probabilities of given tokens.
    """

    def __init__(self, target: ServedTarget, decode: Decode) -> None:
        self.model, self._decode = target.model, decode
        self._client = ServerClient(target.endpoint)
        self._scorer = TokenScorer(self._client, target.served)
        self._checked = False

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def compare(self, reference: Reference, chunks: TokenChunks, index: int) -> ChunkComparison:
        """Compare the server's probabilities for a chunk with the base's.

        Raises:
            EndpointError: the server refused or failed.
            InputError: its tokens are not the base's.
        """
        ids = [int(i) for i in chunks.ids[index]]
        places = self._scorer.places(chunks.first, chunks.scored)
        scores = self._scorer.scores(ids, places)
        if not self._checked:
            self._check_texts(scores)
            self._checked = True
        width = self.model.width
        if scores.ids.max(initial=0) >= width:
            found = f"a token {scores.ids.max()}"
            raise InputError(self.model.name, found, expected=f"a vocabulary of {width}")
        return compared(reference, scores, chunks, width)

    def _check_texts(self, scores: TokenScores) -> None:
        """Refuse a server whose tokens stand for other texts, by what it says about some."""
        pairs = [
            (token, text, self._decode([token]))
            for token, text in list(scores.texts.items())[:_TEXTS]
        ]
        clear = [pair for pair in pairs if _LOST not in pair[1] + pair[2] and pair[2].strip()]
        wrong = [pair for pair in clear if pair[1].strip() != pair[2].strip()]
        if 2 * len(wrong) > len(clear):
            token, text, own = wrong[0]
            raise InputError(
                self.model.name,
                f"token {token} is {shown(text, 60)!r}",
                expected=f"{own!r:.60} as in the base",
                hint="only models with the same tokenizer can be compared",
            )


def compared(
    reference: Reference, scores: TokenScores, chunks: TokenChunks, width: int
) -> ChunkComparison:
    """Compare likely tokens with the base; positions that were not asked are `NOT_ASKED`.

    Args:
        reference: the base's probabilities for the chunk.
        scores: the server's.
        chunks: the text.
        width: the vocabulary.
    """
    count = chunks.scored
    nll, kld, bound = (np.full(count, NOT_ASKED) for _ in range(3))
    top = np.full(count, -1, np.int64)
    for number, place in enumerate(scores.places):
        row = int(place) - chunks.first
        told = scores.ids[number] >= 0
        ids, log_q = scores.ids[number][told], scores.values[number][told]
        kld[row], bound[row], others = _row(reference, row, ids, log_q, width)
        target = scores.targets[number]
        # Outside the likely tokens, a token is taken for an average one of the others.
        nll[row] = -target if np.isfinite(target) else -others
        top[row] = ids[int(np.argmax(log_q))]
    return ChunkComparison(nll, top, kld, bound)


def _row(
    reference: Reference, row: int, ids: I64, log_q: F64, width: int
) -> tuple[float, float, float]:
    """Return divergence, bound, and the log probability of an average token beside `ids`."""
    log_p = reference.of(row, ids)
    known = np.isfinite(log_p)
    log_p, log_q_known = log_p[known], log_q[known]
    p = np.exp(log_p)
    rest_p = max(0.0, 1.0 - float(p.sum()))
    rest_q = max(_LEAST, 1.0 - float(np.exp(log_q_known).sum()))
    inside = float((p * (log_p - log_q_known)).sum())
    left = width - len(ids)
    average = float(np.log(max(_LEAST, 1.0 - float(np.exp(log_q).sum())) / max(1, left)))
    if rest_p <= _LEAST or not width - int(known.sum()):
        return max(0.0, inside), 0.0, average
    total, least = reference.spread(row)
    inner = total - float((p * log_p).sum()) - rest_p * np.log(rest_p)
    missed = max(0.0, inner + rest_p * (np.log(rest_q) - least))
    return max(0.0, inside + rest_p * np.log(rest_p / rest_q)), float(missed), average


def at_asked(base: Series, series: Series) -> tuple[Series, Series]:
    """Return two series at the positions of a chunk that the server was asked about."""
    assert series.kld is not None
    asked = np.isfinite(series.kld).all(axis=0)
    bound = None if series.bound is None else series.bound[:, asked]
    told = Series(series.nll[:, asked], series.top[:, asked], series.kld[:, asked], bound)
    return Series(base.nll[:, asked], base.top[:, asked]), told


@dataclass(frozen=True)
class ServedTarget:
    """A candidate and the server that runs it.

    Args:
        model: the candidate.
        endpoint: the server.
        served: the model there.
        texts: whether the server tells the texts of tokens, which are compared with the base's.
    """

    model: EvaluatedModel
    endpoint: Endpoint
    served: ServedModel
    texts: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return what the server tells about it, as plain values."""
        return {"url": self.endpoint.url, **self.served.to_json(), "texts": self.texts}


def open_served(
    endpoints: Sequence[tuple[Endpoint, str | None]], base: EvaluatedModel
) -> list[ServedTarget]:
    """Ask each server what it runs, and for log probabilities of three tokens.

    Raises:
        EndpointError: it was not reached, or tells no log probabilities of given tokens.
        UsageError: it does not serve that model, or several.
        InputError: a model is given twice.
    """
    targets = []
    for endpoint, name in endpoints:
        with ServerClient(endpoint) as client:
            served = identify(client, name)
            texts = bool(TokenScorer(client, served).scores([1, 2, 3], [0, 1]).texts)
        model = served_candidate(endpoint, served, base)
        targets.append(ServedTarget(model, endpoint, served, texts))
    names = [target.model.name for target in targets]
    for name in names:
        if names.count(name) > 1:
            raise InputError(name, "given twice")
    return targets
