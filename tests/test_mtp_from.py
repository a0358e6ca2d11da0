"""The MTP layer of the original, for a fine-tune that was saved without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import qwen35
from adapters import make_adapter
from checkpoints import ASSET, make_checkpoint
from fake_hub import FakeHub, serving
from hub_command import command
from hub_store import Repo
from qwen35.api.run_api import RunOptions, prepare
from qwen35.checkpoint.source import open_folder
from qwen35.errors import InputError, OutputError, TensorError, UsageError
from qwen35.pipeline.run_file import read_run_file
from qwen35.publishing.repo_documents import documents

pytestmark = pytest.mark.sentences


def stored(folder: Path) -> dict[str, Any]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def without_mtp(model: Path, out: Path, *, promised: int | None = None) -> Path:
    """Return a checkpoint as transformers saves it: no MTP layer, whatever config.json says."""
    shutil.copytree(model, out)
    tensors = {name: t for name, t in stored(out).items() if not name.startswith("mtp.")}
    for file in (*out.glob("*.safetensors"), out / "model.safetensors.index.json"):
        file.unlink(missing_ok=True)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    if promised is not None:
        for section in (config, config.get("text_config", {})):
            section.pop("mtp_num_hidden_layers", None)
        config.get("text_config", config)["mtp_num_hidden_layers"] = promised
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint without its MTP layer, and without the promise of one."""
    return without_mtp(ASSET, tmp_path_factory.mktemp("tuned") / ASSET.name, promised=0)


@pytest.mark.parametrize("recipe", ["bf16", "nf4"])
def test_a_checkpoint_as_if_the_layer_had_stayed(recipe: str, tuned: Path, tmp_path: Path) -> None:
    out = qwen35.convert(tuned, tmp_path / "a", recipe=recipe, mtp_from=ASSET, threads=1)
    assert f"the MTP layer is that of {ASSET.name}" in out.plan.notes
    qwen35.convert(ASSET, tmp_path / "b", recipe=recipe, threads=1)
    got, wanted = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert got.keys() == wanted.keys()
    assert all(bool((got[name] == wanted[name]).all()) for name in got)
    configs = [json.loads((tmp_path / x / "config.json").read_text()) for x in "ab"]
    assert configs[0]["text_config"]["mtp_num_hidden_layers"] == 1
    assert configs[0]["text_config"] == configs[1]["text_config"]


