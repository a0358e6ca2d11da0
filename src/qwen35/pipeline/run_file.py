"""A run's TOML file: read whole, every problem of it a sentence."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from qwen35.checkpoint.hub import HubId
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import UsageError
from qwen35.pipeline.run_request import (
    ArtifactRequest,
    MeasurementRequest,
    RunRequest,
    path_artifacts,
    repo_problem,
)
from qwen35.verification.verdict import Depth

__all__ = ["read_job"]

_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "text": (str, "a text"),
    "flag": (bool, "true or false"),
    "number": ((int, float), "a number"),
    "count": (int, "a whole number"),
    "texts": (list, "a list of texts"),
    "text or texts": ((str, list), "a text or a list of texts"),
    "table": (dict, "a table"),
    "tables": (list, "tables"),
}
"""Kind of a value to what Python makes of it and what a sentence calls it."""

_TOP = {
    "model": "text",
    "out": "text",
    "path": "text or texts",
    "types": "texts",
    "imatrix": "text",
    "depth": "text",
    "artifact": "tables",
    "gguf": "tables",
    "evaluate": "table",
    "publish": "table",
}
_COMMON = {"recipe": "text", "name": "text", "repo": "text", "drop_mtp": "flag"}
_ARTIFACT = _COMMON | {
    "keep": "texts",
    "keep_prefix": "flag",
    "calib_mode": "text",
    "rms_factor": "number",
    "calib_percentile": "number",
    "mse_grid_size": "count",
    "activation_stats": "text",
}
_GGUF = _COMMON | {"types": "texts", "imatrix": "text", "mmproj": "flag"}
_EVALUATE = {"text": "text", "chunks": "count"}
_PUBLISH = {"owner": "text", "private": "flag"}


def read_job(path: Path) -> RunRequest:
    """Read a run's file; paths in it are relative to its folder.

    Everything that is wrong is in the job's `problems`; the job is of use only if there are none.

    Raises:
        UsageError: the file cannot be read or is not TOML.
    """
    try:
        parsed = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(str(path), f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(str(path), "not UTF-8", expected="TOML") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(str(path), f"not valid TOML ({error})") from error
    return _Reader(path).job(parsed)


@dataclass
class _Reader:
    """Collects problems while it reads."""

    path: Path
    problems: list[UsageError] = field(default_factory=list)

    def job(self, parsed: Mapping[str, Any]) -> RunRequest:
        top = self._checked("", parsed, _TOP)
        for name in ("model", "out"):
            if not top.get(name):
                self._problem(name, "is missing")
        depth = top.get("depth", "behaviour")
        if depth not in get_args(Depth):
            self._problem("depth", repr(depth), expected=" or ".join(get_args(Depth)))
            depth = "behaviour"
        evaluate = self._checked("evaluate", top.get("evaluate", {}), _EVALUATE)
        if "evaluate" in top and not evaluate.get("text"):
            self._problem("evaluate.text", "is missing", hint="name a text to measure on")
        publish = self._checked("publish", top.get("publish", {}), _PUBLISH)
        owner = publish.get("owner", "")
        if owner and HubId.parse(f"{owner}/name") is None:
            self._problem("publish.owner", repr(owner), expected="a user or an organization")
        text, chunks = evaluate.get("text"), evaluate.get("chunks", 0)
        if chunks < 0:
            self._problem("evaluate.chunks", repr(chunks), expected="0 (all) or more")
        return RunRequest(
            model=self._model(top.get("model", "")),
            out=self._near(top.get("out", ".")),
            artifacts=self._artifacts(top),
            depth=depth,
            measuring=MeasurementRequest(self._near(text), chunks) if text else None,
            owner=owner,
            private=publish.get("private", False),
            problems=tuple(self.problems),
        )

    def _artifacts(self, top: Mapping[str, Any]) -> tuple[ArtifactRequest, ...]:
        paths = top.get("path", [])
        paths = [paths] if isinstance(paths, str) else paths
        made: list[ArtifactRequest] = []
        try:
            imatrix = self._imatrix(top.get("imatrix", ""))
            made += path_artifacts(paths, types=self._types(top), imatrix=imatrix)
        except UsageError as error:
            self._problem(error.subject, error.found, expected=error.expected, hint=error.hint)
        made += self._each("artifact", top, _ARTIFACT, self._safetensors)
        made += self._each("gguf", top, _GGUF, self._gguf)
        if not made and not self.problems:
            hint = 'say path = "A", "B" or "fp8", or give [[artifact]] or [[gguf]]'
            self._problem("path", "nothing to make", hint=hint)
        return tuple(made)

    def _each(
        self, name: str, top: Mapping[str, Any], schema: Any, make: Any
    ) -> list[ArtifactRequest]:
        made = []
        for number, row in enumerate(top.get(name, []), 1):
            where = f"{name} {number}"
            if not isinstance(row, dict):
                self._problem(where, "not a table", hint=f"write [[{name}]]")
                continue
            try:
                made.append(make(where, self._checked(where, row, schema)))
            except UsageError as error:
                self._problem(
                    f"{where}: {error.subject}",
                    error.found,
                    expected=error.expected,
                    hint=error.hint,
                )
        return made

    def _safetensors(self, where: str, row: Mapping[str, Any]) -> ArtifactRequest:
        if not row.get("recipe"):
            self._problem(f"{where}.recipe", "is missing")
        names = ("calib_mode", "rms_factor", "calib_percentile", "mse_grid_size")
        scale_choice = None
        if any(name in row for name in names):
            if "calib_mode" not in row:
                raise UsageError("calib_mode", "is missing", hint="its parameters need it")
            fields = ("mode", "rms_factor", "percentile", "grid_size")
            given = {f: row[n] for f, n in zip(fields, names, strict=True) if n in row}
            scale_choice = ScaleChoice(**given)
        statistics = row.get("activation_stats")
        return ArtifactRequest(
            **self._common(where, row, "nf4"),
            keep=tuple(row.get("keep", ())),
            keep_prefix=row.get("keep_prefix", False),
            scale_choice=scale_choice,
            activation_stats=self._near(statistics) if statistics else None,
        )

    def _gguf(self, where: str, row: Mapping[str, Any]) -> ArtifactRequest:
        types = self._types(row)
        if not types:
            self._problem(f"{where}.types", "is missing", hint='for instance ["F16", "Q4_K_M"]')
        return ArtifactRequest(
            **self._common(where, row, "mix"),
            types=types or ("F16",),
            imatrix=self._imatrix(row.get("imatrix", "")),
            mmproj=row.get("mmproj", False),
        )

    def _common(self, where: str, row: Mapping[str, Any], default: str) -> dict[str, Any]:
        name, repo = row.get("name", ""), row.get("repo", "")
        if name and (Path(name).name != name or name.startswith(".")):
            self._problem(f"{where}.name", repr(name), expected="a folder's plain name")
        if repo and (problem := repo_problem(f"{where}.repo", repo)):
            self._problem(problem.subject, problem.found, expected=problem.expected)
        recipe = row.get("recipe") or default
        if recipe.endswith(".toml"):
            recipe = str(self._near(recipe))
        return {
            "recipe": recipe,
            "name": name,
            "repo": repo,
            "drop_mtp": row.get("drop_mtp", False),
        }

    @staticmethod
    def _types(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.upper() for name in row.get("types", ())))

    def _near(self, name: str) -> Path:
        return self.path.parent / Path(name).expanduser()

    def _model(self, name: str) -> str:
        """A folder beside the file if there is one; else what the user said."""
        near = self._near(name)
        return str(near) if name and near.is_dir() else name

    def _imatrix(self, name: str) -> str:
        return name if not name or name.startswith("hf:") else str(self._near(name))

    def _checked(self, where: str, table: Any, schema: Mapping[str, str]) -> dict[str, Any]:
        """Return the entries of a table that are of the kind they should be."""
        good = {}
        for key, value in table.items() if isinstance(table, dict) else ():
            subject = f"{where}.{key}" if where else key
            kind = schema.get(key)
            if kind is None:
                self._problem(subject, "unknown key", expected=", ".join(schema))
            elif not _is(value, kind):
                self._problem(subject, repr(value)[:80], expected=_KINDS[kind][1])
            else:
                good[key] = value
        return good

    def _problem(self, subject: str, found: str, *, expected: str = "", hint: str = "") -> None:
        subject = f"{self.path.name}: {subject}"
        if all(problem.subject != subject for problem in self.problems):
            self.problems.append(UsageError(subject, found, expected=expected, hint=hint))


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind != "flag":
        return False
    if kind in ("texts", "text or texts") and isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, _KINDS[kind][0])
