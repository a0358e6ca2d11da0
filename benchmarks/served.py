"""Compare formats that servers run with block FP8, and with the usual tools that write them.

    python -m benchmarks.served [--work DIR] [--size 0.8B|tiny] [--rounds 3]

Makes a random checkpoint with real shapes and measures processes, in turn: `qwen35 convert` to each
format, `model_free_ptq` of llm-compressor and the model-free mode of AutoRound. All use one thread
and pack the same weights: the linear layers of the text model, without `in_proj_a` and `in_proj_b`
(two built-in recipes are changed for it). Each tool has an environment of its own, WORK/peers/NAME,
which is made if it is missing (benchmarks/peers; 1.5 GB each); one that cannot be made is left out,
and the title says so. `tiny` goes without the tools. A layer with the shapes of 35B-A3B shows that
memory does not grow with the model.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import (
    ASSET,
    QWEN35,
    ROOT,
    Comparison,
    Cost,
    arguments,
    made,
    measure,
    report,
)

PLAIN_MTP = 'match = "mtp"\naction = "plain"'
"""FP8 packs the MTP layer, servers' formats do not."""

LINEAR_ATTENTION = tuple(
    f'match = "linear_attn.{name}"\naction = "nvfp4"'
    for name in ("in_proj_qkv", "in_proj_z", "out_proj")
)
"""The recipe nvfp4 leaves it unquantized."""

CHANGED = {"fp8": (PLAIN_MTP,), "nvfp4": LINEAR_ATTENTION}


@dataclass(frozen=True)
class Format:
    """A format and how its scales are chosen.

    Args:
        recipe: a built-in recipe.
        mode: for ``--calib-mode``; empty if there is no choice.
        layout: for ``--layout``, if it is not the default.
    """

    recipe: str
    mode: str = ""
    layout: str = ""

    @property
    def label(self) -> str:
        """Name of the route."""
        layout = f" --layout {self.layout}" if self.layout else ""
        return f"`{self.recipe}{layout}`" + (f", {self.mode}" if self.mode else "")

    def convert(self, source: Path, out: Path, work: Path) -> list[object]:
        """Return the command."""
        recipe = str(work / f"{self.recipe}.toml") if self.recipe in CHANGED else self.recipe
        flags = ["--calib-mode", self.mode] if self.mode else []
        flags += ["--layout", self.layout] if self.layout else []
        flags += ["--skip-verify"] if self.recipe == "fp8" else []  # others have no such check
        threads = ("--threads", "1", "--quiet")
        return [*QWEN35, "convert", source, out, "--recipe", recipe, *threads, *flags]


FP8 = Format("fp8", "search")
NVFP4, NVFP4_MAX = Format("nvfp4", "search"), Format("nvfp4", "max")
MIXED = Format("nvfp4-mixed", "search")
INT4, INT4_MAX = Format("int4", "search"), Format("int4", "max")
GPTQ = Format("int4", "search", "gptq")
CHANNEL = Format("fp8-channel")
FORMATS = (NVFP4, NVFP4_MAX, MIXED, INT4, INT4_MAX, GPTQ, CHANNEL)
LAYERED = (NVFP4, INT4, GPTQ, CHANNEL)
"""What a layer of 35B-A3B is converted to."""

IGNORED = ("lm_head", "embed_tokens", "visual", "mtp", "in_proj_a", "in_proj_b", "conv1d")
LLM_COMPRESSOR = """
import sys
from llmcompressor import model_free_ptq
source, out, scheme, *ignored = sys.argv[1:]
model_free_ptq(source, out, scheme, ignore=[f"re:.*{n}.*" for n in ignored], device="cpu")
"""
AUTO_ROUND = """
import sys
from auto_round import AutoRound
source, out, scheme, *ignored = sys.argv[1:]
kept = ",".join(ignored)
AutoRound(
    model=source, scheme=scheme, model_free=True, ignore_layers=kept, device_map="cpu"
).quantize_and_save(out)
"""


