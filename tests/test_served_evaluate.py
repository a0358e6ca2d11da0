"""`evaluate --endpoint`: servers whose log probabilities are those of a model in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import qwen35
from checkpoints import ASSET
from evaluating import gguf, make_formats, measure
from fake_server import FakeServer, serving
from pages import ROOT
from qwen35.array_types import F64
from qwen35.cli.main import main
from qwen35.engines.llama import Llama
from qwen35.errors import EndpointError, InputError, UsageError
from qwen35.evaluation.cache import compact
from qwen35.evaluation.reference import ExactReference, SixteenBitReference
from qwen35.evaluation.served_candidate import compared
from qwen35.evaluation.text_chunks import TokenChunks
from qwen35.serving.token_scores import SAMPLED, TokenScores


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_formats(tmp_path_factory.mktemp("formats"))


class Scoring:
    """What vLLM, SGLang and llama-server answer for a model that runs in llama.cpp here.

    Args:
        path: the model.
        text: what it will be asked about.
        most: likely tokens that are told at most.
    """

    def __init__(self, path: str, text: Path, most: int) -> None:
        self._llama = Llama(Path(path), context=512, threads=1)
        self._most = most
        self._texts: dict[int, str] = {}
        ids = self._llama.encode(text.read_text("utf-8"), special=False)[:1024]
        self._known = [list(ids[:512]), list(ids[512:])]
        self._rows = [self._computed(part) for part in self._known]

    def close(self) -> None:
        self._llama.close()

    def _log(self, ids: list[int]) -> F64:
        """Return log probabilities after each token, [len(ids), v]; of a prefix, from the whole."""
        for known, rows in zip(self._known, self._rows, strict=True):
            if known[: len(ids)] == ids:
                return rows[: len(ids)]
        return self._computed(ids)

    def _computed(self, ids: list[int]) -> F64:
        logits = self._llama.lend_logits(ids, 0).astype(np.float64)
        found: F64 = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return found

    def _likely(self, row: F64, count: int, *more: int) -> list[int]:
        order = np.argsort(-row, kind="stable")[:count]
        return list(dict.fromkeys([*more, *map(int, order)]))

    def vllm(self, body: Any) -> Any:
        count, ids = body["prompt_logprobs"], body["prompt"]
        if count > self._most:
            return 400, {}, b'{"error": {"message": "max_logprobs"}}'
        told: list[Any] = [None]
        for row, token in zip(self._log(ids)[:-1], ids[1:], strict=True):
            likely = self._likely(row, count, token)
            told.append(
                {str(i): {"logprob": row[i], "decoded_token": self.text(i)} for i in likely}
            )
        return {"choices": [{"text": "", "prompt_logprobs": told}]}

    def sglang(self, body: Any) -> Any:
        ids, count = body["input_ids"], min(self._most, body["top_logprobs_num"])
        actual: list[Any] = [[None, ids[0], None]]
        tops: list[Any] = [None]
        for row, token in zip(self._log(ids)[:-1], ids[1:], strict=True):
            actual.append([row[token], token, self.text(token)])
            tops.append([[row[i], i, self.text(i)] for i in self._likely(row, count)])
        return {"meta_info": {"input_token_logprobs": actual, "input_top_logprobs": tops}}

    def llama_cpp(self, body: Any) -> Any:
        row = self._log(body["prompt"])[-1]
        likely = self._likely(row, min(self._most, body["n_probs"]))
        told = [{"id": i, "token": self.text(i), "logprob": row[i]} for i in likely]
        return {"content": "", "completion_probabilities": [{"top_logprobs": told}]}

    def text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._llama.decode([token])
        return self._texts[token]


PATHS = {"vllm": "/v1/completions", "sglang": "/generate", "llamacpp": "/completion"}


@pytest.fixture
def scoring(formats: Path) -> Iterator[Callable[..., FakeServer]]:
    made: list[Scoring] = []

    def make(owner: str, kind: str = "Q4_K_M", most: int = 100) -> FakeServer:
        model = Scoring(gguf(formats, kind), formats / "text.txt", most)
        made.append(model)
        answers = {"vllm": model.vllm, "sglang": model.sglang, "llamacpp": model.llama_cpp}
        return FakeServer(routes={PATHS[owner]: answers[owner]}, owner=owner)

    yield make
    for model in made:
        model.close()


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
def test_the_figures_are_those_of_the_model_in_this_process(
    owner: str, scoring: Any, formats: Path
) -> None:
    """Of 100 likely tokens: a little below the divergence, by less than the bound."""
    base, other = gguf(formats, "F16"), gguf(formats, "Q4_K_M")
    with serving(scoring(owner)) as fake:
        report = qwen35.evaluate(
            base, [other], endpoint=[fake.url], text=formats / "text.txt", chunks=2, threads=1
        )
    here, there = (row.comparison for row in report.candidates)
    assert there.kld.value <= here.kld.value * (1 + 1e-6)
    assert there.kld.value > 0.7 * here.kld.value
    assert here.kld.value < there.kld.value + there.bound
    for name in ("perplexity", "ratio", "change", "same_top"):
        one, two = getattr(here, name), getattr(there, name)
        assert two.value == pytest.approx(one.value, rel=1e-5, abs=1e-7), name
        assert two.block_error == pytest.approx(one.block_error, rel=1e-3, abs=1e-6), name
    columns, rows = report.table
    assert columns[-1] == f"tiny at {fake.url.removeprefix('http://')}"
    assert {row[0]: row[-1] for row in rows}["Bytes"] == "-"
    assert not report.candidates[1].front


def test_llama_server_is_asked_at_some_positions(
    scoring: Any, formats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = gguf(formats, "F16")
    asked = ["--text", str(formats / "text.txt"), "--chunks", "2", "--threads", "1", "--json"]
    with serving(scoring("llamacpp")) as fake:
        assert main(["evaluate", base, "--endpoint", fake.url, *asked]) == 0
    told = json.loads(capsys.readouterr().out)
    schema = json.loads((ROOT / "docs" / "schemas" / "evaluate.json").read_text("utf-8"))
    jsonschema.validate(told, schema)
    [row] = told["candidates"]
    assert row["scored"] == 2 * SAMPLED
    assert row["engine"] == "server"
    assert row["served"]["server"] == "llama-server"
    prompts = [body["prompt"] for path, body in fake.heard if path == "/completion"]
    assert prompts[:2] == [[1], [1, 2]]  # whether it tells log probabilities at all
    prompts = prompts[2:]
    assert [len(prompt) for prompt in prompts[:SAMPLED]][:: SAMPLED - 1] == [257, 511]
    whole = measure(formats, base, gguf(formats, "Q4_K_M")).candidates[0].comparison
    assert row["figures"]["kld"]["value"] == pytest.approx(whole.kld.value, rel=0.5)
    assert all(0 <= word["kld"] < 10 for word in row["worst"])


def test_vllm_is_asked_for_as_many_as_it_gives(scoring: Any, formats: Path) -> None:
    with serving(scoring("vllm", most=20)) as fake:
        report = qwen35.evaluate(
            gguf(formats, "F16"),
            endpoint=[fake.url],
            text=formats / "text.txt",
            chunks=1,
            threads=1,
        )
    counts = [body["prompt_logprobs"] for path, body in fake.heard if path == "/v1/completions"]
    assert counts[:3] == [256, 100, 20]
    assert set(counts[3:]) == {256, 100, 20}  # once more when it runs
    assert counts[-1] == 20
    assert report.candidates[0].comparison.bound > 0


def test_other_tokens_are_refused(scoring: Any, formats: Path) -> None:
    fake = scoring("vllm")
    right = fake.routes["/v1/completions"]

    def shifted(body: Any) -> Any:
        answer = right(body)
        if isinstance(answer, tuple):
            return answer  # fewer, please
        for row in answer["choices"][0]["prompt_logprobs"][1:]:
            for entry in row.values():
                entry["decoded_token"] += "x"
        return answer

    fake.routes["/v1/completions"] = shifted
    with serving(fake), pytest.raises(InputError, match="only models with the same tokenizer"):
        measure_served(fake, formats)


def measure_served(fake: FakeServer, formats: Path, **options: Any) -> Any:
    base, text = gguf(formats, "F16"), formats / "text.txt"
    return qwen35.evaluate(base, endpoint=[fake.url], text=text, chunks=1, threads=1, **options)


@pytest.mark.parametrize(
    ("owner", "answer", "found"),
    [
        ("vllm", {"choices": [{"text": "x"}]}, "tells nothing about token 1 of a prompt"),
        ("sglang", {"meta_info": {"input_token_logprobs": 7}}, "tells nothing about token 1 of"),
        ("llamacpp", {"completion_probabilities": [[]]}, "tells nothing about token 1 of"),
        ("someone", {}, "tells nothing about token 1 of a prompt"),
    ],
)
def test_a_server_without_log_probabilities_is_refused(
    owner: str, answer: Any, found: str, formats: Path
) -> None:
    routes = {path: lambda _: answer for path in PATHS.values()}
    with (
        serving(FakeServer(routes=routes, owner=owner)) as fake,
        pytest.raises(EndpointError, match=found),
    ):
        measure_served(fake, formats)


def test_a_server_that_fails_at_token_ids_is_refused(formats: Path) -> None:
    """As llama-cpp-python's own server does, with HTTP 500."""
    told: Any = (500, {}, b'{"error": {"message": "Input should be a valid string"}}')
    found = r"takes no token ids, or tells no .* \(HTTP 500 \(Input should .*\); vLLM, SGLang and"
    with (
        serving(FakeServer(routes={PATHS["vllm"]: lambda _: told}, owner="me")) as fake,
        pytest.raises(EndpointError, match=found),
    ):
        measure_served(fake, formats)


