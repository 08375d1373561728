# SPDX-License-Identifier: Apache-2.0
"""A conversation whose turns start where the model's kept states end.

The next prompt is rendered from the messages as always. What of it was read before, and what was
read ahead after the last answer, is found by the engine, token by token.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgecascade.backends.base import Array, Snapshot
from edgecascade.bundle import Bundle
from edgecascade.completion import Completion, Piece
from edgecascade.errors import InvalidRequest, SnapshotError
from edgecascade.sampling import SamplingParams
from edgecascade.snapshots import CutRule
from edgecascade.statefile import SavedState, read_state, write_state
from edgecascade.text.prompt import Prompt, Prompter
from edgecascade.text.template import checked_messages
from edgecascade.text.tools import checked_tools
from edgecascade.ticket import Queueing

Content = str | bytes | dict[str, Any] | Sequence[dict[str, Any]]


class Host(Protocol):
    """What a session needs of an LLM."""

    bundle: Bundle
    prompter: Prompter
    rule: CutRule

    def merged(self, params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
        """Parameters with some of them replaced."""

    def pieces(
        self, prompt: Prompt, params: SamplingParams, how: Queueing
    ) -> Generator[Piece, None, None]:
        """Generate."""

    def kept(self, tokens: Array) -> Snapshot | None:
        """The longest state along these tokens."""

    def keep(self, tokens: Array, state: Snapshot) -> bool:
        """Keep a state."""


class Session:
    """Turns of one conversation, one at a time."""

    def __init__(
        self, llm: Host, system: str | None, tools: Sequence[dict[str, Any]] | None
    ) -> None:
        llm.prompter.needed_tokenizer()
        self._llm = llm
        self._tools = checked_tools(tools)
        self._messages = [] if system is None else checked_messages([_message("system", system)])
        self._busy = False

    @classmethod
    def load(cls, llm: Host, path: str | Path) -> Session:
        """The conversation that `save` wrote, with its state, so that it needs no prefill."""
        saved = read_state(path, bundle_id=llm.bundle.id, family=llm.bundle.family)
        session = cls(llm, None, None)
        try:
            session._messages = _checked_history(saved.extra.get("messages"))
            session._tools = checked_tools(saved.extra.get("tools"))
        except InvalidRequest as error:
            raise SnapshotError(f"{path}: {error}; save the session again") from error
        # A state from pieces of another size is right, but not to the last bit: it is read anew.
        if len(saved.tokens) and saved.extra.get("chunk_tokens") == llm.rule.chunk_tokens:
            llm.keep(saved.tokens, saved.snapshot)
        return session

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far."""
        return list(self._messages)

    def generate(
        self,
        content: Content,
        *,
        params: SamplingParams | None = None,
        priority: int = 1,
        deadline_s: float | None = None,
        **overrides: Any,
    ) -> Completion:
        """Answer a user's text, or messages such as a tool's results."""
        how: dict[str, Any] = {"priority": priority, "deadline_s": deadline_s}
        for piece in self.stream(content, params=params, **how, **overrides):
            answer = piece.completion
        assert answer is not None
        return answer

    def stream(
        self,
        content: Content,
        *,
        params: SamplingParams | None = None,
        priority: int = 1,
        deadline_s: float | None = None,
        **overrides: Any,
    ) -> Generator[Piece, None, None]:
        """As generate(), token by token. A turn that is closed early leaves no trace."""
        params = self._llm.merged(params, overrides)
        how = Queueing(priority=priority, deadline_s=deadline_s)
        before = self._messages
        messages = before + _new_messages(content)
        prompt = self._llm.prompter.from_messages(messages, self._tools, thinking=params.thinking)
        return self._turn(before, messages, self._llm.pieces(prompt, params, how))

    def save(self, path: str | Path) -> None:
        """Write the conversation and its state; LLM.load_session() goes on with it.

        Raises:
            InvalidRequest: when the file cannot be written, or the session is answering.
        """
        if self._busy:
            raise InvalidRequest("this session is answering; finish or close its stream first")
        history, kept = np.zeros(0, np.int32), None
        if self._messages:
            history = self._llm.prompter.history(self._messages, self._tools, whoever=True)
            kept = self._llm.kept(history)
        state = kept or Snapshot(0, {})
        saved = SavedState(
            bundle_id=self._llm.bundle.id,
            family=self._llm.bundle.family,
            tokens=history[: state.tokens],
            snapshot=state,
            extra={
                "messages": self._messages,
                "tools": self._tools,
                "chunk_tokens": self._llm.rule.chunk_tokens,
            },
        )
        write_state(path, saved)

    def _turn(
        self,
        before: list[dict[str, Any]],
        messages: list[dict[str, Any]],
        pieces: Generator[Piece, None, None],
    ) -> Generator[Piece, None, None]:
        if self._busy:
            raise InvalidRequest("this session is answering; finish or close its stream first")
        if self._messages is not before:
            raise InvalidRequest("the session has gone on since this turn was asked; ask it again")
        self._busy = True
        try:
            for piece in pieces:
                if piece.completion:
                    self._messages = [*messages, piece.completion.message]
                yield piece
        finally:
            pieces.close()
            self._busy = False


def _checked_history(messages: Any) -> list[dict[str, Any]]:
    return [] if messages == [] else checked_messages(messages)


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _new_messages(content: Content) -> list[dict[str, Any]]:
    if isinstance(content, str | bytes):
        return checked_messages([_message("user", content)])
    return checked_messages([content] if isinstance(content, dict) else content)
