"""GGUF models as sources: weights, config and tokenizer come back, and files are made of files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.constants import GGUFValueType
from gguf.quants import dequantize

import qwen35
from adapters import make_adapter
from checkpoints import ASSET
from fake_hub import FakeHub, serving
from gguf_models import make_variant, rewrite_gguf
from hostile_gguf import HOSTILE
from hub_command import command
from hub_store import Repo
from llama import quantize
from qwen35.api.convert_api import convert
from qwen35.api.gguf_api import gguf
from qwen35.api.plan_api import plan
from qwen35.api.verify_api import verify
from qwen35.checkpoint.gguf_header import GgufHeader, read_container
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.codecs.ggml.stored import decode
from qwen35.codecs.ggml.types import GGML_TYPES, GgmlType
from qwen35.errors import InputError, Qwen35Error, TensorError, UsageError
from qwen35.model.model_config import parse_config
from qwen35.model.sizes import PUBLISHED, published_config
from qwen35.planning.activations import PROVENANCE
from qwen35.planning.gguf_files.gguf_identity import maker_of, mix_of, release_of
from qwen35.planning.sources import describe_source, fetch_source
from qwen35.tuning.space import ChoiceSpace
from running import load_all, read_config, tree

pytestmark = pytest.mark.sentences
FLOATS = ("F32", "BF16", "F16")
REPO = "stranger/tiny-GGUF"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint in several types, with its vision tower."""
    out = tmp_path_factory.mktemp("files") / "out"
    types = (*FLOATS, "Q4_K_M", "Q8_0")
    return gguf(ASSET, out, types=types, mmproj="F32", threads=1).out


