"""Every key of the GGUF files and manifests that we write, found by planning such files.

A key without a meaning (`generating.meanings`), or a meaning without a key, is an error.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from generating.markdown import cell, code, heading, table
from generating.meanings import CARD_KEYS, GGUF_KEYS, MANIFEST_KEYS
from qwen35.calibration.calibration_plan import CalibrationRequest
from qwen35.calibration.calibration_plan import make_plan as plan_calibration
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.gguf_header import read_container
from qwen35.checkpoint.open import describe
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import Finding
from qwen35.planning.gguf_files.imatrix import Imatrix
from qwen35.planning.manifest import manifest_bytes, manifest_entries
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.publishing.repo_documents import REPORT_NAME, documents
from qwen35.verification.behaviour import Answer
from qwen35.verification.questions import Halves, Question
from qwen35.verification.role_errors import RoleError
from qwen35.verification.verdict import Verdict

__all__ = ["ROOT", "TINY", "gguf_keys_page", "manifest_page"]

ROOT = Path(__file__).parents[2]
TINY = ROOT / "assets" / "qwen3.5-tiny"
_MOE = "Qwen3.5-35B-A3B"
_CARD = """\
---
license: other
license_name: a-name
license_link: https://example.org/licence
base_model: someone/Qwen3.5-0.8B
datasets: [someone/texts]
language: [en]
tags: [a-tag]
---
"""
_SAMPLING = {"top_k": 20, "top_p": 0.95, "temperature": 1.0, "repetition_penalty": 1.0}
_GGUF_LEAD = (
    "Keys, their order and their types are those of llama.cpp's converter and quantizer, so the "
    "files are equal byte for byte; only `qwen35.calibration` is our own. Examples are from the "
    "embedded checkpoint and, for mixtures of experts, from Qwen3.5-35B-A3B. Keys of mixtures "
    "start with `qwen35moe` instead of `qwen35`, without `feed_forward_length`."
)
_CARD_LEAD = (
    "Further keys come from a model card (`README.md`) and `generation_config.json` beside the "
    "weights, if they have the entry:"
)
_MANIFEST_LEAD = (
    "Every output folder holds `qwen35.json`, which records its source, recipe and the SHA-256 of "
    "every file. `qwen35 reproduce` rebuilds the folder from it. A dot descends into an object, "
    "`[]` into a list; `NAME` and `FILE` stand for names."
)


def gguf_keys_page() -> str:
    """Return the page of GGUF keys."""
    found = _text_keys() | _projector_keys() | _moe_keys() | _imatrix_keys()
    _check("GGUF key", found, GGUF_KEYS)
    card = {key: value for key, value in _card_keys().items() if key not in found}
    _check("GGUF key of a card", card, CARD_KEYS)
    lines = heading("GGUF keys", _GGUF_LEAD)
    rows = ([code(k), cell(GGUF_KEYS[k]), _example(v)] for k, v in found.items())
    lines += [*table(("key", "meaning", "example"), rows), _CARD_LEAD, ""]
    lines += table(("key", "from"), ([code(k), cell(CARD_KEYS[k])] for k in card))
    return "\n".join(lines).rstrip() + "\n"


def _check(what: str, found: Mapping[str, Any], meanings: Mapping[str, str]) -> None:
    silent = [key for key in found if key not in meanings]
    gone = [key for key in meanings if key not in found]
    if silent or gone:
        raise SystemExit(f"{what} without a meaning: {silent}; meaning without a key: {gone}")


def _gguf(checkpoint: Checkpoint, *types: str, **options: Any) -> Plan:
    return make_plan(checkpoint, load_recipe("mix", "gguf"), types=types, **options)


def _keys_of(plan: Plan, which: int = 0) -> dict[str, Any]:
    """Return the keys in the header of one file of a plan, as a reader sees them."""
    planned = plan.files[which]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.gguf"
        with path.open("wb") as file:
            file.write(planned.head)
            file.truncate(planned.nbytes)
        return dict(read_container(path).keys)


def _text_keys() -> dict[str, Any]:
    made = Imatrix("imatrix.gguf", {}, "calibration.txt", 40, "0" * 64)
    plan = _gguf(describe(str(TINY)), "F16", "Q4_K_M")
    return _keys_of(plan) | made.keys() | _split_keys()


def _split_keys() -> dict[str, Any]:
    return _keys_of(_gguf(describe(str(TINY)), "Q4_K_M", split_max_size=10**6), -1)


def _projector_keys() -> dict[str, Any]:
    plan = _gguf(describe(str(TINY)), "F16", projector="F16")
    own = _keys_of(plan, -1)
    return {key: value for key, value in own.items() if key.startswith("clip.")}


def _moe_keys() -> dict[str, Any]:
    own = _keys_of(_gguf(describe(_MOE), "F16"))
    return {key: value for key, value in own.items() if ".expert" in key}


def _imatrix_keys() -> dict[str, Any]:
    plan = _calibration()
    keys = {
        "imatrix.datasets": [name for name, _ in plan.text.files],
        "imatrix.chunk_count": len(plan.text.windows),
        "imatrix.chunk_size": plan.text.context,
    }
    return keys | {"qwen35.calibration": json.dumps({"qwen35": "..."})}


def _card_keys() -> dict[str, Any]:
    """Return the keys of the embedded checkpoint with a fuller card and sampling defaults."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / TINY.name
        folder.mkdir()
        for path in TINY.iterdir():
            if path.name not in ("README.md", "generation_config.json"):
                (folder / path.name).symlink_to(path)
        (folder / "README.md").write_text(_CARD)
        (folder / "generation_config.json").write_text(json.dumps(_SAMPLING))
        return _keys_of(_gguf(describe(str(folder)), "F16"))


