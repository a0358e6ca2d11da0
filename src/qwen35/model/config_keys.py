"""Every config.json key that publishers write or transformers reads, and its place in GGUF files.

Checkpoints that this package writes keep every key. A GGUF file stores those with a GGUF
counterpart. Each other key either has one value that llama.cpp supports, or affects no number.

Sources: config.json of the official and of NVIDIA's releases; transformers 5.23
``models/qwen3_5*/configuration_*.py``, ``configuration_utils.py``, ``modeling_rope_utils.py``;
llama.cpp 0c1e570 ``conversion/{base,qwen}.py``, ``src/models/qwen35*.cpp``; vLLM 0.32
``qwen3_next.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "SECTIONS",
    "ConfigKey",
    "KeyValue",
    "fixed_values",
    "ignored_values",
    "misplaced_keys",
    "unknown_keys",
]


@dataclass(frozen=True)
class ConfigKey:
    """What becomes of a key of config.json in a GGUF file.

    Args:
        gguf: the GGUF keys that store it, without the architecture prefix; "tensors" if the tensors
            imply it.
        only: the values llama.cpp supports, for a key that affects numbers but has no counterpart.
        why: why the key affects no number, or what llama.cpp always computes.
        reader: "others" for a key that transformers ignores as llama.cpp does, but not every
            engine; "transformers" for one that its configuration class obeys and this package does
            not.
    """

    gguf: tuple[str, ...] = ()
    only: tuple[Any, ...] = ()
    why: str = ""
    reader: str = ""


@dataclass(frozen=True)
class KeyValue:
    """A key whose value is not among the supported ones.

    Args:
        section: a key of `SECTIONS`.
        path: the key, with the sections it is in.
        value: its value.
        row: what the table says.
    """

    section: str
    path: str
    value: Any
    row: ConfigKey


def _carried(**keys: str) -> dict[str, ConfigKey]:
    return {name: ConfigKey(tuple(text.split())) for name, text in keys.items()}


def _irrelevant(why: str, names: str) -> dict[str, ConfigKey]:
    return {name: ConfigKey(why=why) for name in names.split()}


def _fixed(name: str, *only: Any, why: str, reader: str = "") -> dict[str, ConfigKey]:
    return {name: ConfigKey(only=only, why=why, reader=reader)}


_COMMON: dict[str, ConfigKey] = {
    **_carried(
        model_type="general.architecture",
        dtype="tensors",
        torch_dtype="tensors",
        quantization_config="tensors",
    ),
    "bos_token_id": ConfigKey(("tokenizer.ggml.bos_token_id",)),
    "eos_token_id": ConfigKey(("tokenizer.ggml.eos_token_id",)),
    "pad_token_id": ConfigKey(("tokenizer.ggml.padding_token_id",)),
    **_irrelevant(
        "names of the model and of the program that wrote it",
        "_name_or_path name_or_path _commit_hash architectures transformers_version model_name "
        "unsloth_fixed unsloth_version transformers.js_config",
    ),
    **_irrelevant(
        "training",
        "attention_dropout initializer_range router_aux_loss_coef output_router_logits "
        "gradient_checkpointing problem_type id2label label2id num_labels",
    ),
    **_irrelevant(
        "how an engine runs the model",
        "use_cache return_dict use_return_dict output_attentions output_hidden_states "
        "tie_last_hidden_states torchscript chunk_size_feed_forward attn_implementation "
        "_attn_implementation _attn_implementation_autoset experts_implementation "
        "_experts_implementation language_model_only",
    ),
    **_irrelevant(
        "sampling, which transformers reads from generation_config.json",
        "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens "
        "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
        "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty "
        "forced_bos_token_id forced_eos_token_id length_penalty max_length min_length "
        "no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups "
        "num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty "
        "return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p "
        "typical_p",
    ),
    **_fixed("is_encoder_decoder", False, None, why="a decoder-only model", reader="transformers"),
    **_fixed("is_causal", True, None, why="causal attention", reader="transformers"),
    **_fixed(
        "per_layer_config", None, why="the same settings in every layer", reader="transformers"
    ),
    "auto_map": ConfigKey(why="custom code, which this package never runs"),
}

_TEXT: dict[str, ConfigKey] = {
    **_COMMON,
    **_carried(
        hidden_size="embedding_length",
        intermediate_size="feed_forward_length",
        num_hidden_layers="block_count",
        num_attention_heads="attention.head_count",
        num_key_value_heads="attention.head_count_kv",
        head_dim="attention.key_length attention.value_length",
        max_position_embeddings="context_length",
        rms_norm_eps="attention.layer_norm_rms_epsilon",
        layer_types="attention.recurrent_layers",
        full_attention_interval="full_attention_interval attention.recurrent_layers",
        linear_conv_kernel_dim="ssm.conv_kernel",
        linear_key_head_dim="ssm.state_size",
        linear_num_key_heads="ssm.group_count",
        linear_num_value_heads="ssm.time_step_rank",
        linear_value_head_dim="ssm.inner_size",
        mtp_num_hidden_layers="nextn_predict_layers",
        num_experts="expert_count",
        num_experts_per_tok="expert_used_count",
        moe_intermediate_size="expert_feed_forward_length",
        shared_expert_intermediate_size="expert_shared_feed_forward_length",
        partial_rotary_factor="rope.dimension_count",
        rope_theta="rope.freq_base",
        original_max_position_embeddings="rope.scaling.original_context_length",
        vocab_size="tokenizer.ggml.tokens",
        tie_word_embeddings="tensors",
    ),
    **_fixed("hidden_act", "silu", "swish", why="SiLU in the feed-forward layers"),
    **_fixed("attention_bias", False, None, why="attention without biases"),
    **_fixed("attn_output_gate", True, None, why="attention with an output gate"),
    **_fixed(
        "output_gate_type",
        "swish",
        "silu",
        None,
        why="linear attention with a SiLU gate",
        reader="others",
    ),
    **_fixed("mlp_only_layers", [], None, why="experts in every layer", reader="others"),
    **_fixed("decoder_sparse_step", 1, None, why="experts in every layer", reader="others"),
    **_fixed("norm_topk_prob", True, None, why="expert weights summing to 1", reader="others"),
    **_fixed("mtp_use_dedicated_embeddings", False, None, why="MTP with the shared embedding"),
    **_irrelevant("the precision of states: llama.cpp keeps them in float32", "mamba_ssm_dtype"),
}

_ROPE: dict[str, ConfigKey] = {
    **_carried(
        rope_type="rope.scaling.type",
        type="rope.scaling.type",
        rope_theta="rope.freq_base",
        partial_rotary_factor="rope.dimension_count",
        mrope_section="rope.dimension_sections",
        factor="rope.scaling.factor",
        original_max_position_embeddings="rope.scaling.original_context_length",
        attention_factor="rope.scaling.yarn_attn_factor rope.scaling.attn_factor",
        mscale="rope.scaling.attn_factor",
        mscale_all_dim="rope.scaling.attn_factor",
        beta_fast="rope.scaling.yarn_beta_fast",
        beta_slow="rope.scaling.yarn_beta_slow",
        attn_factor="rope.scaling.yarn_attn_factor",
        extrapolation_factor="rope.scaling.yarn_ext_factor",
    ),
    **_irrelevant("transformers and llama.cpp always interleave", "mrope_interleaved"),
    **_irrelevant("rounding of YaRN's range: see the notes", "truncate"),
    **_irrelevant(
        "read for kinds of scaling that llama.cpp cannot compute",
        "short_factor long_factor low_freq_factor high_freq_factor",
    ),
}

_VISION: dict[str, ConfigKey] = {
    **_COMMON,
    **_carried(
        depth="vision.block_count",
        hidden_size="vision.embedding_length",
        intermediate_size="vision.feed_forward_length",
        num_heads="vision.attention.head_count",
        num_position_embeddings="vision.image_size",
        image_size="vision.image_size",
        out_hidden_size="vision.projection_dim",
        patch_size="vision.patch_size",
        spatial_merge_size="vision.spatial_merge_size",
        deepstack_visual_indexes="vision.is_deepstack_layers",
    ),
    **_fixed("hidden_act", "gelu_pytorch_tanh", "gelu_new", why="tanh GELU in the vision tower"),
    **_fixed("in_channels", 3, why="three colour channels"),
    **_fixed("temporal_patch_size", 2, why="patches of two frames"),
}

_VISION_ROPE: dict[str, ConfigKey] = {
    **_fixed("rope_theta", 10000, None, why="rope_theta 10000 in the vision tower"),
    **_fixed("rope_type", "axial", "default", None, why="a vision tower without rotary scaling"),
}

_ROOT: dict[str, ConfigKey] = {
    **_COMMON,
    **_carried(tie_word_embeddings="tensors", mtp_num_hidden_layers="nextn_predict_layers"),
    **_irrelevant(
        "tokens of images, which llama.cpp knows by name",
        "image_token_id video_token_id vision_start_token_id vision_end_token_id",
    ),
}

_NESTED = {
    "": {"text_config": "text_config", "vision_config": "vision_config"},
    "text_config": dict.fromkeys(("rope_parameters", "rope_scaling"), "rope_parameters"),
    "vision_config": {"rope_parameters": "vision_config.rope_parameters"},
}

SECTIONS: dict[str, dict[str, ConfigKey]] = {
    "": _ROOT,
    "text_config": _TEXT,
    "rope_parameters": _ROPE,
    "vision_config": _VISION,
    "vision_config.rope_parameters": _VISION_ROPE,
}
"""The table, by section; the root of a text-only config is ``text_config``."""


def _walk(
    section: str, values: Mapping[str, Any], path: str
) -> Iterator[tuple[str, str, str, Any]]:
    """Yield section, key, path and value of each key, those of nested sections included."""
    nested = _NESTED.get(section, {})
    for key, value in values.items():
        if key not in nested:
            yield section, key, f"{path}{key}", value
        elif isinstance(value, Mapping):
            yield from _walk(nested[key], value, f"{path}{key}.")


def _keys(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    return _walk("" if "text_config" in raw else "text_config", raw, "")


def unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    """Return the paths of keys missing from the table, except those that are null."""
    misplaced = set(misplaced_keys(raw))
    return [
        path
        for section, key, path, value in _keys(raw)
        if key not in SECTIONS[section] and value is not None and path not in misplaced
    ]


def misplaced_keys(raw: Mapping[str, Any]) -> list[str]:
    """Return keys of the text model at the root of a vision-language config: nothing reads them."""
    if "text_config" not in raw:
        return []
    text = {*_TEXT, *_NESTED["text_config"]} - {*_ROOT}
    return [key for key, value in raw.items() if key in text and value is not None]


def fixed_values(raw: Mapping[str, Any]) -> Iterator[KeyValue]:
    """Yield keys whose value llama.cpp does not support."""
    return (one for one in _deviating(raw) if one.row.reader != "others")


def ignored_values(raw: Mapping[str, Any]) -> Iterator[KeyValue]:
    """Yield the keys with a value that neither transformers nor llama.cpp obeys."""
    return (one for one in _deviating(raw) if one.row.reader == "others")


def _deviating(raw: Mapping[str, Any]) -> Iterator[KeyValue]:
    for section, key, path, value in _keys(raw):
        row = SECTIONS[section].get(key)
        if row is not None and row.only and not any(_same(value, one) for one in row.only):
            yield KeyValue(section, path, value, row)


def _same(value: Any, other: Any) -> bool:
    """Compare JSON values: 1 equals 1.0, but not true."""
    return isinstance(value, bool) is isinstance(other, bool) and bool(value == other)
