"""Quantized inputs, simulated: each quantizer, the layers that get one, and experts one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.codecs.codec import Codec
from qwen35.codecs.compressed_tensors import SCHEMES
from qwen35.codecs.input_quantizers import fp4_blocks, fp8_fixed, fp8_tokens
from qwen35.codecs.registry import CODECS
from qwen35.engines.simulated_inputs import (
    input_quantizers,
    layer_inputs,
    served_inputs,
    simulated_inputs,
    unknown_inputs,
)
from qwen35.engines.torch_model import TorchModel
from qwen35.errors import TensorError
from qwen35.model.roles import role_of
from running import load_all, read_config, run, statistics
from verifying import edit_config, rewrite

F32 = npt.NDArray[np.float32]
IDS = list(range(3, 19))
LAYER = "model.language_model.layers"
MLP = f"{LAYER}.1.mlp.down_proj"

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)]
    + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
)
"""The numbers of a format by their codes, from its definition; the last E4M3 code is NaN."""

pytestmark = pytest.mark.filterwarnings("ignore:.*FP8.*", "ignore:.*is deprecated.*")


def nearest(values: F32, grid: npt.NDArray[np.float64]) -> F32:
    """Round to numbers of a grid, ties to even codes, what is beyond to the last."""
    size = np.minimum(np.abs(values.astype(np.float64)), grid[-1])
    above = np.minimum(np.searchsorted(grid, size), len(grid) - 1)
    below = np.maximum(above - 1, 0)
    to_above, to_below = grid[above] - size, size - grid[below]
    down = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    found = np.where(down, grid[below], grid[above])
    signed: F32 = np.copysign(found, values).astype(np.float32)
    return signed


def tokens(x: F32, group: int) -> F32:
    """E4M3 with a scale for each group of columns of a row."""
    out = np.empty_like(x)
    for row in range(len(x)):
        for first in range(0, x.shape[1], group):
            part = x[row, first : first + group]
            scale = np.abs(part).max() / np.float32(448)
            codes = nearest(part / scale, E4M3) if scale else np.zeros_like(part)
            out[row, first : first + group] = codes * scale
    return out


def fixed(x: F32, scale: np.float32) -> F32:
    """E4M3 in units of a scale."""
    return nearest(x / scale, E4M3) * scale


def blocks(x: F32, divisor: np.float32) -> F32:
    """E2M1 in blocks of 16, with an E4M3 scale each; 448 of scale, times 6, are 2688 / divisor."""
    out = np.empty_like(x)
    for row in range(len(x)):
        for first in range(0, x.shape[1], 16):
            part = x[row, first : first + 16]
            scale = nearest(np.abs(part).max(keepdims=True) / np.float32(6) * divisor, E4M3)
            unit = scale / divisor
            codes = nearest(part / unit, E2M1) if unit > 0 else np.zeros_like(part)
            out[row, first : first + 16] = codes * unit
    return out


def values(columns: int) -> F32:
    """Rows of very different magnitudes; one is zero, and one has a block of zeros."""
    x = np.random.default_rng(1).standard_normal((12, columns)).astype(np.float32)
    x *= np.float32(10) ** np.arange(-8, 4, dtype=np.float32)[:, None]
    x[3], x[5, 16:32], x[7, 0] = 0, 0, 3e4
    return x


QUANTIZERS: dict[str, tuple[Callable[..., Any], Callable[..., F32], int]] = {
    "token": (fp8_tokens, partial(tokens, group=512), 512),
    "groups": (partial(fp8_tokens, group=128), partial(tokens, group=128), 384),
    "groups and a rest": (partial(fp8_tokens, group=128), partial(tokens, group=128), 208),
    "fixed": (partial(fp8_fixed, scale=0.0625), partial(fixed, scale=np.float32(0.0625)), 64),
    "blocks": (partial(fp4_blocks, whole=2688 / 8), partial(blocks, divisor=np.float32(336)), 512),
}


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_quantizer_is_its_formula(kind: str) -> None:
    ours, formula, columns = QUANTIZERS[kind]
    x = values(columns)
    found = ours(torch.from_numpy(x)[None])[0].numpy()
    assert (found == formula(x)).all()
    assert not found[3].any()
    assert 0.7 < np.abs(found[5]).max() / np.abs(x[5]).max() < 1.3 or kind in ("fixed", "blocks")


def test_ties_go_to_even_and_more_than_expected_is_cut_off() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])
    block = torch.cat([ties, -ties])
    even = torch.tensor([0.0, 1, 1, 2, 2, 4, 4, 6])
    assert fp4_blocks(block, 1.0).tolist() == torch.cat([even, -even]).tolist()
    # The scale of 7 times 6 / 448 is cut off at that of 6 * 448, then each code at 6.
    assert fp4_blocks(block * 448 * 7, 1.0).abs().max() == 2688
    row = torch.tensor([448.0, 17, 19, 21, -23, 2.0**-10, 3 * 2.0**-10, 0])
    assert fp8_tokens(row).tolist() == [448, 16, 20, 20, -24, 0, 2.0**-8, 0]
    assert fp8_fixed(torch.tensor([900.0, -900, 17]), 1.0).tolist() == [448, -448, 16]


def test_who_quantizes_inputs() -> None:
    served = {name for name, codec in CODECS.items() if codec.served_inputs}
    inputs = {"nvfp4-a4", "nvfp4-a4-modelopt", "fp8-modelopt"}
    assert served == {"fp8", "fp8-channel", *inputs}
    for name in served:
        assert type(CODECS[name]).input_quantizer is not Codec.input_quantizer
    assert {name for name, codec in CODECS.items() if codec.quantized_inputs} == inputs


# --- stored scales


def with_inputs(source: Path, out: Path, recipe: str, layout: str) -> Path:
    """Convert with scales of inputs."""
    stats = str(statistics(source, out.parent))
    asked = [] if recipe == "nvfp4-mixed" else ["--activations"]
    command = ["convert", str(source), str(out), "--recipe", recipe, "--layout", layout, *asked]
    assert main([*command, "--activation-stats", stats, "--quiet"]) == 0
    return out


@pytest.mark.parametrize(
    ("recipe", "layout", "module", "formula"),
    [
        (
            *("nvfp4", "compressed-tensors", MLP),
            lambda x, part: blocks(x, part["input_global_scale"].numpy()[0]),
        ),
        (
            *("nvfp4", "modelopt", MLP),
            lambda x, part: blocks(x, 1 / part["input_scale"].numpy()),
        ),
        (
            *("nvfp4-mixed", "modelopt", f"{LAYER}.3.self_attn.o_proj"),
            lambda x, part: fixed(x, part["input_scale"].numpy()),
        ),
    ],
    ids=["nvfp4", "nvfp4-modelopt", "fp8-modelopt"],
)
def test_stored_scales_divide_or_multiply_by_their_layout(
    recipe: str, layout: str, module: str, formula: Any, dense: Path, tmp_path: Path
) -> None:
    out = with_inputs(dense, tmp_path / "out", recipe, layout)
    tensors = load_all(out)
    quantizers = input_quantizers(open_folder(out))
    ends = (".input_global_scale", ".input_scale")
    stored = {name.rpartition(".")[0] for name in tensors if name.endswith(ends)}
    assert set(quantizers) == {role_of(f"{name}.weight") for name in stored}
    part = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{module}.")}
    x = values(256)
    found = quantizers[role_of(f"{module}.weight")](torch.from_numpy(x)).numpy()
    assert (found == formula(x, part)).all()
    damaged = next(f"{module}{end}" for end in ends if f"{module}{end}" in tensors)
    rewrite(out, lambda t: t[damaged].zero_())
    with pytest.raises(TensorError, match=r"is 0\.0, expected a positive number"):
        input_quantizers(open_folder(out))


def test_config_json_says_whether_inputs_are_quantized(dense: Path, tmp_path: Path) -> None:
    """FP8 per channel without `input_activations` is W8A16; what we know not is not simulated."""
    out = run(dense, tmp_path / "out", "fp8-channel").out
    found = served_inputs(open_folder(out))
    assert found == "E4M3, each token"
    groups = read_config(out)["quantization_config"]["config_groups"]
    each = groups["group_0"]["input_activations"]
    others = ({**each, "type": "int"}, {**each, "strategy": "tensor", "dynamic": False})
    expected = ((None, "", False), (each, found, False))
    for value, text, unknown in (*expected, *((one, "", True) for one in (*others, True, "x"))):
        groups["group_0"]["input_activations"] = value
        edit_config(out, lambda c: c["quantization_config"].update(config_groups=groups))
        (out / "qwen35.json").touch()
        assert served_inputs(open_folder(out)) == text
        assert unknown_inputs(open_folder(out)) == unknown
    malformed: tuple[Any, ...] = ([], {"group_0": 1}, None)
    for groups in malformed:
        edit_config(out, lambda c: c["quantization_config"].update(config_groups=groups))  # noqa: B023
        (out / "qwen35.json").touch()
        assert served_inputs(open_folder(out)) == ""
        assert unknown_inputs(open_folder(out))


@pytest.mark.parametrize(
    ("codec", "said", "expected"),
    [
        ("nvfp4", {"config_groups": {"g": {**SCHEMES["nvfp4"].group(["Linear"])}}}, False),
        ("nvfp4", {"config_groups": {"g": {**SCHEMES["nvfp4-a4"].group(["Linear"])}}}, None),
        ("nvfp4-a4", {"config_groups": {"g": {**SCHEMES["nvfp4-a4"].group(["Linear"])}}}, True),
        ("int4", {"config_groups": {"g": {**SCHEMES["fp8-channel"].group(["Linear"])}}}, None),
        ("nvfp4-a4-modelopt", {"quant_algo": "NVFP4"}, True),
        ("nvfp4-a4-modelopt", {"quant_algo": "W4A16_NVFP4"}, None),
        ("nvfp4-modelopt", {"quant_algo": "W4A16_NVFP4"}, False),
        ("nvfp4-modelopt", {"quant_algo": ["NVFP4"]}, None),
        (
            "fp8-modelopt",
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {MLP: {"quant_algo": "FP8"}}},
            True,
        ),
    ],
)
def test_inputs_are_quantized_as_declared(
    codec: str, said: dict[str, Any], expected: bool | None
) -> None:
    assert CODECS[codec].quantizes_inputs(said)(MLP) is expected


# --- in models


@contextmanager
def hooked(model: Any, names: Iterator[str], formula: Callable[[F32], F32]) -> Iterator[None]:
    """Quantize the inputs of linear layers by a formula in NumPy."""

    def hook(_: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        [x] = inputs
        return torch.from_numpy(formula(x.reshape(-1, x.shape[-1]).numpy())).reshape(x.shape)

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(hook) for name in names]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("recipe", ["fp8", "fp8-channel"])
def test_logits_are_those_of_packed_layers_with_quantized_inputs(
    recipe: str, dense: Path, tmp_path: Path
) -> None:
    out = run(dense, tmp_path / "out", recipe).out
    model = TorchModel(out, exact=True)
    plain, found = model.logits(IDS), model.simulated_logits(IDS)
    codes = (name for name, t in load_all(out).items() if t.dtype == torch.float8_e4m3fn)
    packed = (name.removesuffix(".weight") for name in codes if name.startswith(LAYER))
    formula = partial(tokens, group=128) if recipe == "fp8" else lambda x: tokens(x, x.shape[1])
    with hooked(model.model, packed, formula):
        expected = model.logits(IDS)
    assert (found == expected).all()
    assert not np.allclose(found, plain, atol=1e-3)
    assert (model.logits(IDS) == plain).all()


def loop(experts: Any, arguments: tuple[Any, ...], outer: Any, inner: Any) -> torch.Tensor:
    """Run each token through its experts, one after the other."""
    hidden, chosen, weights = arguments
    result = torch.zeros_like(hidden)
    for i, x in enumerate(hidden):
        for place, expert in enumerate(chosen[i].tolist()):
            both = experts.gate_up_proj[expert] @ outer(expert, x)
            gate, up = both.chunk(2)
            between = inner(expert, torch.nn.functional.silu(gate) * up)
            result[i] += weights[i, place] * (experts.down_proj[expert] @ between)
    return result


def expert_calls(model: TorchModel, running: Callable[[], object]) -> list[Any]:
    """Return module, arguments and output of each call of experts."""
    calls: list[Any] = []
    handles = [
        layer.mlp.experts.register_forward_hook(lambda *call: calls.append(call))
        for layer in model.model.model.language_model.layers
    ]
    running()
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("recipe", ["fp8", "fp8-channel"])
def test_experts_quantize_what_each_of_their_matrices_reads(
    recipe: str, moe: Path, tmp_path: Path
) -> None:
    model = TorchModel(run(moe, tmp_path / "out", recipe).out, exact=True)
    plain = model.logits(IDS)

    def quantized(_: int, x: torch.Tensor) -> torch.Tensor:
        group = 128 if recipe == "fp8" else len(x)
        return torch.from_numpy(tokens(x[None].numpy(), group))[0]

    calls = expert_calls(model, lambda: model.simulated_logits(IDS))
    assert len(calls) == 4
    with torch.no_grad():
        for experts, arguments, found in calls:
            expected = loop(experts, arguments, quantized, quantized)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            near = loop(experts, arguments, lambda _, x: x, quantized)
            assert (found - expected).norm() < (near - expected).norm() / 100
    assert (model.logits(IDS) == plain).all()


def test_the_head_and_each_expert_have_quantizers_of_their_own(moe: Path) -> None:
    """The stored scales of experts differ; those of their gate and up are one."""
    model = TorchModel(moe, exact=True)
    with simulated_inputs(model.model, {role_of("lm_head.weight"): torch.zeros_like}):
        assert not model.logits(IDS).any()
    names = {"gate_proj": 1, "up_proj": 1, "down_proj": 10}
    quantizers = {
        role_of(f"{LAYER}.2.mlp.experts.{i}.{name}.weight"): partial(fp8_fixed, scale=s * 2.0**-i)
        for i in range(3)  # the last one is not packed
        for name, s in names.items()
    }

    def scaled(size: float) -> Callable[[int, torch.Tensor], torch.Tensor]:
        return lambda i, x: (
            torch.from_numpy(fixed(x.numpy(), np.float32(size * 2.0**-i))) if i < 3 else x
        )

    with simulated_inputs(model.model, quantizers):
        calls = expert_calls(model, lambda: model.logits(IDS))
    assert len({int(i) for i in calls[2][1][1].flatten()}) == 4  # tokens reach all experts
    with torch.no_grad():
        for i, (experts, arguments, found) in enumerate(calls):
            here = (scaled(1), scaled(10)) if i == 2 else (lambda _, x: x,) * 2
            expected = loop(experts, arguments, *here)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_threads_do_not_share_rounded_inputs() -> None:
    """Products round an input that they share once, but batches are computed side by side."""
    entered, other, done = threading.Event(), threading.Event(), threading.Event()
    first, second = torch.ones(1, 4), torch.full((1, 4), 3.0)

    def rounded(x: Any) -> Any:
        if x is first:
            entered.set()
            assert other.wait(5)
        return 2 * x

    layer = torch.nn.Module()
    layer.self_attn = torch.nn.ModuleDict(
        {name: torch.nn.Linear(4, 4, bias=False) for name in ("q_proj", "k_proj")}
    )
    query, key = layer.self_attn["q_proj"], layer.self_attn["k_proj"]

    def run_first() -> None:
        query(first)
        done.set()

    roles = [role_of(f"{LAYER}.3.self_attn.{name}.weight") for name in ("q_proj", "k_proj")]
    with layer_inputs(layer, dict.fromkeys(roles, rounded)):
        thread = threading.Thread(target=run_first)
        thread.start()
        assert entered.wait(5)
        query(second)
        other.set()
        assert done.wait(5)
        found = key(second)
        thread.join()
    assert torch.equal(found, key(2 * second))