def test_ollama_cannot_be_measured(formats: Path) -> None:
    show = {"details": {"quantization_level": "Q4_K_M"}}
    with (
        serving(FakeServer(routes={"/api/show": lambda _: show}, owner="library")) as fake,
        pytest.raises(EndpointError, match="tells no log probabilities of given tokens; vLLM"),
    ):
        measure_served(fake, formats)


def test_speed_is_measured_alone_and_under_load(scoring: Any, formats: Path) -> None:
    fake = scoring("vllm", most=20)
    fake.delay = 0.01
    with serving(fake):
        report = measure_served(fake, formats, speed=True)
    [alone, loaded] = report.candidates[0].served_speed
    assert (alone.at_once, alone.requests, loaded.at_once, loaded.requests) == (1, 3, 8, 24)
    for speed in (alone, loaded):
        assert 0.01 <= speed.first[0] <= speed.first[1] <= speed.first[2] < 5
        assert speed.prompt > 0
        assert speed.generation > 0
    rows = {row[0]: row[1] for row in report.table[1]}
    assert rows["First token, s: 50, 90, 99 % (8 at once)"].count("/") == 2
    assert len({json.dumps(body) for path, body in fake.heard if "chat" in path}) == 28


def test_names_are_for_endpoints() -> None:
    with pytest.raises(UsageError, match="--model: given 1 times, expected once for each of 2"):
        qwen35.evaluate(ASSET, endpoint=["http://a", "http://b"], served_model=["x"])
    with pytest.raises(UsageError, match="--api-key-env: is for --endpoint"):
        qwen35.evaluate(ASSET, api_key_env="X")


