"""Rebuild an artifact and compare it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.argument_kinds import plain_arguments
from qwen35.api.given_values import listed
from qwen35.progress import Progress

if TYPE_CHECKING:
    from qwen35.reproduction import Reproduction

__all__ = ["reproduce"]


@plain_arguments
def reproduce(
    manifest: str | Path,
    *,
    source: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] = (),
    mtp_from: str | Path | None = None,
    activation_stats: str | Path | None = None,
    imatrix: str | Path | None = None,
    hessian: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    hf_token: str | None = None,
    progress: Progress | None = None,
) -> Reproduction:
    """Rebuild an artifact from its manifest and compare it byte for byte.

    Args:
        manifest: a qwen35.json, its folder, or a Hub id.
        source: the source; by default the repository and commit in the manifest.
        adapter: the adapters merged into it, in any order; their weights are recorded.
        mtp_from: the checkpoint whose MTP layer it has; by default that in the manifest.
        activation_stats: the statistics used for it.
        imatrix: GGUF: the importance matrix used for it.
        hessian: the folder of `calibrate` whose Hessians refined its codes.
        output: keep the rebuilt artifact here; by default it is removed.
        overwrite: replace an output of qwen35.
        threads: number of threads; all processors if None.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: receives bytes read.

    Raises:
        UsageError: the source is not known, or a required input is not given.
        InputError: there is no manifest, or the source is damaged.
        OutputError: the output exists, or the disk is full.
        HubError: the Hub refused a request or could not be reached.
    """
    from qwen35.checkpoint.adapter_files import open_adapters
    from qwen35.planning.container import ContainerInputs
    from qwen35.reproduction import ArtifactOrigin, plan_again
    from qwen35.reproduction import reproduce as carry_out
    from qwen35.writing.write import check_before

    origin = ArtifactOrigin.find(str(manifest), hf_token)
    if output:
        files = [activation_stats, imatrix, hessian]
        check_before(Path(output), overwrite=overwrite, device="cpu", files=files)
    plan = plan_again(
        origin,
        str(source) if source else None,
        hf_token,
        ContainerInputs(
            activations=Path(activation_stats) if activation_stats else None,
            imatrix=Path(imatrix) if imatrix else None,
            hessians=Path(hessian) if hessian else None,
        ),
        open_adapters(listed(adapter)),
        str(mtp_from) if mtp_from else None,
    )
    with tempfile.TemporaryDirectory(prefix="qwen35-reproduce-") as scratch:
        return carry_out(
            origin,
            plan,
            Path(output) if output else Path(scratch) / "again",
            overwrite=overwrite,
            keep=bool(output),
            threads=threads,
            progress=progress,
        )
