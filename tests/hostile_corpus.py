"""The corpus of hostile input: files of every kind that is read, one line each on what they abuse.

    python tests/hostile_corpus.py CHECKPOINT FOLDER    # all of it, and a list

Malformed safetensors and GGUF heads are in `hostile` and `hostile_gguf`; here are the others, and
the command that meets each. A case is refused in a sentence (exit code 2), or, where the table says
so, handled.
"""

from __future__ import annotations

import copy
import json
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile
import hostile_gguf
from hostile_gguf import ARRAY, STRING, U32, key, record, text

__all__ = ["Case", "cases"]

INDEX = "model.safetensors.index.json"
_DEEP = "[" * 100_000 + "]" * 100_000
_LONG = "9" * 10_000


@dataclass(frozen=True)
class Case:
    """One abuse.

    Args:
        kind: what is abused.
        name: how.
        files: name to content; they take the place of the sound checkpoint's files.
        command: what meets it; ``@`` is the folder with the files, ``OUT`` a place to write to.
        codes: exit codes that are right.
    """

    kind: str
    name: str
    files: dict[str, bytes]
    command: tuple[str, ...]
    codes: tuple[int, ...] = (2,)


def cases(sound: Path) -> Iterator[Case]:
    """Yield all cases, made from the sound checkpoint in the folder `sound`."""
    for name, data in hostile.HOSTILE.items():
        files = {"model.safetensors": data, INDEX: b""}
        yield Case("safetensors", name, files, ("inspect", "@"))
        yield Case("safetensors", f"{name}, verified", files, ("verify", "@"), (1, 2))
    for name, data in hostile_gguf.HOSTILE.items():
        yield Case("gguf", name, {"bad.gguf": data}, ("verify", "@/bad.gguf"), (1, 2))
    for maker in (_index, _config, _tokenizer, _template, _toml, _statistics, _imatrix):
        yield from maker(sound)


def _index(sound: Path) -> Iterator[Case]:
    whole = json.loads((sound / INDEX).read_text())
    names = list(whole["weight_map"])
    shard = whole["weight_map"][names[0]]

    def mapped(**changes: Any) -> str:
        return json.dumps({"metadata": {}, "weight_map": {**whole["weight_map"], **changes}})

    rows = {
        "empty": "",
        "not JSON": "{",
        "a list": "[]",
        "nested 100,000 lists": _DEEP,
        "a number of 10,000 digits": _LONG,
        "no weight_map": "{}",
        "an empty weight_map": '{"weight_map": {}}',
        "weight_map is a list": '{"weight_map": ["a"]}',
        "a shard in the folder above": mapped(**{names[0]: "../model.safetensors"}),
        "an absolute shard": mapped(**{names[0]: "/etc/passwd"}),
        "an absolute shard of the right kind": mapped(**{names[0]: "/etc/x.safetensors"}),
        "a shard behind a backslash": mapped(**{names[0]: "..\\x.safetensors"}),
        "a shard with a NUL": mapped(**{names[0]: "x\0.safetensors"}),
        "a shard that is a number": mapped(**{names[0]: 7}),
        "a shard that is a list": mapped(**{names[0]: [shard]}),
        "a shard that is an object": mapped(**{names[0]: {shard: 1}}),
        "a shard that is null": mapped(**{names[0]: None}),
        "a shard that is not there": mapped(**{names[0]: "gone.safetensors"}),
        "a shard of 10,000 letters": mapped(**{names[0]: "x" * 10_000 + ".safetensors"}),
        "a tensor that no shard has": mapped(stranger=shard),
        "a tensor twice": '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}',
        "a tensor left out": json.dumps({"weight_map": dict.fromkeys(names[1:], shard)}),
        "200,000 names": json.dumps({"weight_map": {f"t{i}": shard for i in range(200_000)}}),
        "surrogates": '{"weight_map": {"\\ud800": "\\udfff.safetensors"}}',
        "bad UTF-8": b'{"weight_map": {"\xff": "a.safetensors"}}'.decode("latin-1"),
    }
    for name, content in rows.items():
        yield Case("index", name, {INDEX: content.encode("latin-1", "replace")}, ("plan", "@"))


