"""The prompts that a stranger's chat template writes for our questions, however it wants them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from qwen35.checkpoint.locations import FileLocation
from qwen35.errors import InputError
from qwen35.verification.asking_prompts import TemplateDefaults
from qwen35.verification.bounded_rendering import Rendered, render
from qwen35.verification.questions import IMAGE, TASKS, Question
from qwen35.verification.settings_comparison import settings_of

__all__ = ["CHATML", "ChatPrompts", "special_tokens"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""What llama.cpp takes for a model without a chat template (``common/chat.cpp``)."""

LONGEST = 2**14
"""Characters of a prompt; a question has about a hundred."""

_CONTEXT = 2048
_PAD = "<|image_pad|>"
_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
_TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time of day.",
        "parameters": {"type": "object", "properties": {}},
    },
}
_Form = tuple[bool, bool, bool]
_FORMS: dict[_Form, str] = {
    (False, False, False): "",
    (True, False, False): "",
    (False, True, False): "a system message",
    (True, True, False): "a system message",
    (False, False, True): "a tool",
    (True, False, True): "a tool",
    (False, True, True): "a system message and a tool",
    (True, True, True): "a system message and a tool",
}
"""Ways of asking in the order in which they are tried, with what each adds: content in parts, which
templates of models with vision may need (llama.cpp and vLLM look for that too), a system message,
a tool."""

_Key = tuple[str, bool, bool]
_Way = tuple[_Form, bool, Question]
"""A form, the value of ``enable_thinking``, and a question."""

_Prompts = dict[tuple[_Form, _Key], Rendered]


def special_tokens(place: FileLocation) -> dict[str, str]:
    """Return the special tokens that transformers gives to a template, by name.

    Raises:
        InputError: a file is damaged.
    """
    config = settings_of(place, "tokenizer_config.json") or {}
    mapped = settings_of(place, "special_tokens_map.json") or {}
    specific = config.get("model_specific_special_tokens")
    specific = specific if isinstance(specific, dict) else {}
    # Qwen2Tokenizer's defaults (transformers 5.23)
    found: dict[str, str] = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    for name, value in {**mapped, **specific, **config}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


