"""Plans: golden numbers of the family, config.json and the skip list, files, and no side effects.

``python tests/test_plan.py --regenerate`` writes the golden table and golden/plan.txt anew after a
wanted change.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen35
from checkpoints import layout_of, random_tensors, tiny_config, write_checkpoint
from qwen35.checkpoint.header import parse_header
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.source import INDEX_NAME, Checkpoint, open_folder, open_published
from qwen35.codecs.nf4 import layout as nf4
from qwen35.codecs.registry import CODECS, group
from qwen35.display import bytes_of, least, size
from qwen35.errors import TensorError, UsageError
from qwen35.model.model_config import parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors, role_of
from qwen35.model.sizes import PUBLISHED
from qwen35.planning.containers import CONTAINERS
from qwen35.planning.manifest import manifest_bytes, manifest_size
from qwen35.planning.memory import peak_memory, threads_within
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import built_in, load_recipe
from qwen35.planning.rows import rows_of
from qwen35.planning.rules import Recipe, Rule
from qwen35.planning.safetensors_files import safetensors_options as plan_options
from qwen35.planning.safetensors_files import safetensors_plan
from qwen35.planning.safetensors_files.safetensors_display import (
    packed_text,
    plan_json,
    plan_text,
    roles_json,
    roles_text,
)
from qwen35.planning.safetensors_files.safetensors_options import MAX_SHARD_BYTES
from qwen35.planning.safetensors_files.safetensors_steps import _decided
from qwen35.planning.step import Step, StepTarget
from qwen35.tensors import StoredTensor, TensorSpec, Weight
from qwen35.threads import default_threads

pytestmark = pytest.mark.sentences

Golden = tuple[int, int, int, int, int, int, str]

# golden: begin
GOLDEN: dict[str, dict[str, Golden]] = {
    "Qwen3.5-0.8B": {
        "nf4": (186, 302, 0, 0, 1_008_781_739, 2, "7f5bab9b7a99"),
        "text": (0, 335, 0, 153, 1_545_736_626, 2, "c8927b1f7dc3"),
        "text-nf4": (186, 149, 0, 153, 807_559_530, 2, "d88138a26df3"),
        "fp8": (157, 331, 0, 0, 1_231_659_926, 2, "a2399dfcb473"),
        "fp8-conservative": (139, 349, 0, 0, 1_269_402_592, 2, "bc87c8cb6c85"),
        "text-fp8": (157, 178, 0, 153, 1_030_446_310, 2, "17ecf9becf36"),
        "bf16": (0, 488, 0, 0, 1_746_945_118, 2, "b555704d9a86"),
    },
    "Qwen3.5-2B": {
        "nf4": (186, 446, 0, 0, 2_511_296_052, 2, "bab9aec184d8"),
        "text": (0, 335, 0, 297, 3_885_351_626, 2, "63b84cd2161d"),
        "text-nf4": (186, 149, 0, 297, 1_848_409_682, 2, "dd132d540ac2"),
        "fp8": (157, 475, 0, 0, 3_124_461_699, 2, "e41fcc87dc9d"),
        "fp8-conservative": (139, 493, 0, 0, 3_199_948_421, 2, "1a4693016343"),
        "text-fp8": (157, 178, 0, 297, 2_461_581_878, 2, "31852dc723ae"),
        "bf16": (0, 632, 0, 0, 4_548_224_007, 2, "1e16ac30800e"),
    },
    "Qwen3.5-4B": {
        "nf4": (248, 490, 0, 0, 4_023_319_489, 2, "42080e3457c3"),
        "text": (0, 441, 0, 297, 8_652_798_307, 4, "9dac66444088"),
        "text-nf4": (248, 193, 0, 297, 3_356_231_535, 2, "353042504354"),
        "fp8": (207, 531, 0, 0, 5_647_769_124, 4, "6ceb030460d9"),
        "fp8-conservative": (183, 555, 0, 0, 5_899_391_732, 4, "7b9d97c718c8"),
        "text-fp8": (207, 234, 0, 297, 4_980_602_431, 2, "ab86578e2c3e"),
        "bf16": (0, 738, 0, 0, 9_319_898_257, 4, "e80ea02ba900"),
    },
    "Qwen3.5-9B": {
        "nf4": (248, 527, 0, 0, 9_039_044_785, 4, "e8f696bdb02d"),
        "text": (0, 442, 0, 333, 18_394_284_640, 6, "c305b6c3b881"),
        "text-nf4": (248, 194, 0, 333, 8_126_908_585, 4, "c0c2337703f4"),
        "fp8": (207, 568, 0, 0, 12_185_383_593, 5, "5d89dc5d0a6b"),
        "fp8-conservative": (183, 592, 0, 0, 12_587_984_161, 5, "3059a9bc347a"),
        "text-fp8": (207, 235, 0, 333, 11_273_272_829, 5, "cdbd0edc8431"),
        "bf16": (0, 775, 0, 0, 19_306_384_083, 6, "436c0d010821"),
    },
    "Qwen3.5-27B": {
        "nf4": (496, 703, 0, 0, 19_424_981_906, 7, "be0567241592"),
        "text": (0, 866, 0, 333, 54_641_587_064, 14, "efb8080f16f8"),
        "text-nf4": (496, 370, 0, 333, 18_503_356_706, 7, "a8efef094893"),
        "fp8": (407, 792, 0, 0, 30_867_056_745, 9, "167f3f40f952"),
        "fp8-conservative": (359, 840, 0, 0, 32_376_814_849, 10, "326bfeaa4702"),
        "text-fp8": (407, 459, 0, 333, 29_945_486_909, 9, "3bfade2c50f3"),
        "bf16": (0, 1_199, 0, 0, 55_563_138_531, 14, "c591d5a371f0"),
    },
    "Qwen3.5-35B-A3B": {
        "nf4": (350, 1_461, 0, 0, 69_813_650_740, 17, "6fd44e051ea3"),
        "text": (0, 1_478, 0, 333, 71_010_820_170, 18, "3465ecf94799"),
        "text-nf4": (350, 1_128, 0, 333, 68_920_369_124, 17, "fff36b7de95f"),
        "fp8": (31_745, 706, 0, 0, 37_470_879_167, 10, "5b2e7f1da1ed"),
        "fp8-conservative": (31_592, 859, 0, 0, 37_851_499_476, 10, "2c3f9bd2acd9"),
        "text-fp8": (31_745, 373, 0, 333, 36_575_791_737, 10, "0c20d00ab6b5"),
        "bf16": (0, 1_811, 0, 0, 71_904_049_187, 18, "9edfff35486a"),
    },
    "Qwen3.5-122B-A10B": {
        "nf4": (420, 1_529, 0, 0, 243_374_377_919, 52, "06c1db90fd27"),
        "text": (0, 1_616, 0, 333, 249_270_764_211, 64, "bbe5d0aa9468"),
        "text-nf4": (420, 1_196, 0, 333, 242_471_642_447, 52, "38eecc55fb45"),
        "fp8": (37_939, 778, 0, 0, 127_171_531_560, 28, "fb3b5b4c5ed1"),
        "fp8-conservative": (37_756, 961, 0, 0, 128_539_769_827, 28, "270dfc285d96"),
        "text-fp8": (37_939, 445, 0, 333, 126_266_634_376, 28, "b424d9e28bcf"),
        "bf16": (0, 1_949, 0, 0, 250_173_435_770, 64, "716e061674af"),
    },
    "Qwen3.5-397B-A17B": {
        "nf4": (525, 2_399, 0, 0, 795_464_300_708, 126, "ebf4ba609d8f"),
        "text": (0, 2_591, 0, 333, 805_884_396_337, 126, "13311fc38769"),
        "text-nf4": (525, 2_066, 0, 333, 794_552_104_344, 126, "404ffc54622f"),
        "fp8": (94_078, 886, 0, 0, 406_172_658_818, 84, "6dbec07292c8"),
        "fp8-conservative": (93_850, 1_114, 0, 0, 408_449_906_438, 84, "c24645705e0b"),
        "text-fp8": (94_078, 553, 0, 333, 405_254_996_463, 84, "034458edfddb"),
        "bf16": (0, 2_924, 0, 0, 806_796_513_753, 126, "ee8b7940e662"),
    },
    "Qwen3.6-27B": {
        "nf4": (496, 703, 0, 0, 19_424_981_906, 7, "be0567241592"),
        "text": (0, 866, 0, 333, 54_641_587_064, 14, "efb8080f16f8"),
        "text-nf4": (496, 370, 0, 333, 18_503_356_706, 7, "a8efef094893"),
        "fp8": (407, 792, 0, 0, 30_867_056_745, 9, "167f3f40f952"),
        "fp8-conservative": (359, 840, 0, 0, 32_376_814_849, 10, "326bfeaa4702"),
        "text-fp8": (407, 459, 0, 333, 29_945_486_909, 9, "3bfade2c50f3"),
        "bf16": (0, 1_199, 0, 0, 55_563_138_531, 14, "c591d5a371f0"),
    },
    "Qwen3.6-35B-A3B": {
        "nf4": (350, 695, 0, 0, 69_813_490_717, 17, "386e2494bb83"),
        "text": (0, 712, 0, 333, 71_010_659_435, 18, "ce76a834edc4"),
        "text-nf4": (350, 362, 0, 333, 68_920_209_445, 17, "cde603c88a6b"),
        "fp8": (31_745, 706, 0, 0, 37_470_879_167, 10, "04482c2b0bd3"),
        "fp8-conservative": (31_592, 859, 0, 0, 37_851_499_476, 10, "3b3d1081e2b9"),
        "text-fp8": (31_745, 373, 0, 333, 36_575_791_737, 10, "a2b587cdf841"),
        "bf16": (0, 1_045, 0, 0, 71_903_888_452, 18, "37ffa18023a3"),
    },
    "Qwen3.8-27B": {
        "nf4": (496, 703, 0, 0, 19_424_981_906, 7, "be0567241592"),
        "text": (0, 866, 0, 333, 54_641_587_064, 14, "efb8080f16f8"),
        "text-nf4": (496, 370, 0, 333, 18_503_356_706, 7, "a8efef094893"),
        "fp8": (407, 792, 0, 0, 30_867_056_745, 9, "167f3f40f952"),
        "fp8-conservative": (359, 840, 0, 0, 32_376_814_849, 10, "326bfeaa4702"),
        "text-fp8": (407, 459, 0, 333, 29_945_486_909, 9, "3bfade2c50f3"),
        "bf16": (0, 1_199, 0, 0, 55_563_138_531, 14, "c591d5a371f0"),
    },
}
# golden: end
"""Release and recipe to: weights encoded, copied, decoded, dropped; bytes; files; digest."""

PLANNED = ("nf4", "text", "text-nf4", "fp8", "fp8-conservative", "text-fp8", "bf16")
SIZES = [name for name in PUBLISHED if not name.endswith("-Base")]
TEXT = "model.language_model"


@lru_cache(maxsize=64)
def published_plan(size: str, recipe: str, keep: tuple[str, ...] = ()) -> Plan:
    """Plan a published size."""
    return make_plan(open_published(size), load_recipe(recipe).keeping(keep))


def golden(plan: Plan) -> Golden:
    """Return what the golden table holds of a plan."""
    ops = Counter(step.op for step in plan.steps)
    files = sum(1 for _ in plan.file_sizes())
    counts = (ops["nf4"] + ops["fp8"], ops["copy"], ops["decode"], ops["drop"])
    return (*counts, plan.nbytes, files, plan.digest[:12])


def config_of(plan: Plan) -> dict[str, Any]:
    """Parse the config.json that a plan writes."""
    parsed: dict[str, Any] = json.loads(plan.documents["config.json"])
    return parsed


def skip_list(plan: Plan) -> list[str]:
    """Return the modules that transformers is told to leave alone."""
    skip: list[str] = config_of(plan)["quantization_config"]["llm_int8_skip_modules"]
    return skip


def made_up(
    config: dict[str, Any], layout: CheckpointNaming | None = None, packed: tuple[str, ...] = ()
) -> Checkpoint:
    """Return a checkpoint of `config` without bytes, some weights of it in NF4."""
    tensors: dict[str, StoredTensor] = {}
    for spec in expected_tensors(parse_config(config), layout or layout_of(config)):
        for part in nf4.layout(spec) if spec.name in packed else (spec,):
            tensors[part.name] = StoredTensor(part, "model.safetensors", 0)
    weights, problems = group(tensors)
    assert not problems
    return Checkpoint("made up", parse_config(config), weights, CheckpointNaming.of(tensors), {})


def recipe_of(*rules: tuple[str, str], form: str = "nf4") -> Recipe:
    """Return a recipe that ends with everything plain."""
    made = [Rule(match, action, "test") for match, action in rules]
    return Recipe("test", form, "", (*made, Rule("*", "plain", "rest")), CONTAINERS["safetensors"])


# --- golden numbers


def test_golden_table_is_complete() -> None:
    assert sorted(GOLDEN) == sorted(SIZES)
    assert all(sorted(rows) == sorted(PLANNED) for rows in GOLDEN.values())


@pytest.mark.parametrize("recipe", PLANNED)
@pytest.mark.parametrize("size", SIZES)
def test_plan_of_a_published_size_is_golden(size: str, recipe: str) -> None:
    assert golden(published_plan(size, recipe)) == GOLDEN[size][recipe]


def nf4_bytes(numel: int, shape: tuple[int, ...], dtype: str = "bfloat16") -> int:
    """Return the bytes of an NF4 weight, by hand."""
    blob = (
        f'{{"quant_type": "nf4", "blocksize": 64, "dtype": "{dtype}", "shape": {list(shape)}, '
        '"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": }'
    )
    width = -(-(len(blob) + 24) // 8) * 8
    blocks = numel // 64
    return numel // 2 + blocks + 16 * 4 + 4 * -(-blocks // 256) + 256 * 4 + width


@pytest.mark.parametrize("size", SIZES)
def test_tensor_bytes_are_those_of_the_formula(size: str) -> None:
    plan = published_plan(size, "nf4")
    written = 0
    for item in plan.steps:
        spec = item.spec
        two_d = item.role.info.kind == "linear" and item.role.scope == "text"
        assert (item.op == "nf4") is two_d
        wide = 4 if spec.dtype == "F32" else 2
        written += nf4_bytes(spec.numel, spec.shape) if two_d else wide * spec.numel
    assert sum(step.nbytes for step in plan.steps) == written
    assert sum(file.nbytes - len(file.head) for file in plan.files) == written


def test_smallest_replaces_186_layers_keeps_153_visual_tensors_and_accounts_for_488() -> None:
    plan = published_plan("Qwen3.5-0.8B", "nf4")
    assert len(plan.steps) == 488
    assert sum(step.op == "nf4" for step in plan.steps) == 186 == 18 * (5 + 3) + 6 * (4 + 3)
    visual = [step for step in plan.steps if step.role.scope == "visual"]
    assert len(visual) == 153
    assert {step.op for step in visual} == {"copy"}
    written = [out.name for out in plan.outputs]
    assert len(written) == 488 + 5 * 186
    assert plan.read_bytes == 1_746_882_752


def test_one_layer_in_bytes() -> None:
    plan = published_plan("Qwen3.5-0.8B", "nf4")
    name = f"{TEXT}.layers.0.mlp.up_proj.weight"
    step = next(step for step in plan.steps if step.spec.name == name)
    assert [(out.name.removeprefix(name), out.dtype, out.nbytes) for out in step.outputs] == [
        ("", "U8", 1_835_008),
        (".absmax", "U8", 57_344),
        (".quant_map", "F32", 64),
        (".nested_absmax", "F32", 896),
        (".nested_quant_map", "F32", 1_024),
        (".quant_state.bitsandbytes__nf4", "U8", 184),
    ]
    assert nf4_bytes(3584 * 1024, (3584, 1024)) == step.nbytes


def test_text_recipe_copies_every_byte_of_the_text_model() -> None:
    plan = published_plan("Qwen3.5-9B", "text")
    visual = sum(step.weight.nbytes for step in plan.steps if step.role.scope == "visual")
    assert sum(step.nbytes for step in plan.steps) == 19_306_216_416 - visual
    assert {step.op for step in plan.steps} == {"copy", "drop"}
    assert not config_of(plan).get("quantization_config")


def test_vision_may_be_dropped_and_the_rest_packed_at_once() -> None:
    both, nf4_only = (published_plan("Qwen3.5-9B", name) for name in ("text-nf4", "nf4"))
    packed = [step.spec for step in nf4_only.steps if step.op == "nf4"]
    assert [step.spec for step in both.steps if step.op == "nf4"] == packed
    assert sum(step.op == "drop" for step in both.steps) == 333


def test_mixture_says_how_much_of_it_stays_as_it_is() -> None:
    plan = published_plan("Qwen3.5-35B-A3B", "nf4")
    experts = 41 * 3 * 256 * 512 * 2048  # 40 layers and MTP, three matrices each
    share = f"{experts / 35_951_822_704:.1%}"
    assert share == "91.8%"
    assert plan.notes == (
        f"experts stay in BF16: {share} of all parameters, because transformers cannot load them "
        "packed",
    )
    assert published_plan("Qwen3.5-9B", "nf4").notes == ()
    assert published_plan("Qwen3.5-35B-A3B", "text").notes == ()


# --- the digest


def test_digest_does_not_depend_on_the_name_or_place() -> None:
    checkpoint = open_published("Qwen3.5-0.8B")
    other = replace(checkpoint, name="elsewhere", root=Path("/elsewhere"), revision="abc")
    recipe = load_recipe("nf4")
    assert make_plan(checkpoint, recipe).digest == make_plan(other, recipe).digest


def test_digest_depends_on_all_that_decides_the_bytes() -> None:
    config = tiny_config()
    checkpoint, recipe = made_up(config), load_recipe("nf4")
    plans = [
        make_plan(checkpoint, recipe),
        make_plan(checkpoint, load_recipe("text-nf4")),
        make_plan(checkpoint, load_recipe("text-nf4"), keep_prefix=True),
        make_plan(checkpoint, load_recipe("text")),
        make_plan(checkpoint, recipe.keeping(("mlp",))),
        make_plan(checkpoint, recipe.dropping_mtp()),
        make_plan(made_up(config | {"eos_token_id": 5}), recipe),
        make_plan(made_up(tiny_config(dtype="float16")), recipe),
        make_plan(replace(checkpoint, sidecars={"tokenizer.json": 7}), recipe),
        make_plan(replace(checkpoint, sidecars={"tokenizer.json": 8}), recipe),
    ]
    digests = [plan.digest for plan in plans]
    assert len(set(digests)) == len(plans)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


# --- config.json


def test_config_keeps_all_keys_of_the_source() -> None:
    raw = tiny_config()
    config = config_of(make_plan(made_up(raw), load_recipe("nf4")))
    quantization = config.pop("quantization_config")
    assert config == raw
    assert quantization == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": ["lm_head", "model.visual", f"{TEXT}.embed_tokens", "mtp"],
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_compute_dtype_is_that_of_the_checkpoint(dtype: str) -> None:
    config = config_of(make_plan(made_up(tiny_config(dtype=dtype)), load_recipe("nf4")))
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == dtype


@pytest.mark.parametrize("moe", [False, True])
def test_text_config_is_the_text_section_with_the_keys_of_the_root(moe: bool) -> None:
    raw = tiny_config(moe=moe) | {"transformers_version": "5.1", "pad_token_id": 3, "mine": 1}
    raw["text_config"] |= {"eos_token_id": 1, "architectures": ["Old"]}
    raw["eos_token_id"] = 2
    config = config_of(make_plan(made_up(raw), load_recipe("text")))
    name = "Moe" if moe else ""
    assert next(iter(config)) == "architectures"
    assert config == {
        **raw["text_config"],
        "architectures": [f"Qwen3_5{name}ForCausalLM"],
        "model_type": f"qwen3_5{'_moe' if moe else ''}_text",
        "eos_token_id": 2,
        "pad_token_id": 3,
        "transformers_version": "5.1",
        "tie_word_embeddings": True,
    }
    vision = ("vision", "image", "video", "text_config", "mine")
    assert not [key for key in config if key.startswith(vision)]
    assert raw["text_config"]["architectures"] == ["Old"]  # the source's is left as it was


@pytest.mark.parametrize("size", SIZES)
def test_text_config_parses_to_the_same_text_model(size: str) -> None:
    plan = published_plan(size, "text-nf4")
    config, source = parse_config(config_of(plan)), plan.checkpoint.config
    assert config.model_type == f"{source.model_type}_text"
    assert config.dims == {k: v for k, v in source.dims.items() if not k.startswith("vision")}
    assert (config.layer_types, config.tied) == (source.layer_types, source.tied)
    assert (config.mtp_layers, config.dtype) == (source.mtp_layers, source.dtype)
    assert config.vision_depth == 0


def test_text_names_follow_the_class_or_stay() -> None:
    checkpoint = made_up(tiny_config())
    moved = make_plan(checkpoint, load_recipe("text"))
    stayed = make_plan(checkpoint, load_recipe("text"), keep_prefix=True)
    names = [out.name for out in stayed.outputs]
    assert any(name.startswith(f"{TEXT}.layers.") for name in names)
    assert [out.name for out in moved.outputs] == [
        name.replace("model.language_model.", "model.") for name in names
    ]
    assert skip_list(make_plan(checkpoint, load_recipe("text-nf4"), keep_prefix=True))[1] == (
        f"{TEXT}.embed_tokens"
    )


def test_text_only_source_keeps_its_names_and_class() -> None:
    raw = tiny_config(text_only=True)
    for recipe in built_in("safetensors"):
        plan = make_plan(made_up(raw), load_recipe(recipe))
        config = config_of(plan)
        config.pop("quantization_config", None)
        assert config == raw
        assert {step.op for step in plan.steps} <= {"copy", "nf4", "fp8"}
        assert all(out.name.startswith(("model.", "mtp.")) for out in plan.outputs)


def test_config_says_no_mtp_when_none_is_written() -> None:
    raw = tiny_config()
    dropped = make_plan(made_up(raw), load_recipe("nf4").dropping_mtp())
    absent = make_plan(made_up(raw, layout_of(raw, mtp=False)), load_recipe("nf4"))
    for plan in (dropped, absent):
        assert config_of(plan)["text_config"]["mtp_num_hidden_layers"] == 0
        assert "mtp" not in skip_list(plan)
    assert dropped.notes == ()
    assert absent.notes == (
        "config.json promises 1 multi-token-prediction layer(s), but the checkpoint has none: the "
        "output's config.json says 0",
    )


UP = f"{TEXT}.layers.0.mlp.up_proj.weight"


def packed_config(skip: list[str]) -> dict[str, Any]:
    """Return the config of an NF4 source."""
    quantization = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skip}
    return tiny_config() | {"quantization_config": quantization}


def test_nf4_source_passes_through_and_the_rest_is_packed() -> None:
    config = packed_config(["lm_head"])
    plan = make_plan(made_up(config, packed=(UP,)), load_recipe("nf4"))
    step = next(step for step in plan.steps if step.spec.name == UP)
    assert (step.op, step.reason) == ("copy", "linear layer; NF4 already")
    assert len(step.outputs) == 6
    plain = make_plan(made_up(tiny_config()), load_recipe("nf4"))
    assert config_of(plan) == config_of(plain)
    assert list(plan.outputs) == list(plain.outputs)


def test_packed_layers_that_must_be_plain_are_restored() -> None:
    head = "lm_head.weight"
    config = tiny_config(tied=False)
    plan = make_plan(made_up(config, packed=(UP, head)), load_recipe("nf4").keeping(("mlp",)))
    ops = {step.spec.name: step for step in plan.steps if step.op == "decode"}
    assert sorted(ops) == [head, UP]
    assert ops[head].outputs == (TensorSpec(head, "BF16", (512, 256)),)
    assert "packed in the source (nf4), restored" in ops[UP].reason


def test_text_recipe_writes_the_config_of_what_it_copies() -> None:
    skip = ["model.visual", "model.visual.blocks.0.attn.qkv"]  # without the head, as some are
    plan = make_plan(made_up(packed_config(skip), packed=(UP,)), load_recipe("text"))
    quantization = config_of(plan)["quantization_config"]
    assert quantization["bnb_4bit_quant_type"] == "nf4"
    listed = quantization["llm_int8_skip_modules"]
    assert listed[:3] == ["lm_head", "model.embed_tokens", "mtp"]
    assert {"in_proj_qkv", "model.layers.1.mlp.up_proj"} <= set(listed)
    assert "model.layers.0.mlp.up_proj" not in listed
    names = [out.name for out in plan.outputs if ".mlp.up_proj.weight." in out.name]
    assert len(names) == 5
    assert all(name.startswith("model.layers.0.mlp.up_proj.weight.") for name in names)


def test_quantization_of_the_source_goes_when_nothing_packed_is_left() -> None:
    plan = make_plan(made_up(packed_config(["lm_head"])), load_recipe("text"))
    assert "quantization_config" not in config_of(plan)


# --- the skip list

BASE_SKIP = ["lm_head", "model.visual", f"{TEXT}.embed_tokens", "mtp"]


@pytest.mark.parametrize(
    ("recipe", "keep", "skip"),
    [
        ("nf4", (), BASE_SKIP),
        ("text-nf4", (), ["lm_head", "model.embed_tokens", "mtp"]),
        ("nf4", ("linear_attn.in_proj_a",), [*BASE_SKIP, "in_proj_a"]),
        ("nf4", ("self_attn",), [*BASE_SKIP, "k_proj", "o_proj", "q_proj", "v_proj"]),
        ("nf4", ("self_attn.o_proj",), [*BASE_SKIP, "o_proj"]),
        (
            "text-nf4",
            ("mlp.gate_proj", "self_attn.q_proj"),
            ["lm_head", "model.embed_tokens", "mtp", "gate_proj", "q_proj"],
        ),
    ],
)
def test_skip_list_names_what_stays_plain(
    recipe: str, keep: tuple[str, ...], skip: list[str]
) -> None:
    assert skip_list(published_plan("Qwen3.5-0.8B", recipe, keep)) == skip


def test_shared_expert_is_named_apart_from_what_ends_alike() -> None:
    plan = published_plan("Qwen3.5-35B-A3B", "nf4", ("mlp.shared_expert_gate",))
    assert skip_list(plan) == [*BASE_SKIP, "shared_expert_gate"]


def test_ending_that_a_packed_layer_shares_is_lengthened() -> None:
    rules = (("mtp", "plain"), ("visual.blocks.attn.proj", "plain"), ("kind:linear", "nf4"))
    plan = make_plan(made_up(tiny_config()), recipe_of(*rules))
    # "proj" would skip every projection of the text model
    assert skip_list(plan) == ["lm_head", f"{TEXT}.embed_tokens", "mtp", "attn.proj"]


def test_layers_kept_one_by_one_are_named_in_full() -> None:
    packed = tuple(f"{TEXT}.layers.{i}.mlp.up_proj.weight" for i in (0, 2))
    recipe = recipe_of(("mtp", "plain"), ("visual", "plain"), ("mlp.up_proj", "keep"))
    plan = make_plan(made_up(packed_config([]), packed=packed), recipe)
    skip = skip_list(plan)
    assert [name for name in skip if "up_proj" in name] == [
        f"{TEXT}.layers.1.mlp.up_proj",
        f"{TEXT}.layers.3.mlp.up_proj",
    ]


def is_skipped(module: str, patterns: list[str]) -> bool:
    """Decide as transformers 5.23 does (``quantizers_utils.should_convert_module``)."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{p}){boundary}", module) or module.endswith(p) for p in patterns)


