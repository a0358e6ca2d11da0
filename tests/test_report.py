"""report.json and report.html: what is in them, and the page in a real browser."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import sys
from base64 import b64encode
from collections.abc import Callable
from functools import cache
from html import escape, unescape
from itertools import combinations
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
from qwen35.evaluation.along_text import along, passage_klds, typical_passage
from qwen35.evaluation.divergence import Series
from qwen35.evaluation.text_chunks import TokenChunks
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
    assert "pip install '.[eval]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_page_needs_nothing_from_outside(reported: Path) -> None:
    html = (reported / HTML_NAME).read_text()
    assert "default-src 'none'" in html
    assert len(html.encode()) < 1_500_000
    assert not re.search(r"<(link|img|iframe|object)\b", html)
    assert len(re.findall(r"<script\b[^>]*>", html)) == html.count("<script>") == 1
    links = re.findall(r"(?:href|src)\s*=\s*\"([^\"]*)", html) + re.findall(r"url\(([^)]*)", html)
    assert all(link.startswith("#") for link in links)
    targets = {link[1:] for link in links}
    assert targets <= set(re.findall(r'\bid="([^"]*)"', html))
    assert "@import" not in html
    assert not re.search(r"#01(01|02)\w\w", html), "a colour that stands for another was left"


def test_no_other_script_runs(reported: Path) -> None:
    html = (reported / HTML_NAME).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    allowed = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert policy[1] == allowed
    assert not re.search(r"\son\w+=", html)


EVIL = "</pre></script><script>alert(1)</script><b onclick=x>&amp;$x$\n\ud800"


def test_hostile_text_is_text(value: dict[str, Any]) -> None:
    changed = copy.deepcopy(value)
    changed["base"]["name"] = changed["text"]["name"] = EVIL
    changed["candidates"][0]["name"] = EVIL
    changed["candidates"][0]["worst"][0] |= dict.fromkeys(("before", "token", "after", "top"), EVIL)
    changed["passage"]["tokens"][0] = changed["candidates"][0]["engine"] = EVIL
    changed["table"]["columns"][1] = EVIL
    html = page(changed)
    assert html.count("<script") == html.count("</script") == 1
    assert "<b onclick" not in html
    assert html.count("&lt;script&gt;") >= 9
    assert html.encode()


def test_simulations_are_explained_and_in_no_chart(value: dict[str, Any]) -> None:
    row = {**value["candidates"][0], "name": "x (inputs quantized)", "inputs": "E4M3, each token"}
    html = page({**value, "simulations": [row]})
    assert re.search(r"inputs of packed layers too \(E4M3, each token\): x [\d.]+ nats", html)
    assert html.count('id="point-') == len(value["candidates"])


def test_reports_of_earlier_versions_have_a_page(value: dict[str, Any]) -> None:
    """Before there were simulations, findings, and losses along the text."""
    changed = copy.deepcopy(value)
    for key in ("simulations", "findings", "passage"):
        del changed[key]
    for row in changed["candidates"]:
        del row["along"], row["passage"], row["inputs"]
    html = page(changed)
    assert "As run by servers" not in html
    assert "typical passage" not in html
    assert re.findall(r'<figure id="(\w+)"', html) == ["size", "spread"]


def test_the_base_alone_has_a_page_without_charts(formats: Path) -> None:
    html = page(measure(formats, gguf(formats, "F16")).to_json())
    assert "<svg" not in html
    assert "Verdict" not in html
    assert "PPL" in html
    assert "perplexity" in html


@pytest.mark.parametrize("count", [1, 9])
def test_any_number_of_candidates(count: int, value: dict[str, Any]) -> None:
    changed = copy.deepcopy(value)
    row = changed["candidates"][0]
    changed["candidates"] = [{**row, "name": f"model-{i}"} for i in range(count)]
    html = page(changed)
    assert html.count('id="point-') == (count if count > 1 else 0)
    assert html.count('class="tokens"') == count
    assert html.count('<tr id="row-') == count


def test_the_passage_is_in_the_text(value: dict[str, Any], formats: Path) -> None:
    tokens = value["passage"]["tokens"]
    assert "".join(tokens) in (formats / "text.txt").read_text()
    assert len(tokens) == 255
    for row in value["candidates"]:
        assert len(row["passage"]) == 255
        assert len(row["along"]) == 96
        mean = row["figures"]["kld"]["value"]
        assert np.mean(row["along"]) == pytest.approx(mean, rel=0.01)
        assert np.mean(row["passage"]) <= 2 * mean


def test_characters_of_several_tokens_are_shown_once() -> None:
    whole = "a\u00e9\u20ac!".encode()
    chunks = TokenChunks(np.array([[97, *whole]], np.int32))
    nll = np.zeros((1, chunks.scored))
    passage = typical_passage(
        Series(nll, nll.astype(np.int64)), chunks, lambda ids: bytes(ids).decode(errors="replace")
    )
    assert chunks.first == 4
    assert passage.tokens == ["", "\u20ac", "!"]


def test_tokens_that_were_not_compared_have_no_loss() -> None:
    chunks = TokenChunks(np.zeros((1, 512), np.int32))
    nll = np.zeros((1, 255))
    base = Series(nll, nll.astype(np.int64))
    passage = typical_passage(base, chunks, lambda ids: "x" * len(ids))
    kld = np.full((1, 255), 0.5)
    kld[0, 1::2] = np.nan
    series = Series(nll, base.top, kld)
    assert along(series) == [0.5] * 96
    assert passage_klds(series, passage) == [0.5, None] * 127 + [0.5]
    kld[0, :3] = np.nan
    assert along(series) == []


_PROBE = """
const style = (s, p) => getComputedStyle(document.querySelector(s))[p];
const box = e => { const r = e.getBoundingClientRect();
                   return [r.left, r.top, r.right, r.bottom]; };
