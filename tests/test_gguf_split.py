"""Models split into several GGUF files: their bytes, and every verb that reads them as one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

import qwen35
from checkpoints import ASSET
from fake_hub import FakeHub, serving
from gguf_models import rewrite_gguf
from hub_command import command
from hub_store import Repo
from qwen35.api.plan_api import plan
from qwen35.checkpoint.gguf_header import GgufHeader, read_container
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.split_gguf import SplitName, by_model
from qwen35.cli.main import main
from qwen35.engines.llama import Llama
from qwen35.evaluation.models import open_candidates
from qwen35.planning.gguf_files.gguf_plan import files_of
from qwen35.progress import Silent
from qwen35.publishing.modelfile import gguf_models, modelfile_text
from qwen35.publishing.repo_documents import documents
from qwen35.verification.behaviour import BehaviourResult
from running import tree

pytestmark = pytest.mark.sentences

LIMIT = 10**6
REPO = "owner/Split-GGUF"
FIVE = tuple(f"qwen3.5-tiny-Q4_K_M-0000{i}-of-00005.gguf" for i in range(1, 6))
THEIRS = "019bbcb1e92e85df5565310963c1bde572b4f6c5eec2b9f313e17b28100128f9"
"""SHA-256 of all files, one after the other, that ``llama-gguf-split --split-max-size 1M`` of
llama.cpp makes of the file in one piece."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    return qwen35.gguf(ASSET, out, types="Q4_K_M").out / "qwen3.5-tiny-Q4_K_M.gguf"


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("split") / "out"
    return qwen35.gguf(ASSET, out, types="Q4_K_M", split_max_size=LIMIT).out


@pytest.fixture
def out(split: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(split, tmp_path / "out"))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    return shown.out + shown.err


# written


def test_files_are_those_of_llama_gguf_split(split: Path) -> None:
    assert tuple(sorted(path.name for path in split.glob("*.gguf"))) == FIVE
    joined = b"".join((split / name).read_bytes() for name in FIVE)
    assert hashlib.sha256(joined).hexdigest() == THEIRS


def test_a_library_reads_keys_of_the_split_and_the_same_tensors(split: Path, whole: Path) -> None:
    readers = [GGUFReader(split / name) for name in FIVE]
    expected = {
        "split.no": (GGUFValueType.UINT16, list(range(5))),
        "split.count": (GGUFValueType.UINT16, [5] * 5),
        "split.tensors.count": (GGUFValueType.INT32, [123] * 5),
    }
    for key, (kind, values) in expected.items():
        fields = [reader.fields[key] for reader in readers]
        assert {field.types[0] for field in fields} == {kind}
        assert [field.contents() for field in fields] == values
    keys = [{key for key in r.fields if not key.startswith("GGUF.")} for r in readers]
    one = GGUFReader(whole)
    assert keys[0] == {key for key in one.fields if not key.startswith("GGUF.")} | set(expected)
    assert keys[1:] == [set(expected)] * 4
    stored = [(t.name, t.tensor_type, t.data.tobytes()) for r in readers for t in r.tensors]
    assert stored == [(t.name, t.tensor_type, t.data.tobytes()) for t in one.tensors]


def test_llama_loads_all_files_by_the_first(split: Path, whole: Path) -> None:
    with Llama(split / FIVE[0]) as several, Llama(whole) as one:
        ids = one.encode("Split files are one model.")
        assert several.encode("Split files are one model.") == ids
        assert several.logits(ids).tobytes() == one.logits(ids).tobytes()


def test_plan_describes_every_file(split: Path) -> None:
    planned = plan(ASSET, types="Q4_K_M", split_max_size=LIMIT)
    sizes = {path.name: path.stat().st_size for path in split.iterdir()}
    assert dict(planned.all_sizes()) == sizes
    for recipe, row in planned.comparison.items():
        other = plan(ASSET, types="Q4_K_M", split_max_size=LIMIT, recipe=recipe)
        assert row == {"Q4_K_M": sum(file.nbytes for file in other.files)}


