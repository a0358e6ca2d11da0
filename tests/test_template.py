"""Chat templates made text-only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from checkpoints import write_checkpoint
from qwen35.errors import InputError
from qwen35.plan.template import _tags, compiles, text_only_template
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
        "{% for c in m %}{% if c.t in ['image', 'video'] %}V{% elif(c) %}b{% endif %}{% endfor %}",
    ],
)
def test_unusual_but_legal_templates_are_read(source: str) -> None:
    after = text_only_template(source, "t")
    compiles(after, "t")
    assert ("V" in source) == ("raise_exception" in after)


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
@settings(deadline=None)
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
        ours = [tag.kind for tag in _tags(source)]
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
