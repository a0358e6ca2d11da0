"""`qwen35 amend`: small files that were edited on purpose are checked and recorded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

import qwen35
from checkpoints import ASSET
from hub_client import REPO, files_in
from qwen35.checkpoint.gguf_header import read_container
from qwen35.cli.main import main
from qwen35.errors import InputError
from qwen35.publishing.hashes import FileHasher
from qwen35.publishing.listing import list_local
from qwen35.publishing.ready import readiness
from qwen35.publishing.repo_documents import documents, write_documents
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import verify
from verifying import check

Capture = pytest.CaptureFixture[str]


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}{% endfor %}"


@pytest.fixture
def text(formats: Path, tmp_path: Path) -> Path:
    """A text-only artifact of the embedded checkpoint."""
    return Path(shutil.copytree(formats / "text", tmp_path / "text"))


@pytest.fixture
def ggufs(formats: Path, tmp_path: Path) -> Path:
    """A folder of GGUF files of the embedded checkpoint."""
    return Path(shutil.copytree(formats / "gguf", tmp_path / "gguf"))


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "fixed.jinja"
    path.write_text(TEMPLATE)
    return path


def manifest_of(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "qwen35.json").read_text())
    return parsed


def edit_manifest(folder: Path, **changes: Any) -> None:
    (folder / "qwen35.json").write_text(json.dumps({**manifest_of(folder), **changes}))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ready(folder: Path) -> bool:
    return not readiness(folder, list_local(folder, FileHasher()))


# what is recorded


def test_edited_side_car_is_refused_until_it_is_recorded(text: Path) -> None:
    earlier = manifest_of(text)
    (text / "chat_template.jinja").write_text(TEMPLATE)
    assert [one.subject for one in check(text).findings] == ["chat_template.jinja"]
    assert not ready(text)
    done = qwen35.amend(text, why="tool calls")
    assert (done.findings, list(done.files)) == ((), ["chat_template.jinja"])
    later = manifest_of(text)
    (row,) = later.pop("amended")
    was = earlier["files"]["chat_template.jinja"]
    assert (row["why"], row["files"]) == ("tool calls", {"chat_template.jinja": was})
    assert row["when"].endswith("Z")
    now = {"size": len(TEMPLATE), "sha256": hashlib.sha256(TEMPLATE.encode()).hexdigest()}
    earlier["files"]["chat_template.jinja"] = now
    assert later == earlier
    assert ready(text)


def test_verify_accepts_it_and_says_so(text: Path) -> None:
    (text / "chat_template.jinja").write_text(TEMPLATE)
    settings = json.loads((text / "generation_config.json").read_text())
    (text / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.3}))
    assert {one.subject for one in check(text, ASSET).findings} == {
        "chat_template.jinja",
        "generation_config.json",
    }
    qwen35.amend(text)
    verdict = check(text, ASSET)
    assert verdict.findings == ()
    assert "; amended since: chat_template.jinja, generation_config.json" in verdict.result
    notes = "\n".join(verdict.notes)
    assert "chat_template.jinja, amended: " in notes
    assert "generation_config.json, amended: temperature is 0.3" in notes


def test_difference_that_was_not_amended_stays_a_finding(text: Path) -> None:
    (text / "chat_template.jinja").write_text(TEMPLATE)
    qwen35.amend(text)
    (text / "generation_config.json").write_text('{"temperature": 0.3}')
    found = {one.subject for one in check(text, ASSET).findings}
    assert found == {"generation_config.json"}


def test_an_artifact_cannot_excuse_another_vocabulary(text: Path) -> None:
    path = text / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    manifest = manifest_of(text)
    row = {
        "when": "2026-01-01T00:00:00Z",
        "why": "",
        "files": {path.name: manifest["files"][path.name]},
    }
    content = path.read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {**manifest, "amended": [row], "files": {**manifest["files"], path.name: entry}}
    (text / "qwen35.json").write_text(json.dumps(manifest))
    assert {one.subject for one in check(text, ASSET).findings} == {"tokenizer.json"}


def test_reproduce_compares_with_what_was_first_written(
    text: Path, tmp_path: Path, capsys: Capture
) -> None:
    for content in (TEMPLATE, TEMPLATE + "{# twice #}"):
        (text / "chat_template.jinja").write_text(content)
        qwen35.amend(text, why="fixed")
    (text / "added_tokens.json").write_text("{}")
    qwen35.amend(text)
    assert len(manifest_of(text)["amended"]) == 3
    assert main(["reproduce", str(text), "--source", str(ASSET), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [note.partition(",")[2] for note in told["notes"] if "amended" in note] == [
        " chat_template.jinja: fixed; compared as first written",
        " chat_template.jinja: fixed; compared as first written",
        " added_tokens.json; compared as first written",
    ]
    (text / "chat_template.jinja").write_text("edited again")
    assert main(["reproduce", str(text), "--source", str(ASSET), "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["message"] == "the file beside the manifest is not as amended"


def test_card_tells_it(text: Path) -> None:
    write_documents(text, documents(text, REPO))
    assert "Amended" not in (text / "README.md").read_text()
    (text / "chat_template.jinja").write_text(TEMPLATE)
    qwen35.amend(text, why="tool calls")
    write_documents(text, documents(text, REPO))
    day = manifest_of(text)["amended"][0]["when"][:10]
    line = f"Amended {day}, chat_template.jinja: tool calls."
    assert line in (text / "README.md").read_text()


def test_edited_card_becomes_someone_elses(text: Path) -> None:
    write_documents(text, documents(text, REPO))
    (text / "README.md").write_text("mine")
    assert list(qwen35.amend(text).files) == ["README.md"]
    assert manifest_of(text)["added"] == {}
    write_documents(text, documents(text, "owner/other"))
    assert (text / "README.md").read_text() == "mine"


def test_passed_verdict_no_longer_holds_and_a_failed_one_stays(text: Path) -> None:
    for i, passed in enumerate((True, False)):
        edit_manifest(text, verified={"passed": passed})
        (text / "chat_template.jinja").write_text(TEMPLATE + " " * i)
        qwen35.amend(text)
        assert ("verified" in manifest_of(text)) is not passed


def test_nothing_to_record_and_dry_runs_write_nothing(
    text: Path, template: Path, capsys: Capture
) -> None:
    before = files_in(text)
    assert main(["amend", str(text)]) == 0
    assert "nothing to record" in capsys.readouterr().out
    (text / "chat_template.jinja").write_text(TEMPLATE)
    edited = files_in(text)
    assert main(["amend", str(text), "--dry-run"]) == 0
    assert "would be recorded: chat_template.jinja" in capsys.readouterr().out
    assert files_in(text) == edited
    (text / "chat_template.jinja").write_bytes(before["chat_template.jinja"])
    assert main(["amend", str(text), "--dry-run", "--chat-template", str(template)]) == 0
    assert files_in(text) == before


# a template from a file


def test_template_of_a_checkpoint(text: Path, template: Path) -> None:
    qwen35.amend(text, chat_template=template)
    assert (text / "chat_template.jinja").read_text() == TEMPLATE
    assert ready(text)


def test_template_of_gguf_files(ggufs: Path, template: Path, capsys: Capture) -> None:
    """Read by the gguf library: other template, same other keys, same tensors."""
    before = {path.name: GGUFReader(path) for path in ggufs.glob("*.gguf")}
    kept = {name: [t.data.tobytes() for t in one.tensors] for name, one in before.items()}
    asked = ["amend", str(ggufs), "--chat-template", str(template), "--json"]
    assert main([*asked, "--dry-run"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert {path: sha256(ggufs / path) for path in kept} == {
        name: row["was"] for name, row in dry["files"].items()
    }
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out) == dry
    for name, old in before.items():
        new = GGUFReader(ggufs / name)
        assert sha256(ggufs / name) == dry["files"][name]["now"]
        assert list(new.fields) == list(old.fields)
        changed = [k for k in new.fields if new.fields[k].contents() != old.fields[k].contents()]
        assert changed == ["tokenizer.chat_template"]
        assert new.fields["tokenizer.chat_template"].contents() == TEMPLATE
        assert [t.data.tobytes() for t in new.tensors] == kept[name]
    assert ready(ggufs)
    verdict = check(ggufs, ASSET)
    assert verdict.findings == ()
    assert "amended since: " in verdict.result
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out)["files"] == {}


def test_gguf_file_without_a_template_gets_one(ggufs: Path, template: Path) -> None:
    path = next(ggufs.glob("*.gguf"))
    old = read_container(path)
    begin, end = old.spans["tokenizer.chat_template"]
    content = path.read_bytes()
    name = len("tokenizer.chat_template")
    count = int.from_bytes(content[16:24], "little") - 1
    head = content[: begin - 12 - name] + content[end : old.records]
    head = head[:16] + count.to_bytes(8, "little") + head[24:]
    path.write_bytes(head + bytes(-len(head) % 32) + content[old.data :])
    assert "tokenizer.chat_template" not in read_container(path).keys
    files = manifest_of(ggufs)["files"]
    files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    edit_manifest(ggufs, files=files)
    assert qwen35.amend(ggufs, chat_template=template).findings == ()
    new = read_container(path)
    assert new.keys == {**old.keys, "tokenizer.chat_template": TEMPLATE}
    assert verify(open_artifact(str(ggufs))).passed


def test_killed_rewriting_is_mended_by_the_same_call(
    ggufs: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(ggufs.glob("*.gguf"))
    replace, calls = Path.replace, []

    def killed(self: Path, target: Path) -> Any:
        calls.append(target)
        if len(calls) == 2:  # after the manifest
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        qwen35.amend(ggufs, chat_template=template, why="fixed")
    monkeypatch.undo()
    assert not ready(ggufs)
    done = qwen35.amend(ggufs, chat_template=template, why="fixed")
    assert (done.findings, done.files) == ((), {})
    assert all(read_container(p).keys["tokenizer.chat_template"] == TEMPLATE for p in paths)
    assert ready(ggufs)
    assert len(manifest_of(ggufs)["amended"]) == 1
    assert not list(ggufs.glob(".qwen35*"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{% for %}", "not a valid Jinja template"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b" \n", "is empty"),
        (b"no question", "writes prompts without the question in them"),
        (b"{{ raise_exception('never') }}", "refuses a plain question"),
        (b"x" * (2**20 + 1), "far too large"),
    ],
)
def test_bad_template_is_one_sentence(
    text: Path, template: Path, content: bytes, words: str, capsys: Capture
) -> None:
    template.write_bytes(content)
    before = files_in(text)
    assert main(["amend", str(text), "--chat-template", str(template)]) == 2
    assert words in capsys.readouterr().err
    assert files_in(text) == before


# what is refused


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "weights": (
        lambda out: flip(next(out.glob("*.safetensors"))),
        ".safetensors",
        "its weights are not those that were written",
    ),
    "config": (
        lambda out: (out / "config.json").write_text("{}"),
        "config.json",
        "it says how weights are read",
    ),
    "gone": (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json", "missing"),
    "damaged": (
        lambda out: (out / "generation_config.json").write_text('{"temperature": "hot"}'),
        "generation_config.json",
        "temperature",
    ),
    "broken template": (
        lambda out: (out / "chat_template.jinja").write_text("{% if %}"),
        "chat_template.jinja",
        "not a valid Jinja template",
    ),
    "vision": (
        lambda out: (out / "preprocessor_config.json").write_text("{}"),
        "preprocessor_config.json",
        "nothing reads it",
    ),
    "program": (lambda out: (out / "modeling.py").write_text(""), "modeling.py", "a program"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_finding_stops_it_and_nothing_is_written(text: Path, name: str, capsys: Capture) -> None:
    change, subject, words = REFUSED[name]
    change(text)
    (text / "special_tokens_map.json").write_text("{}")
    before = files_in(text)
    assert main(["amend", str(text), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert any(one["subject"].endswith(subject) and words in one["message"] for one in findings)
    assert files_in(text) == before


def test_link_in_place_of_a_side_car_is_not_followed(text: Path, template: Path) -> None:
    secret = text.parent / "secret.jinja"
    secret.write_text("secret")
    (text / "chat_template.jinja").unlink()
    (text / "chat_template.jinja").symlink_to(secret)
    findings = qwen35.amend(text).findings
    assert ("chat_template.jinja", "a symbolic link that leads outside") in {
        (one.subject, one.message) for one in findings
    }
    assert qwen35.amend(text, chat_template=template).findings
    assert secret.read_text() == "secret"


def test_gguf_folder_takes_no_side_cars(ggufs: Path, capsys: Capture) -> None:
    (ggufs / "chat_template.jinja").write_text(TEMPLATE)
    assert main(["amend", str(ggufs)]) == 1
    assert "chat_template.jinja: nothing reads it in an artifact" in capsys.readouterr().out


def test_changed_gguf_file_is_not_rewritten(ggufs: Path, template: Path) -> None:
    flip(next(ggufs.glob("*.gguf")))
    before = files_in(ggufs)
    (finding,) = qwen35.amend(ggufs, chat_template=template).findings
    assert finding.check == "hash"
    assert files_in(ggufs) == before


def test_folder_without_a_manifest_is_refused(tmp_path: Path, capsys: Capture) -> None:
    for folder in (ASSET, tmp_path, tmp_path / "none"):
        assert main(["amend", str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("key", ["files", "tensors", "recipe", "added", "amended", "manifest"])
@pytest.mark.parametrize("value", [None, 1, "x", [1], [{}], {"a": 1}, {"a": {"size": "1"}}])
def test_manifest_of_wrong_types_is_no_traceback(text: Path, key: str, value: Any) -> None:
    edit_manifest(text, **{key: value})
    for verb in (qwen35.amend, lambda out: documents(out, REPO)):
        with suppress(InputError):  # one sentence, or it is of no use to the verb
            verb(text)


@pytest.mark.sentences
@pytest.mark.parametrize("key", ["files", "added", "amended"])
def test_manifest_whose_entries_are_no_entries_is_refused(text: Path, key: str) -> None:
    for value in (1, [1], {"a": 1}, {"a": {"size": "1", "sha256": "x"}}, [{"files": {"a": 1}}]):
        edit_manifest(text, **{key: value})
        with pytest.raises(InputError, match=f"malformed {key}"):
            qwen35.amend(text)


def test_hostile_names_reach_no_other_file(text: Path) -> None:
    victim = text.parent / "victim"
    victim.write_text("victim")
    files = manifest_of(text)["files"]
    entry = {"size": 6, "sha256": sha256(victim)}
    edit_manifest(text, files={**files, "../victim": entry, os.fspath(victim): entry})
    with pytest.raises(InputError, match=r"qwen35\.json"):
        qwen35.amend(text)
