"""report.json and report.html: what is in them, and the page in a real browser."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browser import DARK, DESKTOP, LIGHT, PHONE, chromium, in_a_browser
from checkpoints import ASSET
from evaluating import gguf, measure
from qwen35.cli.main import main
from qwen35.errors import OutputError
from qwen35.publishing.card import CardMeasurements
from qwen35.reporting.evaluation_page import page
from qwen35.reporting.report_files import HTML_NAME, JSON_NAME, check_report

pytest.importorskip("matplotlib", reason="the extra eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*FP8.*", "ignore:.*is deprecated.*")


@pytest.fixture(scope="module")
def reported(formats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a report, written by the command."""
    folder = tmp_path_factory.mktemp("reported") / "report"
    assert verb(formats, folder, *TYPES) == 0
    assert sorted(path.name for path in folder.iterdir()) == [HTML_NAME, JSON_NAME]
    return folder


TYPES = ("Q8_0", "Q4_K_M")


def verb(formats: Path, folder: Path, *kinds: str, more: tuple[str, ...] = ()) -> int:
    """Run `qwen35 evaluate` with a report."""
    models = [str(ASSET), str(formats / "nf4"), *(gguf(formats, kind) for kind in kinds)]
    shared = ["--text", str(formats / "text.txt"), "--chunks", "2", "--threads", "1"]
    where = ["--device", "cpu", "--quiet", "--report", str(folder)]
    return main(["evaluate", *models, *shared, *where, *more])


@pytest.fixture(scope="module")
def value(reported: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((reported / JSON_NAME).read_text())
    return parsed


def test_the_json_holds_what_a_reader_needs(value: dict[str, Any], formats: Path) -> None:
    assert value["report"] == 1
    assert value["tokens"]["context"] == 512
    assert value["tokens"]["scored"] == 510
    assert len(value["text"]["sha256"]) == len(value["tokens"]["sha256"]) == 64
    assert {"qwen35", "python", "numpy", "llama_cpp_python", "transformers"} <= set(value["tool"])
    plans = [row["plan"] for row in value["candidates"]]
    made = [json.loads((formats / f / "qwen35.json").read_text())["plan"] for f in ("nf4", "gguf")]
    assert plans == [made[0], made[1], made[1]]
    assert [row["engine"] for row in value["candidates"]] == ["transformers"] + ["llama.cpp"] * 2
    assert value["noise_floor"][0]["figures"]["kld"]["value"] < 1e-5
    for row in value["candidates"]:
        klds = [token["kld"] for token in row["worst"]]
        assert klds == sorted(klds, reverse=True)
        assert klds[0] == row["figures"]["maximum"]
        assert sum(row["distribution"]) == 510


def test_the_worst_tokens_stand_in_their_text(value: dict[str, Any], formats: Path) -> None:
    text = (formats / "text.txt").read_text()
    for token in value["candidates"][0]["worst"]:
        assert token["before"] + token["token"] + token["after"] in text
        assert 0 <= token["probability"] <= 1


def test_the_same_evaluation_gives_the_same_bytes(formats: Path, tmp_path: Path) -> None:
    bytes_of = []
    for name in ("a", "b"):
        folder = tmp_path / name
        shared = ["--text", str(formats / "text.txt"), "--chunks", "2", "--quiet"]
        models = [gguf(formats, "F16"), gguf(formats, "Q8_0")]
        threads = ["--threads", "1", "--report", str(folder)]
        assert main(["evaluate", *models, *shared, *threads]) == 0
        bytes_of.append([(folder / n).read_bytes() for n in (JSON_NAME, HTML_NAME)])
        assert not list(tmp_path.glob(".*"))
    assert bytes_of[0] == bytes_of[1]


def test_the_card_can_read_it(value: dict[str, Any]) -> None:
    measures = CardMeasurements.parse(value["table"])
    assert measures is not None
    assert measures.columns[1:] == ("nf4", f"{ASSET.name}-Q8_0", f"{ASSET.name}-Q4_K_M")
    assert [row[0] for row in measures.rows][:3] == ["Mean KLD", "Maximum KLD", "99.9% KLD"]


def test_the_front(value: dict[str, Any]) -> None:
    rows = value["candidates"]
    assert [row["front"] for row in rows] == [
        not any(
            o["bytes"] <= r["bytes"] and o["figures"]["kld"]["value"] < r["figures"]["kld"]["value"]
            for o in rows
        )
        for r in rows
    ]
    assert any(row["front"] for row in rows)


def test_a_report_is_replaced_only_on_demand(
    formats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / JSON_NAME).write_text('{\n  "report": 0}')
    assert verb(formats, tmp_path) == 2
    assert "exists already; give --overwrite" in capsys.readouterr().err
    assert (tmp_path / JSON_NAME).read_text() == '{\n  "report": 0}'
    file = tmp_path / "file"
    file.touch()
    assert verb(formats, file) == 2
    assert verb(formats, tmp_path, more=("--overwrite",)) == 0
    assert json.loads((tmp_path / JSON_NAME).read_text())["report"] == 1


@pytest.mark.parametrize("name", [JSON_NAME, "report.html", "tune.json", "tune.html"])
def test_a_file_of_someone_else_is_never_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"summary": "of another tool"}')
    with pytest.raises(OutputError, match=rf"{name}: was not written by qwen35"):
        check_report(tmp_path, overwrite=True, names=(name,))


