"""Checkpoints as people have them: the error names the cause, and small files are accounted for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen35
from checkpoints import ASSET, random_tensors, tiny_config, write_checkpoint
from qwen35.checkpoint.hub import HubId, cached_snapshot
from qwen35.checkpoint.locations import folder_name
from qwen35.checkpoint.open import describe, fetch
from qwen35.checkpoint.source import open_folder
from qwen35.errors import HubError, InputError, Qwen35Error
from qwen35.planning.gguf_files.front_matter import checked_card
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import verify

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 11422650\n"
TEXT = "model.language_model."


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The embedded checkpoint, to be damaged."""
    return Path(shutil.copytree(ASSET, tmp_path / "model"))


def refusal(call: Callable[[], object]) -> str:
    """Return the sentence that refuses."""
    with pytest.raises(Qwen35Error) as caught:
        call()
    return str(caught.value)


def dry(model: Path, out: str = "out", recipe: str = "text-nf4") -> Callable[[], object]:
    """Return a dry run of convert."""
    return lambda: qwen35.convert(model, model.parent / out, recipe=recipe, dry_run=True)


def dry_gguf(model: Path) -> Callable[[], object]:
    """Return a dry run of gguf."""
    return lambda: qwen35.gguf(model, model.parent / "out", types=["F16"], dry_run=True)


# --- names


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """The tensors of a small dense checkpoint."""
    return random_tensors(tiny_config(layers=4))


