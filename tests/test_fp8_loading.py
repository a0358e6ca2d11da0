"""FP8 output in the libraries that load it: transformers on a CPU, and as it would on a GPU."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from blocks import decode
from checkpoints import ASSET, make_checkpoint, write_checkpoint
from loading import clean, load_model
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.engines.torch_model import TorchModel
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.asking_transformers import Asker
from qwen35.verification.questions import Question, is_right
from qwen35.writing.write import write
from running import load_all, plan_of, read_config, run

pytestmark = pytest.mark.filterwarnings("ignore:.*FP8.*", "ignore:.*is deprecated.*")

IDS = torch.arange(48).reshape(1, 48)
KL_LIMIT = 1e-2
KINDS = {
    # name: (source, recipe, class)
    "dense": ("dense", "fp8", "Qwen3_5ForConditionalGeneration"),
    "conservative": ("dense", "fp8-conservative", "Qwen3_5ForConditionalGeneration"),
    "text-only": ("dense", "text-fp8", "Qwen3_5ForCausalLM"),
    "fused experts": ("moe", "fp8", "Qwen3_5MoeForConditionalGeneration"),
    "single experts": ("moe_per_expert", "fp8", "Qwen3_5MoeForConditionalGeneration"),
    "conservative experts": ("moe", "fp8-conservative", "Qwen3_5MoeForConditionalGeneration"),
    "text-only experts": ("moe", "text-fp8", "Qwen3_5MoeForCausalLM"),
}


@pytest.fixture(scope="module")
def outputs(
    dense: Path, moe: Path, moe_per_expert: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    sources = {"dense": dense, "moe": moe, "moe_per_expert": moe_per_expert}
    folder = tmp_path_factory.mktemp("loading")
    return {
        name: run(sources[source], folder / name.replace(" ", "-"), recipe).out
        for name, (source, recipe, _) in KINDS.items()
    }


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers build what it would on a GPU: packed layers, no decoding."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *a, **k: None)


def unexplained(info: Any) -> set[str]:
    """Return keys that transformers misses or does not know; it has no MTP layer."""
    keys = set(info["missing_keys"]) | set(info["unexpected_keys"])
    keys |= {str(entry) for entry in info["mismatched_keys"]}
    return {key for key in keys if not key.startswith("mtp.")}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_it_without_a_missing_or_unexpected_key(
    kind: str, outputs: dict[str, Path]
) -> None:
    model, info = load_model(outputs[kind], KINDS[kind][2])
    assert clean(info), info
    with torch.no_grad():
        assert bool(model(input_ids=IDS).logits.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_would_miss_no_key_either(
    kind: str, outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Build FP8 layers and fill them, as on a GPU; only running them needs one."""
    on_gpu(monkeypatch)
    model, info = load_model(outputs[kind], KINDS[kind][2])
    assert unexplained(info) == set()
    state = model.state_dict()
    scales = [name for name in state if name.endswith("_scale_inv")]
    stored = load_all(outputs[kind])
    expected = [n for n in stored if n.endswith("_scale_inv") and not n.startswith("mtp.")]
    experts = {n.partition(".experts.")[0] for n in expected if ".experts." in n}
    single = [n for n in expected if ".experts." not in n]
    assert len(scales) == len(single) + 2 * len(experts)  # gate_up_proj and down_proj
    for name in single:
        own = state[name]
        assert own.shape == stored[name].shape
        assert torch.equal(own.float(), stored[name].float())
        weight = name.removesuffix("_scale_inv")
        assert state[weight].dtype == torch.float8_e4m3fn
        assert torch.equal(state[weight].view(torch.uint8), stored[weight].view(torch.uint8))
    left = [n for n, t in state.items() if t.dtype == torch.float8_e4m3fn and t.ndim == 2]
    assert len(left) == len(single)


