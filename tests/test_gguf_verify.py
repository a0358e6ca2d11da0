"""The verifier on GGUF files: faults planted in them are found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from checkpoints import ASSET
from gguf_models import make_variant, rewrite_gguf
from qwen35.checkpoint.gguf_header import read_container
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.open import GgufFiles, gguf_files
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.codecs.ggml.judge import bad_blocks
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.progress import Silent
from qwen35.verification.behaviour import NOT_ASKED
from qwen35.verification.gguf_subject import GgufSubject
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import Depth, Verdict, verify
from qwen35.writing.write import write
from watching import Watching, watched_pools

pytestmark = pytest.mark.sentences

TYPES = ("F16", "Q4_K_M")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("verify"), "dense")


@pytest.fixture(scope="module")
def good(source: Path) -> Path:
    plan = make_plan(open_folder(source), load_recipe("mix", "gguf"), types=TYPES, projector="F16")
    return write(plan, source.with_name("good")).out


@pytest.fixture
def out(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "out"))


def check(folder: Path, source: Path | None = None, depth: Depth = "structure") -> Verdict:
    files = gguf_files(str(folder)) or GgufFiles(LocalFolder(folder), (), whole=True, root=folder)
    checkpoint = open_folder(source) if source else None
    subject = GgufSubject(str(folder), files)
    return verify(subject, source=checkpoint, depth=depth, threads=1)


def checks(verdict: Verdict) -> set[str]:
    return {finding.check for finding in verdict.findings}


def quantized(folder: Path) -> Path:
    return next(folder.glob("*Q4_K_M.gguf"))


def poke(path: Path, tensor: str, offset: int, data: bytes) -> None:
    entry = read_container(path).tensors[tensor]
    with path.open("r+b") as file:
        file.seek(entry.begin + offset)
        file.write(data)


def rewrite(path: Path, change: Callable[[GGUFWriter], object]) -> None:
    """Write a file again with other keys or tensors; the manifest is left behind."""
    rewrite_gguf(path, path.with_suffix(".new"), "qwen35", change)
    path.with_suffix(".new").replace(path)
    (path.parent / "qwen35.json").unlink()


def test_good_files_pass(good: Path, source: Path) -> None:
    assert check(good).findings == ()
    assert check(good, depth="numbers").findings == ()
    verdict = check(good, source, "numbers")
    assert verdict.findings == ()
    assert verdict.counts["files"] == 3
    errors = {(row.role, row.storage): row.relative for row in verdict.errors}
    assert errors["mlp.up_proj", "f16"] < 1e-3 < errors["mlp.up_proj", "q4_K"] < 0.1
    assert errors["input_layernorm", "f32"] == 0


@pytest.mark.parametrize("name", ["moe", "moe-per-expert", "f16", "text", "odd-rows"])
def test_other_shapes_pass(name: str, tmp_path: Path) -> None:
    origin = make_variant(tmp_path, name)
    types = ("BF16", "Q8_0", "Q5_K_S", "IQ4_XS", "Q3_K_M")
    plan = make_plan(open_folder(origin), load_recipe("q8-gates-plus", "gguf"), types=types)
    out = write(plan, tmp_path / "out").out
    assert check(out, origin, "numbers").findings == ()


def test_the_embedded_checkpoint_passes(tmp_path: Path) -> None:
    types, recipe = ("Q6_K", "Q4_K_S", "IQ4_NL"), load_recipe("q8-gates", "gguf")
    plan = make_plan(open_folder(ASSET), recipe, types=types, projector="BF16")
    out = write(plan, tmp_path / "out").out
    assert check(out, ASSET, "numbers").findings == ()


def test_a_flipped_bit_changes_the_hash(out: Path) -> None:
    path = quantized(out)
    poke(path, "blk.0.ffn_up.weight", 1000, b"\xff")
    assert check(out).findings == ()
    assert checks(check(out, depth="numbers")) == {"hash"}


def test_a_scale_that_is_not_finite(out: Path) -> None:
    poke(quantized(out), "blk.0.ffn_up.weight", 144 * 3, b"\x00\x7c")
    (out / "qwen35.json").unlink()
    verdict = check(out, depth="numbers")
    assert checks(verdict) == {"decode"}
    assert "blk.0.ffn_up.weight" in verdict.findings[0].subject


def test_a_scale_that_is_another(out: Path, source: Path) -> None:
    poke(quantized(out), "blk.1.ffn_up.weight", 144 * 5 + 1, b"\x3c")
    (out / "qwen35.json").unlink()
    assert check(out, depth="numbers").findings == ()
    verdict = check(out, source, "numbers")
    assert checks(verdict) == {"bound"}
    assert "blk.1.ffn_up.weight" in verdict.findings[0].subject


def test_how_small_a_change_is_seen_is_said_and_true(good: Path, source: Path) -> None:
    """One weight of a block must be off by 16 times the block's bound."""
    said = [line for line in check(good, source, "numbers").not_detected if "q4_K" in line]
    assert len(said) == 1
    assert "6.5% of the largest weight in a block of 256 (root mean square)" in said[0]
    assert "1.0 times that weight for a single one" in said[0]
    expected = np.ones((1, 256), np.float32)
    difference = np.zeros((1, 256), np.float32)
    difference[0, 0] = 1.0
    assert bad_blocks(expected, difference, "q4_K") == 0
    difference[0, 0] = 1.05
    assert bad_blocks(expected, difference, "q4_K") == 1