def linear_modules(plan: Plan) -> dict[str, bool]:
    """Return the linear modules of the output as transformers names them: whether packed."""
    modules = {}
    for step in plan.steps:
        if step.outputs and step.role.info.kind == "linear" and step.role.scope != "mtp":
            modules[step.outputs[0].name.removesuffix(".weight")] = step.outputs[0].dtype == "U8"
    return modules


LINEAR_ROLES = sorted(
    {
        role_of(spec.name).name
        for raw in (tiny_config(), tiny_config(moe=True))
        for spec in expected_tensors(parse_config(raw), layout_of(raw))
        if role_of(spec.name).info.kind == "linear" and not spec.name.startswith("mtp.")
    }
)


@settings(max_examples=60, deadline=None)
@given(
    st.booleans(),
    st.sampled_from(["nf4", "text-nf4", "tower"]),
    st.sets(st.sampled_from(LINEAR_ROLES), max_size=6),
    st.sets(st.integers(0, 3), max_size=2),
)
def test_transformers_skips_exactly_what_stays_plain(
    moe: bool, name: str, keep: set[str], packed_layers: set[int]
) -> None:
    config = tiny_config(moe=moe)
    leaf = "linear_attn.out_proj.weight"
    packed = tuple(f"{TEXT}.layers.{i}.{leaf}" for i in packed_layers if i != 3)
    rules = [(role, "keep" if role in leaf else "plain") for role in sorted(keep)]
    if name == "tower":
        recipe = recipe_of(*rules, ("mtp", "plain"), ("kind:linear", "nf4"))
    else:
        made = load_recipe(name)
        front = recipe_of(*(r for r in rules if name == "nf4" or not r[0].startswith("visual")))
        recipe = replace(made, rules=(*front.rules[:-1], *made.rules))
    plan = make_plan(made_up(config, packed=packed), recipe)
    skip = skip_list(plan)
    for module, is_packed in linear_modules(plan).items():
        assert is_skipped(module, skip) is not is_packed, module
    assert is_skipped("lm_head", skip)


