"""The adapter_config.json of a PEFT adapter: which modules it changes, and by how much.

Keys and meanings are those of peft 0.21 (``LoraConfig``). A key that would change the result and is
not listed here is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from qwen35.errors import ConfigError
from qwen35.linear_regex import MOST_PATTERNS, LinearPattern, compile_linear

__all__ = ["ADAPTER_CONFIG", "AdapterConfig", "ModuleNames", "ends", "parse_adapter_config"]

ADAPTER_CONFIG = "adapter_config.json"

_READ = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
_NEUTRAL = {
    "auto_mapping",
    "lora_B_layout",
    "unsloth_fused_expert_lora",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
"""Keys that do not matter once an adapter is trained."""

_KEEPING_BASE = ("gaussian", "eva", "orthogonal")
"""Names of initializations that leave the base's weights as they are; others change them too."""

_STACKS = ("gate_up_proj", "down_proj")
_ORDERS = ("rank_major", "grouped_by_expert")
_MOST_RANK = 2**16
_MOST_TOKENS = 2**24
_HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
_NUMBERED = re.compile(r"\.(\d{1,6})\.", re.ASCII)


@dataclass(frozen=True)
class ModuleNames:
    """Modules selected by names, by ends of names or by a pattern.

    Args:
        names: whole names, or ends of names after a dot.
        pattern: matches whole names; instead of `names`.
    """

    names: frozenset[str] = frozenset()
    pattern: LinearPattern | None = None

    def __contains__(self, module: str) -> bool:
        if self.pattern is not None:
            return self.pattern.fullmatch(module) is not None
        parts = module.split(".")
        return any(".".join(parts[i:]) in self.names for i in range(len(parts)))


