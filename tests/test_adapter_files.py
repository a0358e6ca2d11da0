"""Adapters as GGUF files of their own: the converter's bytes, and what llama.cpp makes of them."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qwen35
from checkpoints import ASSET
from fake_hub import FakeHub, serving
from gguf_models import make_variant
from golden_gguf import model_folder
from golden_lora import CASES, GOLDEN, adapter_of, converted, digest
from hub_command import command as command_in
from hub_store import COMMIT, Repo
from lora_models import BASE_ID, linear, write_adapter
from qwen35.array_types import F32
from qwen35.checkpoint.gguf_header import read_container
from qwen35.cli.main import main
from qwen35.engines.llama import llama_cpp
from qwen35.errors import InputError, UsageError
from qwen35.evaluation.models import open_candidates
from qwen35.planning.gguf_files.gguf_container import GgufContainer
from qwen35.planning.gguf_files.gguf_summary import GgufSummary
from qwen35.publishing.repo_documents import documents
from qwen35.verification.gguf_subject import container_findings

pytestmark = pytest.mark.sentences

RECORDED = json.loads(GOLDEN.read_text())


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden-lora")


def alone(base: Path, adapter: str | Path, out: Path, types: str | None = None) -> Path:
    """Write an adapter's own file and return it."""
    qwen35.gguf(base, out, adapter=[adapter], adapter_only=True, types=types, threads=1)
    (file,) = out.glob("*.gguf")
    return file


@pytest.mark.parametrize(("model", "kind"), CASES, ids=" ".join)
def test_equal_to_the_converter(model: str, kind: str, work: Path, tmp_path: Path) -> None:
    base, adapter = model_folder(model, work), adapter_of(model, work)
    file = alone(base, adapter, tmp_path / "out", kind)
    assert file.name == f"{base.name}-{adapter.name}-{kind}-LoRA.gguf"
    assert digest(file) == RECORDED[f"{model} {kind}"]


@pytest.mark.heavy
def test_the_golden_hashes_are_the_converters(tmp_path: Path) -> None:
    llama = os.environ.get("QWEN35_LLAMA_CPP")
    if llama is None:
        pytest.skip("needs the source of llama.cpp: make test-all")
    for model, kind, path in converted(Path(llama), tmp_path):
        assert digest(path) == RECORDED[f"{model} {kind}"], (model, kind)


def logits(model: Path, ids: list[int], adapters: dict[Path, float]) -> F32:
    """Return llama.cpp's logits [len(ids), vocabulary] with adapters and their scales."""
    llama = llama_cpp()
    params = llama.llama_model_default_params()
    params.use_extra_bufts, params.n_gpu_layers = False, 0
    loaded = llama.llama_model_load_from_file(str(model).encode(), params)
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = len(ids)
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = 0  # F32
    context = llama.llama_init_from_model(loaded, options)
    added = [llama.llama_adapter_lora_init(loaded, str(path).encode()) for path in adapters]
    assert all(added)
    array = (llama.llama_adapter_lora_p_ctypes * len(added))(*added)
    scales = (ctypes.c_float * len(added))(*adapters.values())
    assert llama.llama_set_adapters_lora(context, array, len(added), scales) == 0
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    assert llama.llama_decode(context, batch) == 0
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(loaded))
    pointer = llama.llama_get_logits(context)
    found = np.ctypeslib.as_array(pointer, (len(ids), vocabulary)).copy()
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(loaded)
    return found


def divergence(one: F32, other: F32) -> float:
    """Return the mean KL divergence of rows of logits."""
    logs = [row - np.logaddexp.reduce(row, -1, keepdims=True) for row in (one, other)]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


PATTERNS = {
    "rank_pattern": {"up_proj": 5, "in_proj_z": 2},
    "alpha_pattern": {"out_proj": 24, r"layers\.0\..*in_proj_qkv": 1.5},
}


def ranks(module: str) -> int:
    return 5 if module.endswith("up_proj") else 2 if module.endswith("in_proj_z") else 3


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank": ranks, **PATTERNS},
}