# --- files


def check_files(plan: Plan) -> None:
    """Hold the files of a plan against its steps."""
    names = [out.name for out in plan.outputs]
    assert len(set(names)) == len(names)
    placed = [name for file in plan.files for name in file.offsets]
    assert sorted(placed) == sorted(names)
    for file in plan.files:
        header = parse_header(file.head[8:], file.nbytes, file.name)
        assert struct.unpack("<Q", file.head[:8])[0] == len(file.head) - 8
        outputs = {out.name: out for step in file.steps for out in step.outputs}
        assert {name: spec for name, (spec, _, _) in header.tensors.items()} == outputs
        assert {name: begin for name, (_, begin, _) in header.tensors.items()} == file.offsets
        assert file.nbytes == len(file.head) + sum(out.nbytes for out in outputs.values())
    documents = sum(map(len, plan.documents.values())) + sum(plan.copied.values())
    heads = sum(len(file.head) for file in plan.files)
    assert plan.nbytes == heads + sum(out.nbytes for out in plan.outputs) + documents
    assert plan.nbytes == sum(size for _, size in plan.file_sizes())


@pytest.mark.parametrize("recipe", built_in("safetensors"))
@pytest.mark.parametrize("size", SIZES)
def test_files_of_a_published_size_hold_its_tensors(size: str, recipe: str) -> None:
    check_files(published_plan(size, recipe))


