"""NF4 in config.json: modules are skipped as transformers skips them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35.codecs.nf4.config import is_skipped

pytestmark = pytest.mark.sentences


def test_skip_rule_is_that_of_transformers() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    modules = [
        "lm_head",
        "model.visual.blocks.0.attn.qkv",
        "model.language_model.layers.1.mlp.up_proj",
        "model.language_model.layers.11.linear_attn.in_proj_a",
        "mtp.fc",
    ]
    lists = [
        ["lm_head"],
        ["visual"],
        ["model.visual"],
        ["in_proj_a"],
        ["layers.1"],
        ["up_proj", "mtp"],
        ["model.language_model.layers.1"],
        ["model.language_model.layers.*"],
        [],
        ["mlp.up"],
    ]
    for module in modules:
        for skip in lists:
            assert is_skipped(module, skip) == (not should_convert_module(module, skip))


@given(st.text("abl.1_", max_size=8), st.text("abl.1_", max_size=12))
def test_skip_rule_is_that_of_transformers_on_any_name(entry: str, module: str) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert is_skipped(module, [entry]) == (not should_convert_module(module, [entry]))
