"""Every program in examples/ runs, and prints what it is there to show."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHOWN = {
    "calibrated": [
        r"statistics: activation-stats\.json, imatrix\.gguf",
        r"FP8: GOOD, \d+ weights",
        r"GGUF: qwen3\.5-tiny-Q4_K_M\.gguf",
    ],
    "compare_plans": [
        r"Qwen3\.5-9B: 9,653,104,368 parameters, 19,306,216,416 bytes",
        r"nf4 +\d,\d{3},\d{3},\d{3} bytes +46\.8% +248 weights packed",
        r"text-fp8 +\d+,\d{3},\d{3},\d{3} bytes +58\.4% +207 weights packed",
    ],
    "errors": [
        r"recipe 'nf5' \| not a built-in recipe \| nf4, .* or a \.toml file",
        r"ConfigError: config\.json: not valid JSON .*",
        r"choose another folder, or remove it yourself",
        r"no such folder",
    ],
    "gguf_by_quality": [
        r"qwen3\.5-tiny-Q8_0 +\d[\d,]+ bytes  0\.00\d+ nats  same top 9\d\.\d%",
        r"qwen3\.5-tiny-Q4_K_M +\d[\d,]+ bytes  0\.\d+ nats  same top \d\d\.\d%",
    ],
    "own_recipe": [
        r"text-nf4 +\d[\d,]+ bytes, 62 weights in NF4",
        r"last-layers\.toml +\d[\d,]+ bytes, 47 weights in NF4",
    ],
    "pipeline": [
        r"first: make done, verify done, document done, publish skipped; passed: True",
        r"again: make kept, verify kept, document kept, publish skipped; passed: True",
    ],
    "quantize_and_verify": [
        r"out: \d[\d,]+ bytes, 56 weights in NF4",
        r"passed: True; largest relative error of a role: 0\.09\d",
        r"\d+ files made again, 0 differ",
    ],
    "tuned": [
        r"tuned\.toml: \d[\d,]+ bytes, [45]\.\d\d bits a weight",
        r"types used: .*",
    ],
}
"""Example to what its lines match, those that matter, in order."""


def test_every_example_is_held_to_something_and_listed() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(SHOWN)
    readme = (ROOT / "examples" / "README.md").read_text()
    for path in EXAMPLES:
        assert f"[{path.name}]({path.name})" in readme


@pytest.mark.filterwarnings("ignore:.*is deprecated.*")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr().out.splitlines()
    places = []
    for pattern in SHOWN[path.stem]:
        found = [i for i, line in enumerate(shown) if re.fullmatch(pattern, line)]
        assert found, (pattern, shown)
        places.append(found[0])
    assert places == sorted(places)
    assert list(tmp_path.iterdir()) == []
