"""Stored tensors grouped into weights: NF4 and FP8 parts, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35.codecs.fp8.layout import SCALE as FP8_SCALE
from qwen35.codecs.nf4.layout import PARTS as NF4_PARTS
from qwen35.codecs.nf4.layout import STATE as NF4_STATE
from qwen35.codecs.registry import group
from qwen35.errors import TensorError
from qwen35.tensors import StoredTensor, TensorSpec, Weight

NESTED = ("nested_absmax", "nested_quant_map")


def stored(*rows: tuple[str, str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """Return stored tensors that lie one after the other in a file."""
    tensors, position = {}, 0
    for name, dtype, shape in rows:
        spec = TensorSpec(name, dtype, shape)
        tensors[name] = StoredTensor(spec, "f.safetensors", position)
        position += spec.nbytes
    return tensors


def nf4_rows(name: str, parts: Iterable[str] = NF4_PARTS) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return an NF4 weight of 128 values and these companions."""
    rows = {
        "absmax": ("U8", (2,)),
        "quant_map": ("F32", (16,)),
        "nested_absmax": ("F32", (1,)),
        "nested_quant_map": ("F32", (256,)),
        NF4_STATE: ("U8", (160,)),
    }
    return [(name, "U8", (64, 1)), *((f"{name}.{part}", *rows[part]) for part in parts)]


def grouped(*rows: tuple[str, str, tuple[int, ...]]) -> tuple[Weight, ...]:
    """Group tensors with which nothing is wrong."""
    weights, problems = group(stored(*rows))
    assert not problems
    return weights


def refusal(*rows: tuple[str, str, tuple[int, ...]]) -> str:
    """Return the sentence about the one thing that is wrong."""
    _, [problem] = group(stored(*rows))
    assert isinstance(problem, TensorError)
    return str(problem)


def test_plain_tensors_stay_alone_and_in_order() -> None:
    tensors = stored(("b", "BF16", (2,)), ("a", "F32", ()), ("c", "F16", (1, 1)))
    weights, problems = group(tensors)
    assert not problems
    assert [(w.name, w.storage, len(w.parts)) for w in weights] == [
        ("b", "plain", 1),
        ("a", "plain", 1),
        ("c", "plain", 1),
    ]
    assert weights[0].main is tensors["b"]
    assert [w.nbytes for w in weights] == [4, 4, 2]


def test_nf4_weight_takes_its_five_companions() -> None:
    tensors = stored(*nf4_rows("w"), ("n", "BF16", (4,)))
    (packed, plain), problems = group(tensors)
    assert not problems
    assert (packed.name, packed.storage) == ("w", "nf4")
    assert [part.spec.name for part in packed.parts] == [
        "w",
        "w.absmax",
        "w.quant_map",
        "w.nested_absmax",
        "w.nested_quant_map",
        "w.quant_state.bitsandbytes__nf4",
    ]
    assert packed.nbytes == 64 + 2 + 64 + 4 + 1024 + 160
    assert packed.main is tensors["w"]
    assert packed.part(".absmax") is tensors["w.absmax"]
    assert packed.part(".nothing") is None
    assert plain.name == "n"


def test_nf4_weight_without_double_quantization_has_four_parts() -> None:
    [weight] = grouped(*nf4_rows("w", ("absmax", "quant_map", NF4_STATE)))
    assert (weight.storage, len(weight.parts)) == ("nf4", 4)


def test_fp8_weight_takes_its_scale() -> None:
    tensors = stored(
        ("w.weight_scale_inv", "BF16", (1, 1)),
        ("w.weight", "F8_E4M3", (128, 128)),
        ("n.weight", "BF16", (128,)),
    )
    (packed, plain), problems = group(tensors)
    assert not problems
    assert (packed.name, packed.storage) == ("w.weight", "fp8")
    assert packed.part(FP8_SCALE) is tensors["w.weight_scale_inv"]
    assert packed.nbytes == 128 * 128 + 2
    assert plain == Weight("n.weight", "plain", (tensors["n.weight"],))


