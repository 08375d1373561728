# SPDX-License-Identifier: Apache-2.0
"""A conversation that keeps the model's state between turns.

After each turn two snapshots remain: before the assistant's turn was opened, and after its answer.
The next prompt is rendered from the messages as always; the longest snapshot whose tokens it
begins with is restored, and only the rest is read. So a chat template that drops old reasoning
costs one reading of the last answer, and a snapshot that does not fit is never used.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from edgecascade.completion import Completion, Piece
from edgecascade.errors import InvalidRequest
from edgecascade.sampling import SamplingParams
from edgecascade.sequence import Running, Saved
from edgecascade.text.prompt import Prompt, Prompter
from edgecascade.text.template import checked_messages
from edgecascade.text.tools import checked_tools

MAX_SAVED = 2  # snapshots between turns: each holds all Mamba states and the KV cache

Content = str | bytes | dict[str, Any] | Sequence[dict[str, Any]]


class Host(Protocol):
    """What a session needs of an LLM."""

    prompter: Prompter

    def merged(self, params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
        """Parameters with some of them replaced."""

    def sequence(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        resume: Saved | None = None,
        saves: bool = False,
    ) -> Running:
        """A request, ready to run."""

    def run(self, sequences: Iterable[Running]) -> Iterator[tuple[Running, Piece]]:
        """Generate."""


class Session:
    """Turns of one conversation, one at a time."""

    def __init__(
        self, llm: Host, system: str | None, tools: Sequence[dict[str, Any]] | None
    ) -> None:
        llm.prompter.needed_tokenizer()
        self._llm = llm
        self._tools = checked_tools(tools)
        self._messages = [] if system is None else checked_messages([_message("system", system)])
        self._saved: list[Saved] = []
        self._busy = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far."""
        return list(self._messages)

    def generate(
        self, content: Content, *, params: SamplingParams | None = None, **overrides: Any
    ) -> Completion:
        """Answer a user's text, or messages such as a tool's results."""
        for piece in self.stream(content, params=params, **overrides):
            answer = piece.completion
        assert answer is not None
        return answer

    def stream(
        self, content: Content, *, params: SamplingParams | None = None, **overrides: Any
    ) -> Generator[Piece, None, None]:
        """As generate(), token by token. A turn that is closed early leaves no trace."""
        params = self._llm.merged(params, overrides)
        messages = self._messages + _new_messages(content)
        prompt = self._llm.prompter.from_messages(
            messages, self._tools, thinking=params.thinking, history=True
        )
        fits = [saved for saved in self._saved if _begins(prompt.tokens, saved.tokens)]
        resume = max(fits, key=lambda saved: len(saved.tokens), default=None)
        sequence = self._llm.sequence(prompt, params, resume=resume, saves=True)
        return self._turn(messages, sequence)

    def _turn(
        self, messages: list[dict[str, Any]], sequence: Running
    ) -> Generator[Piece, None, None]:
        if self._busy:
            raise InvalidRequest("this session is answering; finish or close its stream first")
        self._busy = True
        try:
            for _, piece in self._llm.run([sequence]):
                if piece.completion:
                    self._messages = [*messages, _answer(piece.completion)]
                    kept = [sequence.resume] if sequence.resume else []
                    self._saved = (kept + sequence.saved)[-MAX_SAVED:]
                yield piece
        finally:
            self._busy = False


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _new_messages(content: Content) -> list[dict[str, Any]]:
    if isinstance(content, str | bytes):
        return checked_messages([_message("user", content)])
    return checked_messages([content] if isinstance(content, dict) else content)


def _answer(completion: Completion) -> dict[str, Any]:
    message = _message("assistant", completion.text)
    if completion.reasoning:
        message["reasoning_content"] = completion.reasoning
    if completion.tool_calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in completion.tool_calls
        ]
    return message


def _begins(tokens: tuple[int, ...], start: tuple[int, ...]) -> bool:
    # At least one token must be left to read: its logits choose the first token of the answer.
    return len(start) < len(tokens) and tokens[: len(start)] == start