def test_a_model_is_decoded_on_machines_with_a_gpu_too(
    outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise transformers rounds activations too, with a kernel that it downloads."""
    expected = TorchModel(outputs["dense"]).logits(IDS[0].tolist())
    on_gpu(monkeypatch)
    model = TorchModel(outputs["dense"])
    dtypes = {tensor.dtype for tensor in model.model.state_dict().values()}
    assert dtypes <= {torch.bfloat16, torch.float32}
    assert (model.logits(IDS[0].tolist()) == expected).all()


def test_experts_on_a_gpu_are_those_stored(
    outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch)
    model, _ = load_model(outputs["fused experts"], "Qwen3_5MoeForConditionalGeneration")
    stored, state = load_all(outputs["fused experts"]), model.state_dict()
    stem = "model.language_model.layers.2.mlp.experts"
    for expert in range(4):
        parts = [stored[f"{stem}.{expert}.{p}_proj.weight"] for p in ("gate", "up")]
        own = state[f"{stem}.gate_up_proj"][expert]
        both = torch.cat([part.view(torch.uint8) for part in parts])
        assert torch.equal(own.view(torch.uint8), both)
        scales = [stored[f"{stem}.{expert}.{p}_proj.weight_scale_inv"] for p in ("gate", "up")]
        assert torch.equal(
            state[f"{stem}.gate_up_proj_scale_inv"][expert].float(), torch.cat(scales).float()
        )


def test_the_replay_would_see_a_scale_that_is_not_there(
    outputs: dict[str, Path], moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a head that is not listed, experts left fused in bf16."""
    on_gpu(monkeypatch)
    config = read_config(outputs["dense"])
    config["quantization_config"]["modules_to_not_convert"].remove("lm_head")
    headless = write_checkpoint(tmp_path / "headless", config, load_all(outputs["dense"]))
    _, info = load_model(headless)
    assert any("lm_head" in key for key in unexplained(info))
    tensors = {n: t for n, t in load_all(outputs["fused experts"]).items() if ".experts." not in n}
    tensors |= {n: t for n, t in load_all(moe).items() if ".experts." in n}
    config = read_config(outputs["fused experts"])
    fused = write_checkpoint(tmp_path / "fused", config, tensors)
    _, info = load_model(fused, "Qwen3_5MoeForConditionalGeneration")
    missing = {key for key in unexplained(info) if key.endswith("_scale_inv")}
    assert len(missing) == 2 * 4


def test_experts_kept_in_bf16_load_on_a_gpu_too(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch)
    keep = ("mlp.experts", "mtp.layers.mlp.experts")
    out = write(plan_of(moe, "fp8", keep=keep), tmp_path / "out").out
    _, info = load_model(out, "Qwen3_5MoeForConditionalGeneration")
    assert unexplained(info) == set()


def test_weights_decoded_by_transformers_are_code_times_scale(outputs: dict[str, Path]) -> None:
    model, _ = load_model(outputs["dense"])
    stored, state = load_all(outputs["dense"]), model.state_dict()
    names = [n.removesuffix("_scale_inv") for n in stored if n.endswith("_scale_inv")]
    names = [n for n in names if not n.startswith("mtp.")]
    assert len(names) == 25
    for name in names:
        expected = decode(stored[name], stored[f"{name}_scale_inv"]).bfloat16()
        assert torch.equal(state[name], expected), name


def test_an_output_of_a_text_only_source_loads(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", text_only=True, tied=False)
    _, info = load_model(run(source, tmp_path / "out", "fp8").out, "Qwen3_5ForCausalLM")
    assert clean(info)


# --- what it does to a trained model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    made = {}
    for mode in ("search", "max"):
        plan = plan_of(ASSET, "fp8")
        scale_choice = ScaleChoice(mode)
        plan = make_plan(plan.checkpoint, load_recipe("fp8"), scale_choice=scale_choice)
        made[mode] = write(plan, folder / mode, threads=1).out
    return made


def log_probabilities(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    model, info = load_model(folder)
    assert clean(info)
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=row[None]).logits.double().log_softmax(-1) for row in rows]
        )


def test_divergence_from_bf16_is_small(
    trained: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    ids = tokenizer((ASSET / "eval.txt").read_text())["input_ids"][: 4 * 256]
    rows = torch.tensor(ids).reshape(4, 256)
    original = log_probabilities(ASSET, rows)
    found = {}
    for mode, folder in trained.items():
        packed = log_probabilities(folder, rows)
        found[mode] = float((original.exp() * (original - packed)).sum(-1).mean())
    with capsys.disabled():
        print(f"\nKL(bf16 || fp8) on {len(ids)} tokens: {json.dumps(found)}")  # noqa: T201
    assert all(0 < value < KL_LIMIT for value in found.values()), found


def test_its_questions_are_still_answered(trained: dict[str, Path]) -> None:
    rows = json.loads((ASSET / "questions.json").read_text())
    asker = Asker(trained["search"])
    asked = [row for row in rows if not row["thinking"]][:8]
    asked += [row for row in rows if row["image"]][:1]
    for row in asked:
        question = Question.from_json(row)
        said = asker.ask(question)
        assert is_right(question, said), (question.prompt, said)


# --- SGLang's loader, replayed as far as it can be without it

STACKED = {
    # SGLang's parameter: (the checkpoint's, its shard)
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", "0"),
    "up_proj": ("gate_up_proj", "1"),
    "in_proj_qkv": ("in_proj_qkvz", "0"),
    "in_proj_z": ("in_proj_qkvz", "1"),
    "in_proj_b": ("in_proj_ba", "0"),
    "in_proj_a": ("in_proj_ba", "1"),
}
"""`stacked_params_mapping` of its Qwen3.5 model: substrings of names, replaced."""

EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|weight_scale_inv)$")
SHARDS = {"gate": "w1", "up": "w3", "down": "w2"}


