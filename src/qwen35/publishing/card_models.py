"""The models of a repository, a row each for its card: size, loss, and when to pick it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qwen35.checkpoint.split_gguf import by_model, title_of
from qwen35.display import size
from qwen35.errors import InputError
from qwen35.reporting.ranking import LOSS, RankedModel, error_of, nats, rank
from qwen35.reporting.reported import parse_report

__all__ = ["CardModel", "card_models"]

_WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class CardModel:
    """A model of the repository.

    Args:
        name: its first file.
        count: how many files it has.
        size: of all of them, with its unit.
        loss: mean divergence in nats with its error; empty if it was not measured.
        same_top: share of tokens with the same most likely one; empty likewise.
        pick: when to pick it; empty likewise.
    """

    name: str
    count: int
    size: str
    loss: str = ""
    same_top: str = ""
    pick: str = ""


def card_models(manifest: Mapping[str, Any], first: Sequence[str], report: Any) -> list[CardModel]:
    """Return the models of an artifact, the largest first.

    Args:
        manifest: its manifest.
        first: the first file of each GGUF model; none for safetensors, which are one model.
        report: report.json of any form, or None; its candidates with this artifact's plan count.
    """
    sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
    weights = [name for name in sizes if name.endswith(_WEIGHTS)]
    groups = [files for files in by_model(weights) if files[0] in first] if first else [weights]
    ranked = _ranked(report, manifest.get("plan"))
    rows = [(files, sum(map(sizes.__getitem__, files))) for files in groups if files]
    rows.sort(key=lambda row: -row[1])
    return [
        _row(files, nbytes, ranked, _found(ranked, files, alone=not first))
        for files, nbytes in rows
    ]


def _ranked(report: Any, plan: object) -> list[RankedModel]:
    """Return the candidates of this artifact, closest first."""
    if not plan:
        return []
    with suppress(InputError):  # then the card has the report's own table alone
        read = parse_report(report, "report.json")
        return [row for row in rank([("", read)]).models if row.model.plan == plan]
    return []


def _found(ranked: Sequence[RankedModel], files: Sequence[str], *, alone: bool) -> int | None:
    """Return the place of a model among those measured, from 0; None if it is none of them."""
    if alone:
        return 0 if len(ranked) == 1 else None
    title = title_of(files)
    return next((i for i, row in enumerate(ranked) if row.model.name == title), None)


def _row(
    files: Sequence[str], nbytes: int, ranked: Sequence[RankedModel], place: int | None
) -> CardModel:
    if place is None:
        return CardModel(files[0], len(files), size(nbytes))
    model = ranked[place].model
    kld, error = nats(model.kld.value), error_of(model.kld.value, model.error)
    same = "" if model.same_top is None else f"{100 * model.same_top:.1f} %"
    pick = "; ".join(_reasons(ranked, place))
    return CardModel(files[0], len(files), size(nbytes), f"{kld} ± {error}", same, pick)


def _reasons(ranked: Sequence[RankedModel], place: int) -> Iterator[str]:
    """Yield when to pick a model: by its loss and its size among those of the repository."""
    here = ranked[place].model
    nbytes = here.nbytes or 0
    near = [row.model for row in ranked if row.model.kld.value <= LOSS]
    if here.kld.value <= LOSS:
        smallest = min(near, key=lambda model: model.nbytes or 0) is here and len(ranked) > 1
        yield f"the smallest within {LOSS:g} nats" if smallest else f"within {LOSS:g} nats"
    if place == 0 and len(ranked) > 1:
        yield "the closest"
    better = [row.model for row in ranked[:place] if row.model.nbytes and row.model.nbytes < nbytes]
    if better:
        yield f"rather {better[0].name}, which is smaller and closer"
    elif place and here.kld.value > LOSS:
        yield "where no larger one fits"