def _example(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(str(item) for item in value[:4])
        return code(f"[{shown}{', ...' if len(value) > 4 else ''}]"[:60])
    text = str(value).splitlines()[0]
    return code(text if len(text) <= 40 else f"{text[:40]}...")


def manifest_page() -> str:
    """Return the page of the manifest's keys."""
    found: dict[str, None] = {}
    for manifest in _manifests():
        found |= dict.fromkeys(_paths(manifest))
    _check("manifest key", found, MANIFEST_KEYS)
    ordered = [key for key in MANIFEST_KEYS if key in found]
    lines = heading("The manifest", _MANIFEST_LEAD)
    lines += table(("key", "meaning"), ([code(k), cell(MANIFEST_KEYS[k])] for k in ordered))
    return "\n".join(lines).rstrip() + "\n"


def _paths(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield the path of every key; names that are data become FILE or NAME."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            path = f"{prefix}.{_named(prefix, key)}" if prefix else str(key)
            yield path
            yield from _paths(inner, path)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        yield from _paths(value[0], f"{prefix}[]")


_OF_FILES = ("files", "added", "tensors", "refined", "amended[].files", "source.adapters[].files")


def _named(prefix: str, key: str) -> str:
    if prefix in _OF_FILES:
        return "FILE"
    open_ended = prefix in (
        "verified.counts",
        "recipe.geometry",
        "source.quantized",
    ) or prefix.startswith(("tensors.", "refined."))
    return "NAME" if open_ended else key


def _manifests() -> Iterator[Mapping[str, Any]]:
    """Yield a manifest of each kind, from plans; nothing is converted."""
    tiny = describe(str(TINY))
    plan = make_plan(tiny, load_recipe("fp8"))
    hashes = dict.fromkeys((name for name, _ in plan.file_sizes()), "0" * 64)
    content = manifest_bytes(plan, hashes)
    yield json.loads(content)
    yield _published(content)
    gguf = _gguf(tiny, "F16", mtp_file="Q8_0", split_max_size=10**9)
    sizes = dict(gguf.file_sizes())
    yield json.loads(manifest_bytes(gguf, dict.fromkeys(sizes, "0" * 64)))
    entry = {"size": 1, "sha256": "0" * 64}
    yield {"amended": [{"when": "", "why": "", "files": {"chat_template.jinja": entry}}]}
    hessians: dict[str, Any] = {"name": "statistics", "sha256": "0" * 64}
    hessians |= {"text": [{"name": "text.txt", "sha256": "0" * 64}], "tokens": 131072}
    yield {"recipe": {"codes": "refined", "hessians": hessians}}
    yield {"refined": {"model.safetensors": {"a weight": "1"}}}
    source = {"repo": "owner/name", "revision": "a commit", "quantized": {"NF4": 1}}
    yield {"source": source | {"file": "a GGUF file"}}
    row = {"name": "adapter", "weight": 1.0, "sha256": "0" * 64, "config_sha256": "0" * 64}
    row |= {"files": {"tokenizer.json": "0" * 64}, "onto": "nf4"}
    yield {"source": {"adapters": [row]}}
    yield _with_scale_choice(tiny)


def _calibration() -> Any:
    tiny = describe(str(TINY))
    text = read_text(tiny, [TINY / "eval.txt"], windows=4)
    return plan_calibration(tiny, text, CalibrationRequest())


def _with_scale_choice(tiny: Checkpoint) -> Mapping[str, Any]:
    recipe = {"name": "calibrate", "format": "statistics", "rules": [], **_calibration().provenance}
    return manifest_entries(tiny, recipe, "", {}, {})


def _published(content: bytes) -> Mapping[str, Any]:
    """Return a manifest after verification, evaluation and documents."""
    error = RoleError("self_attn.q_proj", "fp8", 1, 0.1, 1.0, 0.1)
    answer = Answer(Question("2 + 2?", "4", image=Halves("red", "blue")), "4", "a.gguf")
    finding = Finding("check", "subject", "message")
    verdict = Verdict("x", "fp8", "numbers", {"weights": 1}, (error,), (finding,), (answer,))
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "artifact"
        folder.mkdir()
        (folder / MANIFEST_NAME).write_bytes(content)
        (folder / REPORT_NAME).write_text('{"table": {"columns": ["a"], "rows": [["b"]]}}')
        made = documents(folder, "owner/name", verdict=verdict)[MANIFEST_NAME]
        parsed: Mapping[str, Any] = json.loads(made)
        return parsed