def _config(sound: Path) -> Iterator[Case]:
    whole = json.loads((sound / "config.json").read_text())

    def changed(**changes: Any) -> str:
        config = copy.deepcopy(whole)
        config["text_config"].update(changes)
        return json.dumps(config)

    rows = {
        "empty": "",
        "a list": "[]",
        "null": "null",
        "nested 100,000 lists": _DEEP,
        "nested 100,000 objects": '{"a":' * 100_000 + "0" + "}" * 100_000,
        "NaN": changed(hidden_size=float("nan")),
        "key twice": '{"model_type": "qwen3_5", "model_type": "qwen3_5_moe"}',
        "another family": json.dumps({**whole, "model_type": "llama", "architectures": ["Llama"]}),
        "architectures is a number": json.dumps({**whole, "architectures": 5}),
        "no text_config": json.dumps({**whole, "text_config": None}),
        "text_config is a string": json.dumps({**whole, "text_config": "x"}),
        "vision_config is a list": json.dumps({**whole, "vision_config": []}),
        "2^40 layers": changed(num_hidden_layers=2**40),
        "2^40 layers, types given": changed(num_hidden_layers=2**40, layer_types=["a"]),
        "minus one layer": changed(num_hidden_layers=-1, layer_types=[]),
        "layers of no known type": changed(layer_types=["x"] * 4),
        "layer types an object": changed(layer_types={"a": 1}),
        "ten million layers": changed(
            num_hidden_layers=10**6, layer_types=["full_attention"] * 10**6
        ),
        "2^62 tokens": changed(vocab_size=2**62),
        "tokens of 10,000 digits": changed(vocab_size=10**1000),
        "a size of zero": changed(hidden_size=0),
        "a negative size": changed(hidden_size=-256),
        "a size with a fraction": changed(hidden_size=256.5),
        "a size that is a string": changed(hidden_size="256"),
        "a size that is true": changed(hidden_size=True),
        "no heads": changed(num_attention_heads=0),
        "2^40 heads": changed(num_attention_heads=2**40),
        "2^40 MTP layers": changed(mtp_num_hidden_layers=2**40),
        "minus one MTP layer": changed(mtp_num_hidden_layers=-1),
        "an unknown dtype": changed(dtype="float4"),
        "dtype is a list": changed(dtype=["bfloat16"]),
        "quantized with something unknown": json.dumps(
            {**whole, "quantization_config": {"quant_method": "x" * 10**6}}
        ),
        "quantization is a list": json.dumps({**whole, "quantization_config": [1]}),
        "2^40 experts": changed(num_experts=2**40),
    }
    may = {
        "2^40 experts",
        "vision_config is a list",
        "dtype is a list",
        "an unknown dtype",
        "architectures is a number",
        "quantized with something unknown",
        "quantization is a list",
    }
    for name, content in rows.items():
        codes = (0, 2) if name in may else (2,)
        yield Case("config", name, {"config.json": content.encode()}, ("plan", "@"), codes)


