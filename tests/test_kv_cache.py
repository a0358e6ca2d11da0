"""Scales of a KV cache: read in both namings, kept, dropped, written from statistics, checked."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import Tensors
from gguf_models import sidecars
from qwen35.cli.main import main
from qwen35.planning.recipe import load_recipe
from qwen35.publishing.card_steps import make_command
from qwen35.publishing.repo_documents import documents
from running import load_all, read_config, tree
from verifying import agree, check, edit_config, edited, found

pytestmark = pytest.mark.sentences

Capture = pytest.CaptureFixture[str]
FULL = "model.language_model.layers.3.self_attn"
LINEAR = "model.language_model.layers.0.linear_attn"
MTP = "mtp.layers.0.self_attn"
NVIDIA = {"dynamic": False, "num_bits": 8, "type": "float"}
"""``kv_cache_scheme`` of nvidia/Qwen3.5-397B-A17B-NVFP4, 122B-A10B-NVFP4 and Qwen3.6-27B-NVFP4."""
LLM_COMPRESSOR = {**NVIDIA, "strategy": "tensor", "symmetric": True}
"""That of llm-compressor, of what config.json of compressed-tensors 0.20 has no default for."""
SCHEMES = {"modelopt": NVIDIA, "compressed-tensors": LLM_COMPRESSOR}
ENDS = {
    "modelopt": ("k_proj.k_scale", "v_proj.v_scale"),
    "compressed-tensors": ("k_scale", "v_scale"),
}
SHAPES = {"modelopt": (), "compressed-tensors": (1,)}
VALUES = (0.015625, 0.25)


def scales_of(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if name.endswith((".k_scale", ".v_scale"))}


def names(layout: str, *modules: str) -> list[str]:
    return [f"{module}.{end}" for module in modules for end in ENDS[layout]]


def with_scales(
    artifact: Path,
    folder: Path,
    layout: str,
    *,
    dtype: torch.dtype = torch.float32,
    modules: tuple[str, ...] = (FULL,),
    change: Callable[[Tensors], object] | None = None,
) -> Path:
    """Return a copy of an artifact with the scales that a tool would add, and without manifest."""

    def add(tensors: Tensors) -> None:
        for name, value in zip(names(layout, *modules), VALUES * len(modules), strict=True):
            tensors[name] = torch.full(SHAPES[layout], value, dtype=dtype)
        if change is not None:
            change(tensors)

    def tell(config: dict[str, Any]) -> None:
        config["quantization_config"]["kv_cache_scheme"] = SCHEMES[layout]

    return agree(edited(artifact, folder, add, tell))


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The dense model in NVFP4, by layout."""
    folder = tmp_path_factory.mktemp("packed")
    for layout in ENDS:
        command = ["convert", str(dense), str(folder / layout), "--recipe", "nvfp4", "--quiet"]
        assert main([*command, "--layout", layout, "--threads", "1"]) == 0
    return {layout: folder / layout for layout in ENDS}