def test_a_model_that_fits_stays_one_file(whole: Path) -> None:
    planned = plan(ASSET, types="Q4_K_M", split_max_size=10**8)
    [file] = planned.files
    assert (file.name, file.nbytes) == (whole.name, whole.stat().st_size)
    assert file.head == whole.read_bytes()[: len(file.head)]


def test_a_weight_stays_with_its_scales() -> None:
    planned = plan(
        ASSET, types="Q8_0", split_max_size=150_000, tensor_type=["ffn_(up|gate|down)=nvfp4"]
    )
    for file in files_of(planned):
        names = set(file.offsets)
        scales = {name for name in names if name.endswith(".scale")}
        assert {name.replace(".scale", ".weight") for name in scales} <= names
    assert len(planned.files) > 20
    assert "larger than --split-max-size" in " ".join(planned.notes)


def test_slices_and_a_run_that_went_on_write_the_same(split: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"types": "Q4_K_M", "split_max_size": LIMIT, "threads": 1}
    for part in ((1, 2), (2, 2)):
        qwen35.gguf(ASSET, tmp_path / "slices", slice=part, **asked)
    qwen35.finalize(tmp_path / "slices")
    assert tree(tmp_path / "slices") == tree(split)

    class Stopped(Silent):
        left = 30

        def advance(self, count: int, item: str = "") -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qwen35.gguf(ASSET, tmp_path / "stopped", progress=Stopped(), **asked)
    assert not (tmp_path / "stopped").exists()
    qwen35.gguf(ASSET, tmp_path / "stopped", **asked)
    assert tree(tmp_path / "stopped") == tree(split)