const all = s => [...document.querySelectorAll(s)];
const size = s => { const b = box(document.querySelector(s)); return [b[2] - b[0], b[3] - b[1]]; };
const order = () => all('.ranked tbody th').map(th => th.dataset.value);
const seen = {
  inner: innerWidth, scroll: document.documentElement.scrollWidth,
  paper: style('body', 'backgroundColor'), ink: style('body', 'color'),
  size: size('#size svg'), spread: size('#spread svg'), point: size('[id="point-0"]'),
  colour: style('[id="point-0"] use', 'stroke'), label: getComputedStyle(all('svg text')[0]).fill,
  text: Math.min(...all('svg text').map(t => t.getBoundingClientRect().height)),
  marks: all('mark').length, open: all('details[open]').length, first: order(),
  table: box(document.querySelector('.ranked'))[2],
  labels: [...all('#size [id^="point"] use'), ...all('#size [id^="label"] text')].map(box),
  rows: all('#spread text, #along text').map(t => box(t).concat(t.closest('figure').id)),
};
const sort = i => document.querySelectorAll('.ranked thead button')[i].click();
sort(2); seen.smallest = order(); sort(2); seen.largest = order();
seen.sorted = all('.ranked thead th').map(th => th.getAttribute('aria-sort'));
const point = new PointerEvent('pointermove', {bubbles: true});
const hover = (figure, u, v) => {
  const svg = document.querySelector(`#${figure} svg`), b = box(svg);
  svg.dispatchEvent(new PointerEvent('pointermove', {
    clientX: b[0] + u * (b[2] - b[0]), clientY: b[1] + v * (b[3] - b[1]) }));
  const tip = document.querySelector('.tip'); return tip.hidden ? null : tip.textContent;
};
const spots = JSON.parse(document.querySelector('#size').dataset.hover).spots;
const b = box(document.querySelector('#size svg'));
const c = box(document.querySelector('[id="point-1"]'));
seen.spot = [spots[1][0] * (b[2] - b[0]) + b[0] - (c[0] + c[2]) / 2,
             spots[1][1] * (b[3] - b[1]) + b[1] - (c[1] + c[3]) / 2];
seen.said = [hover('size', spots[1][0], spots[1][1]), hover('size', 0.99, 0.01)];
const {tracks, ends} = JSON.parse(document.querySelector('#along').dataset.hover);
seen.along = hover('along', (ends[0] + ends[1]) / 2, (tracks[0][0] + tracks[0][1]) / 2);
parent.document.title = JSON.stringify(seen);
"""
"""Asked of the page by a script that the test adds to a copy."""

_FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark">
<iframe style="border: 0" width="{}" height="{}" srcdoc="{}"></iframe>"""
"""Windows of the browser have a least width; frames have not."""

Look = Callable[[tuple[int, int], int], tuple[dict[str, Any], Path]]


def asked(html: str, window: tuple[int, int], theme: int, folder: Path) -> dict[str, Any]:
    """Open a page in a window of some size and a theme; ask it for places and texts."""
    without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    inner = without.replace("</body>", f"<script>{_PROBE}</script></body>")
    probed = folder / "probed.html"
    probed.write_text(_FRAME.format(*window, escape(inner, quote=True)))
    dom = chromium("--dump-dom", url=probed, theme=theme, window=window, home=folder / "home")
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    seen: dict[str, Any] = json.loads(unescape(title[1]))
    return seen