@pytest.mark.parametrize("size", ["Qwen3.5-9B", "Qwen3.5-397B-A17B"])
def test_shards_are_full_but_never_over_unless_one_weight_is(size: str) -> None:
    plan = published_plan(size, "nf4")
    sizes = [[step.nbytes for step in file.steps] for file in plan.files]
    for i, shard in enumerate(sizes):
        assert sum(shard) <= MAX_SHARD_BYTES or len(shard) == 1
        if i + 1 < len(sizes):
            assert sum(shard) + sizes[i + 1][0] > MAX_SHARD_BYTES
    count = len(plan.files)
    assert [file.name for file in plan.files] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]


def test_index_lists_every_tensor_once() -> None:
    plan = published_plan("Qwen3.5-27B", "nf4")
    index = json.loads(plan.documents[INDEX_NAME])
    expected = {name: file.name for file in plan.files for name in file.offsets}
    assert index["weight_map"] == expected
    assert list(index["weight_map"]) == sorted(expected)
    assert index["metadata"] == {"total_size": sum(step.nbytes for step in plan.steps)}


def test_single_file_has_no_index_and_the_plain_name() -> None:
    plan = published_plan("Qwen3.5-0.8B", "nf4")
    assert [file.name for file in plan.files] == ["model.safetensors"]
    assert list(plan.documents) == ["config.json"]


