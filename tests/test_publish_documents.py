"""Model card, Modelfile, manifest and signature: what a repository gets beside its weights."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

import qwen35
from checkpoints import ASSET
from hub_client import REPO, World, files_in
from made_reports import report_of
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import parser_of
from qwen35.cli.shared_flags import keywords
from qwen35.errors import InputError, UsageError
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.source_card import source_card
from qwen35.publishing.modelfile import gguf_models, modelfile_text
from qwen35.publishing.repo_documents import documents, write_documents
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import verify
from qwen35.writing.write import write
from running import load_all, run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def made(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact of each recipe."""
    out = tmp_path_factory.mktemp("made")
    return {name: run(dense, out / name, name).out for name in ("nf4", "text", "text-nf4")}


@pytest.fixture
def nf4(made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the NF4 artifact."""
    return Path(shutil.copytree(made["nf4"], tmp_path / "nf4"))


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "qwen35.json").read_text())
    return manifest


def edit_manifest(folder: Path, **changes: Any) -> None:
    (folder / "qwen35.json").write_text(json.dumps({**manifest_of(folder), **changes}))


def card_of(folder: Path, repo: str = REPO, **options: Any) -> tuple[ModelCard, str]:
    text = documents(folder, repo, **options)["README.md"].decode()
    return ModelCard(text), text


def test_documents_are_written_once_and_the_same_again(nf4: Path) -> None:
    first = documents(nf4, REPO)
    assert sorted(first) == ["README.md", "qwen35.json"]
    before = files_in(nf4)
    write_documents(nf4, first)
    assert files_in(nf4) == {**before, **first}
    assert documents(nf4, REPO) == {}
    added = manifest_of(nf4)["added"]
    content = (nf4 / "README.md").read_bytes()
    assert added == {
        "README.md": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    }


def test_manifest_goes_on_saying_what_it_said(nf4: Path) -> None:
    before = manifest_of(nf4)
    write_documents(nf4, documents(nf4, REPO))
    after = manifest_of(nf4)
    assert {name: after[name] for name in before} == before
    assert {"numpy", "numba", "jinja2", "python", "qwen35"} == set(before["tool"])


def test_verdict_is_kept_in_the_manifest(nf4: Path, dense: Path) -> None:
    artifact = open_artifact(str(nf4), "numbers")
    verdict = verify(artifact, source=open_folder(dense), depth="numbers", threads=1)
    write_documents(nf4, documents(nf4, REPO, verdict=verdict))
    said = manifest_of(nf4)["verified"]
    assert (said["depth"], said["passed"], said["findings"]) == ("numbers", True, [])
    assert said["relative_error"]
    assert str(nf4.parent) not in (nf4 / "qwen35.json").read_text()
    assert documents(nf4, REPO) == {}
    assert verify(open_artifact(str(nf4))).passed


def test_own_readme_is_kept(nf4: Path) -> None:
    (nf4 / "README.md").write_text("mine")
    assert sorted(documents(nf4, REPO)) == ["qwen35.json"]
    write_documents(nf4, documents(nf4, REPO))
    assert (nf4 / "README.md").read_text() == "mine"
    assert manifest_of(nf4)["added"] == {}


def test_card_of_ours_is_renewed_until_someone_edits_it(nf4: Path) -> None:
    write_documents(nf4, documents(nf4, REPO))
    write_documents(nf4, documents(nf4, "owner/renamed"))
    assert "owner/renamed" in (nf4 / "README.md").read_text()
    (nf4 / "README.md").write_text((nf4 / "README.md").read_text() + "edited")
    write_documents(nf4, documents(nf4, "owner/again"))
    assert "owner/again" not in (nf4 / "README.md").read_text()


def test_folder_of_others_gets_nothing(dense: Path) -> None:
    assert documents(dense, REPO) == {}


def test_card_of_nf4(nf4: Path) -> None:
    edit_manifest(nf4, source={"repo": "Qwen/Qwen3.5-0.8B", "revision": COMMIT})
    (nf4 / "LICENSE").write_text("\n   Apache License\n  Version 2.0, January 2004")
    card, text = card_of(nf4, "owner/Qwen3.5-0.8B-bnb-4bit")
    data = card.data.to_dict()
    assert data["base_model"] == "Qwen/Qwen3.5-0.8B"
    assert data["base_model_relation"] == "quantized"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0"
    assert {"bitsandbytes", "4-bit"} <= set(data["tags"])
    assert text.count("# Qwen3.5-0.8B-bnb-4bit") == 1
    assert f"commit `{COMMIT}`" in text
    for row in (
        "| `kind:linear` | NF4 | 31 | linear layer |",
        "| `visual` | BF16 | 33 | vision tower: small, and its errors reach every image token |",
        f"| model.safetensors | {(nf4 / 'model.safetensors').stat().st_size:,} |",
        'AutoModelForImageTextToText.from_pretrained("owner/Qwen3.5-0.8B-bnb-4bit"',
        "prepare_model_for_kbit_training(model)",
        "vllm serve owner/Qwen3.5-0.8B-bnb-4bit",
        "--model-path owner/Qwen3.5-0.8B-bnb-4bit --load-format bitsandbytes",
        "qwen35 reproduce owner/Qwen3.5-0.8B-bnb-4bit\n",
        f"qwen35 convert Qwen/Qwen3.5-0.8B@{COMMIT} OUT --recipe nf4",
    ):
        assert row in text
    assert "Measured" not in text
    assert "\n\n\n" not in text


def test_counts_of_the_card_are_those_of_the_weights(made: dict[str, Path]) -> None:
    for name, packed in (("nf4", 31), ("text-nf4", 31), ("text", 0)):
        _, text = card_of(made[name])
        stored = text.partition("## How tensors are stored")[2]
        rows = [line.split(" | ") for line in stored.splitlines() if line.startswith("| `")]
        assert sum(int(row[2]) for row in rows if row[1] == "NF4") == packed
        weights = manifest_of(made[name])["tensors"]["model.safetensors"]
        main = [n for n in weights if not any(f".weight.{p}" in n for p in PARTS)]
        assert sum(int(row[2] or 0) for row in rows) == len(main)


PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")


def test_card_of_a_text_only_artifact(made: dict[str, Path]) -> None:
    card, text = card_of(made["text-nf4"])
    assert card.data.to_dict()["pipeline_tag"] == "text-generation"
    assert "| `visual` | dropped |  | vision tower |" in text
    assert "AutoModelForCausalLM" in text
    assert ", text only" in text
    card, text = card_of(made["text"])
    assert "base_model" not in card.data.to_dict()
    assert "unquantized" in text
    assert "kbit" not in text


def test_card_loads_with_what_is_there(nf4: Path) -> None:
    """AutoProcessor needs a preprocessor; a reasoning parser needs a template that reasons."""
    _, text = card_of(nf4)
    assert f'\ntokenizer = AutoTokenizer.from_pretrained("{REPO}")\n' in text
    assert "\nImages also need preprocessor_config.json from the base model.\n" in text
    assert text.count("--reasoning-parser qwen3\n") == 2
    (nf4 / "preprocessor_config.json").write_text("{}")
    (nf4 / "chat_template.jinja").write_text("{{ messages[0].content }}")
    _, text = card_of(nf4)
    assert f'\nprocessor = AutoProcessor.from_pretrained("{REPO}")\n' in text
    assert "Images also need" not in text
    assert "--reasoning-parser" not in text
    assert "\n\n\n" not in text


def test_card_without_a_known_source(nf4: Path) -> None:
    card, text = card_of(nf4)
    data = card.data.to_dict()
    assert not {"base_model", "base_model_relation", "license"} & data.keys()
    assert f"qwen35 reproduce {REPO} --source SOURCE" in text
    assert "\nqwen35 convert SOURCE OUT --recipe nf4\n" in text
    card, text = card_of(nf4, base_model="Qwen/Qwen3.5-2B")
    assert card.data.to_dict()["base_model"] == "Qwen/Qwen3.5-2B"


def test_card_names_no_command_that_would_make_something_else(dense: Path, tmp_path: Path) -> None:
    from running import plan_of

    out = tmp_path / "out"
    write(plan_of(dense, keep=("self_attn",)), out, threads=1)
    edit_manifest(out, source={"repo": "Qwen/Qwen3.5-0.8B", "revision": COMMIT})
    _, text = card_of(out)
    assert "| `self_attn` | BF16 | 6 | asked for by --keep |" in text
    assert command_in(text)[4:] == ["--recipe", "nf4", "--keep", "self_attn"]
    recipe = manifest_of(out)["recipe"]
    rules = [["mlp.up_proj", "plain", "by hand"], *recipe["rules"]]
    edit_manifest(out, recipe={**recipe, "rules": rules})
    assert "qwen35 convert" not in card_of(out)[1]


MATTER = """\
license: apache-2.0
license_link: https://huggingface.co/Qwen/Qwen3.5-0.8B/blob/main/LICENSE
language: [en, no, zh-Hans]
datasets:
- someone/chats
- {not: a name}
- "evil\\nlicense: mit"
base_model: Qwen/Qwen3.5-0.8B
tags: [3]
"""


def published(source: Path, folder: Path, matter: str) -> Path:
    """Return a conversion of a folder whose card has this front matter."""
    made = Path(shutil.copytree(source, folder / "source"))
    (made / "README.md").write_text(f"---\n{matter}---\n# Mine\n")
    (made / "LICENSE").write_text("Mine alone")
    return run(made, folder / "out", "nf4").out


def test_card_of_a_folder_says_what_its_source_said(
    dense: Path, tmp_path: Path, world: World
) -> None:
    out = published(dense, tmp_path, MATTER)
    assert (out / "LICENSE").read_text() == "Mine alone"
    card, text = card_of(out)
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["license_link"].endswith("/LICENSE")
    assert data["language"] == ["en", "no", "zh-Hans"]
    assert data["datasets"] == ["someone/chats"]
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen3.5-0.8B", "quantized")
    assert text.startswith(f"---\n{ModelCardData(**data).to_yaml()}\n---\n")
    done = world.publish(folder=out)
    assert done.code == 0, done.out + done.err
    assert world.repo.read("README.md").decode() == text
    assert any("/api/validate-yaml" in asked.path for asked in world.hub.requests)
    other, _ = card_of(out, base_model="owner/other")
    assert other.data.to_dict()["base_model"] == "owner/other"


@pytest.mark.parametrize(
    "matter",
    [
        "[]",
        "3",
        "a: [",
        "license: [[]]",
        "license: {a: b}",
        "license: 2026-01-01",
        "base_model: /home/me/model",
        "base_model: [null, 3, {}, [], 'a/b\\n---']",
        "language: {}",
        "datasets: !!python/object:os.system {}",
        "a: &a [*a]\nlanguage: *a",
        "license: !!binary aGVsbG8=",
        "? [a, b]\n: c",
        "license: " + "x" * 5000,
        "license: null\nlicense_name: Null\ndatasets: NULL\nlanguage: [null]",
        "license_link: javascript:alert(1)",
        "\x01",
    ],
)
def test_odd_front_matter_reaches_no_card(matter: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{matter}\n---\n")
    said = source_card(replace(open_folder(ASSET), place=LocalFolder(tmp_path)))
    assert said in ({}, {"license": "2026-01-01"}, {"license": "aGVsbG8="})


def test_no_repository_is_its_own_base(nf4: Path) -> None:
    for bases, kept in (([REPO], None), ([REPO.upper(), "a/b"], "a/b")):
        source = {"folder": "x", "card": {"base_model": bases}}
        edit_manifest(nf4, source=source)
        assert card_of(nf4)[0].data.to_dict().get("base_model") == kept


@pytest.mark.parametrize("card", [None, [], 3, "x", {"license": {}, "language": [[]]}])
def test_a_manifest_may_say_anything_of_a_card(card: Any, nf4: Path) -> None:
    edit_manifest(nf4, source={**manifest_of(nf4)["source"], "card": card})
    assert not {"license", "language", "base_model"} & card_of(nf4)[0].data.to_dict().keys()


@pytest.mark.parametrize("name", ["", "x", "a/b/c", "a/b\n", "../x", "a b/c"])
def test_base_model_is_a_repository(name: Any, nf4: Path) -> None:
    with pytest.raises(UsageError, match="--base-model.*expected a repository on the Hub"):
        qwen35.publish(nf4, REPO, base_model=name, dry_run=True)


def test_card_has_a_row_for_each_model(tmp_path: Path) -> None:
    folder = gguf_folder(tmp_path / "gguf")
    rows = [
        (f"Qwen3.5-0.8B-{kind}", "llama.cpp", nbytes, kld)
        for kind, nbytes, kld in (("Q8_0", 9, 0.0004), ("Q4_K_M", 5, 0.03), ("Q6_K", 7, 0.007))
    ]
    report = report_of([*rows, ("other-Q6_K", "llama.cpp", 6, 0.001)])
    for one in report["candidates"][:3]:
        one["plan"] = "ours"
    (folder / "report.json").write_text(json.dumps(report))
    edit_manifest(folder, plan="ours")
    text = card_of(folder)[1]
    table = text.partition("## Files\n")[2].partition("<details>")[0]
    lines = [line.split("`", 2)[1:] for line in table.splitlines() if line.startswith("| `")]
    assert {name.rpartition("-")[2]: row for name, row in lines} == {
        "Q4_K_M.gguf": " | 6 B | 0.0300 ± 2e-05 | 97.0 % | where no larger one fits |",
        "Q8_0.gguf": " | 4 B | 0.000400 ± 0.000020 | 100.0 % | within 0.01 nats; the closest |",
        "Q6_K.gguf": " | 4 B | 0.00700 ± 0.00002 | 99.3 % | the smallest within 0.01 nats |",
        "F16.gguf": " | 3 B | not measured |  |  |",
    }
    assert "<summary>All 6 files</summary>" in text
    assert "<summary>All that was measured</summary>\n\n|" in text
    (folder / "report.json").unlink()
    text = card_of(folder)[1]
    assert "| model | size |\n|---|---|\n| `Qwen3.5-0.8B-Q4_K_M.gguf` | 6 B |\n" in text


def test_license_that_is_not_known(nf4: Path) -> None:
    (nf4 / "LICENSE").write_text("Mine alone")
    assert card_of(nf4)[0].data.to_dict()["license"] == "other"


def test_measured_table_is_in_card_and_manifest(nf4: Path) -> None:
    table = {"columns": ["model", "KLD"], "rows": [["bf16", 0.0], ["nf4", 0.0312]]}
    (nf4 / "report.json").write_text(json.dumps({"table": table}))
    write_documents(nf4, documents(nf4, REPO))
    text = (nf4 / "README.md").read_text()
    assert "## Measured\n\n| model | KLD |\n|---|---|\n| bf16 | 0.0 |\n| nf4 | 0.0312 |\n" in text
    assert manifest_of(nf4)["measures"] == table
    (nf4 / "report.json").unlink()
    write_documents(nf4, documents(nf4, REPO))
    assert "Measured" not in (nf4 / "README.md").read_text()
    assert "measures" not in manifest_of(nf4)


@pytest.mark.parametrize(
    "report",
    ["[]", "{}", '{"table": {"columns": ["a"], "rows": [[1, 2]]}}', '{"table": {"columns": []}}'],
)
def test_report_without_a_table_is_refused(nf4: Path, report: str) -> None:
    (nf4 / "report.json").write_text(report)
    with pytest.raises(InputError, match=r"report\.json"):
        documents(nf4, REPO)


@pytest.mark.parametrize(
    "change",
    [
        {"source": None},
        {"recipe": None},
        {"recipe": {"name": "x", "format": "nf4", "rules": [["*"]]}},
        {"source": {"repo": 1, "revision": 2}},
    ],
)
def test_malformed_manifest_is_refused(nf4: Path, change: dict[str, Any]) -> None:
    edit_manifest(nf4, **change)
    with pytest.raises(InputError, match=r"qwen35\.json"):
        documents(nf4, REPO)


# GGUF


def gguf_folder(folder: Path) -> Path:
    folder.mkdir()
    for kind in ("F16", "Q8_0", "Q4_K_M", "Q6_K"):
        (folder / f"Qwen3.5-0.8B-{kind}.gguf").write_bytes(kind.encode())
    (folder / "mmproj-Qwen3.5-0.8B-F16.gguf").write_bytes(b"projector")
    settings = {"temperature": 0.7, "top_k": 20, "do_sample": True, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    files = {
        path.name: {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.iterdir()
    }
    manifest = {
        "manifest": 1,
        "tool": {"qwen35": "0.1.0"},
        "source": {"repo": "Qwen/Qwen3.5-0.8B", "revision": COMMIT},
        "recipe": {"name": "gguf", "format": "gguf"},
        "files": files,
        "tensors": {},
    }
    (folder / "qwen35.json").write_text(json.dumps(manifest))
    return folder


def test_modelfile_names_the_preferred_type(tmp_path: Path) -> None:
    folder = gguf_folder(tmp_path / "gguf")
    assert gguf_models(LocalFolder(folder))[0] == "Qwen3.5-0.8B-Q4_K_M.gguf"
    lines = modelfile_text(LocalFolder(folder)).splitlines()
    assert [line for line in lines if line.startswith("FROM")] == [
        "FROM ./Qwen3.5-0.8B-Q4_K_M.gguf"
    ]
    assert "# other sizes: FROM ./Qwen3.5-0.8B-F16.gguf" in lines
    assert "# for pictures, where Ollama takes it: FROM ./mmproj-Qwen3.5-0.8B-F16.gguf" in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert lines[-3:] == [
        "PARAMETER temperature 0.7",
        "PARAMETER top_k 20",
        "PARAMETER repeat_penalty 1.05",
    ]
    assert "\n".join(lines).count('"""') == 2


@pytest.mark.parametrize(
    "name", ["x\nSYSTEM a\n-Q4_K_M.gguf", "mmproj-x\rADAPTER a.gguf", "z\u2028FROM a.gguf"]
)
def test_modelfile_gets_no_instruction_from_a_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "a b-Q4_K_M.gguf").write_text("")
    assert "\nFROM ./a b-Q4_K_M.gguf\n" in modelfile_text(LocalFolder(tmp_path))
    (tmp_path / name).write_text("")
    with pytest.raises(InputError, match="a name that other systems read differently") as caught:
        modelfile_text(LocalFolder(tmp_path))
    assert str(caught.value).isprintable()