@pytest.fixture(scope="module", params=FLOATS)
def returned(
    request: pytest.FixtureRequest, files: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The type of an unquantized file, and the checkpoint that it is decoded to."""
    out = tmp_path_factory.mktemp("returned") / ASSET.name
    model = files / f"qwen3.5-tiny-{request.param}.gguf"
    return request.param, convert(model, out, recipe="bf16", threads=1).out


def alone(files: Path, folder: Path, kind: str) -> Path:
    """Put one model into a folder of its own, without the vision tower."""
    folder.mkdir(exist_ok=True)
    return Path(shutil.copy(files / f"qwen3.5-tiny-{kind}.gguf", folder))


def decoded(model: Path, out: Path, recipe: str = "bf16") -> dict[str, torch.Tensor]:
    return load_all(convert(model, out, recipe=recipe, threads=1).out)


def held_in(values: torch.Tensor, name: str, kind: str) -> torch.Tensor:
    """Return a weight as a file of this type can hold it, to the bit."""
    if name.endswith("A_log"):  # several numbers have the same exponential: see below
        return -values.double().exp().float()
    norms = name.endswith("norm.weight") and "linear_attn" not in name and "visual" not in name
    if norms:
        return (values.float() + 1).sub(1).to(values.dtype)
    if kind == "F16" and values.ndim > 1 and not name.endswith(("conv1d.weight", "pos_embed")):
        return values.half().to(values.dtype)
    return values


def test_weights_come_back_with_names_and_shapes(returned: tuple[str, Path]) -> None:
    """But for what the type cannot hold, to the bit; two numbers of A_log share an exponential."""
    kind, folder = returned
    found, original = load_all(folder), load_all(ASSET)
    assert found.keys() == original.keys()
    for name, values in original.items():
        assert found[name].dtype == values.dtype, name
        mine = held_in(found[name], name, "F32")
        same = kind if "visual" not in name else "F32"
        assert torch.equal(mine, held_in(values, name, same)), name
    differing = [n for n, values in original.items() if not torch.equal(found[n], values)]
    if kind == "BF16":
        assert all(name.endswith("A_log") for name in differing)
        assert len(differing) == 2


def test_config_and_tokenizer_come_back(returned: tuple[str, Path]) -> None:
    _, out = returned
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((ASSET / name).read_text())
    assert (out / "chat_template.jinja").read_text() == (ASSET / "chat_template.jinja").read_text()
    pixels = json.loads((out / "preprocessor_config.json").read_text())
    assert pixels["image_mean"] == [0.5, 0.5, 0.5]
    assert verify(out).passed


def test_what_is_decoded_makes_the_same_file(
    returned: tuple[str, Path], files: Path, tmp_path: Path
) -> None:
    """The writer's files are the converter's, by their golden hashes: so it is there too."""
    kind, folder = returned
    model = files / f"qwen3.5-tiny-{kind}.gguf"
    again = gguf(folder, tmp_path / "again", types=kind, threads=1).out / model.name
    assert again.read_bytes() == model.read_bytes()


@pytest.mark.parametrize("name", ["moe", "moe-per-expert", "three-to-one", "equal-heads", "text"])
def test_every_kind_of_model_comes_back(name: str, tmp_path: Path) -> None:
    """Stacks of experts, permuted heads, an untied head; other than in BF16 nothing rounds."""
    source = make_variant(tmp_path, name)
    vision = open_folder(source).config.architecture.vision
    made = gguf(source, tmp_path / "files", types="BF16", mmproj="F32" if vision else False)
    [model] = made.out.glob("Tiny*.gguf")
    found, original = decoded(model, tmp_path / "out"), load_all(source)
    if name == "moe-per-expert":  # of these, releases have only those of MTP so
        assert found.keys() >= {key for key in original if ".experts." not in key}
    else:
        experts = {key for key in original if key.startswith("mtp.") and ".experts." in key}
        assert found.keys() >= original.keys() - experts
    for key in found.keys() & original.keys():
        assert torch.equal(held_in(found[key], key, "F32"), held_in(original[key], key, "F32")), key
    if name == "moe-per-expert":
        stack = found["model.language_model.layers.0.mlp.experts.gate_up_proj"]
        ends = ("gate_proj", "up_proj")
        prefix = "model.language_model.layers.0.mlp.experts.1"
        both = torch.cat([original[f"{prefix}.{end}.weight"] for end in ends])
        assert torch.equal(stack[1], both)
    config = parse_config(read_config(tmp_path / "out"))
    assert config.geometry == open_folder(source).config.geometry


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_the_dtype_is_the_one_that_holds_the_numbers(kind: str, tmp_path: Path) -> None:
    """Releases are BF16 whatever the file's type; this checkpoint is F16."""
    source = make_variant(tmp_path, "f16")
    [model] = gguf(source, tmp_path / "files", types=kind).out.glob("*.gguf")
    opened = describe_source(str(model))
    assert opened.config.dtype == "F16"
    assert "decoded weights are float16" in " ".join(opened.notes)
    found, original = decoded(model, tmp_path / "out"), load_all(source)
    for key, values in found.items():
        before = original[key.replace("model.", "model.language_model.", 1)]
        assert values.dtype == before.dtype
        if values.ndim > 1 or "linear_attn.norm" in key:
            assert torch.equal(values, before), key


def test_experts_are_packed_one_by_one(tmp_path: Path) -> None:
    """FP8 has a matrix for each expert, which a file has in stacks."""
    source = make_variant(tmp_path, "moe-8")
    [model] = gguf(source, tmp_path / "files", types="BF16").out.glob("*.gguf")
    ours = convert(model, tmp_path / "ours", recipe="fp8", threads=1, skip_verify=True).out
    text = convert(source, tmp_path / "text", recipe="text", threads=1).out
    theirs = convert(text, tmp_path / "theirs", recipe="fp8", threads=1, skip_verify=True).out
    one, other = load_all(ours), load_all(theirs)
    name = "model.layers.0.mlp.experts.1.gate_proj.weight"
    for key in (name, f"{name}_scale_inv"):
        assert torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8))


def library(path: Path) -> dict[str, Any]:
    """The tensors of a file as llama.cpp's library reads them."""
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def test_values_are_those_of_the_library_rounded_once(files: Path, tmp_path: Path) -> None:
    model = alone(files, tmp_path / "one", "Q4_K_M")
    found, theirs = decoded(model, tmp_path / "out"), library(model)
    for name, mine in (
        ("blk.3.attn_q.weight", "layers.3.self_attn.q_proj"),
        ("blk.3.ffn_down.weight", "layers.3.mlp.down_proj"),
        ("token_embd.weight", "embed_tokens"),
    ):
        tensor = theirs[name]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).bfloat16()
        assert torch.equal(found[f"model.{mine}.weight"], expected)


