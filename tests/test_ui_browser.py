"""The page of `qwen35 ui` in a real browser: a whole job, by mouse and keyboard, judged by axe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, DESKTOP, PHONE
from browser_tab import Tab
from checkpoints import ASSET
from evaluating import gguf as gguf_in
from fake_hub import FakeHub, serving
from ui_server import ui_server

pytest.importorskip("uvicorn", reason="the extra ui is not installed")
pytest.importorskip("matplotlib", reason="the extra eval is not installed")
FOUND = find_spec("axe_playwright_python")
AXE = Path(str(FOUND.origin)).parent / "axe.min.js" if FOUND else None
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not (CHROMIUM and AXE), reason="no chromium or no axe-core here"),
]
SECTIONS = ("convert", "gguf", "verify", "evaluate", "report", "publish")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with serving(FakeHub({}, folder=tmp_path_factory.mktemp("store"))) as one:
        yield one


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the server, with a model."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(ASSET, folder / "it's tiny")
    return folder


@pytest.fixture(scope="module")
def address(hub: FakeHub, place: Path) -> Iterator[str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(place / "hf")}
    settings["HF_HUB_OFFLINE"] = "0"  # this Hub is on this machine
    quiet = {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    with ui_server(place, **settings, **quiet) as one:
        yield one


@pytest.fixture(scope="module")
def tab(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with Tab(tmp_path_factory.mktemp("browser"), DESKTOP) as one:
        opened(one, address)
        yield one


def opened(tab: Tab, address: str) -> None:
    tab.call("Page.navigate", url=address)
    tab.wait("document.querySelector('nav a[aria-current]')")


def text(tab: Tab, where: str) -> str:
    found: str = tab.run(f"document.querySelector({json.dumps(where)}).textContent")
    return found


def go(tab: Tab, section: str) -> None:
    tab.run(f"document.querySelector('nav a[href=\"#{section}\"]').click()")
    tab.wait(f"!document.getElementById('{section}').hidden")


def click(tab: Tab, where: str) -> None:
    tab.run(f"document.querySelector({json.dumps(where)}).click()")


def violations(tab: Tab) -> Any:
    """Return what axe-core finds wrong in the page as it is now."""
    assert AXE is not None
    tab.wait("!document.querySelector('.old')")
    tab.run(f"{AXE.read_text('utf-8')};0")
    rows = "found.violations.map(row => [row.id, row.nodes.map(node => node.html)])"
    return tab.run(f"axe.run(document, {{iframes: false}}).then(found => {rows})")


def test_a_model_from_plan_to_hub(
    tab: Tab, hub: FakeHub, place: Path, formats: Path, tmp_path: Path
) -> None:
    # a plan, which changes
    tab.write("#convert-model", "it's tiny")
    tab.wait("document.querySelector('.plan .legend')?.textContent.includes('nf4')")
    tab.run(
        "(e => { e.value = 'fp8'; e.dispatchEvent(new Event('input', {bubbles: true})); })"
        "(document.querySelector('#convert-recipe'))"
    )
    tab.wait("document.querySelector('.plan .legend')?.textContent.includes('fp8')")
    assert "8-bit" in text(tab, "#convert-recipe-about") or "FP8" in text(
        tab, "#convert-recipe-about"
    )
    tab.write("#convert-out", "out fp8")
    shown = "qwen35 convert 'it'\"'\"'s tiny' 'out fp8' --recipe fp8"
    tab.wait(f"document.querySelector('#convert .command code').textContent == {json.dumps(shown)}")
    # a job, by the keyboard
    tab.press("Enter", 13)
    tab.wait("document.querySelector('.job .is-done')")
    assert text(tab, ".job .command code") == shown
    assert (place / "out fp8" / "qwen35.json").is_file()
    # the same again is refused in the command's words
    tab.press("Enter", 13)
    tab.wait("document.querySelector('.job .is-refused')")
    assert "exists already; give --overwrite to replace it" in text(tab, ".job pre")
    # verify what was made, by its own link
    tab.run(
        "[...document.querySelectorAll('.job button')].find(b => b.textContent == 'Verify it')"
        ".click()"
    )
    verify = "qwen35 verify 'out fp8' --source 'it'\"'\"'s tiny'"
    tab.wait(f"document.querySelector('#verify .command code').textContent == {json.dumps(verify)}")
    click(tab, "#verify .main")
    tab.wait("document.querySelectorAll('.job .is-done').length == 2")
    assert "passed: " in text(tab, ".job pre")
    # measure, and read the report
    go(tab, "evaluate")
    tab.write("#evaluate-base", gguf_in(formats, "F16"))
    tab.write("#evaluate-candidates", gguf_in(formats, "Q4_K_M"))
    tab.write("#evaluate-text", str(formats / "text.txt"))
    tab.write("#evaluate-chunks", "1")
    tab.write("#evaluate-report", "report")
    tab.wait("document.querySelector('#evaluate .command code').textContent.includes('--report r')")
    click(tab, "#evaluate .main")
    tab.wait("document.querySelectorAll('.job .is-done').length == 3")
    go(tab, "report")
    tab.write("#report-reports", "report")
    click(tab, "#report .main")
    tab.wait("document.querySelector('iframe')")
    with Tab(tmp_path / "report", PHONE, dark=True) as other:
        other.call("Page.navigate", url=tab.run("document.querySelector('iframe').src"))
        other.wait("document.querySelector('.verdict')")
        assert other.run("window.origin") == "null", "it can reach nothing of ours"
        assert other.run("document.querySelectorAll('th button').length") > 0, "its script runs"
        assert other.complaints() == []
    # publish: a dry run, a look, a confirmation
    go(tab, "publish")
    tab.write("#publish-folder", "out fp8")
    tab.write("#publish-repo", "owner/made")
    click(tab, "#publish .main")
    tab.wait("document.querySelector('.job .state .main')")
    assert "owner/made" not in hub.repos
    assert "model.safetensors" in text(tab, ".job pre")
    click(tab, ".job .state .main")
    tab.wait("document.querySelector('dialog').open")
    assert "--apply" in text(tab, "dialog code")
    assert violations(tab) == []
    click(tab, "dialog button[value=no]")
    assert "owner/made" not in hub.repos
    # hesitating within one frame, before which no event says that the dialog was closed
    asked, no, yes = ".job .state .main", "dialog button[value=no]", "dialog button[value=yes]"
    clicks = [f"document.querySelector({json.dumps(it)}).click()" for it in (asked, no, asked, yes)]
    tab.run(";".join(clicks))
    tab.wait("document.querySelectorAll('.job .is-done').length == 5")
    assert sum(address.endswith("/apply") for address in tab.requested()) == 1
    assert "qwen35.json" in hub.repos["owner/made"].files
    assert tab.complaints() == []
    assert {address.split("/")[2] for address in tab.requested()} == {tab.run("location.host")}, (
        "nothing comes from elsewhere"
    )


@pytest.mark.parametrize("window", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing(window: tuple[int, int], dark: bool, tab: Tab) -> None:
    tab.look(window, dark=dark)
    for section in SECTIONS:
        go(tab, section)
        if section == "gguf":
            tab.write("#gguf-model", "Qwen3.5-0.8B")
            tab.write("#fit-fit", "2GB")
            tab.wait("document.querySelector('.fitting tbody tr')")
            tab.wait("document.querySelector('#gguf .plan:not(.old) .figures')")
        assert violations(tab) == [], section
        assert tab.run("document.documentElement.scrollWidth") == window[0], section
    tab.look(DESKTOP, dark=False)


def test_a_type_that_fits_is_chosen(tab: Tab) -> None:
    go(tab, "gguf")
    tab.write("#gguf-model", "Qwen3.5-9B")
    tab.write("#fit-fit", "6GB")
    tab.wait("document.querySelector('.fitting tbody th')?.textContent == 'Q3_K_M'")
    click(tab, ".fitting tbody button")
    tab.wait("document.querySelector('#gguf .command code').textContent.includes(' Q3_K_M ')")


def test_errors_are_shown_where_one_types(tab: Tab) -> None:
    go(tab, "convert")
    tab.write("#convert-model", "no/such/place")
    tab.wait("document.querySelector('#convert .wrong').textContent.startsWith('no/such/place: ')")
    assert tab.run("document.querySelector('#convert .wrong').getAttribute('role')") == "alert"


def test_a_job_is_cancelled_from_another_tab(
    tab: Tab, address: str, place: Path, tmp_path: Path
) -> None:
    go(tab, "gguf")
    tab.write("#gguf-model", "it's tiny")
    tab.write("#gguf-out", "never")
    with Tab(tmp_path / "other", PHONE) as other:
        opened(other, address)
        click(tab, "#gguf .main")
        other.wait("document.querySelector('.job .is-running')")
        click(other, ".job .state .plain")
        for one in (tab, other):
            one.wait("document.querySelector('.job .is-cancelled')")
    assert not (place / "never").exists()


def test_the_page_says_when_its_server_is_gone(place: Path, tmp_path: Path) -> None:
    with Tab(tmp_path / "home", DESKTOP) as one:
        with ui_server(place) as address:
            opened(one, address)
        one.write("#verify-model", "x")
        one.run("location.hash = 'verify'")
        one.wait(
            "document.querySelector('#verify .wrong').textContent.startsWith('qwen35 ui does not')"
        )