def renamed(
    folder: Path, tensors: dict[str, torch.Tensor], name: Callable[[str], str], **config: Any
) -> Path:
    """Write a checkpoint whose tensors have other names."""
    return write_checkpoint(
        folder / "renamed",
        tiny_config() | config,
        {name(key): value for key, value in tensors.items()},
        index=False,
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (lambda n: f"base_model.model.{n}", "begins with 'base_model.model.'"),
        (lambda n: f"_orig_mod.{n}", "torch.compile's wrapper"),
        (lambda n: f"module.{n}", "begins with 'module.'"),
        (lambda n: f"model.{n}", "begins with 'model.'"),
        (
            lambda n: n.replace(TEXT, f"{TEXT}language_model."),
            f"begins with '{TEXT}language_model.",
        ),
        (lambda n: n.replace(TEXT, "language_model.model."), "begins with 'language_model.model.'"),
        (lambda n: n.replace(TEXT, ""), "has no prefix"),
        (lambda n: n.replace("layers.0.", "layers.0._fsdp_wrapped_module."), "FSDP's wrapper"),
        (lambda n: n.replace("q_proj.weight", "q_proj.base_layer.weight"), "PEFT's wrapper"),
    ],
)
def test_common_change_of_names_is_told_once(
    name: Callable[[str], str], said: str, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = renamed(tmp_path, tensors, name)
    sentence = refusal(dry(model))
    assert said in sentence
    assert "download" not in sentence
    assert said in refusal(dry_gguf(model))
    findings = verify(open_artifact(str(model))).findings
    assert [f.message for f in findings if f.check == "tensors"] == [sentence.partition(": ")[2]]


def test_size_of_another_model_is_told_by_its_key(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    config = tiny_config()
    config["text_config"]["vocab_size"] = 600
    model = write_checkpoint(tmp_path / "m", config, tensors, index=False)
    assert "shape [512, 256], expected [600, 256]" in refusal(dry(model))
    config["text_config"] |= {"vocab_size": 512, "intermediate_size": 300}
    model = write_checkpoint(tmp_path / "m", config, tensors, index=False)
    sentence = refusal(dry(model))
    assert sentence.startswith("config.json: intermediate_size is 300, but 15 tensors have 512")


# --- packed by others


def pack(name: str, *parts: tuple[str, torch.dtype]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parts of a packed weight."""
    stem = name.removesuffix("weight")
    for part, dtype in parts:
        yield stem + part, torch.zeros(8, 8).to(dtype)


@pytest.mark.parametrize(
    ("settings", "parts", "said"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            [("qweight", torch.int32), ("qzeros", torch.int32), ("g_idx", torch.int32)],
            "GPTQ (4 bits)",
        ),
        ({"quant_method": "awq", "bits": 4}, [("qweight", torch.int32)], "AWQ (4 bits)"),
        ({}, [("qweight", torch.int32), ("qzeros", torch.int32)], "GPTQ or AWQ"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            [("weight_packed", torch.int32), ("weight_scale", torch.bfloat16)],
            "compressed-tensors (pack-quantized)",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            [("weight", torch.float8_e4m3fn), ("weight_scale", torch.bfloat16)],
            "compressed-tensors (float-quantized)",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            [("weight", torch.uint8), ("weight_scale", torch.float8_e4m3fn)],
            "ModelOpt (NVFP4)",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            [("weight", torch.int8), ("SCB", torch.float32), ("weight_format", torch.uint8)],
            "bitsandbytes 8-bit",
        ),
        (
            {"quant_method": "fp8"},
            [("weight", torch.float8_e4m3fn), ("weight_scale", torch.float32)],
            "FP8 with a scale per tensor or channel",
        ),
    ],
)
def test_packing_of_another_tool_is_named(
    settings: dict[str, Any],
    parts: list[tuple[str, torch.dtype]],
    said: str,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    changed: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        packed = name.endswith("_proj.weight") and "visual" not in name
        changed |= dict(pack(name, *parts)) if packed else {name: value}
    config = tiny_config() | ({"quantization_config": settings} if settings else {})
    model = write_checkpoint(tmp_path / "m", config, changed, index=False)
    sentence = refusal(dry(model))
    assert f"weights packed as {said}, expected unquantized ones" in sentence
    assert "start from the unquantized checkpoint" in sentence
    assert refusal(dry_gguf(model)) == sentence
    summary = qwen35.inspect(model)
    assert isinstance(summary, dict)
    assert summary["format"] == f"{said}, which cannot be read here"
    findings = verify(open_artifact(str(model))).findings
    assert sum("weights packed as" in finding.message for finding in findings) == 1


def test_mlx_is_named_even_unpacked(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", tiny_config(), {}, index=False)
    save_file(tensors, model / "model.safetensors", metadata={"format": "mlx"})
    assert "weights packed as MLX" in refusal(dry(model))


def test_settings_of_a_packing_without_packed_weights_are_no_packing(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    assert open_folder(copy).foreign is None


# --- other things than a checkpoint


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "an adapter (LoRA)"),
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "(pytorch_model.bin), no safetensors"),
        ({"config.json": b"{}", "model.gguf": b"GGUF"}, "GGUF files (model.gguf)"),
        ({"config.json": b"{}", "training_args.bin": b"x"}, "model_type None is not"),
        ({"checkpoint-20/x": b"", "checkpoint-100/x": b""}, "is it checkpoint-100?"),
    ],
)
def test_folder_of_something_else_is_named(
    files: dict[str, bytes], said: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(content)
    assert said in refusal(lambda: fetch(str(tmp_path / "m")))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "merges.txt"]
)
def test_pointer_of_git_lfs_is_named_wherever_it_lies(name: str, copy: Path) -> None:
    (copy / name).write_bytes(POINTER)
    said = f"{name}: a Git LFS pointer, not the file itself; fetch it: `git lfs pull`"
    for call in (dry(copy), dry_gguf(copy)):
        assert refusal(call).startswith(said)
    (finding,) = verify(open_artifact(str(copy))).findings
    assert "a Git LFS pointer" in finding.message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(64), "an archive of torch.save"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a pickle"),
        (b"", "0 bytes long"),
    ],
)
def test_what_stands_in_place_of_weights_is_named(content: bytes, said: str, copy: Path) -> None:
    (copy / "model.safetensors-00001-of-00001.safetensors").write_bytes(content)
    assert said in refusal(dry(copy))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "config.json"])
def test_link_that_leads_nowhere_is_named(name: str, copy: Path) -> None:
    (copy / name).unlink()
    (copy / name).symlink_to("../blobs/gone")
    said = f"{name}: a link to ../blobs/gone, which does not exist"
    assert refusal(dry(copy)).startswith(said)
    assert refusal(dry_gguf(copy)).startswith(said)


# --- sidecars


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{}", "no model in it"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}}',
         "the tokenizers library cannot load it"),
        ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": [{"id": "1"}]}', "added"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "not a valid Jinja template"),
        ("tokenizer_config.json", '{"chat_template": 7}', "chat_template is 7"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token is 5, expected a token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": "x"}}', "tokens by their num"),
        ("tokenizer_config.json", '{"extra_special_tokens": [1]}', "expected a list of tokens"),
        ("tokenizer_config.json", '{"tokenizer_class": ["A"]}', "tokenizer_class is ['A']"),
        ("tokenizer_config.json", '{"pad_token": {"a": 1}}', "pad_token is {'a': 1}"),
        ("chat_template.jinja", "{% for x in y %}", "not a valid Jinja template"),
        ("generation_config.json", "[1]", "not a JSON object"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature is 'hot'"),
        ("generation_config.json", '{"top_k": 20.5}', "top_k is 20.5, expected an integer"),
        ("generation_config.json", '{"eos_token_id": [1, "2"]}', "eos_token_id is [1, '2']"),
        ("generation_config.json", '{"top_p": 1e300}', "top_p is 1e+300"),
        ("merges.txt", "a b c\n", "expected two tokens a line"),
    ],
)  # fmt: skip
def test_damaged_sidecar_is_told_by_every_verb(
    name: str, content: str, said: str, copy: Path
) -> None:
    (copy / name).write_text(content)
    for call in (dry(copy), dry(copy, recipe="nf4"), dry_gguf(copy)):
        sentence = refusal(call)
        assert sentence.startswith(f"{name}: ")
        assert said in sentence
    assert [f.subject for f in verify(open_artifact(str(copy))).findings] == [name]


@pytest.mark.parametrize("name", ["preprocessor_config.json", "vocab.json"])
def test_damage_is_told_only_where_the_file_travels(name: str, copy: Path) -> None:
    (copy / name).write_text("not JSON")
    assert refusal(dry(copy, recipe="nf4")).startswith(f"{name}: not valid JSON")
    dry_gguf(copy)()


def test_several_damaged_files_are_told_together(copy: Path) -> None:
    (copy / "vocab.json").write_text('{"a": "b"}')
    (copy / "merges.txt").write_bytes(b"\xff")
    assert refusal(dry(copy)) == "merges.txt: not UTF-8 text (byte 0); also damaged: vocab.json"


def test_what_stays_behind_is_listed(copy: Path) -> None:
    (copy / "additional_chat_templates").mkdir()
    (copy / "TERMS.txt").write_text("ours")
    (copy / ".gitattributes").write_text("")
    plan = make_plan(open_folder(copy), load_recipe("text-nf4"))
    (note,) = [note for note in plan.notes if note.startswith("not copied")]
    assert note == (
        "not copied: README.md, TERMS.txt, additional_chat_templates/, eval.txt, "
        "preprocessor_config.json, questions.json, training.json, video_preprocessor_config.json"
    )
    assert "tokenizer.json" in plan.copied


def test_notes_name_a_class_that_is_not_that_of_the_type(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["architectures"] = ["Qwen3_5MoeForConditionalGeneration"]
    (copy / "config.json").write_text(json.dumps(config))
    notes = make_plan(open_folder(copy), load_recipe("nf4")).notes
    assert any("model_type qwen3_5 is Qwen3_5ForConditionalGeneration" in note for note in notes)
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    assert "whose model_type is qwen3_5_moe" in refusal(dry(copy))


@pytest.mark.parametrize(("ffn", "fits"), [(192, False), (256, True)])
def test_dimension_that_fits_no_tile_is_named(ffn: int, fits: bool, tmp_path: Path) -> None:
    config = tiny_config(layers=1, mtp=0)
    config["text_config"] |= {"hidden_size": 192, "intermediate_size": ffn}
    config["vision_config"]["out_hidden_size"] = 192
    model = write_checkpoint(tmp_path / "m", config, random_tensors(config), index=False)
    sentence = refusal(dry(model, recipe="fp8"))
    assert "192 columns" in sentence
    assert "hidden_size" in sentence


# --- front matter


@pytest.mark.parametrize(
    ("matter", "stored"),
    [
        ("tags:\n- qwen\n- 2025", {"tags": ["qwen", "2025"]}),
        ("name: 2025-01-01\nversion: 1.10", {"name": "2025-01-01", "version": "1.10"}),
        ("license: [mit, 2]\nother: {a: [1]}", {"license": ["mit", "2"]}),
        ("base_model:\n- {name: 7}\n-\n- a/b", {"base_model": [{"name": "7"}, "a/b"]}),
        ("tags: []\nname: x", {"name": "x"}),
        ("author: yes\ntags: [no, ja]", {"author": "yes", "tags": ["no", "ja"]}),
    ],
)
def test_scalars_of_a_card_become_the_text_it_has(matter: str, stored: dict[str, Any]) -> None:
    import yaml

    changed = checked_card(f"---\n{matter}\n---\n# Text\n".encode()).decode()
    assert yaml.safe_load(changed.removeprefix("---\n").removesuffix("---\n")) == stored


@pytest.mark.parametrize(
    "matter", ["a", "- b", "1", "name: x\ntags:\n- no\n- ja", "x: {y: [1]}", ""]
)
def test_card_that_the_library_reads_stays(matter: str) -> None:
    card = f"---\n{matter}\n---\ntext".encode()
    assert checked_card(card) == card


@pytest.mark.parametrize(
    "matter",
    [
        "tags:\n- {c: d}",
        "name: [a]",
        "a: [",
        "version: {1: 2}",
        "name: 2025-99-99",
        "? [a]\n: b",
        "base_model: [[a]]",
        "name: !!python/object:os.system x",
        "tags: !!set {a, b}",
        'name: "\\ud800"',
        "x: &x " + "y" * 2999 + "\ntags: [" + "*x," * 200 + "]",
        "[" * 1000,
    ],
)
def test_card_that_cannot_be_stored_is_refused(matter: str) -> None:
    with pytest.raises(InputError, match=r"^README\.md: front matter"):
        checked_card(f"---\n{matter}\n---\n".encode())


# --- the Hub's cache

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot of the embedded checkpoint in the Hub's cache."""
    home = tmp_path / "hub"
    snapshot = home / "models--Qwen--Qwen3.5-tiny" / "snapshots" / COMMIT
    shutil.copytree(ASSET, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_cache_is_used_offline(cached: Path) -> None:
    for open_model in (describe, fetch):
        checkpoint = open_model("Qwen/Qwen3.5-tiny")
        assert (checkpoint.root, checkpoint.repo) == (cached, "Qwen/Qwen3.5-tiny")
        assert checkpoint.revision == COMMIT
    assert cached_snapshot(HubId("Qwen/Qwen3.5-tiny", COMMIT)) == cached
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and the Hub's cache does not have"):
        fetch("Qwen/Qwen3.5-none")


def test_snapshot_is_called_like_its_model(cached: Path) -> None:
    assert folder_name(cached) == "Qwen3.5-tiny"
    assert open_folder(cached).title == "Qwen3.5-tiny"
    plan = qwen35.gguf(cached, cached.parents[3] / "out", types=["F16"], dry_run=True).plan
    assert [file.name for file in plan.files] == ["Qwen3.5-tiny-F16.gguf"]


# --- the lists of quantized checkpoints


def test_no_list_of_skipped_modules_means_the_heads_default(tmp_path: Path) -> None:
    qwen35.convert(ASSET, tmp_path / "out", recipe="text-nf4", threads=1)
    for drop in (False, True):
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        config["quantization_config"]["llm_int8_skip_modules"] = None
        if drop:
            del config["quantization_config"]["llm_int8_skip_modules"]
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
        findings = verify(open_artifact(str(tmp_path / "out"))).findings
        assert "lm_head" not in {finding.subject for finding in findings}
    assert load_file(tmp_path / "out" / "model.safetensors")