@dataclass(frozen=True)
class Tool:
    """A tool that converts without loading the model.

    Args:
        name: its environment's name, and that of its requirements in benchmarks/peers.
        program: Python source; takes source, output, scheme and what to leave unquantized.
        schemes: its name of a scheme to our formats.
    """

    name: str
    program: str
    schemes: dict[str, tuple[Format, ...]]

    @property
    def version(self) -> str:
        """The version that is measured."""
        first, *_ = self._requirements.read_text("utf-8").splitlines()
        return first.partition("==")[2]

    @property
    def _requirements(self) -> Path:
        return ROOT / "benchmarks" / "peers" / f"{self.name}.txt"

    def label(self, scheme: str) -> str:
        """Return the name of a route."""
        return f"{self.name} {self.version}, {scheme}"

    def convert(self, source: Path, out: Path, scheme: str, work: Path) -> list[object]:
        """Return the command."""
        python = self._folder(work) / "bin" / "python"
        return [python, "-I", "-c", self.program, source, out, scheme, *IGNORED]

    def ready(self, work: Path) -> bool:
        """Make the environment unless it exists; return whether it could be made."""
        folder, python = self._folder(work), self._folder(work) / "bin" / "python"
        if (folder / ".made").exists():
            return True
        shutil.rmtree(folder, ignore_errors=True)
        # torch first and alone, so that pip takes a CPU build where one is at hand
        constraints = (ROOT / "constraints.txt").read_text("utf-8")
        torch = re.findall(r"^torch==.*", constraints, re.MULTILINE)
        install = [python, "-I", "-m", "pip", "install", "--quiet", *torch]
        unbound = {**os.environ, "PIP_CONSTRAINT": ""}
        try:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run(install, check=True, env=unbound)
            subprocess.run([*install, "-r", self._requirements], check=True, env=unbound)
        except subprocess.CalledProcessError:
            return False
        (folder / ".made").touch()
        return True

    def _folder(self, work: Path) -> Path:
        return work / "peers" / self.name


TOOLS = (
    Tool(
        "llm-compressor",
        LLM_COMPRESSOR,
        {
            "NVFP4A16": (NVFP4, NVFP4_MAX),
            "W4A16": (INT4, INT4_MAX),
            "FP8_DYNAMIC": (CHANNEL,),
        },
    ),
    Tool("auto-round", AUTO_ROUND, {"W4A16": (GPTQ,)}),
)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LAYER = ", a layer of 35B-A3B"


def comparisons() -> Iterator[Comparison]:
    """Yield what to compare: each format with FP8 and with its tools, and memory with the layer."""
    for one in FORMATS:
        yield Comparison(one.label, FP8.label, ("cpu", "memory"))
    for tool in TOOLS:
        for scheme, formats in tool.schemes.items():
            for one in formats:
                yield Comparison(one.label, tool.label(scheme), ("cpu", "memory"))
    for one in LAYERED:
        yield Comparison(one.label, one.label + LAYER, ("memory",))


def make_recipes(work: Path) -> None:
    """Write the changed recipes."""
    for name, rules in CHANGED.items():
        text = f'format = "{name}"\nbase = "{name}"\n'
        text += "".join(f"\n[[rules]]\n{rule}\n" for rule in rules)
        (work / f"{name}.toml").write_text(text, "utf-8")


def once(source: Path, layer: Path | None, work: Path, tools: list[Tool]) -> dict[str, Cost]:
    """Measure every route once."""
    out = work / "out"
    costs = {
        "`convert` of the embedded checkpoint": measure(NVFP4.convert(ASSET, out, work), out),
        FP8.label: measure(FP8.convert(source, out, work), out),
    }
    for one in FORMATS:
        costs[one.label] = measure(one.convert(source, out, work), out)
    if layer is not None:
        for one in LAYERED:
            costs[one.label + LAYER] = measure(one.convert(layer, out, work), out)
    for tool in tools:
        for scheme in tool.schemes:
            command = tool.convert(source, out, scheme, work)
            costs[tool.label(scheme)] = measure(command, out, ONE_THREAD)
    shutil.rmtree(out)
    return costs


def main() -> None:
    args = arguments(__doc__)
    source, layer, tools = made("checkpoint", args.size, args.work), None, []
    title = f"Formats for vLLM and SGLang, {source.name}, one thread"
    make_recipes(args.work)
    if args.size != "tiny":
        layer = made("layer", "35B-A3B", args.work)
        tools = [tool for tool in TOOLS if tool.ready(args.work)]
        missing = [tool.name for tool in TOOLS if tool not in tools]
        title += f" (cannot be installed here: {', '.join(missing)})" if missing else ""
    for one in (FP8, *FORMATS):  # warms all caches
        measure(one.convert(ASSET, args.work / "out", args.work), args.work / "out")
    report(args, title, lambda: once(source, layer, args.work, tools), list(comparisons()))


if __name__ == "__main__":
    main()