def test_one_wrong_value_in_f16(out: Path, source: Path) -> None:
    path = out / "Tiny-dense-1B-F16.gguf"
    poke(path, "blk.2.attn_gate.weight", 2 * 77, b"\x00\x00")
    (out / "qwen35.json").unlink()
    verdict = check(out, source, "numbers")
    assert [(f.check, f.message) for f in verdict.findings] == [
        ("values", "1 values differ from the source's")
    ]


def test_swapped_heads(out: Path, source: Path) -> None:
    """Value heads in the order of transformers instead of ggml's."""
    path = quantized(out)
    entry = read_container(path).tensors["blk.0.attn_gate.weight"]
    data = path.read_bytes()[entry.begin : entry.begin + entry.nbytes]
    head = entry.nbytes // 4
    swapped = data[:head] + data[2 * head : 3 * head] + data[head : 2 * head] + data[3 * head :]
    poke(path, entry.name, 0, swapped)
    (out / "qwen35.json").unlink()
    verdict = check(out, source, "numbers")
    assert checks(verdict) == {"bound"}
    assert "relative error" in verdict.findings[0].message


def test_another_source(good: Path, tmp_path: Path) -> None:
    verdict = check(good, make_variant(tmp_path, "equal-heads"), "numbers")
    assert "source" in checks(verdict)
    other = check(good, make_variant(tmp_path, "f16"), "numbers")
    assert {"bound", "values"} & checks(other)


def test_a_missing_tensor(out: Path) -> None:
    rewrite(quantized(out), lambda writer: writer.tensors[0].pop("blk.1.ffn_up.weight"))
    verdict = check(out)
    assert [finding.check for finding in verdict.findings] == ["tensors"]
    assert "blk.1.ffn_up.weight" in verdict.findings[0].subject


def test_mtp_promised_but_absent(out: Path) -> None:
    def drop(writer: GGUFWriter) -> None:
        for name in [name for name in writer.tensors[0] if name.startswith("blk.4.")]:
            del writer.tensors[0][name]

    rewrite(quantized(out), drop)
    verdict = check(out)
    assert any("blk.4.nextn.eh_proj.weight" in f.subject for f in verdict.findings)


@pytest.mark.parametrize(
    "key", ["qwen35.ssm.group_count", "tokenizer.ggml.pre", "qwen35.rope.dimension_sections"]
)
def test_a_missing_key(key: str, out: Path) -> None:
    rewrite(quantized(out), lambda writer: writer.kv_data[0].pop(key))
    verdict = check(out)
    assert [(f.check, f.message) for f in verdict.findings] == [("metadata", f"no key {key}")]