def test_files_larger_than_some_clients_of_the_hub_take() -> None:
    [note] = [n for n in plan("Qwen3.5-27B", types="F16").notes if "the Hub" in n]
    assert "Qwen3.5-27B-F16.gguf; --split-max-size" in note
    several = plan("Qwen3.5-27B", types="F16", split_max_size=40 * 10**9)
    assert len(several.files) == 2
    assert not [n for n in several.notes if "the Hub" in n]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (
            ["gguf", str(ASSET), "OUT", "--split-max-size", "0"],
            "--split-max-size: '0', expected a size such as",
        ),
        (
            ["gguf", str(ASSET), "OUT", "--split-max-size=-5M"],
            "--split-max-size: '-5M', expected a size",
        ),
        (["gguf", str(ASSET), "OUT", "--split-max-size", "big"], "'big', expected a size such as"),
        (["plan", str(ASSET), "--split-max-size", "2G"], "no effect without --types"),
    ],
)
def test_sizes_that_make_no_sense(
    words: list[str],
    found: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as error:  # from argparse
        code = error.code  # type: ignore[assignment]
    assert code == 2
    assert found in said(capsys)
    assert not list(tmp_path.iterdir())


def test_export_of_a_split_model_has_all_tensors(tmp_path: Path) -> None:
    files = [tmp_path / "whole.txt", tmp_path / "split.txt"]
    asked = ["gguf", str(ASSET), str(tmp_path / "out"), "--types", "Q4_K_M", "--export"]
    assert main([*asked, str(files[0])]) == 0
    assert main([*asked, str(files[1]), "--split-max-size", "1M"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


# read


@pytest.mark.parametrize("named", ["", FIVE[0], FIVE[3]])
def test_verify_compares_all_files(
    named: str, split: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(split / named), "--source", str(ASSET), "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["findings"], verdict["counts"]["weights"]) == ([], 123)
    assert verdict["counts"]["files"] == 5


def test_behaviour_is_asked_once_by_the_first_file(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def ask(containers: list[GgufHeader], *_: object) -> BehaviourResult:
        asked.extend(container.path for container in containers)
        return BehaviourResult()

    monkeypatch.setattr("qwen35.verification.gguf_subject.in_llama", ask)
    assert main(["verify", str(split), "--depth", "behaviour", "--quiet"]) == 0
    assert asked == [split / FIVE[0]]


def missing(out: Path) -> None:
    (out / FIVE[1]).unlink()


def missing_first(out: Path) -> None:
    (out / FIVE[0]).unlink()
    (out / FIVE[1]).unlink()


def swapped(out: Path) -> None:
    (out / FIVE[1]).rename(out / "x")
    (out / FIVE[2]).rename(out / FIVE[1])
    (out / "x").rename(out / FIVE[2])


def truncated(out: Path) -> None:
    os.truncate(out / FIVE[3], 400_000)


def another_split(out: Path) -> None:
    """Put a file of the same number from a model split elsewhere."""
    other = qwen35.gguf(ASSET, out.with_name("other"), types="Q4_K_M", split_max_size=1_100_000)
    [name] = (f.name for f in other.plan.files if SplitName.parse(f.name).number == 5)  # type: ignore[union-attr]
    (other.out / name).rename(out / FIVE[4])


def rewritten(source: Path, target: Path, key: str, value: int) -> None:
    """Write a file again with another value of a key."""

    def change(writer: GGUFWriter) -> None:
        writer.kv_data[0][key].value = value

    rewrite_gguf(source, target.with_name("new"), "", change)
    target.with_name("new").rename(target)


def twice(out: Path) -> None:
    """Give one file the tensors of another, and its own number."""
    rewritten(out / FIVE[1], out / FIVE[2], "split.no", 2)


def another_count(out: Path) -> None:
    rewritten(out / FIVE[2], out / FIVE[2], "split.tensors.count", 1)


def unnamed(out: Path) -> None:
    for i, name in enumerate(FIVE):
        (out / name).rename(out / f"model{i}.gguf")


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (missing, FIVE[1], "missing, expected all 5 files of the model"),
        (missing_first, FIVE[0], "missing, and 1 more, expected all 5 files"),
        (swapped, FIVE[1], "split.no is 2, expected 1 by its name"),
        (truncated, FIVE[3], "400000 bytes long, expected "),
        (another_split, FIVE[0], "split.tensors.count is 123, expected 115 as in all files"),
        (another_count, FIVE[2], "split.tensors.count is 1, expected 123"),
        (twice, FIVE[2], "is in qwen3.5-tiny-Q4_K_M-00002-of-00005.gguf too"),
        (unnamed, "model0.gguf", "split.count is 5, expected a name like NAME-00001-of-00002"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_by_name(
    damage: Callable[[Path], None],
    file: str,
    message: str,
    manifest: bool,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(out)
    if not manifest:
        (out / "qwen35.json").unlink()
    assert main(["verify", str(out), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    told = [f["message"] for f in findings if f["check"] == "readable" and f["subject"] == file]
    assert len(told) == 1, findings
    assert message in told[0]
    assert main(["inspect", str(out)]) == 2
    assert said(capsys).startswith("error: ")


def test_a_file_of_another_quantization_is_told_by_the_manifest(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {"tensor_type": ["ffn_up=q4_0"], "split_max_size": LIMIT}
    other = qwen35.gguf(ASSET, tmp_path / "other", types="Q4_K_M", **asked)  # as many bytes
    shutil.copy(other.out / FIVE[2], out)
    assert main(["verify", str(out), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert FIVE[2] in {finding["subject"].partition(":")[0] for finding in findings}


def test_inspect_shows_one_model(split: Path, whole: Path) -> None:
    summaries: Any = [qwen35.inspect(split), qwen35.inspect(whole)]
    [several], [one] = summaries
    assert (several["files"], one["files"]) == (5, 1)
    assert several["bytes"] == sum((split / name).stat().st_size for name in FIVE)
    same = ("tensors", "parameters", "types", "file_type", "bits_per_weight")
    assert [several[key] for key in same] == [one[key] for key in same]
    assert several["keys"]["split.count"] == 5


def test_evaluate_opens_one_model(out: Path, whole: Path) -> None:
    [model], [again], [one] = (open_candidates([str(p)]) for p in (out, out / FIVE[4], whole))
    assert model == again
    assert open_candidates([str(out / name) for name in FIVE]) == [model]  # as by *.gguf
    assert (model.name, model.path.name) == ("qwen3.5-tiny-Q4_K_M", FIVE[0])
    assert model.nbytes == sum((out / name).stat().st_size for name in FIVE)
    assert (model.stored, model.exact, model.tokenizer) == (one.stored, one.exact, one.tokenizer)
    before = model.identity()
    os.utime(out / FIVE[3], (1, 1))
    assert model.identity() != before


def test_files_in_one_piece_and_in_several_have_names_of_their_own(out: Path, whole: Path) -> None:
    shutil.copy(whole, out)
    names = [model.name for model in open_candidates([str(out)])]
    assert names == [f"out/{FIVE[0].removesuffix('.gguf')}", "out/qwen3.5-tiny-Q4_K_M"]


@pytest.mark.parametrize(
    "name",
    ["a-00000-of-00002.gguf", "a-00003-of-00002.gguf", "a-00001-of-00001.gguf", "-1-of-2.gguf"],
)
def test_names_that_are_not_of_several_files(name: str) -> None:
    assert SplitName.parse(name) is None
    assert by_model([name]) == [(name,)]


def test_a_stranger_with_huge_numbers_is_told_at_once(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(out / FIVE[0], out / "x-00002-of-99999.gguf")
    assert main(["verify", str(out), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    message = "missing, and 99997 more, expected all 99999 files of the model"
    assert message in {f["message"] for f in findings if f["subject"] == "x-00001-of-99999.gguf"}


@pytest.mark.parametrize("named", [REPO, f"hf:{REPO}/{FIVE[2]}"])
def test_files_on_the_hub_are_one_model(named: str, split: Path, tmp_path: Path) -> None:
    with serving(FakeHub({REPO: Repo.of(split)})) as hub:
        shown = command("inspect", named, "--json", home=tmp_path, url=hub.url)
        assert shown.code == 0, shown.err
        [summary] = json.loads(shown.out)
        assert (summary["file"], summary["files"], summary["tensors"]) == (FIVE[0], 5, 123)
        done = command("verify", named, "--depth", "numbers", "--json", home=tmp_path, url=hub.url)
    assert done.code == 0, done.err
    assert json.loads(done.out)["counts"]["weights"] == 123


# published and made again


def test_documents_name_the_first_file(split: Path, whole: Path, tmp_path: Path) -> None:
    assert gguf_models(LocalFolder(split)) == [FIVE[0]]
    card = documents(split, "me/x-GGUF")["README.md"].decode()
    assert "llama-server -hf me/x-GGUF:Q4_K_M " in card
    merge = f"llama-gguf-split --merge {FIVE[0]} qwen3.5-tiny-Q4_K_M.gguf"
    assert f"\n{merge}\n" in card
    assert "ollama run" not in card  # which refuses split files
    lines = modelfile_text(LocalFolder(split)).splitlines()
    assert f"# {merge}" in lines
    assert "FROM ./qwen3.5-tiny-Q4_K_M.gguf" in lines
    both = Path(shutil.copytree(split, tmp_path / "both"))
    shutil.copy(whole, both / "qwen3.5-tiny-Q8_0.gguf")
    lines = modelfile_text(LocalFolder(both)).splitlines()
    assert "FROM ./qwen3.5-tiny-Q8_0.gguf" in lines  # the one that needs no merge


def test_reproduce_makes_the_same_files(split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", str(split), "--source", str(ASSET)]) == 0
    assert "byte for byte" in said(capsys)


@pytest.mark.parametrize("size", [0, -1, True, "1M", [1]])
def test_malformed_size_in_a_manifest(
    size: object, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((out / "qwen35.json").read_text())
    manifest["recipe"]["split_max_size"] = size
    (out / "qwen35.json").write_text(json.dumps(manifest))
    assert main(["reproduce", str(out), "--source", str(ASSET)]) == 2
    assert f"qwen35.json: split_max_size {size!r}, expected bytes of a file" in said(capsys)


def test_amended_template_is_in_the_first_file(out: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    assert main(["amend", str(out), "--chat-template", str(tmp_path / "t.jinja"), "--quiet"]) == 0
    key = "tokenizer.chat_template"
    assert read_container(out / FIVE[0]).keys[key] == "{{ messages[0].content }}"
    assert main(["verify", str(out), "--depth", "structure", "--quiet"]) in (0, 1)
    assert [m.path.name for m in open_candidates([str(out)])] == [FIVE[0]]
