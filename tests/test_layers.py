"""Sets of layers as recipes spell them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35.errors import UsageError
from qwen35.planning.layers import parse_layers, spell_layers

pytestmark = pytest.mark.sentences


@given(st.sets(st.integers(0, 200), min_size=1))
def test_what_is_spelled_is_read(layers: set[int]) -> None:
    assert parse_layers("x", spell_layers(layers)) == layers


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([3], "3"),
        ([3, 4], "3-4"),
        ([5, 3, 4], "3-5"),
        ([0, 2, 4], "0, 2, 4"),
        ([9, 0, 1, 2, 7, 8], "0-2, 7-9"),
        ([10, 11, 2, 9], "2, 9-11"),
        ([1, 1, 1], "1"),
    ],
)
def test_layers_are_spelled_as_short_as_it_goes(layers: list[int], text: str) -> None:
    assert spell_layers(layers) == text


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0", {0}),
        (" 4 ", {4}),
        ("2-2", {2}),
        ("1 - 3", {1, 2, 3}),
        ("7,0-1 , 9", {0, 1, 7, 9}),
        ("9999", {9999}),
        ("9998-9999", {9998, 9999}),
    ],
)
def test_layers_are_read(text: str, layers: set[int]) -> None:
    assert parse_layers("x", text) == layers


@pytest.mark.parametrize(
    "text",
    ["", "3-1", "a", "1-", "1;2", "10000", "0-10000", "0-99999", "1.5", 3, None, "-1", "1,", "1 2"],
)
def test_layers_refused(text: object) -> None:
    with pytest.raises(UsageError) as caught:
        parse_layers("rule 2", text)
    expected = 'numbers and ranges such as "0-3, 7"'
    assert str(caught.value) == f"rule 2: layers {text!r}, expected {expected}"
