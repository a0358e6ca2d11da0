"""Checkpoints on the Hub: the real client against a server on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import random_tensors, tiny_config, write_checkpoint
from fake_hub import COMMIT, FakeHub, Fault, Repo, serving
from hub_command import command
from qwen35.checkpoint.hub import HubId

REPO = "owner/tiny-Qwen3.5"
TOKEN = "hf_opensesame"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the server holds."""
    config = tiny_config(layers=4)
    folder = tmp_path_factory.mktemp("repo") / "source"
    tokenizer = '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'
    sidecars = {"tokenizer.json": tokenizer, "README.md": "# tiny", "secret.txt": "not ours"}
    return write_checkpoint(folder, config, random_tensors(config), shards=2, sidecars=sidecars)


@pytest.fixture
def hub(source: Path) -> Iterator[FakeHub]:
    """A server with one open and one gated repository."""
    repos = {name: Repo.of(source) for name in (REPO, "owner/gated")}
    with serving(FakeHub(repos, gated={"owner/gated"})) as hub:
        yield hub


def refusal(*arguments: str, home: Path, url: str, token: str = "") -> str:
    """Run a command that must fail and return its one sentence."""
    done = command(*arguments, home=home, url=url, token=token)
    assert done.code == 2, done.err
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    return done.err


def revisions_asked(hub: FakeHub) -> set[str]:
    """Return the revisions of all files asked for."""
    paths = [r.path for r in hub.requests if "/resolve/" in r.path]
    return {path.split("/resolve/")[1].split("/")[0] for path in paths}


def head_bytes(folder: Path) -> int:
    """Return the bytes of all headers."""
    return sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors")
    )


def test_plan_reads_headers_only_and_stores_nothing(
    hub: FakeHub, source: Path, tmp_path: Path
) -> None:
    done = command("plan", REPO, "--json", home=tmp_path, url=hub.url)
    assert (done.code, done.err) == (0, "")
    plan = json.loads(done.out)
    assert (plan["repo"], plan["revision"]) == (REPO, COMMIT)
    assert plan["model"] == REPO
    local = command("plan", str(source), "--json", home=tmp_path, url=hub.url)
    assert json.loads(local.out)["digest"] == plan["digest"]
    assert hub.sent(".safetensors-") == head_bytes(source) < 60_000
    small = sum(
        (source / n).stat().st_size
        for n in ("config.json", "model.safetensors.index.json", "README.md")
    )
    assert hub.sent() == head_bytes(source) + small
    assert all(r.range for r in hub.requests if "/resolve/" in r.path)
    assert revisions_asked(hub) == {COMMIT}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("revision", ["main", "v1", COMMIT])
def test_revision_is_resolved_to_its_commit(hub: FakeHub, tmp_path: Path, revision: str) -> None:
    done = command("plan", f"{REPO}@{revision}", "--json", home=tmp_path, url=hub.url)
    assert json.loads(done.out)["revision"] == COMMIT


def test_dry_run_of_convert_stores_nothing(hub: FakeHub, tmp_path: Path) -> None:
    done = command("convert", REPO, "out", "--dry-run", home=tmp_path, url=hub.url)
    assert done.code == 0, done.err
    assert list(tmp_path.iterdir()) == []


