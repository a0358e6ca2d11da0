"""NF4 against bitsandbytes and transformers, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds
from bitsandbytes.functional import (
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import ASSET, make_checkpoint, random_tensors, tiny_config, write_checkpoint
from loading import load_model, quantize_with_transformers
from qwen35.codecs.floats import f32_from, from_f32
from qwen35.codecs.nf4 import tables as nf4_tables
from qwen35.codecs.nf4.arrays import (
    AbsmaxStatistics,
    decode_absmax,
    decode_blocks,
    encode_blocks,
    parse_state,
)
from qwen35.codecs.nf4.layout import layout, state_blob, state_width
from qwen35.errors import TensorError
from qwen35.tensors import TensorSpec
from running import load_all, read_config, run

STATE = "quant_state.bitsandbytes__nf4"
CARRIERS = {torch.bfloat16: ("BF16", torch.uint16), torch.float16: ("F16", None)}


def as_array(tensor: torch.Tensor) -> tuple[np.ndarray, str]:
    name, carrier = CARRIERS.get(tensor.dtype, ("F32", None))
    return (tensor.view(carrier) if carrier else tensor).numpy().reshape(-1), name


def same_offset(ours: float, theirs: float) -> bool:
    """Whether two means agree but for what a pairwise float32 sum may lose (2 ulp were seen)."""
    return abs(ours - theirs) <= 4 * float(np.spacing(np.float32(theirs)))


def encode(tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    values, dtype = as_array(tensor)
    absmax = np.empty(values.size // 64, np.float32)
    packed = np.empty(values.size // 2, np.uint8)
    assert encode_blocks(values, dtype, absmax, packed)
    return absmax, packed


def test_constants_are_those_of_bitsandbytes() -> None:
    assert np.array_equal(nf4_tables.LEVELS, get_4bit_type("nf4", device="cpu").numpy())
    bounds, _ = _get_4bit_quantize_bounds("nf4", torch.device("cpu"))
    assert np.array_equal(nf4_tables.BOUNDS, bounds.numpy())
    assert np.array_equal(nf4_tables.dynamic_map(), create_dynamic_map().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64), (300, 1024), (2048, 256), (1, 256)])
@pytest.mark.parametrize("tail", ["gaussian", "heavy"])
def test_codes_and_statistics_are_those_of_bitsandbytes(
    dtype: torch.dtype, shape: tuple[int, int], tail: str
) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator) * 0.02
    if tail == "heavy":
        weight = weight / (torch.rand(shape, generator=generator) + 0.01)
    weight = weight.to(dtype)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    absmax, packed = encode(weight)
    assert np.array_equal(packed, codes.numpy().reshape(-1))
    ours = AbsmaxStatistics.of(absmax, float(state.offset))
    assert np.array_equal(ours.codes, state.absmax.numpy())
    assert np.array_equal(ours.nested, state.state2.absmax.numpy())
    assert same_offset(AbsmaxStatistics.of(absmax).offset, float(state.offset))
    levels = nf4_tables.LEVELS
    values = decode_blocks(
        packed,
        decode_absmax(ours.codes, ours.nested, nf4_tables.dynamic_map(), ours.offset),
        levels,
    )
    _, name = as_array(weight)
    decoded = f32_from(from_f32(values, name), name)
    expected = dequantize_4bit(codes, state).float().numpy().reshape(-1)
    assert np.array_equal(decoded, expected)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64)
)
@settings(max_examples=200)
def test_any_block_is_coded_as_bitsandbytes_does(values: list[float]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        block = torch.zeros(64)
        block[: len(values)] = torch.tensor(values)
        weight = block.to(dtype)
        if not bool(weight.isfinite().all()):
            continue
        codes, state = quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=False
        )
        absmax, packed = encode(weight)
        assert np.array_equal(packed, codes.numpy().reshape(-1))
        assert np.array_equal(absmax, state.absmax.numpy())


@given(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=700))
@settings(max_examples=200)
def test_any_statistics_are_those_of_bitsandbytes(values: list[float]) -> None:
    absmax = np.array(values, np.float32)
    ours = AbsmaxStatistics.of(absmax)
    centred = torch.from_numpy(absmax - np.float32(ours.offset))
    codes, state = quantize_blockwise(centred, blocksize=256)
    assert np.array_equal(ours.codes, codes.numpy())
    assert np.array_equal(ours.nested, state.absmax.numpy())


@pytest.mark.parametrize("size", [1e-37, 1e-38, 2e-39, 1e-40, 1e-44])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_subnormal_numbers_alone(size: float, dtype: torch.dtype) -> None:
    weight = (torch.randn(40, 512, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
    _, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    absmax, _ = encode(weight)
    ours = AbsmaxStatistics.of(absmax, float(state.offset))
    assert np.array_equal(ours.codes, state.absmax.numpy())
    assert np.array_equal(ours.nested, state.state2.absmax.numpy())


def test_statistics_of_almost_equal_tiny_scales_do_not_overflow() -> None:
    absmax = np.array([1e-40, 2e-40, 3e-40], np.float32)
    ours = AbsmaxStatistics.of(absmax)
    decoded = decode_absmax(ours.codes, ours.nested, nf4_tables.dynamic_map(), ours.offset)
    assert np.all(np.abs(decoded - absmax) <= 1.01 * ours.nested[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("position", [0, 63, 64, 127])
def test_values_that_are_not_finite_are_seen(
    dtype: torch.dtype, value: float, position: int
) -> None:
    weight = torch.ones(128, dtype=dtype)
    weight[position] = value
    values, name = as_array(weight)
    assert not encode_blocks(values, name, np.empty(2, np.float32), np.empty(64, np.uint8))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 10**6))
def test_the_blob_has_its_width_whatever_the_offset(offset: float, rows: int) -> None:
    spec = TensorSpec("w", "BF16", (rows, 64))
    blob = state_blob(spec, offset)
    assert len(blob) == state_width(spec)
    assert len(blob) % 8 == 0
    assert parse_state(blob, "w").offset == offset
    assert parse_state(blob, "w").shape == (rows, 64)


@pytest.mark.parametrize(
    "blob",
    [b"", b"{}", b"[1]", b"\xff", b'{"quant_type": "fp4", "blocksize": 64, "shape": [1]}'],
)
def test_other_blobs_are_refused(blob: bytes) -> None:
    with pytest.raises(TensorError):
        parse_state(blob, "w")


def assert_same_as_transformers(source: Path, tmp_path: Path) -> None:
    """Compare everything transformers saves; our offsets may differ in the last place."""
    quantize_with_transformers(source, tmp_path / "theirs")
    run(source, tmp_path / "ours")
    ours, theirs = load_all(tmp_path / "ours"), load_all(tmp_path / "theirs")
    extra = set(ours) - set(theirs)
    assert extra == {name for name in ours if name.startswith("mtp.")}
    assert set(theirs) <= set(ours)
    for name, expected in theirs.items():
        got = ours[name]
        if name.endswith(STATE):
            mine, other = (json.loads(bytes(t.tolist())) for t in (got, expected))
            assert same_offset(mine.pop("nested_offset"), other.pop("nested_offset"))
            assert mine == other
            assert list(mine) == list(other)
        elif got.dtype == torch.float32 and expected.dtype == torch.bfloat16:
            assert name.endswith(("A_log", "linear_attn.norm.weight"))
            assert torch.equal(got.bfloat16(), expected)
        elif name.endswith(("absmax", "nested_absmax")):
            assert statistics_agree(ours, theirs, name)
        else:
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected), name


def statistics_agree(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], name: str
) -> bool:
    """Equal bytes if the offsets are equal; they may differ if those do."""
    base = name.rpartition(".")[0]
    states = [json.loads(bytes(t[f"{base}.{STATE}"].tolist())) for t in (ours, theirs)]
    if states[0]["nested_offset"] != states[1]["nested_offset"]:
        return bool(ours[name].shape == theirs[name].shape)
    return bool(torch.equal(ours[name], theirs[name]))


def test_dense_output_equals_transformers(dense: Path, tmp_path: Path) -> None:
    assert_same_as_transformers(dense, tmp_path)


def test_untied_output_with_32_value_heads_equals_transformers(tmp_path: Path) -> None:
    config = tiny_config(tied=False)
    config["text_config"] |= {"linear_num_value_heads": 32, "linear_num_key_heads": 16}
    source = write_checkpoint(tmp_path / "in", config, random_tensors(config), shards=2)
    assert_same_as_transformers(source, tmp_path)


def test_embedded_checkpoint_output_equals_transformers(tmp_path: Path) -> None:
    assert_same_as_transformers(ASSET, tmp_path)


def test_statistics_equal_those_of_transformers_given_its_offset(
    dense: Path, tmp_path: Path
) -> None:
    quantize_with_transformers(dense, tmp_path / "theirs")
    theirs, source = load_all(tmp_path / "theirs"), load_all(dense)
    names = [name.removesuffix(f".{STATE}") for name in theirs if name.endswith(STATE)]
    assert len(names) == 31
    for name in names:
        state = json.loads(bytes(theirs[f"{name}.{STATE}"].tolist()))
        absmax, packed = encode(source[name])
        ours = AbsmaxStatistics.of(absmax, state["nested_offset"])
        assert np.array_equal(packed, theirs[name].numpy().reshape(-1))
        assert np.array_equal(ours.codes, theirs[f"{name}.absmax"].numpy())
        assert np.array_equal(ours.nested, theirs[f"{name}.nested_absmax"].numpy())


def test_logits_are_those_of_the_model_that_transformers_quantized(
    dense: Path, tmp_path: Path
) -> None:
    """The offset's last place may turn a few weights; that is nothing beside quantization."""
    theirs = quantize_with_transformers(dense, tmp_path / "theirs")
    run(dense, tmp_path / "ours")
    ours, _ = load_model(tmp_path / "ours")
    original, _ = load_model(dense)
    ids = torch.arange(64).reshape(1, 64)
    with torch.no_grad():
        logits = [model(input_ids=ids).logits.float() for model in (ours, theirs, original)]
    between = (logits[0] - logits[1]).abs().mean()
    by_quantization = (logits[1] - logits[2]).abs().mean()
    assert float(between) < float(by_quantization) / 20


def test_layout_counts_every_byte() -> None:
    spec = TensorSpec("w", "BF16", (768, 256))
    sizes = {part.name.removeprefix("w"): part.nbytes for part in layout(spec)}
    assert sizes == {
        "": 768 * 256 // 2,
        ".absmax": 3072,
        ".quant_map": 64,
        ".nested_absmax": 48,
        ".nested_quant_map": 1024,
        f".{STATE}": state_width(spec),
    }


def test_config_is_the_one_users_know(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "out")
    assert read_config(tmp_path / "out")["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": [
            "lm_head",
            "model.visual",
            "model.language_model.embed_tokens",
            "mtp",
        ],
    }


def test_fp16_codes_are_those_of_transformers(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", dtype="float16")
    run(source, tmp_path / "out")
    ours, original = load_all(tmp_path / "out"), load_all(source)
    name = "model.language_model.layers.3.self_attn.q_proj.weight"
    codes, _ = quantize_4bit(original[name], blocksize=64, quant_type="nf4")
    assert torch.equal(ours[name], codes)
