# SPDX-License-Identifier: Apache-2.0
"""One generation between its first and its last token: tokens in, pieces out, no backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from edgecascade.completion import Completion, FinishReason, Piece, Timings, TokenLogprob, Usage
from edgecascade.sampling import (
    Draws,
    Logits,
    SampleRow,
    Sampling,
    SamplingParams,
    logprob,
    top_logprobs,
)
from edgecascade.text.budget import ThinkingBudget
from edgecascade.text.prompt import Prompt
from edgecascade.text.stream import TextDelta, TextStream

NONE_SEEN = np.zeros(0, np.int32)


@dataclass
class Running:
    """A request on its way: what it was asked, what it has made so far."""

    prompt: Prompt
    params: SamplingParams
    sampling: Sampling
    room: int  # tokens it may make
    stop_ids: frozenset[int]
    text: TextStream | None  # None: the bundle has no tokenizer
    budget: ThinkingBudget | None
    bundle_id: str
    cached: int = 0  # tokens of the prompt that needed no reading
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self._draws = Draws(self.params.seed)
        self._created = self._admitted = self._prefilled = self._first = perf_counter()
        self._logprobs: list[TokenLogprob] = []
        self._deltas: list[TextDelta] = []
        self._reasoning_tokens = 0
        # Token -> occurrences in the answer; only kept where a penalty reads it.
        self._seen = dict.fromkeys(self.prompt.tokens, 0) if self.sampling.penalises else {}

    def admit(self, cached_tokens: int) -> None:
        """It got a slot, with so much of its prompt in it."""
        self.cached, self._admitted = cached_tokens, perf_counter()

    def prefilled(self) -> None:
        """Its prompt was read."""
        self._prefilled = perf_counter()

    def row(self) -> SampleRow:
        """How to sample its next token."""
        uniform = self._draws.next() if self.sampling.temperature else 0.0
        if not self._seen:
            return SampleRow(self.sampling, uniform, NONE_SEEN, NONE_SEEN)
        seen = np.fromiter(self._seen.keys(), np.int32, len(self._seen))
        count = np.fromiter(self._seen.values(), np.int32, len(self._seen))
        return SampleRow(self.sampling, uniform, seen, count)

    def accept(self, token: int, chance: float, logits: Logits) -> Piece:
        """Take the sampled token, or the one the thinking budget forces, and say what it adds."""
        forced = self.budget.forced() if self.budget and self._in_reasoning else None
        if forced is not None:
            token, chance = forced, logprob(logits, forced)
        if not self.tokens:
            self._first = perf_counter()
        self.tokens.append(token)
        if self.sampling.penalises:
            self._seen[token] = self._seen.get(token, 0) + 1
        if self.params.logprobs is not None:
            top = top_logprobs(logits, self.params.logprobs)
            self._logprobs.append(TokenLogprob(token, chance, top))
        delta = TextDelta()
        if token in self.stop_ids and forced is None:
            self.finish_reason = "stop"
        else:
            delta = self._push(token)
        if self.finish_reason is None and len(self.tokens) >= self.room:
            self.finish_reason = "length"
        if self.finish_reason and self.text:
            delta += self.text.finish()
        self._deltas.append(delta)
        if self.finish_reason == "stop" and any(part.tool_calls for part in self._deltas):
            self.finish_reason = "tool_calls"
        return Piece(
            text=delta.text,
            reasoning=delta.reasoning,
            token_ids=(token,),
            tool_calls=delta.tool_calls,
            logprobs=None if self.params.logprobs is None else tuple(self._logprobs[-1:]),
            finish_reason=self.finish_reason,
            completion=self._completion(self.finish_reason) if self.finish_reason else None,
        )

    def stop(self, reason: FinishReason) -> Piece:
        """End it before its time: what was held back, and the completion of what there is."""
        self.finish_reason = reason
        delta = self.text.finish() if self.text else TextDelta()
        self._deltas.append(delta)
        return Piece(
            text=delta.text,
            reasoning=delta.reasoning,
            token_ids=(),
            tool_calls=delta.tool_calls,
            finish_reason=reason,
            completion=self._completion(reason),
        )

    @property
    def _in_reasoning(self) -> bool:
        return self.text is not None and self.text.reasoning

    def _push(self, token: int) -> TextDelta:
        if self.text is None:
            return TextDelta()
        if self.text.reasoning:
            self._reasoning_tokens += 1
            if self.budget:
                self.budget.count(self.text.text_of(token))
        delta = self.text.push(token)
        if self.text.stopped:
            self.finish_reason = "stop"
        return delta

    def _completion(self, reason: FinishReason) -> Completion:
        now = perf_counter()
        if not self.tokens:  # it was stopped early
            self._first = now
            self._prefilled = max(self._prefilled, self._admitted)
        decoding = now - self._first
        return Completion(
            text="".join(part.text for part in self._deltas),
            reasoning="".join(part.reasoning for part in self._deltas),
            tool_calls=tuple(call for part in self._deltas for call in part.tool_calls),
            tool_errors=tuple(error for part in self._deltas for error in part.tool_errors),
            token_ids=tuple(self.tokens),
            finish_reason=reason,
            logprobs=tuple(self._logprobs) if self.params.logprobs is not None else None,
            usage=Usage(
                prompt_tokens=len(self.prompt.tokens),
                cached_tokens=self.cached,
                completion_tokens=len(self.tokens),
                reasoning_tokens=self._reasoning_tokens,
            ),
            timings=Timings(
                queue_s=self._admitted - self._created,
                prefill_s=self._prefilled - self._admitted,
                first_token_s=self._first - self._created,
                decode_tokens_per_s=(len(self.tokens) - 1) / decoding if decoding else 0.0,
                total_s=now - self._created,
            ),
            seed=self._draws.seed,
            bundle_id=self.bundle_id,
        )