ORACLE = [kind for kind in GGML_TYPES.values() if kind.name not in ("q1_0", "q2_0", "q8_1", "q8_K")]


@pytest.mark.parametrize("kind", [k for k in ORACLE if k.code < 24 or k.code > 28])
def test_every_type_decodes_as_in_the_library(kind: GgmlType) -> None:
    data = np.random.default_rng(kind.code).integers(0, 60, 40 * kind.nbytes, np.uint8)
    expected = dequantize(data, GGMLQuantizationType(kind.code))
    mine = decode(data, kind)
    assert mine.tobytes() == np.asarray(expected, np.float32).tobytes()


def test_numbers_and_the_type_of_sums_decode() -> None:
    for name, dtype in (
        ("i8", "i1"),
        ("i16", "<i2"),
        ("i32", "<i4"),
        ("i64", "<i8"),
        ("f64", "<f8"),
    ):
        values = np.array([-3, 0, 7], dtype)
        assert decode(values.view(np.uint8), GGML_TYPES[name]).tolist() == [-3, 0, 7]
    block = np.float32(0.5).tobytes() + bytes(range(128)) + bytes(128) + bytes(32)
    found = decode(np.frombuffer(block, np.uint8), GGML_TYPES["q8_K"])
    assert found.tolist() == [0.5 * i for i in range(128)] + [0] * 128


def test_types_of_memory_alone_are_refused(files: Path, tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        info = writer.tensors[0]["output_norm.weight"]
        info.tensor, info.dtype = np.zeros(8 * 40, np.uint8), GGMLQuantizationType.Q8_1
        info.shape, info.nbytes = (256,), 8 * 40

    model = tmp_path / "x.gguf"
    rewrite_gguf(files / "qwen3.5-tiny-Q8_0.gguf", model, "qwen35", change)
    with pytest.raises(TensorError, match="stored as q8_1, which only llama.cpp's memory holds"):
        convert(model, tmp_path / "out", recipe="bf16", threads=1)
    assert not (tmp_path / "out").exists()


# --- files of files


def test_a_float_file_gives_the_files_of_the_checkpoint(files: Path, tmp_path: Path) -> None:
    types = ("BF16", "Q4_K_M")
    out = gguf(files / "qwen3.5-tiny-F32.gguf", tmp_path / "out", types=types, threads=1).out
    for kind in types:
        name = f"qwen3.5-tiny-{kind}.gguf"
        assert (out / name).read_bytes() == (files / name).read_bytes(), kind


def test_requantized_as_llama_quantize_would_and_said(files: Path, tmp_path: Path) -> None:
    """What has its type already is copied; the rest is quantized from what it decodes to."""
    model = alone(files, tmp_path / "one", "Q8_0")
    result = gguf(model, tmp_path / "out", types="Q8_0,Q4_K_M", threads=1)
    assert (result.out / model.name).read_bytes() == model.read_bytes()
    assert (
        "71 weights are q8_0 in the source and are quantized again: errors are measured against "
        "what q8_0 decodes to, not against the original weights"
    ) in result.plan.notes
    theirs = quantize(model, tmp_path / "theirs.gguf", "Q4_K_M", again=True)
    assert (result.out / "qwen3.5-tiny-Q4_K_M.gguf").read_bytes() == theirs.read_bytes()
    assert verify(result.out, source=model).passed


def test_stripping_mtp_changes_no_other_byte(files: Path, tmp_path: Path) -> None:
    model = files / "qwen3.5-tiny-Q4_K_M.gguf"
    out = gguf(model, tmp_path / "out", types="Q4_K_M", mtp="drop", threads=1).out
    before, after = library(model), library(out / model.name)
    assert {name for name in before if name not in after} == {n for n in before if "blk.8." in n}
    for name, tensor in after.items():
        kept = tensor.data.tobytes() == before[name].data.tobytes()
        assert kept or tensor.tensor_type != before[name].tensor_type
    assert verify(out).passed
    assert describe_source(str(out)).config.mtp_layers == 0


def test_an_adapter_merges_into_a_file(files: Path, tmp_path: Path) -> None:
    adapter = make_adapter("all", tmp_path / "lora")
    model = alone(files, tmp_path / "one", "BF16")
    ours = gguf(model, tmp_path / "ours", types="BF16", adapter=[adapter], threads=1).out
    theirs = gguf(ASSET, tmp_path / "theirs", types="BF16", adapter=[adapter], threads=1).out
    assert (ours / model.name).read_bytes() == (theirs / model.name).read_bytes()


def test_split_files_are_one_source(files: Path, tmp_path: Path) -> None:
    out = gguf(ASSET, tmp_path / "split", types="Q8_0", split_max_size=3_000_000, threads=1).out
    second = sorted(out.glob("*.gguf"))[1]
    found = decoded(second, tmp_path / "out")
    whole = decoded(alone(files, tmp_path / "one", "Q8_0"), tmp_path / "whole")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], values) for name, values in whole.items())
    for name, source in (("of-split", second), ("of-one", files / "qwen3.5-tiny-Q8_0.gguf")):
        gguf(source, tmp_path / name, types="F16", threads=1)
    one, two = (next((tmp_path / name).glob("*.gguf")) for name in ("of-split", "of-one"))
    assert one.read_bytes() == two.read_bytes()  # tensors in the same order


