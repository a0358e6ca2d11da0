"""Calibration: the same statistics as hooks on the whole model, one layer in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from calibrating import source
from gguf_models import make_variant
from llama_importance import Importance
from qwen35.calibration.calibration_plan import CalibrationPlan, CalibrationRequest, make_plan
from qwen35.calibration.calibration_run import calibrate
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.source import open_folder
from qwen35.planning.gguf_files.imatrix import read_imatrix
from qwen35.planning.output_plan import make_plan as make_gguf_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write

CONTEXT = 48

F32 = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of letters that the small tokenizer has."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    generator = np.random.default_rng(0)
    words = ["the", "in", "a", "seven", "Model", "x = 3;", "rain", "Zürich", "(and)", "\n"]
    path.write_text(" ".join(generator.choice(words, 300)))
    return path


def plan_for(folder: Path, text: Path, **asked: Any) -> CalibrationPlan:
    checkpoint = open_folder(folder)
    return make_plan(
        checkpoint, read_text(checkpoint, [text], context=CONTEXT), CalibrationRequest(**asked)
    )


@dataclass
class Seen:
    """Mean square and largest magnitude of every linear layer's input, by module name.

    `cached` has the largest keys and values of the cache, by layer.
    """

    squares: dict[str, Any]
    largest: dict[str, Any]
    tokens: dict[str, int]
    cached: dict[tuple[int, str], float]


def note_cache(seen: Seen, full: Sequence[int], cache: Any) -> None:
    """Note the largest keys and values of full-attention layers."""
    for layer in full:
        for side in ("keys", "values"):
            top = getattr(cache.layers[layer], side).abs().max().item()
            seen.cached[layer, side] = max(top, seen.cached.get((layer, side), 0.0))


def whole_model(folder: Path, plan: CalibrationPlan) -> Seen:
    """Hook every linear layer, and every product of experts, of the loaded model."""
    kind = (
        "AutoModelForImageTextToText" if plan.config.architecture.vision else "AutoModelForCausalLM"
    )
    model = getattr(transformers, kind).from_pretrained(
        folder, dtype=getattr(torch, plan.dtype), experts_implementation="eager"
    )
    model.eval()
    seen = Seen({}, {}, {}, {})

    def note(name: str, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).double()
        seen.squares[name] = seen.squares.get(name, 0) + flat.square().sum(0)
        top = flat.abs().amax(0)
        seen.largest[name] = torch.maximum(seen.largest.get(name, top), top)
        seen.tokens[name] = seen.tokens.get(name, 0) + len(flat)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
    full = [i for i, kind in enumerate(plan.config.layer_types) if kind == "full_attention"]
    real = torch.nn.functional.linear
    stacks = [(name, part) for name, part in model.named_parameters() if "experts." in name]

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        for name, part in stacks:
            step = part[0].numel() * part.element_size()
            offset = weight.data_ptr() - part.data_ptr()
            if 0 <= offset < step * len(part) and weight.shape == part[0].shape:
                note(f"{name}.{offset // step}", x)
        return real(x, weight, bias)

    torch.nn.functional.linear = linear
    try:
        with torch.inference_mode():
            for start in range(0, len(plan.text.windows), plan.batch):
                ids = torch.from_numpy(plan.text.windows[start : start + plan.batch]).long()
                note_cache(seen, full, model(input_ids=ids, use_cache=True).past_key_values)
    finally:
        torch.nn.functional.linear = real
    return seen


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense text-only untied": {"text_only": True, "tied": False, "mtp": 0},
    "moe": {"moe": True, "tied": False},
    "moe per expert": {"moe": True, "tied": False, "per_expert": True},
    "moe text-only": {"moe": True, "text_only": True},
    "f16": {"dtype": "float16"},
}
IN_BF16 = ("dense", "moe")
"""Products in bf16 take processors three times as long, and the names are those of float32."""


def expected_name(name: str) -> str:
    """Return the module of the whole model that a weight of the statistics is in."""
    if name == "lm_head.weight" or name.endswith("embed_tokens.weight"):
        return "lm_head"
    if ".experts." in name:
        stem, number, leaf, _ = name.rsplit(".", 3)
        return f"{stem}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}.{number}"
    return name.removesuffix(".weight")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=pytest.mark.heavy if slow and case not in IN_BF16 else ())
        for case in CASES
        for dtype, slow in (("bfloat16", True), ("float32", False))
    ],
)
def test_statistics_are_those_of_the_whole_model(
    case: str, dtype: Any, prose: Path, tmp_path: Path
) -> None:
    folder = source(tmp_path, **CASES[case])
    plan = plan_for(folder, prose, dtype=dtype, floor=1)
    out = calibrate(plan, tmp_path / "out", threads=1).result.out
    table = json.loads((out / "activation-stats.json").read_text())
    made = table.pop("__metadata__")
    assert made["tokens"] == plan.text.windows.size
    seen = whole_model(folder, plan)
    close = partial(np.allclose, rtol=2e-6, atol=1e-12)
    compared = set()
    for name, entry in table.items():
        if name.startswith("mtp."):
            continue
        module = expected_name(name)
        compared.add(module)
        tokens = seen.tokens.get(module, 0)
        assert entry["tokens"] == tokens, name
        if tokens:
            squares = seen.squares[module].numpy() / tokens
            assert close(entry["input_channel_mean_square"], squares), name
            assert close(entry["input_channel_max"], seen.largest[module]), name
    for (layer, side), largest in seen.cached.items():
        prefix = plan.checkpoint.layout.prefix
        entry = table[f"{prefix}layers.{layer}.self_attn.{side[0]}_proj.weight"]
        assert np.isclose(entry["cache_max"], largest, rtol=2e-6), (layer, side)
    assert len(seen.cached) == 2
    towers = {name for name in seen.squares if ".visual." in name}
    assert compared >= seen.squares.keys() - towers
    assert not towers


# --- the importance matrix


def gguf_of(folder: Path, out: Path) -> Path:
    plan = make_gguf_plan(open_folder(folder), load_recipe("mix", "gguf"), types=("F32",))
    return write(plan, out, threads=1).out / plan.files[0].name


@pytest.mark.parametrize("variant", ["dense", "three-to-one", "moe", "moe-per-expert"])
def test_importance_is_what_llama_cpp_multiplies_with(
    variant: str, prose: Path, tmp_path: Path
) -> None:
    """Names, the order of value heads, experts and their counts, in llama.cpp's own forward."""
    folder = make_variant(tmp_path, variant)
    plan = plan_for(folder, prose, dtype="float32", floor=1)
    out = calibrate(plan, tmp_path / "out", threads=1).result.out
    theirs = Importance(gguf_of(folder, tmp_path / "gguf"), plan.text.windows)
    ours = read_imatrix(out / "imatrix.gguf")
    never = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
    assert {name for name in theirs.squares if not name.endswith(never)} == {
        name for name in ours.entries if not name.startswith("blk.4.")
    }
    for name, entry in ours.entries.items():
        if name.startswith("blk.4."):  # MTP, which llama.cpp does not run here
            continue
        assert np.array_equal(np.maximum(1, theirs.counts[name]), entry.divisors), name
        values = entry.values.reshape(theirs.squares[name].shape)
        mean = theirs.squares[name] / np.maximum(1, theirs.counts[name])[:, None]
        seen = theirs.counts[name] > 0
        assert np.allclose(values[seen], mean[seen], rtol=2e-4, atol=1e-9 * mean.max()), name
