"""Record what llama-perplexity prints and writes of a pair of GGUF files, for test_evaluate_golden.

    make golden-kld        # or: python tests/golden_kld.py LLAMA_PERPLEXITY

builds the program from the llama.cpp that llama-cpp-python packs, without native code:

    pip download llama-cpp-python==0.3.36 --no-binary llama-cpp-python --no-deps
    tar -xzf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release \
        -DGGML_NATIVE=OFF -DBUILD_SHARED_LIBS=OFF
    cmake --build build --target llama-perplexity

The models are the same on every machine: whole numbers for weights, 512 tokens, a head eight
times larger than the other tests have so that predictions are not all alike. The text is LICENSE.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from checkpoints import layout_of, write_checkpoint
from gguf_models import exact_tensors, sidecars, variant_config
from qwen35.checkpoint.source import open_folder
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "LICENSE"
GOLDEN = ROOT / "tests" / "golden" / "kld.json"
GOLDEN_FILE = ROOT / "tests" / "golden" / "one-chunk.kld"
BASE, CANDIDATE = "F16", "Q4_K_M"
HEAD = "lm_head.weight"


def make_pair(folder: Path) -> dict[str, Path]:
    """Write the base and the candidate; return type to file."""
    config = variant_config("text")
    tensors = exact_tensors(config, layout_of(config, mtp=False), seed=1)
    tensors[HEAD] *= 8
    source = write_checkpoint(folder / "Golden-1B", config, tensors, sidecars=sidecars())
    plan = make_plan(open_folder(source), load_recipe("mix", "gguf"), types=(BASE, CANDIDATE))
    out = write(plan, folder / "gguf").out
    return {kind: out / f"Golden-1B-{kind}.gguf" for kind in (BASE, CANDIDATE)}


def table_of(printed: str) -> dict[str, list[float]]:
    """Read the statistics that llama-perplexity prints: name to value, and error if there is one.

    >>> table_of("Mean    KLD:   0.013876 ±   0.000414\\nMaximum KLD:   0.150113")
    {'Mean KLD': [0.013876, 0.000414], 'Maximum KLD': [0.150113]}
    """
    table = {}
    for line in printed.splitlines():
        found = re.fullmatch(r"\s*([^:\[]*[^:\[ ]) *: +(-?[\d.]+)(?: ± +([\d.]+))? ?%?", line)
        if found:
            name = re.sub(r" +", " ", found[1])
            table[name] = [float(value) for value in found.groups()[1:] if value]
    return table


def run(program: str, models: dict[str, Path], folder: Path, chunks: int) -> tuple[Path, str]:
    """Run the program twice, as its users do; return its file and what it printed last."""
    kept = folder / f"{chunks}.kld"
    shared = ["-f", str(TEXT), "-c", "512", "-t", "1", "--no-repack", "--chunks", str(chunks)]
    for kind, more in ((BASE, []), (CANDIDATE, ["--kl-divergence"])):
        command = [program, "-m", str(models[kind]), "--kl-divergence-base", str(kept)]
        done = subprocess.run([*command, *shared, *more], capture_output=True, check=True)
    return kept, done.stdout.decode()


def main() -> None:
    """Write the golden files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = make_pair(folder)
        kept, one = run(sys.argv[1], models, folder, 1)
        _, eight = run(sys.argv[1], models, folder, 8)
        golden = {
            "models": {k: hashlib.sha256(p.read_bytes()).hexdigest() for k, p in models.items()},
            "text": hashlib.sha256(TEXT.read_bytes()).hexdigest(),
            "one chunk": table_of(one),
            "eight chunks": table_of(eight),
        }
        GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
        shutil.copyfile(kept, GOLDEN_FILE)


if __name__ == "__main__":
    main()