def test_convert_pins_the_commit_and_says_so(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    hub.repos[REPO].refs["main"] = "f" * 40  # main has moved on
    arguments = ("convert", f"{REPO}@v1", "out", "--recipe", "text")
    done = command(*arguments, home=tmp_path, url=hub.url)
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "out" / "qwen35.json").read_text())
    assert manifest["source"] == {"repo": REPO, "revision": COMMIT}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "qwen35.json",
        "tokenizer.json",
    ]
    resolved = [r for r in hub.requests if "/resolve/" in r.path]
    assert revisions_asked(hub) == {COMMIT}
    asked = {r.path.rsplit("/", 1)[1] for r in resolved}
    assert "secret.txt" not in asked
    local = tmp_path / "local"
    command("convert", str(source), str(local), "--recipe", "text", home=tmp_path, url=hub.url)
    assert (local / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_second_convert_downloads_nothing_again(hub: FakeHub, tmp_path: Path) -> None:
    assert command("convert", REPO, "a", "--recipe", "text", home=tmp_path, url=hub.url).code == 0
    hub.requests.clear()
    assert command("convert", REPO, "b", "--recipe", "text", home=tmp_path, url=hub.url).code == 0
    assert hub.sent() < 100_000


def test_existing_output_is_told_before_any_download(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("mine")
    sentence = refusal("convert", REPO, "out", home=tmp_path, url=hub.url)
    assert "out: exists already" in sentence
    assert hub.requests == []


def test_unknown_repository_is_one_sentence(hub: FakeHub, tmp_path: Path) -> None:
    for token in ("", TOKEN):
        sentence = refusal("plan", "owner/nothing", home=tmp_path, url=hub.url, token=token)
        assert sentence == (
            "error: owner/nothing: no such folder here, and no such repository, or it is private; "
            "check the name; for a private one set HF_TOKEN or give --hf-token\n"
        )


def test_unknown_revision_is_one_sentence(hub: FakeHub, tmp_path: Path) -> None:
    sentence = refusal("plan", f"{REPO}@v9", home=tmp_path, url=hub.url)
    assert sentence == f"error: {REPO}: no such revision; check the part after @\n"


def test_gated_repository_is_one_sentence_and_opens_with_a_token(
    hub: FakeHub, tmp_path: Path
) -> None:
    sentence = refusal("plan", "owner/gated", home=tmp_path, url=hub.url, token="hf_wrong")
    assert "access is gated; accept its terms on the Hub, then give a token" in sentence
    assert "hf_wrong" not in sentence
    assert command("plan", "owner/gated", home=tmp_path, url=hub.url, token=TOKEN).code == 0
    by_flag = ("plan", "owner/gated", "--hf-token", TOKEN)
    done = command(*by_flag, home=tmp_path, url=hub.url, token="hf_wrong")
    assert done.code == 0
    assert TOKEN not in done.out + done.err


@pytest.mark.parametrize("token", ["hf_one\nhf_two", "hf_one two", "hf_ä", "hf_\udcff"])
@pytest.mark.parametrize("by_flag", [True, False])
def test_token_that_cannot_be_one_is_blamed_before_any_request(
    token: str, by_flag: bool, hub: FakeHub, tmp_path: Path
) -> None:
    if not by_flag:
        token = token.replace("\n", "\v")  # the client joins the lines of HF_TOKEN
    flag, variable = (("--hf-token", token), "") if by_flag else ((), token)
    arguments = ("plan", REPO, *flag)
    sentence = refusal(*arguments, home=tmp_path, url=hub.url, token=variable)
    assert sentence == (
        "error: access token: holds a space, a line break or a letter outside ASCII; "
        "copy it again, to HF_TOKEN or --hf-token\n"
    )
    assert hub.requests == []


def test_token_is_never_in_a_manifest(hub: FakeHub, tmp_path: Path) -> None:
    arguments = ("convert", "owner/gated", "out", "--recipe", "text", "--hf-token", TOKEN)
    done = command(*arguments, home=tmp_path, url=hub.url)
    assert done.code == 0, done.err
    assert TOKEN not in done.out + done.err
    assert TOKEN not in (tmp_path / "out" / "qwen35.json").read_text()


def test_server_that_is_down_is_one_sentence(tmp_path: Path, source: Path) -> None:
    with serving(FakeHub({REPO: Repo.of(source)})) as gone:
        pass
    sentence = refusal("plan", REPO, home=tmp_path, url=gone.url, token=TOKEN)
    assert "the Hub was not reached" in sentence
    assert "check the network and HF_ENDPOINT, then run again" in sentence
    assert TOKEN not in sentence


@pytest.mark.parametrize("status", [400, 403, 418])
def test_other_answers_are_told_with_their_number(
    hub: FakeHub, tmp_path: Path, status: int
) -> None:
    hub.faults.append(Fault(f"/{REPO}/resolve", status=status))
    sentence = refusal("plan", REPO, home=tmp_path, url=hub.url, token=TOKEN)
    assert f"the Hub answered {status}" in sentence
    assert TOKEN not in sentence
    assert hub.url not in sentence


def test_server_that_ignores_ranges_works(hub: FakeHub, tmp_path: Path) -> None:
    hub.ignore_ranges = True
    done = command("plan", REPO, "--json", home=tmp_path, url=hub.url)
    assert done.code == 0, done.err
    assert json.loads(done.out)["revision"] == COMMIT


def test_file_that_vanishes_from_the_repository_is_one_sentence(
    hub: FakeHub, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    hub.repos["owner/empty"] = Repo.of(tmp_path / "empty")
    sentence = refusal("plan", "owner/empty", home=tmp_path, url=hub.url)
    assert f"owner/empty@{COMMIT[:12]}: no config.json in it" in sentence


def test_failing_download_leaves_no_output(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.append(Fault(f"/{REPO}/resolve/{COMMIT}/tokenizer.json", status=403))
    sentence = refusal("convert", REPO, "out", home=tmp_path, url=hub.url)
    assert sentence.startswith(f"error: {REPO}: the Hub answered 403; check the network")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["owner/a--b", "owner/-a", "owner/a.", "owner/..", "-o/a"])
def test_name_that_no_repository_can_have_is_one_sentence(
    hub: FakeHub, tmp_path: Path, name: str
) -> None:
    sentence = refusal(
        "plan", *(["--"] if name[0] == "-" else []), name, home=tmp_path, url=hub.url
    )
    assert sentence.startswith(f"error: {name}: ")
    assert "not reached" not in sentence


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-9B", None),
        ("a/b@main", "a/b", "main"),
        ("a/b@refs/pr/3", "a/b", "refs/pr/3"),
        (f"a.b_c/d-e@{COMMIT}", "a.b_c/d-e", COMMIT),
    ],
)
def test_id_is_parsed(text: str, repo: str, revision: str | None) -> None:
    assert HubId.parse(text) == HubId(repo, revision)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a/b/c",
        "a/",
        "/b",
        "a/b@",
        "a b/c",
        "a/b@x y",
        "a/b\n",
        "ä/b",
        "https://x/a/b",
        "a@b/c",
    ],
)
def test_other_text_is_no_id(text: str) -> None:
    assert HubId.parse(text) is None
