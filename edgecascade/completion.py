# SPDX-License-Identifier: Apache-2.0
"""What a generation returns: pieces while it runs, a completion at its end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgecascade.errors import EdgeCascadeError
from edgecascade.text.tools import ToolCall

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "deadline"]


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of one answered token before any sampling rule, and of its rivals."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens that a generation took. `cached_tokens` of the prompt came from a snapshot."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True)
class Timings:
    """Where the time went. `first_token_s` and `total_s` count from the call."""

    queue_s: float
    prefill_s: float
    first_token_s: float
    decode_tokens_per_s: float
    total_s: float


@dataclass(frozen=True)
class Completion:
    """One answer.

    `token_ids` are all tokens that the model made, reasoning and the token that ended it included.
    `tool_errors` says why calls that are still in `text` could not be read.
    """

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    tool_errors: tuple[str, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None
    usage: Usage
    timings: Timings
    seed: int
    bundle_id: str

    @property
    def finished(self) -> bool:
        """Whether the model ended it, or its bound did, and not the caller or the clock."""
        return self.finish_reason in ("stop", "length", "tool_calls")

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message, with which the conversation goes on."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Piece:
    """What one token added. The last piece carries the completion."""

    text: str
    reasoning: str
    token_ids: tuple[int, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    completion: Completion | None = None


@dataclass(frozen=True)
class Accepted:
    """A submitted request waits behind so many others."""

    position: int


@dataclass(frozen=True)
class Failure:
    """A submitted request ended without an answer."""

    error: EdgeCascadeError


# What a submitted request is told: Accepted, pieces, then one Completion or Failure.
Event = Accepted | Piece | Completion | Failure
