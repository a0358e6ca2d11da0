"""A loaded model whose packed layers quantize their inputs, as servers do when they run it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
    """Quantize the inputs of layers of transformers' model while the context is open.

    Gate and up projection of an expert read one input, as in servers: with the gate's quantizer.
    """
    text = getattr(model.model, "language_model", model.model)
    experts: dict[int | None, dict[str, InputQuantizer]] = defaultdict(dict)
    with ExitStack() as stack:
        for role, quantizer in quantizers.items():
            if role.expert is not None:
                leaf = role.name.rpartition(".")[2]
                experts[role.layer][f"{role.expert}.{leaf}"] = quantizer
                continue
            handle = _module(model, text, role).register_forward_pre_hook(_hook(quantizer))
            stack.callback(handle.remove)
        for layer, own in experts.items():
            outer, inner = _expert(own, "gate_proj", "up_proj"), _expert(own, "down_proj")
            stack.enter_context(experts_in_turn(text.layers[layer].mlp.experts, outer, inner))
        yield


def _module(model: Any, text: Any, role: Role) -> Any:
    """Return the module of a weight that is no expert's."""
    if role.layer is None:  # of these, only the head is packed
        return model.get_output_embeddings()
    return text.layers[role.layer].get_submodule(role.info.name)


def _hook(quantizer: InputQuantizer) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _, arguments: (quantizer(arguments[0]), *arguments[1:])


def _expert(quantizers: Mapping[str, InputQuantizer], *leaves: str) -> ExpertInput:
    """Return what the first of these matrices that is packed does to its input."""

    def read(expert: int, x: Any) -> Any:
        names = (f"{expert}.{leaf}" for leaf in leaves)
        chosen = next((name for name in names if name in quantizers), None)
        return x if chosen is None else quantizers[chosen](x)

    return read
