"""Adapters of mixtures of experts: LoRA on whole stacks, against peft's merge in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen35
from adapters import OF_EXPERTS, make_adapter, peft_merge
from checkpoints import layout_of, random_tensors, tiny_config, write_checkpoint
from gguf_models import sidecars
from qwen35.errors import InputError
from running import load_all

pytestmark = pytest.mark.sentences

Tensors = dict[str, torch.Tensor]


def write_base(out: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    files = {name: text for name, text in sidecars().items() if name != "README.md"}
    return write_checkpoint(out, config, tensors, sidecars=files)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return tiny_config(moe=True)


@pytest.fixture(scope="module")
def base(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = random_tensors(config, layout_of(config, per_expert=False), seed=1)
    return write_base(tmp_path_factory.mktemp("base") / "Tiny-moe-1B", tensors, config)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter("stacks", tmp_path_factory.mktemp("stacks") / "stacks", base=base)


@pytest.mark.parametrize("kind", OF_EXPERTS)
def test_stacks_are_merged_as_by_peft(kind: str, base: Path, tmp_path: Path) -> None:
    made = make_adapter(kind, tmp_path / "adapter", base=base)
    qwen35.merge(base, made, tmp_path / "out", threads=1)
    got, before = load_all(tmp_path / "out"), load_all(base)
    wanted = peft_merge(kind, made, base=base)
    differing = total = 0
    for name, value in got.items():
        if name not in wanted:
            assert torch.equal(value, before[name]), name
            continue
        near = wanted[name].to(value.dtype)
        spread = (value.float() - wanted[name]).abs().max()
        assert spread <= 2**-7 * wanted[name].abs().max(), name
        differing += int((value != near).sum())
        total += value.numel()
        if name.endswith("experts.down_proj"):
            assert not torch.equal(value, before[name]), name
    assert differing <= total / 10_000


def split(tensors: Tensors) -> Tensors:
    """Return the tensors of a checkpoint with a matrix for each expert."""
    found: Tensors = {}
    for name, value in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj") or value.ndim != 3:
            found[name] = value
            continue
        for expert, matrix in enumerate(value):
            parts = {"down_proj": matrix}
            if leaf == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            found |= {f"{stem}.{expert}.{p}.weight": m.clone() for p, m in parts.items()}
    return found


def test_a_base_with_a_matrix_for_each_expert(
    base: Path, config: dict[str, Any], adapter: Path, tmp_path: Path
) -> None:
    apart = write_base(tmp_path / "apart", split(load_all(base)), config)
    qwen35.merge(base, adapter, tmp_path / "one", threads=1)
    qwen35.merge(apart, adapter, tmp_path / "two", threads=1)
    one, two = split(load_all(tmp_path / "one")), load_all(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_outputs_are_those_of_the_merged_mixture(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Codecs that split stacks, and the container that joins them."""
    merged = tmp_path / base.name
    qwen35.merge(base, adapter, merged, threads=1)
    for name in ("fp8", "gguf"):
        for source, adapters in ((base, [adapter]), (merged, [])):
            out = tmp_path / f"{name}-{len(adapters)}"
            if name == "gguf":
                qwen35.gguf(source, out, types="Q8_0", adapter=adapters, threads=1)
            else:
                qwen35.convert(source, out, recipe=name, adapter=adapters, threads=1)
        files = [p.name for p in (tmp_path / f"{name}-0").iterdir() if p.name != "qwen35.json"]
        for file in files:
            one, two = (tmp_path / f"{name}-{i}" / file for i in (0, 1))
            assert one.read_bytes() == two.read_bytes(), (name, file)
    assert qwen35.verify(tmp_path / "fp8-1", source=base, adapter=[adapter]).passed


def _extra(tensors: Tensors) -> None:
    name = next(n for n in tensors if n.endswith("experts.lora_A.weight"))
    tensors[name.replace("experts.", "experts.base_layer.base_layer.")] = tensors[name].clone()


def _narrow(tensors: Tensors) -> None:
    name = next(n for n in tensors if n.endswith("experts.lora_A.weight"))
    tensors[name] = tensors[name][:, :-1].clone()


def _without_left(tensors: Tensors) -> None:
    del tensors[next(n for n in tensors if n.endswith("experts.lora_B.weight"))]


def _without_layer(tensors: Tensors) -> None:
    for name in [n for n in tensors if "layers.2.mlp.experts" in n]:
        del tensors[name]


DAMAGED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "more wrappers": (_extra, {}, "pairs of matrices for .*: 3, expected 2, as target_parameters"),
    "narrow": (
        _narrow,
        {},
        r"shape \[8, 127\], expected \[8, 128\] by the base and adapter_config",
    ),
    "no left": (_without_left, {}, "a stack of experts with lora_A, expected lora_A, lora_B"),
    "no layer": (_without_layer, {}, r"no matrices for model.layers.2.mlp.experts.\w+, which targ"),
    "dora": (lambda _: None, {"use_dora": True}, "a stack of experts with lora_A, lora_B, expec"),
    "not named": (
        lambda _: None,
        {"target_parameters": ["experts.down_proj", "mlp.gate.weight"]},
        "pairs of matrices for .*: 2, expected 1, as target_parameters names",
    ),
    "router": (
        lambda _: None,
        {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
        "a change of mlp.gate, which is not supported; merge it with peft",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_stacks_that_cannot_be_merged(case: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    damage, values, words = DAMAGED[case]
    tensors = load_file(adapter / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_bytes()) | values
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=words):
        qwen35.plan(base, recipe="bf16", adapter=[tmp_path])