def test_keys_that_contradict_the_tensors(out: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        writer.kv_data[0]["qwen35.feed_forward_length"].value = 1024

    rewrite(quantized(out), change)
    assert any("ffn_up" in f.subject for f in check(out).findings)


def test_too_few_token_types_and_no_template(out: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        del writer.kv_data[0]["tokenizer.chat_template"]
        writer.kv_data[0]["tokenizer.ggml.token_type"].value = [1, 1]

    rewrite(quantized(out), change)
    messages = " ".join(f.message for f in check(out).findings)
    assert "2 token types" in messages
    assert "no chat template" in messages


BEYOND = "beyond the 512 tokens"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("eos_token_id", 512, [f"eos_token_id is 512, {BEYOND}"]),
        ("eos_token_id", 511, []),
        ("padding_token_id", 600, [f"padding_token_id is 600, {BEYOND}"]),
        ("padding_token_id", 0, []),
        ("bos_token_id", 512, [f"bos_token_id is 512, {BEYOND}"]),
        ("bos_token_id", None, []),
    ],
)
def test_special_tokens_are_in_the_vocabulary(
    key: str, value: int | None, said: list[str], out: Path
) -> None:
    def change(writer: GGUFWriter) -> None:
        name = f"tokenizer.ggml.{key}"
        writer.kv_data[0].pop(name, None)
        if value is not None:
            writer.add_uint32(name, value)

    rewrite(quantized(out), change)
    name = quantized(out).name
    found = [(f.check, f.subject, f.message) for f in check(out).findings]
    assert found == [("metadata", name, message) for message in said]


