"""Configs with one key changed, and the keys that llama.cpp's converter writes for each.

    make golden        # or: python tests/golden_config.py LLAMA_CPP

rewrites ``tests/golden/gguf-config.json``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import make_checkpoint, tiny_config

__all__ = ["GOLDEN", "VARIANTS", "upstream_keys", "varied"]

GOLDEN = Path(__file__).parent / "golden" / "gguf-config.json"

Config = dict[str, Any]


def _text(**keys: Any) -> Callable[[Config], None]:
    """Set keys of the text model; None removes one."""

    def change(config: Config) -> None:
        _put(config.get("text_config", config), keys)

    return change


def _rope(**keys: Any) -> Callable[[Config], None]:
    """Set parameters of the rotary embedding; None removes one."""

    def change(config: Config) -> None:
        _put(config.get("text_config", config)["rope_parameters"], keys)

    return change


def _both(*changes: Callable[[Config], None]) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for one in changes:
            one(config)

    return change


def _put(section: Config, keys: Config) -> None:
    for key, value in keys.items():
        if value is None:
            section.pop(key, None)
        else:
            section[key] = value


def _yarn(**keys: Any) -> Callable[[Config], None]:
    return _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024, **keys)


_LEGACY = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}

VARIANTS: dict[str, Callable[[Config], None]] = {
    "as it is": _text(),
    "hidden_size": _text(hidden_size=512),
    "intermediate_size": _text(intermediate_size=1024),
    "num_attention_heads": _text(num_attention_heads=8),
    "num_key_value_heads": _text(num_key_value_heads=2),
    "head_dim": _text(head_dim=64),
    "num_hidden_layers": _text(
        num_hidden_layers=2, layer_types=["full_attention", "linear_attention"]
    ),
    "max_position_embeddings": _text(max_position_embeddings=1048576),
    "max_position_embeddings absent": _text(max_position_embeddings=None),
    "rms_norm_eps": _text(rms_norm_eps=1e-5),
    "rms_norm_eps absent": _text(rms_norm_eps=None),
    "layer_types": _text(layer_types=["full_attention"] + ["linear_attention"] * 3),
    "layer_types absent": _text(layer_types=None),
    "full_attention_interval": _text(full_attention_interval=2),
    "linear_conv_kernel_dim": _text(linear_conv_kernel_dim=3),
    "linear_key_head_dim": _text(linear_key_head_dim=128, linear_value_head_dim=128),
    "linear_num_key_heads": _text(linear_num_key_heads=4),
    "linear_num_value_heads": _text(linear_num_value_heads=8),
    "rope_theta": _rope(rope_theta=5000000.0),
    "rope_theta absent": _rope(rope_theta=None),
    "rope_theta beside": _both(_rope(rope_theta=None), _text(rope_theta=1000000)),
    "rope_theta at the root": _both(
        _rope(rope_theta=None), lambda config: config.update(rope_theta=1000000)
    ),
    "rope_parameters absent": _text(rope_parameters=None),
    "partial_rotary_factor": _rope(partial_rotary_factor=0.5),
    "partial_rotary_factor absent": _rope(partial_rotary_factor=None),
    "partial_rotary_factor beside": _both(
        _rope(partial_rotary_factor=None), _text(partial_rotary_factor=0.5)
    ),
    "mrope_section": _rope(mrope_section=[8, 4, 4]),
    "mrope_section absent": _rope(mrope_section=None),
    "default with a factor": _rope(factor=4.0),
    "linear": _rope(rope_type="linear", factor=2.0),
    "linear by its old name": _rope(rope_type=None, type="linear", factor=2.0),
    "yarn": _yarn(),
    "yarn from the whole length": _rope(rope_type="yarn", factor=2.0),
    "yarn with betas": _yarn(beta_fast=16.0, beta_slow=2.0),
    "yarn with an extrapolation factor": _yarn(extrapolation_factor=0.5),
    "yarn with the usual attention": _yarn(attention_factor=1.1386294361119891),
    "yarn in rope_scaling": _text(rope_scaling=_LEGACY),
    "yarn in rope_scaling alone": _both(
        _text(rope_scaling=_LEGACY, rope_theta=1000000), _text(rope_parameters=None)
    ),
    "yarn with an attention factor": _yarn(attention_factor=1.5),
    "yarn with mscale": _yarn(mscale=2.0, mscale_all_dim=1.0),
    "yarn from a length beside": _both(
        _rope(rope_type="yarn", factor=4.0), _text(original_max_position_embeddings=512)
    ),
    "tie_word_embeddings": lambda config: config.update(tie_word_embeddings=False),
    "moe": lambda config: config.update(tiny_config(moe=True)),
    "num_experts": lambda config: _text(num_experts=8)(_moe(config)),
    "num_experts_per_tok": lambda config: _text(num_experts_per_tok=3)(_moe(config)),
    "num_experts_per_tok absent": lambda config: _text(num_experts_per_tok=None)(_moe(config)),
    "moe_intermediate_size": lambda config: _text(moe_intermediate_size=64)(_moe(config)),
    "shared_expert_intermediate_size": lambda config: _text(shared_expert_intermediate_size=64)(
        _moe(config)
    ),
}
"""Each key of the text model that decides a key of the file, changed or left out."""


def _moe(config: Config) -> Config:
    config.update(tiny_config(moe=True))
    return config


def varied(name: str) -> Config:
    """Return the config of a variant."""
    config = tiny_config()
    VARIANTS[name](config)
    return config


def upstream_keys(llama: Path, work: Path) -> dict[str, Config]:
    """Run the converter on every variant; return its keys and values."""
    weights = make_checkpoint(work / "weights")
    jobs = []
    for i, name in enumerate(VARIANTS):
        model = work / f"variant-{i}"
        model.mkdir()
        for path in weights.iterdir():
            if path.name != "config.json":
                (model / path.name).symlink_to(path)
        (model / "config.json").write_text(json.dumps(varied(name)))
        job = {"model": str(model), "out": str(work / f"{i}.json"), "type": "f16"}
        jobs.append({**job, "mmproj": False, "mtp": True, "keys": True})
    script = Path(__file__).with_name("upstream_convert.py")
    command = [sys.executable, str(script), str(llama)]
    subprocess.run(command, input=json.dumps(jobs), text=True, check=True, capture_output=True)
    return {name: json.loads((work / f"{i}.json").read_text()) for i, name in enumerate(VARIANTS)}


def main() -> None:
    """Write the golden file."""
    with tempfile.TemporaryDirectory() as folder:
        rows = upstream_keys(Path(sys.argv[1]), Path(folder))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(keys)}" for name, keys in rows.items())
    GOLDEN.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