def test_folder_with_projectors_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mmproj-x-F16.gguf").write_text("")
    with pytest.raises(InputError, match="only projectors"):
        modelfile_text(LocalFolder(tmp_path))


def test_gguf_folder_is_published_with_card_and_modelfile(world: World) -> None:
    folder = gguf_folder(world.tmp / "gguf")
    done = world.publish(folder=folder)
    assert done.code == 0, done.out + done.err
    assert world.remote() == files_in(folder)
    assert (folder / "Modelfile").exists()
    data = ModelCard(world.repo.read("README.md").decode()).data.to_dict()
    assert data["library_name"] == "gguf"
    assert data["base_model"] == "Qwen/Qwen3.5-0.8B"
    assert data["pipeline_tag"] == "image-text-to-text"
    text = world.repo.read("README.md").decode()
    assert f"ollama run hf.co/{REPO}" in text
    assert "from transformers" not in text
    assert "qwen35 reproduce" not in text  # this manifest, an older one, does not say enough


# publishing a folder of ours


def test_push_writes_the_card_and_check_does_not(world: World, nf4: Path) -> None:
    before = files_in(nf4)
    shown = world.publish("--mode", "check", folder=nf4)
    assert shown.code == 0, shown.out + shown.err
    assert "README.md" in shown.out
    assert files_in(nf4) == before
    assert world.publish(folder=nf4).code == 0
    assert world.remote() == files_in(nf4)
    assert "README.md" in world.remote()
    again = world.publish("--mode", "check", folder=nf4)
    assert "0 to upload" in again.out
    remote = Path(nf4.parent / "remote")
    for name, content in world.remote().items():
        remote.mkdir(exist_ok=True)
        (remote / name).write_bytes(content)
    assert verify(open_artifact(str(remote))).passed


