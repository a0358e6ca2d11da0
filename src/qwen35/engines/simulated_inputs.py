"""A loaded model whose packed layers quantize their inputs, as servers do when they run it."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from qwen35.checkpoint.source import Checkpoint, Reader
from qwen35.codecs.engine_modules import LOADED
from qwen35.codecs.input_quantizers import InputQuantizer
from qwen35.codecs.registry import codec_of
from qwen35.engines.expert_loop import ExpertInput, experts_in_turn
from qwen35.model.roles import Role, role_of
from qwen35.tensors import Weight

__all__ = [
    "Quantizers",
    "input_quantizers",
    "layer_inputs",
    "llama_inputs",
    "served_inputs",
    "simulated_inputs",
    "unknown_inputs",
]

Quantizers = Mapping[Role, InputQuantizer]
"""Weight, by its role, to what servers do to its layer's inputs."""


def served_inputs(checkpoint: Checkpoint) -> str:
    """Return how servers quantize the inputs of layers of the text model; empty if they do not."""
    return "; ".join(sorted({codec_of(weight).served_inputs for weight, _ in _chosen(checkpoint)}))


def unknown_inputs(checkpoint: Checkpoint) -> bool:
    """Return whether config.json asks servers for inputs that cannot be simulated."""
    return any(quantized is None for _, _, quantized in _packed(checkpoint))


def input_quantizers(checkpoint: Checkpoint) -> Quantizers:
    """Return what servers do to the inputs of layers of the text model.

    Raises:
        TensorError: a stored scale of inputs is damaged.
    """
    with Reader(checkpoint) as reader:
        return {
            role: codec_of(weight).input_quantizer(reader, weight)
            for weight, role in _chosen(checkpoint)
        }


def llama_inputs(checkpoint: Checkpoint) -> Quantizers:
    """Return what llama.cpp on CPUs does to the inputs of the products of a GGUF model."""
    tied = "embed_tokens" if checkpoint.config.tied else ""
    roles = ((weight, role_of(weight.name)) for weight in checkpoint.weights)
    with Reader(checkpoint) as reader:
        return {
            role: codec_of(weight).input_quantizer(reader, weight)
            for weight, role in roles
            if role.scope == "text" and (role.info.kind in LOADED or role.name == tied)
        }


def _chosen(checkpoint: Checkpoint) -> Iterator[tuple[Weight, Role]]:
    """Yield the weights of the text model whose layers quantize their inputs."""
    yield from ((weight, role) for weight, role, quantized in _packed(checkpoint) if quantized)


def _packed(checkpoint: Checkpoint) -> Iterator[tuple[Weight, Role, bool | None]]:
    """Yield packed weights of the text model, and whether their layers quantize their inputs."""
    quantization = checkpoint.config.quantization or {}
    quantizes: dict[str, Callable[[str], bool | None]] = {}
    for weight in checkpoint.weights:
        codec = codec_of(weight)
        if not codec.packed:
            continue
        role = role_of(weight.name)
        if role.scope != "text" or role.info.kind not in LOADED:
            continue
        if codec.name not in quantizes:
            quantizes[codec.name] = codec.quantizes_inputs(quantization)
        yield weight, role, quantizes[codec.name](weight.name.removesuffix(".weight"))


@contextmanager
def simulated_inputs(model: Any, quantizers: Quantizers) -> Iterator[None]:
    """Quantize the inputs of layers of transformers' model while the context is open."""
    text = getattr(model.model, "language_model", model.model)
    layers: dict[int, dict[Role, InputQuantizer]] = defaultdict(dict)
    with ExitStack() as stack:
        for role, quantizer in quantizers.items():
            if role.layer is not None:
                layers[role.layer][role] = quantizer
            else:  # of the others, only the head is packed
                _quantize(stack, model.get_output_embeddings(), quantizer)
        for layer, own in layers.items():
            stack.enter_context(layer_inputs(text.layers[layer], own))
        yield


@contextmanager
def layer_inputs(layer: Any, quantizers: Quantizers) -> Iterator[None]:
    """Quantize the inputs of the products of one decoder layer while the context is open.

    Gate and up projection of an expert read one input, as in servers: with the gate's quantizer.
    A quantizer of a whole stack is that of each expert.
    """
    experts: dict[str, InputQuantizer] = {}
    inputs = _LastInputs()
    with ExitStack() as stack:
        for role, quantizer in quantizers.items():
            leaf = role.name.rpartition(".")[2]
            if role.expert is not None:
                experts[f"{role.expert}.{leaf}"] = quantizer
            elif role.info.place == "fused":
                experts[leaf] = quantizer
            else:
                shared = partial(inputs.quantized, quantizer)
                _quantize(stack, layer.get_submodule(role.info.name), shared)
        if experts:
            outer = _expert(experts, "gate_proj", "up_proj", "gate_up_proj")
            inner = _expert(experts, "down_proj")
            stack.enter_context(experts_in_turn(layer.mlp.experts, outer, inner))
        yield


class _LastInputs(threading.local):
    """Quantizes the inputs that products of a layer share, such as q, k and v, once for all.

    Each thread has its own: threads compute batches of text side by side.
    """

    def __init__(self) -> None:
        self._x: Any = None
        self._found: dict[InputQuantizer, Any] = {}

    def quantized(self, quantizer: InputQuantizer, x: Any) -> Any:
        if x is not self._x:
            self._x, self._found = x, {}
        if quantizer not in self._found:
            self._found[quantizer] = quantizer(x)
        return self._found[quantizer]


def _quantize(stack: ExitStack, module: Any, quantizer: InputQuantizer) -> None:
    def hook(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return quantizer(arguments[0]), *arguments[1:]

    stack.callback(module.register_forward_pre_hook(hook).remove)


def _expert(quantizers: Mapping[str, InputQuantizer], *leaves: str) -> ExpertInput:
    """Return what the first of these matrices that is packed does to its input."""

    def read(expert: int, x: Any) -> Any:
        names = [*(f"{expert}.{leaf}" for leaf in leaves), *leaves]
        chosen = next((name for name in names if name in quantizers), None)
        return x if chosen is None else quantizers[chosen](x)

    return read