@pytest.mark.parametrize(
    ("model", "how"),
    [
        *(("dense", how) for how in HOW),
        *((model, "plain") for model in ("equal-heads", "three-to-one", "moe")),
    ],
)
def test_llama_adds_what_a_merge_adds(model: str, how: str, tmp_path: Path) -> None:
    base = make_variant(tmp_path, model)
    heads = ("linear", "head") if model == "moe" else ("linear",)
    adapter = write_adapter(
        base,
        tmp_path / "adapter",
        chosen=lambda item: item.role.scope == "text" and item.role.info.kind in heads,
        spread=2.0**-7,
        **HOW[how],
    )
    weight = 1 if how == "plain" else 0.75
    plain = qwen35.gguf(base, tmp_path / "plain", types="F32", threads=1).out
    merged = qwen35.gguf(
        base, tmp_path / "merged", types="F32", threads=1, adapter=[f"{adapter}={weight}"]
    ).out
    file = alone(base, f"{adapter}={weight}", tmp_path / "alone")
    ids = np.random.default_rng(0).integers(0, 250, 48).tolist()
    (of_base,), (of_merge,) = plain.glob("*.gguf"), merged.glob("*.gguf")
    wanted = logits(of_merge, ids, {})
    effect = divergence(wanted, logits(of_base, ids, {}))
    noise = effect / (100 if model == "moe" else 1000)  # value heads in another order: effect / 100
    assert divergence(wanted, logits(of_base, ids, {file: 1.0})) < noise
    assert divergence(wanted, logits(of_base, ids, {file: 0.5})) > effect / 20


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An rsLoRA adapter of the embedded checkpoint's queries and outputs."""
    return write_adapter(ASSET, tmp_path_factory.mktemp("rs") / "rs", chosen=_few, use_rslora=True)


def _few(item: Any) -> bool:
    return linear(item) and item.role.name.endswith(("q_proj", "out_proj"))


