"""transformers: load a checkpoint as users do, with workarounds for CPUs."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen35.array_types import F32
from qwen35.checkpoint.adapter_files import Adapter
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.reconciled import has_tower
from qwen35.checkpoint.source import Checkpoint, open_place
from qwen35.codecs.registry import codec_of
from qwen35.engines.simulated_inputs import Quantizers, input_quantizers, simulated_inputs
from qwen35.errors import InputError, UsageError, extra_hint
from qwen35.planning.merged_source import with_adapters
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.rules import Rule
from qwen35.writing.write import write

__all__ = [
    "MODEL_OPTIONS",
    "NO_CODE",
    "TorchModel",
    "flushed_denormals",
    "refuse_hub_kernels",
    "torch_and_transformers",
]

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""For every `from_pretrained`: without it, transformers asks at the terminal whether to run a
folder's own code."""

MODEL_OPTIONS: dict[str, Any] = {
    **NO_CODE,
    "attn_implementation": "sdpa",
    "experts_implementation": None,
    "use_safetensors": True,
}
"""For every model: what config.json says here could name a repository of native code. These are
the values of one that says nothing."""

_DECODED = "bf16"
"""The recipe that unpacks every weight."""


def torch_and_transformers(what: str) -> tuple[Any, Any]:
    """Return both libraries with logging and progress bars off.

    Args:
        what: subject of the error if one is missing.

    Raises:
        UsageError: one is not installed.
    """
    refuse_hub_kernels()
    # Threads that spin while they wait for each other burn the time of a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch
        import transformers
    except ImportError as error:
        found = f"{error.name} is not installed"
        raise UsageError(what, found, hint=extra_hint("nf4")) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers


@contextmanager
def flushed_denormals(torch: Any) -> Iterator[None]:
    """Take numbers below 1.2e-38 for 0 in this thread, while the context is open.

    Decays of linear attention are full of them, and x86 processors take a hundred times as long for
    a product with one.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def refuse_hub_kernels() -> None:
    """Keep transformers and bitsandbytes from loading native code from the Hub.

    Both do so by themselves where the package `kernels` is installed; a program that has imported
    it keeps it.
    """
    if "kernels" not in sys.modules:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # makes its import fail
    # bitsandbytes recommends to install it, on processors with AVX512-BF16.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "from kernels-community" not in record.getMessage()


class TorchModel:
    """A loaded checkpoint.

    Args:
        folder: the checkpoint; decoded to a temporary folder if transformers cannot load it.
        adapters: merged into it, in a temporary folder.
        exact: compute in float32, whatever its config says.
        device: to load it on.

    Attributes:
        model: transformers' model.
        vision: whether it takes images.
        decoded: whether a decoded copy was loaded.
        missing: weights missing from the files or unexpected by the model.
        settled: number of 4-bit layers kept off a path that fails on this processor.

    Raises:
        InputError: a weight of a checkpoint that needs decoding cannot be decoded.
        UsageError: transformers or torch is not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        adapters: Sequence[Adapter] = (),
        exact: bool = False,
        device: str = "cpu",
    ) -> None:
        self._torch, transformers = torch_and_transformers(f"running {folder.name}")
        self._folder = folder
        with _loadable(folder, adapters, exact=exact) as path:
            self.decoded = path != folder
            self._load(path, transformers, exact=exact, device=device)
        self.model.eval()
        self.settled = _settle(self.model)
        if exact:
            self._widen()

    def _load(self, folder: Path, transformers: Any, *, exact: bool, device: str) -> None:
        config = _decoding(transformers.AutoConfig.from_pretrained(folder, **NO_CODE))
        checkpoint = _open_checkpoint(folder)
        # Without its tower, a vision-language checkpoint is loaded as its text model.
        self.vision = hasattr(config, "vision_config") and (
            checkpoint is None or has_tower(checkpoint)
        )
        kind = "AutoModelForImageTextToText" if self.vision else "AutoModelForCausalLM"
        config.transformers_weights = None  # the checkpoint's files, not another that it names
        options = {**MODEL_OPTIONS, **({"dtype": self._torch.float32} if exact else {})}
        self.model, info = getattr(transformers, kind).from_pretrained(
            folder, config=config, device_map=device, output_loading_info=True, **options
        )
        # transformers only warns about these, and initializes missing weights at random.
        self.missing = sorted({*info["missing_keys"], *info["unexpected_keys"]})

    def _widen(self) -> None:
        """Convert to float32 what loading leaves in 16 bits: decoded FP8 weights, 4-bit layers."""
        torch = self._torch
        for module in self.model.modules():
            if hasattr(module, "compute_dtype"):  # bitsandbytes' 4-bit layers
                module.compute_dtype = torch.float32
            for own in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if own.dtype in (torch.bfloat16, torch.float16):
                    own.data = own.data.float()

    @cached_property
    def _quantizers(self) -> Quantizers:
        checkpoint = _open_checkpoint(self._folder)
        return {} if checkpoint is None else input_quantizers(checkpoint)

    def simulated_logits(self, ids: Sequence[int], first: int = 0) -> F32:
        """Return the logits with the inputs of packed layers quantized as servers do.

        Raises:
            TensorError: a stored scale of inputs is damaged.
        """
        with simulated_inputs(self.model, self._quantizers):
            return self.logits(ids, first)

    def logits(self, ids: Sequence[int], first: int = 0) -> F32:
        """Return the logits after each token from `first` on, [len(ids) - first, vocabulary]."""
        torch = self._torch
        row = torch.tensor([list(ids)], device=self.model.device)
        with torch.inference_mode():
            out = self.model(input_ids=row, use_cache=False, logits_to_keep=len(ids) - first)
        logits: F32 = out.logits[0].float().cpu().numpy()
        return logits