def _tokenizer(sound: Path) -> Iterator[Case]:
    whole = json.loads((sound / "tokenizer.json").read_text())

    def changed(**changes: Any) -> bytes:
        model = {**whole["model"], **changes.pop("model", {})}
        return json.dumps({**whole, "model": model, **changes}).encode()

    vocabulary = whole["model"]["vocab"]
    rows = {
        "empty": b"",
        "a list": b"[]",
        "nested 100,000 lists": _DEEP.encode(),
        "no model": b"{}",
        "model is a string": b'{"model": "BPE"}',
        "another model": changed(model={"type": "Unigram"}),
        "vocab is a list": changed(model={"vocab": ["a"]}),
        "vocab is empty": changed(model={"vocab": {}}, added_tokens=[]),
        "an id of 2^62": changed(model={"vocab": {**vocabulary, "zz": 2**62}}),
        "a negative id": changed(model={"vocab": {**vocabulary, "zz": -(2**62)}}),
        "an id that is a string": changed(model={"vocab": {**vocabulary, "zz": "5"}}),
        "an id twice": changed(model={"vocab": {**vocabulary, "zz": 5}}),
        "merges are numbers": changed(model={"merges": [1, 2, 3]}),
        "merges are a string": changed(model={"merges": "a b"}),
        "merges of nothing": changed(model={"merges": [[]]}),
        "added tokens are a string": changed(added_tokens="x"),
        "an added token of 2^62": changed(added_tokens=[{"id": 2**62, "content": "x"}]),
        "an added token without an id": changed(added_tokens=[{"content": "x"}]),
        "an added token that is a list": changed(added_tokens=[{"id": 3, "content": ["x"]}]),
        "pre-tokenizer is a number": changed(pre_tokenizer=5),
        "pre-tokenizer nested deeply": changed(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [[[[]]]]}
        ),
        "a pattern that backtracks": changed(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}}
        ),
        "normalizer is a list": changed(normalizer=[1]),
        "a post-processor that is a string": changed(post_processor="x"),
    }
    may = {
        "a negative id",
        "an id twice",
        "merges are numbers",
        "merges are a string",
        "merges of nothing",
        "added tokens are a string",
        "an added token without an id",
        "normalizer is a list",
        "a post-processor that is a string",
    }
    command = ("gguf", "@", "OUT", "--types", "F16", "--dry-run")
    for name, content in rows.items():
        codes = (0, 2) if name in may else (2,)
        yield Case("tokenizer", name, {"tokenizer.json": content}, command, codes)
    settings = {
        "settings are a list": b"[]",
        "settings nested deeply": _DEEP.encode(),
        "an end token that is a list": b'{"eos_token": [1]}',
        "an end token that is an object": b'{"eos_token": {"content": {"a": 1}}}',
        "added tokens by a name": b'{"added_tokens_decoder": {"../x": {"content": "a"}}}',
        "added tokens far away": b'{"added_tokens_decoder": {"4611686018427387": {"content": 1}}}',
        "a template that is a number": b'{"chat_template": 5}',
        "a template that is a list of numbers": b'{"chat_template": [1, 2]}',
    }
    for name, content in settings.items():
        files = {"tokenizer_config.json": content}
        yield Case("tokenizer", name, files, command, (0, 2))


ATTACK = "{{ cycler.__init__.__globals__.os.system('touch %s') }}"


def _template(sound: Path) -> Iterator[Case]:
    del sound
    vision = "{% if 'image' in m %}x{% endif %}"
    rows: dict[str, tuple[str, tuple[int, ...]]] = {
        "runs a command": (ATTACK % "escaped" + vision, (0,)),
        "reads a file": ("{% include '/etc/passwd' %}" + vision, (0,)),
        "a string of 10^12 letters": ("{{ 'a' * 10**12 }}" + vision, (0,)),
        "10^12 rounds": ("{% for i in range(10**12) %}{% endfor %}" + vision, (0,)),
        "a power of powers": ("{{ 9 ** 9 ** 9 ** 9 }}" + vision, (0,)),
        "an if without an end": ("{% if x %}", (2,)),
        "an end without an if": ("{% endif %}", (2,)),
        "an open tag": ("{{", (2,)),
        "an open string": ("{{ 'a", (2,)),
        "an open comment": ("{# a", (2,)),
        "brackets nested 10,000 deep": ("{{ " + "(" * 10_000 + ")" * 10_000 + " }}", (2,)),
        "ifs nested 2,000 deep": ("{% if a %}" * 2000 + "{% endif %}" * 2000, (0, 2)),
        "100,000 tags": ("{{ a }}" * 100_000, (2,)),
        "a megabyte of braces": ("{" * 2**20, (0, 2)),
        "a megabyte of backslashes": ("{{ '" + "\\" * 2**20 + "' }}", (0, 2)),
        "an unknown tag": ("{% explode %}", (2,)),
        "not UTF-8": ("\xff\xfe\x80", (2,)),
        "NUL": ("\0", (0,)),
        "raw without an end": ("{% raw %}{{", (2,)),
    }
    command = ("convert", "@", "OUT", "--recipe", "text", "--dry-run")
    for name, (content, codes) in rows.items():
        data = content.encode("latin-1")
        yield Case("template", name, {"chat_template.jinja": data}, command, codes)


