"""The parts of publishing that need no Hub: differences, guards, hashes."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from checkpoints import ASSET
from qwen35.errors import Finding, InputError, UsageError
from qwen35.publishing.diff import Diff, Kind, check_same, load_diff, pull_diff, push_diff
from qwen35.publishing.diff_display import diff_text
from qwen35.publishing.guard import UNWANTED, bad_name, unwanted
from qwen35.publishing.hashes import FileDigest, FileHasher, digest_bytes, digest_file
from qwen35.publishing.listing import LocalListing, RemoteFile, RemoteRepo, list_local, walk
from qwen35.publishing.pull import apply_pull
from qwen35.publishing.push import apply_push
from qwen35.publishing.secret_search import SECRETS, secrets
from qwen35.publishing.sync import save_diff

A, B = digest_bytes(b"a"), digest_bytes(b"b")


def local(**files: FileDigest) -> LocalListing:
    return LocalListing({name.replace("_", "."): digest for name, digest in files.items()})


def remote(lfs: Iterable[str] = (), **files: FileDigest) -> RemoteRepo:
    rows = {}
    for key, digest in files.items():
        name = key.replace("_", ".")
        sha256 = digest.sha256 if name in lfs else None
        blob = "0" * 40 if sha256 else digest.blob
        rows[name] = RemoteFile(name, digest.size, blob, sha256)
    return RemoteRepo("owner/name", "c" * 40, rows)


def kinds(diff: Diff) -> dict[str, Kind]:
    return {op.path: op.kind for op in diff.operations}


# differences


def test_push_compares_small_files_by_blob_and_large_ones_by_sha256() -> None:
    here = local(same_txt=A, other_txt=A, same_bin=A, other_bin=A, new_txt=A)
    there = remote(("same.bin", "other.bin"), same_txt=A, other_txt=B, same_bin=A, other_bin=B)
    assert kinds(push_diff(here, there)) == {
        "new.txt": "upload",
        "other.bin": "upload",
        "other.txt": "upload",
        "same.bin": "same",
        "same.txt": "same",
    }
    assert kinds(pull_diff(here, there)) == {
        "new.txt": "keep",
        "other.bin": "download",
        "other.txt": "download",
        "same.bin": "same",
        "same.txt": "same",
    }


def test_same_hash_of_another_size_is_another_file() -> None:
    row = RemoteFile("x", 2, A.blob, A.sha256)
    assert not row.holds(A)
    assert RemoteFile("x", 1, A.blob, A.sha256).holds(A)
    assert not RemoteFile("x", 1, A.blob, B.sha256).holds(A)


def test_nothing_is_deleted_unless_asked() -> None:
    here, there = local(mine_txt=A), remote(theirs_txt=A)
    assert kinds(push_diff(here, there)) == {"mine.txt": "upload", "theirs.txt": "keep"}
    assert kinds(push_diff(here, there, delete=True))["theirs.txt"] == "delete"
    assert kinds(pull_diff(here, there)) == {"mine.txt": "keep", "theirs.txt": "download"}
    assert kinds(pull_diff(here, there, delete=True))["mine.txt"] == "remove"


def test_the_hubs_own_file_is_left_alone() -> None:
    mine = LocalListing({".gitattributes": A})
    there = RemoteRepo("o/n", "c", {".gitattributes": RemoteFile(".gitattributes", 1, B.blob)})
    for diff in (
        push_diff(mine, there, delete=True),
        push_diff(LocalListing({}), there, delete=True),
        push_diff(mine, RemoteRepo("o/n", "c", {}), delete=True),
        pull_diff(mine, there, delete=True),
        pull_diff(mine, RemoteRepo("o/n", "c", {}), delete=True),
        pull_diff(LocalListing({}), there, delete=True),
    ):
        assert kinds(diff) == {".gitattributes": "keep"}
    assert kinds(push_diff(mine, there, only=[".gitattributes"])) == {".gitattributes": "upload"}


def test_difference_survives_being_saved(tmp_path: Path) -> None:
    finding = Finding("secret", "x", "holds what looks like a key")
    base = push_diff(local(a_txt=A, b_txt=B), remote(b_txt=A, c_txt=A), delete=True)
    for diff in (base, push_diff(LocalListing({"x": A}, (finding,)), remote(), only=["x"])):
        save_diff(diff, tmp_path / "saved")
        assert load_diff(tmp_path / "saved") == diff


def test_difference_with_findings_is_not_applied(tmp_path: Path) -> None:
    finding = Finding("secret", "x", "holds what looks like a key")
    push = push_diff(LocalListing({"x": A}, (finding,)), remote())
    with pytest.raises(InputError, match="x: holds what looks like a key; nothing was changed"):
        apply_push(push, tmp_path, message="m")
    pull = pull_diff(local(), RemoteRepo("o/n", "c" * 40, {"../x": RemoteFile("../x", 1, A.blob)}))
    with pytest.raises(InputError, match=r"\.\./x: not a plain relative path"):
        apply_pull(pull, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_saved_difference_must_still_hold() -> None:
    saved = push_diff(local(a_txt=A), remote(a_txt=B))
    check_same(saved, push_diff(local(a_txt=A), remote(a_txt=B)))
    moved = RemoteRepo("owner/name", "d" * 40, remote(a_txt=B).files)
    with pytest.raises(UsageError, match="is at dddddddddddd, the diff was made at cccccccccccc"):
        check_same(saved, push_diff(local(a_txt=A), moved))
    with pytest.raises(UsageError, match=r"a\.txt: changed"):
        check_same(saved, push_diff(local(a_txt=B), remote(a_txt=B)))
    with pytest.raises(UsageError, match=r"b\.txt: changed"):
        check_same(saved, push_diff(local(a_txt=A, b_txt=A), remote(a_txt=B)))
    with pytest.raises(UsageError, match=r"a\.txt: gone"):
        check_same(saved, push_diff(local(), remote()))


def test_table_escapes_what_could_harm_a_terminal() -> None:
    there = RemoteRepo("o/n", "c", {"a\x1b[2J\n": RemoteFile("a\x1b[2J\n", 1, A.blob)})
    text = diff_text(push_diff(local(), there))
    assert "\\x1b[2J\\n" in text
    assert "\x1b" not in text


# names


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        ".ENV",
        "a/.env.local",
        "prod.env",
        ".netrc",
        "x/token",
        "my.pem",
        "server.key",
        "id_rsa",
        "id_ed25519.pub",
        ".ssh/known",
        "a.tmp",
        ".tmpAbC",
        "w.safetensors.incomplete",
        "x.partial",
        "train.log",
        "a~",
        ".x.swp",
        "__pycache__/m.pyc",
        ".DS_Store",
        ".qwen35-partial",
        ".git-credentials",
        "deep/.aws/config",
        "a.lock",
        "b.bak",
        "rclone.conf",
        "a/terraform.tfstate.backup",
        "client_secret_1.json",
        "hf_token",
        "token.txt",
        ".bash_history",
        ".python_history",
        "kubeconfig",
        "deep/.pgpass",
        "my.ppk",
        "service-account-prod.json",
        ".vault-token",
        "secrets.toml",
    ],
)
def test_unwanted_names(path: str) -> None:
    assert unwanted(path)


@pytest.mark.parametrize(
    "path",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "README.md",
        "model-00001-of-00002.safetensors",
        "qwen35.json",
        "model.sig",
        "environment.yml",
        "LICENSE",
        "special_tokens_map.json",
        "key_value.txt",
        "history.md",
        ".gitignore",
        "Modelfile",
        "keys/a.txt",
    ],
)
def test_wanted_names(path: str) -> None:
    assert not unwanted(path)
    assert not bad_name(path)


def test_patterns_are_lower_case() -> None:
    assert [pattern for pattern in UNWANTED if pattern != pattern.lower()] == []


# contents

EXAMPLES = {
    "a Hugging Face token": "hf_" + "aB3dE" * 7,
    "an OpenAI or Anthropic key": "sk-ant-" + "aB3_" * 10,
    "an AWS key id": "AKIA" + "A1B2C3D4E5F6G7H8",
    "a temporary AWS key id": "ASIA" + "A1B2C3D4E5F6G7H8",
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "a fine-grained GitHub token": "github_pat_" + "a1B2_" * 14,
    "a GitLab token": "glpat-" + "aB3_" * 5,
    "a Slack token": "xoxb-" + "1234567890" * 3,
    "a Google API key": "AIza" + "aB3_e" * 7,
    "a Weights & Biases key": "WANDB_API_KEY=" + "0123456789abcdef" * 2 + "01234567",
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "a Hugging Face token of an organization": "api_org_" + "aBcDe" * 7,
    "an NVIDIA key": "nvapi-" + "aB3_e-" * 11,
    "an npm token": "npm_" + "a1B2" * 9,
    "a Databricks token": "dapi" + "0123456789abcdef" * 2,
    "a Replicate token": "r8_" + "a1B2" * 9 + "c",
    "a Weights & Biases login": "wandb login --relogin " + "0123456789abcdef" * 2 + "01234567",
    "a Google OAuth client secret": "GOCSPX-" + "a1B2c3_" * 4,
    "a PuTTY key": "PuTTY-User-Key-File-3: ssh-rsa",
    "a Groq key": "gsk_" + "a1B2" * 13,
    "an xAI key": "xai-" + "a1B2" * 20,
    "a Docker Hub token": "dckr_pat_" + "aB3_" * 7,
    "a DigitalOcean token": "dop_v1_" + "0123456789abcdef" * 4,
    "a Vault token": "hvs." + "aB3_" * 8,
    "a Google OAuth token": "ya29." + "aB3_" * 20,
    "an age key": "AGE-SECRET-KEY-1" + "QPZRY9X8GF" * 6,
    "a password of .netrc": "machine api.wandb.ai\n  login user\n  password " + "0a1b2c3d4e" * 4,
}


def found_in(path: Path, token: str | None = None) -> list[str]:
    found = list(secrets(path, path.name, token))
    assert all(f.check == "secret" and f.subject == path.name for f in found)
    return [re.sub(r"^(line \d+ )?holds what looks like ", "", f.message) for f in found]


def test_every_pattern_has_an_example() -> None:
    assert EXAMPLES.keys() == SECRETS.keys()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_secret_is_found_and_not_repeated(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(f"first line\nkey: {EXAMPLES[kind]} \n")
    assert found_in(path) == [kind]
    assert EXAMPLES[kind] not in str(list(secrets(path, "notes.txt")))


KEYED = [
    "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    'export db_password="correct7horse8battery9"',
    "  client_secret: 3f9a0b7c2d1e4f5a6b7c8d9e0f1a2b3c",
    '{"api_key": "0123456789abcdef0123456789abcdef"}',
    "HF_TOKEN=a1b2c3d4e5f6a7b8c9d0e1f2",
    "https://user:hunter2hunter2@example.org/repo.git",
    "DefaultEndpointsProtocol=https;AccountKey=" + "aB3/" * 21 + "ab==",
    "sk_live_" + "a1B2" * 6,
    "SG." + "a1B2c3D4e5F" * 2 + "." + "a1B2c3D4e5F6g7H8i9J0kLmNoPqRsTuVwXyZ0123456",
]


@pytest.mark.parametrize("text", KEYED)
@pytest.mark.parametrize("width", [0, 5000])
def test_secrets_by_name_and_of_other_services(text: str, width: int, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("one\ntwo " + "x " * width + text + "\nthree\n")
    (finding,) = secrets(path, "notes.txt")
    assert finding.message.startswith("line 2 holds what looks like a secret")
    assert not any(word in str(finding) for word in re.findall(r"[\w/]{12,}", text)[-1:])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_secrets_in_what_windows_writes(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(f"one\r\ntwo\r\n{KEYED[0]}\r\n".encode(encoding))
    (finding,) = secrets(path, "notes.txt")
    assert finding.message == "line 3 holds what looks like a secret by its name"
    path.write_bytes(codecs.BOM_UTF16_BE + f"\n{EXAMPLES['an npm token']}".encode("utf-16-be"))
    (finding,) = secrets(path, "notes.txt")
    assert finding.message == "line 2 holds what looks like an npm token"


@pytest.mark.parametrize("head", [codecs.BOM_UTF16_LE, codecs.BOM_UTF32_BE, b"\xff", b"\xfe"])
def test_what_begins_like_another_encoding(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(head + bytes(range(256)) * 3 + b"\xd8")
    assert found_in(path) == []


VALUE = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzz9kEY"
SHAPES = [
    f'os.environ["AWS_SECRET_ACCESS_KEY"] = "{VALUE}"',
    json.dumps(f'os.environ["API_KEY"] = "{VALUE}"\n'),
    json.dumps({"a": json.dumps({"b": json.dumps({"api_key": VALUE})})}),
    f"ENV AWS_SECRET_ACCESS_KEY {VALUE}",
    f"setx API_KEY {VALUE}",
    f"tool --api-key '{VALUE}'",
    f'SECRET_KEY = b"{VALUE}"',
    f'os.getenv("API_KEY", "{VALUE}")',
    f"<secretKey>{VALUE}</secretKey>",
    f'<add key="ApiKey" value="{VALUE}"/>',
    f"- name: AWS_SECRET_ACCESS_KEY\n  value: {VALUE}",
    f'{{"name": "API_KEY",\n  "value": "{VALUE}"}}',
    f"api_key: >-\n  {VALUE}",
    f"Authorization: Bearer {VALUE}",
    f'headers = {{"Authorization": "Basic {VALUE}"}}',
    f'[hub]\ntoken = "{VALUE}"',
    f'{{"auths": {{"x": {{"auth": "{VALUE}"}}}}}}',
    'password = "S3cr3t!pass$word#2024"',
    f"?api_key%3D{VALUE}",
    f"name\0AWS_SECRET_ACCESS_KEY={VALUE}\0",
]


@pytest.mark.parametrize("text", SHAPES)
def test_ways_to_write_a_secret_with_its_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(f"{text}\n")
    (finding,) = secrets(path, "notes.txt")
    where = "" if "\0" in text else f"line {1 + text.count(chr(10))} "
    assert finding.message == f"{where}holds what looks like a secret by its name"


@pytest.mark.parametrize("before", [r'{"a": "b\n', "%3D", r"\u003d", r"\x3d", "a=3D", "\x1b[1;31m"])
def test_token_after_an_escape(before: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(before + EXAMPLES["a Hugging Face token"])
    assert found_in(path) == ["a Hugging Face token"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_secret_in_a_text_without_its_mark(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(f"one two three\n{KEYED[0]}\n".encode(encoding))
    assert found_in(path) == ["a secret by its name"]


@pytest.mark.parametrize(
    "text",
    [
        'OpenAI(api_key="EMPTY", base_url="http://localhost:8000/v1")',
        "api_key=os.environ['SOME_SERVICE_API_KEY_2']",
        "export HF_TOKEN=<your token>",
        '"password": 21553, "secret": 8123, "Ġapi_key": 15124',
        '"access_token_type_ids_of_the_model": "token_type_ids"',
        "password = getpass.getpass()",
        '"sha256": "' + "3f9a0b7c" * 8 + '"',
        "secretary: Jane-Doe-Of-The-Board",
        "Authorization: Bearer YOUR_ACCESS_TOKEN_1",
        "curl -H 'Authorization: Bearer $HF_TOKEN' https://huggingface.co/api/models2",
        "export HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "hf_" + "X" * 34 + ' api_key="xxxxxxxxxxxxxxxxxxx1"',
        'login(token="hf_...")',
        "tool --tokenizer Qwen/Qwen3.5-0.8B-Instruct --max-token-length 4096",
        'token = "reserved_special_token_250"',
        'api_key = get_from_the_vault_v2("a")',
        'token_url: "https://login.example.org/oauth2/token"',
        'password: "$MY_DATABASE_PASSWORD_2"',
        "api_key: ${{ secrets.API_KEY_OF_SERVICE_2 }}",
        '["secret", "ary", "token", "izers1"], ["Ġapi_key", "Ġvalue123"]',
        '"eos_token": "<|endoftext|>", "eos_token_id": 248046, "pad_token": "<|vision_pad|>"',
    ],
)
def test_what_only_looks_like_a_secret(text: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    assert found_in(path) == []


def test_model_folders_raise_no_alarm(nf4_artifact: Path) -> None:
    files = [path for folder in (ASSET, nf4_artifact) for path in folder.iterdir()]
    assert [f for path in files if path.is_file() for f in secrets(path, path.name)] == []


def test_hostile_lines_are_searched_in_bounded_time(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(
        "://" * 50_000 + "\n" + "secret" * 30_000 + "\n" + "aws" * 50_000 + "\n" + "\\" * 50_000
    )
    assert found_in(path) == []


def test_part_of_a_word_is_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("task-" + "a" * 40 + " xAKIAA1B2C3D4E5F6G7H8 AKIAA1B2C3D4E5F6G7H89")
    assert found_in(path) == []
    path.write_text("xAKIAA1B2C3D4E5F6G7H8 AKIAA1B2C3D4E5F6G7H8")
    assert found_in(path) == ["an AWS key id"]


def test_secret_across_two_pieces_and_at_the_end_of_a_long_text(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    token = EXAMPLES["a Hugging Face token"]
    path.write_text("x " * (2**21 - 8) + token + "\n" + "y " * 2**20 + "AKIA" + "B2" * 8)
    assert sorted(found_in(path)) == ["a Hugging Face token", "an AWS key id"]


def test_secret_in_the_header_of_a_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"\x20\0\0\0\0\0\0\0" + EXAMPLES["a GitHub token"].encode() + bytes(64))
    assert found_in(path) == ["a GitHub token"]


def test_token_in_use_is_found_whatever_it_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x=opensesame(1)")
    assert found_in(path) == []
    assert found_in(path, "opensesame(1)") == ["the token in use"]


def test_vocabulary_is_no_secret() -> None:
    from checkpoints import ASSET

    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        assert found_in(ASSET / name) == []
    weights = next(ASSET.glob("*.safetensors"))
    assert found_in(weights) == []


# the folder


def test_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="sub: cannot be read"):
        walk(tmp_path)


def test_overlay_stands_for_files_to_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"old")
    listed = list_local(
        tmp_path, FileHasher(tmp_path / "cache.sqlite"), {"a.txt": b"a", "b.txt": b"b"}
    )
    assert {n: d for n, d in listed.files.items() if n.endswith(".txt")} == {
        "a.txt": A,
        "b.txt": B,
    }


# hashes


def test_digest_is_gits_and_sha256(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = os.urandom(3 * 2**20 + 7)
    path.write_bytes(content)
    digest = digest_file(path)
    assert digest == digest_bytes(content)
    assert digest.sha256 == hashlib.sha256(content).hexdigest()
    done = subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True)
    assert digest.blob == done.stdout.strip()


@pytest.fixture
def rested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen35.publishing.hashes.SETTLED_NS", -1)


def test_large_file_is_known_by_its_sha256_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen35.publishing.hashes.BLOB_BYTES", 0)
    path = tmp_path / "file"
    path.write_bytes(b"a")
    digest = digest_file(path)
    assert digest == FileDigest(1, A.sha256, "")
    assert RemoteFile("file", 1, "0" * 40, A.sha256).holds(digest)
    assert not RemoteFile("file", 1, A.blob).holds(digest)


def hashed(path: Path, cache: Path) -> tuple[FileDigest, int]:
    hasher = FileHasher(cache)
    return hasher.digests([path])[path], hasher.read_bytes


@pytest.mark.usefixtures("rested")
def test_file_at_rest_is_read_once(tmp_path: Path) -> None:
    path, cache = tmp_path / "file", tmp_path / "sub" / "cache"
    path.write_bytes(b"a")
    assert hashed(path, cache) == (A, 1)
    assert hashed(path, cache) == (A, 0)


@pytest.mark.usefixtures("rested")
def test_changed_file_is_read_again_even_with_its_old_time(tmp_path: Path) -> None:
    path, cache = tmp_path / "file", tmp_path / "cache"
    path.write_bytes(b"a")
    assert hashed(path, cache) == (A, 1)
    before = path.stat()
    time.sleep(0.02)
    path.write_bytes(b"b")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashed(path, cache) == (B, 1)
    other = tmp_path / "other"
    other.write_bytes(b"a")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert hashed(path, cache) == (A, 1)


def test_file_that_changed_just_now_is_not_cached(tmp_path: Path) -> None:
    path, cache = tmp_path / "file", tmp_path / "cache"
    path.write_bytes(b"a")
    assert hashed(path, cache) == (A, 1)
    assert hashed(path, cache) == (A, 1)


@pytest.mark.usefixtures("rested")
@pytest.mark.parametrize("damage", ["text", "folder", "parent is a file"])
def test_cache_that_cannot_be_used_costs_only_time(tmp_path: Path, damage: str) -> None:
    path, cache = tmp_path / "file", tmp_path / "there" / "cache"
    path.write_bytes(b"a")
    if damage == "parent is a file":
        cache.parent.write_text("")
    else:
        cache.parent.mkdir()
        cache.mkdir() if damage == "folder" else cache.write_text("not a database, " * 100)
    assert hashed(path, cache) == (A, 1)
    assert hashed(path, cache) == (A, 1)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone: cannot be read"):
        FileHasher(tmp_path / "cache").digests([tmp_path / "gone"])
    with pytest.raises(InputError, match="gone: cannot be read"):
        digest_file(tmp_path / "gone")


def test_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2**21))
    real, calls = os.fstat, []

    def fstat(descriptor: int) -> os.stat_result:
        calls.append(descriptor)
        if len(calls) == 2:  # before, after
            path.write_bytes(bytes(2**21 + 1))
        return real(descriptor)

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(InputError, match="changed while it was read"):
        digest_file(path)
