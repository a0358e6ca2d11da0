"""The verifier on files: hashes, the index, the manifest, and what cannot be opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import write_checkpoint
from qwen35.cli.main import main
from qwen35.verification.behaviour import NOT_ASKED
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import verify
from running import limit_shards, load_all, read_config, run
from verifying import check

pytestmark = pytest.mark.sentences


@pytest.mark.parametrize(
    ("name", "check_name"),
    [("model.safetensors", "hash"), ("config.json", "hash")],
)
def test_a_flipped_byte_is_found_by_its_hash(
    name: str, check_name: str, broken_nf4: Path, nf4_artifact: Path
) -> None:
    data = bytearray((broken_nf4 / name).read_bytes())
    at = data.index(b"hidden") if name == "config.json" else len(data) - 10
    data[at] ^= 1
    (broken_nf4 / name).write_bytes(data)
    opened = open_artifact(str(broken_nf4))
    verdict = verify(opened, depth="numbers", threads=1)
    assert (check_name, name) in [(f.check, f.subject) for f in verdict.findings]


@pytest.mark.parametrize(
    ("metadata", "size"),
    [({}, "missing"), ([], "missing"), (None, "missing"), ({"total_size": 1}, 1)],
)
def test_an_index_without_the_size_is_named(
    metadata: object, size: object, broken_nf4: Path
) -> None:
    weight_map = dict.fromkeys(load_all(broken_nf4), "model.safetensors")
    index = {"metadata": metadata, "weight_map": weight_map}
    (broken_nf4 / "model.safetensors.index.json").write_text(json.dumps(index))
    [finding] = [f for f in check(broken_nf4).findings if f.check == "index"]
    assert finding.message.startswith(f"total_size is {size}, the tensors have ")


def test_files_missing_added_or_resized_are_named(broken_nf4: Path) -> None:
    (broken_nf4 / "config.json").write_text((broken_nf4 / "config.json").read_text() + "\n")
    shutil.copy(broken_nf4 / "model.safetensors", broken_nf4 / "extra.safetensors")
    (broken_nf4 / "model.safetensors.index.json").write_text(
        json.dumps(
            {
                "metadata": {"total_size": 1},
                "weight_map": dict.fromkeys(load_all(broken_nf4), "model.safetensors"),
            }
        )
    )
    findings = {(f.check, f.subject) for f in check(broken_nf4).findings}
    assert findings == {
        ("files", "config.json"),
        ("files", "extra.safetensors"),
        ("index", "model.safetensors.index.json"),
    }


def test_a_listed_file_that_is_gone_is_named(dense: Path, tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "in", read_config(dense), load_all(dense), sidecars={"merges.txt": "a b"}
    )
    out = run(source, tmp_path / "out").out
    (out / "merges.txt").unlink()
    assert [(f.check, f.subject) for f in check(out).findings] == [("files", "merges.txt")]


def test_a_stale_index_and_swapped_shards_are_named(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_shards(monkeypatch, 1_500_000)
    out = run(dense, tmp_path / "out").out
    first, second = sorted(out.glob("*.safetensors"))[:2]
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    (out / "qwen35.json").unlink()
    findings = check(out).findings
    assert findings
    assert {finding.check for finding in findings} == {"packing"}
    assert all("by model.safetensors.index.json" in f.message for f in findings)


def test_a_broken_manifest_and_template_are_named(broken_nf4: Path) -> None:
    (broken_nf4 / "qwen35.json").write_text("{}")
    (broken_nf4 / "chat_template.jinja").write_text("{% if %}")
    assert {f.check for f in check(broken_nf4).findings} == {"manifest", "template"}


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        '{"manifest": 1}',
        '{"manifest": 99, "files": {}, "tensors": {}}',
        '{"manifest": 1, "files": {"config.json": 5}, "tensors": {}}',
        '{"manifest": 1, "files": {"config.json": {}}, "tensors": {}}',
        '{"manifest": 1, "files": {}, "tensors": {"a": []}}',
    ],
)
def test_a_malformed_manifest_is_a_finding(broken_nf4: Path, manifest: str) -> None:
    (broken_nf4 / "qwen35.json").write_text(manifest)
    opened = open_artifact(str(broken_nf4))
    verdict = verify(opened, depth="numbers", threads=1)
    assert {finding.check for finding in verdict.findings} == {"manifest"}


def test_files_that_the_manifest_does_not_list_are_named_and_the_others_hashed(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_shards(monkeypatch, 1_500_000)
    out = run(dense, tmp_path / "out", "text").out
    first, *_, last = sorted(path.name for path in out.glob("*.safetensors"))
    manifest = json.loads((out / "qwen35.json").read_text())
    del manifest["files"][first]
    manifest["files"][last]["sha256"] = "0" * 64
    (out / "qwen35.json").write_text(json.dumps(manifest))
    verdict = verify(open_artifact(str(out)), depth="numbers", threads=1)
    found = {f.subject: f.message for f in verdict.findings if f.check == "hash"}
    assert found.keys() == {first, last}
    assert found[first] == "not listed in qwen35.json"
    assert found[last].endswith("..., written as 000000000000...")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text('{"model_type": "qwen3_5"}'),
    ],
)
def test_what_cannot_be_opened_is_a_finding_and_not_a_usage_error(
    broken_nf4: Path, damage: Callable[[Path], object]
) -> None:
    damage(broken_nf4)
    assert main(["verify", str(broken_nf4)]) == 1
    verdict = verify(open_artifact(str(broken_nf4), "behaviour"), depth="behaviour")
    assert (verdict.kind, verdict.counts) == (
        "unreadable",
        {"weights": 0, "packed": 0, "files": 0},
    )
    assert [finding.check for finding in verdict.findings] == ["readable"]
    assert verdict.notes == (NOT_ASKED,)