def test_workers_slices_and_reproduce_read_the_file_too(files: Path, tmp_path: Path) -> None:
    model = files / "qwen3.5-tiny-Q8_0.gguf"
    one = convert(model, tmp_path / "one", recipe="nf4", threads=1).out
    for number in (1, 2):
        convert(model, tmp_path / "two", recipe="nf4", threads=1, slice=(number, 2))
    assert main(["finalize", str(tmp_path / "two")]) == 0
    assert tree(one) == tree(tmp_path / "two")
    assert json.loads((one / "qwen35.json").read_text())["source"] == {
        "folder": files.name,
        "file": model.name,
        "quantized": {"q8_0": 71},
    }
    assert main(["reproduce", str(one), "--source", str(model)]) == 0


def test_a_file_on_the_hub_and_the_tower_beside_it(files: Path, tmp_path: Path) -> None:
    """What is needed is downloaded; the manifest says from where, and `reproduce` takes that."""
    model, out = "qwen3.5-tiny-Q8_0.gguf", tmp_path / "out"
    [tower] = (path.name for path in files.glob("mmproj-*.gguf"))
    held, home = tmp_path / "held", tmp_path / "home"
    held.mkdir()
    home.mkdir()
    for name in (model, tower, "qwen3.5-tiny-Q4_K_M.gguf"):
        shutil.copy(files / name, held)
    with serving(FakeHub({REPO: Repo.of(held)})) as hub:
        args = (f"hf:{REPO}/{model}", str(out), "--recipe", "bf16")
        done = command("convert", *args, home=home, url=hub.url)
        assert done.code == 0, done.err
        again = command("reproduce", str(out), home=home, url=hub.url)
    assert again.code == 0, again.err
    source = json.loads((out / "qwen35.json").read_text())["source"]
    assert (source["repo"], source["file"]) == (REPO, model)
    cached = {path.name for path in home.rglob("*.gguf")}
    assert cached == {model, tower}
    local = decoded(held / model, tmp_path / "local")
    assert all(torch.equal(local[name], values) for name, values in load_all(out).items())


