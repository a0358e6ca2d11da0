"""Chat templates in the forms that are found in the wild, and conversations to render with them."""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from checkpoints import ASSET

ITEM_LOOP = """\
{%- set image_count = namespace(value=0) %}
{%- set video_count = namespace(value=0) %}
{%- macro render_content(content, counting) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is iterable and content is not mapping %}
        {%- for item in content %}
            {%- if 'image' in item or 'image_url' in item or item.type == 'image' %}
                {%- if counting %}
                    {%- set image_count.value = image_count.value + 1 %}
                {%- else %}
                    {{- '' }}
                {%- endif %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'video' in item or item.type == 'video' %}
                {%- if counting %}
                    {%- set video_count.value = video_count.value + 1 %}
                {%- endif %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in item %}
                {{- item.text }}
            {%- else %}
                {{- raise_exception('What is this?') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {{- render_content(message.content, true) + '<|im_end|>\\n' }}
{%- else %}
    {{- 'nothing %} here {{ at }} all' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

VARIANTS: dict[str, str] = {
    "embedded": (ASSET / "chat_template.jinja").read_text(),
    "published form": ITEM_LOOP,
    "trimmed on the right": ITEM_LOOP.replace(" %}", " -%}"),
    "text by type": ITEM_LOOP.replace("'text' in item", "'text' in item or item.type == 'text'"),
    "double quotes": ITEM_LOOP.replace("'", '"'),
    "no macro": (
        "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for c in m.content %}{% if c.type == 'image' %}<|image_pad|>"
        "{% elif c['type'] == 'video' %}<|video_pad|>{% else %}{{ c.text }}{% endif %}"
        "{% endfor %}{% endif %};{% endfor %}"
    ),
    "generation blocks": (
        "{% for m in messages %}{% generation %}{% if m.content is string %}{{ m.content }}"
        "{% elif m.content[0].type == 'image' or 'video' == m.content[0].type %}IMG"
        "{% else %}{{ m.content[0].text }}{% endif %}"
        "{% endgeneration %}{% endfor %}"
    ),
}

TEXT_CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": [{"type": "text", "text": "an image of a video"}]}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBecause."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "So"}, {"type": "text", "text": "?"}],
        },
    ],
]

IMAGE_CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
    [{"role": "user", "content": [{"type": "video"}]}],
]


def render(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """Render as transformers does: sandboxed, with blocks trimmed."""
    from qwen35.planning.safetensors_files.chat_template import GenerationTag

    def fail(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = fail
    compiled = environment.from_string(template)
    return compiled.render(messages=messages, add_generation_prompt=True, **options)