def test_weight_and_its_companions_share_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_options, "MAX_SHARD_BYTES", 100_000)
    plan = make_plan(made_up(tiny_config()), load_recipe("nf4"))
    assert len(plan.files) > 10
    check_files(plan)
    for step in plan.steps:
        homes = {
            file.name for file in plan.files for out in step.outputs if out.name in file.offsets
        }
        assert len(homes) <= 1


def test_sidecars_travel_with_what_they_serve() -> None:
    sizes = {"tokenizer.json": 10, "preprocessor_config.json": 20, "LICENSE": 30}
    checkpoint = replace(made_up(tiny_config()), sidecars=sizes)
    assert make_plan(checkpoint, load_recipe("nf4")).copied == sizes
    assert make_plan(checkpoint, load_recipe("text-nf4")).copied == {
        "tokenizer.json": 10,
        "LICENSE": 30,
    }
    text = replace(made_up(tiny_config(text_only=True)), sidecars=sizes)
    assert "preprocessor_config.json" not in make_plan(text, load_recipe("nf4")).copied


def test_weight_that_blocks_do_not_fit_stays_plain() -> None:
    config = tiny_config()
    config["vision_config"] |= {"hidden_size": 34, "intermediate_size": 34}
    plan = make_plan(
        made_up(config),
        recipe_of(("mtp", "plain"), ("kind:linear", "nf4")),
    )
    odd = [step for step in plan.steps if step.reason == "not a multiple of 64 weights"]
    assert odd
    assert all(step.op == "copy" and step.spec.numel % 64 for step in odd)
    assert all(step.spec.numel % 64 == 0 for step in plan.steps if step.op == "nf4")