def test_verbs_that_plan_merge_and_run_take_the_layer_too(tuned: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"adapter": [make_adapter("queries", tmp_path / "mine")]}
    merged = qwen35.merge(tuned, options["adapter"], tmp_path / "merged", mtp_from=ASSET, threads=1)
    planned = qwen35.plan(tuned, recipe="bf16", mtp_from=ASSET, **options)
    assert planned.digest == merged.plan.digest
    again = qwen35.plan(tuned, recipe="bf16", mtp_from=ASSET, onto="nf4", **options)
    assert again.digest != planned.digest
    with pytest.raises(UsageError, match="--onto: given without an adapter"):
        qwen35.plan(tuned, onto="nf4")
    file, donor = tmp_path / "run.toml", without_mtp(ASSET, tmp_path / "donor")
    file.write_text(
        f"""model = {json.dumps(str(tuned))}
mtp_from = "donor"
adapters = ["mine"]
out = "out"
depth = "numbers"
[[artifact]]
recipe = "bf16"
name = "made"
"""
    )
    with pytest.raises(UsageError, match="--mtp-from: .*donor has no whole MTP layer"):
        qwen35.run(file)
    shutil.rmtree(donor)
    shutil.copytree(ASSET, donor)
    assert qwen35.run(file, threads=1).passed
    for path in merged.out.glob("*.safetensors"):
        assert (tmp_path / "out" / "made" / path.name).read_bytes() == path.read_bytes()
    assert {step.state for step in qwen35.run(file, threads=1).outcomes} <= {"kept", "skipped"}
    [weights] = donor.glob("*.safetensors")
    save_file({n: t + 1 for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    note = prepare(read_run_file(file), RunOptions(), dry=True).forecast().to_json()["steps"][0]
    assert note["note"] == ""
    with pytest.raises(UsageError, match="--mtp-from: is for --path"):
        qwen35.run(file, mtp_from=ASSET)


def test_gguf_files_as_if_the_layer_had_stayed(tuned: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"types": "F16,Q4_K_M", "threads": 1}
    qwen35.gguf(tuned, tmp_path / "a", mtp_from=ASSET, **options)
    qwen35.gguf(ASSET, tmp_path / "b", **options)
    for file in (tmp_path / "b").glob("*.gguf"):
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
    apart: dict[str, Any] = {"mtp": "separate", "mtp_from": ASSET, "types": "F16", "threads": 1}
    qwen35.gguf(tuned, tmp_path / "c", **apart)
    assert len(list((tmp_path / "c").glob("mtp-*.gguf"))) == 1


def test_verified_reproduced_and_recorded(tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qwen35.convert(tuned, out, recipe="nf4", mtp_from=ASSET, threads=1)
    source = json.loads((out / "qwen35.json").read_text())["source"]
    assert source == {"folder": ASSET.name, "mtp_from": {"folder": ASSET.name}}
    card = documents(out, "owner/Tuned")["README.md"].decode()
    assert f"--recipe nf4 --mtp-from {ASSET.name}" in card
    assert "reproduce owner/Tuned --source SOURCE --mtp-from MODEL\n" in card
    assert qwen35.verify(out, source=tuned, mtp_from=ASSET, threads=1).passed
    assert not qwen35.reproduce(out, source=tuned, mtp_from=ASSET, threads=1).findings
    for act in (qwen35.verify, qwen35.reproduce):
        with pytest.raises(UsageError, match=r"the MTP layer of a folder called .*--mtp-from DIR"):
            act(out, source=tuned)
    with pytest.raises(UsageError, match="needs --source, which it changes"):
        qwen35.verify(out, mtp_from=ASSET)
    whole = qwen35.gguf(ASSET, tmp_path / "own", types="Q8_0", threads=1).out
    with pytest.raises(UsageError, match="records no other checkpoint's MTP layer"):
        qwen35.reproduce(whole, source=ASSET, mtp_from=ASSET)
    record = json.loads((out / "qwen35.json").read_text())
    record["source"]["mtp_from"] = ["x"]
    (out / "qwen35.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="source"):
        qwen35.reproduce(out, source=tuned, mtp_from=ASSET)


def test_the_layer_of_another_model_is_a_finding(tuned: Path, tmp_path: Path) -> None:
    out = qwen35.convert(tuned, tmp_path / "out", recipe="bf16", mtp_from=ASSET, threads=1).out
    other = tmp_path / "other"
    shutil.copytree(ASSET, other)
    (file,) = other.glob("*.safetensors")
    tensors = load_file(file)
    tensors["mtp.fc.weight"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    (finding,) = qwen35.verify(out, source=tuned, mtp_from=other, threads=1).findings
    assert finding.subject == "mtp.fc.weight"


@pytest.mark.parametrize("workers", ["slices", "workers"])
def test_shared_work_finds_the_donor(workers: str, tuned: Path, tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    options: dict[str, Any] = {"recipe": "bf16", "mtp_from": ASSET, "threads": 1}
    qwen35.convert(tuned, alone, **options)
    if workers == "workers":
        qwen35.convert(tuned, out, workers=2, **options)
    else:
        for i in (1, 2):
            qwen35.convert(tuned, out, slice=(i, 2), **options)
        qwen35.finalize(out)
    for file in alone.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_a_donor_that_changes_is_refused(tuned: Path, tmp_path: Path) -> None:
    from qwen35.checkpoint.grafted import with_mtp_of
    from qwen35.planning.output_plan import make_plan
    from qwen35.planning.recipe import load_recipe
    from qwen35.writing.write import write

    donor = Path(shutil.copytree(ASSET, tmp_path / "donor"))
    both = with_mtp_of(open_folder(tuned), open_folder(donor))
    plan = make_plan(both, load_recipe("bf16", "safetensors"))
    (file,) = donor.glob("*.safetensors")
    with file.open("ab") as more:
        more.write(b"x")
    with pytest.raises(TensorError, match="changed since its header was read"):
        write(plan, tmp_path / "out", threads=1)


def test_experts_are_named_as_the_donor_names_them(
    moe: Path, moe_per_expert: Path, tmp_path: Path
) -> None:
    tuned = without_mtp(moe, tmp_path / "tuned")
    qwen35.convert(tuned, tmp_path / "out", recipe="bf16", mtp_from=moe_per_expert, threads=1)
    got, donor = stored(tmp_path / "out"), stored(moe_per_expert)
    of_mtp = {name for name in donor if name.startswith("mtp.")}
    assert {name for name in got if name.startswith("mtp.")} == of_mtp
    assert all(bool((got[name] == donor[name]).all()) for name in of_mtp)
    assert qwen35.verify(tmp_path / "out", source=tuned, mtp_from=moe_per_expert, threads=1).passed


def test_another_base_in_the_card_is_a_note(tuned: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from qwen35.checkpoint.grafted import grafted_notes, with_mtp_of

    named = Path(shutil.copytree(tuned, tmp_path / "named"))
    donor = replace(open_folder(ASSET), repo="owner/Instruct", revision="0" * 40)
    for card, count in (
        ("---\nbase_model: owner/Instruct\n---\n", 1),
        ("---\nbase_model:\n- owner/Base\n- 'owner/Instruct'\n---\n", 1),
        ("---\nlicense: mit\nbase_model:\n- owner/Base\n---\n", 2),
        ("base_model: owner/Base\n", 1),
        ("---\nbase_model: [1, {}]\n---\n", 1),
    ):
        (named / "README.md").write_text(card)
        notes = list(grafted_notes(with_mtp_of(open_folder(named), donor)))
        assert notes[0] == f"the MTP layer is that of owner/Instruct@{'0' * 40}"
        assert len(notes) == count, card


def test_what_does_not_fit_is_one_sentence(
    tuned: Path, dense: Path, moe: Path, fp8_artifact: Path, tmp_path: Path
) -> None:
    lost = without_mtp(dense, tmp_path / "lost")
    small = make_checkpoint(tmp_path / "small", layers=8)
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (dense, dense, {}, "has an MTP layer of its own; leave it out"),
        (lost, lost, {}, "has no whole MTP layer; give the original checkpoint"),
        (tuned, dense, {}, "differ: layers"),
        (lost, fp8_artifact, {}, "weight as fp8; give the unquantized original"),
        (lost, small, {}, "differ: layers"),
        (lost, moe, {}, "expected sizes of one model; give the original"),
        (lost, dense, {"mtp": "drop"}, "the output leaves the MTP layer out"),
        (lost, dense, {"recipe": "text-nf4", "drop_mtp": True}, "leaves the MTP layer out"),
        (lost, dense, {"keep_shards": True}, "--keep-shards: the MTP layer is in no file of"),
    ]
    for model, donor, options, message in cases:
        with pytest.raises(UsageError) as raised:
            qwen35.convert(model, tmp_path / "out", mtp_from=donor, **options)
        assert message in str(raised.value), (message, str(raised.value))
    with pytest.raises(UsageError, match="the output leaves the MTP layer out"):
        qwen35.gguf(lost, tmp_path / "out", types="F16", mtp_from=dense, mtp="drop")
    with pytest.raises(UsageError, match="has no effect with --adapter-only"):
        qwen35.gguf(lost, tmp_path / "out", mtp_from=dense, adapter_only=True)
    assert not (tmp_path / "out").exists()


def test_of_a_donor_on_the_hub_only_the_layer_is_downloaded(tuned: Path, tmp_path: Path) -> None:
    """Workers open it as it lies in the cache; the bytes are those of the whole donor."""
    donor, home = without_mtp(ASSET, tmp_path / "donor"), tmp_path / "home"
    home.mkdir()
    layer = {name: t for name, t in stored(ASSET).items() if name.startswith("mtp.")}
    save_file(layer, donor / "layer.safetensors", {"format": "pt"})
    files = {path.name: load_file(path) for path in donor.glob("*.safetensors")}
    index = {"weight_map": {name: file for file in files for name in files[file]}}
    (donor / "model.safetensors.index.json").write_text(json.dumps(index))
    args = ["convert", str(tuned), str(tmp_path / "a"), "--recipe", "bf16", "--workers", "1"]
    with serving(FakeHub({"Owner/Donor": Repo.of(donor)})) as hub:
        done = command(*args, "--mtp-from", "Owner/Donor", home=home, url=hub.url)
        assert done.code == 0, done.err
        again = command(
            "reproduce", str(tmp_path / "a"), "--source", str(tuned), home=home, url=hub.url
        )
        assert again.code == 0, again.err
    assert [path.name for path in home.rglob("*.safetensors")] == ["layer.safetensors"]
    out = qwen35.convert(tuned, tmp_path / "b", recipe="bf16", mtp_from=donor, threads=1).out
    for path in out.glob("*.safetensors"):
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    (donor / "model.safetensors").unlink()
    assert qwen35.verify(out, source=tuned, mtp_from=donor, threads=1).passed


def test_the_donor_is_not_overwritten(tuned: Path, tmp_path: Path) -> None:
    """Not even if it is an output of qwen35, which --overwrite may replace."""
    donor = qwen35.convert(ASSET, tmp_path / "donor", recipe="bf16", threads=1).out
    options: dict[str, Any] = {"mtp_from": donor, "overwrite": True, "threads": 1}
    same = "output and input are the same folder"
    with pytest.raises(OutputError, match=same):
        qwen35.gguf(tuned, donor, types="Q8_0", **options)
    with pytest.raises(OutputError, match=same):
        qwen35.convert(tuned, donor, recipe="bf16", **options)
    with pytest.raises(OutputError, match="overlaps the input"):
        qwen35.convert(tuned, donor / "inner", recipe="bf16", **options)
    made = qwen35.convert(tuned, tmp_path / "made", recipe="bf16", **options).out
    with pytest.raises(OutputError, match=same):
        qwen35.reproduce(made, source=tuned, mtp_from=donor, output=donor, overwrite=True)
    assert (donor / "model.safetensors").is_file()