def _toml(sound: Path) -> Iterator[Case]:
    del sound
    rule = '[[rules]]\nmatch = "*"\naction = "keep"\n'
    rows = {
        "empty": "",
        "not TOML": "= 1",
        "not UTF-8": "\xff",
        "no rules": 'format = "nf4"',
        "rules are a table": 'format = "nf4"\n[rules]\nmatch = "*"',
        "rules are numbers": 'format = "nf4"\nrules = [1, 2]',
        "a rule without a match": 'format = "nf4"\n[[rules]]\naction = "nf4"',
        "a rule with more": f'format = "nf4"\n{rule}evil = 1',
        "an unknown action": 'format = "nf4"\n[[rules]]\nmatch = "*"\naction = "exec"',
        "an unknown role": 'format = "nf4"\n[[rules]]\nmatch = "../../x"\naction = "nf4"',
        "an unknown format": f'format = "pickle"\n{rule}',
        "a format that is a list": f"format = []\n{rule}",
        "a base that is a list": f'format = "nf4"\nbase = [1]\n{rule}',
        "a base that is a path": f'format = "nf4"\nbase = "/etc/passwd"\n{rule}',
        "an unknown key": f'format = "nf4"\nrun = "rm"\n{rule}',
        "arrays nested 10,000 deep": "a = " + "[" * 10_000 + "]" * 10_000,
        "tables nested 10,000 deep": "a = " + "{a=" * 10_000 + "1" + "}" * 10_000,
        "a key of 10,000 dots": ".".join("a" * 10_000) + " = 1",
        "a number of 10,000 digits": f"a = {_LONG}",
        "a string without an end": 'a = """',
        "key twice": 'format = "nf4"\nformat = "fp8"',
        "20,000 rules that nothing is left for": 'format = "nf4"\n'
        + '[[rules]]\nmatch = "lm_head"\naction = "keep"\n' * 20_000,
        "two megabytes of comments": "# x\n" * 500_000,
    }
    for name, content in rows.items():
        files = {"r.toml": content.encode("latin-1")}
        yield Case("toml", name, files, ("plan", "@", "--recipe", "@/r.toml"))
    for name in ("not TOML", "rules are numbers", "arrays nested 10,000 deep", "not UTF-8"):
        files = {"r.toml": rows[name].encode("latin-1")}
        command = ("gguf", "@", "OUT", "--recipe", "@/r.toml", "--dry-run")
        yield Case("toml", f"{name}, for GGUF", files, command)


def _statistics(sound: Path) -> Iterator[Case]:
    del sound
    name = "model.language_model.layers.0.mlp.down_proj.weight"

    def entry(values: str) -> str:
        return f'{{"{name}": {{"input_channel_max": {values}}}}}'

    rows = {
        "empty": "",
        "a list": "[]",
        "no weights": "{}",
        "nested 100,000 lists": _DEEP,
        "an unknown weight": '{"evil": {"input_channel_max": [1.0]}}',
        "values are a string": entry('"1.0"'),
        "no values": entry("[]"),
        "values are strings": entry('["1"]'),
        "values are true": entry("[true]"),
        "NaN": entry("[NaN]"),
        "infinite": entry("[1e999]"),
        "an integer of 10,000 digits": entry(f"[{_LONG}]"),
        "an integer of 400 digits": entry(f"[{'9' * 400}]"),
        "negative": entry("[-1.0]"),
        "a million values": entry("[" + "1," * 10**6 + "1]"),
        "a weight twice": f'{{"{name}": 1, "{name}": 2}}',
    }
    command = ("convert", "@", "OUT", "--recipe", "fp8", "--calib-mode", "mse", "--dry-run")
    for case, content in rows.items():
        files = {"s.json": content.encode()}
        yield Case("statistics", case, files, (*command, "--activation-stats", "@/s.json"))


