"""Ask a model through the server that runs it, greedily, over the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen35.errors import EndpointError
from qwen35.serving.chat_replies import ChatReply, StreamedReply, chat, streamed_chat
from qwen35.serving.json_values import text_in
from qwen35.serving.served_model import ServedModel
from qwen35.serving.server_client import ServerClient
from qwen35.verification.behaviour import REPETITION_PENALTY
from qwen35.verification.drawn_picture import picture_address
from qwen35.verification.questions import TASKS, Question

__all__ = ["PATIENCE", "Message", "ServerAsker", "said"]

Message = Mapping[str, Any]

_SWITCHED = ("vllm", "sglang", "llama.cpp")
"""Servers that hand ``chat_template_kwargs`` to the chat template."""

PATIENCE = 3
"""Requests in a row that a server may lose before the rest is not asked."""

_UNPARSED = "the server sends reasoning as part of the content: it runs without a reasoning parser"

_PROBE = TASKS[-1]
_SEEN = 4096
"""Tokens that llama-server's penalty looks back at: more than a question and its answer have."""


def said(text: str) -> dict[str, Any]:
    """Return a user's message."""
    return {"role": "user", "content": text}


class ServerAsker:
    """A served model that answers questions.

    Args:
        client: talks to the server.
        served: the model.

    Attributes:
        thinking: whether questions can be asked without thinking, and with.
        notes: what is special about asking it.
        failed: the questions that got no answer, with the reasons.
        lost: how many of the last questions got none, not even a refusal.

    Raises:
        EndpointError: the server does not answer the simplest question.
    """

    def __init__(self, client: ServerClient, served: ServedModel) -> None:
        self.client, self.served = client, served
        self.notes: list[str] = []
        self.failed: dict[Question, EndpointError] = {}
        self.lost = 0
        self._penalized = self._switches = True
        self.thinking: tuple[bool, ...] = (False, True)
        self._find_out()

    def _find_out(self) -> None:
        """Find out which extensions of the OpenAI API the server takes, and if one has effect."""
        messages = [said(_PROBE.prompt)]
        try:
            off = self.chat(messages, tokens=_PROBE.tokens, repetition_penalty=REPETITION_PENALTY)
        except EndpointError as error:
            if not error.refused:
                raise
            self._penalized = self._switches = False
            off = self.chat(messages, tokens=_PROBE.tokens)
            self.notes.append(
                f"asked without a penalty for repetition and without chat_template_kwargs: the "
                f"server refuses them ({error.found})"
            )
        if self._switches and self.served.dialect in (*_SWITCHED, "ollama"):
            return
        on = self.chat(messages, tokens=_PROBE.tokens, thinking=True)
        reasons = "<think>" in on.turn or "</think>" in on.turn
        if reasons == ("<think>" in off.turn or "</think>" in off.turn):
            self.thinking = (reasons,)
            how = "with" if reasons else "without"
            self.notes.append(
                "the server has no switch for thinking that this check knows: each question is "
                f"asked once, {how} reasoning"
            )

    def ask(self, question: Question, *, repetition_penalty: float = 1.0) -> str:
        """Return the model's turn, including the reasoning if it thinks; empty if there is none."""
        content: Any = question.prompt
        if question.image is not None:
            shown = {"type": "image_url", "image_url": {"url": picture_address(question.image)}}
            content = [shown, {"type": "text", "text": question.prompt}]
        try:
            reply = self.chat(
                [{"role": "user", "content": content}],
                tokens=question.tokens,
                thinking=question.thinking,
                repetition_penalty=repetition_penalty,
            )
        except EndpointError as error:
            self.failed[question] = error
            self.lost = 0 if error.status else self.lost + 1
            return ""
        self.lost = 0
        if "</think>" in reply.content and _UNPARSED not in self.notes:
            self.notes.append(_UNPARSED)
        unreasoned = question.thinking and "</think>" not in reply.turn
        return f"</think>{reply.turn}" if unreasoned and reply.finish == "stop" else reply.turn

    def chat(self, messages: Sequence[Message], **options: Any) -> ChatReply:
        """Return the model's turn; options as for `request`.

        Raises:
            EndpointError: the server refused or failed.
        """
        return chat(self.client, self.request(messages, **options))

    def streamed(self, messages: Sequence[Message], **options: Any) -> StreamedReply:
        """Return the model's turn, sent in pieces; options as for `request`.

        Raises:
            EndpointError: the server refused or failed, or the stream breaks off.
        """
        return streamed_chat(self.client, self.request(messages, **options))

    def request(
        self,
        messages: Sequence[Message],
        *,
        tokens: int,
        thinking: bool = False,
        repetition_penalty: float = 1.0,
        template: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Return a request for a turn.

        Args:
            messages: the conversation.
            tokens: most tokens of the turn.
            thinking: whether to reason, if that can be switched.
            repetition_penalty: as in transformers; 1 for none.
            template: further variables of the chat template.
            more: further parameters of the OpenAI API; None leaves a default one out.
        """
        request: dict[str, Any] = {
            "model": self.served.name,
            "messages": [dict(message) for message in messages],
            "max_tokens": tokens,
            "temperature": 0.0,
        }
        if self._penalized and repetition_penalty != 1.0:
            # as vLLM, SGLang and TGI call it, and as llama-server does
            request["repetition_penalty"] = request["repeat_penalty"] = repetition_penalty
            request["repeat_last_n"] = _SEEN
        if self.served.dialect == "ollama":
            request["reasoning_effort"] = "medium" if thinking else "none"
        elif self._switches:
            request["chat_template_kwargs"] = {"enable_thinking": thinking, **(template or {})}
        request |= more
        return {name: value for name, value in request.items() if value is not None}

    def prompt(self, variables: Mapping[str, Any]) -> str | None:
        """Return the prompt that the server writes for a conversation; None if it does not tell.

        Args:
            variables: of a chat template: the messages, tools, switches.

        Raises:
            EndpointError: the server refused or failed.
        """
        if self.served.dialect != "vllm":
            return None
        named = {"messages", "tools", "add_generation_prompt"}
        switches = {name: value for name, value in variables.items() if name not in named}
        body = {name: variables[name] for name in named if variables.get(name) is not None}
        body |= {"model": self.served.name, "chat_template_kwargs": switches}
        answer = self.client.post("/tokenize", body)
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        whole = self.client.post("/detokenize", {"model": self.served.name, "tokens": tokens})
        return text_in(whole, "prompt")