@pytest.fixture(scope="module")
def scaled(packed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same with scales, of the MTP layer too, in the layout of compressed-tensors in bf16."""
    folder = tmp_path_factory.mktemp("scaled")
    dtypes = {"modelopt": torch.float32, "compressed-tensors": torch.bfloat16}
    return {
        layout: with_scales(
            packed[layout], folder / layout, layout, dtype=dtypes[layout], modules=(FULL, MTP)
        )
        for layout in ENDS
    }


@pytest.fixture(scope="module")
def stats(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics as `qwen35 calibrate` writes them, with the largest keys and values."""
    table: dict[str, Any] = {}
    for name, tensor in load_all(dense).items():
        if "proj" in name and tensor.ndim == 2 and ".visual." not in name:
            table[name] = {"input_channel_max": [2.0] * tensor.shape[-1]}
    for module, largest in ((FULL, (7.03125, 31.1)), (MTP, (9.4375, 64.5))):
        for side, value in zip("kv", largest, strict=True):
            table[f"{module}.{side}_proj.weight"]["cache_max"] = value
    path = tmp_path_factory.mktemp("stats") / "stats.json"
    path.write_text(json.dumps(table))
    return path


def convert(source: Path, out: Path, recipe: str, *more: str) -> int:
    command = ["convert", str(source), str(out), "--recipe", recipe, "--threads", "1"]
    return main([*command, "--quiet", *more])


# --- read


@pytest.mark.parametrize("layout", ENDS)
def test_scales_are_told_and_fine(
    layout: str, scaled: dict[str, Path], dense: Path, capsys: Capture
) -> None:
    assert main(["inspect", str(scaled[layout]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["notes"] == ["4 scales of the KV cache, for 2 layers"]
    assert told["bytes"] == sum(row["bytes"] for row in told["prefixes"].values())
    assert check(scaled[layout], dense).findings == ()


@pytest.mark.parametrize("layout", ENDS)
@pytest.mark.parametrize("recipe", ["bf16", "nf4", "fp8"])
def test_they_are_left_out_where_they_have_no_place(
    recipe: str, layout: str, scaled: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert convert(scaled[layout], out, recipe) == 0
    assert scales_of(load_all(out)) == {}
    assert "kv_cache_scheme" not in read_config(out).get("quantization_config", {})
    notes = json.loads((out / "qwen35.json").read_text())["notes"]
    expected = "not copied: 4 scales of the KV cache, for which this output has no place"
    assert notes.count(expected) == 1
    assert check(out, scaled[layout]).findings == ()


def test_gguf_files_leave_them_out(
    scaled: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    source = Path(shutil.copytree(scaled["modelopt"], tmp_path / "source"))
    for name, content in sidecars().items():
        (source / name).write_text(content)
    command = ["gguf", str(source), str(tmp_path / "out"), "--types", "Q8_0", "--dry-run"]
    assert main(command) == 0
    assert "not copied: 4 scales of the KV cache" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ENDS)
def test_they_are_kept_by_copies(
    layout: str, scaled: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert convert(scaled[layout], out, "text") == 0
    kept = scales_of(load_all(out))
    expected = names(layout, FULL.replace("language_model.", ""), MTP)
    assert sorted(kept) == sorted(expected)
    assert [kept[name].tolist() for name in expected[:2]] == [
        torch.full(SHAPES[layout], value).tolist() for value in VALUES
    ]
    assert read_config(out)["quantization_config"]["kv_cache_scheme"] == SCHEMES[layout]
    assert check(out, scaled[layout]).findings == ()
    capsys.readouterr()
    assert main(["reproduce", str(out), "--source", str(scaled[layout])]) == 0


def test_the_other_layout_gets_them_under_its_names(
    scaled: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    source = scaled["compressed-tensors"]
    assert convert(source, out, "nvfp4", "--layout", "modelopt", "--drop-mtp") == 0
    kept = scales_of(load_all(out))
    assert {name: t.item() for name, t in kept.items()} == dict(
        zip(names("modelopt", FULL), VALUES, strict=True)
    )
    assert {(t.dtype, t.shape) for t in kept.values()} == {(torch.float32, torch.Size([]))}
    assert read_config(out)["quantization_config"]["kv_cache_scheme"] == NVIDIA
    beside = json.loads((out / "hf_quant_config.json").read_text())
    assert beside["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert check(out, source).findings == ()


# --- faults


def put(name: str, value: Any, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.tensor(value, dtype=dtype)})


def take(*gone: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in gone]


K, V = names("modelopt", FULL)
FAULTS: dict[str, tuple[Callable[[Tensors], object], str, str]] = {
    "one of a pair": (take(V), "tensors", FULL),
    "MTP, one of a pair": (put(f"{MTP}.k_proj.k_scale", 0.5), "tensors", MTP),
    "of linear attention": (put(f"{LINEAR}.k_scale", 0.5), "tensors", f"{LINEAR}.k_scale"),
    "of no module": (put("k_scale.v_scale", 0.5), "tensors", "k_scale.v_scale"),
    "of the other projection": (
        put(f"{FULL}.v_proj.k_scale", 0.5),
        "tensors",
        f"{FULL}.v_proj.k_scale",
    ),
    "under both names": (put(f"{FULL}.k_scale", 0.5), "tensors", f"{FULL}.k_scale"),
    "one for each head": (put(K, [0.5, 0.5]), "tensors", K),
    "no number": (put(K, []), "tensors", K),
    "an integer": (put(K, 1, torch.int32), "tensors", K),
    "NaN": (put(K, math.nan), "kv-cache", K),
    "infinity": (put(V, math.inf), "kv-cache", V),
    "zero": (put(V, 0.0), "kv-cache", V),
    "below zero": (put(K, -1.0), "kv-cache", K),
    "without a finite inverse": (put(K, 1e-45), "kv-cache", K),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_nothing_is_made_of_it(
    name: str, packed: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    change, kind, subject = FAULTS[name]
    broken = with_scales(packed["modelopt"], tmp_path / "broken", "modelopt", change=change)
    assert (kind, subject) in found(check(broken, depth="numbers"))
    assert convert(broken, tmp_path / "out", "text") == 2
    assert subject in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_layer_without_is_named(packed: dict[str, Path], tmp_path: Path) -> None:
    """Of MTP alone there may be none; of the text model, all or none."""
    only = with_scales(packed["modelopt"], tmp_path / "mtp", "modelopt", modules=(MTP,))
    assert found(check(only)) == set()
    assert any("there are none but of MTP layers" in note for note in check(only).notes)
    change = take(K, V)
    none = with_scales(packed["modelopt"], tmp_path / "none", "modelopt", change=change)
    assert found(check(none)) == set()  # engines take 1; see below


def test_a_scheme_without_scales(packed: dict[str, Path], tmp_path: Path) -> None:
    """Model-Optimizer stores no scales of 1: a note, but in an output of ours a fault."""
    folder = Path(shutil.copytree(packed["modelopt"], tmp_path / "ours"))
    theirs = edited(
        folder,
        tmp_path / "theirs",
        config=lambda c: c["quantization_config"].update(kv_cache_scheme=NVIDIA),
    )
    verdict = check(agree(theirs))
    assert verdict.findings == ()
    assert any("but there are none: engines take 1" in note for note in verdict.notes)
    shutil.copy(theirs / "config.json", folder / "config.json")
    assert ("kv-cache", "config.json") in found(check(folder))


@pytest.mark.parametrize(
    ("scheme", "count"),
    [(None, 1), ("FP8", 1), ([8], 1), ({}, 5), ({**LLM_COMPRESSOR, "num_bits": "8"}, 1)],
)
def test_scales_without_their_scheme(
    scheme: Any, count: int, packed: dict[str, Path], tmp_path: Path
) -> None:
    layout = "compressed-tensors"
    folder = with_scales(packed[layout], tmp_path / "out", layout)
    (folder / "qwen35.json").touch()
    edit_config(folder, lambda c: c["quantization_config"].update(kv_cache_scheme=scheme))
    verdict = check(folder)
    assert found(verdict) == {("kv-cache", "config.json")}
    assert len(verdict.findings) == count


def test_nothing_but_the_cache_may_be_quantized(dense: Path, tmp_path: Path) -> None:
    layout = "compressed-tensors"
    source = tmp_path / "source"
    assert convert(dense, source, "bf16") == 0  # into one file

    def tell(config: dict[str, Any]) -> None:
        groups: dict[str, Any] = {"config_groups": {}, "ignore": []}
        scheme = {"kv_cache_scheme": LLM_COMPRESSOR}
        config["quantization_config"] = {"quant_method": layout, **groups, **scheme}

    def add(tensors: Tensors) -> None:
        for name, value in zip(names(layout, FULL), VALUES, strict=True):
            tensors[name] = torch.tensor([value])

    only = edited(source, tmp_path / "only", add, tell)
    assert check(only, dense).findings == ()
    assert convert(only, tmp_path / "out", "bf16") == 0
    assert scales_of(load_all(tmp_path / "out")) == {}


def test_scales_of_another_calibration(scaled: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(scaled["modelopt"], tmp_path / "other"))
    (other / "qwen35.json").touch()
    changed = edited(other, tmp_path / "changed", put(V, 0.5))
    assert found(check(changed, scaled["modelopt"])) == {("kv-cache", V)}


# --- written


def expected(layout: str, *modules: str) -> dict[str, tuple[float, torch.Size]]:
    largest = {FULL: (7.03125, 31.1), MTP: (9.4375, 64.5)}
    values = [np.float32(one) / np.float32(448) for module in modules for one in largest[module]]
    shape = torch.Size(SHAPES[layout])
    return {n: (v.item(), shape) for n, v in zip(names(layout, *modules), values, strict=True)}


@pytest.mark.parametrize("layout", ENDS)
@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-mixed"])
def test_scales_are_those_of_the_statistics(
    recipe: str, layout: str, dense: Path, stats: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, given = tmp_path / "out", ("--activation-stats", str(stats))
    assert convert(dense, out, recipe, "--layout", layout, "--kv-cache", "fp8", *given) == 0
    written = scales_of(load_all(out))
    assert {n: (t.item(), t.shape) for n, t in written.items()} == expected(layout, FULL, MTP)
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert read_config(out)["quantization_config"]["kv_cache_scheme"] == SCHEMES[layout]
    assert check(out, dense).findings == ()
    manifest = json.loads((out / "qwen35.json").read_text())
    assert "4 scales of an FP8 KV cache, for 2 layers" in manifest["notes"]
    card = documents(out, "owner/name", base_model="owner/base")["README.md"].decode()
    assert "4 scales of an FP8 KV cache, for 2 layers" in card
    assert main(["reproduce", str(out), "--source", str(dense), *given]) == 0
    assert main(["reproduce", str(out), "--source", str(dense)]) == 2
    assert "give them: --activation-stats" in capsys.readouterr().err


def test_all_else_is_the_same_without_them(
    packed: dict[str, Path], dense: Path, stats: Path, tmp_path: Path
) -> None:
    out, more = tmp_path / "out", ("--kv-cache", "fp8", "--activation-stats", str(stats))
    assert convert(dense, out, "nvfp4", *more, "--workers", "2") == 0
    here, there = load_all(out), load_all(packed["compressed-tensors"])
    assert here.keys() - there.keys() == scales_of(here).keys()
    assert all(torch.equal(here[n].view(torch.uint8), there[n].view(torch.uint8)) for n in there)
    config, without = read_config(out), read_config(packed["compressed-tensors"])
    assert config["quantization_config"].pop("kv_cache_scheme") == LLM_COMPRESSOR
    assert without["quantization_config"].pop("kv_cache_scheme") is None
    assert config == without


def test_the_card_has_the_command(dense: Path, stats: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "out", ("--kv-cache", "fp8", "--activation-stats", str(stats))
    assert convert(dense, out, "fp8-channel", *more) == 0
    manifest = json.loads((out / "qwen35.json").read_text())
    recipe = load_recipe("fp8-channel")
    command = make_command(recipe, manifest, "owner/name@main").replace(" \\\n   ", "")
    options = "--recipe fp8-channel --kv-cache fp8 --activation-stats stats.json"
    assert command == f"qwen35 convert owner/name@main OUT {options}"


def test_they_lie_beside_their_weights(
    dense: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In files of few bytes, and with nothing else that takes statistics."""
    limit = "qwen35.planning.safetensors_files.safetensors_options.MAX_SHARD_BYTES"
    monkeypatch.setattr(limit, 300_000)
    out, more = tmp_path / "out", ("--kv-cache", "fp8", "--activation-stats", str(stats))
    assert convert(dense, out, "fp8-channel", *more) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = index["weight_map"]
    assert len(set(files.values())) > 4
    for module in (FULL, MTP):
        beside = {files[f"{module}.{name}"] for name in ("k_scale", "v_scale", "k_proj.weight")}
        assert len(beside) == 1
    tensors = load_all(out)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert check(out, dense).findings == ()
    again = tmp_path / "again"
    assert convert(out, again, "text", "--keep-shards") == 0
    assert len(scales_of(load_all(again))) == 4
    assert check(again, out).findings == ()


def test_a_slice_at_a_time(dense: Path, stats: Path, tmp_path: Path) -> None:
    more = ("--kv-cache", "fp8", "--activation-stats", str(stats))
    assert convert(dense, tmp_path / "one", "nvfp4", *more) == 0
    for number in (1, 2):
        assert convert(dense, tmp_path / "two", "nvfp4", *more, "--slice", f"{number}/2") == 0
    assert main(["finalize", str(tmp_path / "two")]) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_packed_weights_get_scales_later(
    packed: dict[str, Path], stats: Path, tmp_path: Path
) -> None:
    out, more = tmp_path / "out", ("--kv-cache", "fp8", "--activation-stats", str(stats))
    assert convert(packed["modelopt"], out, "text", *more) == 0
    assert len(scales_of(load_all(out))) == 4
    assert check(out, packed["modelopt"]).findings == ()


def test_statistics_without_mtp(dense: Path, stats: Path, tmp_path: Path) -> None:
    table = json.loads(stats.read_text())
    del table[f"{MTP}.k_proj.weight"], table[f"{MTP}.v_proj.weight"]["cache_max"]
    (tmp_path / "stats.json").write_text(json.dumps(table))
    more = ("--kv-cache", "fp8", "--activation-stats", str(tmp_path / "stats.json"))
    assert convert(dense, tmp_path / "out", "nvfp4", *more) == 0
    written = scales_of(load_all(tmp_path / "out"))
    assert sorted(written) == sorted(names("compressed-tensors", FULL))


REFUSALS: dict[str, tuple[tuple[str, ...], str]] = {
    "bf16": (("bf16",), "no place for scales of a KV cache"),
    "NF4": (("nf4",), "no place for scales of a KV cache"),
    "block FP8": (("fp8",), "no place for scales of a KV cache"),
    "GPTQ": (("int4", "--layout", "gptq"), "no place for scales of a KV cache"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_formats_without_a_place_for_them(
    name: str, dense: Path, stats: Path, tmp_path: Path, capsys: Capture
) -> None:
    recipe, sentence = REFUSALS[name]
    more = ("--kv-cache", "fp8", "--activation-stats", str(stats))
    assert convert(dense, tmp_path / "out", *recipe, *more) == 2
    assert sentence in capsys.readouterr().err


CACHES: dict[str, tuple[Any, str]] = {
    "missing": (None, f"no keys and values of {FULL}.k_proj"),
    "zero": (0, f"no keys and values of {FULL}.k_proj"),
    "almost zero": (1e-45, f"no keys and values of {FULL}.k_proj"),
    "text": ("7", "holds a value that is not a number"),
    "a list": ([7.0], "holds a value that is not a number"),
    "a flag": (True, "holds a value that is not a number"),
    "below zero": (-7.0, "holds a negative or infinite number, or NaN"),
    "too large": (1e39, "holds a negative or infinite number, or NaN"),
}


@pytest.mark.parametrize("name", CACHES)
def test_statistics_of_no_use(
    name: str, dense: Path, stats: Path, tmp_path: Path, capsys: Capture
) -> None:
    value, sentence = CACHES[name]
    table = json.loads(stats.read_text())
    table[f"{FULL}.k_proj.weight"]["cache_max"] = value
    if value is None:
        del table[f"{FULL}.k_proj.weight"]["cache_max"]
    (tmp_path / "stats.json").write_text(json.dumps(table))
    more = ("--kv-cache", "fp8", "--activation-stats", str(tmp_path / "stats.json"))
    assert convert(dense, tmp_path / "out", "nvfp4", *more) == 2
    assert sentence in capsys.readouterr().err


def test_other_refusals(
    dense: Path, scaled: dict[str, Path], stats: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert convert(dense, tmp_path / "out", "nvfp4", "--kv-cache", "fp8") == 2
    assert "give them: --activation-stats FILE" in capsys.readouterr().err
    more = ("--kv-cache", "fp8", "--activation-stats", str(stats))
    assert convert(scaled["modelopt"], tmp_path / "out", "text", *more) == 2
    assert "the source has scales of its KV cache, which are kept" in capsys.readouterr().err


@pytest.mark.parametrize("entry", ["fp8", ["fp8"], {"type": []}, {"type": "fp8"}])
def test_manifests_of_any_form(
    entry: Any, dense: Path, packed: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    out = Path(shutil.copytree(packed["modelopt"], tmp_path / "out"))
    manifest = json.loads((out / "qwen35.json").read_text())
    manifest["recipe"]["kv_cache"] = entry
    (out / "qwen35.json").write_text(json.dumps(manifest))
    assert main(["reproduce", str(out), "--source", str(dense)]) == 2
    assert "malformed kv_cache" in capsys.readouterr().err