def _imatrix(sound: Path) -> Iterator[Case]:
    del sound
    count = struct.Struct("<i").pack
    datasets = key("imatrix.datasets", ARRAY, struct.pack("<IQ", STRING, 1) + text("d"))
    chunks = [key(f"imatrix.chunk_{what}", U32, bytes(4)) for what in ("count", "size")]
    keys = [datasets, *chunks]

    def gguf(tensors: list[bytes], data: int, some: Callable[[list[bytes]], list[bytes]]) -> bytes:
        return hostile_gguf.file_bytes(some(keys), tensors, data)

    pair = [record("a.in_sum2"), record("a.counts", (1,), 0, 128)]
    rows = {
        "empty": b"",
        "three bytes": b"abc",
        "no entries": count(0),
        "2^31 - 1 entries": count(2**31 - 1) + bytes(64),
        "minus one entry": count(-1),
        "a name of 2^31 - 1 letters": count(1) + count(2**31 - 1),
        "a name of minus one letters": count(1) + count(-1),
        "2^31 - 1 values": count(1) + count(1) + b"a" + count(1) + count(2**31 - 1),
        "minus one values": count(1) + count(1) + b"a" + count(1) + count(-1),
        "a NaN": count(1) + count(1) + b"a" + count(1) + count(1) + struct.pack("<f", float("nan")),
        "negative": count(1) + count(1) + b"a" + count(1) + count(1) + struct.pack("<f", -1.0),
        "GGUF without keys": gguf(pair, 256, lambda k: []),
        "GGUF without tensors": gguf([], 0, lambda k: k),
        "GGUF without counts": gguf(pair[:1], 128, lambda k: k),
        "GGUF with counts of another size": gguf(
            [record("a.in_sum2"), record("a.counts", (5,), 0, 128)], 256, lambda k: k
        ),
        "GGUF of another type": gguf(
            [record("a.in_sum2", kind=8), record("a.counts", (1,), 0, 64)], 256, lambda k: k
        ),
        "GGUF whose count is a string": gguf(
            pair, 256, lambda k: [k[0], key("imatrix.chunk_count", STRING, text("x")), k[2]]
        ),
        "GGUF whose count is a list": gguf(
            pair,
            256,
            lambda k: [k[0], key("imatrix.chunk_count", ARRAY, struct.pack("<IQ", 4, 0)), k[2]],
        ),
        "array of 2^40": gguf(
            pair, 256, lambda k: [key("imatrix.datasets", ARRAY, struct.pack("<IQ", 8, 2**40))]
        ),
    }
    command = ("gguf", "@", "OUT", "--types", "Q8_0", "--dry-run", "--imatrix", "@/i.gguf")
    for name, content in rows.items():
        yield Case("imatrix", name, {"i.gguf": content}, command)


def main() -> None:
    """Write the corpus."""
    sound, folder = Path(sys.argv[1]), Path(sys.argv[2])
    lines = []
    for number, case in enumerate(cases(sound)):
        place = folder / f"{number:03d}-{case.kind}"
        place.mkdir(parents=True)
        for name, content in case.files.items():
            (place / name).write_bytes(content)
        lines.append(f"{place.name}\t{case.name}\tqwen35 {' '.join(case.command)}\n")
    (folder / "LIST").write_text("".join(lines))


if __name__ == "__main__":
    main()