@contextmanager
def _loadable(folder: Path, adapters: Sequence[Adapter], *, exact: bool) -> Iterator[Path]:
    """Yield the folder, or a decoded copy: with adapters, or of codecs transformers cannot load.

    With `exact`, packed weights are what they decode to, not rounded to 16 bits; merged ones are
    those that a merged checkpoint has.
    """
    checkpoint = _open_checkpoint(folder)
    # If we cannot read the folder, transformers' own error is the better one.
    if checkpoint is None or (
        not adapters and all(codec_of(weight).loads for weight in checkpoint.weights)
    ):
        yield folder
        return
    if exact and not adapters:
        checkpoint = replace(checkpoint, config=replace(checkpoint.config, dtype="F32"))
    checkpoint = with_adapters(checkpoint, adapters)
    with tempfile.TemporaryDirectory(prefix="qwen35-") as temporary:
        recipe = load_recipe(_DECODED)
        if checkpoint.config.architecture.vision and not has_tower(checkpoint):
            recipe = recipe.preceded([Rule("visual", "drop", "not whole")])
        plan = make_plan(checkpoint, recipe)
        yield write(plan, Path(temporary) / "decoded").out


def _decoding(config: Any) -> Any:
    """Return the config, set to decode on loading whatever transformers can decode.

    transformers decodes block-wise FP8 only on machines without a GPU. With one, even a model on
    the CPU rounds activations too, with a kernel from the Hub (transformers 5.23
    ``quantizers/quantizer_finegrained_fp8.py``, `validate_environment`).
    """
    from transformers.quantizers import AutoQuantizationConfig

    packed = getattr(config, "quantization_config", None)
    if packed and hasattr(AutoQuantizationConfig.from_dict(packed), "dequantize"):
        packed["dequantize"] = True
    return config


def _open_checkpoint(folder: Path) -> Checkpoint | None:
    try:
        return open_place(LocalFolder(folder), name=str(folder), root=folder, lenient=True)
    except InputError:
        return None


def _settle(model: Any) -> int:
    """Switch off bitsandbytes' packed path on CPUs with AVX512-BF16; return the layer count.

    That path asserts that a layer has a multiple of 32 outputs, which the gates of most sizes lack,
    and it rewrites the weights on first use (bitsandbytes 0.50 ``nn/modules.py``, `Linear4bit`).
    """
    count = 0
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            count += 1
    return count