@pytest.fixture(scope="module")
def made(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file, at half its weight."""
    return alone(ASSET, f"{adapter}=0.5", tmp_path_factory.mktemp("made") / "out", "F16")


def test_what_one_alpha_does_not_say_goes_into_b(adapter: Path, made: Path) -> None:
    header = read_container(made)
    assert header.keys["adapter.lora.alpha"] == 6.0
    entry = header.tensors["blk.3.attn_q.weight.lora_b"]
    stored = np.frombuffer(made.read_bytes(), "<f2", entry.nbytes // 2, entry.begin)
    trained = load_file(adapter / "adapter_model.safetensors")
    before = trained["base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight"]
    factor = 0.5 * (6 / 3**0.5) / (6 / 3)
    np.testing.assert_array_equal(stored, (before * np.float32(factor)).astype("<f2").ravel())


def test_verified_and_reproduced(adapter: Path, made: Path) -> None:
    assert qwen35.verify(made.parent, adapter=[adapter], source=ASSET, threads=1).passed
    assert not qwen35.reproduce(made.parent, source=ASSET, adapter=[adapter], threads=1).findings
    asked = qwen35.verify(made.parent, depth="behaviour", threads=1)
    assert f"{made.name}: not asked, it holds an adapter alone" in asked.notes
    with pytest.raises(UsageError, match="made with the adapter 'rs'; give its folder"):
        qwen35.verify(made.parent, source=ASSET)


def test_a_file_of_the_converter_that_leaves_rslora_out_is_not_the_adapter(
    adapter: Path, tmp_path: Path
) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    plain = Path(shutil.copytree(adapter, tmp_path / "plain"))
    (plain / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": False}))
    file = shutil.copy(alone(ASSET, plain, tmp_path / "out"), tmp_path / "theirs.gguf")
    verdict = qwen35.verify(file, source=ASSET, adapter=[adapter], threads=1)
    assert {f.subject.rpartition(".")[2] for f in verdict.findings} == {"lora_b"}
    assert qwen35.verify(file, source=ASSET, adapter=[plain], threads=1).passed
    (plain / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 0}))
    (finding,) = qwen35.verify(file, source=ASSET, adapter=[plain], depth="structure").findings
    assert finding.message == "adapter.lora.alpha is 6.0, the source gives 1.0"
    with pytest.raises(UsageError, match="none given, expected one for an adapter's file"):
        qwen35.verify(file, source=ASSET)


def test_inspect_says_what_it_is(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(made)]) == 0
    assert "changes       8 weights by rank 3, alpha 6.0" in capsys.readouterr().out
    (row,) = cast("list[GgufSummary]", qwen35.inspect(made))
    assert row["adapter"] == {"type": "lora", "alpha": 6.0, "ranks": [3], "weights": 8}


def test_an_adapter_is_no_model(made: Path) -> None:
    assert GgufContainer().models(made.parent) == []
    with pytest.raises(InputError, match=r"no language model in it.*; merge the adapter"):
        open_candidates([str(made.parent)])
    texts = documents(made.parent, "owner/Tuned", "owner/Base-1B")
    assert "Modelfile" not in texts
    card = texts["README.md"].decode()
    assert "base_model_relation: adapter" in card
    assert f"llama-server -m MODEL.gguf --lora {made.name}\n" in card
    assert "--adapter rs=0.5 --recipe mix --types F16 --adapter-only" in card
    assert "qwen35 reproduce owner/Tuned --source SOURCE --adapter DIR" in card


def test_the_folder_of_a_base_stays_at_home(adapter: Path, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(adapter, tmp_path / "tuned"))
    card = (tuned / "README.md").read_text()
    (tuned / "README.md").write_text(card.replace(BASE_ID, "/home/me/base"))
    keys = read_container(alone(ASSET, tuned, tmp_path / "out")).keys
    assert keys["general.tags"] == ["lora"]
    assert not any("home" in str(value) or "base_model" in key for key, value in keys.items())


def test_a_base_on_the_hub_stays_there(adapter: Path, made: Path, tmp_path: Path) -> None:
    asked = ("gguf", "owner/Tiny", "out", "--adapter", f"{adapter}=0.5", "--adapter-only")
    with serving(FakeHub({"owner/Tiny": Repo.of(ASSET)})) as hub:
        done = command_in(*asked, "--types", "F16", home=tmp_path, url=hub.url)
        assert done.code == 0, done.err
        (weights,) = (path.name for path in ASSET.glob("*.safetensors"))
        assert hub.sent(weights) < 100_000
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert file.name == "Tiny-rs-F16-LoRA.gguf"
    assert file.read_bytes() == made.read_bytes()
    source = json.loads((file.parent / "qwen35.json").read_text())["source"]
    assert (source["repo"], source["revision"]) == ("owner/Tiny", COMMIT)


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "alpha": (lambda keys: keys.pop("adapter.lora.alpha"), "as if alpha were the rank"),
    "kind": (lambda keys: keys.update({"adapter.type": ["x"]}), "adapter.type ['x'], expected"),
    "no kind": (lambda keys: keys.pop("adapter.type"), "no key adapter.type, expected 'lora'"),
    "family": (
        lambda keys: keys.update({"general.architecture": "llama"}),
        "architecture 'llama', expected qwen35 or qwen35moe",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_keys_that_llama_would_misread(fault: str, made: Path) -> None:
    header = read_container(made)
    keys = dict(header.keys)
    change, message = FAULTS[fault]
    change(keys)
    (finding,) = container_findings(replace(header, keys=keys))
    assert message in finding.message


def test_tensors_that_llama_would_refuse(made: Path) -> None:
    header = read_container(made)
    left, right = (f"blk.3.attn_q.weight.lora_{end}" for end in "ba")

    def messages(**changed: Any) -> list[str]:
        tensors = {name: t for name, t in header.tensors.items() if changed.get(name, t)}
        tensors |= {name: t for name, t in changed.items() if t}
        return [f.message for f in container_findings(replace(header, tensors=tensors))]

    entry = header.tensors[left]
    assert messages() == []
    assert messages(**{right: None}) == ["blk.3.attn_q.weight.lora_a is missing"]
    narrow = replace(entry, shape=(entry.shape[0], 2))
    assert messages(**{left: narrow}) == [
        f"shape [{entry.shape[0]}, 2], which does not multiply [3, 256] of {right}"
    ]
    short = replace(entry, shape=(8, 3))
    assert "in other layers one of [8, 256]" in "".join(messages(**{left: short}))
    assert messages(x=entry) == ["no part of an adapter, expected .lora_a or .lora_b"]
    strange = {"blk.3.x.weight.lora_a": entry}
    assert messages(**strange) == ["changes blk.3.x.weight, which no model has"]
    empty = replace(header, tensors={})
    assert [f.message for f in container_findings(empty)] == [
        "no tensors in it, expected those of an adapter"
    ]


def changed(adapter: Path, out: Path, extra: dict[str, Any], **settings: Any) -> Path:
    """Return a copy of an adapter with more tensors and other settings."""
    copy = Path(shutil.copytree(adapter, out))
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file(tensors | extra, copy / "adapter_model.safetensors")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | settings))
    return copy


_INNER = "base_model.model.model."
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "dora": (
        {f"{_INNER}layers.3.self_attn.q_proj.lora_magnitude_vector": (1024,)},
        {"use_dora": True},
        "DoRA, which llama.cpp cannot add; merge it: `qwen35 gguf MODEL OUT --adapter DIR`",
    ),
    "norm": ({f"{_INNER}norm.weight": (256,)}, {"modules_to_save": ["norm"]}, "held whole"),
    "bias": ({f"{_INNER}layers.3.self_attn.q_proj.bias": (1024,)}, {"bias": "all"}, "or a bias"),
    "embedding": (
        {f"{_INNER}embed_tokens.lora_embedding_A": (3, 4096)},
        {},
        "a change of the embedding, which",
    ),
    "tower": (
        {f"{_INNER}visual.blocks.0.attn.proj.lora_A.weight": (3, 64)},
        {},
        "a change of the vision tower, which",
    ),
    "tokens": (
        {f"{_INNER}embed_tokens.token_adapter.trainable_tokens_delta": (2, 256)},
        {"trainable_token_indices": {"embed_tokens": [5, 9]}},
        "a change of the embedding, which",
    ),
    "MTP": (
        {
            "base_model.model.mtp.layers.0.mlp.up_proj.lora_A.weight": (3, 256),
            "base_model.model.mtp.layers.0.mlp.up_proj.lora_B.weight": (512, 3),
        },
        {"target_modules": "all-linear"},
        "a change of the MTP layer, which",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_way_on(kind: str, adapter: Path, tmp_path: Path) -> None:
    extra, settings, message = REFUSED[kind]
    tensors = {name: np.zeros(shape, np.float32) for name, shape in extra.items()}
    strange = changed(adapter, tmp_path / "strange", tensors, **settings)
    with pytest.raises(InputError) as raised:
        alone(ASSET, strange, tmp_path / "out")
    assert message in str(raised.value)
    assert "merge it" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_its_file_is_no_model(adapter: Path, tmp_path: Path) -> None:
    file = alone(ASSET, adapter, tmp_path / "alone")
    with pytest.raises(InputError, match="LoRA.gguf: a LoRA adapter, expected a whole model"):
        qwen35.convert(file, tmp_path / "out", recipe="bf16")


@pytest.mark.parametrize("base", ["moe", "moe-per-expert"])
def test_stacks_of_experts_are_refused_with_the_way_on(base: str, tmp_path: Path) -> None:
    """Whether the base has stacks, as the model that it was trained on, or single matrices."""
    stem = f"{_INNER}layers.0.mlp.experts.lora"
    shapes = {f"{stem}_A.weight": (4 * 3, 128), f"{stem}_B.weight": (256, 4 * 3)}
    made = make_variant(tmp_path, base)
    plain = write_adapter(made, tmp_path / "plain", chosen=_few)
    extra = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    parameters = ["layers.0.mlp.experts.down_proj"]
    adapter = changed(plain, tmp_path / "stacks", extra, target_parameters=parameters)
    with pytest.raises(InputError, match=r"a change of a stack of experts .*; merge it: "):
        alone(made, adapter, tmp_path / "out")
    qwen35.merge(made, adapter, tmp_path / "merged", threads=1)  # which works


FLAGS: dict[str, Any] = {
    "mmproj": True,
    "mtp": "drop",
    "drop_mtp": True,
    "split_max_size": 1000,
    "tensor_type": ["x=q8_0"],
    "upstream_counters": True,
    "recipe": "q8-gates",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_options_of_models_are_refused(flag: str, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no effect with --adapter-only; leave it out"):
        qwen35.gguf(
            ASSET, tmp_path / "o", adapter=[adapter], adapter_only=True, **{flag: FLAGS[flag]}
        )


def test_one_adapter_of_a_type_that_the_converter_writes(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'Q4_K_M' is unknown, expected F32, F16, BF16, Q8_0"):
        alone(ASSET, adapter, tmp_path / "o", "Q4_K_M")
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    for adapters, count in (([], "none"), ([adapter, other], "2")):
        with pytest.raises(
            UsageError, match=f"--adapter: {count} given, expected one for an adapter's file"
        ):
            qwen35.gguf(ASSET, tmp_path / "o", adapter=adapters, adapter_only=True)
    moe = make_variant(tmp_path, "moe")
    with pytest.raises(InputError, match="is it an adapter of this base|expected"):
        alone(moe, write_adapter(ASSET, tmp_path / "dense"), tmp_path / "o")


def test_a_factor_beyond_float32_is_one_sentence(tmp_path: Path) -> None:
    for alpha, message in ((1e9, "which F32 does not hold; merge it"), (1e4, "too large for F32")):
        tiny = write_adapter(
            ASSET,
            tmp_path / f"{alpha:g}",
            chosen=_few,
            spread=2.0**40,
            lora_alpha=1e-34,
            alpha_pattern={"q_proj": alpha},
        )
        with pytest.raises(InputError, match=rf"blk.3.attn_q.weight: .*{message}"):
            alone(ASSET, tiny, tmp_path / f"{alpha:g}-out")