@pytest.fixture(scope="module")
def look(reported: Path, tmp_path_factory: pytest.TempPathFactory) -> Look:
    """Ask the page, and photograph it."""
    folder, html = tmp_path_factory.mktemp("look"), (reported / HTML_NAME).read_text()

    @cache
    def one(window: tuple[int, int], theme: int) -> tuple[dict[str, Any], Path]:
        picture = folder / f"{window[0]}-{theme}.png"
        shared: dict[str, Any] = {"theme": theme, "window": window, "home": folder / "home"}
        chromium(f"--screenshot={picture}", url=reported / HTML_NAME, **shared)
        return asked(html, window, theme, folder), picture

    return one


@in_a_browser
@pytest.mark.parametrize("window", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_the_page_in_a_browser(window: tuple[int, int], look: Look) -> None:
    seen, picture = look(window, LIGHT)
    assert seen["inner"] == window[0]
    assert seen["scroll"] <= window[0], "the page is wider than the window"
    assert seen["table"] <= window[0], "the ranked table is wider than the window"
    assert seen["size"][0] > 0.85 * min(window[0], 400)
    assert seen["spread"][1] > 80
    assert min(seen["point"]) > 5
    assert seen["text"] >= 9
    assert seen["marks"] == 36
    assert seen["open"] == 1
    assert not overprinted(seen["labels"])
    assert not overprinted([row[:4] for row in seen["rows"] if row[4] == "along"])
    assert not overprinted([row[:4] for row in seen["rows"] if row[4] == "spread"])
    image = np.asarray(Image.open(picture).convert("RGB"))
    assert image.shape[:2] == (window[1], window[0])
    assert image[2, 2].tolist() == [255, 255, 255]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50


def overprinted(boxes: list[list[float]]) -> list[tuple[list[float], list[float]]]:
    """Return pairs of boxes that have more than half a pixel in common."""
    return [
        (one, other)
        for one, other in combinations(boxes, 2)
        if min(one[2], other[2]) - max(one[0], other[0]) > 0.5
        and min(one[3], other[3]) - max(one[1], other[1]) > 0.5
    ]


@in_a_browser
def test_a_crowd_is_never_overprinted(value: dict[str, Any], tmp_path: Path) -> None:
    """Twelve candidates of nearly the same size and loss, with names of any length."""
    changed, rows = copy.deepcopy(value), []
    for i in range(12):
        row = copy.deepcopy(changed["candidates"][i % 3])
        row["name"] = f"{'a name of many words ' * (i == 3)}{'W' * (i % 5)}-{i}-$x$"
        row["bytes"] = 6_000_000 + 40_000 * (i // 2)
        row["figures"]["kld"]["value"] = 0.01 * (1 + 0.01 * (i % 4))
        rows.append(row)
    html = page({**changed, "candidates": rows})
    seen = asked(html, PHONE, LIGHT, tmp_path)
    assert seen["scroll"] <= PHONE[0]
    assert len(seen["labels"]) > 12
    names = seen["labels"][12:]
    assert not overprinted(names)
    assert not [mark for mark in seen["labels"][:12] if any(overprinted([mark, n]) for n in names)]
    for figure in ("along", "spread"):
        assert not overprinted([row[:4] for row in seen["rows"] if row[4] == figure])


@in_a_browser
def test_sorting_and_values_under_the_pointer(look: Look, value: dict[str, Any]) -> None:
    seen, _ = look(DESKTOP, LIGHT)
    rows = value["candidates"]
    names = {row["name"]: row["name"].removeprefix(f"{ASSET.name}-") for row in rows}
    by_loss = sorted(rows, key=lambda row: row["figures"]["kld"]["value"])
    by_size = sorted(rows, key=lambda row: row["bytes"])
    assert seen["first"] == [names[row["name"]] for row in by_loss]
    assert seen["smallest"] == [names[row["name"]] for row in by_size]
    assert seen["largest"] == seen["smallest"][::-1]
    assert seen["sorted"] == [None, None, "descending", None, None, None]
    second = by_loss[1]
    assert max(map(abs, seen["spot"])) < 1
    said, nothing = seen["said"]
    assert said.splitlines()[0] == names[second["name"]]
    assert f"{second['figures']['kld']['value']:#.3g} ± " in said
    assert nothing is None
    middle = by_loss[0]["along"][48]
    name, loss, place = seen["along"].splitlines()
    assert (name, place) == (names[by_loss[0]["name"]], "50 to 51 % of the text")
    assert float(loss.removesuffix(" nats")) == pytest.approx(middle, rel=0.01)


@in_a_browser
def test_its_own_script_runs_under_its_policy(reported: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"theme": LIGHT, "window": DESKTOP, "home": tmp_path / "home"}
    html = (reported / HTML_NAME).read_text()
    other = tmp_path / "other.html"
    other.write_text(html.replace("</main>", "<script>document.title = 'other'</script></main>"))
    dom = chromium("--dump-dom", url=other, **shared)
    assert "<button" in dom
    assert "<title>other</title>" not in dom


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