def test_a_token_that_occurs_twice(out: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        tokens[7] = tokens[8]

    rewrite(quantized(out), change)
    assert [(f.check, f.subject, f.message) for f in check(out).findings] == [
        ("metadata", quantized(out).name, "a token occurs twice")
    ]


def test_keys_that_make_no_sense(out: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        writer.kv_data[0]["qwen35.block_count"].value = 9

    rewrite(quantized(out), change)
    (finding,) = check(out).findings
    assert (finding.check, finding.subject) == ("metadata", quantized(out).name)
    assert finding.message.startswith("keys that make no sense (ValueError: ")


def test_every_missing_tensor_and_what_must_be_f32(out: Path) -> None:
    names = ("blk.0.ffn_up.weight", "blk.1.ffn_down.weight")
    path = out / "Tiny-dense-1B-F16.gguf"

    def change(writer: GGUFWriter) -> None:
        for name in names:
            del writer.tensors[0][name]
        norm = writer.tensors[0].pop("blk.2.attn_norm.weight").tensor
        assert norm is not None
        writer.add_tensor("blk.2.attn_norm.weight", norm.astype(np.float16))

    rewrite(path, change)
    assert {(f.check, f.subject, f.message) for f in check(out).findings} == {
        *(("tensors", f"{path.name}: {name}", "missing, but the keys imply it") for name in names),
        (
            "tensors",
            f"{path.name}: blk.2.attn_norm.weight",
            "f16, but llama.cpp computes with it in f32",
        ),
    }


def test_a_manifest_that_is_none(out: Path) -> None:
    (out / "qwen35.json").write_text("{}")
    assert [(f.check, f.subject, f.message) for f in check(out).findings] == [
        ("manifest", "qwen35.json", "not a manifest of this version of qwen35")
    ]


def test_a_verdict_counts_what_was_looked_at(good: Path) -> None:
    for depth in ("structure", "numbers"):
        verdict = check(good, depth=depth)
        assert (verdict.name, verdict.kind, verdict.depth) == (str(good), "gguf", depth)
        entries = [e for f in good.glob("*.gguf") for e in read_container(f).tensors.values()]
        packed = [entry for entry in entries if entry.kind.name not in ("f32", "f16", "bf16")]
        assert verdict.counts == {"weights": len(entries), "packed": len(packed), "files": 3}
        assert verdict.notes == ()


def test_another_architecture(out: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        writer.kv_data[0]["general.architecture"].value = "llama"

    rewrite(quantized(out), change)
    assert "architecture 'llama'" in check(out).findings[0].message


def test_files_beside_the_plan(out: Path) -> None:
    quantized(out).rename(out / "renamed.gguf")
    found = {(f.check, f.subject) for f in check(out).findings}
    assert ("files", "renamed.gguf") in found
    assert ("files", "Tiny-dense-1B-Q4_K_M.gguf") in found


def test_a_type_that_was_not_planned(out: Path) -> None:
    path = out / "qwen35.json"
    manifest = json.loads(path.read_text())
    table = manifest["tensors"]["Tiny-dense-1B-Q4_K_M.gguf"]
    table["blk.0.ffn_up.weight"] = table["blk.0.ffn_up.weight"].replace("q4_K", "q8_0")
    path.write_text(json.dumps(manifest))
    assert checks(check(out)) == {"plan"}


def test_a_tensor_that_was_planned_and_is_not_there(out: Path) -> None:
    path = out / "qwen35.json"
    manifest = json.loads(path.read_text())
    name = "Tiny-dense-1B-F16.gguf"
    manifest["tensors"][name] |= {"blk.9.norm.weight": "f32 [1, 256]"}
    del manifest["tensors"][name]["blk.0.ffn_up.weight"]
    path.write_text(json.dumps(manifest))
    assert [(f.check, f.subject, f.message) for f in check(out).findings] == [
        ("plan", f"{name}: blk.9.norm.weight", "planned as f32 [1, 256], but missing"),
        ("plan", f"{name}: blk.0.ffn_up.weight", "not in the plan"),
    ]


def test_a_planned_tensor_of_another_shape(out: Path) -> None:
    path = out / "qwen35.json"
    manifest = json.loads(path.read_text())
    name = "Tiny-dense-1B-F16.gguf"
    for tensor, shape in (
        ("blk.0.ffn_up.weight", "[256, 512]"),
        ("output_norm.weight", "[1, 256]"),
    ):
        kind = manifest["tensors"][name][tensor].split()[0]
        manifest["tensors"][name][tensor] = f"{kind} {shape}"
    path.write_text(json.dumps(manifest))
    assert [(f.subject, f.message) for f in check(out).findings] == [
        (f"{name}: blk.0.ffn_up.weight", "f16 [512, 256], planned as f16 [256, 512]")
    ]  # leading ones are not counted


class Titles(Silent):
    """Progress that notes what begins, and how much it is."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []

    def begin(self, title: str, nbytes: int) -> None:
        self.begun.append((title, nbytes))


def test_a_file_with_other_tensors_is_not_compared_but_the_next_is(out: Path, source: Path) -> None:
    first, *_ = sorted(out.glob("*.gguf"))

    def change(writer: GGUFWriter) -> None:
        del writer.tensors[0]["blk.1.ffn_up.weight"]
        writer.add_tensor("blk.0.extra.weight", np.zeros((2, 32), np.float32))

    rewrite(first, change)
    poke(quantized(out), "output_norm.weight", 0, b"\x00\x00\x80\x3f")
    files, progress = gguf_files(str(out)), Titles()
    assert files is not None
    assert files.names[0] == first.name
    verdict = verify(
        GgufSubject(str(out), files),
        source=open_folder(source),
        depth="numbers",
        threads=1,
        progress=progress,
    )
    assert [(f.check, f.subject, f.message) for f in verdict.findings] == [
        ("tensors", f"{first.name}: blk.1.ffn_up.weight", "missing, but the keys imply it"),
        (
            "tensors",
            f"{first.name}: blk.0.extra.weight",
            "not a tensor that the keys imply",
        ),
        ("source", f"{first.name}: blk.1.ffn_up.weight", "in the source, but not here"),
        ("source", f"{first.name}: blk.0.extra.weight", "not in the source"),
        (
            "values",
            f"{quantized(out).name}: output_norm.weight",
            "1 values differ from the source's",
        ),
    ]
    containers = [read_container(out / name) for name in files.names[1:]]
    assert progress.begun == [(f"checking {c.path.name}", c.nbytes) for c in containers]
    assert {row.storage for row in verdict.errors} >= {"q4_K", "f16"}


def test_progress_tells_every_tensor(good: Path) -> None:
    progress = Watching()
    files = gguf_files(str(good))
    assert files is not None
    subject = GgufSubject(str(good), files)
    assert verify(subject, depth="numbers", threads=1, progress=progress).passed
    containers = [read_container(good / name) for name in files.names]
    assert progress.steps == [(e.nbytes, e.name) for c in containers for e in c.tensors.values()]


def test_what_cannot_be_decoded_has_no_error(out: Path, source: Path) -> None:
    sound = {(r.role, r.storage): r.count for r in check(out, source, "numbers").errors}
    poke(quantized(out), "blk.0.ffn_up.weight", 144 * 3, b"\x00\x7c")
    verdict = check(out, source, "numbers")
    found = {(r.role, r.storage): r.count for r in verdict.errors}
    [decoded] = [f for f in verdict.findings if f.check == "decode"]
    assert decoded.subject == f"{quantized(out).name}: blk.0.ffn_up.weight"
    assert found == {**sound, ("mlp.up_proj", "q4_K"): sound["mlp.up_proj", "q4_K"] - 1}


def test_files_with_findings_are_not_asked(out: Path) -> None:
    path = quantized(out)
    path.write_bytes(path.read_bytes()[:-5000])
    verdict = check(out, depth="behaviour")
    assert "readable" in checks(verdict)
    assert (verdict.answers, verdict.notes) == ((), (NOT_ASKED,))


def test_only_heads_are_read_unless_more_is_asked_for(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def fetch(files: GgufFiles, token: str | None) -> GgufFiles:
        asked.append(token)
        return files

    monkeypatch.setattr(GgufFiles, "fetch", fetch)
    assert verify(open_artifact(str(good), token="mine")).depth == "structure"
    assert asked == []
    subject = open_artifact(str(good), "numbers", token="mine")
    assert verify(subject, depth="numbers", threads=1).passed
    assert asked == ["mine"]


def test_as_many_threads_as_asked_for(
    good: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = watched_pools(monkeypatch, "qwen35.verification.numbers_check")
    assert verify(open_artifact(str(good), "numbers"), depth="numbers", threads=3).passed
    assert asked == [3, 3, 3]


def test_a_truncated_file_is_a_finding(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = quantized(out)
    path.write_bytes(path.read_bytes()[:-5000])
    assert {"readable", "files"} <= checks(check(out))
    assert main(["verify", str(out), "--quiet"]) == 1
    assert "truncated" in capsys.readouterr().out


def test_the_command(good: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(good), "--source", str(source), "--json", "--quiet"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["kind"], verdict["passed"], verdict["depth"]) == ("gguf", True, "numbers")
    assert main(["verify", str(quantized(good)), "--quiet"]) == 0
    assert main(["verify", str(good), "--source", str(source), "--depth", "structure"]) == 0
    assert "headers and settings compared with the source" in capsys.readouterr().out


def test_inspect(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(quantized(good)), "--json"]) == 0
    (summary,) = json.loads(capsys.readouterr().out)
    assert summary["architecture"] == "qwen35"
    assert summary["file_type"] == "Q4_K_M"
    assert summary["bytes"] == quantized(good).stat().st_size
    assert 4 < summary["bits_per_weight"] < 8
    assert summary["keys"]["tokenizer.ggml.tokens"] == "512 items"
    assert main(["inspect", str(good)]) == 0
    assert capsys.readouterr().out.count("file type  ") == 3


def test_inspect_of_a_damaged_file(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = quantized(out)
    path.write_bytes(path.read_bytes()[:3000])
    assert main(["inspect", str(path)]) == 2
    assert "declares 512 array items in 3000 bytes" in capsys.readouterr().err
