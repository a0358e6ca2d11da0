"""Codecs of weights that vLLM and SGLang serve, in the layout of a quantization tool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qwen35.codecs.codec import Codec, LoaderModule
from qwen35.errors import Finding

if TYPE_CHECKING:
    from qwen35.codecs.engine_modules import Tool
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

    def config(self, modules: Sequence[LoaderModule], prefix: str, dtype: str) -> dict[str, Any]:
        """Return ``quantization_config`` as the tool writes it."""
        del prefix, dtype
        return self.tool.config(modules)

    def documents(self, quantization: Mapping[str, Any]) -> dict[str, Any]:
        """Return the files that the tool writes beside config.json."""
        return self.tool.documents(quantization)

    def config_findings(
        self, quantization: Mapping[str, Any], modules: Sequence[LoaderModule], *, vision: bool
    ) -> Iterator[Finding]:
        """Yield contradictions between config.json and the weights, as engines read them."""
        del vision
        yield from self.tool.findings(quantization, modules)