def text_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in load_all(folder).items():
        if ".visual." not in name:
            yield name, tensor


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_stacked_by_engines_are_complete(kind: str, outputs: dict[str, Path]) -> None:
    """Every stacked parameter has all its shards, all FP8 with a scale each or none of them."""
    stacks: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in text_tensors(outputs[kind]):
        if EXPERT.match(name):
            continue
        parts = name.split(".")
        for part, (stacked, shard) in STACKED.items():
            if part in parts:
                joined = ".".join(stacked if p == part else p for p in parts)
                assert shard not in stacks[joined]
                stacks[joined][shard] = tensor
    assert stacks
    wanted = {"qkv_proj": 3, "gate_up_proj": 2, "in_proj_qkvz": 2, "in_proj_ba": 2}
    for name, shards in stacks.items():
        stacked = name.split(".")[-2]
        assert len(shards) == wanted[stacked], name
        assert len({t.dtype for t in shards.values()}) == 1, name
        if name.endswith(".weight") and shards[min(shards)].dtype == torch.float8_e4m3fn:
            scales = stacks[f"{name}_scale_inv"]
            for shard, tensor in shards.items():
                assert tensor.shape[0] % 128 == tensor.shape[1] % 128 == 0
                assert scales[shard].shape == (tensor.shape[0] // 128, tensor.shape[1] // 128)
            joined = torch.cat([t.view(torch.uint8) for t in shards.values()])
            assert joined.shape[0] // 128 == sum(s.shape[0] for s in scales.values())
        elif name.endswith(".weight"):
            assert f"{name}_scale_inv" not in stacks


@pytest.mark.parametrize("kind", [k for k in KINDS if "experts" in k])
def test_experts_are_complete_for_engines(kind: str, outputs: dict[str, Path]) -> None:
    layers: dict[str, set[tuple[int, str, str]]] = defaultdict(set)
    for name, tensor in text_tensors(outputs[kind]):
        match = EXPERT.match(name)
        if match is None:
            assert ".experts." not in name
            continue
        stem, expert, part, leaf = match.groups()
        layers[stem].add((int(expert), SHARDS[part], leaf))
        dtype = torch.bfloat16 if leaf.endswith("inv") else torch.float8_e4m3fn
        assert tensor.dtype == dtype
    everything = {
        (expert, shard, leaf)
        for expert in range(4)
        for shard in ("w1", "w2", "w3")
        for leaf in ("weight", "weight_scale_inv")
    }
    assert len(layers) == 5
    assert all(found == everything for found in layers.values())


@pytest.mark.parametrize("kind", KINDS)
def test_engines_find_each_layer_packed_or_listed(kind: str, outputs: dict[str, Path]) -> None:
    """vLLM and SGLang: a fused layer is skipped if all its parts are listed, packed if none is."""
    listed = set(read_config(outputs[kind])["quantization_config"]["modules_to_not_convert"])
    tensors = dict(text_tensors(outputs[kind]))
    layers = {n.rsplit(".", 1)[0] for n in tensors if ".experts." not in n}
    for layer in layers:
        weight = tensors.get(f"{layer}.weight")
        if weight is None or weight.ndim != 2:
            continue
        stem, _, leaf = layer.rpartition(".")
        stacked, _ = STACKED.get(leaf, (leaf, ""))
        group = [f"{stem}.{p}" for p, (s, _) in STACKED.items() if s == stacked] or [layer]
        packed = weight.dtype == torch.float8_e4m3fn
        assert {member in listed for member in group} == {not packed}
        assert (f"{layer}.weight_scale_inv" in tensors) is packed