GROUPS = sorted(
    {
        ".".join(role_of(spec.name).name.split(".")[:count])
        for spec in expected_tensors(parse_config(tiny_config()), layout_of(tiny_config()))
        for count in (1, 2, 3)
    }
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["nf4", "text-nf4"]),
    st.lists(st.sampled_from(GROUPS), max_size=4),
    st.booleans(),
    st.integers(1_000, 10**7),
)
def test_any_keep_accounts_for_every_weight_and_byte(
    name: str, keep: list[str], drop_mtp: bool, shard: int
) -> None:
    checkpoint = made_up(tiny_config())
    recipe = load_recipe(name).keeping(tuple(keep))
    if drop_mtp:
        recipe = recipe.dropping_mtp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_options, "MAX_SHARD_BYTES", shard)
        try:
            plan = make_plan(checkpoint, recipe)
        except UsageError:  # a group asked for twice, or a part of the tower kept and the rest not
            return
    assert sorted(step.weight.name for step in plan.steps) == sorted(
        weight.name for weight in checkpoint.weights
    )
    check_files(plan)
    for step in plan.steps:
        kept = recipe.rule_for(step.role).reason == "asked for by --keep"
        assert not (kept and step.op == "nf4")
        assert bool(step.outputs) is (step.op != "drop")


# --- shown


def test_json_of_a_plan_is_complete_and_plain() -> None:
    plan = published_plan("Qwen3.5-0.8B", "nf4")
    shown = json.loads(json.dumps(plan_json(plan, 2)))
    assert shown["digest"] == plan.digest
    assert [step["weight"] for step in shown["steps"]] == [s.weight.name for s in plan.steps]
    assert len(shown["steps"]) == 488
    written = [out for step in shown["steps"] for out in step["outputs"]]
    assert sum(out["bytes"] for out in written) == sum(s.nbytes for s in plan.steps)
    manifest = shown["files"].pop("qwen35.json")
    assert shown["files"] == dict(plan.file_sizes())
    assert manifest == manifest_size(plan)


def test_text_of_a_plan_counts_up() -> None:
    plan = published_plan("Qwen3.5-0.8B", "text-nf4")
    text = plan_text(plan, 2)
    total = plan.nbytes + manifest_size(plan)
    assert re.search(rf"^total +{total:,}$", text, re.MULTILINE)
    assert "488 weights in, 1265 tensors out, 186 weights in NF4" in text
    assert f"plan {plan.digest}" in text
    assert "drop: vision tower" in text
    assert "note: side-car files (tokenizer, template) are not known here and not counted" in text
    rows = re.findall(r"^  (\S+) +(\d+) +([\d,]+) +([\d,]+)$", text, re.MULTILINE)
    assert sum(int(count) for _, count, _, _ in rows) == 488
    assert sum(int(b.replace(",", "")) for *_, b in rows) == sum(s.nbytes for s in plan.steps)


SHOWN = (("Qwen3.5-4B", "fp8"), ("Qwen3.5-0.8B", "text-nf4"), ("Qwen3.5-27B", "bf16"))
SHOWN_AS = Path(__file__).parent / "golden" / "plan.txt"


