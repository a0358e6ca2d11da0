"""`qwen35 reproduce`: an artifact made again from its manifest, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from gguf_models import make_variant
from hub_client import REPO, World, files_in
from hub_store import COMMIT, Repo
from qwen35.cli.main import main
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.progress import Silent
from qwen35.publishing.repo_documents import documents, write_documents
from qwen35.reproduction import ArtifactOrigin, plan_again
from qwen35.reproduction import reproduce as make_again
from qwen35.writing.write import write
from running import plan_of, run

pytestmark = pytest.mark.sentences

SOURCE = "owner/source"


def reproduce(*arguments: object) -> int:
    return main(["reproduce", *map(str, arguments), "--quiet"])


def write_imatrix(path: Path, seed: int) -> Path:
    """Write an importance matrix that knows one tensor of `gguf_models`' dense checkpoint."""
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["random"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    sums = np.random.default_rng(seed).exponential(size=(1, 256)).astype(np.float32)
    writer.add_tensor("blk.0.ffn_gate.weight.in_sum2", sums)
    writer.add_tensor("blk.0.ffn_gate.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Interrupting(Silent):
    """Progress that interrupts a run in its middle, and keeps its title."""

    title = ""

    def __init__(self, weights: int) -> None:
        self._left = weights

    def begin(self, title: str, nbytes: int) -> None:
        self.title = title

    def advance(self, nbytes: int, item: str) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_one_is_continued(dense: Path, tmp_path: Path) -> None:
    origin = ArtifactOrigin.find(str(run(dense, tmp_path / "out").out))
    plan, again = plan_again(origin, str(dense)), tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        make_again(origin, plan, again, threads=1, progress=Interrupting(12))
    rest = Interrupting(0)
    assert make_again(origin, plan, again, threads=1, progress=rest).findings == ()
    assert rest.title == "continuing again"


@pytest.mark.parametrize("recipe", ["nf4", "text", "text-nf4", "fp8", "text-fp8"])
def test_artifact_is_made_again(
    recipe: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(dense, tmp_path / "out", recipe).out
    write_documents(out, documents(out, REPO))
    assert reproduce(out, "--source", dense) == 0
    assert "reproduced, byte for byte" in capsys.readouterr().out
    assert reproduce(out / "qwen35.json", "--source", dense, "--output", tmp_path / "again") == 0
    made = files_in(tmp_path / "again")
    kept = {n: c for n, c in files_in(out).items() if n not in ("README.md", "qwen35.json")}
    assert {n: c for n, c in made.items() if n != "qwen35.json"} == kept


def test_calibration_comes_from_the_manifest(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = tmp_path / "stats.json"
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    columns = plan_of(dense).checkpoint.config.dims["hidden"]
    values = [1.0 + i % 7 for i in range(columns)]
    statistics.write_text(json.dumps({name: {"input_channel_max": values}}))
    out = tmp_path / "out"
    flags = ["--calib-mode", "rms", "--rms-factor", "4.5", "--activation-stats", str(statistics)]
    assert main(["convert", str(dense), str(out), "--recipe", "fp8", "--skip-verify", *flags]) == 0
    capsys.readouterr()
    assert reproduce(out, "--source", dense) == 2
    assert "give them: --activation-stats" in capsys.readouterr().err
    given = ["--source", dense, "--activation-stats", statistics]
    assert reproduce(out, *given) == 0
    statistics.write_text(json.dumps({name: {"input_channel_max": values[::-1]}}))
    assert reproduce(out, *given) == 2
    assert "not the statistics that the manifest names" in capsys.readouterr().err
    edit(out / "qwen35.json", calibration={"mode": "rms"})
    assert reproduce(out, *given) == 2
    assert "a malformed calibration" in capsys.readouterr().err


def test_own_rules_and_prefix_come_from_the_manifest(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = tmp_path / "mine.toml"
    toml.write_text(
        'format = "nf4"\nbase = "text-nf4"\n[[rules]]\nmatch = "self_attn"\naction = "plain"\n'
    )
    checkpoint = plan_of(dense).checkpoint
    recipe = load_recipe(str(toml)).dropping_mtp()
    out = tmp_path / "out"
    write(make_plan(checkpoint, recipe, keep_prefix=True), out, threads=1)
    toml.unlink()
    assert reproduce(out, "--source", dense) == 0
    assert "reproduced" in capsys.readouterr().out


def test_other_bytes_are_found(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(dense, tmp_path / "out").out
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert reproduce(out, "--source", dense) == 1
    text = capsys.readouterr().out
    assert "DIFFERS model.safetensors: the file beside the manifest is missing, or differs" in text
    assert "not reproduced" in text
    weights.unlink()
    assert reproduce(out, "--source", dense) == 1
    text = capsys.readouterr().out
    assert "DIFFERS model.safetensors: the file beside the manifest is missing" in text


def test_other_source_is_found(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from checkpoints import make_checkpoint

    out = run(dense, tmp_path / "out").out
    other = make_checkpoint(tmp_path / "other", seed=1)
    assert reproduce(out, "--source", other, "--json") == 1
    value = json.loads(capsys.readouterr().out)
    assert not value["same"]
    subjects = {(row["check"], row["subject"]) for row in value["findings"]}
    assert subjects == {("bytes", "model.safetensors"), ("artifact", "model.safetensors")}


def test_other_manifest_is_found(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(dense, tmp_path / "out").out
    manifest = json.loads((out / "qwen35.json").read_text())
    files = manifest["files"]
    files["config.json"]["sha256"] = "0" * 64
    files["gone.json"] = {"size": 1, "sha256": "0" * 64}
    edit(out / "qwen35.json", files=files, plan="x", tool={"qwen35": "0.0.1"})
    (out / "gone.json").write_text("x")
    assert reproduce(out, "--source", dense) == 1
    text = capsys.readouterr().out
    assert "DIFFERS qwen35.json: the plan computed now differs" in text
    assert "DIFFERS config.json: sha256 " in text
    assert "DIFFERS gone.json: not rebuilt" in text
    assert "note: qwen35 0.1.0 here, 0.0.1 then" in text


def test_folder_as_source_must_be_named(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(dense, tmp_path / "out").out
    assert reproduce(out) == 2
    assert "made from a folder called source; give its location with --source" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("revision", ["1" * 40, "main", "1" * 39, "../../x", "1" * 40 + "\n"])
@pytest.mark.parametrize("repo", ["owner/name", "./x", "../x", "/tmp/x", "x", "owner/name@v1"])
def test_no_folder_stands_in_for_a_commit_on_the_hub(
    repo: str,
    revision: str,
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    nf4_artifact: Path,
) -> None:
    """The manifest is foreign: a folder called like its source is not what was published."""
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    if not repo.startswith("/"):
        place = inner / f"{repo}@{revision}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(dense)
    out = Path(shutil.copytree(nf4_artifact, tmp_path / "out"))
    edit(out / "qwen35.json", source={"repo": repo, "revision": revision})
    assert reproduce(out) == 2
    error = capsys.readouterr().err
    offline = "HF_HUB_OFFLINE is set" in error
    assert offline == ((repo, revision) == ("owner/name", "1" * 40))
    assert offline or "no commit on the Hub" in error or "a malformed source" in error


@pytest.mark.parametrize("name", ["nothing", "x.json", "a/b/c"])
def test_no_manifest(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(tmp_path / name) == 2
    assert "no manifest, expected a qwen35.json" in capsys.readouterr().err


def test_folder_of_others(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(dense) == 2
    assert "no qwen35.json in it" in capsys.readouterr().err


def test_manifest_that_does_not_say_what_was_asked_for(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(dense, tmp_path / "out").out
    edit(out / "qwen35.json", recipe={"name": "mix", "format": "gguf", "rules": []})
    assert reproduce(out, "--source", dense) == 2
    assert "does not record the options" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["zzz", "ggml:q8_0", "fp8", "mix", ""])
def test_a_rule_of_a_manifest_that_asks_for_what_there_is_not(
    action: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(dense, tmp_path / "out").out
    recipe = json.loads((out / "qwen35.json").read_text())["recipe"]
    rules = [["visual", action, "why"], *recipe["rules"]]
    edit(out / "qwen35.json", recipe={**recipe, "rules": rules})
    assert reproduce(out, "--source", dense) == 2
    assert "error: qwen35.json: " in capsys.readouterr().err


def test_a_manifest_that_lists_what_its_recipe_does_not_make(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(dense, tmp_path / "out").out
    edit(out / "qwen35.json", files={"x.gguf": {"size": 1, "sha256": "0"}})
    assert reproduce(out, "--source", dense) == 1
    assert "DIFFERS x.gguf: not rebuilt" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--mmproj", "--recipe", "q8-gates", "--drop-mtp"],
        ["--mmproj", "Q8_0", "--mtp", "separate", "--mtp-type", "BF16"],
        ["--tensor-type", "ffn_down=q8_0", "--upstream-counters"],
    ],
)
def test_gguf_files_are_made_again(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_variant(tmp_path, "dense"), tmp_path / "out"
    assert main(["gguf", str(source), str(out), "--types", "F16,Q4_K_M", *flags]) == 0
    write_documents(out, documents(out, REPO))
    assert "qwen35 reproduce" in (out / "README.md").read_text()
    assert reproduce(out, "--source", source) == 0
    assert "reproduced, byte for byte" in capsys.readouterr().out
    file = out / f"{source.name}-Q4_K_M.gguf"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert reproduce(out, "--source", source) == 1
    assert f"DIFFERS {file.name}: the file beside the manifest" in capsys.readouterr().out


def test_gguf_files_of_rules_for_layers_are_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `qwen35 tune` writes: rules that hold for some layers alone."""
    source, out, toml = make_variant(tmp_path, "dense"), tmp_path / "out", tmp_path / "mine.toml"
    toml.write_text(
        'format = "gguf"\nbase = "q8-gates"\n'
        '[[rules]]\nmatch = "mlp.down_proj"\nlayers = "1-2, 3"\naction = "q6_K"\n'
        '[[rules]]\nmatch = "kind:linear"\nlayers = "0"\naction = "f16"\nreason = "the first"\n'
    )
    flags = ["--types", "Q4_K_M,Q8_0", "--recipe", str(toml)]
    assert main(["gguf", str(source), str(out), *flags]) == 0
    toml.unlink()
    rules = json.loads((out / "qwen35.json").read_text())["recipe"]["rules"]
    assert [rule[3] for rule in rules[:2]] == ["1-3", "0"]
    assert reproduce(out, "--source", source, "--output", tmp_path / "again") == 0
    assert "reproduced, byte for byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"types": "F16"},
        {"types": ["Q9"]},
        {"types": []},
        {"types": ["F16", "F16"]},
        {"patterns": "1"},
        {"projector": 3},
        {"projector": "Q4_K_M"},
        {"rules": [[1]]},
        {"rules": [["mlp", "zzz", "why"]]},
        {"name": 3},
    ],
)
def test_malformed_manifest_of_gguf_files(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_variant(tmp_path, "text"), tmp_path / "out"
    assert main(["gguf", str(source), str(out), "--types", "F16"]) == 0
    manifest = json.loads((out / "qwen35.json").read_text())
    edit(out / "qwen35.json", recipe={**manifest["recipe"], **change})
    assert reproduce(out, "--source", source) == 2
    assert "error: qwen35.json: " in capsys.readouterr().err


def test_importance_matrix_must_be_the_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_variant(tmp_path, "dense"), tmp_path / "out"
    mine, other = (write_imatrix(tmp_path / f"{n}.gguf", seed=n) for n in (1, 2))
    flags = ["--types", "Q4_K_M", "--imatrix", str(mine)]
    assert main(["gguf", str(source), str(out), *flags]) == 0
    assert reproduce(out, "--source", source) == 2
    assert "give it: --imatrix" in capsys.readouterr().err
    assert reproduce(out, "--source", source, "--imatrix", other) == 2
    assert "not the importance matrix that the manifest names" in capsys.readouterr().err
    moved = mine.rename(tmp_path / "elsewhere.gguf")
    assert reproduce(out, "--source", source, "--imatrix", moved) == 0
    moved.rename(tmp_path / "imatrix.gguf")
    assert reproduce(out, "--source", source, "--imatrix", tmp_path) == 0


def test_existing_output_is_kept(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(dense, tmp_path / "out").out
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("mine")
    assert reproduce(out, "--source", dense, "--output", tmp_path / "taken") == 2
    assert "exists already" in capsys.readouterr().err
    assert files_in(tmp_path / "taken") == {"x": b"mine"}


def test_published_artifact_is_made_again_from_the_hub_alone(
    world: World, dense: Path, tmp_path: Path
) -> None:
    world.hub.repos[SOURCE] = Repo.of(dense)
    out = tmp_path / "out"
    made = world.client.run("convert", f"{SOURCE}@v1", out, "--recipe", "text-nf4")
    assert made.code == 0, made.err
    assert world.publish(folder=out).code == 0
    shutil.rmtree(out)
    world.hub.repos[SOURCE].refs["main"] = "f" * 40  # main has moved on
    world.hub.requests.clear()
    done = world.client.run("reproduce", REPO, "--json")
    assert done.code == 0, done.out + done.err
    assert done.json()["same"]
    assert world.hub.sent(f"/{REPO}/resolve/") == len(world.repo.read("qwen35.json"))
    world.repo.put({"model.safetensors": b"other weights", "config.json": b"{}"})
    done = world.client.run("reproduce", REPO)
    assert done.code == 1
    for name in ("model.safetensors", "config.json"):
        assert f"DIFFERS {name}: the file beside the manifest is missing, or differs" in done.out
    asked = [r.path for r in world.hub.requests if f"/{SOURCE}/resolve/" in r.path]
    assert asked
    assert all(COMMIT in path for path in asked)