def test_verbs_that_measure_take_what_is_not_quantized(files: Path, tmp_path: Path) -> None:
    """Calibrating, tuning and a run find what they find of the checkpoint."""
    text = tmp_path / "text.txt"
    text.write_text((ASSET / "eval.txt").read_text()[:2000])
    model, quantized = (files / f"qwen3.5-tiny-{kind}.gguf" for kind in ("BF16", "Q8_0"))
    options: dict[str, Any] = {"text": text, "context": 64, "windows": 1, "threads": 1}
    for name, source in {"a": model, "b": ASSET}.items():
        qwen35.calibrate(source, output=tmp_path / name, device="cpu", **options)
    one, two = (json.loads((tmp_path / x / "activation-stats.json").read_bytes()) for x in "ab")
    assert {**one, PROVENANCE: None} == {**two, PROVENANCE: None}
    with pytest.raises(InputError, match="quantized, expected the original checkpoint"):
        qwen35.calibrate(quantized, output=tmp_path / "c", **options)
    checkpoint = fetch_source(str(model))
    exact = Path(ChoiceSpace(checkpoint, "nf4", ("nf4", "plain")).reference(tmp_path))
    stored, wanted = load_all(exact), decoded(model, tmp_path / "decoded")
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], values) for name, values in wanted.items())
    run = tmp_path / "run.toml"
    lines = [f"model = {json.dumps(str(model))}", 'out = "made"', 'depth = "numbers"']
    lines += ["[[gguf]]", 'types = ["Q8_0"]']
    run.write_text("\n".join(lines))
    result = qwen35.run(run, threads=1)
    assert result.passed, result.to_json()
    [made] = (tmp_path / "made").glob("*/*-Q8_0.gguf")
    assert made.read_bytes() == quantized.read_bytes()
    assert {step.state for step in qwen35.run(run, threads=1).outcomes} <= {"kept", "skipped"}
    lines += ["[evaluate]", 'text = "text.txt"']
    run.write_text("\n".join(lines))
    with pytest.raises(UsageError, match="a GGUF file, which not every engine can run as the refe"):
        qwen35.run(run)
    run.write_text(run.read_text().replace("-BF16.gguf", "-Q8_0.gguf"))
    with pytest.raises(UsageError, match="quantized, so there is no exact reference to measure"):
        qwen35.run(run)


def test_outputs_beside_the_file_but_not_over_it(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = alone(files, tmp_path / "one", "Q8_0")
    beside = tmp_path / "one" / "out"
    assert main(["convert", str(model), str(beside), "--recipe", "bf16"]) == 0
    shutil.rmtree(beside)
    shutil.copy(files / "qwen35.json", tmp_path / "one")
    capsys.readouterr()
    over = ["gguf", str(model), str(tmp_path / "one"), "--types", "Q8_0", "--overwrite"]
    assert main(over) == 2
    assert "overlaps the input" in capsys.readouterr().err
    assert model.is_file()


# --- what a file is


def test_the_vision_tower_is_the_one_that_fits(files: Path, tmp_path: Path) -> None:
    """Of several the most exact one; none of another width."""
    model = alone(files, tmp_path / "one", "Q8_0")
    made = gguf(ASSET, tmp_path / "half", types="Q8_0", mmproj="F16", threads=1).out
    for name, source in (("mmproj-a.gguf", files), ("mmproj-b.gguf", made)):
        [tower] = source.glob("mmproj-*.gguf")
        shutil.copy(tower, model.parent / name)
    opened = describe_source(str(model))
    assert opened.config.vision_depth == 2
    assert "other vision towers beside it are not read: mmproj-b.gguf" in tuple(opened.notes)

    def narrow(writer: GGUFWriter) -> None:
        writer.kv_data[0]["clip.vision.projection_dim"].value = 512

    (model.parent / "mmproj-b.gguf").unlink()
    rewrite_gguf(model.parent / "mmproj-a.gguf", model.parent / "mmproj-c.gguf", "clip", narrow)
    (model.parent / "mmproj-a.gguf").unlink()
    assert describe_source(str(model)).config.vision_depth == 0
    assert plan(model, recipe="bf16").checkpoint.layout.prefix == "model."


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.endswith("-Base")])
def test_sizes_tell_the_release(name: str) -> None:
    config = published_config(name)
    container = header_of(config)
    found = release_of(container)
    assert name in found
    called = replace(container, keys={**container.keys, "general.name": name.replace("-", " ")})
    assert release_of(called).startswith(name)
    other = [*container.keys["tokenizer.ggml.tokens"], "more"]
    wider = replace(container, keys={**container.keys, "tokenizer.ggml.tokens": other})
    assert release_of(wider).endswith(f", with a vocabulary of {len(other)}")