# --- the arithmetic


def _scores(log_q: F64, ids: Any, first: int) -> TokenScores:
    values = np.take_along_axis(log_q, ids, axis=1)
    places = np.arange(first, first + len(log_q))
    return TokenScores(places, np.full(len(log_q), np.nan), ids, values, {})


@pytest.mark.parametrize("kept", [1, 5, 300])
def test_the_divergence_is_bounded_from_both_sides(kept: int) -> None:
    """Against the definition, in float64, for each kind of reference."""
    random = np.random.default_rng(5)
    width, chunks = 300, TokenChunks(random.integers(0, 300, (1, 8)).astype(np.int32))
    logits = random.normal(0, 3, (chunks.scored, width)).astype(np.float32)
    moved = logits + random.normal(0, 0.3, logits.shape)
    sums = [np.exp(x.astype(np.float64)).sum(axis=1, keepdims=True) for x in (logits, moved)]
    log_p, log_q = logits - np.log(sums[0]), moved - np.log(sums[1])
    true = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    ids = np.argsort(-log_q, axis=1)[:, :kept]
    exact = ExactReference(logits, chunks.targets(0), 1)
    step = np.float32(-log_p.min() / 65535)
    words = np.round((log_p - log_p.min()) / step).astype(np.uint16)
    scale = np.full(len(words), step, np.float32)
    least = np.full(len(words), log_p.min(), np.float32)
    sixteen = SixteenBitReference(words, scale, least, chunks.targets(0))
    for reference in (exact, compact(exact), sixteen):
        found = compared(reference, _scores(log_q, ids, chunks.first), chunks, width)
        assert found.bound is not None
        assert (found.kld <= true + 2e-4).all()
        assert (true <= found.kld + found.bound + 2e-4).all()
        assert (found.top == log_q.argmax(axis=1)).all()
        if kept == width:
            assert found.kld == pytest.approx(true, abs=2e-4)
            assert found.bound == pytest.approx(0, abs=1e-4)
        assert np.isfinite(found.nll).all()
