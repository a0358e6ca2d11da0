"""What every test shares: no network, one thread, small random checkpoints made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoints import make_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense vision-language checkpoint with a tied head and an MTP layer."""
    return make_checkpoint(tmp_path_factory.mktemp("dense") / "source")


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture-of-experts checkpoint with fused experts and its own head."""
    return make_checkpoint(tmp_path_factory.mktemp("moe") / "source", moe=True, tied=False)


@pytest.fixture(scope="session")
def moe_per_expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture-of-experts checkpoint with every expert by itself."""
    return make_checkpoint(
        tmp_path_factory.mktemp("moe") / "source", moe=True, tied=False, per_expert=True
    )