def header_of(config: dict[str, Any]) -> GgufHeader:
    """A header with the keys of a release and the names of its tensors."""
    text = config.get("text_config", config)
    moe = "num_experts" in text
    name = "qwen35moe" if moe else "qwen35"
    layers, mtp = text["num_hidden_layers"], text["mtp_num_hidden_layers"]
    keys: dict[str, Any] = {
        "attention.head_count": text["num_attention_heads"],
        "attention.head_count_kv": text["num_key_value_heads"],
        "attention.key_length": text["head_dim"],
        "attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
        "attention.value_length": text["head_dim"],
        "block_count": layers + mtp,
        "context_length": 262144,
        "embedding_length": text["hidden_size"],
        "full_attention_interval": 4,
        "nextn_predict_layers": mtp,
        "rope.dimension_count": 64,
        "rope.dimension_sections": [11, 11, 10, 0],
        "rope.freq_base": 10000000.0,
        "ssm.conv_kernel": 4,
        "ssm.group_count": text["linear_num_key_heads"],
        "ssm.inner_size": 128 * text["linear_num_value_heads"],
        "ssm.state_size": 128,
        "ssm.time_step_rank": text["linear_num_value_heads"],
    }
    if moe:
        keys["expert_count"], keys["expert_used_count"] = text["num_experts"], 8
        keys["expert_feed_forward_length"] = text["moe_intermediate_size"]
        keys["expert_shared_feed_forward_length"] = text["shared_expert_intermediate_size"]
    else:
        keys["feed_forward_length"] = text["intermediate_size"]
    general = {f"general.{end}": "x" for end in ("type", "name", "file_type")}
    tokenizer: dict[str, Any] = {f"tokenizer.ggml.{end}": [] for end in ("merges", "token_type")}
    tokenizer |= dict.fromkeys(("tokenizer.ggml.model", "tokenizer.ggml.pre"), "qwen35")
    tokenizer |= {"tokenizer.ggml.tokens": [""] * text["vocab_size"]}
    tokenizer["tokenizer.ggml.eos_token_id"] = 0
    own = {f"{name}.{key}": value for key, value in keys.items()}
    said = {"general.architecture": name, **general, **own, **tokenizer}
    return GgufHeader(Path("x.gguf"), 0, said, {})


