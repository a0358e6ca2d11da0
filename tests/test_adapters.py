"""Adapters merged while streaming, against peft's merge in float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen35
from adapters import KINDS, make_adapter, peft_merge
from checkpoints import ASSET, make_checkpoint
from qwen35.errors import InputError, UsageError

pytestmark = pytest.mark.sentences

Make = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make an adapter, once for all tests of this module."""
    folder, made = tmp_path_factory.mktemp("adapters"), dict[str, Path]()

    def adapter(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_adapter(kind, folder / kind.replace(" ", "-"))
        return made[kind]

    return adapter


def stored(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


BASE = stored(ASSET)
UNTIED = {"saved embedding", "saved head"}
"""Adapters that peft's merge unties embedding and head for."""


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return values as integers, one apart where they are one step of their dtype apart."""
    integer = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).long()
    return torch.where(integer < 0, -(integer & 2**62 - 1), integer)


def assert_close(got: Tensors, wanted: Tensors) -> int:
    """Assert that one value in 10,000 differs at most, by a step; return how many weights moved.

    Where weight and change nearly cancel, the steps are finer than the error of any float32 sum.
    """
    differing = moved = 0
    for name, value in got.items():
        if name not in wanted:  # of other classes: multi-token prediction, the tower
            assert torch.equal(value, BASE[name]), name
            continue
        steps = (bits(value) - bits(wanted[name].to(value.dtype))).abs()
        apart = (value.float() - wanted[name]).abs()
        assert ((steps <= 1) | (apart <= 1e-6 * wanted[name].abs().max())).all(), name
        differing += int(steps.count_nonzero())
        moved += not (name in BASE and torch.equal(value, BASE[name]))
    assert differing <= sum(value.numel() for value in got.values()) / 10_000
    return moved


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_that_of_peft(kind: str, make: Make, tmp_path: Path) -> None:
    result = qwen35.merge(ASSET, make(kind), tmp_path / "out", threads=1)
    got = stored(tmp_path / "out")
    assert got.keys() == BASE.keys() | ({"lm_head.weight"} if kind in UNTIED else set())
    assert {n: v.dtype for n, v in BASE.items()} == {n: got[n].dtype for n in BASE}
    assert assert_close(got, peft_merge(kind, make(kind))) >= 2
    tied = json.loads((tmp_path / "out" / "config.json").read_bytes())["tie_word_embeddings"]
    assert tied is (kind not in UNTIED)
    assert any("merged with the adapter" in note for note in result.plan.notes)


def test_several_adapters_add_up(make: Make, tmp_path: Path) -> None:
    first, second = make("all"), make("patterns")
    qwen35.merge(ASSET, [first, f"{second}=0.5"], tmp_path / "out", threads=1)
    halved = shutil.copytree(second, tmp_path / "half")
    settings = json.loads((halved / "adapter_config.json").read_bytes())
    settings["lora_alpha"] /= 2
    settings["alpha_pattern"] = {n: a / 2 for n, a in settings["alpha_pattern"].items()}
    (halved / "adapter_config.json").write_text(json.dumps(settings))
    assert assert_close(stored(tmp_path / "out"), peft_merge("all", first, halved)) > 60


def test_every_output_is_that_of_the_merged_checkpoint(make: Make, tmp_path: Path) -> None:
    adapter, merged = make("all"), tmp_path / ASSET.name
    qwen35.merge(ASSET, adapter, merged, threads=1)
    makers: dict[str, Callable[..., Any]] = {
        "nf4": partial(qwen35.convert, recipe="nf4", threads=2),
        "fp8": partial(qwen35.convert, recipe="fp8", skip_verify=True, threads=2),
        "gguf": partial(qwen35.gguf, types="F16,Q4_K_M", threads=2),
    }
    for name, made in makers.items():
        out, again = tmp_path / name, tmp_path / f"{name}-again"
        made(ASSET, out, adapter=[adapter])
        made(merged, again)
        files = sorted(p.name for p in out.iterdir() if p.name != "qwen35.json")
        assert files == sorted(p.name for p in again.iterdir() if p.name != "qwen35.json")
        for file in files:
            assert (out / file).read_bytes() == (again / file).read_bytes(), (name, file)


def test_an_output_is_verified_and_reproduced_with_its_adapter(make: Make, tmp_path: Path) -> None:
    adapter, out = make("queries"), tmp_path / "out"
    qwen35.convert(ASSET, out, recipe="nf4", adapter=[f"{adapter}=0.5"], threads=1)
    recorded = json.loads((out / "qwen35.json").read_bytes())["source"]["adapters"]
    assert [(row["name"], row["weight"]) for row in recorded] == [("queries", 0.5)]
    assert qwen35.verify(out, source=ASSET, adapter=[adapter]).passed
    assert not qwen35.reproduce(out, source=ASSET, adapter=[adapter], threads=1).findings
    for act in (qwen35.verify, qwen35.reproduce):
        with pytest.raises(UsageError, match="made with the adapter 'queries'; give its folder"):
            act(out, source=ASSET)
        with pytest.raises(InputError, match=r"not an adapter of qwen35.json, expected queries"):
            act(out, source=ASSET, adapter=[make("out_proj")])
        with pytest.raises(
            UsageError, match="'queries' with weight 0.7, expected 0.5, as qwen35.j"
        ):
            act(out, source=ASSET, adapter=[f"{adapter}=0.7"])


def test_all_adapters_of_an_output_are_asked_for(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qwen35.merge(ASSET, [make("queries"), make("out_proj")], out, threads=1)
    for given, missing in (("queries", "out_proj"), ("out_proj", "queries")):
        with pytest.raises(UsageError, match=f"made with the adapter '{missing}'; give its folder"):
            qwen35.verify(out, source=ASSET, adapter=[make(given)], depth="structure")


def test_a_merge_without_its_adapter_is_not_the_source(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qwen35.merge(ASSET, make("queries"), out, threads=1)
    (out / "qwen35.json").unlink()
    assert qwen35.verify(out, source=ASSET, adapter=[make("queries")]).passed
    assert {f.subject for f in qwen35.verify(out, source=ASSET).findings} == {
        f"model.language_model.layers.{i}.self_attn.q_proj.weight" for i in (3, 7)
    }


def test_the_digest_depends_on_adapters_and_weights(make: Make, tmp_path: Path) -> None:
    renamed = shutil.copytree(make("queries"), tmp_path / "renamed")
    plans = [qwen35.plan(ASSET, adapter=[folder]) for folder in (make("queries"), renamed)]
    assert plans[0].digest == plans[1].digest
    texts: list[list[str | Path]] = [
        [],
        [make("queries")],
        [f"{make('queries')}=0.5"],
        [make("out_proj")],
    ]
    for values in ({"recipe": "nf4"}, {"types": "Q8_0"}):
        assert len({qwen35.plan(ASSET, adapter=t, **values).digest for t in texts}) == len(texts)  # type: ignore[arg-type]


def test_slices_and_workers_read_the_adapter(make: Make, tmp_path: Path) -> None:
    adapter, whole, out = make("queries"), tmp_path / "whole", tmp_path / "out"
    qwen35.convert(ASSET, whole, recipe="nf4", adapter=[adapter], threads=1)
    for number in (1, 2):
        qwen35.convert(ASSET, out, recipe="nf4", adapter=[adapter], slice=(number, 2), threads=1)
    qwen35.finalize(out)
    names = [path.name for path in whole.iterdir() if path.suffix == ".safetensors"]
    assert all((whole / name).read_bytes() == (out / name).read_bytes() for name in names)


def edited(source: Path, out: Path, **values: Any) -> Path:
    """Copy an adapter, with other settings."""
    shutil.copytree(source, out)
    settings = json.loads((out / "adapter_config.json").read_bytes())
    (out / "adapter_config.json").write_text(json.dumps(settings | values))
    return out


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "peft_type 'IA3', expected LORA"),
    "swapped": ({"fan_in_fan_out": True}, "fan_in_fan_out: weights with rows and columns swapped"),
    "pissa": ({"init_lora_weights": "pissa"}, "which changes the base's weights too"),
    "parameters": (
        {"target_parameters": "mlp"},
        "target_parameters is 'mlp', expected a list of n",
    ),
    "parameters missing": (
        {"target_parameters": ["k_proj.weight"]},
        r"no matrices for model.layers.3.self_attn.k_proj, which target_parameters names",
    ),
    "tokens": ({"trainable_token_indices": [1, 1]}, r"indices is \[1, 1\], expected different num"),
    "tokens of": (
        {"trainable_token_indices": {"x": "1"}},
        r"indices is .*, expected different num",
    ),
    "tokens missing": (
        {"trainable_token_indices": [1]},
        "no rows for embed_tokens, which trainabl",
    ),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
    "lora bias": ({"lora_bias": True}, "lora_bias is set"),
    "replicated": ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
    "of the future": ({"use_newest": 1}, "use_newest is set, which is not supported"),
    "rank": ({"r": True}, "r is True, expected a rank from 1 to 65536"),
    "no rank": ({"r": 0}, "r is 0, expected a rank"),
    "another rank": (
        {"r": 4},
        r"shape \[\d+, 2\], expected \[\d+, 4\] by the base and adapter_con",
    ),
    "alpha": ({"lora_alpha": "8"}, "lora_alpha is '8', expected a number"),
    "huge alpha": ({"lora_alpha": 1e300}, "lora_alpha is 1e.300, expected a number"),
    "targets": ({"target_modules": 3}, "target_modules is 3, expected a list of names"),
    "no targets": ({"target_modules": None}, "no target_modules, expected names or a pattern"),
    "other targets": ({"target_modules": ["k_proj"]}, "which target_modules does not name"),
    "more targets": (
        {"target_modules": ["q_proj", "k_proj"]},
        r"no matrices for model.layers.3.self_attn.k_proj, which target_modules names",
    ),
    "excluded": ({"exclude_modules": ["q_proj"]}, "which target_modules does not name"),
    "look-ahead": ({"target_modules": "(?!a).*"}, "a pattern that cannot be matched in linear"),
    "rank patterns": ({"rank_pattern": [1]}, r"rank_pattern is \[1\], expected an object"),
    "layers": ({"layers_to_transform": ["3"]}, r"layers_to_transform is \['3'\], expected numbers"),
    "flag": ({"use_dora": "yes"}, "use_dora is 'yes', expected true or false"),
    "dora": ({"use_dora": True}, "has lora_A, lora_B, expected lora_A, lora_B, lora_magnitude"),
    "bias": ({"bias": "some"}, "bias is 'some', expected none or all or lora_only"),
    "saved": ({"modules_to_save": ["norm"]}, "no tensors for norm, which modules_to_save names"),
    "saved targets": ({"modules_to_save": ["q_proj"]}, "which target_modules does not name"),
    "tying": ({"ensure_weight_tying": True}, "ensure_weight_tying is set"),
}
"""Settings that must not be merged, with what is said."""


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_be_merged(case: str, make: Make, tmp_path: Path) -> None:
    values, words = REFUSED[case]
    adapter = edited(make("queries"), tmp_path / "adapter", **values)
    with pytest.raises(InputError, match=words):
        qwen35.plan(ASSET, recipe="bf16", adapter=[adapter])


def _first(tensors: Tensors, end: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(end))


def _renamed(end: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        name = _first(tensors, end)
        tensors[new] = tensors.pop(name)

    return change


def _added(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


_LAYER = "base_model.model.model.layers.3."
FAULTS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "empty": (lambda tensors: tensors.clear(), "no tensors in it"),
    "not of peft": (_renamed("lora_A.weight", "x"), "x: unknown, in adapter_model.safetensors"),
    "half": (lambda t: t.pop(_first(t, "B.weight")).dim and None, "has lora_A, expected lora_A, "),
    "integers": (_added(f"{_LAYER}a", 1, dtype=torch.int8), "a: I8, expected BF16, F16, F32"),
    "another layer": (
        _added("base_model.model.model.layers.40.self_attn.q_proj.lora_A.weight", 2, 256),
        "but the base has no model.layers.40.self_attn.q_proj.weight; is it an adapter of this",
    ),
    "another model": (_added(f"{_LAYER}attn.wq.lora_A", 2, 256), "but Qwen3.5 has no model.layers"),
    "lora bias": (_added(f"{_LAYER}self_attn.q_proj.lora_B.bias", 1), "a part of LoRA that is not"),
    "a norm": (_added(f"{_LAYER}input_layernorm.lora_A", 2, 4), "which is no matrix of a linear"),
    "conv": (
        _added("base_model.model.model.layers.0.linear_attn.conv1d.lora_A", 2, 4),
        "a change of",
    ),
    "the tied head": (
        _added("base_model.model.lm_head.lora_A", 2, 256),
        "the base ties to its emb",
    ),
    "whole": (_added(f"{_LAYER}input_layernorm.weight", 256), "modules_to_save does not name it"),
    "vocabulary": (
        _added("base_model.model.model.embed_tokens.weight", 4099, 255),
        r"shape \[4099, 255\], the base has \[4099, 256\]",
    ),
    "the same": (
        _added(f"{_LAYER}self_attn.q_proj.lora_A.default.weight", 2, 256),
        "the same part as",
    ),
}
"""Tensors that do not fit, with what is said."""


@pytest.mark.parametrize("case", FAULTS)
def test_tensors_that_do_not_fit(case: str, make: Make, tmp_path: Path) -> None:
    change, words = FAULTS[case]
    adapter = shutil.copytree(make("queries"), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=words):
        qwen35.plan(ASSET, recipe="bf16", adapter=[adapter])


def test_values_that_are_not_finite(make: Make, tmp_path: Path) -> None:
    adapter = shutil.copytree(make("queries"), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[_first(tensors, "lora_A.weight")][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="once the adapter is merged"):
        qwen35.merge(ASSET, adapter, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_not_read(make: Make, tmp_path: Path) -> None:
    adapter = shutil.copytree(make("queries"), tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="adapter_model.bin is a pickle"):
        qwen35.plan(ASSET, adapter=[adapter])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{queries}=x", "no such folder"),
        ("{queries}=0", "'0' as a weight, expected a number other than 0"),
        ("{queries}=nan", "'nan' as a weight"),
        ("{norms}=0.5", "held whole, so that no weight"),
        ("{dora}=0.5", "DoRA, to which no weight"),
        ("/nowhere", "no such folder, expected a folder with adapter_config.json"),
        (str(ASSET), "no adapter_config.json in it"),
        (f"{ASSET}/config.json", "not a folder"),
    ],
)
def test_what_is_no_adapter_or_weight(text: str, words: str, make: Make) -> None:
    spelled = text.format(queries=make("queries"), norms=make("norms"), dora=make("dora"))
    with pytest.raises((InputError, UsageError), match=words):
        qwen35.plan(ASSET, recipe="bf16", adapter=[spelled])


def test_adapters_that_do_not_fit_together(make: Make) -> None:
    pairs = {
        ("dora", "queries"): "is changed by two adapters, and one holds it whole or as DoRA",
        ("queries", "queries"): "queries twice",
    }
    for (first, second), words in pairs.items():
        with pytest.raises(UsageError, match=words):
            qwen35.plan(ASSET, recipe="bf16", adapter=[make(first), make(second)])


def test_packed_weights_that_stay_packed_are_refused(make: Make, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    qwen35.convert(ASSET, packed, recipe="nvfp4", threads=1)
    with pytest.raises(UsageError, match="packed as nvfp4, which the adapter changes; merge into"):
        qwen35.plan(packed, recipe="nvfp4", adapter=[make("all")])


def test_packed_weights_are_decoded_changed_and_packed_again(make: Make, tmp_path: Path) -> None:
    packed, merged, adapter = tmp_path / "packed", tmp_path / "merged", make("queries")
    qwen35.convert(ASSET, packed, recipe="mlx-4bit", threads=1)
    qwen35.convert(packed, merged, recipe="mlx-4bit", adapter=[adapter], threads=1)
    before, after = stored(packed), stored(merged)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".self_attn.q_proj." in name for name in moved)
    assert qwen35.verify(merged, source=packed, adapter=[adapter]).passed


def test_a_malformed_record_of_adapters(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qwen35.merge(ASSET, make("queries"), out, threads=1)
    manifest = json.loads((out / "qwen35.json").read_bytes())
    row = manifest["source"]["adapters"][0]
    wrongs: tuple[Any, ...] = ({}, [1], [row | {"weight": "1"}], [row | {"sha256": None}])
    for wrong in wrongs:
        manifest["source"]["adapters"] = wrong
        (out / "qwen35.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match="malformed source, expected adapters: name, weight"):
            qwen35.reproduce(out, source=ASSET, adapter=[make("queries")])


def test_the_adapter_of_a_verify_needs_its_source(make: Make) -> None:
    with pytest.raises(UsageError, match="--adapter: needs --source, which it changes"):
        qwen35.verify(ASSET, adapter=[make("queries")])


def test_experts_and_shared_experts(make: Make, tmp_path: Path) -> None:
    """A mixture of experts: what an adapter can hold of it, into a layout with split experts."""
    base = make_checkpoint(tmp_path / "moe", moe=True, text_only=True)
    names = {"q_proj": 3, "shared_expert.gate_proj": 0}
    tensors: Tensors = {}
    for name, layer in names.items():
        part = "self_attn" if name == "q_proj" else "mlp"
        shape = stored(base)[f"model.layers.{layer}.{part}.{name}.weight"].shape
        module = f"base_model.model.model.layers.{layer}.{part}.{name}"
        tensors[f"{module}.lora_A.weight"] = torch.full((2, shape[1]), 0.25)
        tensors[f"{module}.lora_B.weight"] = torch.full((shape[0], 2), 0.5)
    adapter = shutil.copytree(make("queries"), tmp_path / "adapter")
    save_file(tensors, adapter / "adapter_model.safetensors")
    adapter = edited(
        adapter,
        tmp_path / "moe-adapter",
        r=2,
        lora_alpha=4,
        target_modules=r".*\.(3\.self_attn\.q_proj|0\.mlp\.shared_expert\.gate_proj)",
    )
    qwen35.merge(base, adapter, tmp_path / "out", threads=1)
    before, after = stored(base), stored(tmp_path / "out")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.0.mlp.shared_expert.gate_proj.weight",
    }
    for name in moved:  # 4 / 2 * (0.25 * 0.5 + 0.25 * 0.5)
        assert torch.equal(after[name], (before[name].float() + 0.5).to(torch.bfloat16))
    qwen35.convert(base, tmp_path / "fp8", recipe="fp8", adapter=[adapter], threads=1)
    assert qwen35.verify(tmp_path / "fp8", source=base, adapter=[adapter]).passed


def test_packed_bases(make: Make, tmp_path: Path) -> None:
    """An adapter merges into decoded NF4 weights; packing again is up to the recipe."""
    packed, out, again = (tmp_path / name for name in ("packed", "out", "again"))
    qwen35.convert(ASSET, packed, recipe="nf4", threads=1)
    qwen35.merge(packed, make("queries"), out, threads=1)
    qwen35.convert(packed, again, recipe="bf16", threads=1)
    decoded, merged = stored(again), stored(out)
    for name, value in merged.items():
        moved = name.endswith("q_proj.weight") and not name.startswith("mtp.")
        assert torch.equal(value, decoded[name]) is not moved, name
    assert qwen35.verify(out, source=packed, adapter=[make("queries")]).passed
