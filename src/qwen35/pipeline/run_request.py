"""The request for a run: its artifacts, from a path or a file, before anything is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from qwen35.checkpoint.hub import HubId
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import UsageError, unknown_name
from qwen35.serving.endpoint import Endpoint
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

PathName = Literal["A", "B", "nf4", "gguf", "fp8", "nvfp4", "int4", "mlx"]

REPORT_FOLDER = "report"
"""The folder in a run's folder that holds report.json and report.html."""

DEFAULT_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
"""File types of path B beside F16."""


@dataclass(frozen=True)
class ArtifactRequest:
    """The request for one artifact.

    Args:
        recipe: built-in name or TOML file.
        types: GGUF file types; empty for safetensors.
        name: folder name; derived from the source (`artifact_name`) if empty.
        repo: repository to publish to; derived from the run's owner if empty.
        keep: roles to leave unquantized.
        mtp: ``keep``, ``drop`` or, GGUF, ``separate``: the multi-token-prediction layer.
        drop_mtp: short for ``mtp="drop"``.
        mtp_type: GGUF: the type of the separate file.
        keep_prefix: text-only: whether tensors stay under ``model.language_model.``.
        layout: whose tensors and config.json to write, as for ``convert --layout``.
        scale_choice: how scales are chosen.
        activation_stats: statistics that weigh the columns, and of which scales of inputs are made.
        activations: whether to quantize the layers' inputs as well.
        kv_cache: ``fp8`` for scales of a KV cache, from the statistics.
        imatrix: GGUF: importance matrix, a file or ``hf:owner/name/path``.
        codes: how codes are chosen, as for ``--codes``.
        hessian: the folder of Hessians for refined codes.
        mmproj: GGUF: whether to write the vision tower too, or its file type.
        split_max_size: GGUF: bytes of tensors a file; larger models are split.
        endpoint: a server that runs it already, and is asked before it is published; None for none.
        served_model: the server's name of it.
    """

    recipe: str
    types: tuple[str, ...] = ()
    name: str = ""
    repo: str = ""
    keep: tuple[str, ...] = ()
    mtp: str | None = None
    drop_mtp: bool = False
    mtp_type: str | None = None
    keep_prefix: bool = False
    layout: str | None = None
    scale_choice: ScaleChoice | None = None
    activation_stats: Path | None = None
    activations: bool = False
    kv_cache: str | None = None
    imatrix: str = ""
    codes: str | None = None
    hessian: Path | None = None
    mmproj: bool | str = False
    split_max_size: int | None = None
    endpoint: Endpoint | None = None
    served_model: str | None = None

    @property
    def label(self) -> str:
        """Its name in error messages before it has one."""
        return self.name or (f"gguf {self.recipe}" if self.types else self.recipe)


@dataclass(frozen=True)
class MeasurementRequest:
    """The text for measuring quality, and how to measure it.

    Args:
        text: a text file.
        chunks: the most chunks to use; 0 for all.
        streamed: whether models run layer by layer, whatever memory there is.
        simulate: ``llama.cpp`` for its inputs of layers too, of GGUF files that run so.
    """

    text: Path
    chunks: int = 0
    streamed: bool = False
    simulate: str = ""

    @property
    def how(self) -> list[str]:
        """What was asked of how to measure; empty for the usual way."""
        return [
            *(["streamed"] if self.streamed else []),
            *([self.simulate] if self.simulate else []),
        ]


@dataclass(frozen=True)
class RunRequest:
    """The request for a run.

    Args:
        model: the source: a folder, a GGUF file or a Hub id.
        out: the folder of all artifacts.
        artifacts: the artifacts to make.
        adapters: merged into the source, as ``DIR`` or ``DIR=WEIGHT``.
        onto: the format into whose values they are merged; None for the source's own.
        mtp_from: the checkpoint whose MTP layer the source takes; empty for its own.
        depth: depth of verification.
        measurement: the text to measure on; None to skip evaluation.
        owner: Hub account for artifacts that name no repository.
        private: whether new repositories are private.
        problems: errors found while reading the request.
    """

    model: str
    out: Path
    artifacts: tuple[ArtifactRequest, ...]
    depth: Depth = "behaviour"
    adapters: tuple[str, ...] = ()
    onto: str | None = None
    mtp_from: str = ""
    measurement: MeasurementRequest | None = None
    owner: str = ""
    private: bool = False
    problems: tuple[UsageError, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that do not affect its results.

    Args:
        device: where weights are encoded.
        threads: maximum; all processors if None.
        memory: limit in bytes; reduces the number of threads, and models that would not fit are
            measured layer by layer.
        overwrite: whether outputs that this run did not make may be replaced.
        token: access token for the Hub.
        serve: name of an artifact, to the command that starts the server at its endpoint.
    """

    device: str = "auto"
    threads: int | None = None
    memory: int | None = None
    overwrite: bool = False
    token: str | None = field(default=None, repr=False)
    serve: Mapping[str, str] = field(default_factory=dict)


_TRAIN = (ArtifactRequest("text-nf4"),)
_LOCAL = (ArtifactRequest("text"), ArtifactRequest("mix", types=("F16", *DEFAULT_TYPES)))
_PATHS: dict[PathName, tuple[ArtifactRequest, ...]] = {
    "A": _TRAIN,
    "B": _LOCAL,
    "nf4": _TRAIN,
    "gguf": _LOCAL,
    "fp8": (ArtifactRequest("fp8"),),
    "nvfp4": (ArtifactRequest("nvfp4"),),
    "int4": (ArtifactRequest("int4"),),
    "mlx": (ArtifactRequest("mlx-4bit"),),
}
"""A, nf4: text-only NF4 to train on. B, gguf: text-only and GGUF, F16 always. Others: to serve, mlx
on Macs."""


def path_artifacts(
    paths: Sequence[str], *, types: Sequence[str] = (), imatrix: str = ""
) -> tuple[ArtifactRequest, ...]:
    """Return the artifacts of some paths, without duplicates.

    Args:
        paths: names of paths.
        types: file types of path B beside F16; `DEFAULT_TYPES` if empty.
        imatrix: an importance matrix for path B.

    Raises:
        UsageError: a path is unknown, or an option of path B is given without it.
    """
    requests: dict[str, ArtifactRequest] = {}
    for name in paths:
        if name not in get_args(PathName):
            raise unknown_name(f"path {name!r}", name, get_args(PathName), "unknown")
        requests |= {request.label: request for request in _PATHS[name]}  # type: ignore[index]
    if not any(request.types for request in requests.values()) and (types or imatrix):
        raise UsageError("types and imatrix", "are for path B", hint="leave them out")
    all_types = tuple(dict.fromkeys(("F16", *(types or DEFAULT_TYPES))))
    return tuple(
        replace(request, types=all_types, imatrix=imatrix) if request.types else request
        for request in requests.values()
    )


def repo_problem(subject: str, repo: str) -> UsageError | None:
    """Return an error if a repository's name is malformed."""
    parsed = HubId.parse(repo)
    if parsed is None or parsed.revision:
        return UsageError(subject, f"{repo!r} is malformed", expected="owner/name")
    return None