def test_inspect_says_what_a_stranger_made(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "x.gguf"
    rewrite_gguf(files / "qwen3.5-tiny-Q4_K_M.gguf", model, "qwen35", lambda writer: None)
    plain = read_container(model)
    assert mix_of(plain) == "as llama-quantize mixes it"
    held = dict(plain.tensors)
    name = "blk.0.ffn_gate.weight"
    held[name] = replace(held[name], kind=GGML_TYPES["q6_K"])
    assert mix_of(replace(plain, tensors=held)) == (
        f"of its own: 1 of {len(held)} tensors have other types than llama-quantize gives them "
        f"({name} is q6_K)"
    )
    said = {
        "general.quantized_by": "A Stranger",
        "general.base_model.0.name": "Qwen3.5 0.8B",
        "general.base_model.0.organization": "Qwen",
        "quantize.imatrix.dataset": "calibration.txt",
        "general.author": 7,
    }
    assert maker_of(replace(plain, keys={**plain.keys, **said})) == (
        "by A Stranger, of Qwen/Qwen3.5 0.8B, with an importance matrix (calibration.txt)"
    )
    assert main(["inspect", str(files / "qwen3.5-tiny-Q4_K_M.gguf")]) == 0
    shown = capsys.readouterr().out
    assert "release       none of this size" in shown
    assert "MTP           1 layer(s)" in shown
    assert "vision tower  mmproj-qwen3.5-tiny-F32.gguf" in shown


# --- hostile and strange files


Change = Callable[[GGUFWriter], object]


def keyed(key: str, value: object) -> Change:
    def change(writer: GGUFWriter) -> None:
        entry = writer.kv_data[0][key]
        if value is None:
            del writer.kv_data[0][key]
        else:
            entry.value = value
            if isinstance(value, str):
                entry.type = GGUFValueType.STRING

    return change


def without(name: str) -> Change:
    return lambda writer: writer.tensors[0].pop(name)


def renamed(name: str, other: str) -> Change:
    def change(writer: GGUFWriter) -> None:
        writer.tensors[0][other] = writer.tensors[0].pop(name)

    return change


def reshaped(writer: GGUFWriter) -> None:
    info = writer.tensors[0]["blk.3.attn_q.weight"]
    info.shape = info.shape[::-1]


STRANGE: dict[str, tuple[Change, str]] = {
    "no layers": (keyed("qwen35.block_count", None), "no key for block_count"),
    "a name for a number": (keyed("qwen35.block_count", "nine"), "keys that make no sense"),
    "more layers": (keyed("qwen35.block_count", 12), "9 recurrent_layers, block_count 12"),
    "no heads": (keyed("qwen35.attention.head_count", 0), "num_attention_heads is 0"),
    "no rank": (keyed("qwen35.ssm.time_step_rank", 0), "keys that make no sense"),
    "another pre-tokenizer": (
        keyed("tokenizer.ggml.pre", "llama-bpe"),
        "pre-tokenizer 'llama-bpe'",
    ),
    "an end beyond": (keyed("tokenizer.ggml.eos_token_id", 9999), "eos_token_id is 9999"),
    "no merges": (keyed("tokenizer.ggml.merges", None), "tokenizer.ggml.merges is missing"),
    "a theta of infinity": (keyed("qwen35.rope.freq_base", float("inf")), "rope.freq_base is inf"),
    "a missing tensor": (without("blk.3.attn_q.weight"), "blk.3.attn_q.weight: missing"),
    "an unknown tensor": (renamed("blk.3.attn_q.weight", "blk.3.x"), "blk.3.x: not a tensor"),
    "another shape": (reshaped, "blk.3.attn_q.weight: shape [256, 512]"),
    "another architecture": (keyed("general.architecture", "llama"), "architecture 'llama'"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_strange_files_are_refused_in_a_sentence(
    case: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, sentence = STRANGE[case]
    model = tmp_path / "x.gguf"
    rewrite_gguf(files / "qwen3.5-tiny-Q8_0.gguf", model, "qwen35", change)
    assert main(["convert", str(model), str(tmp_path / "out"), "--recipe", "bf16"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "x.gguf"
    model.write_bytes(HOSTILE[case])
    assert main(["gguf", str(model), str(tmp_path / "out"), "--types", "Q8_0"]) == 2
    assert "error: " in capsys.readouterr().err


def test_what_is_no_model_is_refused(files: Path, tmp_path: Path) -> None:
    [tower] = files.glob("mmproj-*.gguf")
    with pytest.raises(InputError, match="architecture 'clip', expected qwen35"):
        describe_source(str(tower))
    with pytest.raises(InputError, match="5 GGUF models in it"):
        describe_source(str(files))
    made = gguf(ASSET, tmp_path / "mtp", types="Q8_0", mtp="separate", threads=1).out
    [draft] = made.glob("mtp-*.gguf")
    with pytest.raises(InputError, match="the multi-token-prediction layer alone"):
        describe_source(str(draft))
    assert describe_source(str(made)).config.mtp_layers == 0


def test_damaged_decays_are_told_by_name(files: Path, tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        tensor = writer.tensors[0]["blk.0.ssm_a"].tensor
        assert tensor is not None
        tensor[:] = 1

    model = tmp_path / "x.gguf"
    rewrite_gguf(files / "qwen3.5-tiny-Q8_0.gguf", model, "qwen35", change)
    with pytest.raises(Qwen35Error, match="A_log: holds NaN or infinity"):
        convert(model, tmp_path / "out", recipe="bf16", threads=1)


def test_damaged_scales_are_not_copied(files: Path, tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        tensor = writer.tensors[0]["blk.0.ffn_gate.weight"].tensor
        assert tensor is not None
        tensor[0, :2] = 0xFF  # the first scale

    model = tmp_path / "x.gguf"
    rewrite_gguf(files / "qwen3.5-tiny-Q8_0.gguf", model, "qwen35", change)
    with pytest.raises(TensorError, match="a scale or weight is not finite"):
        gguf(model, tmp_path / "out", types="Q8_0", threads=1)


def test_layers_by_interval_alone(files: Path, tmp_path: Path) -> None:
    """llama.cpp reads the list of layers if there is one, and goes by the interval if not."""
    model = tmp_path / "x.gguf"
    gone = keyed("qwen35.attention.recurrent_layers", None)
    rewrite_gguf(files / "qwen3.5-tiny-Q8_0.gguf", model, "qwen35", gone)
    opened = describe_source(str(model))
    whole = describe_source(str(files / "qwen3.5-tiny-Q8_0.gguf"))
    assert opened.config.layer_types == whole.config.layer_types
    assert verify(model).passed