def test_without_matplotlib_it_stops_at_once(
    formats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert verb(formats, tmp_path / "report") == 2
    assert "pip install 'qwen35[eval]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_page_needs_nothing_from_outside(reported: Path) -> None:
    html = (reported / HTML_NAME).read_text()
    assert "default-src 'none'" in html
    assert not re.search(r"<(script|link|img|iframe|object)\b", html)
    links = re.findall(r"(?:href|src)\s*=\s*\"([^\"]*)", html) + re.findall(r"url\(([^)]*)", html)
    assert all(link.startswith("#") for link in links)
    assert "@import" not in html
    assert not re.search(r"#01(01|02)\w\w", html), "a colour that stands for another was left"


def test_hostile_text_is_text(value: dict[str, Any]) -> None:
    evil = "</pre><script>alert(1)</script><b onclick=x>&amp;"
    changed = copy.deepcopy(value)
    changed["base"]["name"] = changed["text"]["name"] = evil
    changed["candidates"][0]["name"] = evil
    changed["candidates"][0]["worst"][0] |= dict.fromkeys(("before", "token", "after", "top"), evil)
    changed["table"]["columns"][1] = evil
    html = page(changed)
    assert "<script" not in html
    assert "<b onclick" not in html
    assert html.count("&lt;script&gt;") >= 6


def test_simulations_are_explained_and_in_no_chart(value: dict[str, Any]) -> None:
    row = {**value["candidates"][0], "name": "x (inputs quantized)", "inputs": "E4M3, each token"}
    html = page({**value, "simulations": [row]})
    assert "x (inputs quantized): simulates servers" in html
    assert "(E4M3, each token)" in html
    assert html.count('id="point-') == len(value["candidates"])
    before = {key: part for key, part in value.items() if key != "simulations"}
    assert "simulates servers" not in page(before)  # of an earlier version


def test_the_base_alone_has_a_page_without_charts(formats: Path) -> None:
    html = page(measure(formats, gguf(formats, "F16")).to_json())
    assert "<svg" not in html
    assert "PPL" in html


@pytest.mark.parametrize("count", [1, 9])
def test_any_number_of_candidates(count: int, value: dict[str, Any]) -> None:
    changed = copy.deepcopy(value)
    row = changed["candidates"][0]
    changed["candidates"] = [{**row, "name": f"model-{i}"} for i in range(count)]
    html = page(changed)
    assert html.count('id="point-') == count
    assert html.count("<details") == count
    assert html.count(f"</span>model-{count - 1}") == 1  # whole, not as in the charts


_PROBE = """
const box = s => { const r = document.querySelector(s).getBoundingClientRect();
                   return [r.width, r.height]; };
const style = (s, p) => getComputedStyle(document.querySelector(s))[p];
const texts = [...document.querySelectorAll('svg text')];
parent.document.title = JSON.stringify({
  inner: innerWidth, scroll: document.documentElement.scrollWidth,
  paper: style('body', 'backgroundColor'), ink: style('body', 'color'),
  size: box('#size svg'), distribution: box('#distribution svg'), point: box('[id="point-0"]'),
  colour: style('[id="point-0"] use', 'stroke'), label: getComputedStyle(texts[0]).fill,
  text: Math.min(...texts.map(t => t.getBoundingClientRect().height)),
  marks: document.querySelectorAll('mark').length,
  open: document.querySelectorAll('details[open]').length,
  first: style('th', 'position'),
});
"""
"""Asked of the page by a script that the test adds to a copy."""

_FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark">
<iframe style="border: 0" width="{}" height="{}" srcdoc="{}"></iframe>"""
"""Windows of the browser have a least width; frames have not."""

Look = Callable[[tuple[int, int], int], tuple[dict[str, Any], Path]]


@pytest.fixture
def look(reported: Path, tmp_path: Path) -> Look:
    """Open the page in a window of some size, in a light or dark theme; measure and photograph."""

    def one(window: tuple[int, int], theme: int) -> tuple[dict[str, Any], Path]:
        html = (reported / HTML_NAME).read_text()
        without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
        inner = without.replace("</body>", f"<script>{_PROBE}</script></body>")
        probed = tmp_path / "probed.html"
        probed.write_text(_FRAME.format(*window, escape(inner, quote=True)))
        shared: dict[str, Any] = {"theme": theme, "window": window, "home": tmp_path / "home"}
        dom = chromium("--dump-dom", url=probed, **shared)
        title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
        assert title is not None
        picture = tmp_path / "page.png"
        chromium(f"--screenshot={picture}", url=reported / HTML_NAME, **shared)
        return json.loads(unescape(title[1])), picture

    return one


@in_a_browser
@pytest.mark.parametrize("window", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_the_page_in_a_browser(window: tuple[int, int], look: Look) -> None:
    seen, picture = look(window, LIGHT)
    assert seen["inner"] == window[0]
    assert seen["scroll"] <= window[0], "the page is wider than the window"
    assert seen["size"][0] > 0.85 * min(window[0], 550)
    assert seen["distribution"][1] > 200
    assert min(seen["point"]) > 5
    assert seen["text"] >= 9
    assert seen["marks"] == 36
    assert seen["open"] == 1
    assert seen["first"] == "sticky"
    image = np.asarray(Image.open(picture).convert("RGB"))
    assert image.shape[:2] == (window[1], window[0])
    assert image[2, 2].tolist() == [255, 255, 255]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50


@in_a_browser
def test_dark_and_light(look: Look) -> None:
    light, _ = look(DESKTOP, LIGHT)
    dark, picture = look(DESKTOP, DARK)
    assert dark["paper"] == "rgb(23, 23, 26)"
    assert light["paper"] == "rgb(255, 255, 255)"
    for seen in (dark, light):
        assert seen["label"] == seen["ink"]  # the chart's text is the page's
    assert dark["ink"] != light["ink"]
    assert dark["colour"] != light["colour"]
    image = np.asarray(Image.open(picture).convert("RGB"))
    assert image[2, 2].tolist() == [23, 23, 26]
    assert (image.astype(int).sum(axis=2) < 3 * 60).mean() > 0.6
