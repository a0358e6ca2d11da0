"""Codecs of weights that vLLM and SGLang serve, in the layout of a quantization tool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qwen35.codecs.codec import Codec, LoaderModule
from qwen35.errors import Finding, TensorError
from qwen35.tensors import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from qwen35.codecs.engine_modules import Tool
    from qwen35.codecs.kv_cache import CacheForm
    from qwen35.model.roles import Role

__all__ = ["ServedCodec"]


class ServedCodec(Codec):
    """A codec whose tensors and config.json are those of the tool that `method` names."""

    per_expert = True
    joined = True
    served = True
    widens = True
    packable = "linear layers, experts or the head"

    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts", "head")

    def problem(self, tensors: Mapping[str, StoredTensor], name: str) -> TensorError | None:
        """Return the first tensor of the layout that is missing, or None."""
        any_shape = TensorSpec(self.weight_name(name), "BF16", (128, 128))  # only names are used
        for part in self.layout(any_shape):
            if part.name not in tensors:
                hint = "the checkpoint was saved incompletely: start from the original"
                return TensorError(part.name, "missing", hint=hint)
        return None

    def packs(self, role: Role) -> bool:
        """Return whether weights of this role may be packed."""
        return role.info.kind in self.kinds

    @property
    def tool(self) -> Tool:
        """What the tool of its layout tells loaders."""
        from qwen35.codecs import compressed_tensors, gptq, modelopt

        tools = {
            compressed_tensors.METHOD: compressed_tensors.TOOL,
            gptq.METHOD: gptq.TOOL,
            modelopt.METHOD: modelopt.TOOL,
        }
        return tools[self.method]

    @property
    def tool_title(self) -> str:
        """The name of the tool of its layout."""
        return self.tool.title

    @property
    def loads_with(self) -> str:
        """The library with which transformers loads its layout; empty if it does not."""
        return self.tool.needs

    @property
    def cache_form(self) -> CacheForm | None:
        """How the tool of its layout writes scales of a KV cache."""
        return self.tool.cache

    def quantizes_inputs(self, quantization: Mapping[str, Any]) -> Callable[[str], bool | None]:
        """Return whether servers quantize the inputs of a packed module, by its scheme."""
        if self.tool.inputs is None:
            return super().quantizes_inputs(quantization)
        return self.tool.inputs(quantization, self.name)

    def config(self, modules: Sequence[LoaderModule], prefix: str, dtype: str) -> dict[str, Any]:
        """Return ``quantization_config`` as the tool writes it."""
        del prefix, dtype
        return self.tool.config(modules)

    def documents(self, quantization: Mapping[str, Any]) -> dict[str, Any]:
        """Return the files that the tool writes beside config.json."""
        return self.tool.documents(quantization)

    def documents_findings(
        self, quantization: Mapping[str, Any], read: Callable[[str], Any]
    ) -> Iterator[Finding]:
        """Yield contradictions between config.json and the files beside it."""
        return self.tool.documents_findings(quantization, read)

    def config_findings(
        self, quantization: Mapping[str, Any], modules: Sequence[LoaderModule], *, vision: bool
    ) -> Iterator[Finding]:
        """Yield contradictions between config.json and the weights, as engines read them."""
        del vision
        yield from self.tool.findings(quantization, modules)
