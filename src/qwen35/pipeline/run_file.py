"""A run's TOML file: read completely, with all its problems collected."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from qwen35.checkpoint.hub import HubId
from qwen35.checkpoint.locations import expanded, read_bounded
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.codecs.registry import LAYOUTS, TRAINED_ON
from qwen35.display import bytes_of, units_for
from qwen35.errors import UsageError, unknown_name
from qwen35.pipeline.run_request import (
    ArtifactRequest,
    MeasurementRequest,
    RunRequest,
    path_artifacts,
    repo_problem,
)
from qwen35.planning.gguf_files.gguf_options import projector_type
from qwen35.planning.gguf_files.mixes import FILE_TYPES, type_names
from qwen35.planning.recipe import built_in
from qwen35.planning.refinement import CODES
from qwen35.planning.safetensors_files.safetensors_options import KV_CACHES
from qwen35.serving.endpoint import Endpoint
from qwen35.verification.verdict import Depth

__all__ = ["read_run_file"]

_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "text": (str, "a string"),
    "flag": (bool, "true or false"),
    "flag or text": ((bool, str), "true, false or a string"),
    "number": ((int, float), "a number"),
    "count": (int, "a whole number"),
    "texts": (list, "a list of strings"),
    "text or texts": ((str, list), "a string or a list of strings"),
    "table": (dict, "a table"),
    "tables": (list, "tables"),
}
"""Kinds of values: the Python type, and its name in error messages."""

TOP_KEYS = {
    "model": "text",
    "out": "text",
    "adapters": "texts",
    "onto": "text",
    "mtp_from": "text",
    "path": "text or texts",
    "types": "texts",
    "imatrix": "text",
    "codes": "text",
    "hessian": "text",
    "depth": "text",
    "artifact": "tables",
    "gguf": "tables",
    "evaluate": "table",
    "publish": "table",
}
_COMMON = {
    "recipe": "text",
    "name": "text",
    "repo": "text",
    "mtp": "text",
    "drop_mtp": "flag",
    "codes": "text",
    "hessian": "text",
    "endpoint": "text",
    "served_model": "text",
}
ARTIFACT_KEYS = _COMMON | {
    "keep": "texts",
    "keep_prefix": "flag",
    "layout": "text",
    "activations": "flag",
    "calib_mode": "text",
    "rms_factor": "number",
    "calib_percentile": "number",
    "mse_grid_size": "count",
    "activation_stats": "text",
    "kv_cache": "text",
}
_NAMES = {"layout": LAYOUTS, "kv_cache": KV_CACHES}
"""Keys with one of several names, which are checked here: plans are made of a sound file only."""
GGUF_KEYS = _COMMON | {
    "types": "texts",
    "imatrix": "text",
    "mmproj": "flag or text",
    "mtp_type": "text",
    "split_max_size": "text",
}
EVALUATE_KEYS = {"text": "text", "chunks": "count", "streamed": "flag", "simulate": "text"}
_SIMULATED = "llama.cpp"
PUBLISH_KEYS = {"owner": "text", "private": "flag"}


def read_run_file(path: Path) -> RunRequest:
    """Read a run's file; paths in it are relative to its folder.

    All problems are collected in `RunRequest.problems`; use the request only if there are none.

    Raises:
        UsageError: the file cannot be read or is not TOML.
    """
    try:
        parsed = tomllib.loads(read_bounded(path).decode())
    except UnicodeDecodeError as error:
        raise UsageError(str(path), "not UTF-8", expected="TOML") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(str(path), f"not valid TOML ({error})") from error
    return _Reader(path).request(parsed)


@dataclass
class _Reader:
    """Reads a parsed file and collects its problems."""

    path: Path
    problems: list[UsageError] = field(default_factory=list)

    def request(self, parsed: Mapping[str, Any]) -> RunRequest:
        top = self._checked("", parsed, TOP_KEYS)
        for name in ("model", "out"):
            if not top.get(name):
                self._problem(name, "is missing")
        depth = top.get("depth", "behaviour")
        if depth not in get_args(Depth):
            self._unknown("depth", depth, get_args(Depth))
            depth = "behaviour"
        evaluate = self._checked("evaluate", top.get("evaluate", {}), EVALUATE_KEYS)
        if "evaluate" in top and not evaluate.get("text"):
            self._problem("evaluate.text", "is missing", hint="name a text to measure on")
        publish = self._checked("publish", top.get("publish", {}), PUBLISH_KEYS)
        owner = publish.get("owner", "")
        if owner and HubId.parse(f"{owner}/name") is None:
            self._problem("publish.owner", repr(owner), expected="a user or an organization")
        return RunRequest(
            model=self._model(top.get("model", "")),
            out=self._near(top.get("out", ".")),
            artifacts=self._artifacts(top),
            depth=depth,
            adapters=tuple(str(self._near(name)) for name in top.get("adapters", ())),
            onto=self._onto(top),
            mtp_from=self._model(top.get("mtp_from", "")),
            measurement=self._measurement(evaluate),
            owner=owner,
            private=publish.get("private", False),
            problems=tuple(self.problems),
        )

    def _onto(self, top: Mapping[str, Any]) -> str | None:
        """Return the format that adapters are merged onto."""
        onto: str | None = top.get("onto")
        if onto is not None and onto not in TRAINED_ON:
            self._unknown("onto", onto, TRAINED_ON)
        elif onto is not None and not top.get("adapters"):
            self._problem("onto", "given without adapters", hint="add adapters, or leave it out")
        return onto

    def _artifacts(self, top: Mapping[str, Any]) -> tuple[ArtifactRequest, ...]:
        paths = top.get("path", [])
        paths = [paths] if isinstance(paths, str) else paths
        requests: list[ArtifactRequest] = []
        try:
            imatrix = self._imatrix(top.get("imatrix", ""))
            made = path_artifacts(paths, types=type_names(top.get("types", ())), imatrix=imatrix)
            refined = self._refined("", top)
            requests += [replace(request, **refined) for request in made]
            if not made and any(refined.values()):
                hint = "set path, or give them in [[artifact]] or [[gguf]]"
                self._problem("codes and hessian", "are for the paths", hint=hint)
        except UsageError as error:
            self._problem(error.subject, error.found, expected=error.expected, hint=error.hint)
        requests += self._each("artifact", top, ARTIFACT_KEYS, self._safetensors)
        requests += self._each("gguf", top, GGUF_KEYS, self._gguf)
        if not requests and not self.problems:
            hint = 'set path = "nf4" or another, or add [[artifact]] or [[gguf]]'
            self._problem("path", "nothing to make", hint=hint)
        return tuple(requests)

    def _each(
        self, name: str, top: Mapping[str, Any], schema: Any, make: Any
    ) -> list[ArtifactRequest]:
        requests = []
        for number, row in enumerate(top.get(name, []), 1):
            where = f"{name} {number}"
            if not isinstance(row, dict):
                self._problem(where, "not a table", hint=f"write [[{name}]]")
                continue
            try:
                requests.append(make(where, self._checked(where, row, schema)))
            except UsageError as error:
                self._problem(
                    f"{where}: {error.subject}",
                    error.found,
                    expected=error.expected,
                    hint=error.hint,
                )
        return requests

    def _safetensors(self, where: str, row: Mapping[str, Any]) -> ArtifactRequest:
        if not row.get("recipe"):
            self._problem(f"{where}.recipe", "is missing")
        for key, known in _NAMES.items():
            if key in row and row[key] not in known:
                self._unknown(f"{where}.{key}", row[key], known)
        names = ("calib_mode", "rms_factor", "calib_percentile", "mse_grid_size")
        scale_choice = None
        if any(name in row for name in names):
            if "calib_mode" not in row:
                raise UsageError("calib_mode", "is missing", hint="its parameters need it")
            fields = ("mode", "rms_factor", "percentile", "grid_size")
            values = {f: row[n] for f, n in zip(fields, names, strict=True) if n in row}
            scale_choice = ScaleChoice(**values)
        statistics = row.get("activation_stats")
        return ArtifactRequest(
            **self._common(where, row, "safetensors"),
            keep=tuple(row.get("keep", ())),
            keep_prefix=row.get("keep_prefix", False),
            layout=row.get("layout"),
            activations=row.get("activations", False),
            scale_choice=scale_choice,
            activation_stats=self._near(statistics) if statistics else None,
            kv_cache=row.get("kv_cache"),
        )

    def _gguf(self, where: str, row: Mapping[str, Any]) -> ArtifactRequest:
        types = type_names(row.get("types", ()))
        for name in types:
            if name not in FILE_TYPES:
                self._unknown(f"{where}.types", name, FILE_TYPES)
        if not types:
            self._problem(f"{where}.types", "is missing", hint='for instance ["F16", "Q4_K_M"]')
        mmproj = row.get("mmproj", False)
        projector_type(mmproj, "mmproj")
        return ArtifactRequest(
            **self._common(where, row, "gguf"),
            types=types or ("F16",),
            imatrix=self._imatrix(row.get("imatrix", "")),
            mmproj=mmproj,
            mtp_type=row.get("mtp_type"),
            split_max_size=self._size(f"{where}.split_max_size", row.get("split_max_size")),
        )

    def _size(self, where: str, text: str | None) -> int | None:
        try:
            size = None if text is None else bytes_of(text)
        except ValueError:
            size = 0
        if size is not None and size < 1:
            examples = units_for(str(text), "40G", ("GB",))
            self._problem(where, repr(text)[:80], expected=f'a size such as "{examples}"')
        return size

    def _common(self, where: str, row: Mapping[str, Any], container: str) -> dict[str, Any]:
        name, repo = row.get("name", ""), row.get("repo", "")
        if name and (Path(name).name != name or name.startswith(".")):
            self._problem(f"{where}.name", repr(name), expected="a folder's plain name")
        if repo and (problem := repo_problem(f"{where}.repo", repo)):
            self._problem(problem.subject, problem.found, expected=problem.expected)
        if "served_model" in row and "endpoint" not in row:
            self._problem(f"{where}.served_model", "without an endpoint", hint="name that too")
        recipe = row.get("recipe") or built_in(container)[0]
        if recipe.endswith(".toml"):
            recipe = str(self._near(recipe))
        elif recipe not in built_in(container):
            self._unknown(f"{where}.recipe", recipe, (*built_in(container), "a .toml file"))
        return {
            "recipe": recipe,
            "name": name,
            "repo": repo,
            "mtp": row.get("mtp"),
            "drop_mtp": row.get("drop_mtp", False),
            **self._refined(f"{where}.", row),
            "endpoint": self._endpoint(where, row),
            "served_model": row.get("served_model"),
        }

    def _refined(self, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
        codes = row.get("codes")
        if codes is not None and codes not in CODES:
            self._unknown(f"{where}codes", codes, CODES)
            codes = None
        return {"codes": codes, "hessian": self._near(row["hessian"]) if "hessian" in row else None}

    def _endpoint(self, where: str, row: Mapping[str, Any]) -> Endpoint | None:
        """Return a server that runs already; a file never names a command to start one."""
        if "endpoint" not in row:
            return None
        try:
            return Endpoint.parse(row["endpoint"])
        except UsageError as error:
            subject = f"{where}.endpoint" if error.subject == "--endpoint" else error.subject
            self._problem(subject, error.found, expected=error.expected)
            return None

    def _near(self, name: str) -> Path:
        return self.path.parent / expanded(name)

    def _model(self, name: str) -> str:
        """Return a path relative to the file if it exists, else the name unchanged (a Hub id)."""
        near = self._near(name)
        return str(near) if name and near.exists() else name

    def _imatrix(self, name: str) -> str:
        return name if not name or name.startswith("hf:") else str(self._near(name))

    def _measurement(self, evaluate: Mapping[str, Any]) -> MeasurementRequest | None:
        chunks, simulate = evaluate.get("chunks", 0), evaluate.get("simulate", "")
        if chunks < 0:
            self._problem("evaluate.chunks", repr(chunks), expected="0 (all) or more")
        if simulate not in ("", _SIMULATED):
            self._unknown("evaluate.simulate", simulate, (_SIMULATED,))
        elif simulate and not evaluate.get("streamed"):
            hint = "set streamed = true: llama.cpp rounds inputs itself"
            self._problem("evaluate.simulate", "is for models that run layer by layer", hint=hint)
        if not evaluate.get("text"):
            return None
        text = self._near(evaluate["text"])
        return MeasurementRequest(text, chunks, evaluate.get("streamed", False), simulate)

    def _checked(self, where: str, table: Any, schema: Mapping[str, str]) -> dict[str, Any]:
        """Return the valid entries of a table; add a problem for each of the others."""
        valid = {}
        for key, value in table.items() if isinstance(table, dict) else ():
            subject = f"{where}.{key}" if where else key
            kind = schema.get(key)
            if kind is None:
                self._unknown(subject, key, schema, "unknown key")
            elif not _is(value, kind):
                self._problem(subject, repr(value)[:80], expected=_KINDS[kind][1])
            else:
                valid[key] = value
        return valid

    def _unknown(self, subject: str, name: str, known: Iterable[str], found: str = "") -> None:
        error = unknown_name(subject, name, known, found)
        self._problem(subject, error.found, expected=error.expected, hint=error.hint)

    def _problem(self, subject: str, found: str, *, expected: str = "", hint: str = "") -> None:
        subject = f"{self.path.name}: {subject}"
        # One problem per entry: later checks of a faulty entry would only repeat it.
        if all(problem.subject != subject for problem in self.problems):
            self.problems.append(UsageError(subject, found, expected=expected, hint=hint))


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and not kind.startswith("flag"):  # bool is a subclass of int
        return False
    if kind in ("texts", "text or texts") and isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, _KINDS[kind][0])