@dataclass(frozen=True)
class AdapterConfig:
    """A checked adapter_config.json.

    Args:
        rank: the rank of modules that no pattern names.
        alpha: their alpha.
        ranks: pattern to rank; the first one that matches counts.
        alphas: pattern to alpha.
        root_scaled: rsLoRA: alpha is divided by the square root of the rank.
        dora: whether the rows' magnitudes were trained (DoRA).
        targets: the modules it changes; None for every linear one but the head.
        excluded: modules it does not change.
        saved: ends of the names of modules that it holds whole.
        layers: the only layers it changes; None for all.
        stacks: names of lists that layers are numbered in; any if empty.
        biases: whether it may hold biases.
        parameters: names, or ends of names after a dot, of parameters that it changes directly.
        tokens: module, or the end of its name, to the rows that it replaces, in stored order.
        grouped: stacks of experts whose left matrices have the ranks of an expert side by side, as
            Unsloth saves them, and not the experts of a rank, as peft does.
        base: the Hub id of the model that it was trained on, if it says so.
    """

    rank: int
    alpha: float
    ranks: tuple[tuple[LinearPattern, int], ...] = ()
    alphas: tuple[tuple[LinearPattern, float], ...] = ()
    root_scaled: bool = False
    dora: bool = False
    targets: ModuleNames | None = None
    excluded: ModuleNames = ModuleNames()
    saved: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    stacks: tuple[LinearPattern, ...] = ()
    biases: bool = False
    parameters: tuple[str, ...] = ()
    tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()
    grouped: frozenset[str] = frozenset()
    base: str = ""

    def rank_of(self, module: str) -> int:
        """Return the rank of a module."""
        return next((rank for pattern, rank in self.ranks if pattern.fullmatch(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """Return what the product of a module's two matrices is multiplied by."""
        found = (alpha for pattern, alpha in self.alphas if pattern.fullmatch(module))
        rank = self.rank_of(module)
        return next(found, self.alpha) / (math.sqrt(rank) if self.root_scaled else rank)

    def saves(self, module: str) -> bool:
        """Return whether a module is held whole."""
        return module.endswith(self.saved) if self.saved else False

    def changes(self, module: str, *, linear: bool) -> bool:
        """Return whether a module is a target.

        Args:
            module: its name.
            linear: whether it is a linear layer other than the head.
        """
        if module in self.excluded or any(p.match(module) for p in self._whole):
            return False
        if self.targets is None:
            return linear
        return module in self.targets and (self.targets.pattern is not None or self._in(module))

    def changes_parameter(self, name: str) -> bool:
        """Return whether a parameter is a target by its own name."""
        return any(ends(name, target) for target in self.parameters)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """Return the rows of a module that it replaces; none if it is not named."""
        return next((rows for name, rows in self.tokens if ends(module, name)), ())

    @cached_property
    def _whole(self) -> tuple[LinearPattern, ...]:
        # peft: a module that is saved whole, or lies within one, is no target
        return tuple(
            _compiled("modules_to_save", rf"(?:^|.*\.)(?:{m})(?:$|\..*)") for m in self.saved
        )

    def _in(self, module: str) -> bool:
        """Return whether a module lies in one of the layers."""
        if self.layers is None or module in (self.targets or ModuleNames()).names:
            return True
        number = _NUMBERED.search(module)
        if number is None or int(number[1]) not in self.layers:
            return False
        stack = module[: number.start()]
        return not self.stacks or any(pattern.fullmatch(stack) for pattern in self.stacks)


def ends(name: str, end: str) -> bool:
    """Return whether a name is `end`, or ends with it after a dot."""
    return name == end or name.endswith(f".{end}")


def parse_adapter_config(raw: object) -> AdapterConfig:
    """Check a parsed adapter_config.json.

    Raises:
        ConfigError: a value is malformed, or asks for something that cannot be merged.
    """
    if not isinstance(raw, dict):
        raise ConfigError(ADAPTER_CONFIG, "not an object", expected="the settings of an adapter")
    _refuse(raw)
    targets = _modules(raw, "target_modules")
    parameters = _parameters(raw)
    if targets is None and parameters:
        targets = ModuleNames()
    if targets is None:
        raise ConfigError(ADAPTER_CONFIG, "no target_modules", expected="names or a pattern")
    layers = _layers(raw.get("layers_to_transform"))
    return AdapterConfig(
        rank=_rank("r", raw.get("r")),
        alpha=_alpha("lora_alpha", raw.get("lora_alpha")),
        ranks=_patterns(raw, "rank_pattern", _rank),
        alphas=_patterns(raw, "alpha_pattern", _alpha),
        root_scaled=_flag(raw, "use_rslora"),
        dora=_flag(raw, "use_dora"),
        targets=None if raw.get("target_modules") == "all-linear" else targets,
        excluded=_modules(raw, "exclude_modules") or ModuleNames(),
        saved=_saved(raw),
        layers=layers,
        stacks=_stacks(raw) if layers is not None else (),
        biases=_choice(raw, "bias", ("none", "all", "lora_only")) != "none",
        parameters=parameters,
        tokens=_tokens(raw.get("trainable_token_indices")),
        grouped=_grouped_stacks(raw) if parameters else frozenset(),
        base=_base(raw),
    )


def _refuse(raw: Mapping[str, Any]) -> None:
    """Refuse everything that changes the result and is not read."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        found = f"peft_type {str(kind)[:40]!r}"
        raise ConfigError(ADAPTER_CONFIG, found, expected="LORA", hint="merge it with peft")
    if _flag(raw, "fan_in_fan_out"):
        found = "fan_in_fan_out: weights with rows and columns swapped"
        raise ConfigError(ADAPTER_CONFIG, found, expected="those of linear layers")
    init = raw.get("init_lora_weights", True)
    if type(init) is not bool and init not in _KEEPING_BASE:
        found = f"init_lora_weights {str(init)[:40]!r}, which changes the base's weights too"
        hint = "save it with peft's path_initial_model_for_weight_conversion"
        raise ConfigError(ADAPTER_CONFIG, found, hint=hint)
    for key in sorted(raw.keys() - _READ - _NEUTRAL):
        if raw[key] not in (None, False, {}, [], ""):
            shown = key[:60] if key.isprintable() else ascii(key)[:60]
            found = f"{shown} is set, which is not supported"
            raise ConfigError(ADAPTER_CONFIG, found, hint="merge it with peft")


def _grouped_stacks(raw: Mapping[str, Any]) -> frozenset[str]:
    """Return the stacks of experts that Unsloth saved in its own order.

    It records the order since version 2026.9.6, here or in ``auto_mapping``. Before, it had its
    own, and left no more than ``unsloth_fixed`` (unsloth_zoo ``temporary_patches/moe_utils.py``).
    """
    mapping = raw.get("auto_mapping")
    mapping = mapping if isinstance(mapping, dict) else {}
    for table in (raw, mapping):
        detail = table.get("unsloth_fused_expert_lora")
        stacks = detail.get("parameters") if isinstance(detail, dict) else None
        if isinstance(stacks, dict):
            return frozenset(n for n in _STACKS if _is_grouped(stacks.get(n)))
        if table.get("lora_B_layout") is not None:
            return frozenset(_STACKS if _is_grouped(table) else ())
    return frozenset(_STACKS if mapping.get("unsloth_fixed") else ())


def _is_grouped(table: object) -> bool:
    order = table.get("lora_B_layout", _ORDERS[0]) if isinstance(table, dict) else _ORDERS[0]
    if order not in _ORDERS:
        found = f"lora_B_layout is {repr(order)[:40]}"
        raise ConfigError(ADAPTER_CONFIG, found, expected=" or ".join(_ORDERS))
    return order == _ORDERS[1]


def _base(raw: Mapping[str, Any]) -> str:
    base = raw.get("base_model_name_or_path")  # a folder is nobody else's business
    return base if isinstance(base, str) and _HUB_ID.fullmatch(base) else ""


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and type(value) is not bool:
        found = f"{key} is {repr(value)[:40]}"
        raise ConfigError(ADAPTER_CONFIG, found, expected="true or false")
    return bool(value)


def _choice(raw: Mapping[str, Any], key: str, choices: Sequence[str]) -> str:
    value = raw.get(key, choices[0])
    if not isinstance(value, str) or value not in choices:
        found = f"{key} is {repr(value)[:40]}"
        raise ConfigError(ADAPTER_CONFIG, found, expected=" or ".join(choices))
    return value


def _rank(key: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_RANK:  # bool is an int
        found = f"{key} is {repr(value)[:40]}"
        raise ConfigError(ADAPTER_CONFIG, found, expected=f"a rank from 1 to {_MOST_RANK}")
    return value


def _alpha(key: str, value: object) -> float:
    if type(value) not in (int, float) or not abs(float(str(value))) < 2**32:
        found = f"{key} is {repr(value)[:40]}"
        raise ConfigError(ADAPTER_CONFIG, found, expected="a number")
    return float(str(value))


def _strings(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        found = f"{key} is {repr(value)[:40]}"
        raise ConfigError(ADAPTER_CONFIG, found, expected="a list of names")
    return tuple(value)


def _modules(raw: Mapping[str, Any], key: str) -> ModuleNames | None:
    """Return a list of names, or a pattern; None if there is neither."""
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        return ModuleNames(pattern=_compiled(key, value))
    return ModuleNames(frozenset(_strings(key, value)))


def _saved(raw: Mapping[str, Any]) -> tuple[str, ...]:
    value = raw.get("modules_to_save")
    names = () if value is None else _strings("modules_to_save", value)
    return _bounded("modules_to_save", names)


def _parameters(raw: Mapping[str, Any]) -> tuple[str, ...]:
    value = raw.get("target_parameters")
    names = () if value is None else _strings("target_parameters", value)
    return _bounded("target_parameters", names)


def _tokens(value: object) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if value is None:
        return ()
    rows = {"embed_tokens": value} if isinstance(value, list) else value
    if (
        not isinstance(rows, dict)
        or len(rows) > MOST_PATTERNS
        or not all(map(_are_ids, rows.values()))
    ):
        found = f"trainable_token_indices is {repr(value)[:40]}"
        raise ConfigError(ADAPTER_CONFIG, found, expected="different numbers of tokens")
    return tuple((name, tuple(ids)) for name, ids in rows.items())


def _are_ids(value: object) -> bool:
    if not isinstance(value, list) or len(value) > _MOST_TOKENS:
        return False
    if not all(type(number) is int and 0 <= number < _MOST_TOKENS for number in value):
        return False
    return len(set(value)) == len(value)


def _bounded(key: str, patterns: Sequence[str]) -> tuple[str, ...]:
    if len(patterns) > MOST_PATTERNS:
        found = f"{len(patterns)} entries of {key}"
        raise ConfigError(ADAPTER_CONFIG, found, expected=f"at most {MOST_PATTERNS}")
    return tuple(patterns)


def _patterns(raw: Mapping[str, Any], key: str, read: Any) -> tuple[tuple[LinearPattern, Any], ...]:
    value = raw.get(key)
    if value is None:
        return ()
    if not isinstance(value, dict):
        found = f"{key} is {repr(value)[:40]}"
        raise ConfigError(ADAPTER_CONFIG, found, expected="an object")
    texts = _bounded(key, [*islice(value, MOST_PATTERNS + 1)])
    return tuple((_compiled(key, rf"(?:.*\.)?(?:{t})"), read(key, value[t])) for t in texts)


def _compiled(key: str, text: str) -> LinearPattern:
    try:
        return compile_linear(text)
    except ValueError as error:
        found = f"{key} has a pattern that cannot be matched in linear time ({error})"
        raise ConfigError(ADAPTER_CONFIG, found, hint="write it without look-around") from error


def _layers(value: object) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    numbers = [value] if type(value) is int else value
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        found = f"layers_to_transform is {repr(value)[:40]}"
        raise ConfigError(ADAPTER_CONFIG, found, expected="numbers of layers")
    return frozenset(numbers)


def _stacks(raw: Mapping[str, Any]) -> tuple[LinearPattern, ...]:
    value = raw.get("layers_pattern")
    if not value:
        return ()
    names = (value,) if isinstance(value, str) else _strings("layers_pattern", value)
    bounded = _bounded("layers_pattern", names)
    return tuple(_compiled("layers_pattern", rf"(?:.*\.)?(?:{name})") for name in bounded)
