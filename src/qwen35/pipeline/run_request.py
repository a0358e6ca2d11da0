"""What a run is to make: the artifacts of a path, or those of a file, before anything is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from qwen35.checkpoint.hub import HubId
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import UsageError
from qwen35.verification.verdict import Depth

__all__ = [
    "DEFAULT_TYPES",
    "REPORT_FOLDER",
    "ArtifactRequest",
    "MeasurementRequest",
    "PathName",
    "RunOptions",
    "RunRequest",
    "path_artifacts",
    "repo_problem",
]

PathName = Literal["A", "B", "fp8"]

REPORT_FOLDER = "report"
"""The folder in a run's folder that holds report.json and report.html."""

DEFAULT_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
"""What Path B quantizes to beside its F16."""


@dataclass(frozen=True)
class ArtifactRequest:
    """One artifact that is asked for.

    Args:
        recipe: built-in name or TOML file.
        types: file types of GGUF files; empty for safetensors.
        name: of its folder; by the conventions if empty.
        repo: where it is published, if not by the owner of all.
        keep: roles to leave unquantized.
        drop_mtp: whether to drop the multi-token-prediction layer.
        keep_prefix: text-only: whether tensors stay under ``model.language_model.``.
        scale_choice: of FP8 scales.
        activation_stats: FP8: statistics that weigh the columns.
        imatrix: GGUF: importance matrix, a file or ``hf:owner/name/path``.
        mmproj: GGUF: whether the vision tower is written too.
    """

    recipe: str
    types: tuple[str, ...] = ()
    name: str = ""
    repo: str = ""
    keep: tuple[str, ...] = ()
    drop_mtp: bool = False
    keep_prefix: bool = False
    scale_choice: ScaleChoice | None = None
    activation_stats: Path | None = None
    imatrix: str = ""
    mmproj: bool = False

    @property
    def label(self) -> str:
        """What sentences call it before it has a name."""
        return self.name or (f"gguf {self.recipe}" if self.types else self.recipe)


@dataclass(frozen=True)
class MeasurementRequest:
    """What quality is measured on.

    Args:
        text: a text file.
        chunks: at most so many chunks of it; 0 for all.
    """

    text: Path
    chunks: int = 0


@dataclass(frozen=True)
class RunRequest:
    """A run.

    Args:
        model: the source: a folder or a Hub id.
        out: the folder of all artifacts.
        artifacts: what is made.
        depth: how deep artifacts are verified.
        measuring: what quality is measured on; nothing is measured without.
        owner: under whose name artifacts without a repository of their own are published.
        private: whether repositories that are created are private.
    """

    model: str
    out: Path
    artifacts: tuple[ArtifactRequest, ...]
    depth: Depth = "behaviour"
    measuring: MeasurementRequest | None = None
    owner: str = ""
    private: bool = False
    problems: tuple[UsageError, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class RunOptions:
    """How a run works, which does not change what comes out.

    Args:
        device: where weights are encoded.
        threads: at most so many; all processors if None.
        memory: use fewer threads to stay below so many bytes.
        overwrite: whether outputs that this run did not make may be replaced.
        token: access token for the Hub.
    """

    device: str = "auto"
    threads: int | None = None
    memory: int | None = None
    overwrite: bool = False
    token: str | None = field(default=None, repr=False)


_PATHS: dict[PathName, tuple[ArtifactRequest, ...]] = {
    "A": (ArtifactRequest("text-nf4"),),
    "B": (ArtifactRequest("text"), ArtifactRequest("mix", types=("F16", *DEFAULT_TYPES))),
    "fp8": (ArtifactRequest("fp8"),),
}
"""A: text-only NF4 to train on. B: text-only and GGUF, F16 always. fp8: block FP8 to serve."""


def path_artifacts(
    paths: Sequence[str], *, types: Sequence[str] = (), imatrix: str = ""
) -> tuple[ArtifactRequest, ...]:
    """Return the artifacts of the paths asked for, each once.

    Args:
        paths: names of paths.
        types: what Path B quantizes to, beside its F16; the default types if empty.
        imatrix: an importance matrix for Path B.

    Raises:
        UsageError: there is no such path, or what is for Path B is given without it.
    """
    made: dict[str, ArtifactRequest] = {}
    for name in paths:
        if name not in get_args(PathName):
            raise UsageError(f"path {name!r}", "unknown", expected=", ".join(get_args(PathName)))
        made |= {wanted.label: wanted for wanted in _PATHS[name]}  # type: ignore[index]
    if "B" not in paths and (types or imatrix):
        raise UsageError("types and imatrix", "are for path B", hint="leave them out")
    wanted_types = tuple(dict.fromkeys(("F16", *(types or DEFAULT_TYPES))))
    return tuple(
        replace(wanted, types=wanted_types, imatrix=imatrix) if wanted.types else wanted
        for wanted in made.values()
    )


def repo_problem(subject: str, repo: str) -> UsageError | None:
    """Return what is wrong with a repository's name, if anything."""
    parsed = HubId.parse(repo)
    if parsed is None or parsed.revision:
        return UsageError(subject, f"{repo!r} is malformed", expected="owner/name")
    return None
