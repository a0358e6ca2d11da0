"""Chat templates made text-only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from checkpoints import write_checkpoint
from qwen35.errors import InputError
from qwen35.planning.safetensors_files.chat_template import compiles, find_tags, text_only_template
from running import load_all, plan_of, read_config, run
from templates import IMAGE_CONVERSATIONS, ITEM_LOOP, TEXT_CONVERSATIONS, VARIANTS, render

pytestmark = pytest.mark.sentences


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("conversation", range(len(TEXT_CONVERSATIONS)))
@pytest.mark.parametrize("thinking", [True, False])
def test_text_renders_as_before(name: str, conversation: int, thinking: bool) -> None:
    messages = TEXT_CONVERSATIONS[conversation]
    before = VARIANTS[name]
    after = text_only_template(before, name)
    assert after != before
    expected = render(before, messages, enable_thinking=thinking)
    assert render(after, messages, enable_thinking=thinking) == expected


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("conversation", range(len(IMAGE_CONVERSATIONS)))
def test_images_and_videos_get_a_clear_error(name: str, conversation: int) -> None:
    messages = IMAGE_CONVERSATIONS[conversation]
    render(VARIANTS[name], messages)
    with pytest.raises(TemplateError, match="text-only model"):
        render(text_only_template(VARIANTS[name], name), messages)


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_of_vision_is_left(name: str) -> None:
    after = text_only_template(VARIANTS[name], name)
    for word in ("image_pad", "video_pad", "vision_start", "image_count", "video_count", "IMG"):
        if word == "image_count" and name == "trimmed on the right":
            continue  # removing its `set` could change white space there
        if word == "video_count" and name == "trimmed on the right":
            continue
        assert word not in after


@pytest.mark.parametrize("name", VARIANTS)
def test_a_second_pass_changes_nothing(name: str) -> None:
    once = text_only_template(VARIANTS[name], name)
    assert text_only_template(once, name) == once


@pytest.mark.parametrize(
    "source",
    [
        "{% if(x) %}a{% endif %}",
        "{% raw %}endraw {% if %}{% endraw %}{{ x }}",
        "{%raw%}{%- endraw -%}",
        "{% raw %}{% if %}{% endraw %}{% raw %}{% endif %}{% endraw %}{{ x }}",
        "{% for c in m %}{% if c.t in ['image', 'video'] %}V{% elif(c) %}b{% endif %}{% endfor %}",
    ],
)
def test_unusual_but_legal_templates_are_read(source: str) -> None:
    after = text_only_template(source, "t")
    compiles(after, "t")
    assert ("V" in source) == ("raise_exception" in after)


E = "{{- raise_exception('This is a text-only model: it takes no images and no videos.') }}"
IF, END = "{% if 'image' in c %}", "{% endif %}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # the white space of the body stays
        (f"{IF}\n  x \n{END}", f"{IF}\n  {E} \n{END}"),
        (f"{IF}{END}", f"{IF}{E}{END}"),
        # the outermost branch only, and each of several
        (f"{IF}a{{% if 'video' in d %}}b{END}c{END}d", f"{IF}{E}{END}d"),
        (f"{IF}a{END}-{IF}b{END}", f"{IF}{E}{END}-{IF}{E}{END}"),
        (f"{{% if x %}}{IF}a{END}{END}", f"{{% if x %}}{IF}{E}{END}{END}"),
        (
            f"{IF}{{% for d in c %}}a{{% else %}}b{{% endfor %}}{{% else %}}t{END}",
            f"{IF}{E}{{% else %}}t{END}",
        ),
        (
            f"{{% for d in c %}}{IF}a{END}{{% else %}}{IF}b{END}{{% endfor %}}",
            f"{{% for d in c %}}{IF}{E}{END}{{% else %}}{IF}{E}{END}{{% endfor %}}",
        ),
        (
            f"{{% if x %}}a{{% elif 'image' in c %}}b{{% else %}}c{END}",
            f"{{% if x %}}a{{% elif 'image' in c %}}{E}{{% else %}}c{END}",
        ),
        # tags without white space, with signs, after braces that are none, beside comments
        ("{%if c=='image'%}a{%endif%}", f"{{%if c=='image'%}}{E}{{%endif%}}"),
        ("{%-if c=='image'-%}a{%-endif-%}", f"{{%-if c=='image'-%}}{E}{{%-endif-%}}"),
        ("{%+if c=='image'+%}a{%+endif+%}", f"{{%+if c=='image'+%}}{E}{{%+endif+%}}"),
        (f"{{x {IF}a{END}", f"{{x {IF}{E}{END}"),
        (f"{{##}}{IF}a{END}", f"{{##}}{IF}{E}{END}"),
        (f"{{# it's [ #}}{IF}a{END}", f"{{# it's [ #}}{IF}{E}{END}"),
        # strings and brackets that hold tags
        (
            f"{{{{ {{'a': {{'b': {{}}}}}}['{{% endif %}}'] }}}}{IF}a{END}",
            f"{{{{ {{'a': {{'b': {{}}}}}}['{{% endif %}}'] }}}}{IF}{E}{END}",
        ),
        (
            f"{{{{ XXX[{{'a': {{}}}}]['{{% endif %}}'] }}}}{IF}a{END}",
            f"{{{{ XXX[{{'a': {{}}}}]['{{% endif %}}'] }}}}{IF}{E}{END}",
        ),
        (
            f"{{{{ 'it\\'s {{% endif %}}' }}}}{IF}a{END}",
            f"{{{{ 'it\\'s {{% endif %}}' }}}}{IF}{E}{END}",
        ),
        # a `set` for those bodies alone goes, where no white space depends on it
        (
            "{%- set k = 0 -%}{%- set n = 1 -%}{%- if c == 'image' -%}{{ n }}{%- endif -%}{{ k }}",
            f"{{%- set k = 0 -%}}{{%- if c == 'image' -%}}{E}{{%- endif -%}}{{{{ k }}}}",
        ),
        (
            "{%- set n = 1 -%}x{%- if c == 'image' -%}{{ n }}{%- endif -%}",
            f"{{%- set n = 1 -%}}x{{%- if c == 'image' -%}}{E}{{%- endif -%}}",
        ),
        (
            "{% set n = 1 %} {% if c == 'image' %}{{ n }}{% endif %}",
            f"{{% set n = 1 %}} {{% if c == 'image' %}}{E}{{% endif %}}",
        ),
        (
            "{%- with n = 1 -%}{%- if c == 'image' -%}{{ n }}{%- endif -%}{%- endwith -%}",
            f"{{%- with n = 1 -%}}{{%- if c == 'image' -%}}{E}{{%- endif -%}}{{%- endwith -%}}",
        ),
        (
            "{%- set s = namespace(n=0) -%}{%- if c == 'image' -%}{%- set s.n = 1 -%}"
            "{%- endif -%}{%- set s.n = 2 -%}",
            "{%- set s = namespace(n=0) -%}{%- if c == 'image' -%}" + E + "{%- endif -%}"
            "{%- set s.n = 2 -%}",
        ),
    ],
)
def test_bodies_of_vision_become_an_error_and_nothing_else_changes(before: str, after: str) -> None:
    assert text_only_template(before, "t") == after


@pytest.mark.parametrize(
    ("condition", "vision"),
    [
        ("'image' in c", True),
        ("'image_url' in c", True),
        ("c.type == 'video'", True),
        ("'video_url' == c.type", True),
        ("c.type in ['image', 'video']", True),
        ("c.type in ('image',)", True),
        ("x and 'image' in c", True),
        ("'image' in c and x", True),
        ("'image' in c or 'video' in c", True),
        ("'image' in c or x", False),
        ("x or 'image' in c", False),
        ("x and y", False),
        ("c.type in ['image', 'text']", False),
        ("c.type in ['image', x]", False),
        ("c.type in []", False),
        ("c.type in 'image'", False),
        ("c.type != 'image'", False),
        ("'image' not in c", False),
        ("'text' in c", False),
        ("not 'image' in c", False),
        ("1 < c < 'image'", False),
        ("'image'", False),
    ],
)
def test_what_is_true_for_images_and_videos_alone(condition: str, vision: bool) -> None:
    source = "{% if " + condition + " %}a{% endif %}"
    assert (text_only_template(source, "t") != source) is vision


def test_a_template_longer_than_any_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen35.planning.safetensors_files.chat_template.MAX_LENGTH", 5)
    assert text_only_template("x" * 5, "t") == "x" * 5
    with pytest.raises(InputError) as caught:
        text_only_template("x" * 6, "t")
    assert str(caught.value) == "t: 6 characters, expected at most 5"
    compiles("x" * 5, "t")
    with pytest.raises(InputError, match="6 characters, expected at most 5"):
        compiles("x" * 6, "t")


def test_a_template_nested_too_deeply_is_refused() -> None:
    with pytest.raises(InputError, match="nested too deeply|not a valid Jinja"):
        compiles("{{ " + "(" * 5000 + "x" + ")" * 5000 + " }}", "t")


def test_a_template_whose_test_for_images_is_not_recognized_is_noted(
    dense: Path, tmp_path: Path
) -> None:
    odd = "{% for m in messages %}{{ '<|image_pad|>' if m.image else m.text }}{% endfor %}"
    source = write_checkpoint(
        tmp_path / "in",
        read_config(dense),
        load_all(dense),
        sidecars={"chat_template.jinja": odd},
    )
    notes = plan_of(source, "text").notes
    assert any("was not recognized" in note for note in notes)
    assert not plan_of(source, "nf4").notes


SETTINGS = "tokenizer_config.json"


def with_settings(source: Path, folder: Path, content: bytes) -> Path:
    """Write a checkpoint with this tokenizer_config.json."""
    made = write_checkpoint(folder, read_config(source), load_all(source))
    (made / SETTINGS).write_bytes(content)
    return made


@pytest.mark.parametrize("word", ["<|image_pad|>", "<|video_pad|>"])
@pytest.mark.parametrize("place", ["chat_template", "extra_special_tokens"])
def test_of_settings_the_template_is_looked_at_and_no_list_of_tokens(
    place: str, word: str, dense: Path, tmp_path: Path
) -> None:
    content = json.dumps(
        {"processor_class": "P", place: word if place == "chat_template" else [word]}
    ).encode()
    notes = plan_of(with_settings(dense, tmp_path / "in", content), "text").notes
    unrecognized = (
        f"{SETTINGS}: its test for images or videos was not recognized, so it still writes their "
        "tokens"
    )
    assert notes == ((unrecognized,) if place == "chat_template" else ())


def test_settings_that_need_no_change_keep_their_bytes(dense: Path, tmp_path: Path) -> None:
    content = b'{"b":1,   "a":"\\u00e9"}'
    source = with_settings(dense, tmp_path / "in", content)
    run(source, tmp_path / "out", "text")
    assert (tmp_path / "out" / SETTINGS).read_bytes() == content


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (SETTINGS, b"[]", "not a JSON object"),
        (SETTINGS, b"{", "not valid JSON"),
        ("chat_template.jinja", b"\xff", "not UTF-8 text"),
    ],
)
def test_settings_that_are_none_are_named(
    name: str, content: bytes, sentence: str, dense: Path, tmp_path: Path
) -> None:
    source = with_settings(dense, tmp_path / "in", b"{}")
    (source / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        plan_of(source, "text")
    assert str(caught.value).startswith(f"{name}: {sentence}")


def test_settings_larger_than_any_are_refused(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen35.planning.safetensors_files.safetensors_documents.MAX_BYTES", 9)
    source = with_settings(dense, tmp_path / "in", b'{"a": 12}')
    assert plan_of(source, "text").steps
    (source / SETTINGS).write_bytes(b'{"a": 123}')
    with pytest.raises(InputError) as caught:
        plan_of(source, "text")
    assert str(caught.value) == f"{SETTINGS}: 10 bytes, expected at most 9"


def test_a_template_without_vision_is_left_alone() -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert text_only_template(source, "t") is source


def test_a_condition_that_text_can_meet_is_left_alone() -> None:
    for condition in ("'image' in c or 'text' in c", "c.type != 'image'", "'image' not in c"):
        source = "{% for c in messages %}{% if " + condition + " %}x{% endif %}{% endfor %}"
        assert text_only_template(source, "t") == source


def test_an_else_of_a_for_is_not_taken_for_one_of_an_if() -> None:
    source = (
        "{% for c in messages %}{% if 'image' in c %}{% for d in c %}a{% else %}b{% endfor %}"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}"
    )
    after = text_only_template(source, "t")
    assert after.endswith("{% else %}{{ c.text }}{% endif %}{% endfor %}")
    assert "endfor %}{% else" not in after


@pytest.mark.parametrize(
    "source", ["{% if x %}", "{{ x", "{% endif %}", "{% for %}", "{{ 'a }}", "{% macro %}{%"]
)
def test_a_broken_template_is_refused_with_its_line(source: str) -> None:
    with pytest.raises(InputError, match=r"not a valid Jinja template, line 2"):
        text_only_template("line one\n" + source, "chat_template.jinja")
    with pytest.raises(InputError):
        compiles("\n" + source, "chat_template.jinja")


@given(
    st.lists(
        st.sampled_from(
            [
                "{% if 'image' in c %}",
                "{% endif %}",
                "{{ '%}' }}",
                "a{b",
                "\n",
                "{# {% #}",
                "{% else %}",
                "{{ {'a': {}} }}",
                "{% raw %}{% if %}{% endraw %}",
            ]
        ),
        max_size=8,
    )
)
def test_any_template_is_transformed_or_refused(parts: list[str]) -> None:
    source = "".join(parts)
    try:
        after = text_only_template(source, "t")
    except InputError:
        return
    compiles(after, "t")


def test_tags_are_found_where_jinja_finds_them() -> None:
    from jinja2 import Environment

    for source in VARIANTS.values():
        ours = [tag.kind for tag in find_tags(source)]
        begins = ("block_begin", "variable_begin", "comment_begin")
        theirs = [kind for _, kind, _ in Environment().lex(source) if kind in begins]
        assert len(ours) == len(theirs)


def _settings(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_every_place_that_stores_a_template_is_transformed(dense: Path, tmp_path: Path) -> None:
    config = {
        "chat_template": ITEM_LOOP,
        "processor_class": "Qwen3VLProcessor",
        "eos_token": "<|im_end|>",
    }
    named = {"chat_template": [{"name": "default", "template": ITEM_LOOP}, "odd template"]}
    source = write_checkpoint(
        tmp_path / "in",
        read_config(dense),
        load_all(dense),
        sidecars={
            "chat_template.jinja": ITEM_LOOP,
            "tokenizer_config.json": json.dumps(config),
            "chat_template.json": json.dumps(named),
            "preprocessor_config.json": "{}",
        },
    )
    run(source, tmp_path / "out", "text")
    expected = text_only_template(ITEM_LOOP, "t")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == expected
    assert _settings(tmp_path / "out", "tokenizer_config.json") == {
        "chat_template": expected,
        "eos_token": "<|im_end|>",
    }
    stored = _settings(tmp_path / "out", "chat_template.json")["chat_template"]
    assert stored == [{"name": "default", "template": expected}, "odd template"]
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
    run(source, tmp_path / "vision", "nf4")
    assert (tmp_path / "vision" / "chat_template.jinja").read_text() == ITEM_LOOP
    assert (tmp_path / "vision" / "preprocessor_config.json").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{% if %}"),
        ("tokenizer_config.json", json.dumps({"chat_template": "{% if %}"})),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "a", "template": "{% if %}"}]}),
        ),
    ],
)
def test_a_broken_template_stops_a_text_only_conversion(
    name: str, content: str, dense: Path, tmp_path: Path
) -> None:
    source = write_checkpoint(
        tmp_path / "in", read_config(dense), load_all(dense), sidecars={name: content}
    )
    with pytest.raises(InputError, match=f"^{name}: not a valid Jinja template"):
        run(source, tmp_path / "out", "text")
    assert not (tmp_path / "out").exists()
