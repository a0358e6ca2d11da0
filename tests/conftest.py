"""What every test shares: no network, one thread, small random checkpoints made once."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from checkpoints import make_checkpoint
from evaluating import make_formats
from fake_hub import FakeHub, serving
from hub_client import Client, World
from sentences import check, said

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
for _name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):  # pytest-xdist sets the first in its workers
    os.environ.pop(_name, None)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Compare what a test with the mark `sentences` provokes with the golden sentences."""
    random = getattr(pyfuncitem.obj, "is_hypothesis_test", False)
    if random or pyfuncitem.get_closest_marker("sentences") is None:
        return (yield)
    factory: pytest.TempPathFactory = pyfuncitem.config._tmp_path_factory  # type: ignore[attr-defined]
    with said(factory.getbasetemp()) as seen:
        result = yield
    check(seen)
    return result


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


@pytest.fixture(scope="session")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint in every format, and text to measure on (`evaluating.py`)."""
    return make_formats(tmp_path_factory.mktemp("formats"))


@pytest.fixture(scope="session")
def hub_and_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeHub, Client]]:
    """A Hub with write support, and a process that runs commands against it."""
    home = tmp_path_factory.mktemp("client")
    with serving(FakeHub({})) as hub, Client(hub, home) as client:
        yield hub, client


@pytest.fixture
def world(hub_and_client: tuple[FakeHub, Client], tmp_path: Path) -> World:
    """The Hub, empty and well-behaved, and a small artifact to publish on it."""
    hub, client = hub_and_client
    return World.fresh(hub, client, tmp_path)