def shown_plans() -> str:
    """Return some plans as `qwen35 plan` prints them, with the same versions in all manifests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen35.planning.manifest.manifest_versions", lambda: {"qwen35": "1.2.3"})
        return "\n\n".join(plan_text(published_plan(*names), 2) for names in SHOWN) + "\n"


def test_plans_are_shown_as_they_were() -> None:
    assert shown_plans() == SHOWN_AS.read_text("utf-8")


@pytest.mark.parametrize(("shards", "lines"), [(5, 5), (6, 3), (7, 3)])
def test_many_shards_are_shown_as_a_line(shards: int, lines: int, dense: Path) -> None:
    checkpoint = open_folder(dense)
    whole = make_plan(checkpoint, load_recipe("text")).files[0]
    files = [replace(whole, name=f"model-{i}.safetensors", nbytes=i) for i in range(shards)]
    plan = replace(make_plan(checkpoint, load_recipe("text")), files=tuple(files))
    rows = [line.split() for line in plan_text(plan, 1).splitlines()]
    found = [row for row in rows if row and (row[0] == "..." or row[0].endswith(".safetensors"))]
    assert len(found) == lines
    if lines == 3:
        assert found == [
            ["model-0.safetensors", "0"],
            ["...", str(shards - 2), "more", str(sum(range(1, shards - 1)))],
            [f"model-{shards - 1}.safetensors", str(shards - 1)],
        ]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_999, "1000.00 kB"),
        (10**6, "1.00 MB"),
        (5 * 10**9, "5.00 GB"),
        (806_795_875_168, "806.80 GB"),
    ],
)
def test_sizes_are_decimal(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@given(st.integers(0, 10**13))
def test_the_least_size_is_enough_when_it_is_typed(nbytes: int) -> None:
    typed = bytes_of(least(nbytes).removesuffix(" B"))
    assert nbytes <= typed <= nbytes * 1.0101


def test_peak_memory_hardly_grows_with_the_model() -> None:
    small, large = (published_plan(f"Qwen3.5-{n}", "nf4") for n in ("0.8B", "397B-A17B"))
    assert peak_memory(small, 2) < 250_000_000
    assert peak_memory(large, 2) < 400_000_000
    assert peak_memory(small, 2) < peak_memory(small, 8)


@pytest.mark.parametrize("recipe", ["nf4", "text"])
def test_files_are_filled_in_order_as_full_as_they_may_be(recipe: str, dense: Path) -> None:
    checkpoint = open_folder(dense)
    steps = [s for s in make_plan(checkpoint, load_recipe(recipe)).steps if s.outputs]
    sums = list(itertools.accumulate(step.nbytes for step in steps))
    for most in (sums[4], sums[4] - 1, sums[9], sums[9] - sums[4], sums[-1], sums[-1] - 1):
        files: list[list[str]] = [[]]
        left = most
        for step in steps:
            if step.nbytes > left and files[-1]:
                files.append([])
                left = most
            files[-1].append(step.spec.name)
            left -= step.nbytes
        planned = make_plan(checkpoint, load_recipe(recipe), shard_bytes=most).files
        assert [[step.spec.name for step in file.steps] for file in planned] == files


def test_two_weights_of_one_name_are_refused(dense: Path) -> None:
    step = make_plan(open_folder(dense), load_recipe("text")).steps[0]
    with pytest.raises(TensorError) as caught:
        safetensors_plan._file(safetensors_plan._file_name(2, 3), [step, step])
    assert str(caught.value) == (
        "model-00002-of-00003.safetensors: two weights would be written under one name"
    )


def test_notes_of_all_kinds_are_kept(moe: Path, tmp_path: Path) -> None:
    config = tiny_config(moe=True, tied=False)
    tensors = {n: t for n, t in random_tensors(config).items() if not n.startswith("mtp.")}
    odd = {"chat_template.jinja": "{{ '<|image_pad|>' }}"}
    source = write_checkpoint(tmp_path / "in", config, tensors, sidecars=odd)
    promised, experts, template = make_plan(open_folder(source), load_recipe("text-nf4")).notes
    assert promised.startswith("config.json promises 1 multi-token-prediction layer(s), but the ")
    assert re.fullmatch(
        r"experts stay in BF16: \d\d\.\d% of all parameters, because transformers cannot load "
        "them packed",
        experts,
    )
    assert template.startswith("chat_template.jinja: its test for images or videos was not")
    assert len(make_plan(open_folder(source), load_recipe("fp8")).notes) == 1


def item_of(storage: str, shape: tuple[int, ...]) -> Any:
    """Return a linear layer that is stored so."""
    name = "model.layers.0.mlp.up_proj.weight"
    return SimpleNamespace(
        role=role_of(name),
        weight=SimpleNamespace(storage=storage, name=name),
        spec=TensorSpec(name, "BF16", shape),
    )


@pytest.mark.parametrize(
    ("action", "storage", "shape", "op"),
    [
        ("nf4", "plain", (64, 64), "nf4"),
        ("nf4", "fp8", (128, 128), "nf4"),
        ("nf4", "nf4", (64, 64), "copy"),
        ("nf4", "plain", (5, 5), "copy"),
        ("nf4", "fp8", (5, 5), "decode"),
        ("fp8", "plain", (128, 128), "fp8"),
        ("fp8", "nf4", (128, 128), "fp8"),
        ("fp8", "fp8", (128, 128), "copy"),
        ("fp8", "plain", (64, 64), "copy"),
        ("fp8", "nf4", (64, 64), "decode"),
        ("plain", "plain", (5, 5), "copy"),
        ("plain", "nf4", (64, 64), "decode"),
        ("keep", "nf4", (64, 64), "copy"),
    ],
)
def test_what_cannot_be_packed_is_copied_or_decoded(
    action: Any, storage: str, shape: tuple[int, int], op: str
) -> None:
    item = item_of(storage, shape)
    unfit = {item.weight.name: "not whole tiles"} if shape[0] % 128 else {}
    rule = Rule("mlp", action, "why")
    codec, copied, reason = _decided("r", rule, CODECS.get(action), item, unfit)
    assert StepTarget(codec, (), (), copied).op == op
    if action in ("nf4", "fp8") and op in ("copy", "decode") and storage != action:
        assert reason in ("not a multiple of 64 weights", "not whole tiles")


def test_what_is_packed_is_counted_by_format() -> None:
    nf4_plan, fp8_plan = (published_plan("Qwen3.5-0.8B", name) for name in ("nf4", "fp8"))
    both = replace(nf4_plan, steps=(*nf4_plan.steps, *fp8_plan.steps))
    assert packed_text(both) == "186 weights in NF4, 157 weights in FP8"
    assert packed_text(published_plan("Qwen3.5-0.8B", "text")) == "none packed"


def step_of(op: str, storage: str, dtype: str, numel: int) -> Step:
    """Return a step of which memory is asked."""
    spec = TensorSpec("w", dtype, (numel,))
    weight = Weight("w", storage, (StoredTensor(spec, "in", 0),))
    role = role_of("lm_head.weight")
    codec = {"copy": storage, "decode": "plain"}.get(op, op)
    target = StepTarget(codec, (), ("out",), copied=op == "copy")
    return Step(rows_of(InventoryItem(weight, role, spec)), role, "", (target,))


@pytest.mark.parametrize(
    ("steps", "pieces", "kept"),
    [
        ([], 1, 0),
        ([("copy", "plain", "BF16", 999)], 1, 0),
        ([("copy", "nf4", "BF16", 999)], 1, 0),
        ([("copy", "fp8", "F32", 999)], 1, 0),
        ([("decode", "nf4", "BF16", 999)], 3, 999 // 64 * 16),
        ([("nf4", "fp8", "BF16", 6400)], 3, 3200),
        ([("nf4", "plain", "F32", 6400), ("nf4", "plain", "BF16", 64)], 1, 3200),
        ([("fp8", "plain", "BF16", 999)], 1, 0),
        ([("fp8", "plain", "F32", 999)], 3, 0),
        ([("fp8", "plain", "F16", 999)], 3, 0),
        ([("fp8", "nf4", "F16", 999)], 3, 999 // 64 * 16),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_that_of_pieces_and_of_the_largest_statistics(
    steps: list[tuple[Any, Any, str, int]], pieces: int, kept: int, threads: int
) -> None:
    """What decodes or widens needs three times a piece; scales of NF4 are kept meanwhile."""
    plan = published_plan("Qwen3.5-0.8B", "text")
    heads = sum(len(file.head) for file in plan.files)
    plan = replace(plan, steps=tuple(step_of(*step) for step in steps))
    found = peak_memory(plan, threads)
    assert found == 175_000_000 + threads * (pieces * 20_000_000 + kept) + 8 * heads
    assert isinstance(found, int)


@pytest.mark.parametrize(
    ("threads", "memory", "found"),
    [(8, None, 8), (8, 10**9, 8), (8, 300, 4), (8, 299, 3), (4, 300, 4), (8, 150, 1), (1, 150, 1)],
)
def test_threads_are_as_many_as_memory_allows(threads: int, memory: int | None, found: int) -> None:
    asked: list[int] = []

    def needed(count: int) -> int:
        asked.append(count)
        return 100 + 50 * count

    assert threads_within(needed, threads, memory) == found
    assert all(count >= 1 for count in asked)
    assert threads_within(lambda _: 0) == default_threads()


def test_memory_too_small_for_one_thread_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        threads_within(lambda threads: 1_001 + 500 * threads, 8, 1_480, hint="or not")
    assert str(caught.value) == "--memory 1.48 kB: too little, expected at least 1.51 kB; or not"
    with pytest.raises(UsageError) as caught:
        threads_within(lambda threads: 2_000, 8, 1_480)
    assert str(caught.value) == "--memory 1.48 kB: too little, expected at least 2.00 kB"


def test_roles_are_shown_with_their_meaning() -> None:
    rows = roles_json()
    names = [row["role"] for row in rows]
    assert {"mlp.up_proj", "visual.blocks.norm1", "mtp.fc", "mlp.experts.gate_up_proj"} <= set(
        names
    )
    assert all(row["meaning"] and row["kind"] and row["shape"] for row in rows)


def test_roles_are_a_table_that_folds() -> None:
    wide = roles_text(200).splitlines()
    assert wide[0].split() == ["role", "kind", "meaning"]
    assert len(wide) == 1 + len({(row["role"], row["kind"]) for row in roles_json()})
    (experts,) = (line for line in wide if line.startswith("mlp.experts.down_proj "))
    meanings = [row["meaning"] for row in roles_json() if row["role"] == "mlp.experts.down_proj"]
    assert experts.split(None, 2)[2] == "; or ".join(meanings)
    assert len(meanings) == 2
    assert max(map(len, roles_text(60).splitlines())) <= 60 < max(map(len, wide))


def test_manifest_size_is_exact_whatever_the_hashes() -> None:
    plan = published_plan("Qwen3.5-0.8B", "nf4")
    hashes = {n: hashlib.sha256(n.encode()).hexdigest() for n, _ in plan.file_sizes()}
    manifest = manifest_bytes(plan, hashes)
    assert len(manifest) == manifest_size(plan)
    parsed = json.loads(manifest)
    assert parsed["plan"] == plan.digest
    assert parsed["source"] == {"folder": "Qwen3.5-0.8B"}
    assert parsed["files"]["config.json"]["sha256"] == hashes["config.json"]
    assert {file: dict.keys(table) for file, table in parsed["tensors"].items()} == {
        file.name: file.offsets.keys() for file in plan.files
    }


def test_manifest_names_repository_and_commit_but_no_path() -> None:
    checkpoint = open_published("Qwen3.5-0.8B")
    local = replace(checkpoint, name="/home/someone/secret/model")
    remote = replace(checkpoint, repo="owner/name", revision="a" * 40)
    for source, expected in (
        (local, {"folder": "model"}),
        (remote, {"repo": "owner/name", "revision": "a" * 40}),
    ):
        plan = make_plan(source, load_recipe("text"))
        raw = manifest_bytes(plan, {name: "0" * 64 for name, _ in plan.file_sizes()})
        assert json.loads(raw)["source"] == expected
        assert b"secret" not in raw


# --- no side effects


def test_plan_makes_no_file_and_reads_no_weight(tmp_path: Path) -> None:
    config = tiny_config()
    source = write_checkpoint(tmp_path / "source", config, random_tensors(config))
    before = {path: path.stat() for path in tmp_path.rglob("*")}
    plan = make_plan(open_folder(source), load_recipe("nf4"))
    plan_json(plan, 1)
    after = {path: path.stat() for path in tmp_path.rglob("*")}
    assert {p: (s.st_mtime_ns, s.st_size) for p, s in before.items()} == {
        p: (s.st_mtime_ns, s.st_size) for p, s in after.items()
    }


_HEAVY = (
    "torch numpy numba transformers bitsandbytes safetensors rich huggingface_hub httpx2 jinja2"
)
_SCRIPT = """
import sys
from qwen35.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print(code, [name for name in HEAVY.split() if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "Qwen3.5-0.8B"],
        ["plan", "Qwen3.5-35B-A3B", "--recipe", "text-nf4", "--json"],
        ["plan", "--roles"],
        ["--help"],
        ["plan", "--help"],
        ["convert", "--help"],
        ["--version"],
        [],
    ],
    ids=" ".join,
)
def test_heavy_modules_stay_out(arguments: list[str], tmp_path: Path) -> None:
    script = f"HEAVY = {_HEAVY!r}\n{_SCRIPT}"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(qwen35.__file__).parent.parent)},
        check=False,
    )
    assert done.stderr == "0 []\n"
    assert done.stdout
    assert list(tmp_path.iterdir()) == []


def regenerate() -> None:
    """Write the golden table of this file, and golden/plan.txt, anew."""
    SHOWN_AS.write_text(shown_plans(), "utf-8")
    rows = []
    for name in SIZES:
        cells = {recipe: golden(published_plan(name, recipe)) for recipe in PLANNED}
        lines = [f'        "{recipe}": ({_row(cell)}),' for recipe, cell in cells.items()]
        rows.append("\n".join([f'    "{name}": {{', *lines, "    },"]))
    table = "\n".join(["GOLDEN: dict[str, dict[str, Golden]] = {", *rows, "}"])
    path = Path(__file__)
    begin, end = "# golden: begin\n", "\n# golden: end"
    text = path.read_text()
    before, _, rest = text.partition(begin)
    path.write_text(before + begin + table + end + rest.partition(end)[2])


def _row(cell: Golden) -> str:
    return ", ".join([*(f"{value:_}" for value in cell[:-1]), f'"{cell[-1]}"'])


if __name__ == "__main__":
    if sys.argv[1:] != ["--regenerate"]:
        sys.exit("usage: python tests/test_plan.py --regenerate")
    regenerate()
