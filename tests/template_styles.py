"""Chat templates in the styles of published fine-tunes, and templates that misbehave."""

from __future__ import annotations

from checkpoints import ASSET

__all__ = ["BOMBS", "REFUSED", "SIMPLE", "STYLES"]

_ROLES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'"
    " }}{% endfor %}"
)
_NEXT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

STYLES: dict[str, tuple[str, tuple[bool, ...]]] = {
    "ChatML, text only": (_ROLES + _NEXT, (False,)),
    "ChatML with a default system message": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
        + _ROLES
        + _NEXT,
        (False,),
    ),
    "Llama 3 headers": (
        "{% for message in messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
        "message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token | default('') + content %}{% endif %}"
        "{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        (False,),
    ),
    "Mistral, roles must alternate": (
        "{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
        (False,),
    ),
    "Alpaca": (
        "{% for message in messages %}{% if message.role == 'user' %}"
        "### Instruction:\n{{ message.content }}\n\n{% elif message.role == 'assistant' %}"
        "### Response:\n{{ message.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}",
        (False,),
    ),
    "Hermes with tools": (
        "{% if tools %}{{ '<|im_start|>system\\n<tools>' }}{% for tool in tools %}"
        "{{ tool.function | tojson }}{% endfor %}{{ '</tools><|im_end|>\\n' }}{% endif %}"
        + _ROLES
        + _NEXT,
        (False,),
    ),
    "Qwen3 with reversed messages": (
        "{%- set ns = namespace(last=messages|length - 1) %}"
        "{%- for message in messages[::-1] %}{%- if message.role == 'user' %}"
        "{%- set ns.last = messages|length - 1 - loop.index0 %}{%- break %}{%- endif %}"
        "{%- endfor %}{%- for message in messages %}"
        "{{- '<|im_start|>' + message.role + '\\n' }}"
        "{%- if message.reasoning_content and loop.index0 > ns.last %}"
        "{{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}"
        "{%- endif %}{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
        (False, True),
    ),
    "no system message": (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}" + _ROLES + _NEXT,
        (False,),
    ),
    "Gemma": (
        "{{ bos_token }}{% for message in messages %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        (False,),
    ),
    "content in parts": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% for part in m.content %}"
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}" + _NEXT,
        (False,),
    ),
    "always thinks": (
        _ROLES + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}"
        "{% endif %}",
        (True,),
    ),
    "thinking refused": (
        "{% if enable_thinking %}{{ raise_exception('no thinking') }}{% endif %}" + _ROLES + _NEXT,
        (False,),
    ),
    "a system message required": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('No system message') }}{% endif %}"
        + _ROLES
        + _NEXT,
        (False,),
    ),
    "tools required": ("{{ tools | length }} tools\n" + _ROLES + _NEXT, (False,)),
    "capitals": ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", (False,)),
    "with generation marks": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        (False,),
    ),
    "the embedded one": ((ASSET / "chat_template.jinja").read_text(), (False, True)),
}
"""Templates by style, with the values of ``enable_thinking`` that questions are asked with."""

SIMPLE = STYLES["ChatML, text only"][0]

REFUSED = {
    "{{ raise_exception('Closed on Sundays') }}": "Closed on Sundays",
    "{{ messages[0].content.words() }}": "UndefinedError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ messages[0].content | explode }}": "TemplateAssertionError",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "SecurityError",
    "{{ cycler.__init__.__globals__.os.system('id') }}": "SecurityError",
    "{% include '/etc/passwd' %}": "TypeError",
    "{{ prompt }}": "without the question in them",
    "": "without the question in them",
}
"""Templates that take no question, with a word of what is said about them."""

_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "endless loops": _LOOPS,
    "a thousand loops": "{% for a in range(99999) %}{% endfor %}" * 1000,
    "loops in a filter": "{{ range(99999) | map('string') | map('center', 9999) | join | length }}",
    "huge range": "{% for a in range(10**12) %}{% endfor %}",
    "huge number format": "{{ '%999999999d' % 1 }}",
    "huge format": "{{ '{:>9999999999}'.format(1) }}",
    "huge string": "{{ 'a' * 10**10 }}",
    "huge list": "{{ [0] * 10**10 }}",
    "huge centre": "{{ 'x' | center(10**9) }}",
    "huge indent": "{{ ('x\\n' * 10**6) | indent(10**4) }}",
    "huge power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "huge text": "{{ lipsum(n=10**6) }}",
    "huge output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "huge error": "{{ raise_exception('n' * 10**8) }}",
    "power, then a text": "{{ 2 ** 100000000 }}",
    "macro that doubles": (
        "{% macro m(t, n) %}{% if n %}{{ m(t ~ t, n - 1) }}{% else %}{{ t }}{% endif %}"
        "{% endmacro %}{{ m('x' * 1000, 99) }}"
    ),
    "doubling": (
        "{% set ns = namespace(a='x' * 1000) %}{% for i in range(99) %}"
        "{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}"
    ),
    "macro without an end": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "self without an end": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "deep lists": "{{ " + "[" * 150 + "]" * 150 + " }}",
}
"""Templates that never end, or that take or write more than there is; some are short of that."""