@given(st.permutations([*nf4_rows("w"), ("v", "F8_E4M3", (1, 1)), ("v_scale_inv", "F32", (1, 1))]))
def test_grouping_does_not_depend_on_the_order(
    rows: list[tuple[str, str, tuple[int, ...]]],
) -> None:
    weights = {w.name: w for w in grouped(*rows)}
    assert {w.name: (w.storage, len(w.parts)) for w in weights.values()} == {
        "w": ("nf4", 6),
        "v": ("fp8", 2),
    }
    assert [p.spec.name for p in weights["w"].parts] == ["w", *(f"w.{p}" for p in NF4_PARTS)]


@pytest.mark.parametrize("missing", NF4_PARTS)
def test_nf4_weight_with_a_missing_companion_is_refused(missing: str) -> None:
    parts = [part for part in NF4_PARTS if part != missing]
    assert refusal(*nf4_rows("w", parts)) == (
        f"w: packed, but w.{missing} is missing; "
        "it cannot be decoded: start from the original checkpoint"
    )


@pytest.mark.parametrize(
    ("name", "dtype", "found"),
    [
        ("w", "U8", "U8 data without the tensors that give it meaning"),
        ("w", "F8_E4M3", "F8_E4M3 data without the tensors that give it meaning"),
        ("w.absmax", "F32", "the weight it belongs to is missing"),
        ("w.quant_map", "F32", "the weight it belongs to is missing"),
        ("w.nested_absmax", "F32", "the weight it belongs to is missing"),
        ("w.nested_quant_map", "F32", "the weight it belongs to is missing"),
        (f"w.{NF4_STATE}", "U8", "the weight it belongs to is missing"),
        ("w.weight_scale_inv", "BF16", "the weight it belongs to is missing"),
    ],
)
def test_orphan_is_refused(name: str, dtype: str, found: str) -> None:
    assert refusal((name, dtype, (8,))) == (
        f"{name}: {found}; the checkpoint was saved incompletely: start from the original"
    )


def test_every_problem_is_reported() -> None:
    rows = [("u", "U8", (8,)), ("v.absmax", "F32", (1,)), *nf4_rows("w", ("absmax",))]
    weights, problems = group(stored(*rows))
    assert sorted(problem.subject for problem in problems) == ["u", "v.absmax", "w"]
    assert {(weight.name, weight.storage) for weight in weights} == {
        ("u", "plain"),
        ("w", "plain"),
    }


def test_nf4_companions_beside_a_plain_weight_are_refused() -> None:
    rows = nf4_rows("w")
    rows[0] = ("w", "BF16", (2, 64))
    assert refusal(*rows) == "w: BF16 beside nf4 companions, expected U8"


def test_fp8_scale_beside_a_plain_weight_is_refused() -> None:
    sentence = refusal(("w", "BF16", (2, 64)), ("w_scale_inv", "BF16", (1, 1)))
    assert sentence == "w: BF16 beside fp8 companions, expected F8_E4M3"


def test_orphan_among_whole_weights_is_found() -> None:
    sentence = refusal(*nf4_rows("w"), ("v.absmax", "U8", (2,)))
    assert sentence.startswith("v.absmax: the weight it belongs to is missing")


def test_companion_of_a_companion_is_refused() -> None:
    sentence = refusal(*nf4_rows("w"), ("w.absmax.absmax", "U8", (1,)))
    assert sentence.startswith("w.absmax: packed, but w.absmax.quant_map is missing")


def test_other_dtypes_pass_here_and_are_judged_by_the_inventory() -> None:
    [weight] = grouped(("w", "F8_E5M2", (2,)))
    assert weight.storage == "plain"


def test_no_tensors_are_no_weights() -> None:
    assert group({}) == ((), [])


@given(
    st.sets(st.sampled_from(["", *(f".{p}" for p in NF4_PARTS), FP8_SCALE])),
    st.sampled_from(["U8", "F8_E4M3", "BF16", "F32"]),
)
def test_every_tensor_is_in_exactly_one_weight_or_refused(suffixes: set[str], dtype: str) -> None:
    tensors = stored(*((f"w{suffix}", dtype, (4,)) for suffix in sorted(suffixes)))
    weights, problems = group(tensors)
    if problems:
        return
    parts = [part.spec.name for weight in weights for part in weight.parts]
    assert sorted(parts) == sorted(tensors)
