"""The pages in a browser, judged by axe-core: phone and desktop, light and dark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import escape, unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import qwen35
from browser import CHROMIUM, DARK, DESKTOP, LIGHT, PHONE, chromium
from checkpoints import ASSET
from evaluating import gguf as gguf_in

pytest.importorskip("matplotlib", reason="the extra eval is not installed")
FOUND = find_spec("axe_playwright_python")
AXE = Path(str(FOUND.origin)).parent / "axe.min.js" if FOUND else None
browsing = pytest.mark.skipif(not (CHROMIUM and AXE), reason="no chromium or no axe-core here")
PAGES = ("report", "both", "base", "tune")
BOTH = ((PHONE, LIGHT), (DESKTOP, DARK))
LOOKS = [
    *((name, *both) for name in PAGES for both in BOTH),
    *((name, *both) for name in ("report", "tune") for both in ((PHONE, DARK), (DESKTOP, LIGHT))),
]

_FRAME = """<!DOCTYPE html><html lang="en"><meta name="color-scheme" content="light dark">
<title>waiting</title>
<iframe title="page" style="border: 0" width="{}" height="{}" srcdoc="{}"></iframe></html>"""

_RUN = """
const described = rows => rows.flatMap(row => row.nodes.map(node => ({
  rule: row.id, impact: row.impact, help: row.help, where: node.target.join(' '),
  why: node.failureSummary })));
const focusable = [...document.querySelectorAll('a[href], button, summary, [tabindex="0"]')];
const overflowing = [...document.querySelectorAll('*')].filter(e =>
  ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth);
axe.run(document, {resultTypes: ['violations', 'incomplete', 'passes']}).then(found => {
  parent.document.title = JSON.stringify({
    version: axe.version, violations: described(found.violations),
    incomplete: found.incomplete.map(row => row.id), passes: found.passes.map(row => row.id),
    width: innerWidth, unreachable: overflowing.filter(e => !focusable.includes(e)).length,
    focusable: focusable.length, overflowing: overflowing.length,
    images: [...document.querySelectorAll('[role=img]')].map(e => e.getAttribute('aria-label')),
  });
}).catch(error => { parent.document.title = JSON.stringify({failed: String(error)}); });
"""


@pytest.fixture(scope="module")
def pages(formats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report, a comparison of two, a report of the base alone, and the page of a tuning."""
    folder = tmp_path_factory.mktemp("pages")
    text = formats / "text.txt"
    base, *others = (gguf_in(formats, kind) for kind in ("F16", "Q8_0", "Q4_K_M"))
    asked: dict[str, Any] = {"text": text, "chunks": 1, "threads": 1}
    qwen35.evaluate(base, others, report=folder / "report", **asked)
    report = json.loads((folder / "report" / "report.json").read_text())
    report["candidates"] = [{**row, "name": f"{row['name']}-2"} for row in report["candidates"]]
    (folder / "second").mkdir()
    (folder / "second" / "report.json").write_text(json.dumps(report))
    qwen35.report([folder / "report", folder / "second"], output=folder / "both")
    qwen35.evaluate(base, report=folder / "base", **asked)
    qwen35.tune(
        ASSET,
        format="gguf",
        size="5bpw",
        text=text,
        output=folder / "tuned.toml",
        chunks=1,
        types="q4_K,q6_K",
        report=folder / "tune",
    )
    return {name: next((folder / name).glob("*.html")) for name in PAGES}


Judge = Callable[[str, tuple[int, int], int], dict[str, Any]]


@pytest.fixture(scope="module")
def judged(pages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Open a page in a window and a theme, and let axe-core look at it."""
    folder = tmp_path_factory.mktemp("axe")
    kept: dict[tuple[object, ...], dict[str, Any]] = {}

    def one(name: str, window: tuple[int, int], theme: int) -> dict[str, Any]:
        key = (name, window, theme)
        if key not in kept:
            assert AXE is not None
            html = pages[name].read_text("utf-8")
            html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
            engine = AXE.read_text("utf-8").replace("</script", "<\\/script")
            scripts = f"<script>{engine}</script><script>{_RUN}</script></body>"
            probed = folder / "probed.html"
            framed = escape(html.replace("</body>", scripts), quote=True)
            probed.write_text(_FRAME.format(*window, framed), "utf-8")
            options = ("--virtual-time-budget=20000", "--dump-dom")
            dom = chromium(*options, theme=theme, window=window, home=folder / "home", url=probed)
            title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
            assert title is not None
            kept[key] = json.loads(unescape(title[1]))
        return kept[key]

    return one


@browsing
@pytest.mark.parametrize(("name", "window", "theme"), LOOKS)
def test_axe_finds_nothing(name: str, window: tuple[int, int], theme: int, judged: Judge) -> None:
    found = judged(name, window, theme)
    assert found.get("failed") is None
    assert found["width"] == window[0]
    assert found["violations"] == []
    looked_at = {"color-contrast", "document-title", "html-has-lang", "landmark-one-main", "region"}
    assert looked_at <= set(found["passes"])


@browsing
def test_axe_would_find_something(pages: dict[str, Path], judged: Judge) -> None:
    """The same look at a page with faults: no test that cannot fail."""
    html = pages["report"].read_text("utf-8")
    broken = pages["report"].with_name("broken.html")
    html = html.replace("--soft: #5c5c63", "--soft: #d5d5d8").replace(' lang="en"', "")
    broken.write_text(html.replace('role="img" aria-label', 'role="img" data-label'), "utf-8")
    pages["broken"] = broken
    rules = {row["rule"] for row in judged("broken", DESKTOP, LIGHT)["violations"]}
    assert {"color-contrast", "html-has-lang", "svg-img-alt"} <= rules


@browsing
@pytest.mark.parametrize("name", PAGES)
def test_what_scrolls_can_be_reached_by_keyboard(name: str, judged: Judge) -> None:
    found = judged(name, PHONE, LIGHT)
    assert found["unreachable"] == 0
    assert found["focusable"] >= 1


@browsing
def test_charts_say_what_they_show(judged: Judge) -> None:
    size, spread, along = judged("report", DESKTOP, LIGHT)["images"]
    assert re.fullmatch(
        r"Mean KL divergence over file size: Q8_0 [\d.]+ MB [\d.e-]+ nats, "
        r"Q4_K_M [\d.]+ MB [\d.e-]+ nats",
        size,
    )
    assert spread.startswith("KL divergence of single tokens")
    assert "half of the tokens are below: Q8_0" in spread
    assert "along the text, a row for each candidate; largest: Q8_0" in along
    sensitivity, front = judged("tune", DESKTOP, LIGHT)["images"]
    assert "; highest in " in sensitivity
    assert re.search(r": from [\d.]+ MB .* nats to [\d.]+ MB", front)


# --- what axe does not see: the lines of the charts


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    digits = colour.removeprefix("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_stands_out() -> None:
    css = (Path(qwen35.__file__).parent / "reporting" / "style.css").read_text()
    themes = [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in css.split(":root {")[1:3]]
    assert len(themes) == 2
    for theme in themes:
        for name in ("ink", "soft"):
            for ground in ("paper", "band"):
                assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
        assert contrast(theme["ink"], theme["mark"]) >= 4.5
        heats = [luminance(theme[f"heat-{i}"]) for i in range(1, 6)]
        assert heats in (sorted(heats), sorted(heats, reverse=True))
        for i in range(1, 6):
            assert contrast(theme["ink"], theme[f"heat-{i}"]) >= 4.5, i
        for i in range(8):
            assert contrast(theme[f"series-{i}"], theme["paper"]) >= 3, i