def test_saved_check_is_applied_to_the_letter(world: World, nf4: Path) -> None:
    path = world.tmp / "saved.json"
    assert world.publish("--mode", "check", "--save", path, folder=nf4).code == 0
    assert world.publish("--apply", path, folder=nf4).code == 0
    assert "README.md" in world.remote()


def test_changed_weights_stop_the_push(world: World, nf4: Path) -> None:
    path = nf4 / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = world.publish(folder=nf4)
    assert done.code == 1
    assert "STOPPED model.safetensors: not the file that the manifest lists" in done.out
    path.unlink()
    done = world.publish(folder=nf4)
    assert "STOPPED model.safetensors: missing, but the manifest lists it" in done.out
    assert world.hub.repos == {}


def test_broken_structure_stops_the_push(world: World, nf4: Path) -> None:
    config = json.loads((nf4 / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = []
    (nf4 / "config.json").write_text(json.dumps(config))
    content = (nf4 / "config.json").read_bytes()
    files = manifest_of(nf4)["files"]
    files["config.json"] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    edit_manifest(nf4, files=files)
    done = world.publish(folder=nf4)
    assert done.code == 1
    assert "STOPPED" in done.out
    assert world.hub.repos == {}


def test_files_mode_writes_no_card(world: World, nf4: Path) -> None:
    world.publish(folder=nf4)
    (nf4 / "README.md").unlink()
    assert world.publish("--mode", "files", "--files", "config.json", folder=nf4).code == 0
    assert not (nf4 / "README.md").exists()


# signature


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A private key; its public half lies beside it."""
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    made = ec.generate_private_key(ec.SECP256R1())
    path = tmp_path / "keys" / "signing"
    path.parent.mkdir()
    path.write_bytes(
        made.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    path.with_suffix(".pub").write_bytes(
        made.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return path


def check_signature(folder: Path, key: Path) -> subprocess.CompletedProcess[str]:
    """Check a signature as somebody who downloaded the folder would."""
    program = Path(sys.executable).parent / "model_signing"
    arguments = ["verify", "key", folder, "--signature", folder / "model.sig"]
    arguments += ["--public_key", key.with_suffix(".pub"), "--ignore-paths", folder / ".cache"]
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_signature_holds_on_a_copy_and_not_on_another(world: World, nf4: Path, key: Path) -> None:
    done = world.publish("--sign", key, folder=nf4)
    assert done.code == 0, done.out + done.err
    copy = world.tmp / "copy"
    assert world.publish("--mode", "pull", folder=copy).code == 0
    checked = check_signature(copy, key)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    signature = (nf4 / "model.sig").read_bytes()
    done = world.publish("--sign", key, folder=nf4)
    assert "nothing to do" in done.out
    assert (nf4 / "model.sig").read_bytes() == signature
    (nf4 / "notes.md").write_text("added")
    assert world.publish("--sign", key, folder=nf4).code == 0
    assert (nf4 / "model.sig").read_bytes() != signature


@pytest.mark.parametrize("content", ["", "not a key", None])
def test_key_that_is_none_is_refused(
    world: World, nf4: Path, key: Path, content: str | None
) -> None:
    if content is None:
        key.unlink()
    else:
        key.write_text(content)
    sentence = world.refused("--sign", key, folder=nf4)
    assert "signing: " in sentence
    assert not (nf4 / "model.sig").exists()
    assert world.hub.repos == {}


def test_asset_is_publishable(world: World) -> None:
    done = world.publish("--mode", "check", folder=ASSET)
    assert done.code == 0, done.out


# the steps of the card


def written(folder: Path, recipe: str, container: str, **options: Any) -> Path:
    """Write the embedded checkpoint; the manifest names a repository as its source."""
    plan = make_plan(open_folder(ASSET), load_recipe(recipe, container), **options)
    write(plan, folder, threads=1)
    edit_manifest(folder, source={"repo": "Qwen/Qwen3.5-0.8B", "revision": COMMIT})
    return folder


def command_in(text: str) -> list[str]:
    """Return the words of the command by which a card says the artifact was written."""
    lines = text.partition("this command:\n\n```bash\n")[2].partition("\n```")[0]
    return shlex.split(lines.replace("\\\n", " "))


@pytest.mark.parametrize(
    "asked",
    [
        {"drop_mtp": True},
        {"drop_mtp": True, "split_max_size": 2 * 10**6},
        {"mmproj": "Q8_0", "mtp": "separate", "mtp_type": "BF16"},
    ],
)
def test_command_of_a_gguf_card_plans_the_same_files(asked: dict[str, Any], tmp_path: Path) -> None:
    """Parsed as a shell does and planned: the plan's digest is the manifest's."""
    rules = ("blk.0.ffn_up=q6_K",)
    folder = tmp_path / "out"
    parsed = qwen35.gguf(
        ASSET, folder, types="Q8_0,Q4_K_M", recipe="q8-gates", tensor_type=rules, **asked
    )
    digest = parsed.plan.digest
    edit_manifest(folder, source={"repo": "Qwen/Qwen3.5-0.8B", "revision": COMMIT})
    words = command_in(card_of(folder)[1])
    assert words[:4] == ["qwen35", "gguf", f"Qwen/Qwen3.5-0.8B@{COMMIT}", "OUT"]
    args = parser_of("gguf").parse_args([str(ASSET), str(tmp_path / "again"), *words[4:]])
    again = qwen35.gguf(**{**keywords(args), "dry_run": True})
    assert again.plan.digest == digest


def test_card_of_gguf_names_tensors_with_a_type_of_their_own(tmp_path: Path) -> None:
    folder = written(tmp_path / "out", "q8-gates", "gguf", types=("Q4_K_M",))
    _, text = card_of(folder)
    layers = sum(
        name.endswith("attn_qkv.weight")
        for name in manifest_of(folder)["tensors"][f"{ASSET.name}-Q4_K_M.gguf"]
    )
    for name in ("attn_gate", "attn_qkv", "ssm_out"):
        assert f"| `blk.*.{name}.weight` | Q8_0 | {layers} | " in text
    assert f"llama-server -hf {REPO}:Q4_K_M --jinja -c 32768 -ngl 99\n" in text
    edit_manifest(folder, recipe={**manifest_of(folder)["recipe"], "projector": "Q6_K"})
    assert "Written by this command" not in card_of(folder)[1]


def test_card_serves_with_tensor_parallel_and_context(tmp_path: Path) -> None:
    folder = written(tmp_path / "out", "fp8", "safetensors")
    _, text = card_of(folder)
    length = json.loads((ASSET / "config.json").read_text())["text_config"]
    length = length["max_position_embeddings"]
    assert command_in(text)[4:] == ["--recipe", "fp8", "--calib-mode", "search"]
    statistics = {"name": "stats.json", "sha256": "0" * 64}
    chosen = {"mode": "mse", "rms_factor": 3.0, "grid_size": 80, "activations": statistics}
    edit_manifest(folder, calibration=chosen)
    assert command_in(card_of(folder)[1])[4:] == [
        *("--recipe", "fp8", "--calib-mode", "mse", "--mse-grid-size", "80"),
        *("--activation-stats", "stats.json"),
    ]
    flags = "--reasoning-parser qwen3\n"
    assert f"vllm serve {REPO} --tensor-parallel-size 1 --max-model-len {length} {flags}" in text
    assert f"--model-path {REPO} --tp-size 1 --context-length {length} {flags}" in text
    assert f"`qwen35 verify {REPO} --tensor-parallel N`" in text


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the embedded checkpoint as `qwen35 calibrate` writes them."""
    table: dict[str, Any] = {}
    for name, tensor in load_all(ASSET).items():
        if "proj" in name and tensor.ndim == 2 and ".visual." not in name:
            table[name] = {"input_channel_max": [2.0] * tensor.shape[-1]}
            table[name] |= (
                {"cache_max": 7.0} if name.endswith(("k_proj.weight", "v_proj.weight")) else {}
            )
    path = tmp_path_factory.mktemp("stats") / "stats.json"
    path.write_text(json.dumps(table))
    return path


@pytest.fixture(scope="module")
def served(stats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded checkpoint in formats that servers run."""
    base = tmp_path_factory.mktemp("served")
    for name, options in MADE.items():
        qwen35.convert(
            ASSET, base / name, activation_stats=stats if name in WITH else None, **options
        )
    return {name: base / name for name in MADE}


MADE: dict[str, dict[str, Any]] = {
    "mixed": {"recipe": "nvfp4-mixed", "layout": "modelopt"},
    "w4a4": {"recipe": "nvfp4", "activations": True, "kv_cache": "fp8"},
    "own": {"recipe": "nvfp4", "layout": "modelopt", "keep": ["self_attn"], "drop_mtp": True},
    "gptq": {"recipe": "int4", "layout": "gptq", "calib_mode": "max"},
}
WITH = ("mixed", "w4a4")
"""Those with statistics."""


@pytest.mark.parametrize("name", MADE)
def test_command_of_a_served_card_plans_the_same_files(
    name: str, served: dict[str, Path], stats: Path, tmp_path: Path
) -> None:
    """Parsed as a shell does and planned: the plan's digest is the manifest's."""
    _, text = card_of(served[name])
    words = command_in(text)
    assert words[:4] == ["qwen35", "convert", "SOURCE", "OUT"]
    args = parser_of("convert").parse_args([str(ASSET), str(tmp_path / "again"), *words[4:]])
    changed: dict[str, Any] = {"dry_run": True}
    if name in WITH:
        assert f"qwen35 reproduce {REPO} --source SOURCE --activation-stats FILE\n" in text
        digest = hashlib.sha256(stats.read_bytes()).hexdigest()
        assert f"`--activation-stats` takes `{stats.name}`, SHA-256 `{digest}`.\n" in text
        assert args.activation_stats == Path(stats.name)
        changed["activation_stats"] = stats
    again = qwen35.convert(**{**keywords(args), **changed})
    assert again.plan.digest == manifest_of(served[name])["plan"]
    assert "not copied" not in text
    assert "\n\n\n" not in text


def test_card_names_all_formats_and_their_layout(served: dict[str, Path]) -> None:
    expected = {
        "mixed": (
            "mixed precision: 26 FP8 per tensor (E4M3, inputs too), 24 NVFP4 W4A16 (E2M1 in blocks "
            "of 16 with E4M3 scales), in the layout of ModelOpt. ",
            ["fp8", "modelopt", "nvfp4", "fp4", "w4a16"],
        ),
        "w4a4": (
            "NVFP4 W4A4 (E2M1 in blocks of 16 with E4M3 scales, inputs too), in the layout of "
            "compressed-tensors. ",
            ["nvfp4", "fp4", "w4a4", "compressed-tensors"],
        ),
        "gptq": (
            "INT4 W4A16 (groups of 128, symmetric), in the layout of GPTQ. ",
            ["int4", "w4a16", "gptq"],
        ),
    }
    for name, (title, tags) in expected.items():
        card, text = card_of(served[name])
        assert f"A Qwen3.5 checkpoint, {title}" in text
        assert card.data.to_dict()["tags"] == ["qwen3_5", *tags]
        loads = "\ntransformers, with compressed-tensors installed:\n" in text
        assert loads == ("compressed-tensors" in tags)


def test_card_says_what_servers_can_do_with_it(served: dict[str, Path], tmp_path: Path) -> None:
    tools = (
        "| call tools | `--enable-auto-tool-choice --tool-call-parser qwen3_coder` "
        "| `--tool-call-parser qwen3_coder` |"
    )
    mtp = """| `--speculative-config '{"method": "mtp", "num_speculative_tokens": 1}'` |"""
    folder = Path(shutil.copytree(served["w4a4"], tmp_path / "copy"))
    text = card_of(folder)[1]
    assert tools in text
    assert mtp in text
    assert (
        "| `--kv-cache-dtype fp8`, the default by config.json | `--kv-cache-dtype fp8_e4m3` |"
        in text
    )
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "--tool-call-parser" not in card_of(folder)[1]
    text = card_of(served["own"])[1]
    assert tools in text
    assert "--speculative" not in text
    assert "--kv-cache-dtype" not in text


def test_card_of_experts_in_nvfp4_does_not_send_them_to_transformers(
    moe: Path, tmp_path: Path
) -> None:
    """transformers 5.23 makes such experts too large by their scale."""
    for recipe, loads in (("nvfp4", False), ("int4", True)):
        out = run(moe, tmp_path / recipe, recipe).out
        assert ("from transformers import" in card_of(out)[1]) == loads


def test_card_shows_the_layers_of_a_rule(dense: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    rule = 'match = "mlp.down_proj"\naction = "int4"\nlayers = "0-1, 3"\nreason = "mine"\n'
    own.write_text(f'format = "nvfp4"\nbase = "nvfp4"\n[[rules]]\n{rule}')
    out = run(dense, tmp_path / "out", str(own)).out
    assert "| `mlp.down_proj, layers 0-1, 3` | INT4 | 3 | mine |" in card_of(out)[1]


def test_card_shows_the_main_rows_of_a_report(nf4: Path) -> None:
    names = ("Mean KLD", "99.9% KLD", "PPL", "Same top p, %", "Bytes")
    table = {"columns": ["KLD metric", "this"], "rows": [[name, "1"] for name in names]}
    (nf4 / "report.json").write_text(json.dumps({"table": table}))
    text = card_of(nf4)[1].partition("## Measured")[2]
    shown = [line.split(" | ")[0] for line in text.splitlines() if line.endswith(" | 1 |")]
    assert shown == ["| Mean KLD", "| Same top p, %", "| Bytes"]
    assert "\nAll figures are in `report.json`.\n" in text


def test_card_says_what_was_measured_beside_it(nf4: Path) -> None:
    edit_manifest(nf4, source={"repo": "Qwen/Qwen3.5-0.8B", "revision": COMMIT})
    report = {
        "table": {"columns": ["KLD metric", "this", "mix"], "rows": [["Mean KLD", 1, 2]]},
        "base": {"name": "Qwen3.5-0.8B", "stored": "BF16", "engine": "transformers"},
        "text": {"name": "wiki.test.raw"},
        "tokens": {"chunks": 3, "context": 512},
        "candidates": [
            {"name": "this", "plan": manifest_of(nf4)["plan"]},
            {"name": "mix", "plan": "another"},
        ],
    }
    (nf4 / "report.json").write_text(json.dumps(report))
    _, text = card_of(nf4)
    assert (
        "in one sweep on `wiki.test.raw` (3 chunks of 512 tokens), against `Qwen3.5-0.8B` (BF16 "
        "in transformers). Not a file of this repository, for comparison: `mix`.\n"
    ) in text
    assert f"qwen35 evaluate Qwen/Qwen3.5-0.8B@{COMMIT} OUT --text TEXT --report OUT\n" in text
    assert "simulate servers" not in text
    (nf4 / "report.json").write_text(json.dumps(report | {"simulations": [{"name": "this"}]}))
    assert "Columns with “inputs quantized” simulate servers" in card_of(nf4)[1]


@pytest.mark.parametrize("value", [None, 1, "x", [1], [{}], {"name": ["a"]}, {"text_config": 1}])
def test_report_and_config_of_any_type_make_a_card(nf4: Path, value: Any) -> None:
    table = {"columns": ["a", "b"], "rows": [[1, value]]}
    for key in ("base", "text", "tokens", "candidates", "simulations"):
        whole = {"base": {"name": 1}, "tokens": {"chunks": 1}, "candidates": [{"plan": 1}]}
        (nf4 / "report.json").write_text(json.dumps({**whole, key: value, "table": table}))
        (nf4 / "config.json").write_text(json.dumps(value))
        card_of(nf4)