class ChatPrompts:
    """The prompts of a chat template.

    Args:
        subject: where the template is.
        template: the template; None: there is none.
        tokens: special tokens by name.

    Attributes:
        thinking: the values of ``enable_thinking`` that make a difference. A template without that
            switch has one: whether it lets the model reason by itself.
        notes: what is special about the questions.

    Raises:
        InputError: it refuses all questions, leaves them out, or goes beyond limits.
    """

    def __init__(self, subject: str, template: str | None, tokens: Mapping[str, str]) -> None:
        self._subject = subject
        self._template = CHATML if template is None else template
        used = {name: text for name, text in tokens.items() if name in self._template}
        self._tokens = tuple(sorted(used.items()))
        try:
            self._known = _asked(self._template, self._tokens, _all_ways((*TASKS, IMAGE)))
        except InputError as error:
            raise InputError(subject, error.found, expected=error.expected) from error
        modes = {on: self._form_for(on) for on in (False, True)}
        self._forms = {on: form for on, form in modes.items() if form is not None}
        if not self._forms:
            raise self._refusal()
        self.thinking = tuple(self._forms)
        self._switch = len(self.thinking) == 2 and self._texts(False) != self._texts(True)
        if not self._switch:
            on = self.thinking[0]
            opened = all(_is_open(text) for text in self._texts(on))
            self._forms = {opened: self._forms[on]}
            self.thinking, self._passed = (opened,), on
        self.notes = tuple(self._told(missing=template is None))

    @property
    def defaults(self) -> TemplateDefaults:
        """The template with none of its switches set."""
        return TemplateDefaults(self._subject, self._template, dict(self._tokens))

    @property
    def texts(self) -> list[str]:
        """All prompts that it may write."""
        return list({one.text for one in self._known.values()})

    def _form_for(self, thinking: bool) -> _Form | None:
        """Return the first form in which all questions can be asked."""
        return next((form for form in _FORMS if self._fits(form, thinking)), None)

    def _fits(self, form: _Form, thinking: bool) -> bool:
        prompts = [(self._known[form, _key(task, thinking)], task) for task in TASKS]
        return all(_holds(one, task.prompt) for one, task in prompts)

    def _texts(self, thinking: bool) -> list[str]:
        form = self._forms[thinking]
        return [self._known[form, _key(task, thinking)].text for task in TASKS]

    def _refusal(self) -> InputError:
        """Return the error of the plainest question."""
        plain = self._known[next(iter(_FORMS)), _key(TASKS[0], False)]
        if plain.failed:
            return InputError(self._subject, f"refuses a plain question ({plain.text})")
        if len(plain.text) > LONGEST:
            found = f"writes {len(plain.text)} characters for a plain question"
            return InputError(self._subject, found, expected=f"at most {LONGEST}")
        return InputError(self._subject, "writes prompts without the question in them")

    def _told(self, *, missing: bool) -> Iterator[str]:
        if missing:
            yield "no chat template: asked in ChatML, as llama.cpp would"
        elif not self._switch:
            reasoning = "with" if self.thinking[0] else "without"
            yield (
                "the chat template has no switch for thinking: each question is asked once, "
                f"{reasoning} reasoning"
            )
        added = sorted({_FORMS[form] for form in self._forms.values()} - {""})
        if added:
            yield f"asked with {' or '.join(added)}: the chat template does not render otherwise"

    @property
    def sees(self) -> bool:
        """Whether a picture can be shown: the template writes one place for it."""
        on = self._passed_for(self.thinking[0])
        shown = self._known[self._shown(self.thinking[0]), _key(IMAGE, on)]
        return _holds(shown, IMAGE.prompt) and shown.text.count(_PAD) == 1

    @property
    def context(self) -> int:
        """The tokens that any question and its answer need at most."""
        longest = max(len(text.encode()) for on in self._forms for text in self._texts_of(on))
        return max(_CONTEXT, longest + max(task.tokens for task in TASKS))

    def _texts_of(self, thinking: bool) -> list[str]:
        return [self.write(replace(task, thinking=thinking)) for task in TASKS]

    def _passed_for(self, thinking: bool) -> bool:
        return thinking if self._switch else self._passed

    def _shown(self, thinking: bool) -> _Form:
        _, system, tools = self._forms[thinking]
        return True, system, tools

    def expect(self, questions: Sequence[Question]) -> None:
        """Render the prompts for many questions at once: each child process takes its time.

        Raises:
            InputError: the template goes beyond the limits.
        """
        self._known |= _asked(self._template, self._tokens, tuple(map(self._way, questions)))

    def write(self, question: Question) -> str:
        """Return the prompt for a question, whose thinking must be one of `thinking`.

        Raises:
            InputError: the template refuses it.
        """
        form, passed, _ = self._way(question)
        key = form, _key(question, passed)
        if key not in self._known:
            self.expect([question])
        one = self._known[key]
        if one.failed:
            raise InputError(self._subject, f"refuses the question {question.prompt!r:.60}")
        return one.text

    def _way(self, question: Question) -> _Way:
        on = question.thinking
        form = self._forms[on] if question.image is None else self._shown(on)
        return form, self._passed_for(on), question

    def answer(self, question: Question, turn: str) -> str:
        """Return a turn, without the reasoning of a model that nobody asked for any."""
        return turn if self._switch or question.thinking else turn.rpartition("</think>")[2]


def _key(question: Question, thinking: bool) -> _Key:
    return question.prompt, thinking, question.image is not None


def _holds(one: Rendered, text: str) -> bool:
    """Whether a prompt holds the words of a text: it may be escaped or written in capitals."""
    if one.failed or len(one.text) > LONGEST:
        return False
    prompt = one.text.casefold()
    return all(word in prompt for word in re.findall(r"\w+", text.casefold()))


def _is_open(prompt: str) -> bool:
    """Whether a prompt ends within reasoning."""
    return prompt.rfind("<think>") > prompt.rfind("</think>")


def _all_ways(questions: Sequence[Question]) -> tuple[_Way, ...]:
    return tuple((form, on, one) for one in questions for on in (False, True) for form in _FORMS)


@lru_cache(maxsize=16)
def _asked(template: str, tokens: tuple[tuple[str, str], ...], ways: tuple[_Way, ...]) -> _Prompts:
    """Render questions in one child.

    Raises:
        InputError: it goes beyond the limits.
    """
    asked = {
        (form, _key(question, on)): {**_variables(question, on, form), **dict(tokens)}
        for form, on, question in ways
    }
    [results] = render([template], list(asked.values()))
    return dict(zip(asked, results, strict=True))


def _variables(question: Question, thinking: bool, form: _Form) -> dict[str, Any]:
    parts, system, tools = form
    content: Any = question.prompt
    if parts:
        content = [{"type": "text", "text": question.prompt}]
        if question.image is not None:
            content.insert(0, {"type": "image"})
    begin = []
    if system:
        text = _SYSTEM["content"]
        begin.append({**_SYSTEM, "content": [{"type": "text", "text": text}] if parts else text})
    return {
        "messages": [*begin, {"role": "user", "content": content}],
        "add_generation_prompt": True,
        "enable_thinking": thinking,
        "tools": [_TOOL] if tools else None,
        "documents": None,
    }
